"""phasewatch detects malware phases in a virtual machine from outside, and measures how well it works."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from phasewatch._version import __version__

if TYPE_CHECKING:
    from phasewatch.dataset import load

__all__ = ["__version__", "load"]

# onnxruntime reads it when it is loaded, by phasewatch, by torch's exporter or by a program that uses phasewatch.
# Without
# it, version 1.29 and later write a device id to the home folder and look up their vendor's host every ten seconds.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def __getattr__(name: str) -> Any:
    """Import `load` on first use; it imports everything that reads a run, which would slow down ``--help``."""
    if name == "load":
        from phasewatch.dataset import load

        return load
    raise AttributeError(f"phasewatch has no {name!r}")
