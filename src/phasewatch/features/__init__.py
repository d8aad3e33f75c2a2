"""Features: ten-second windows of bins, five statistics for each channel, labels, and the feature tables."""
