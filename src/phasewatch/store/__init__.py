"""Where bundles lie: they go in once and whole, each with a receipt, and come out in one order."""
