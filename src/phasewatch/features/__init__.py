"""Features: ten-second windows, their statistics, derived and context columns, labels, and the feature tables."""
