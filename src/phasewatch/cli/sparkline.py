"""Sparklines: an episode as text, its phases above one line of bars per channel."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from phasewatch.binning.align import EpisodeBins
from phasewatch.bundle.model import Episode
from phasewatch.channels import CHANNELS
from phasewatch.types import BIN_NS, Phase

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
_PHASE_LETTERS = {
    Phase.CLEAN: "c",
    Phase.ARMED: "r",
    Phase.INFECTING: "i",
    Phase.ACTIVE: "a",
    Phase.DORMANT: "d",
    Phase.UNKNOWN: "?",
}


def render_sparklines(episode: Episode, binned: EpisodeBins) -> list[str]:
    """Return a line with the phases, then a sparkline for each of ten fixed channels.

    Args:
        episode: The episode.
        binned: Its bins, ``(n, c)`` float32.

    Returns:
        Lines with at most 72 characters of data each. In a channel's line, each character shows the maximum of its
        bins, relative to the channel's maximum; ``?`` is unknown. The line of the phases ends with their legend.
    """
    n = len(binned.bins)
    edges = np.linspace(0, n, min(_WIDTH, n) + 1).astype(int)
    letters = []
    for start in edges[:-1]:
        at_ns = episode.t0_ns + int(start) * BIN_NS
        phase = next((m.phase for m in reversed(episode.marks) if m.phase and m.t_wall_ns <= at_ns), None)
        letters.append(_PHASE_LETTERS[phase or Phase.UNKNOWN])
    legend = ", ".join(f"{letter} {phase}" for phase, letter in _PHASE_LETTERS.items())
    lines = [f"{'phase':<22}{''.join(letters)}  {legend}"]
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
