"""A finished run comes in; for each promise it makes, whether it was kept goes out."""
