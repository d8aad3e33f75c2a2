"""Sparklines: an episode as text, its phases above one line of bars per channel."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from phasewatch.binning.align import EpisodeBins
from phasewatch.bundle.model import Episode
from phasewatch.channels import CHANNELS
from phasewatch.types import BIN_NS

__all__ = ["render_sparklines"]

_DRAWN_CHANNELS = (
    "proc.vcpu_run",
    "proc.io_write_bytes",
    "qmp.blk_rd_bytes",
    "qmp.blk_wr_bytes",
    "qmp.jit_tlb_partial",
    "netflow.out_bytes",
    "netflow.in_bytes",
    "netflow.new_flows",
    "netflow.dns_queries",
    "guest.ctxt",
)
_BAR_CHARACTERS = " ▁▂▃▄▅▆▇█"
_WIDTH = 72  # characters


def render_sparklines(episode: Episode, binned: EpisodeBins) -> list[str]:
    """Return the sparklines of the channels that are drawn, below the first letters of the phases.

    Args:
        episode: The episode.
        binned: Its bins, ``(n, c)`` float32.

    Returns:
        Lines of at largest 72 columns of data. A column is the largest of its bins; ``?`` is unknown.
    """
    n = len(binned.bins)
    edges = np.linspace(0, n, min(_WIDTH, n) + 1).astype(int)
    letters = []
    for start in edges[:-1]:
        at_ns = episode.t0_ns + int(start) * BIN_NS
        phase = next((m.phase for m in reversed(episode.marks) if m.phase and m.t_wall_ns <= at_ns), None)
        letters.append(str(phase)[0] if phase else "?")
    lines = [f"{'phase':<22}{''.join(letters)}"]
    names = [c.full_name for c in CHANNELS]
    for name in _DRAWN_CHANNELS:
        column = binned.bins[:, names.index(name)]
        maxima = [_finite_max(column[a:b]) for a, b in pairwise(edges)]
        largest = max((t for t in maxima if not math.isnan(t)), default=0.0)
        cells = "".join(
            "?" if math.isnan(t) else _BAR_CHARACTERS[math.ceil(8 * t / largest) if largest > 0 and t > 0 else 0]
            for t in maxima
        )
        lines.append(f"{name:<22}{cells}  max {largest:.3g} {CHANNELS[names.index(name)].unit}")
    return lines


def _finite_max(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else math.nan
