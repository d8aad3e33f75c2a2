"""Ten-second windows with a stride of five seconds (live: of one second): their times, labels and flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import as_strided, sliding_window_view
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array
from phasewatch.binning.align import FLAG_CLOCK_STEP, FLAG_LATE, FLAG_MIXED
from phasewatch.bundle.model import LabelMark
from phasewatch.types import BIN_NS, STRIDE_BINS, WINDOW_BINS, Phase

__all__ = [
    "FLAG_CLOCK_STEP",
    "FLAG_LATE",
    "FLAG_MIXED",
    "WINDOW_NS",
    "LabelSpan",
    "WindowLabels",
    "build_label_spans",
    "build_window_view",
    "combine_window_flags",
    "compute_centers_s",
    "compute_window_rows",
    "compute_window_starts",
    "gather_windows",
    "label_windows",
    "n_windows",
]

WINDOW_NS = WINDOW_BINS * BIN_NS


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSpan:
    """A span of time in one phase: [start, end) on the wall clock, ns."""

    phase: Phase
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowLabels:
    """The label of each window.

    Attributes:
        phase: ``(w,)`` int8 code of the phase with most of the window's time; −1 if unknown.
        purity: ``(w,)`` float32 share of the window's time in that phase.
        is_mixed: ``(w,)`` bool: whether the window has another phase too.
    """

    phase: NDArray[np.int8]
    purity: NDArray[np.float32]
    is_mixed: NDArray[np.bool_]


def n_windows(n_bins: int, stride_bins: int = STRIDE_BINS) -> int:
    """Return the number of whole windows in `n_bins` bins, one every `stride_bins` bins."""
    return 0 if n_bins < WINDOW_BINS else (n_bins - WINDOW_BINS) // stride_bins + 1


def compute_window_starts(t0_ns: int, w: int, stride_bins: int = STRIDE_BINS) -> NDArray[np.int64]:
    """Return the start of the first `w` windows on the wall clock, ``(w,)`` int64 ns; a centre is 5 s later."""
    return t0_ns + BIN_NS * stride_bins * np.arange(w, dtype=np.int64)


def compute_centers_s(w: int, stride_bins: int = STRIDE_BINS) -> NDArray[np.float32]:
    """Return the centres of the first `w` windows since the first label, ``(w,)`` float32 s."""
    return (BIN_NS / 1e9 * stride_bins * np.arange(w) + WINDOW_NS / 2e9).astype(np.float32)


def build_label_spans(marks: Sequence[LabelMark]) -> tuple[LabelSpan, ...]:
    """Convert phase marks to spans; each ends where the next begins."""
    return tuple(
        LabelSpan(phase=mark.phase, start_ns=mark.t_wall_ns, end_ns=after.t_wall_ns)
        for mark, after in pairwise(marks)
        if mark.phase is not None
    )


def label_windows(spans: Sequence[LabelSpan], starts_ns: NDArray[np.int64]) -> WindowLabels:
    """Label each window with the phase that holds most nanoseconds of it.

    On a tie the phase whose last span in the window starts later wins: it is the one that the VM entered.

    Args:
        spans: Phase spans in the order of time.
        starts_ns: ``(w,)`` int64 start of each window on the wall clock.
    """
    phases = sorted({span.phase for span in spans}, key=lambda phase: phase.code)
    w = len(starts_ns)
    held = np.zeros((len(phases), w), np.int64)
    newest = np.full((len(phases), w), -1, np.int64)
    for number, span in enumerate(spans):
        inside = np.minimum(starts_ns + WINDOW_NS, span.end_ns) - np.maximum(starts_ns, span.start_ns)
        row = phases.index(span.phase)
        held[row] += np.maximum(inside, 0)
        newest[row, inside > 0] = number  # spans are in time order
    if not phases:
        return WindowLabels(
            phase=np.full(w, -1, np.int8), purity=np.zeros(w, np.float32), is_mixed=np.zeros(w, np.bool_)
        )
    most = held.max(axis=0)
    winner = np.where(held == most, newest, -2).argmax(axis=0)
    codes = np.array([phase.code for phase in phases], np.int8)
    return WindowLabels(
        phase=codes[winner],
        purity=(most / WINDOW_NS).astype(np.float32),
        is_mixed=np.count_nonzero(held, axis=0) > 1,
    )


def combine_window_flags(
    bin_flags: NDArray[np.uint8], is_mixed: NDArray[np.bool_], stride_bins: int = STRIDE_BINS
) -> NDArray[np.uint8]:
    """Combine the flags of each window: those of its bins, and `FLAG_MIXED`.

    Args:
        bin_flags: ``(n,)`` uint8 flags of the bins.
        is_mixed: ``(w,)`` bool.
        stride_bins: Bins from one window's start to the next.

    Returns:
        ``(w,)`` uint8.
    """
    w = len(is_mixed)
    flags = np.where(is_mixed, np.uint8(FLAG_MIXED), np.uint8(0))
    if bin_flags.any():
        for row in range(WINDOW_BINS):
            flags |= bin_flags[row : row + stride_bins * w : stride_bins][:w]
    return flags


def build_window_view(bins: Float32Array, stride_bins: int = STRIDE_BINS) -> Float32Array:
    """Return the windows of one episode as ``(w, 20, c)`` float32, a read-only view of its ``(n, c)`` bins."""
    n, c = bins.shape
    if n_windows(n) == 0:
        return np.empty((0, WINDOW_BINS, c), np.float32)
    view: Float32Array = sliding_window_view(bins, WINDOW_BINS, axis=0)[::stride_bins].transpose(0, 2, 1)
    return view


def compute_window_rows(offset: int, n_bins: int) -> NDArray[np.int64]:
    """Return the first row of each window of an episode in the run's bins, ``(w,)`` int64.

    Args:
        offset: First row of the episode.
        n_bins: Number of its bins.
    """
    return offset + STRIDE_BINS * np.arange(n_windows(n_bins), dtype=np.int64)


def gather_windows(bins: Float32Array, begins: NDArray[np.int64]) -> Float32Array:
    """Copy a batch of windows out of the memory-mapped bins.

    Args:
        bins: ``(N, c)`` float32 bins of all episodes, one after the other; rows are contiguous.
        begins: ``(b,)`` int64 first rows of the windows, in any order.

    Returns:
        ``(b, 20, c)`` float32.

    Raises:
        IndexError: If a window reaches outside the bins.
    """
    n, c = bins.shape
    if len(begins) and not (int(begins.min()) >= 0 and int(begins.max()) + WINDOW_BINS <= n):
        raise IndexError(f"a window begins at row {int(begins.min())} or {int(begins.max())} of {n}")
    if n < WINDOW_BINS:
        return np.empty((0, WINDOW_BINS, c), np.float32)
    by_time, by_channel = bins.strides
    # Every row may begin a window; one fancy index then copies 20 · c neighbouring floats at a time.
    every = as_strided(bins, (n - WINDOW_BINS + 1, WINDOW_BINS, c), (by_time, by_time, by_channel), writeable=False)
    batch: Float32Array = every[begins]
    return batch
