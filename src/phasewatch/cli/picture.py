"""An episode as text: a ribbon of phases over one line of blocks a channel."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from phasewatch.channels import CHANNELS
from phasewatch.episode.model import Episode
from phasewatch.grid.align import Grid
from phasewatch.vocab import BIN_NS

SHOWN = ("proc.vcpu_run", "proc.io_write_bytes", "qmp.blk_rd_bytes", "qmp.blk_wr_bytes", "qmp.jit_tlb_partial", "netflow.out_bytes",
         "netflow.in_bytes", "netflow.new_flows", "netflow.dns_queries", "guest.ctxt")  # fmt: skip
BLOCKS = " ▁▂▃▄▅▆▇█"
WIDTH = 72


def draw(episode: Episode, grid: Grid) -> list[str]:
    """Draw the phases' first letters over each shown channel, every column the largest of its bins; ``?`` is unknown."""
    n = len(grid.bins)
    edges = np.linspace(0, n, min(WIDTH, n) + 1).astype(int)
    ribbon = []
    for start in edges[:-1]:
        at_ns = episode.t0_ns + int(start) * BIN_NS
        phase = next((m.phase for m in reversed(episode.marks) if m.phase and m.t_wall_ns <= at_ns), None)
        ribbon.append(str(phase)[0] if phase else "?")
    lines = [f"{'phase':<22}{''.join(ribbon)}"]
    names = [c.full_name for c in CHANNELS]
    for name in SHOWN:
        column = grid.bins[:, names.index(name)]
        tops = [_top(column[a:b]) for a, b in pairwise(edges)]
        most = max((t for t in tops if not math.isnan(t)), default=0.0)
        cells = "".join(
            "?" if math.isnan(t) else BLOCKS[math.ceil(8 * t / most) if most > 0 and t > 0 else 0] for t in tops
        )
        lines.append(f"{name:<22}{cells}  max {most:.3g} {CHANNELS[names.index(name)].unit}")
    return lines


def _top(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else math.nan
