"""Adapt a model to the known-clean hours of a site, and measure what that changes elsewhere."""
