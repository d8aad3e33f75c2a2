"""Binning: rebased readings become one row of 73 channel values every half second, in memory and on disk."""
