"""The page that shows what happens: events come in, viewers' streams go out. It knows events and nothing of runs.

The **hub** keeps the last events in one bounded **log**; a **viewer** is a place in it. Who falls out of the log is
dropped, and told by an explicit **gap** when it comes back.
"""
