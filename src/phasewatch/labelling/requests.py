"""Parse labels from the command line and from CSV files: bundle, time range, phase, who, when and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from phasewatch.bundle.limits import MAX_STAMP_NS, MAX_STRING_CHARS, MIN_STAMP_NS
from phasewatch.errors import DataError, escape_unprintable, suggest_names
from phasewatch.importing.clocks import parse_iso8601
from phasewatch.importing.problems import ImportRefusal
from phasewatch.importing.readers import RowFormat, SourceFile, bind_column, iter_table
from phasewatch.types import PHASES, Phase

__all__ = [
    "EDGE_TOLERANCE_NS",
    "LabelDefaults",
    "LabelRequest",
    "LabelTime",
    "parse_label_phase",
    "parse_label_text",
    "parse_label_time",
    "parse_label_when",
    "read_label_file",
    "resolve_label_time",
]

EDGE_TOLERANCE_NS = 1_000_000  # durations are printed to the millisecond
_MAX_REQUESTS = 100_000
_SECONDS = re.compile(r"\d{1,10}(\.\d{1,12})?")
_NEEDED_COLUMNS = ("bundle", "start", "end", "phase", "why")
_COLUMNS = (*_NEEDED_COLUMNS, "who", "when")
_TIME_HELP = "expected seconds since the bundle's start, such as 90.5, or a UTC time such as 2026-12-01T10:00:00Z"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelTime:
    """A time as it was given: seconds since the start of the bundle, or Unix time; both in ns."""

    ns: int
    is_relative: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelDefaults:
    """Who labels and when, for the rows of a file that do not say it."""

    by: str
    when_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRequest:
    """A label as it was asked for.

    Attributes:
        bundle: Name of the bundle; empty for all that the command selects.
        start, end: The range; None for the start or the end of the bundle.
        by: Who labels.
        when_ns: When, in Unix ns.
        why: How that person knows.
        where: Where it was asked for, such as ``labels.csv:3``, for errors.
    """

    bundle: str
    start: LabelTime | None
    end: LabelTime | None
    phase: Phase
    by: str
    when_ns: int
    why: str
    where: str


def parse_label_phase(text: str, *, where: str) -> Phase:
    """Parse the phase of a label.

    Raises:
        DataError: If it is not one of the five known phases.
    """
    if text in PHASES:
        return Phase(text)
    if text == Phase.UNKNOWN:
        raise DataError(f"{where}: phase: time without a label is unknown anyway; leave the row out")
    raise DataError(f"{where}: phase: {text[:40]!r} is no phase; {suggest_names(text[:40], PHASES)}")


def parse_label_text(text: str, key: str, *, where: str) -> str:
    """Check who labelled, or why: a manifest holds short printable ASCII texts.

    Raises:
        DataError: If the text is empty, too long or not printable ASCII.
    """
    text = text.strip()
    if not text:
        raise DataError(f"{where}: {key}: it is empty; a label needs who gave it and why")
    if len(text) > MAX_STRING_CHARS or not (text.isascii() and text.isprintable()):
        words = f"expected at most {MAX_STRING_CHARS} printable ASCII characters; shorten or transliterate it"
        raise DataError(f"{where}: {key}: {escape_unprintable(text[:40])!r}: {words}")
    return text


def parse_label_time(text: str, key: str, *, where: str) -> LabelTime | None:
    """Parse the start or the end of a label; None for an empty text.

    Raises:
        DataError: If it is neither seconds nor an ISO 8601 time.
    """
    text = text.strip()
    if not text:
        return None
    if _SECONDS.fullmatch(text):
        return LabelTime(ns=int(Decimal(text) * 10**9), is_relative=True)
    return LabelTime(ns=_parse_wall(text, key, where=where, expected=_TIME_HELP), is_relative=False)


def parse_label_when(text: str, *, where: str) -> int:
    """Parse the time of labelling into Unix ns.

    Raises:
        DataError: If it is not an ISO 8601 time.
    """
    return _parse_wall(text, "when", where=where, expected="expected a UTC time such as 2026-12-01T10:00:00Z")


def _parse_wall(text: str, key: str, *, where: str, expected: str) -> int:
    try:
        stamp_ns = parse_iso8601(text, "UTC")
    except ImportRefusal:
        stamp_ns = 0
    if not MIN_STAMP_NS <= stamp_ns <= MAX_STAMP_NS:
        raise DataError(f"{where}: {key}: {escape_unprintable(text[:40])!r} is no time; {expected}")
    return stamp_ns


def resolve_label_time(time: LabelTime, t0_ns: int) -> int:
    """Return the Unix time (ns) of a label's start or end in a bundle that starts at `t0_ns`."""
    return t0_ns + time.ns if time.is_relative else time.ns


def read_label_file(path: Path, defaults: LabelDefaults) -> tuple[LabelRequest, ...]:
    """Read labels from a CSV file with the columns bundle, start, end, phase, why, and optionally who and when.

    Raises:
        DataError: At the first wrong row; the message names file, line and column.
    """
    requests: list[LabelRequest] = []
    try:
        for line, cells, columns in iter_table(SourceFile(relative=path.name, path=path), RowFormat(kind="csv")):
            if not requests:
                _check_columns(columns, path)
                getters = {name: bind_column(name, columns) for name in _COLUMNS}
            if len(requests) >= _MAX_REQUESTS:
                raise DataError(f"{path}:{line}: more than {_MAX_REQUESTS:,} rows; split the file")
            row = {name: getter(cells).strip() if getter else "" for name, getter in getters.items()}
            requests.append(_parse_row(row, defaults, where=f"{path}:{line}"))
    except ImportRefusal as bad:
        place = f"{path}:{bad.line}" if bad.line else str(path)
        raise DataError(f"{place}: {bad.words}; expected CSV with the columns {', '.join(_COLUMNS)}") from None
    if not requests:
        raise DataError(f"{path}: there is no row; expected CSV with the columns {', '.join(_COLUMNS)}")
    return tuple(requests)


def _check_columns(columns: tuple[str, ...], path: Path) -> None:
    for name in columns:
        if name not in _COLUMNS:
            raise DataError(
                f"{path}:1: unknown column {escape_unprintable(name[:40])!r}; {suggest_names(name, _COLUMNS)}"
            )
    for name in _NEEDED_COLUMNS:
        if name not in columns:
            raise DataError(f"{path}:1: no column {name!r}; expected {', '.join(_NEEDED_COLUMNS)}, and who and when")


def _parse_row(row: dict[str, str], defaults: LabelDefaults, *, where: str) -> LabelRequest:
    if not row["bundle"]:
        raise DataError(f"{where}: bundle: it is empty; name an episode id, or <host_id>/<episode_id>")

    return LabelRequest(
        bundle=row["bundle"],
        start=parse_label_time(row["start"], "start", where=where),
        end=parse_label_time(row["end"], "end", where=where),
        phase=parse_label_phase(row["phase"], where=where),
        by=parse_label_text(row["who"] or defaults.by, "who", where=where),
        when_ns=parse_label_when(row["when"], where=where) if row["when"] else defaults.when_ns,
        why=parse_label_text(row["why"], "why", where=where),
        where=where,
    )
