"""Serve the live dashboard: receive events, and send them to browsers as server-sent events.

The **hub** keeps the last events in one bounded **log**; a **viewer** is a position in the log. A viewer that falls
behind the log is disconnected, and its browser shows a **gap** after it reconnects.
"""
