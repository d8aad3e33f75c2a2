"""Five statistics of the bins of a window or an episode, for each channel: mean, std, median, 95th percentile, slope.

The order of every sum is fixed (left to right in float64), so that every machine and the live watcher get the same
bits. numpy's own order of a sum depends on the width of the array and is not used for sums over time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array, FloatArray
from phasewatch.binning.align import to_float32
from phasewatch.features.windows import n_windows
from phasewatch.types import MIN_FINITE_BINS, STRIDE_BINS, WINDOW_BINS

__all__ = ["BIN_S", "SORTING_NETWORK_10", "STATS", "episode_stats", "window_stats"]

STATS = ("mean", "std", "p50", "p95", "slope")
BIN_S = 0.5


# 29 exchanges that sort ten rows (Knuth 5.3.4); checked by the zero-one principle in the tests.
SORTING_NETWORK_10 = (
    (4, 9), (3, 8), (2, 7), (1, 6), (0, 5), (1, 4), (6, 9), (0, 3), (5, 8), (0, 2), (3, 6), (7, 9), (0, 1), (2, 4),
    (5, 7), (8, 9), (1, 2), (4, 6), (7, 8), (3, 5), (2, 5), (6, 8), (1, 3), (4, 7), (2, 3), (6, 7), (3, 4), (5, 6),
    (4, 5),
)  # fmt: skip


def window_stats(bins: Float32Array, stride_bins: int = STRIDE_BINS) -> Float32Array:
    """Compute the five statistics of every window of an episode.

    Args:
        bins: ``(n, c)`` float32 from the episode's first bin on, each column in its channel's unit; NaN where unknown.
        stride_bins: Bins from one window's start to the next; a divisor of `STRIDE_BINS`. A window has the same bits
            at every stride.

    Returns:
        ``(w, c, 5)`` float32 in the order of `STATS`. The slope is a least-squares slope per second. A channel with
        fewer than ten finite bins in a window has five NaN.

    Raises:
        ValueError: If `stride_bins` does not divide `STRIDE_BINS`.

    Source: docs/formats/run.md.
    """
    if stride_bins < 1 or STRIDE_BINS % stride_bins:
        raise ValueError(f"a stride of {stride_bins} bins; it must divide {STRIDE_BINS}")
    n, c = bins.shape
    w = n_windows(n, stride_bins)
    if stride_bins == STRIDE_BINS:
        return _compute_half_overlapping(bins, w)
    result = np.empty((w, c, len(STATS)), np.float32)
    step = STRIDE_BINS // stride_bins  # every step-th window overlaps the one before by half
    for first in range(min(step, w)):
        result[first::step] = _compute_half_overlapping(bins[first * stride_bins :], len(result[first::step]))
    return result


def _compute_half_overlapping(bins: Float32Array, w: int) -> Float32Array:
    """Compute the stats of the first `w` windows with a stride of half a window: ``(n, c)`` → ``(w, c, 5)``."""
    c = bins.shape[1]
    if w == 0:
        return np.empty((0, c, len(STATS)), np.float32)
    used = bins[: (w + 1) * STRIDE_BINS]
    finite = np.isfinite(used)
    seen = finite.sum(axis=0)
    result = np.full((w, c, len(STATS)), np.nan)
    full, partial = seen == len(used), (seen > 0) & (seen < len(used))
    with np.errstate(all="ignore"):  # divisions of the masked entries of a gap have no meaning
        if full.all():
            result = _compute_full_windows(used, w)
        else:
            if full.any():
                result[:, full] = _compute_full_windows(used[:, full], w)
            if partial.any():
                x = _stack_windows(used[:, partial], w)
                result[:, partial] = _compute_gappy_columns(x).reshape(w, -1, len(STATS))
    return to_float32(result)


def episode_stats(bins: Float32Array) -> Float32Array:
    """Compute the five statistics of a whole episode: ``(n, c)`` float32 → ``(c, 5)`` float32, as `window_stats`."""
    result = np.full((bins.shape[1], len(STATS)), np.nan)
    finite = np.isfinite(bins)
    seen = finite.sum(axis=0)
    full = (seen == len(bins)) & (seen >= MIN_FINITE_BINS)
    partial = ~full & (seen >= MIN_FINITE_BINS)
    with np.errstate(all="ignore"):
        if full.any():
            result[full] = _compute_full_columns(bins[:, full])
        if partial.any():
            result[partial] = _compute_gappy_columns(bins[:, partial].astype(np.float64))
    return to_float32(result)


def _compute_full_columns(bins: Float32Array) -> FloatArray:
    """Compute the stats of columns in which every bin is finite: ``(n, k)`` → ``(k, 5)``."""
    lying = np.ascontiguousarray(bins.T)  # time along a row: sums and sorts run over neighbours in memory
    n = lying.shape[1]
    x = lying.astype(np.float64)
    mean = _sum_last_axis(x) / n
    x -= mean[:, None]
    ticks = BIN_S * np.arange(n)
    ticks -= ticks.sum() / n  # the sum is exact in any order: multiples of a half
    slope = _sum_last_axis(x * ticks) / _sum_last_axis(ticks * ticks)
    x *= x
    std = np.sqrt(_sum_last_axis(x) / n)
    count = np.full(len(x), n)
    lying.sort(axis=1)
    return np.stack(
        (mean, std, _compute_percentile(lying, count, 0.5), _compute_percentile(lying, count, 0.95), slope), axis=1
    )


def _sum_last_axis(x: FloatArray) -> FloatArray:
    """Sum along the last axis from first to last; a cumulative sum has a fixed order."""
    total: FloatArray = np.cumsum(x, axis=-1)[..., -1]
    return total


def _stack_windows(used: Float32Array, w: int) -> FloatArray:
    """Return the windows as columns: ``(20, w · c)`` float64, where row r is bin r of every window."""
    c = used.shape[1]
    halves = used.reshape(w + 1, STRIDE_BINS, c).transpose(1, 0, 2)
    x = np.empty((WINDOW_BINS, w, c))
    x[:STRIDE_BINS] = halves[:, :-1]
    x[STRIDE_BINS:] = halves[:, 1:]
    return x.reshape(WINDOW_BINS, w * c)


def _compute_full_windows(used: Float32Array, w: int) -> FloatArray:
    """Compute the stats of windows in which every bin is finite: ``(w, c, 5)``."""
    c = used.shape[1]
    x = _stack_windows(used, w)
    out = np.empty((len(STATS), w * c))
    mean = np.divide(_sum_rows(x), WINDOW_BINS, out=out[0])
    x -= mean
    ticks = BIN_S * np.arange(WINDOW_BINS)
    ticks -= ticks.sum() / WINDOW_BINS  # exact: halves and quarters
    np.divide(_sum_rows(x * ticks[:, None]), float((ticks * ticks).sum()), out=out[4])
    x *= x
    np.sqrt(_sum_rows(x) / WINDOW_BINS, out=out[1])
    ninth, tenth, second, top = _select_ranks(used, w)
    out[2] = _interpolate(ninth, tenth, (WINDOW_BINS - 1) * 0.5 - 9)
    out[3] = _interpolate(second, top, (WINDOW_BINS - 1) * 0.95 - 18)
    result: FloatArray = out.reshape(len(STATS), w, c).transpose(1, 2, 0)
    return result


def _sum_rows(x: FloatArray) -> FloatArray:
    """Sum the rows from first to last."""
    total: FloatArray = x[0] + x[1]
    for row in x[2:]:
        total += row
    return total


def _interpolate(low: Float32Array, high: Float32Array, share: float) -> FloatArray:
    """Interpolate between two order statistics, in float64."""
    base = low.astype(np.float64)
    result: FloatArray = base + share * (high - base)
    return result


def _select_ranks(used: Float32Array, w: int) -> tuple[Float32Array, Float32Array, Float32Array, Float32Array]:
    """Select the values of rank 9, 10, 18 and 19 (from 0) of every window, each ``(w · c,)``.

    Windows overlap by half, so each half is sorted once and pairs of sorted halves are merged as far as needed.
    """
    c = used.shape[1]
    halves = list(np.array(used.reshape(w + 1, STRIDE_BINS, c).transpose(1, 0, 2), order="C"))
    spare = np.empty_like(halves[0])
    for i, j in SORTING_NETWORK_10:
        np.minimum(halves[i], halves[j], out=spare)
        np.maximum(halves[i], halves[j], out=halves[j])
        halves[i], spare = spare, halves[i]
    a, b = [half[:-1] for half in halves], [half[1:] for half in halves]
    ninth = np.minimum(a[0], b[9])
    tenth = np.maximum(a[0], b[9])
    spare = np.empty_like(ninth)
    for i in range(1, STRIDE_BINS):  # the i-th lowest of one half and the i-th highest of the other part at the median
        np.maximum(ninth, np.minimum(a[i], b[9 - i], out=spare), out=ninth)
        np.minimum(tenth, np.maximum(a[i], b[9 - i], out=spare), out=tenth)
    second = np.maximum(np.minimum(a[9], b[9]), np.maximum(a[8], b[8]))
    top = np.maximum(a[9], b[9])
    return ninth.ravel(), tenth.ravel(), second.ravel(), top.ravel()


def _compute_gappy_columns(x: FloatArray) -> FloatArray:
    """Compute the stats of columns of any length and with any gaps: ``(rows, k)`` → ``(k, 5)``."""
    finite = np.isfinite(x)
    m = finite.sum(axis=0)
    known = np.where(finite, x, 0.0)  # adding zero changes no sum
    mean = _sum_first_axis(known) / m
    deviation = np.where(finite, known - mean, 0.0)
    ticks = np.broadcast_to(BIN_S * np.arange(len(x))[:, None], x.shape)
    lever = np.where(finite, ticks - _sum_first_axis(np.where(finite, ticks, 0.0)) / m, 0.0)
    out = np.empty((x.shape[1], len(STATS)))
    out[:, 0] = mean
    out[:, 1] = np.sqrt(_sum_first_axis(deviation * deviation) / m)
    ordered = np.where(finite, x, np.inf).astype(np.float32).T.copy()
    ordered.sort(axis=1)
    out[:, 2] = _compute_percentile(ordered, m, 0.5)
    out[:, 3] = _compute_percentile(ordered, m, 0.95)
    out[:, 4] = _sum_first_axis(lever * deviation) / _sum_first_axis(lever * lever)
    out[m < MIN_FINITE_BINS] = np.nan
    return out


def _sum_first_axis(x: FloatArray) -> FloatArray:
    """Sum the rows from first to last; a cumulative sum has a fixed order."""
    total: FloatArray = np.cumsum(x, axis=0)[-1]
    return total


def _compute_percentile(ordered: Float32Array, m: NDArray[np.int64], q: float) -> FloatArray:
    """Interpolate linearly at rank (m − 1) · q of each sorted row's first m values."""
    h = (np.maximum(m, 2) - 1) * q
    rank = np.floor(h).astype(np.int64)
    row = np.arange(len(ordered))
    low = ordered[row, rank].astype(np.float64)
    high = ordered[row, np.minimum(rank + 1, ordered.shape[1] - 1)]
    result: FloatArray = low + (h - rank) * (high - low)
    return result
