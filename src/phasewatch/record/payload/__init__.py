"""The guest side: C sources and the init script that `record.image` packs."""
