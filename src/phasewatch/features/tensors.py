"""Windows as tensors: strided views of the mapped grids, nothing copied until a batch is asked for, nothing written."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided, sliding_window_view
from numpy.typing import NDArray

from phasewatch.features.windows import n_windows
from phasewatch.vocab import STRIDE_BINS, WINDOW_BINS

Bins = NDArray[np.float32]


def window_view(bins: Bins) -> Bins:
    """Give the windows of one episode as ``(w, 20, c)``, a read-only view of its ``(n, c)`` bins."""
    n, c = bins.shape
    if n_windows(n) == 0:
        return np.empty((0, WINDOW_BINS, c), np.float32)
    view: Bins = sliding_window_view(bins, WINDOW_BINS, axis=0)[::STRIDE_BINS].transpose(0, 2, 1)
    return view


def window_rows(offset: int, n_bins: int) -> NDArray[np.int64]:
    """Give the rows of the mapped grids at which one episode's windows begin."""
    return offset + STRIDE_BINS * np.arange(n_windows(n_bins), dtype=np.int64)


def gather(bins: Bins, begins: NDArray[np.int64]) -> Bins:
    """Copy a batch of windows out of the mapped grids.

    Args:
        bins: ``(N, c)`` all episodes end to end; contiguous in time.
        begins: ``(b,)`` first rows of the wanted windows, in any order.

    Returns:
        ``(b, 20, c)`` float32.

    Raises:
        IndexError: If a window reaches beyond the grids.
    """
    n, c = bins.shape
    if len(begins) and not (int(begins.min()) >= 0 and int(begins.max()) + WINDOW_BINS <= n):
        raise IndexError(f"a window begins at row {int(begins.min())} or {int(begins.max())} of {n}")
    if n < WINDOW_BINS:
        return np.empty((0, WINDOW_BINS, c), np.float32)
    by_time, by_channel = bins.strides
    # Every row may begin a window; one fancy index then copies 20 · c neighbouring floats at a time.
    every = as_strided(bins, (n - WINDOW_BINS + 1, WINDOW_BINS, c), (by_time, by_time, by_channel), writeable=False)
    batch: Bins = every[begins]
    return batch
