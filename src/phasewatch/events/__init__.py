"""Events of the dashboard: their schema, and producers that replay episodes and publish scores and process metrics.

Producers build plain `EventData`; `publish` wraps it in envelopes and sends it to a dashboard, a file or a pipe.
"""
