"""The C sources and the init script of the guest program; `lab.guest_image` compiles and packs them."""
