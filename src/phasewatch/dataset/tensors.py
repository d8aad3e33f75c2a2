"""The windows of a run as ``(n, channels, 20)``, cut from its mapped grids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import BINS_DIR, RunEpisode
from phasewatch.binning.storage import MappedBins, open_bins
from phasewatch.channels import CHANNELS
from phasewatch.errors import RunError
from phasewatch.features.windows import gather_windows
from phasewatch.types import BIN_NS, WINDOW_BINS

_HALF_WINDOW_NS = BIN_NS * WINDOW_BINS // 2


class _WindowPositions(Protocol):
    @property
    def episodes(self) -> Sequence[RunEpisode]: ...
    @property
    def episode_index(self) -> NDArray[np.int32]: ...
    @property
    def t_center_ns(self) -> NDArray[np.int64]: ...


def cut_tensor(run: Path, windows: _WindowPositions, names: Sequence[str]) -> NDArray[np.float32]:
    """Cut the windows out of the grids.

    Args:
        run: The run's folder.
        windows: Whose windows, and when.
        names: Full names of channels, in the order wanted.

    Returns:
        ``(n, len(names), 20)`` float32, contiguous, NaN where nothing was known.

    Raises:
        RunError: If the grids are absent or of another sweep than the feature table.
    """
    grids = open_bins(run / BINS_DIR)
    columns = [c.full_name for c in CHANNELS]
    chosen = [columns.index(name) for name in names]
    begins = _find_first_bins(run, grids, windows)
    return np.ascontiguousarray(gather_windows(grids.bins, begins)[:, :, chosen].transpose(0, 2, 1))


def compute_level_means(run: Path, windows: _WindowPositions) -> NDArray[np.float32]:
    """Give the mean of each cumulative level over each window, ``(n, len(LEVELS))`` float32; NaN where none is known."""
    grids = open_bins(run / BINS_DIR)
    levels = gather_windows(grids.levels, _find_first_bins(run, grids, windows)).astype(np.float64)
    known = np.isfinite(levels)
    count = known.sum(axis=1)
    total = np.where(known, levels, 0.0).sum(axis=1)
    mean: NDArray[np.float32] = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0).astype(
        np.float32
    )
    return mean


def _find_first_bins(run: Path, grids: MappedBins, windows: _WindowPositions) -> NDArray[np.int64]:
    """Find the row of the grids at which each window begins.

    Raises:
        RunError: If the grids are of another sweep than the feature table.
    """
    rows = {(row.host_id, row.episode_id): row for row in grids.rows}
    try:
        mine = [rows[e.host_id, e.episode_id] for e in windows.episodes]
    except KeyError as exc:
        raise RunError(
            f"{run / BINS_DIR}: lacks episode {exc.args[0][1]}, which the feature table has; run `phasewatch validate` again"
        ) from exc
    t0 = np.array([row.t0_ns for row in mine], np.int64)[windows.episode_index]
    offset = np.array([row.offset for row in mine], np.int64)[windows.episode_index]
    length = np.array([row.n_bins for row in mine], np.int64)[windows.episode_index]
    first, odd = np.divmod(windows.t_center_ns - _HALF_WINDOW_NS - t0, BIN_NS)
    if odd.any() or (first < 0).any() or (first + WINDOW_BINS > length).any():
        raise RunError(f"{run / BINS_DIR}: of another sweep than the feature table; run `phasewatch features` again")
    begins: NDArray[np.int64] = offset + first
    return begins
