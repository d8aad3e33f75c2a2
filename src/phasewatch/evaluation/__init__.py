"""Predictions come in; numbers with their intervals over sessions, and the one headline, go out. Nothing is fitted here."""
