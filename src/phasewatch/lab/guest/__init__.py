"""The guest side: C sources and the init script that `lab.guest_image` packs."""
