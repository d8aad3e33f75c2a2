"""Labels that a person gives to finished recordings: who, when and why, in a new bundle beside the original."""
