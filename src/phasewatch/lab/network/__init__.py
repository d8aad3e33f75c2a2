"""lab/network."""
