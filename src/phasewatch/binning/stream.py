"""Compute bins one by one while readings arrive; they are bit-identical to those of `align`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import NumericArray
from phasewatch.binning import align
from phasewatch.binning.align import FLAG_CLOCK_STEP, FLAG_LATE, compute_span_values, iter_reading_groups, sort_readings
from phasewatch.binning.clocks import MIN_CLOCK_STEP_NS
from phasewatch.binning.scalar import fill_from_one_reading
from phasewatch.bundle.model import SourceRows
from phasewatch.channels import CHANNELS, LEVEL_CHANNELS, list_raw_fields
from phasewatch.types import BIN_NS, STALE_NS, WINDOW_BINS, SourceKind

__all__ = ["LATENESS_NS", "ClosedBin", "ReadingRow", "StreamBinner"]

LATENESS_NS = 1_000_000_000  # a bin is closed this long after its end, even if readings are missing
MAX_FLAGGED_BINS = 7200  # maximum that one clock step flags: one hour
FLAG_HISTORY_BINS = 2 * WINDOW_BINS  # flags of older bins are dropped; a late reading flags later windows only
_INT64_LIMIT = 2**63

ReadingRow = Sequence[int | float | None]  # t_wall_ns, t_mono_ns, seq, then the raw fields in their order


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClosedBin:
    """One closed bin.

    Attributes:
        number: Number of the bin; the one that starts at t0 is 0.
        end_ns: Wall stamp of its end.
        values: ``(73,)`` float32 in the order of `CHANNELS`, NaN where unknown.
    """

    number: int
    end_ns: int
    values: NDArray[np.float32]

    @property
    def n_finite(self) -> int:
        """Number of channels with a value."""
        return int(np.isfinite(self.values).sum())


class StreamBinner:
    """Closes bins by the clock; readings may arrive in any order until their bin is closed.

    A later reading is counted and left out, and the bins that it would have changed are flagged. Memory is bounded:
    before the last closed bin, only the newest reading of each channel is kept.

    Args:
        t0_ns: Wall stamp of the start of the first bin. Earlier readings open the first spans.

    Source: docs/formats/run.md.
    """

    def __init__(self, t0_ns: int) -> None:
        self.t0_ns = t0_ns
        self.n_late = 0
        self._next = -1  # the bin that ends at t0 is computed first and not returned
        self._rows: dict[SourceKind, list[tuple[int | float | None, ...]]] = {}
        self._held = [math.nan] * (len(CHANNELS) + len(LEVEL_CHANNELS))
        self._flags: dict[int, int] = {}
        self._newest: dict[SourceKind, tuple[int, int]] = {}

    @property
    def next_close_ns(self) -> int:
        """Wall stamp from which on the next bin may be closed, in ns."""
        return self._bin_end_ns(max(self._next, 0)) + LATENESS_NS

    def add(self, source: SourceKind, row: ReadingRow) -> bool:
        """Add one reading.

        A number that int64 or a finite float64 cannot hold counts as null.

        Returns:
            False if it came too late to count.
        """
        wall, mono = int(row[0] or 0), int(row[1] or 0)
        self._detect_clock_step(source, wall, mono)
        if wall <= self._bin_end_ns(self._next - 1) and self._next >= 0:
            self.n_late += 1
            # The next reading includes its increment, and a bin may repeat that value: at most 2.5 s each.
            self._flag_bins(wall - 1, wall + 2 * STALE_NS, FLAG_LATE)
            return False
        kept = tuple([None if value is None or not -_INT64_LIMIT <= value < _INT64_LIMIT else value for value in row])
        self._rows.setdefault(source, []).append(kept)
        return True

    def close_until(self, now_ns: int) -> list[ClosedBin]:
        """Close and return every bin that ended at least 1 s before `now_ns`, oldest first.

        Their flags, and those of the two windows before them, are kept until the next call.
        """
        closed = []
        for gone in [number for number in self._flags if number < self._next - FLAG_HISTORY_BINS]:
            del self._flags[gone]
        while self._bin_end_ns(self._next) + LATENESS_NS <= now_ns:
            values = self._close()
            if self._next >= 0:
                closed.append(ClosedBin(number=self._next, end_ns=self._bin_end_ns(self._next), values=values))
            self._next += 1
        return closed

    def combine_flags(self, first: int, count: int) -> int:
        """Return the combined flags of `count` bins from number `first` on."""
        combined = 0
        for number in range(first, first + count):
            combined |= self._flags.get(number, 0)
        return combined

    def _bin_end_ns(self, number: int) -> int:
        return self.t0_ns + (number + 1) * BIN_NS

    def _close(self) -> NDArray[np.float32]:
        """Return the next bin, ``(73,)`` float32, and drop the readings that later bins do not need."""
        end_ns = self._bin_end_ns(self._next)
        before_ns = None if self._next < 0 else end_ns - BIN_NS
        now = [math.nan] * len(self._held)
        for source, rows in self._rows.items():
            seen = sorted((row for row in rows if row[0] <= end_ns), key=_row_sort_key)  # type: ignore[operator]
            if not seen:
                continue
            newest = None
            if before_ns is not None and (n_new := sum(row[0] > before_ns for row in seen)) <= 1:  # type: ignore[operator]
                newest = fill_from_one_reading(source, seen, n_new=n_new, end_ns=end_ns, now=now, held=self._held)
            if newest is None:
                newest = self._fill(now, _build_source_rows(source, seen), end_ns, before_ns)
            ahead = [row for row in rows if row[0] > end_ns]  # type: ignore[operator]
            self._rows[source] = [seen[i] for i in sorted(newest)] + ahead
        return align.to_float32(np.array(now[: len(CHANNELS)]))

    def _fill(self, now: list[float], seen: SourceRows, end_ns: int, before_ns: int | None) -> set[int]:
        """Compute the channels of one source.

        Args:
            now: Channels and levels of the bin, written in place.
            seen: Readings up to the end of the bin.
            end_ns: End of the bin.
            before_ns: End of the bin before; None for the bin that ends at t0.

        Returns:
            The indices of the readings from which the next bin starts.
        """
        newest: set[int] = set()
        for group, shared in iter_reading_groups(sort_readings(seen)):
            last = len(shared.t_wall_ns) - 1
            # The bin that ends at t0 spans from the reading before its own.
            if before_ns is None:
                first = last - 1
            else:
                first = int(np.searchsorted(shared.t_wall_ns, before_ns, side="right")) - 1
            if first != last:
                with np.errstate(all="ignore"):
                    values = compute_span_values(group, shared, np.array([first]), np.array([last]))
                for row, value in zip(group.rows.tolist(), values[:, 0].tolist(), strict=True):
                    self._held[row] = value
            if end_ns - int(shared.t_wall_ns[last]) <= STALE_NS:
                for row in group.rows.tolist():
                    now[row] = self._held[row]
            newest.add(last if shared.kept is None else int(shared.kept[last]))
        return newest

    def _detect_clock_step(self, source: SourceKind, wall: int, mono: int) -> None:
        """Flag the bins between two readings of a source if the wall clock stepped between them."""
        before = self._newest.get(source)
        if before is None or mono >= before[1]:
            self._newest[source] = wall, mono
        if before is not None and abs((wall - before[0]) - (mono - before[1])) > MIN_CLOCK_STEP_NS:
            self._flag_bins(min(wall, before[0]), max(wall, before[0]), FLAG_CLOCK_STEP)

    def _flag_bins(self, low_ns: int, high_ns: int, flag: int) -> None:
        first = max((low_ns - self.t0_ns) // BIN_NS, self._next - FLAG_HISTORY_BINS, 0)
        last = min((high_ns - self.t0_ns) // BIN_NS, first + MAX_FLAGGED_BINS)
        for number in range(first, last + 1):
            self._flags[number] = self._flags.get(number, 0) | flag


def _row_sort_key(row: tuple[int | float | None, ...]) -> tuple[int, int]:
    return int(row[0] or 0), int(row[2] or 0)


def _build_source_rows(source: SourceKind, rows: Sequence[tuple[int | float | None, ...]]) -> SourceRows:
    """Convert rows to columns; null becomes 0 and is not present."""
    specs = list_raw_fields(source)
    wall, mono, seq, *values = zip(*rows, strict=True)
    if len(values) != len(specs):
        raise ValueError(f"a {source} row has {len(values)} values, not {len(specs)}")
    present = np.array([[value is not None for value in column] for column in values], np.bool_).T
    return SourceRows(
        source=source,
        fields=tuple(spec.field for spec in specs),
        t_wall_ns=np.array(wall, np.int64),
        t_mono_ns=np.array(mono, np.int64),
        seq=np.array(seq, np.int64),
        columns=tuple(_build_column(column, spec.type == "float") for column, spec in zip(values, specs, strict=True)),
        present=present,
    )


def _build_column(values: Sequence[int | float | None], is_float: bool) -> NumericArray:
    known = [value or 0 for value in values]
    return np.array(known, np.float64) if is_float else np.array(known, np.int64)
