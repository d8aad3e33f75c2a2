"""Binning: rebased readings become one row of 46 channel values every half second, in memory and on disk."""
