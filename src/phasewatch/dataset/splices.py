"""Counterfactual episodes, spliced from the bins of recorded ones: what if a load or an attack lasted otherwise?

In recordings a benign load may last a whole episode and a malicious phase some seconds, so a model with a long memory
can learn how long things last instead of what they are. A splice keeps what happens and changes how long it lasts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from phasewatch.arrays import Float32Array
from phasewatch.artifacts import BINS_DIR, FEATURES_FILE, RunEpisode, read_columns
from phasewatch.binning.storage import BinIndexRow, MappedBins, open_bins
from phasewatch.dataset.tensors import compute_episode_inputs
from phasewatch.features.windows import LabelSpan, compute_window_starts, label_windows
from phasewatch.models.base import InputSpec, LabelledExamples, ModelInputs
from phasewatch.profiles import IDLE_SAMPLES
from phasewatch.types import BENIGN_PROFILE, BIN_NS, STRIDE_BINS, EpisodeRole, Phase

__all__ = ["SpliceKind", "SplicedEpisode", "build_spliced_examples", "build_splices"]

_LOAD_BINS = (40, 90)  # 20 to 45 s, the length of a malicious phase
_BEFORE_BINS, _AFTER_BINS = (50, 100), (30, 60)  # idle time around it
_LONG_BINS = 240  # two minutes, the longest context
_SHORT_BINS = 90
_MIN_ACTIVE_BINS = 30  # a shorter active phase is not spliced
_ONSET_BINS = 2  # left out at the start of an active phase: the first second may still belong to the phase before


class SpliceKind(StrEnum):
    """What a spliced episode shows."""

    SHORT_LOAD = "short_load"  # idle, 20 to 45 s of a benign load, idle: clean throughout
    LONG_ACTIVITY = "long_activity"  # an active phase, repeated until it has lasted two minutes
    SHORT_ACTIVITY = "short_activity"  # idle, at most 45 s of an active phase, idle


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SplicedEpisode:
    """A counterfactual episode.

    Attributes:
        kind: What it shows.
        source: Episode of the load or activity.
        bins: ``(n, 73)`` float32 bins; NaN where unknown.
        spans: Phases on a clock that starts at 0 with the first bin.
    """

    kind: SpliceKind
    source: RunEpisode
    bins: Float32Array
    spans: tuple[LabelSpan, ...]


def build_splices(run: Path, episodes: Sequence[RunEpisode]) -> tuple[SplicedEpisode, ...]:
    """Build the spliced episodes of some episodes of a run.

    A benign episode with a load gives a `SHORT_LOAD`, a malicious one with an active phase of 15 s or more a
    `LONG_ACTIVITY` and a `SHORT_ACTIVITY`. Idle time comes from the baseline episodes of the same host; without one
    only `LONG_ACTIVITY` can be built. Every choice follows from the id of the episode, so the same run gives the same
    splices in any order and process.

    Args:
        run: Folder of a run with bins and features.
        episodes: Episodes to use as sources; only those of role `lab` are. For training, those of the train set alone.

    Returns:
        Splices in the order of `episodes`.

    Raises:
        RunError: If the bins or the feature table cannot be read.
    """
    used = set(read_columns(run / FEATURES_FILE, ("episode_id",), "features")["episode_id"].unique().to_pylist())
    mapped = open_bins(run / BINS_DIR)
    rows = {(row.host_id, row.episode_id): row for row in mapped.rows if row.episode_id in used}
    idle: dict[str, list[BinIndexRow]] = {}
    for row in rows.values():
        if row.role is EpisodeRole.COMMISSION:
            idle.setdefault(row.host_id, []).append(row)
    made: list[SplicedEpisode] = []
    for episode in episodes:
        found = rows.get((episode.host_id, episode.episode_id))
        if found is not None and episode.role is EpisodeRole.LAB:
            made += _splice_episode(mapped, episode, found, idle.get(episode.host_id, []))
    return tuple(made)


def build_spliced_examples(
    splices: Sequence[SplicedEpisode], spec: InputSpec, stride_bins: int = STRIDE_BINS
) -> LabelledExamples:
    """Compute inputs and labels of all windows of some splices.

    A window has the phase that holds most of it, as in recordings.

    Args:
        splices: The spliced episodes.
        spec: A table or tensor input without a baseline.
        stride_bins: Bins from one window's start to the next.
    """
    x, y = [np.empty((0, *spec.shape), np.float32)], [np.empty(0, np.int64)]
    for splice in splices:
        inputs = compute_episode_inputs(splice.bins, spec, stride_bins)
        labels = label_windows(splice.spans, compute_window_starts(0, len(inputs), stride_bins))
        x.append(inputs)
        y.append(labels.phase.astype(np.int64))
    return LabelledExamples(inputs=ModelInputs(x=np.concatenate(x), spec=spec), y=np.concatenate(y))


def _splice_episode(
    mapped: MappedBins, episode: RunEpisode, row: BinIndexRow, idle: Sequence[BinIndexRow]
) -> Iterator[SplicedEpisode]:
    bins = np.asarray(mapped.episode_bins(row))
    if episode.profile == BENIGN_PROFILE:
        if episode.sample_name not in IDLE_SAMPLES and idle:
            kind = SpliceKind.SHORT_LOAD
            length = min(_draw(episode, kind, "length", *_LOAD_BINS), len(bins))
            start = _draw(episode, kind, "start", 0, len(bins) - length)
            yield _surround(mapped, episode, kind, bins[start : start + length], Phase.CLEAN, idle)
        return
    start, end = _find_longest_activity(row)
    if end - start < _MIN_ACTIVE_BINS:
        return
    active = bins[start:end]
    repeated = np.concatenate([active] * -(-_LONG_BINS // len(active)))[:_LONG_BINS]
    yield SplicedEpisode(
        kind=SpliceKind.LONG_ACTIVITY, source=episode, bins=repeated, spans=_build_spans([(Phase.ACTIVE, _LONG_BINS)])
    )
    if idle:
        yield _surround(mapped, episode, SpliceKind.SHORT_ACTIVITY, active[:_SHORT_BINS], Phase.ACTIVE, idle)


def _find_longest_activity(row: BinIndexRow) -> tuple[int, int]:
    """Return the first bin of the longest active phase without its onset, and one more than its last bin."""
    longest = (0, 0)
    for phase, start_ns, end_ns in row.spans:
        start = -(-(start_ns - row.t0_ns) // BIN_NS) + _ONSET_BINS
        end = min((end_ns - row.t0_ns) // BIN_NS, row.n_bins)
        if phase is Phase.ACTIVE and end - start > longest[1] - longest[0]:
            longest = (start, end)
    return longest


def _surround(
    mapped: MappedBins,
    episode: RunEpisode,
    kind: SpliceKind,
    middle: Float32Array,
    phase: Phase,
    idle: Sequence[BinIndexRow],
) -> SplicedEpisode:
    """Return an episode of some bins with idle time of the same host before and after them."""
    before = _cut_idle(mapped, episode, kind, "before", _BEFORE_BINS, idle)
    after = _cut_idle(mapped, episode, kind, "after", _AFTER_BINS, idle)
    lengths = [(Phase.CLEAN, len(before)), (phase, len(middle)), (Phase.CLEAN, len(after))]
    return SplicedEpisode(
        kind=kind, source=episode, bins=np.concatenate([before, middle, after]), spans=_build_spans(lengths)
    )


def _cut_idle(
    mapped: MappedBins,
    episode: RunEpisode,
    kind: SpliceKind,
    where: str,
    lengths: tuple[int, int],
    idle: Sequence[BinIndexRow],
) -> Float32Array:
    row = idle[_draw(episode, kind, f"{where} episode", 0, len(idle) - 1)]
    length = min(_draw(episode, kind, f"{where} length", *lengths), row.n_bins)
    start = _draw(episode, kind, f"{where} start", 0, row.n_bins - length)
    return np.asarray(mapped.episode_bins(row)[start : start + length])


def _build_spans(lengths: Sequence[tuple[Phase, int]]) -> tuple[LabelSpan, ...]:
    ends = np.cumsum([length for _, length in lengths]).tolist()
    starts = [0, *ends[:-1]]
    return tuple(
        LabelSpan(phase=phase, start_ns=start * BIN_NS, end_ns=end * BIN_NS)
        for (phase, _), start, end in zip(lengths, starts, ends, strict=True)
    )


def _draw(episode: RunEpisode, kind: SpliceKind, what: str, low: int, high: int) -> int:
    """Return a whole number in [low, high] that follows from the episode's id and the purpose alone."""
    digest = hashlib.sha256(f"{episode.host_id}/{episode.episode_id}/{kind}/{what}".encode()).digest()
    return low + int.from_bytes(digest[:8], "big") % (high - low + 1)
