"""The stages of a run, the pipeline through all of them, and the publication of a finished run."""
