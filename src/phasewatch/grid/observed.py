"""Which values each channel took in a store's bins (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS, ChannelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What one channel took, over all bins of all episodes, in its unit.

    Attributes:
        known: Share of bins that have a value.
        moving: Share of the episodes that know it in which it is not constant.
        low, median, p95, high: NaN where no bin knows it.
    """

    channel: ChannelSpec
    known: float
    moving: float
    low: float
    median: float
    p95: float
    high: float

    @property
    def is_constant(self) -> bool:
        """Whether it never changed, or was never known."""
        return not self.low < self.high


def observe(
    episodes: Sequence[NDArray[np.float32]], channels: Sequence[ChannelSpec] = CHANNELS
) -> tuple[Observed, ...]:
    """Look at every channel over some episodes.

    Args:
        episodes: Each ``(n_bins, c)``, NaN where nothing was known.
        channels: What the columns are.
    """
    bins = np.concatenate([np.asarray(e) for e in episodes]) if episodes else np.zeros((0, len(channels)), np.float32)
    found = []
    for i, channel in enumerate(channels):
        column = bins[:, i]
        values = column[np.isfinite(column)].astype(np.float64)
        spans = [np.ptp(known) for e in episodes if len(known := e[:, i][np.isfinite(e[:, i])])]
        low, median, p95, high = np.quantile(values, (0, 0.5, 0.95, 1)) if len(values) else [np.nan] * 4
        found.append(
            Observed(
                channel=channel, known=len(values) / max(1, len(column)),
                moving=float(np.mean(np.array(spans) > 0)) if spans else 0.0,
                low=float(low), median=float(median), p95=float(p95), high=float(high),
            )
        )  # fmt: skip
    return tuple(found)
