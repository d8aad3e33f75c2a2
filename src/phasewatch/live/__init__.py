"""Watching as it happens: the events that a watcher, a replay or a scorer sends and a dashboard shows.

An **event** is one JSON object of one of six types; a **name** in it is a word that is safe to stand in a page's data.
"""
