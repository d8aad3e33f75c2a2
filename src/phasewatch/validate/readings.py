"""How much of a source was really read: null shares and longest null runs by field. A row of nulls is no reading."""

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
from phasewatch.channels import CHANNELS, CUSTOM_CHANNELS, list_raw_fields
from phasewatch.types import STALE_NS, ChannelTrust, SourceKind

MIN_READ_SHARE = 0.9  # of the readings of a field that are due; below it the episode is degraded
MAX_PROC_NULL_SHARE = 0.5  # of all readings of proc; above it nothing can be said of the VM
MAX_LISTED_FIELDS = 4  # fields that a finding names one by one


# The guest's balloon driver answers once a second, so that every second row of the monitor reads null there.
_HALF_RATE_FIELDS = frozenset(
    field for c in CHANNELS if c.source is SourceKind.QMP and c.trust is ChannelTrust.GUEST for field in c.fields
)
_CUSTOM_FIELDS = frozenset((row["source"], row["field"]) for row in CUSTOM_CHANNELS.raw)


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldNulls:
    """How often one raw field was null between the first label and the end.

    Attributes:
        rows: Rows of the source there.
        nulls: Of them, rows in which the field is null.
        longest_ns: From the last reading before the longest run of nulls to the first one after it; 0 without nulls.
        longest_start_ns: Wall stamp at which that run begins; 0 without nulls.
    """

    source: SourceKind
    field: str
    rows: int
    nulls: int
    longest_ns: int
    longest_start_ns: int

    @property
    def share(self) -> float:
        """Nulls among the rows, 0 to 1; 0 without rows."""
        return self.nulls / self.rows if self.rows else 0.0


def find_read_rows(readings: SourceRows) -> BoolArray:
    """Return ``(n,)`` bool: whether a row read any field at all."""
    return _any_along_axis(readings.present, 1)


def find_read_fields(readings: SourceRows) -> frozenset[str]:
    """Return the raw fields that at least one row read."""
    return frozenset(
        field
        for field, ever in zip(readings.fields, _any_along_axis(readings.present, 0).tolist(), strict=True)
        if ever
    )


def _any_along_axis(present: BoolArray, axis: int) -> BoolArray:
    found: BoolArray = np.asarray(present.any(axis=axis))
    return found


def _find_labelled_rows(episode: Episode, readings: SourceRows) -> BoolArray:
    """Return ``(n,)`` bool: whether a row lies between the first label and the end."""
    wall = readings.t_wall_ns
    inside: BoolArray = np.asarray((wall >= episode.t0_ns) & (wall <= episode.t_end_ns))
    return inside


def count_field_nulls(episode: Episode, source: SourceKind) -> tuple[FieldNulls, ...]:
    """Count the nulls of each raw field of a source, in the order of RAW; nothing for a source without rows."""
    readings = episode.rows.get(source)
    if readings is None:
        return ()
    inside = _find_labelled_rows(episode, readings)
    present, wall = readings.present[inside], readings.t_wall_ns[inside]
    rows, nulls = len(present), (len(present) - np.count_nonzero(present, axis=0)).tolist()
    if any(nulls) and (wall[1:] < wall[:-1]).any():
        order = np.argsort(wall, kind="stable")
        wall, present = wall[order], present[order]
    runs: dict[bytes, tuple[int, int]] = {}  # the fields of one answer are mostly null together
    found = []
    for i, spec in enumerate(list_raw_fields(source)):
        longest_ns, at_ns = 0, 0
        if nulls[i]:
            null = ~present[:, i]
            key = null.tobytes()
            if key not in runs:
                runs[key] = _find_longest_run(episode, wall, null)
            longest_ns, at_ns = runs[key]
        found.append(
            FieldNulls(
                source=source, field=spec.field, rows=rows, nulls=nulls[i], longest_ns=longest_ns, longest_start_ns=at_ns
            )
        )  # fmt: skip
    return tuple(found)


def count_nulls(episode: Episode) -> Mapping[SourceKind, tuple[FieldNulls, ...]]:
    """Count the nulls of every source that has rows; see `count_field_nulls`."""
    return {source: count_field_nulls(episode, source) for source in SourceKind if source in episode.rows}


def _find_longest_run(episode: Episode, wall_ns: NDArray[np.int64], null: BoolArray) -> tuple[int, int]:
    """Measure the longest run of nulls from reading to reading; the labels' ends stand in where there is none."""
    edges = np.diff(np.concatenate(([False], null, [False])).astype(np.int8))
    begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    padded = np.concatenate(([episode.t0_ns], wall_ns, [episode.t_end_ns]))
    lengths = padded[ends + 1] - padded[begins]
    worst = int(np.argmax(lengths))
    return int(lengths[worst]), int(padded[begins[worst] + 1])


def check_nulls(episode: Episode) -> list[CheckIssue]:
    """Find fields that a source claims to give and mostly or long did not; without proc nothing can be said."""
    found, claimed = [], set(episode.manifest.channels_available)
    for source, readings in episode.rows.items():
        if readings.present.all():
            continue
        counted = count_field_nulls(episode, source)
        if source is SourceKind.PROC and (lack := _check_proc_nulls(counted)):
            found.append(lack)
            continue
        owed = {field for c in CHANNELS if c.source is source and c.full_name in claimed for field in c.fields}
        owed &= find_read_fields(readings)  # a field that was never read is `check_channels`' to name
        gaps = [n for n in counted if n.field in owed and _has_excess_nulls(n)]
        if gaps:
            found.append(CheckIssue("nulls", _describe_gaps(episode, gaps), source=source))
    return found


def _has_excess_nulls(nulls: FieldNulls) -> bool:
    every = 2 if nulls.source is SourceKind.QMP and nulls.field in _HALF_RATE_FIELDS else 1
    read, due = nulls.rows - nulls.nulls, nulls.rows / every
    return nulls.nulls > 0 and (read < MIN_READ_SHARE * due - 1 or nulls.longest_ns > every * STALE_NS)


def _check_proc_nulls(counted: Iterable[FieldNulls]) -> CheckIssue | None:
    cells = [(n.rows, n.nulls) for n in counted if (n.source, n.field) not in _CUSTOM_FIELDS]
    rows, nulls = sum(r for r, _ in cells), sum(n for _, n in cells)
    if not rows or nulls <= MAX_PROC_NULL_SHARE * rows:
        return None
    return CheckIssue("nulls-proc", f"{nulls:,} of {rows:,} readings are null", source=SourceKind.PROC)


def _describe_gaps(episode: Episode, gaps: list[FieldNulls]) -> str:
    worst = sorted(gaps, key=lambda n: (-n.nulls, n.field))
    told = [
        f"{n.field}: {n.nulls} of {n.rows} rows null ({n.share:.0%}), longest {n.longest_ns / 1e9:.1f} s "
        f"from {(n.longest_start_ns - episode.t0_ns) / 1e9:.1f} s"
        for n in worst[:MAX_LISTED_FIELDS]
    ]
    more = len(worst) - MAX_LISTED_FIELDS
    return "; ".join(told) + (f"; and {more} more fields" if more > 0 else "")


def drop_impossible(episode: Episode) -> Episode:
    """Return the episode with every reading outside its field's range turned into null; the same one if there is none."""
    changed = {}
    for source, readings in episode.rows.items():
        wild = find_impossible(readings)
        if wild is not None:
            columns = tuple(_blank_values(column, wild[:, i]) for i, column in enumerate(readings.columns))
            changed[source] = replace(readings, columns=columns, present=readings.present & ~wild)
    return replace(episode, rows={**episode.rows, **changed}) if changed else episode


def _blank_values(column: NumericArray, wild: BoolArray) -> NumericArray:
    """Replace impossible readings by 0, which stands for null."""
    blank = column.copy()
    blank[wild] = 0
    return blank


def find_impossible(readings: SourceRows) -> BoolArray | None:
    """Return ``(n, fields)`` bool: which readings are outside their field's range; None if none is."""
    if not len(readings):
        return None
    wild: dict[int, BoolArray] = {}
    for number_type, places, least, most in _group_ranges_by_type(readings.source):
        values: NDArray[Any] = np.array([readings.columns[i] for i in places], number_type)
        outside = (values.min(axis=1) < least) | (values.max(axis=1) > most)  # a null reads 0, which every range holds
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
    """Sort a source's raw fields by number type: their places, and least and greatest value of each."""
    specs, ranges = list_raw_fields(source), raw_ranges(source)
    made = []
    for name, number_type in (("int", np.int64), ("float", np.float64)):
        places = tuple(i for i, spec in enumerate(specs) if spec.type == name)
        if places:
            least, most = (np.array([ranges[i][end] for i in places]) for end in (0, 1))
            made.append((number_type, places, least, most))
    return tuple(made)


# What the bins of half a second are made for: a source that reads less often is told of, whatever its manifest promises.
STANDARD_HZ = {SourceKind.PROC: 2.0, SourceKind.QMP: 2.0, SourceKind.NETFLOW: 2.0, SourceKind.GUEST: 1.0}
SAMPLING_MARGIN_S = 300.0  # of sampling before and after the labels, at most


def compute_expected_hz(manifest: Manifest, source: SourceKind) -> float:
    """Return at how many rows a second a source is due, in Hz."""
    return max(manifest.nominal_hz.get(source, 0.0), STANDARD_HZ[source])


def compute_max_emitted(manifest: Manifest, source: SourceKind) -> int:
    """Return how many rows a sampler of that rate can have emitted in the episode's time, twice over."""
    return math.ceil(2 * compute_expected_hz(manifest, source) * (manifest.duration_s + SAMPLING_MARGIN_S))
