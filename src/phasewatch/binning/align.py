"""Ticks to bins: one row of 46 channels (and 13 levels beside them) every half second, exact and causal."""

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

_KIND_ORDER = (ChannelKind.RATE, ChannelKind.DELTA, ChannelKind.RATIO, ChannelKind.GAUGE, ChannelKind.COUNT)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ColumnPlan:
    """One column to be made: its place among all columns (levels after channels), kind, raw columns, scale and range.

    Compared by identity: the standard ones are made once, and hashing a few hundred per episode would cost.
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
        kind: Of all of them.
        start, stop: Their rows in the group's result.
        columns: Raw columns, one tuple for each field of the kind (two for a ratio).
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
        blocks: The work, kind by kind.
        rows: ``(k,)`` place of each result row among all columns.
        n_spanning: How many of the rows span from reading to reading (rates, changes, ratios); these come first.
        minimum, maximum: ``(k, 1)`` float64: a value outside of them is no measurement.
    """

    blocks: tuple[ColumnBlock, ...]
    rows: NDArray[np.intp]
    n_spanning: int
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]


def _build_column_plans(source: SourceKind, tables: Sequence[Sequence[ChannelSpec]]) -> tuple[ColumnPlan, ...]:
    """Give the units of one source, over the tables laid end to end."""
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
def build_standard_plans(source: SourceKind) -> tuple[ColumnPlan, ...]:
    """Give the units of one source for the registered channels and levels."""
    return _build_column_plans(source, (CHANNELS, LEVEL_CHANNELS))


@cache
def build_standard_group(source: SourceKind) -> ColumnGroup:
    """Give the group of a source whose every field is there in every row."""
    return build_column_group(build_standard_plans(source))


@lru_cache(maxsize=256)
def build_column_group(units: tuple[ColumnPlan, ...]) -> ColumnGroup:
    """Sort units that share their readings into blocks."""
    ordered = sorted(units, key=lambda u: (_KIND_ORDER.index(u.kind), u.is_float))
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


CANONICAL_NAN_BITS = np.uint32(0x7FC00000)


def count_time_breaks(t_mono_ns: IntArray) -> IntArray | None:
    """Count, up to each reading, the steps that no rate may cross: longer than 2.5 s, or not forward in time.

    Returns:
        ``(m,)`` running count, so that a span is whole when its two ends have the same; None when there is no break.
    """
    delta = t_mono_ns[1:] - t_mono_ns[:-1]
    broken = (delta <= 0) | (delta > STALE_NS)
    return _compute_running_counts(broken) if broken.any() else None


def count_resets(values: NumericArray) -> IntArray | None:
    """Count, up to each reading, the falls of each counter.

    Args:
        values: ``(k, m)``, a counter a row.

    Returns:
        ``(k, m)`` running counts; None when no counter ever fell.
    """
    fell = values[:, 1:] < values[:, :-1]
    return _compute_running_counts(fell) if fell.any() else None


def _compute_running_counts(steps: BoolArray) -> IntArray:
    """Turn flags of steps into running counts at readings; the first reading has none behind it."""
    counts = np.zeros((*steps.shape[:-1], steps.shape[-1] + 1), np.int64)
    np.cumsum(steps, axis=-1, out=counts[..., 1:])
    return counts


def has_step_between(counts: IntArray, first: IntArray, last: IntArray) -> BoolArray:
    """Say of each span whether a counted step lies inside it."""
    found: BoolArray = counts[..., last] != counts[..., first]
    return found


def compute_rates(
    values: NumericArray, scales: FloatArray, seconds: FloatArray, first: IntArray, last: IntArray
) -> FloatArray:
    """Change per second over each span.

    Args:
        values: ``(k, m)`` a counter or level a row.
        scales: ``(k, 1)`` from raw to the channel's unit.
        seconds: ``(b,)`` monotonic time of each span; 0 where there is no span (the caller makes that NaN).
        first, last: ``(b,)`` indices of readings.
    """
    # Integers are subtracted before they become float64: a counter may need more than its 53 bits.
    change = np.subtract(values.take(last, axis=1), values.take(first, axis=1)).astype(np.float64)
    change *= scales
    change /= seconds
    return change


def compute_ratios(
    above: NumericArray, below: NumericArray, scales: FloatArray, first: IntArray, last: IntArray
) -> FloatArray:
    """One counter's change over another's; 0 where the second stood still."""
    top = np.subtract(above.take(last, axis=1), above.take(first, axis=1)).astype(np.float64)
    bottom = np.subtract(below.take(last, axis=1), below.take(first, axis=1)).astype(np.float64)
    top *= scales
    still = bottom == 0.0
    bottom[still] = 1.0
    top /= bottom
    top[still] = 0.0
    return top


def compute_means(values: NumericArray, scales: FloatArray, first: IntArray, last: IntArray) -> FloatArray:
    """Mean of the readings after ``first`` up to ``last``, summed from left to right."""
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


def compute_maxima(values: NumericArray, scales: FloatArray, first: IntArray, last: IntArray) -> FloatArray:
    """Largest of the readings after ``first`` up to ``last``."""
    count = last - first
    top = values.take(np.minimum(first + 1, last), axis=1)
    for step in range(2, int(count.max(initial=1)) + 1):
        more = np.flatnonzero(count >= step)
        top[:, more] = np.maximum(top[:, more], values[:, first[more] + step])
    scaled: FloatArray = top.astype(np.float64) * scales
    return scaled


def to_float32(values: FloatArray) -> NDArray[np.float32]:
    """Store as float32 in one spelling: no negative zero, and one NaN (0x7fc00000)."""
    with np.errstate(over="ignore"):  # what is out of range was blanked before; a warning would help nobody
        stored = values.astype(np.float32, order="C")
    stored += np.float32(0.0)
    unknown = np.isnan(stored)
    stored.view(np.uint32)[unknown] = CANONICAL_NAN_BITS
    return stored


FLAG_CLOCK_STEP = 1  # bin and window flag
FLAG_LATE = 2
FLAG_MIXED = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodeBins:
    """The bins of one episode.

    Attributes:
        bins: ``(n, 46)`` float32 in the order of CHANNELS, each column in its unit; NaN where nothing can be said. Never
            infinite: a value outside its channel's range is NaN.
        levels: ``(n, 13)`` float32 in the order of LEVELS; for the levels-only baseline and the leak checks alone.
        flags: ``(n,)`` uint8; 1 where a clock step touches the bin.
        findings: What had to be said about the clocks.
    """

    bins: NDArray[np.float32]
    levels: NDArray[np.float32]
    flags: NDArray[np.uint8]
    findings: tuple[BundleFinding, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupReadings:
    """The readings that some channels of one source share, in order.

    Attributes:
        t_wall_ns, t_mono_ns: ``(m,)`` int64.
        columns: The source's raw columns.
        kept: ``(m,)`` rows of the columns that are readings of these channels; None where all are.
    """

    t_wall_ns: IntArray
    t_mono_ns: IntArray
    columns: tuple[NumericArray, ...]
    kept: NDArray[np.intp] | None

    def stack(self, columns: tuple[int, ...]) -> NumericArray:
        """Give some raw columns as rows, ``(k, m)``."""
        values = np.array([self.columns[c] for c in columns])
        return values if self.kept is None else values.take(self.kept, axis=1)


def bin_episode(episode: Episode) -> EpisodeBins:
    """Put the wall stamps right and make the bins.

    Source: DESIGN.md, section 4.
    """
    rebased, findings = rebase_episode(episode)
    return bin_rebased_episode(rebased, findings)


def bin_rebased_episode(episode: Episode, findings: tuple[BundleFinding, ...]) -> EpisodeBins:
    """Make the bins of an episode that `rebase_episode` gave, with the findings that it gave.

    Bin i ends at t0 + (i + 1) · 0.5 s and depends on nothing stamped after that.
    """
    n = episode.n_bins
    edges = episode.t0_ns + BIN_NS * np.arange(n + 1, dtype=np.int64)
    values = np.full((len(CHANNELS) + len(LEVEL_CHANNELS), n), np.nan)
    # Spans that do not exist divide by zero until they are blanked, and a gauge may exceed float32.
    with np.errstate(all="ignore"):
        for readings in episode.rows.values():
            for group, own in iter_reading_groups(sort_readings(readings)):
                _fill_group(values, group, own, edges)
    return EpisodeBins(
        bins=to_float32(values[: len(CHANNELS)].T),
        levels=to_float32(values[len(CHANNELS) :].T),
        flags=_compute_bin_flags(episode, findings),
        findings=findings,
    )


def sort_readings(readings: SourceRows) -> SourceRows:
    """Give the readings by (t_wall, seq); equal ones stay as they stood."""
    wall, seq = readings.t_wall_ns, readings.seq
    later = wall[1:] > wall[:-1]
    if later.all() or (later | ((wall[1:] == wall[:-1]) & (seq[1:] >= seq[:-1]))).all():
        return readings
    order = np.lexsort((seq, wall))
    return replace(
        readings, t_wall_ns=wall[order], t_mono_ns=readings.t_mono_ns[order], seq=seq[order],
        columns=tuple(column[order] for column in readings.columns), present=readings.present[order],
    )  # fmt: skip


def iter_reading_groups(rows: SourceRows) -> Iterator[tuple[ColumnGroup, GroupReadings]]:
    """Sort a source's channels by which of its rows are readings of them: those where no field of theirs is null.

    Mostly every field is there in every row, and one group holds all.
    """
    if not len(rows):
        return
    everything = GroupReadings(t_wall_ns=rows.t_wall_ns, t_mono_ns=rows.t_mono_ns, columns=rows.columns, kept=None)
    if rows.present.all():
        yield build_standard_group(rows.source), everything
        return
    patterns: dict[bytes, list[ColumnPlan]] = {}
    by_field = rows.present.T.copy()
    spelled = [mask.tobytes() for mask in by_field]
    for unit in build_standard_plans(rows.source):
        head, *more = unit.columns
        pattern = spelled[head]
        if more and spelled[more[0]] != pattern:
            pattern = (by_field[head] & by_field[more[0]]).tobytes()
        patterns.setdefault(pattern, []).append(unit)
    for pattern, members in patterns.items():
        kept = np.flatnonzero(np.frombuffer(pattern, np.bool_))
        if len(kept) == len(rows):
            yield build_column_group(tuple(members)), everything
        elif len(kept):
            yield (
                build_column_group(tuple(members)),
                GroupReadings(
                    t_wall_ns=rows.t_wall_ns[kept], t_mono_ns=rows.t_mono_ns[kept], columns=rows.columns, kept=kept
                ),
            )


def _fill_group(values: FloatArray, group: ColumnGroup, readings: GroupReadings, edges: IntArray) -> None:
    """Make the bins of one group.

    Args:
        values: ``(channels, n)``, written in place.
        group: What to make.
        readings: Those of the group, in order.
        edges: ``(n + 1,)`` ends of the bins in ns; the first is t0, where the unstored bin before all others ends.
    """
    newest = np.searchsorted(readings.t_wall_ns, edges, side="right") - 1
    begin = int(np.searchsorted(newest, 0))  # bins before the first reading stay unknown
    if begin == len(edges):
        return
    last = newest[begin:]
    first = np.empty_like(last)
    first[1:] = last[:-1]
    # The bin that ends at t0 spans from the reading before its own; a later first bin has none before it (−1).
    first[0] = last[0] - 1 if begin == 0 else -1
    is_new = first != last
    made = compute_span_values(group, readings, first[is_new], last[is_new])
    held = np.cumsum(is_new) - 1  # a bin without a reading of its own repeats the one before
    stale = edges[begin:] - readings.t_wall_ns[last] > STALE_NS
    skip = 1 if begin == 0 else 0
    spread = made.take(held[skip:], axis=1) if len(made[0]) != len(held) else made[:, skip:]
    if stale.any():
        spread = np.where(stale[skip:], np.nan, spread)
    values[group.rows, begin + skip - 1 :] = spread


def compute_span_values(group: ColumnGroup, readings: GroupReadings, first: IntArray, last: IntArray) -> FloatArray:
    """Compute the value of each span, for every column of a group.

    Args:
        group: What to compute.
        readings: Those of the group, in order.
        first: ``(b,)`` index of the reading of the bin before, −1 where there is none.
        last: ``(b,)`` index of the bin's own newest reading.

    Returns:
        ``(k, b)`` float64 in the order of ``group.rows``.
    """
    result = np.empty((len(group.rows), len(last)))
    start = np.maximum(first, 0)  # without a reading before, the span starts at the first one in the bin
    lost = start == last
    seconds = (readings.t_mono_ns[last] - readings.t_mono_ns[start]).astype(np.float64) / 1e9
    breaks = count_time_breaks(readings.t_mono_ns)
    if breaks is not None:
        lost |= has_step_between(breaks, start, last)
    for block in group.blocks:
        stacked = [readings.stack(columns) for columns in block.columns]
        out = result[block.start : block.stop]
        if block.kind is ChannelKind.GAUGE:
            out[:] = compute_means(stacked[0], block.scales, first, last)
        elif block.kind is ChannelKind.COUNT:
            out[:] = compute_maxima(stacked[0], block.scales, first, last)
        elif block.kind is ChannelKind.RATIO:
            out[:] = compute_ratios(stacked[0], stacked[1], block.scales, start, last)
        else:
            out[:] = compute_rates(stacked[0], block.scales, seconds, start, last)
        if block.kind in (ChannelKind.RATE, ChannelKind.RATIO):
            for values in stacked:
                falls = count_resets(values)
                if falls is not None:
                    out[has_step_between(falls, start, last)] = np.nan
    if lost.any():
        result[: group.n_spanning, lost] = np.nan
    absurd = (result < group.minimum) | (result > group.maximum)
    if absurd.any():  # infinite, or more than any machine can do: a broken or forged reading, not a measurement
        result[absurd] = np.nan
    return result


def _compute_bin_flags(episode: Episode, findings: tuple[BundleFinding, ...]) -> NDArray[np.uint8]:
    """Mark the bins that a clock step touches."""
    flags = np.zeros(episode.n_bins, np.uint8)
    if not any(finding.code == "clock-step" for finding in findings):
        return flags
    for low, high in find_clock_steps(episode).tolist():
        begin = max((low - episode.t0_ns) // BIN_NS, 0)
        flags[begin : max((high - episode.t0_ns) // BIN_NS + 1, 0)] |= FLAG_CLOCK_STEP
    return flags
