"""phasewatch tells which phase malware in a virtual machine is in, from outside, and how well that can be told."""

__version__ = "0.1.0"
