"""What a store holds, bundle by bundle: accepted, degraded, rejected or errored, each with its reasons."""
