"""Sets of windows come in; for each cell of the grid a checkpoint and its predictions go out."""
