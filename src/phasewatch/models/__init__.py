"""Windows with known phase come in; a model that gives the probability of each phase, and its checkpoint, go out."""
