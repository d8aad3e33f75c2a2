"""Labels of imported episodes: phases of rows, of whole episodes, or from a file of time ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from phasewatch.errors import DataError
from phasewatch.importing.builder import PhaseSpan
from phasewatch.importing.clocks import parse_iso8601
from phasewatch.importing.numbers import parse_number
from phasewatch.importing.problems import ImportCode, ImportRefusal
from phasewatch.importing.readers import RowFormat, SourceFile, bind_column, iter_table
from phasewatch.types import Phase

__all__ = ["LabelMode", "LabelRange", "find_spans", "parse_phase", "read_ranges"]

_MAX_RANGES = 100_000
_COLUMNS = ("start", "end", "phase")


class LabelMode(StrEnum):
    """Which labels are kept."""

    PROVEN = "proven"  # those with evidence; others become unknown
    TOLD = "told"  # all, as the source has them


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRange:
    """A time in which a phase holds, of one host and episode; an empty name stands for all."""

    host: str
    episode: str
    start_ns: int
    end_ns: int
    phase: Phase
    line: int


def parse_phase(word: str) -> Phase:
    """Return the phase of a word.

    Raises:
        ImportRefusal: If it is none.
    """
    try:
        return Phase(word)
    except ValueError:
        words = f"{word[:40]!r} is no phase; map it to one of {', '.join(Phase)}"
        raise ImportRefusal(ImportCode.LABEL, words) from None


def read_ranges(path: Path, values: tuple[tuple[str, str], ...]) -> tuple[LabelRange, ...]:
    """Read a CSV file of time ranges.

    Args:
        path: The file.
        values: Words of the file with the phases that they become.

    Raises:
        DataError: If it is malformed; the message names the line.
    """
    try:
        status = path.stat()
    except OSError as exc:
        raise DataError(f"{path}: {exc.strerror}; `labels.file` of the map names a file below the source") from None
    return _read_ranges_cached(path, values, (status.st_mtime_ns, status.st_size, status.st_ino))


@lru_cache(maxsize=2)
def _read_ranges_cached(
    path: Path, values: tuple[tuple[str, str], ...], version: tuple[int, int, int]
) -> tuple[LabelRange, ...]:
    file, renamed, ranges = SourceFile(relative=path.name, path=path), dict(values), []
    try:
        for line, row, columns in iter_table(file, RowFormat(kind="csv")):
            getters = {name: bind_column(name, columns) for name in (*_COLUMNS, "host", "episode")}
            if missing := [name for name in _COLUMNS if getters[name] is None]:
                raise ImportRefusal(ImportCode.COLUMN_MISSING, f"no column {missing[0]!r}", file=path.name, line=1)
            cells = {name: getter(row).strip() if getter else "" for name, getter in getters.items()}
            try:
                found = LabelRange(
                    host=cells["host"].lower(),
                    episode=cells["episode"],
                    start_ns=_parse_time(cells["start"]),
                    end_ns=_parse_time(cells["end"]),
                    phase=parse_phase(renamed.get(cells["phase"], cells["phase"])),
                    line=line,
                )
                if found.end_ns <= found.start_ns:
                    raise ImportRefusal(ImportCode.LABEL, "the end is not after the start")
            except ImportRefusal as bad:
                bad.file, bad.line = path.name, line
                raise
            ranges.append(found)
            if len(ranges) > _MAX_RANGES:
                raise ImportRefusal(ImportCode.TOO_MANY, f"more than {_MAX_RANGES:,} ranges", file=path.name, line=line)
    except ImportRefusal as bad:
        raise DataError(f"{path}:{bad.line}: {bad.code}: {bad.words}") from None
    return tuple(ranges)


def _parse_time(text: str) -> int:
    if text.isdecimal():
        return int(parse_number(text, "a time") * 10**9)
    return parse_iso8601(text)


def find_spans(ranges: Sequence[LabelRange], host: str, episode: str) -> list[PhaseSpan]:
    """Return the phases of one episode from the ranges that name it; unknown in between.

    Raises:
        ImportRefusal: If two ranges overlap.
    """
    own = [r for r in ranges if r.host in ("", host) and r.episode in ("", episode)]
    own.sort(key=lambda r: (r.start_ns, r.end_ns))
    spans: list[PhaseSpan] = []
    for i, each in enumerate(own):
        if i and each.start_ns < own[i - 1].end_ns:
            words = f"the time ranges of lines {own[i - 1].line} and {each.line} overlap"
            raise ImportRefusal(ImportCode.LABEL, words)
        if spans and spans[-1][0] == each.start_ns:
            spans.pop()
        spans += [(each.start_ns, each.phase), (each.end_ns, Phase.UNKNOWN)]
    return spans
