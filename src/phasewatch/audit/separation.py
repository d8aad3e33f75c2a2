"""Which channels tell a phase from clean, one at a time: a description of a corpus, not a result (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phasewatch.audit.leaks import Windows
from phasewatch.vocab import PHASES, Phase

STAT = ".mean"
SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Separation:
    """How well single channels tell the windows of one phase from clean ones.

    Attributes:
        best: ``(channel, AUC)``, best first; an AUC below one half says that the channel is lower than in clean.
    """

    phase: Phase
    windows: int
    best: tuple[tuple[str, float], ...]


def separate(w: Windows) -> tuple[Separation, ...]:
    """Rank the channels' window means by the area under the ROC curve against clean, over all lab episodes.

    The area is the chance that a window of the phase has a higher mean than a clean one, ties counted half
    (Mann and Whitney 1947). Windows of all hosts and profiles are pooled, so it understates what a model can do.
    """
    from scipy.stats import rankdata

    lab = w.role[w.of] == "lab"
    columns = [i for i, name in enumerate(w.names) if name.endswith(STAT)]
    found = []
    for phase in PHASES[1:]:
        rows = lab & np.isin(w.y, (0, phase.code))
        is_phase = w.y[rows] == phase.code
        if not is_phase.any() or is_phase.all():
            continue
        areas = []
        for i in columns:
            x = w.x[rows, i]
            known = np.isfinite(x)
            a, b = int((is_phase & known).sum()), int((~is_phase & known).sum())
            ranks = rankdata(x[known])
            area = (ranks[is_phase[known]].sum() - a * (a + 1) / 2) / (a * b) if a and b else 0.5
            areas.append((w.names[i].removesuffix(STAT), float(area)))
        best = sorted(areas, key=lambda each: (-abs(each[1] - 0.5), each[0]))[:SHOWN]
        found.append(Separation(phase=phase, windows=int(is_phase.sum()), best=tuple(best)))
    return tuple(found)


def render_separations(found: Sequence[Separation]) -> list[tuple[str, str, str]]:
    """Give a table's rows: phase, windows, channels with their areas."""
    return [(str(s.phase), f"{s.windows:,}", ", ".join(f"`{name}` {area:.2f}" for name, area in s.best)) for s in found]
