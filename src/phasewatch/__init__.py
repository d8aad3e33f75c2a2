"""phasewatch tells which phase malware in a virtual machine is in, from outside, and how well that can be told."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from phasewatch._version import __version__

if TYPE_CHECKING:
    from phasewatch.dataset import load

__all__ = ["__version__", "load"]

# onnxruntime reads it while it is loaded, whoever loads it: us, torch's exporter or a program that uses us. Without it,
# version 1.29 and later write a device id below the home folder and look their maker's host up every ten seconds.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def __getattr__(name: str) -> Any:
    """Import `load` when it is asked for: with it comes all that reads a run, and `--help` wants none of that."""
    if name == "load":
        from phasewatch.dataset import load

        return load
    raise AttributeError(f"phasewatch has no {name!r}")
