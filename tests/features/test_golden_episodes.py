"""The golden episodes of the behaviour fingerprint distinguish each statistic from similar ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from phasewatch.binning.align import bin_episode
from phasewatch.features.fingerprint import build_golden_episodes
from phasewatch.features.stats import BIN_S, STATS, window_stats
from phasewatch.features.windows import build_window_view

TICKS_S = BIN_S * np.arange(20)

# Statistic, and a definition that a programmer could mistake it for; each maps (n, 20) to (n,).
SIMILAR: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "sample instead of population deviation": ("std", lambda x: x.std(axis=1, ddof=1)),
    "40th percentile instead of the median": ("p50", lambda x: np.percentile(x, 40, axis=1)),
    "lower instead of interpolated 95th percentile": ("p95", lambda x: np.percentile(x, 95, axis=1, method="lower")),
    "Hazen's instead of the linear 95th percentile": ("p95", lambda x: np.percentile(x, 95, axis=1, method="hazen")),
    "94th percentile": ("p95", lambda x: np.percentile(x, 94, axis=1)),
    "slope per bin instead of per second": ("slope", lambda x: np.polyfit(TICKS_S / BIN_S, x.T, 1)[0]),
    "slope backwards in time": ("slope", lambda x: np.polyfit(-TICKS_S, x.T, 1)[0]),
}


@pytest.fixture(scope="module")
def golden() -> tuple[np.ndarray, np.ndarray]:
    """All golden windows without a gap, and their statistics: ``(n, 20)`` float64, ``(n, 5)`` float32."""
    windows, stats = [], []
    for _, episode in build_golden_episodes():
        bins = bin_episode(episode).bins
        if len(bins) >= 20:
            x = np.asarray(build_window_view(bins), np.float64).transpose(0, 2, 1)  # (w, c, 20)
            full = np.isfinite(x).all(axis=2)
            windows.append(x[full])
            stats.append(window_stats(bins)[full])
    return np.concatenate(windows), np.concatenate(stats)


@pytest.mark.parametrize("name", SIMILAR)
def test_golden_episodes_distinguish_a_statistic_from(name: str, golden: tuple[np.ndarray, np.ndarray]) -> None:
    windows, stats = golden
    stat, similar = SIMILAR[name]

    other = similar(windows).astype(np.float32)

    assert not np.allclose(other, stats[:, STATS.index(stat)], rtol=1e-5)


def test_golden_episodes_hold_windows_with_gaps() -> None:
    shares = [np.isnan(bin_episode(episode).bins).mean() for _, episode in build_golden_episodes()]

    assert sum(0 < share < 1 for share in shares) >= 5
