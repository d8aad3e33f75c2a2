"""From a run to events: an episode replayed, its scores, its profiles; and what a process measures of itself.

What a producer gives is plain `Data`; `send` puts it into envelopes and hands it to a page, a file or a pipe.
"""
