"""Cut the windows of a run from its memory-mapped bins, or compute the inputs of models from them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array
from phasewatch.artifacts import BINS_DIR, RunEpisode
from phasewatch.binning.storage import MappedBins, open_bins
from phasewatch.channels import CHANNELS
from phasewatch.errors import RunError
from phasewatch.features.inputs import compute_inputs
from phasewatch.features.windows import gather_windows
from phasewatch.models.base import InputKind, InputSpec, InputVariant
from phasewatch.types import BIN_NS, STRIDE_BINS, STRIDE_NS, WINDOW_BINS

__all__ = [
    "LOAD_HISTORY_WINDOWS",
    "compute_bin_inputs",
    "compute_episode_inputs",
    "compute_level_means",
    "compute_load_history",
    "cut_tensor",
]

LOAD_HISTORY_WINDOWS = 48  # four minutes: longer than any load of a lab episode
_CPU_CHANNEL = "proc.vcpu_run"

_HALF_WINDOW_NS = BIN_NS * WINDOW_BINS // 2
_MAX_KEPT_BYTES = 128 * 2**20
_kept_inputs: dict[tuple[bytes, tuple[int, ...], tuple[str, ...], int], Float32Array] = {}  # the oldest first


class _WindowPositions(Protocol):
    @property
    def episodes(self) -> Sequence[RunEpisode]: ...
    @property
    def episode_index(self) -> NDArray[np.int32]: ...
    @property
    def t_center_ns(self) -> NDArray[np.int64]: ...


def cut_tensor(run: Path, windows: _WindowPositions, names: Sequence[str]) -> NDArray[np.float32]:
    """Cut windows out of the bins.

    Args:
        run: Folder of the run.
        windows: Episodes and times of the windows.
        names: Full names of the channels, in order.

    Returns:
        ``(n, len(names), 20)`` float32, contiguous; NaN where unknown.

    Raises:
        RunError: If the bins are absent, or from another validation than the feature table.
    """
    grids = open_bins(run / BINS_DIR)
    columns = [c.full_name for c in CHANNELS]
    chosen = [columns.index(name) for name in names]
    begins = _find_first_bins(run, grids, windows)
    return np.ascontiguousarray(gather_windows(grids.bins, begins)[:, :, chosen].transpose(0, 2, 1))


def compute_bin_inputs(
    run: Path, windows: _WindowPositions, spec: InputSpec, stride_bins: int = STRIDE_BINS
) -> NDArray[np.float32]:
    """Compute the input of a model for windows, from all bins of their episodes up to each.

    Args:
        run: Folder of the run.
        windows: Episodes and times of the windows; the windows of an episode stand together.
        spec: A table or tensor input without a baseline.
        stride_bins: Bins between the starts of windows; each window starts at a multiple.

    Returns:
        ``(n, *spec.shape)`` float32; NaN where unknown.

    Raises:
        RunError: If the bins are absent, or from another validation than the feature table.
    """
    mapped = open_bins(run / BINS_DIR)
    begins = _find_first_bins(run, mapped, windows)
    rows = {(row.host_id, row.episode_id): row for row in mapped.rows}
    x = np.empty((len(begins), *spec.shape), np.float32)
    for number, episode in enumerate(windows.episodes):
        own = np.flatnonzero(windows.episode_index == number)
        row = rows[episode.host_id, episode.episode_id]
        at, odd = np.divmod(begins[own] - row.offset, stride_bins)
        if odd.any():
            raise RunError(
                f"{run / BINS_DIR}: a window of episode {row.episode_id} does not start at a multiple of "
                f"{stride_bins} bins; run `phasewatch features` again"
            )
        x[own] = compute_episode_inputs(np.asarray(mapped.episode_bins(row)), spec, stride_bins)[at]
    return x


def compute_episode_inputs(bins: Float32Array, spec: InputSpec, stride_bins: int = STRIDE_BINS) -> Float32Array:
    """Compute the input of a model for every window of an episode, as `features.inputs.compute_inputs`.

    The folds of a recipe share most episodes, and a table with context costs some milliseconds an episode. So the
    newest ones are kept, by the digest of their bins.

    Returns:
        ``(w, *spec.shape)`` float32, read-only.
    """
    if spec.kind is not InputKind.TABLE or spec.table is not InputVariant.CONTEXT:
        return compute_inputs(bins, spec, stride_bins=stride_bins)
    key = (hashlib.sha256(np.ascontiguousarray(bins).data).digest(), bins.shape, spec.names, stride_bins)
    if (x := _kept_inputs.pop(key, None)) is None:
        x = compute_inputs(bins, spec, stride_bins=stride_bins)
        x.flags.writeable = False
    _kept_inputs[key] = x
    while sum(kept.nbytes for kept in _kept_inputs.values()) > _MAX_KEPT_BYTES:
        del _kept_inputs[next(iter(_kept_inputs))]
    return x


def compute_level_means(run: Path, windows: _WindowPositions) -> NDArray[np.float32]:
    """Compute the mean of each cumulative level over each window, ``(n, l)`` float32; NaN where unknown.

    Args:
        run: Folder of the run.
        windows: Episodes and times of the windows.
    """
    grids = open_bins(run / BINS_DIR)
    levels = gather_windows(grids.levels, _find_first_bins(run, grids, windows)).astype(np.float64)
    known = np.isfinite(levels)
    count = known.sum(axis=1)
    total = np.where(known, levels, 0.0).sum(axis=1)
    mean: NDArray[np.float32] = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0).astype(
        np.float32
    )
    return mean


def compute_load_history(run: Path, windows: _WindowPositions) -> NDArray[np.float32]:
    """Compute the mean CPU use of each window and of the windows before it, for the baseline `duration_only`.

    Args:
        run: Folder of the run.
        windows: Episodes and times of the windows, in the order (episode, time).

    Returns:
        ``(n, LOAD_HISTORY_WINDOWS)`` float32 cores, the latest window first; NaN where unknown, before the episode's
        first window and before a gap.
    """
    bins = cut_tensor(run, windows, (_CPU_CHANNEL,))[:, 0]
    known = np.isfinite(bins)
    count = known.sum(axis=1)
    mean = np.divide(
        np.where(known, bins, 0.0).sum(axis=1, dtype=np.float64), count, out=np.full(len(bins), np.nan), where=count > 0
    )
    follows = np.zeros(len(bins), np.bool_)
    follows[1:] = (np.diff(windows.episode_index) == 0) & (np.diff(windows.t_center_ns) == STRIDE_NS)
    history = np.full((len(bins), LOAD_HISTORY_WINDOWS), np.nan, np.float32)
    at, unbroken = np.arange(len(bins)), np.ones(len(bins), np.bool_)
    for back in range(LOAD_HISTORY_WINDOWS):
        history[unbroken, back] = mean[at[unbroken]]
        unbroken = unbroken & follows[at]
        at = np.maximum(at - 1, 0)
    return history


def _find_first_bins(run: Path, grids: MappedBins, windows: _WindowPositions) -> NDArray[np.int64]:
    """Return the first row of each window in the bins, ``(n,)`` int64.

    Raises:
        RunError: If the bins are from another validation than the feature table.
    """
    rows = {(row.host_id, row.episode_id): row for row in grids.rows}
    try:
        used = [rows[e.host_id, e.episode_id] for e in windows.episodes]
    except KeyError as exc:
        raise RunError(
            f"{run / BINS_DIR}: episode {exc.args[0][1]} is in the feature table but not here; "
            "run `phasewatch validate` again"
        ) from exc
    t0 = np.array([row.t0_ns for row in used], np.int64)[windows.episode_index]
    offset = np.array([row.offset for row in used], np.int64)[windows.episode_index]
    length = np.array([row.n_bins for row in used], np.int64)[windows.episode_index]
    first, odd = np.divmod(windows.t_center_ns - _HALF_WINDOW_NS - t0, BIN_NS)
    if odd.any() or (first < 0).any() or (first + WINDOW_BINS > length).any():
        raise RunError(
            f"{run / BINS_DIR}: not from the same validation as the feature table; run `phasewatch features` again"
        )
    begins: NDArray[np.int64] = offset + first
    return begins
