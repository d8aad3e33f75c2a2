"""The windows of every second of a run's episodes, as a watcher decides on them; inputs come from the bins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.artifacts import BINS_DIR, RunEpisode
from phasewatch.binning.storage import BinIndexRow, MappedBins, open_bins
from phasewatch.dataset.loader import read_baselines
from phasewatch.dataset.sets import EpisodeWindows, WindowSet
from phasewatch.errors import RunError
from phasewatch.features.inputs import compute_inputs
from phasewatch.features.normalise import ChannelScaling, build_scaling
from phasewatch.features.windows import (
    WINDOW_NS,
    LabelSpan,
    combine_window_flags,
    compute_centers_s,
    compute_window_starts,
    label_windows,
    n_windows,
)
from phasewatch.models.base import InputSpec, InputVariant, ModelInputs
from phasewatch.types import BIN_NS, LIVE_STRIDE_BINS

__all__ = ["compute_live_digest", "iter_live_windows", "list_live_windows"]


def list_live_windows(run: Path, episodes: Sequence[RunEpisode]) -> EpisodeWindows:
    """List the windows of known phase that begin at every whole second of some episodes.

    Every fifth one is a window of the feature table, with the same label and flags.

    Args:
        run: Folder of the run.
        episodes: The episodes, in the order (host, episode).

    Raises:
        RunError: If the run has no bins of an episode.
    """
    rows = _find_rows(run, open_bins(run / BINS_DIR), episodes)
    index, centers_ns, centers_s, purity, flags, phases = [], [], [], [], [], []
    for number, row in enumerate(rows):
        w = n_windows(row.n_bins, LIVE_STRIDE_BINS)
        starts = compute_window_starts(row.t0_ns, w, LIVE_STRIDE_BINS)
        spans = [LabelSpan(phase=phase, start_ns=start, end_ns=end) for phase, start, end in row.spans]
        labels = label_windows(spans, starts)
        known = labels.phase >= 0
        index.append(np.full(int(known.sum()), number, np.int32))
        centers_ns.append(starts[known] + WINDOW_NS // 2)
        centers_s.append(compute_centers_s(w, LIVE_STRIDE_BINS)[known])
        purity.append(labels.purity[known])
        flags.append(combine_window_flags(row.bin_flags, labels.is_mixed, LIVE_STRIDE_BINS)[known])
        phases.append(labels.phase[known].astype(np.int64))
    return EpisodeWindows(
        episodes=tuple(episodes),
        episode_index=np.concatenate([np.zeros(0, np.int32), *index]),
        t_center_ns=np.concatenate([np.zeros(0, np.int64), *centers_ns]),
        t_center_s=np.concatenate([np.zeros(0, np.float32), *centers_s]),
        purity=np.concatenate([np.zeros(0, np.float32), *purity]),
        flags=np.concatenate([np.zeros(0, np.uint8), *flags]),
        y=np.concatenate([np.zeros(0, np.int64), *phases]),
    )


def iter_live_windows(run: Path, windows: EpisodeWindows, spec: InputSpec) -> Iterator[WindowSet]:
    """Yield the inputs of listed windows, one set for each episode with any, in their order; memory holds one.

    Args:
        run: Folder of the run.
        windows: From `list_live_windows`.
        spec: Input of the model.

    Raises:
        RunError: If the run has no bins of an episode.
    """
    grids = open_bins(run / BINS_DIR)
    rows = _find_rows(run, grids, windows.episodes)
    scalings = _build_scalings(run, spec)
    for number, row in enumerate(rows):
        own = windows.episode_index == number
        if not own.any():
            continue
        part = windows.take(own)
        bins = np.asarray(grids.episode_bins(row))
        x = compute_inputs(bins, spec, stride_bins=LIVE_STRIDE_BINS, scaling=scalings.get(row.host_id))
        at = (part.t_center_ns - WINDOW_NS // 2 - row.t0_ns) // (BIN_NS * LIVE_STRIDE_BINS)
        yield WindowSet(windows=part, inputs=ModelInputs(x=np.ascontiguousarray(x[at]), spec=spec))


def compute_live_digest(run: Path, windows: EpisodeWindows, spec: InputSpec) -> str:
    """Compute the digest of listed windows: their input, episodes, bins, times and labels.

    Args:
        run: Folder of the run.
        windows: From `list_live_windows`.
        spec: Input of the model.

    Raises:
        RunError: If the run has no bins of an episode.
    """
    grids = open_bins(run / BINS_DIR)
    digest = hashlib.sha256(msgspec.json.encode(spec, order="sorted"))
    for row in _find_rows(run, grids, windows.episodes):
        digest.update(f"{row.host_id}/{row.episode_id}/{row.t0_ns}".encode())
        digest.update(np.ascontiguousarray(grids.episode_bins(row), "<f4").data)
    for values in (windows.episode_index, windows.t_center_ns, windows.y):
        digest.update(np.ascontiguousarray(values, "<i8").data)
    return digest.hexdigest()


def _find_rows(run: Path, grids: MappedBins, episodes: Sequence[RunEpisode]) -> list[BinIndexRow]:
    rows = {(row.host_id, row.episode_id): row for row in grids.rows}
    try:
        return [rows[e.host_id, e.episode_id] for e in episodes]
    except KeyError as exc:
        raise RunError(
            f"{run / BINS_DIR}: episode {exc.args[0][1]} is in the feature table but not here; "
            "run `phasewatch validate` again"
        ) from exc


def _build_scalings(run: Path, spec: InputSpec) -> dict[str, ChannelScaling]:
    """Return host → scaling by its baseline; a host without one is scaled without it. Empty for other inputs."""
    if spec.table is not InputVariant.COMMISSIONED:
        return {}
    floors: NDArray[np.float64] = np.array([scale for _, scale in spec.floors])
    channels = [name for name, _ in spec.floors]
    baselines = read_baselines(run, channels)
    hosts = {row.host_id for row in open_bins(run / BINS_DIR).rows}
    return {host: build_scaling(baselines.get(host), floors) for host in sorted(hosts)}
