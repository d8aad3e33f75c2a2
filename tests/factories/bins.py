"""Bins of one VM as plain arrays, and their comparison to the bit."""

from __future__ import annotations

import numpy as np

from phasewatch.channels import CHANNEL_NAMES, CHANNELS


def build_busy_bins(n: int, seed: int, *, gaps: float = 0.0) -> np.ndarray:
    """Build bins with bursts: each channel is 0 in most bins and large in some."""
    rng = np.random.default_rng(seed)
    level = 10.0 ** rng.integers(-1, 6, len(CHANNELS))
    bins = (rng.random((n, len(CHANNELS))) * level * (rng.random((n, len(CHANNELS))) < 0.4)).astype(np.float32)
    bins[:, CHANNEL_NAMES.index("proc.vcpu_run")] = rng.random(n)
    bins[rng.random(bins.shape) < gaps] = np.nan
    return bins


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))
