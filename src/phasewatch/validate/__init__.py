"""Validation: every bundle of a store is accepted, degraded, rejected or errored, with reasons."""
