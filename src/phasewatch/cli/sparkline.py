"""An episode as text: its phases over one line of bars per channel."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from phasewatch.binning.align import EpisodeBins
from phasewatch.bundle.model import Episode
from phasewatch.channels import CHANNELS
from phasewatch.types import BIN_NS

DRAWN_CHANNELS = ("proc.vcpu_run", "proc.io_write_bytes", "qmp.blk_rd_bytes", "qmp.blk_wr_bytes", "qmp.jit_tlb_partial", "netflow.out_bytes",
         "netflow.in_bytes", "netflow.new_flows", "netflow.dns_queries", "guest.ctxt")  # fmt: skip
_BAR_CHARACTERS = " ▁▂▃▄▅▆▇█"
PICTURE_WIDTH = 72


def render_sparklines(episode: Episode, grid: EpisodeBins) -> list[str]:
    """Draw the phases' first letters over each shown channel, every column the largest of its bins; ``?`` is unknown."""
    n = len(grid.bins)
    edges = np.linspace(0, n, min(PICTURE_WIDTH, n) + 1).astype(int)
    ribbon = []
    for start in edges[:-1]:
        at_ns = episode.t0_ns + int(start) * BIN_NS
        phase = next((m.phase for m in reversed(episode.marks) if m.phase and m.t_wall_ns <= at_ns), None)
        ribbon.append(str(phase)[0] if phase else "?")
    lines = [f"{'phase':<22}{''.join(ribbon)}"]
    names = [c.full_name for c in CHANNELS]
    for name in DRAWN_CHANNELS:
        column = grid.bins[:, names.index(name)]
        tops = [_finite_max(column[a:b]) for a, b in pairwise(edges)]
        most = max((t for t in tops if not math.isnan(t)), default=0.0)
        cells = "".join(
            "?" if math.isnan(t) else _BAR_CHARACTERS[math.ceil(8 * t / most) if most > 0 and t > 0 else 0]
            for t in tops
        )
        lines.append(f"{name:<22}{cells}  max {most:.3g} {CHANNELS[names.index(name)].unit}")
    return lines


def _finite_max(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else math.nan
