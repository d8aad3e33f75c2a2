"""Ticks to bins: one row of 46 channels (and 13 levels beside them) every half second, exact and causal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS, LEVELS
from phasewatch.episode.findings import Finding
from phasewatch.episode.model import Episode, SourceRows
from phasewatch.grid import arithmetic
from phasewatch.grid.clocks import clock_steps, rebase
from phasewatch.grid.layout import Group, Unit, group_of, standard_group, standard_units
from phasewatch.vocab import BIN_NS, STALE_NS, Kind

CLOCK_STEP = 1  # bin and window flag
LATE = 2
MIXED = 4

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
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
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Readings:
    """The readings that some channels of one source share, in order.

    Attributes:
        t_wall_ns, t_mono_ns: ``(m,)`` int64.
        columns: The source's raw columns.
        kept: ``(m,)`` rows of the columns that are readings of these channels; None where all are.
    """

    t_wall_ns: Ints
    t_mono_ns: Ints
    columns: tuple[arithmetic.Values, ...]
    kept: NDArray[np.intp] | None

    def stack(self, columns: tuple[int, ...]) -> arithmetic.Values:
        """Give some raw columns as rows, ``(k, m)``."""
        values = np.array([self.columns[c] for c in columns])
        return values if self.kept is None else values.take(self.kept, axis=1)


def align(episode: Episode) -> Grid:
    """Put the wall stamps right and make the bins.

    Source: DESIGN.md, section 4.
    """
    rebased, findings = rebase(episode)
    return align_rebased(rebased, findings)


def align_rebased(episode: Episode, findings: tuple[Finding, ...]) -> Grid:
    """Make the bins of an episode that `rebase` gave, with the findings that it gave.

    Bin i ends at t0 + (i + 1) · 0.5 s and depends on nothing stamped after that.
    """
    n = episode.n_bins
    edges = episode.t0_ns + BIN_NS * np.arange(n + 1, dtype=np.int64)
    values = np.full((len(CHANNELS) + len(LEVELS), n), np.nan)
    # Spans that do not exist divide by zero until they are blanked, and a gauge may exceed float32.
    with np.errstate(all="ignore"):
        for readings in episode.rows.values():
            for group, own in reading_groups(in_order(readings)):
                _fill(values, group, own, edges)
    return Grid(
        bins=arithmetic.to_float32(values[: len(CHANNELS)].T),
        levels=arithmetic.to_float32(values[len(CHANNELS) :].T),
        flags=_flags(episode, findings),
        findings=findings,
    )


def in_order(readings: SourceRows) -> SourceRows:
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


def reading_groups(rows: SourceRows) -> Iterator[tuple[Group, Readings]]:
    """Sort a source's channels by which of its rows are readings of them: those where no field of theirs is null.

    Mostly every field is there in every row, and one group holds all.
    """
    if not len(rows):
        return
    everything = Readings(t_wall_ns=rows.t_wall_ns, t_mono_ns=rows.t_mono_ns, columns=rows.columns, kept=None)
    if rows.present.all():
        yield standard_group(rows.source), everything
        return
    patterns: dict[bytes, list[Unit]] = {}
    by_field = rows.present.T.copy()
    spelled = [mask.tobytes() for mask in by_field]
    for unit in standard_units(rows.source):
        head, *more = unit.columns
        pattern = spelled[head]
        if more and spelled[more[0]] != pattern:
            pattern = (by_field[head] & by_field[more[0]]).tobytes()
        patterns.setdefault(pattern, []).append(unit)
    for pattern, members in patterns.items():
        kept = np.flatnonzero(np.frombuffer(pattern, np.bool_))
        if len(kept) == len(rows):
            yield group_of(tuple(members)), everything
        elif len(kept):
            yield (
                group_of(tuple(members)),
                Readings(
                    t_wall_ns=rows.t_wall_ns[kept], t_mono_ns=rows.t_mono_ns[kept], columns=rows.columns, kept=kept
                ),
            )


def _fill(values: Floats, group: Group, readings: Readings, edges: Ints) -> None:
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
    made = span_values(group, readings, first[is_new], last[is_new])
    held = np.cumsum(is_new) - 1  # a bin without a reading of its own repeats the one before
    stale = edges[begin:] - readings.t_wall_ns[last] > STALE_NS
    skip = 1 if begin == 0 else 0
    spread = made.take(held[skip:], axis=1) if len(made[0]) != len(held) else made[:, skip:]
    if stale.any():
        spread = np.where(stale[skip:], np.nan, spread)
    values[group.rows, begin + skip - 1 :] = spread


def span_values(group: Group, readings: Readings, first: Ints, last: Ints) -> Floats:
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
    breaks = arithmetic.time_breaks(readings.t_mono_ns)
    if breaks is not None:
        lost |= arithmetic.crossed(breaks, start, last)
    for block in group.blocks:
        stacked = [readings.stack(columns) for columns in block.columns]
        out = result[block.start : block.stop]
        if block.kind is Kind.GAUGE:
            out[:] = arithmetic.means(stacked[0], block.scales, first, last)
        elif block.kind is Kind.COUNT:
            out[:] = arithmetic.maxima(stacked[0], block.scales, first, last)
        elif block.kind is Kind.RATIO:
            out[:] = arithmetic.ratios(stacked[0], stacked[1], block.scales, start, last)
        else:
            out[:] = arithmetic.rates(stacked[0], block.scales, seconds, start, last)
        if block.kind in (Kind.RATE, Kind.RATIO):
            for values in stacked:
                falls = arithmetic.resets(values)
                if falls is not None:
                    out[arithmetic.crossed(falls, start, last)] = np.nan
    if lost.any():
        result[: group.n_spanning, lost] = np.nan
    absurd = (result < group.least) | (result > group.most)
    if absurd.any():  # infinite, or more than any machine can do: a broken or forged reading, not a measurement
        result[absurd] = np.nan
    return result


def _flags(episode: Episode, findings: tuple[Finding, ...]) -> NDArray[np.uint8]:
    """Mark the bins that a clock step touches."""
    flags = np.zeros(episode.n_bins, np.uint8)
    if not any(finding.code == "clock-step" for finding in findings):
        return flags
    for low, high in clock_steps(episode).tolist():
        begin = max((low - episode.t0_ns) // BIN_NS, 0)
        flags[begin : max((high - episode.t0_ns) // BIN_NS + 1, 0)] |= CLOCK_STEP
    return flags
