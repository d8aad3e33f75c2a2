"""Scripts that generate the documentation and pictures; run as `python -m tools.NAME` from the repository."""
