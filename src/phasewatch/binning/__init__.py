"""From readings at any time to one row of 46 numbers every half second: stamps re-based, bins made, grids kept on disk."""
