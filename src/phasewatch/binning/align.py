"""Compute bins from readings: one row of 73 channels and 13 levels every half second, causal and bit-exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import BoolArray, FloatArray, IntArray, NumericArray
from phasewatch.binning.clocks import find_clock_steps, rebase_episode
from phasewatch.binning.ranges import ValueRange, channel_range
from phasewatch.bundle.model import Episode, SourceRows
from phasewatch.bundle.problems import BundleFinding
from phasewatch.channels import CHANNELS, LEVEL_CHANNELS, ChannelSpec, list_raw_fields
from phasewatch.types import BIN_NS, STALE_NS, ChannelKind, SourceKind

__all__ = [
    "FLAG_CLOCK_STEP",
    "FLAG_LATE",
    "FLAG_MIXED",
    "EpisodeBins",
    "bin_episode",
    "bin_rebased_episode",
    "compute_span_values",
    "iter_reading_groups",
    "list_standard_plans",
    "sort_readings",
    "to_float32",
]

_KIND_ORDER = (ChannelKind.RATE, ChannelKind.DELTA, ChannelKind.RATIO, ChannelKind.GAUGE, ChannelKind.COUNT)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ColumnPlan:
    """How one column of the bins is computed.

    It is compared by identity: standard plans are built once, and hashing hundreds per episode would be slow.

    Attributes:
        row: Place among all columns; levels come after channels.
        kind: How readings become a value.
        columns: Indices of the raw columns.
        scale: Factor from the raw unit to the channel's unit.
        is_float: Whether a raw column is float64.
        range: Valid range of the value.
    """

    row: int
    kind: ChannelKind
    columns: tuple[int, ...]
    scale: float
    is_float: bool
    range: ValueRange


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ColumnBlock:
    """Columns of one kind and number type that are computed together.

    Attributes:
        kind: Their kind.
        start, stop: Their rows in the result of the group.
        columns: Indices of the raw columns, one tuple for each field of the kind (two for a ratio).
        scales: ``(k, 1)`` float64.
    """

    kind: ChannelKind
    start: int
    stop: int
    columns: tuple[tuple[int, ...], ...]
    scales: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ColumnGroup:
    """Columns of one source that share their readings.

    Attributes:
        blocks: The columns by kind.
        rows: ``(k,)`` intp, place of each result row among all columns.
        n_spanning: Number of rows that span from reading to reading (rates, deltas, ratios); these come first.
        minimum, maximum: ``(k, 1)`` float64, valid range of each row.
    """

    blocks: tuple[ColumnBlock, ...]
    rows: NDArray[np.intp]
    n_spanning: int
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]


def _build_column_plans(source: SourceKind, tables: Sequence[Sequence[ChannelSpec]]) -> tuple[ColumnPlan, ...]:
    """Return the plans of one source over some tables of channels, one after the other."""
    raw = {spec.field: (i, spec.type == "float") for i, spec in enumerate(list_raw_fields(source))}
    return tuple(
        ColumnPlan(
            row=row,
            kind=channel.kind,
            columns=tuple(raw[field][0] for field in channel.fields),
            scale=channel.scale,
            is_float=any(raw[field][1] for field in channel.fields),
            range=channel_range(channel),
        )
        for row, channel in enumerate(channel for table in tables for channel in table)
        if channel.source is source
    )


@cache
def _build_standard_plans(source: SourceKind) -> tuple[ColumnPlan, ...]:
    """Return the plans of one source for the registered channels and levels."""
    return _build_column_plans(source, (CHANNELS, LEVEL_CHANNELS))


def list_standard_plans(source: SourceKind) -> tuple[ColumnPlan, ...]:
    """Return how each registered channel and level of a source is computed."""
    return _build_standard_plans(source)


@cache
def _build_standard_group(source: SourceKind) -> ColumnGroup:
    """Return the group of a source in which every row has every field."""
    return _build_column_group(_build_standard_plans(source))


@lru_cache(maxsize=256)
def _build_column_group(plans: tuple[ColumnPlan, ...]) -> ColumnGroup:
    """Group the plans of columns that share their readings into blocks."""
    ordered = sorted(plans, key=lambda u: (_KIND_ORDER.index(u.kind), u.is_float))
    blocks: list[ColumnBlock] = []
    start = 0
    while start < len(ordered):
        head = ordered[start]
        same = [u for u in ordered if u.kind is head.kind and u.is_float == head.is_float]
        blocks.append(
            ColumnBlock(
                kind=head.kind,
                start=start,
                stop=start + len(same),
                columns=tuple(zip(*(u.columns for u in same), strict=True)),
                scales=np.array([[u.scale] for u in same]),
            )
        )
        start += len(same)
    return ColumnGroup(
        blocks=tuple(blocks),
        rows=np.array([u.row for u in ordered], np.intp),
        n_spanning=sum(u.kind in _KIND_ORDER[:3] for u in ordered),
        minimum=np.array([[u.range[0]] for u in ordered]),
        maximum=np.array([[u.range[1]] for u in ordered]),
    )


_CANONICAL_NAN_BITS = np.uint32(0x7FC00000)


def _count_time_breaks(t_mono_ns: IntArray) -> IntArray | None:
    """Count, up to each reading, the steps that no rate may cross: longer than 2.5 s, or not forward in time.

    Args:
        t_mono_ns: ``(m,)`` int64.

    Returns:
        ``(m,)`` int64 running counts; a span is unbroken if they are equal at its ends. None without breaks.
    """
    delta = t_mono_ns[1:] - t_mono_ns[:-1]
    broken = (delta <= 0) | (delta > STALE_NS)
    return _compute_running_counts(broken) if broken.any() else None


def _count_resets(values: NumericArray) -> IntArray | None:
    """Count, up to each reading, the falls of each counter.

    Args:
        values: ``(k, m)``, one counter per row.

    Returns:
        ``(k, m)`` int64 running counts; None if no counter fell.
    """
    fell = values[:, 1:] < values[:, :-1]
    return _compute_running_counts(fell) if fell.any() else None


def _compute_running_counts(steps: BoolArray) -> IntArray:
    """Return ``(..., m)`` int64 running counts at readings from ``(..., m − 1)`` bool flags of the steps."""
    counts = np.zeros((*steps.shape[:-1], steps.shape[-1] + 1), np.int64)
    np.cumsum(steps, axis=-1, out=counts[..., 1:])
    return counts


def _has_step_between(counts: IntArray, first: IntArray, last: IntArray) -> BoolArray:
    """Return whether a counted step lies inside each span.

    Args:
        counts: ``(..., m)`` int64 running counts.
        first, last: ``(b,)`` indices of the readings at the ends.

    Returns:
        ``(..., b)`` bool.
    """
    has_step: BoolArray = counts[..., last] != counts[..., first]
    return has_step


def _compute_rates(
    values: NumericArray, scales: FloatArray, seconds: FloatArray, first: IntArray, last: IntArray
) -> FloatArray:
    """Compute the change per second over each span.

    Args:
        values: ``(k, m)``, one counter or level per row.
        scales: ``(k, 1)`` float64, factors to the channel's unit.
        seconds: ``(b,)`` float64, monotonic time of each span; 0 without a span (the caller replaces it by NaN).
        first, last: ``(b,)`` indices of the readings at the ends.

    Returns:
        ``(k, b)`` float64.
    """
    # Integers are subtracted before they become float64: a counter may need more than its 53 bits.
    change = np.subtract(values.take(last, axis=1), values.take(first, axis=1)).astype(np.float64)
    change *= scales
    change /= seconds
    return change


def _compute_ratios(
    above: NumericArray, below: NumericArray, scales: FloatArray, first: IntArray, last: IntArray
) -> FloatArray:
    """Compute the change of one counter over that of another, 0 where the second did not change.

    Args:
        above, below: ``(k, m)``, one counter per row.
        scales: ``(k, 1)`` float64.
        first, last: ``(b,)`` indices of the readings at the ends.

    Returns:
        ``(k, b)`` float64.
    """
    top = np.subtract(above.take(last, axis=1), above.take(first, axis=1)).astype(np.float64)
    bottom = np.subtract(below.take(last, axis=1), below.take(first, axis=1)).astype(np.float64)
    top *= scales
    still = bottom == 0.0
    bottom[still] = 1.0
    top /= bottom
    top[still] = 0.0
    return top


def _compute_means(values: NumericArray, scales: FloatArray, first: IntArray, last: IntArray) -> FloatArray:
    """Compute the mean of the readings after ``first`` up to ``last``, summed from left to right.

    Args:
        values: ``(k, m)``, one field per row.
        scales: ``(k, 1)`` float64.
        first, last: ``(b,)`` indices of readings.

    Returns:
        ``(k, b)`` float64.
    """
    count = last - first
    total = values.take(np.minimum(first + 1, last), axis=1).astype(np.float64)
    most = int(count.max(initial=1))
    for step in range(2, most + 1):
        more = np.flatnonzero(count >= step)
        total[:, more] += values[:, first[more] + step]
    if most > 1:
        total /= np.maximum(count, 1)
    total *= scales
    return total


def _compute_maxima(values: NumericArray, scales: FloatArray, first: IntArray, last: IntArray) -> FloatArray:
    """Compute the maximum of the readings after ``first`` up to ``last``; arguments as in `_compute_means`."""
    count = last - first
    top = values.take(np.minimum(first + 1, last), axis=1)
    for step in range(2, int(count.max(initial=1)) + 1):
        more = np.flatnonzero(count >= step)
        top[:, more] = np.maximum(top[:, more], values[:, first[more] + step])
    scaled: FloatArray = top.astype(np.float64) * scales
    return scaled


def to_float32(values: FloatArray) -> NDArray[np.float32]:
    """Convert ``(n, c)`` float64 to float32 with a single form of zero (positive) and of NaN (0x7fc00000)."""
    with np.errstate(over="ignore"):  # values out of range are NaN already
        stored = values.astype(np.float32, order="C")
    stored += np.float32(0.0)
    unknown = np.isnan(stored)
    stored.view(np.uint32)[unknown] = _CANONICAL_NAN_BITS
    return stored


FLAG_CLOCK_STEP = 1  # a clock step touches the bin or window
FLAG_LATE = 2  # a reading came too late to count
FLAG_MIXED = 4  # the window holds several phases


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodeBins:
    """The bins of one episode.

    Attributes:
        bins: ``(n, 73)`` float32 in the order of `CHANNELS`, each column in its unit; NaN where unknown or outside the
            range of the channel, never infinite.
        levels: ``(n, 13)`` float32 in the order of `LEVEL_CHANNELS`; only for the levels-only baseline and the leakage
            checks.
        flags: ``(n,)`` uint8; 1 where a clock step touches the bin.
        findings: Findings on the clocks.
    """

    bins: NDArray[np.float32]
    levels: NDArray[np.float32]
    flags: NDArray[np.uint8]
    findings: tuple[BundleFinding, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupReadings:
    """The readings that some channels of one source share, by time.

    Attributes:
        t_wall_ns, t_mono_ns: ``(m,)`` int64.
        columns: The raw columns of the source, one ``(n,)`` array each.
        kept: ``(m,)`` intp, rows of the columns that are readings of these channels; None if all are.
    """

    t_wall_ns: IntArray
    t_mono_ns: IntArray
    columns: tuple[NumericArray, ...]
    kept: NDArray[np.intp] | None

    def stack(self, columns: tuple[int, ...]) -> NumericArray:
        """Return some raw columns as the rows of a ``(k, m)`` array."""
        values = np.array([self.columns[c] for c in columns])
        return values if self.kept is None else values.take(self.kept, axis=1)


def bin_episode(episode: Episode) -> EpisodeBins:
    """Rebase an episode and compute its bins.

    Source: docs/formats/run.md.
    """
    rebased, findings = rebase_episode(episode)
    return bin_rebased_episode(rebased, findings)


def bin_rebased_episode(episode: Episode, findings: tuple[BundleFinding, ...]) -> EpisodeBins:
    """Compute the bins of a rebased episode.

    Bin ``i`` ends at t0 + (i + 1) · 0.5 s and does not depend on later readings.

    Args:
        episode: The episode from `rebase_episode`.
        findings: The findings from `rebase_episode`.
    """
    n = episode.n_bins
    edges = episode.t0_ns + BIN_NS * np.arange(n + 1, dtype=np.int64)
    values = np.full((len(CHANNELS) + len(LEVEL_CHANNELS), n), np.nan)
    # Absent spans divide by zero before they become NaN, and a gauge may exceed float32.
    with np.errstate(all="ignore"):
        for readings in episode.rows.values():
            for group, shared in iter_reading_groups(sort_readings(readings)):
                _fill_group(values, group, shared, edges)
    return EpisodeBins(
        bins=to_float32(values[: len(CHANNELS)].T),
        levels=to_float32(values[len(CHANNELS) :].T),
        flags=_compute_bin_flags(episode, findings),
        findings=findings,
    )


def sort_readings(readings: SourceRows) -> SourceRows:
    """Return the readings sorted by (t_wall_ns, seq); the sort is stable."""
    wall, seq = readings.t_wall_ns, readings.seq
    later = wall[1:] > wall[:-1]
    if later.all() or (later | ((wall[1:] == wall[:-1]) & (seq[1:] >= seq[:-1]))).all():
        return readings
    order = np.lexsort((seq, wall))
    return replace(
        readings,
        t_wall_ns=wall[order],
        t_mono_ns=readings.t_mono_ns[order],
        seq=seq[order],
        columns=tuple(column[order] for column in readings.columns),
        present=readings.present[order],
    )


def iter_reading_groups(rows: SourceRows) -> Iterator[tuple[ColumnGroup, GroupReadings]]:
    """Yield the channels of a source in groups that share their readings.

    A row is a reading of a channel if none of the channel's fields is null. Mostly no field is null, and there is one
    group.
    """
    if not len(rows):
        return
    everything = GroupReadings(t_wall_ns=rows.t_wall_ns, t_mono_ns=rows.t_mono_ns, columns=rows.columns, kept=None)
    if rows.present.all():
        yield _build_standard_group(rows.source), everything
        return
    patterns: dict[bytes, list[ColumnPlan]] = {}
    by_field = rows.present.T.copy()
    masks = [mask.tobytes() for mask in by_field]
    for plan in _build_standard_plans(rows.source):
        head, *more = plan.columns
        pattern = masks[head]
        if more and masks[more[0]] != pattern:
            pattern = (by_field[head] & by_field[more[0]]).tobytes()
        patterns.setdefault(pattern, []).append(plan)
    for pattern, members in patterns.items():
        kept = np.flatnonzero(np.frombuffer(pattern, np.bool_))
        if len(kept) == len(rows):
            yield _build_column_group(tuple(members)), everything
        elif len(kept):
            yield (
                _build_column_group(tuple(members)),
                GroupReadings(
                    t_wall_ns=rows.t_wall_ns[kept], t_mono_ns=rows.t_mono_ns[kept], columns=rows.columns, kept=kept
                ),
            )


def _fill_group(values: FloatArray, group: ColumnGroup, readings: GroupReadings, edges: IntArray) -> None:
    """Compute the bins of one group.

    Args:
        values: ``(channels, n)`` float64, written in place.
        group: The columns.
        readings: Their readings, by time.
        edges: ``(n + 1,)`` int64, ends of the bins in ns; the first is t0, the end of a bin that is not stored.
    """
    newest = np.searchsorted(readings.t_wall_ns, edges, side="right") - 1
    begin = int(np.searchsorted(newest, 0))  # bins before the first reading stay NaN
    if begin == len(edges):
        return
    last = newest[begin:]
    first = np.empty_like(last)
    first[1:] = last[:-1]
    # The bin that ends at t0 spans from the reading before its own. A later first bin has no reading before it (−1).
    first[0] = last[0] - 1 if begin == 0 else -1
    is_new = first != last
    made = compute_span_values(group, readings, first[is_new], last[is_new])
    held = np.cumsum(is_new) - 1  # a bin without a reading repeats the bin before
    stale = edges[begin:] - readings.t_wall_ns[last] > STALE_NS
    skip = 1 if begin == 0 else 0
    spread = made.take(held[skip:], axis=1) if len(made[0]) != len(held) else made[:, skip:]
    if stale.any():
        spread = np.where(stale[skip:], np.nan, spread)
    values[group.rows, begin + skip - 1 :] = spread


def compute_span_values(group: ColumnGroup, readings: GroupReadings, first: IntArray, last: IntArray) -> FloatArray:
    """Compute the value of each span, for every column of a group.

    Args:
        group: The columns.
        readings: Their readings, by time.
        first: ``(b,)`` index of the newest reading of the bin before, −1 without one.
        last: ``(b,)`` index of the newest reading of the bin.

    Returns:
        ``(k, b)`` float64 in the order of ``group.rows``.
    """
    result = np.empty((len(group.rows), len(last)))
    start = np.maximum(first, 0)  # without a reading before, the span starts at the first one of all
    lost = start == last
    seconds = (readings.t_mono_ns[last] - readings.t_mono_ns[start]).astype(np.float64) / 1e9
    breaks = _count_time_breaks(readings.t_mono_ns)
    if breaks is not None:
        lost |= _has_step_between(breaks, start, last)
    for block in group.blocks:
        stacked = [readings.stack(columns) for columns in block.columns]
        out = result[block.start : block.stop]
        if block.kind is ChannelKind.GAUGE:
            out[:] = _compute_means(stacked[0], block.scales, first, last)
        elif block.kind is ChannelKind.COUNT:
            out[:] = _compute_maxima(stacked[0], block.scales, first, last)
        elif block.kind is ChannelKind.RATIO:
            out[:] = _compute_ratios(stacked[0], stacked[1], block.scales, start, last)
        else:
            out[:] = _compute_rates(stacked[0], block.scales, seconds, start, last)
        if block.kind in (ChannelKind.RATE, ChannelKind.RATIO):
            for values in stacked:
                falls = _count_resets(values)
                if falls is not None:
                    out[_has_step_between(falls, start, last)] = np.nan
    if lost.any():
        result[: group.n_spanning, lost] = np.nan
    impossible = (result < group.minimum) | (result > group.maximum)
    if impossible.any():  # infinite, or more than any machine can do: a broken or forged reading
        result[impossible] = np.nan
    return result


def _compute_bin_flags(episode: Episode, findings: tuple[BundleFinding, ...]) -> NDArray[np.uint8]:
    """Return ``(n,)`` uint8 flags: `FLAG_CLOCK_STEP` for bins that a clock step touches."""
    flags = np.zeros(episode.n_bins, np.uint8)
    if not any(finding.code == "clock-step" for finding in findings):
        return flags
    for low, high in find_clock_steps(episode).tolist():
        begin = max((low - episode.t0_ns) // BIN_NS, 0)
        flags[begin : max((high - episode.t0_ns) // BIN_NS + 1, 0)] |= FLAG_CLOCK_STEP
    return flags
