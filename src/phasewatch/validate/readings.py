"""Null readings and impossible readings of a source; a row of nulls is no reading."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import BoolArray, FloatArray, NumericArray
from phasewatch.binning.ranges import raw_ranges
from phasewatch.bundle.model import Episode, Manifest, SourceRows
from phasewatch.bundle.problems import CheckIssue
from phasewatch.channels import CHANNELS, CUSTOM_FIELD_KEYS, list_raw_fields
from phasewatch.types import STALE_NS, ChannelTrust, SourceKind

__all__ = [
    "FieldNulls",
    "compute_expected_hz",
    "compute_max_emitted",
    "count_field_nulls",
    "count_nulls",
    "drop_impossible",
    "find_excess_nulls",
    "find_impossible",
    "find_read_fields",
    "find_read_rows",
]

MIN_READ_SHARE = 0.9  # of the expected readings of a field; below it the episode is degraded
MAX_PROC_NULL_SHARE = 0.5  # of all readings of proc; above it the bundle is rejected
MAX_LISTED_FIELDS = 4  # fields that a finding lists

# The guest's balloon driver answers once a second, so every second QMP row is null there.
_HALF_RATE_FIELDS = frozenset(
    field for c in CHANNELS if c.source is SourceKind.QMP and c.trust is ChannelTrust.GUEST for field in c.fields
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldNulls:
    """Nulls of one raw field between the first and the last label.

    Attributes:
        rows: Rows of the source in that time.
        nulls: Rows in which the field is null.
        longest_ns: Time from the last reading before the longest run of nulls to the first after it; 0 without nulls.
        longest_start_ns: Wall stamp of the start of that run; 0 without nulls.
    """

    source: SourceKind
    field: str
    rows: int
    nulls: int
    longest_ns: int
    longest_start_ns: int

    @property
    def share(self) -> float:
        """Share of nulls among the rows, 0 to 1; 0 without rows."""
        return self.nulls / self.rows if self.rows else 0.0


def find_read_rows(readings: SourceRows) -> BoolArray:
    """Return ``(n,)`` bool: whether a row has any reading."""
    return _any_along_axis(readings.present, 1)


def find_read_fields(readings: SourceRows) -> frozenset[str]:
    """Return the raw fields with at least one reading."""
    return frozenset(
        field
        for field, ever in zip(readings.fields, _any_along_axis(readings.present, 0).tolist(), strict=True)
        if ever
    )


def _any_along_axis(present: BoolArray, axis: int) -> BoolArray:
    found: BoolArray = np.asarray(present.any(axis=axis))
    return found


def _find_labelled_rows(episode: Episode, readings: SourceRows) -> BoolArray:
    """Return ``(n,)`` bool: whether a row lies between the first and the last label."""
    wall = readings.t_wall_ns
    inside: BoolArray = np.asarray((wall >= episode.t0_ns) & (wall <= episode.t_end_ns))
    return inside


def count_field_nulls(episode: Episode, source: SourceKind) -> tuple[FieldNulls, ...]:
    """Count the nulls of each raw field that a source recorded, in the order of its rows; empty for a missing source.

    Fields that the bundle does not have, because an earlier version recorded it, are left out.
    """
    readings = episode.rows.get(source)
    if readings is None:
        return ()
    inside = _find_labelled_rows(episode, readings)
    present, wall = readings.present[inside], readings.t_wall_ns[inside]
    rows, nulls = len(present), (len(present) - np.count_nonzero(present, axis=0)).tolist()
    if any(nulls) and (wall[1:] < wall[:-1]).any():
        order = np.argsort(wall, kind="stable")
        wall, present = wall[order], present[order]
    runs: dict[bytes, tuple[int, int]] = {}  # fields of one reply are mostly null together
    counted = []
    recorded = set(episode.manifest.fields.get(source, readings.fields))
    for i, spec in enumerate(list_raw_fields(source)):
        if spec.field not in recorded:
            continue
        longest_ns, start_ns = 0, 0
        if nulls[i]:
            null = ~present[:, i]
            key = null.tobytes()
            if key not in runs:
                runs[key] = _find_longest_run(episode, wall, null)
            longest_ns, start_ns = runs[key]
        counted.append(
            FieldNulls(
                source=source,
                field=spec.field,
                rows=rows,
                nulls=nulls[i],
                longest_ns=longest_ns,
                longest_start_ns=start_ns,
            )
        )
    return tuple(counted)


def count_nulls(episode: Episode) -> Mapping[SourceKind, tuple[FieldNulls, ...]]:
    """Count the nulls of every source that has rows; see `count_field_nulls`."""
    return {source: count_field_nulls(episode, source) for source in SourceKind if source in episode.rows}


def _find_longest_run(episode: Episode, wall_ns: NDArray[np.int64], null: BoolArray) -> tuple[int, int]:
    """Return length and start of the longest run of nulls, in ns, between readings or the ends of the labels.

    Args:
        episode: The episode.
        wall_ns: ``(n,)`` int64 wall stamps, ascending.
        null: ``(n,)`` bool, with at least one null.
    """
    edges = np.diff(np.concatenate(([False], null, [False])).astype(np.int8))
    begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    padded = np.concatenate(([episode.t0_ns], wall_ns, [episode.t_end_ns]))
    lengths = padded[ends + 1] - padded[begins]
    worst = int(np.argmax(lengths))
    return int(lengths[worst]), int(padded[begins[worst] + 1])


def find_excess_nulls(episode: Episode) -> list[CheckIssue]:
    """Find fields of available channels with too many or too long nulls."""
    issues, claimed = [], set(episode.manifest.channels_available)
    for source, readings in episode.rows.items():
        recorded = set(episode.manifest.fields.get(source, readings.fields))
        is_whole = np.asarray(readings.present.all(axis=0)).tolist()
        if all(whole for field, whole in zip(readings.fields, is_whole, strict=True) if field in recorded):
            continue
        counted = count_field_nulls(episode, source)
        if source is SourceKind.PROC and (issue := _find_proc_nulls(counted)):
            issues.append(issue)
            continue
        expected = {field for c in CHANNELS if c.source is source and c.full_name in claimed for field in c.fields}
        expected &= find_read_fields(readings)  # `contradictions` reports fields that were never read
        gaps = [n for n in counted if n.field in expected and _has_excess_nulls(n)]
        if gaps:
            issues.append(CheckIssue("nulls", _describe_gaps(episode, gaps), source=source))
    return issues


def _has_excess_nulls(nulls: FieldNulls) -> bool:
    every = 2 if nulls.source is SourceKind.QMP and nulls.field in _HALF_RATE_FIELDS else 1
    read, expected = nulls.rows - nulls.nulls, nulls.rows / every
    return nulls.nulls > 0 and (read < MIN_READ_SHARE * expected - 1 or nulls.longest_ns > every * STALE_NS)


def _find_proc_nulls(counted: Iterable[FieldNulls]) -> CheckIssue | None:
    counts = [(n.rows, n.nulls) for n in counted if (n.source, n.field) not in CUSTOM_FIELD_KEYS]
    rows, nulls = sum(r for r, _ in counts), sum(n for _, n in counts)
    if not rows or nulls <= MAX_PROC_NULL_SHARE * rows:
        return None
    return CheckIssue("nulls-proc", f"{nulls:,} of {rows:,} readings are null", source=SourceKind.PROC)


def _describe_gaps(episode: Episode, gaps: list[FieldNulls]) -> str:
    worst = sorted(gaps, key=lambda n: (-n.nulls, n.field))
    listed = [
        f"{n.field}: {n.nulls} of {n.rows} rows null ({n.share:.0%}), longest {n.longest_ns / 1e9:.1f} s "
        f"from {(n.longest_start_ns - episode.t0_ns) / 1e9:.1f} s"
        for n in worst[:MAX_LISTED_FIELDS]
    ]
    more = len(worst) - MAX_LISTED_FIELDS
    return "; ".join(listed) + (f"; and {more} more fields" if more > 0 else "")


def drop_impossible(episode: Episode) -> Episode:
    """Return the episode with impossible readings turned into null; the same object if there are none."""
    changed = {}
    for source, readings in episode.rows.items():
        impossible = find_impossible(readings)
        if impossible is not None:
            columns = tuple(_blank_values(column, impossible[:, i]) for i, column in enumerate(readings.columns))
            changed[source] = replace(readings, columns=columns, present=readings.present & ~impossible)
    return replace(episode, rows={**episode.rows, **changed}) if changed else episode


def _blank_values(column: NumericArray, wild: BoolArray) -> NumericArray:
    """Return a column with 0, which stands for null, in place of some readings.

    Args:
        column: ``(n,)`` readings.
        wild: ``(n,)`` bool.
    """
    blank = column.copy()
    blank[wild] = 0
    return blank


def find_impossible(readings: SourceRows) -> BoolArray | None:
    """Return ``(n, fields)`` bool: whether a reading is outside the range of its field; None if all are inside."""
    if not len(readings):
        return None
    wild: dict[int, BoolArray] = {}
    for number_type, places, least, most in _group_ranges_by_type(readings.source):
        values: NDArray[Any] = np.array([readings.columns[i] for i in places], number_type)
        outside = (values.min(axis=1) < least) | (values.max(axis=1) > most)  # a null reads 0, which is in every range
        for k in np.flatnonzero(outside).tolist():
            wild[places[k]] = (values[k] < least[k]) | (values[k] > most[k])
    if not wild:
        return None
    found = np.zeros(readings.present.shape, np.bool_)
    for i, flags in wild.items():
        found[:, i] = flags
    return found & readings.present


@cache
def _group_ranges_by_type(source: SourceKind) -> tuple[tuple[type, tuple[int, ...], FloatArray, FloatArray], ...]:
    """Group a source's raw fields by number type: type, places, and ``(k,)`` minima and maxima."""
    specs, ranges = list_raw_fields(source), raw_ranges(source)
    groups = []
    for name, number_type in (("int", np.int64), ("float", np.float64)):
        places = tuple(i for i, spec in enumerate(specs) if spec.type == name)
        if places:
            least, most = (np.array([ranges[i][end] for i in places]) for end in (0, 1))
            groups.append((number_type, places, least, most))
    return tuple(groups)


# The rates that bins of half a second need; a slower source is reported, whatever its manifest claims.
STANDARD_HZ = {SourceKind.PROC: 2.0, SourceKind.QMP: 2.0, SourceKind.NETFLOW: 2.0, SourceKind.GUEST: 1.0}
SAMPLING_MARGIN_S = 300.0  # maximum of sampling before and after the labels


def compute_expected_hz(manifest: Manifest, source: SourceKind) -> float:
    """Return the expected rate of a source's rows in Hz."""
    return max(manifest.nominal_hz.get(source, 0.0), STANDARD_HZ[source])


def compute_max_emitted(manifest: Manifest, source: SourceKind) -> int:
    """Return the maximum plausible number of emitted rows: twice the expected rate for the episode's time."""
    return math.ceil(2 * compute_expected_hz(manifest, source) * (manifest.duration_s + SAMPLING_MARGIN_S))
