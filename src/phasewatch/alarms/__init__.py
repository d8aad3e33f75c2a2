"""Alarms after they are raised: their life, their history, and the outputs that carry them to people."""
