"""Parse the times of imported rows into Unix nanoseconds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from typing import Any, Literal

import msgspec

from phasewatch.bundle import limits
from phasewatch.errors import DataError
from phasewatch.importing.numbers import parse_number
from phasewatch.importing.problems import ImportCode, ImportRefusal
from phasewatch.importing.readers import bind_column
from phasewatch.importing.units import UnitFacts, compute_factor

__all__ = ["AnchorRule", "ClockRule", "build_clock", "check_clock", "parse_iso8601"]

_ZONE = re.compile(r"UTC|[+-]([01][0-9]|2[0-3]):[0-5][0-9]")
_ISO = re.compile(
    r"(\d{4}-\d{2}-\d{2})[T ](\d{2}:\d{2}:\d{2})(?:[.,](\d{1,12}))?\s?(Z|[+-]\d{2}:?\d{2})?", re.IGNORECASE | re.ASCII
)
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)  # noqa: UP017
_MAX_SECOND_NS = 2 * 10**9


class AnchorRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The Unix time of zero of a relative clock, as a constant or in a part of the path.

    Attributes:
        text, path: The constant, or the name of the part.
        format: How it is written, as in `datetime.strptime`; ISO 8601 without it.
        zone: Offset such as ``+09:00``, or ``UTC``, if the text has none.
    """

    text: str = ""
    path: str = ""
    format: str = ""
    zone: str = ""


class ClockRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a row is stamped.

    Attributes:
        kind: ``unix`` or ``relative`` (numbers), or ``iso8601`` (text).
        column: The column.
        unit: Its unit: ``s``, ``ms``, ``us``, ``ns`` or ``ticks``; none for ``iso8601``.
        parts: Instead of both, columns that are added up, each with its unit.
        zone: Offset of ISO 8601 times that have none.
        anchor: For ``relative``: the time of zero.
    """

    kind: Literal["unix", "relative", "iso8601"]
    column: str = ""
    unit: str = ""
    parts: tuple[tuple[str, str], ...] = ()
    zone: str = ""
    anchor: AnchorRule | None = None

    def list_columns(self) -> tuple[tuple[str, str], ...]:
        """Return the columns with their units."""
        return self.parts or ((self.column, self.unit),)


def check_clock(rule: ClockRule, facts: UnitFacts, *, where: str) -> None:
    """Check a clock of a map.

    Raises:
        DataError: If a column, unit, zone or anchor is missing or wrong.
    """
    if bool(rule.column) == bool(rule.parts) or len(rule.parts) > 4:
        raise DataError(f"{where}: clock needs either `column` or one to four `parts`")
    for zone in (rule.zone, rule.anchor.zone if rule.anchor else ""):
        if zone and not _ZONE.fullmatch(zone):
            raise DataError(f"{where}: clock: zone {zone[:20]!r}; expected UTC or an offset such as +09:00")
    if rule.kind == "iso8601":
        if rule.parts or rule.unit:
            raise DataError(f"{where}: clock of ISO 8601 has one column and no unit")
    else:
        for column, unit in rule.list_columns():
            try:
                compute_factor(unit, "ns", facts=facts)
            except DataError as exc:
                raise DataError(f"{where}: clock column {column!r}: {exc}") from None
    if (rule.kind == "relative") != (rule.anchor is not None):
        raise DataError(f"{where}: clock: a relative clock, and no other, needs `anchor`, the time of its zero")
    if rule.anchor is not None and bool(rule.anchor.text) == bool(rule.anchor.path):
        raise DataError(f"{where}: clock.anchor needs either `text` or `path`")


def build_clock(
    rule: ClockRule, facts: UnitFacts, columns: tuple[str, ...], names: Mapping[str, str]
) -> Callable[[Any], int]:
    """Return a function from a row to its Unix time in ns.

    Args:
        rule: The clock of the map.
        facts: Sizes of ticks.
        columns: Columns of the file; empty for JSON.
        names: Named parts of the path.

    Raises:
        ImportRefusal: If a column does not exist, or the anchor cannot be parsed; the function raises it, too, for a
            time that cannot be parsed.
    """
    getters = []
    for column, unit in rule.list_columns():
        getter = bind_column(column, columns)
        if getter is None:
            raise ImportRefusal(ImportCode.COLUMN_MISSING, f"no column {column!r}, which the clock needs")
        factor = compute_factor(unit, "ns", facts=facts) if rule.kind != "iso8601" else Fraction(1)
        whole = factor.numerator if factor.denominator == 1 else factor
        getters.append((column, getter, whole))
    zero_ns = _parse_anchor(rule.anchor, names) if rule.anchor is not None else 0

    def read_text(row: Any) -> int:
        column, getter, _ = getters[0]
        value = getter(row)
        if not isinstance(value, str):
            raise ImportRefusal(ImportCode.CLOCK, f"{column} is no text; expected an ISO 8601 time")
        return _check_stamp(parse_iso8601(value, rule.zone), column)

    def read_numbers(row: Any) -> int:
        total: int | Fraction = zero_ns
        for column, getter, factor in getters:
            value = getter(row)
            if value is None or value == "":
                raise ImportRefusal(ImportCode.CLOCK, f"{column} is empty; each row needs a time")
            total += parse_number(value, column) * factor
        return _check_stamp(total if type(total) is int else math.floor(total), getters[0][0])

    return read_text if rule.kind == "iso8601" else read_numbers


def _check_stamp(stamp_ns: int, column: str) -> int:
    if not limits.MIN_STAMP_NS <= stamp_ns <= limits.MAX_STAMP_NS:
        words = f"{column}: {str(stamp_ns)[:24]} ns is not in the years 2006 to 2116; check unit and kind of the clock"
        raise ImportRefusal(ImportCode.CLOCK, words)
    return stamp_ns


def parse_iso8601(text: str, zone: str = "") -> int:
    """Parse an ISO 8601 time into Unix ns.

    Raises:
        ImportRefusal: If it is malformed, or has no offset and none is stated.
    """
    found = _ISO.fullmatch(text.strip())
    if found is None:
        raise ImportRefusal(ImportCode.CLOCK, f"{text[:40]!r} is no ISO 8601 time")
    day, time, fraction, offset = found.groups()
    try:
        moment = datetime.strptime(f"{day} {time}", "%Y-%m-%d %H:%M:%S")
    except ValueError:
        raise ImportRefusal(ImportCode.CLOCK, f"{text[:40]!r} is no time") from None
    seconds = _count_seconds(moment, offset or zone, text)
    return seconds * 10**9 + int((fraction or "0").ljust(9, "0")[:9])


def _count_seconds(moment: datetime, offset: str, text: str) -> int:
    if not offset:
        raise ImportRefusal(ImportCode.CLOCK, f"{text[:40]!r} has no offset from UTC; state `zone` in the map")
    if offset.upper() in ("Z", "UTC"):
        shift = timedelta(0)
    else:
        hours, minutes = int(offset[1:3]), int(offset[-2:])
        shift = timedelta(hours=hours, minutes=minutes) * (-1 if offset[0] == "-" else 1)
    delta = moment.replace(tzinfo=timezone.utc) - shift - _EPOCH  # noqa: UP017
    return delta.days * 86_400 + delta.seconds


def _parse_anchor(rule: AnchorRule, names: Mapping[str, str]) -> int:
    text = rule.text or names.get(rule.path, "")
    if not rule.format:
        return parse_iso8601(text, rule.zone)
    try:
        moment = datetime.strptime(text, rule.format)
    except ValueError:
        raise ImportRefusal(ImportCode.CLOCK, f"the anchor {text[:40]!r} is not written as {rule.format!r}") from None
    if moment.tzinfo is not None:
        delta = moment - _EPOCH
        return delta.days * 86_400 * 10**9 + delta.seconds * 10**9
    return _count_seconds(moment, rule.zone, text) * 10**9
