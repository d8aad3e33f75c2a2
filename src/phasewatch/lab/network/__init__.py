"""The simulated network of the lab: addresses, services and the process behind each VM's network card."""
