"""Look at a source before it is imported: keys, types, ranges, rates, clocks, and what a map makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from phasewatch.channels import CHANNELS
from phasewatch.importing.cis490 import list_field_plans
from phasewatch.importing.cis490_store import iter_episode_lines, list_inputs, read_members
from phasewatch.importing.clocks import build_clock
from phasewatch.importing.mapping import MapPlan, TablePlan
from phasewatch.importing.numbers import parse_number
from phasewatch.importing.problems import ImportRefusal
from phasewatch.importing.readers import RowFormat, SourceFile, iter_table
from phasewatch.importing.table import group_files
from phasewatch.types import SourceKind

__all__ = ["ColumnStats", "FileKind", "SourceReport", "inspect_cis490", "inspect_tables"]

MAX_FILES, MAX_ROWS, MAX_COLUMNS = 20, 20_000, 500  # read of each kind of file
_MAX_DEPTH = 4
_CIS490_SOURCES = {
    "telemetry-proc.jsonl": SourceKind.PROC,
    "telemetry-qmp.jsonl": SourceKind.QMP,
    "netflow.jsonl": SourceKind.NETFLOW,
    "telemetry-guest.jsonl": SourceKind.GUEST,
}


@dataclass(slots=True, kw_only=True)
class ColumnStats:
    """What was seen in one column.

    Attributes:
        types: Number of values by type: ``whole``, ``fraction``, ``text``, ``bool``, ``list``, ``null``.
        minimum, maximum: Of the numbers; None without one.
        falls: Number of numbers below the one before in their file.
        becomes: Raw field with its kind and unit, ``clock``, ``label`` …, empty if the column is not used.
    """

    name: str
    types: dict[str, int] = field(default_factory=dict)
    minimum: float | None = None
    maximum: float | None = None
    falls: int = 0
    becomes: str = ""
    last: Any = field(default=None, repr=False)

    def add(self, value: Any) -> None:
        """Count one value."""
        kind, number = _classify(value)
        self.types[kind] = self.types.get(kind, 0) + 1
        if number is None:
            return
        self.falls += self.last is not None and number < self.last
        self.last = number
        self.minimum = float(number) if self.minimum is None else min(self.minimum, float(number))
        self.maximum = float(number) if self.maximum is None else max(self.maximum, float(number))


@dataclass(slots=True, kw_only=True)
class FileKind:
    """Files of one form.

    Attributes:
        name: Pattern of the map, or name of the file.
        files, files_read, rows_read: Counts; reading stops at limits.
        source: Source of telemetry that they belong to; empty without a map.
        hz: Median rows per second of a file by the clock of the map; None without one.
        steps_back: Rows that are earlier than the one before, in the order of the file.
        columns: The columns.
        problems: First problem of each code.
    """

    name: str
    files: int = 0
    files_read: int = 0
    rows_read: int = 0
    source: str = ""
    hz: float | None = None
    steps_back: int = 0
    columns: dict[str, ColumnStats] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def add_problem(self, bad: ImportRefusal) -> None:
        """Remember the first problem of a code."""
        if bad.code not in self.problems:
            self.problems[bad.code] = f"{bad.file}:{bad.line}: {bad.words}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReport:
    """What an import of a source would do.

    Attributes:
        inputs: Groups of files, or episodes.
        kinds: The kinds of files.
        unmatched: Files that no pattern matches.
        left_out: Optional rules whose raw field is not declared.
        channels: Channels that the mapped fields would give.
    """

    inputs: int
    kinds: tuple[FileKind, ...]
    unmatched: tuple[str, ...]
    left_out: tuple[str, ...]
    channels: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        made = asdict(self)
        for kind in made["kinds"]:
            for column in kind["columns"].values():
                column.pop("last")
        return made


def _classify(value: Any) -> tuple[str, Any]:
    """Return the type of a value, and the number that it holds, if any."""
    if value is None or value == "":
        return "null", None
    if isinstance(value, bool):
        return "bool", None
    if isinstance(value, list | dict):
        return "list", None
    try:
        number = parse_number(value, "")
    except ImportRefusal:
        return "text", None
    return ("whole" if isinstance(number, int) and not isinstance(value, Decimal) else "fraction"), number


def _flatten(row: Any, columns: tuple[str, ...], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the columns of a row; nested objects by names with dots."""
    if columns:
        yield from zip(columns, row, strict=True)
        return
    for key, value in row.items():
        if isinstance(value, dict) and depth < _MAX_DEPTH:
            yield from _flatten(value, (), f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _add_row(kind: FileKind, row: Any, columns: tuple[str, ...]) -> None:
    kind.rows_read += 1
    for name, value in _flatten(row, columns):
        stats = kind.columns.get(name)
        if stats is None:
            if len(kind.columns) >= MAX_COLUMNS:
                continue
            stats = kind.columns[name] = ColumnStats(name=name)
        stats.add(value)


def _end_file(kind: FileKind, stamps: Sequence[int], rates: list[float]) -> None:
    kind.files_read += 1
    for stats in kind.columns.values():
        stats.last = None
    kind.steps_back += sum(b < a for a, b in pairwise(stamps))
    if len(stamps) > 1 and max(stamps) > min(stamps):
        rates.append((len(stamps) - 1) / ((max(stamps) - min(stamps)) / 1e9))
        kind.hz = round(sorted(rates)[len(rates) // 2], 3)


def inspect_tables(files: Sequence[SourceFile], plan: MapPlan | None) -> SourceReport:
    """Read the beginnings of tables and tell what is in them; without a map, every CSV and JSON-lines file."""
    if plan is None:
        return _inspect_unmapped(files)
    groups, unmatched = group_files(plan, files)
    kinds = [FileKind(name=t.rule.files, source=t.rule.source) for t in plan.tables]
    rates: list[list[float]] = [[] for _ in plan.tables]
    for group in groups:
        for number, file in group.files:
            table, kind = plan.tables[number], kinds[number]
            kind.files += 1
            if kind.files <= MAX_FILES:
                _inspect_file(kind, file, table, plan, group.names, rates[number])
    for table, kind in zip(plan.tables, kinds, strict=True):
        _mark_columns(kind, table, plan)
    read = {(t.rule.source, spec.field) for t in plan.tables for spec in t.specs}
    return SourceReport(
        inputs=len(groups),
        kinds=tuple(kinds),
        unmatched=tuple(f.relative for f in unmatched),
        left_out=plan.left_out,
        channels=_list_channels(read),
    )


def _list_channels(read: Iterable[tuple[SourceKind, str]]) -> tuple[str, ...]:
    fields = set(read)
    return tuple(c.full_name for c in CHANNELS if all((c.source, f) in fields for f in c.fields))


def _inspect_file(
    kind: FileKind, file: SourceFile, table: TablePlan, plan: MapPlan, names: dict[str, str] | Any, rates: list[float]
) -> None:
    rule, stamps = table.rule, []
    clock: Any = None
    form = RowFormat(kind=rule.format, columns=rule.columns, delimiter=rule.delimiter)
    try:
        for count, (line, row, columns) in enumerate(iter_table(file, form)):
            if count >= MAX_ROWS:
                break
            _add_row(kind, row, columns)
            try:
                clock = clock or build_clock(rule.clock, plan.rules.facts, columns, names)
                stamps.append(clock(row))
            except ImportRefusal as bad:
                bad.file, bad.line = file.relative, line
                kind.add_problem(bad)
    except ImportRefusal as bad:
        kind.add_problem(bad)
    _end_file(kind, stamps, rates)


def _mark_columns(kind: FileKind, table: TablePlan, plan: MapPlan) -> None:
    """Note what becomes of each column; a needed column that was not seen is a problem."""
    uses: dict[str, list[str]] = {}
    for column, unit in table.rule.clock.list_columns():
        uses.setdefault(column, []).append(f"clock ({table.rule.clock.kind} {unit})".replace(" )", ")"))
    for f in table.fields:
        uses.setdefault(f.column, []).append(f"{f.spec.source}.{f.spec.field} ({f.kind})")
    if table.accesses is not None:
        outputs = ", ".join(f"{s.source}.{s.field}" for s in table.accesses.outputs.values())
        uses.setdefault(table.accesses.address, []).append("address of an access")
        uses.setdefault(table.accesses.size, []).append(f"size of an access: {outputs}")
        for f in table.accesses.sums:
            uses.setdefault(f.column, []).append(f"{f.spec.source}.{f.spec.field} (sum)")
    episode = plan.rules.episode
    texts = {name: getattr(episode, name) for name in ("host", "key", "profile", "sample", "kind")}
    texts["phase"] = plan.rules.labels.phase if plan.rules.labels else None
    for name, rule in texts.items():
        if rule is not None and rule.column:
            uses.setdefault(rule.column, []).append(name)
    for column, what in uses.items():
        stats = kind.columns.get(column)
        if stats is not None:
            stats.becomes = ", ".join(what)
        elif kind.rows_read and not any(name.startswith(f"{column}.") for name in kind.columns):
            kind.problems.setdefault(f"column-missing {column}", f"no column {column!r} for {', '.join(what)}")


def _inspect_unmapped(files: Sequence[SourceFile]) -> SourceReport:
    kinds: dict[str, FileKind] = {}
    unmatched = []
    for file in files:
        name = PurePosixPath(file.relative).name
        plain = name.removesuffix(".gz").removesuffix(".zst")
        form = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}.get(PurePosixPath(plain).suffix)
        if form is None or (plain not in kinds and len(kinds) >= MAX_FILES):
            unmatched.append(file.relative)
            continue
        kind = kinds.setdefault(plain, FileKind(name=plain))
        kind.files += 1
        if kind.files > MAX_FILES:
            continue
        try:
            for count, (_, row, columns) in enumerate(iter_table(file, RowFormat(kind=form))):
                if count >= MAX_ROWS:
                    break
                _add_row(kind, row, columns)
        except ImportRefusal as bad:
            kind.add_problem(bad)
        _end_file(kind, (), [])
    return SourceReport(inputs=0, kinds=tuple(kinds.values()), unmatched=tuple(unmatched), left_out=(), channels=())


def inspect_cis490(files: Sequence[SourceFile], plan: MapPlan) -> SourceReport:
    """Read twenty episodes of each host of a CIS490 store and tell what is in their telemetry."""
    inputs, rest = list_inputs(files)
    by_host: Counter[str] = Counter()
    kinds = {
        name: FileKind(name=name, source=_CIS490_SOURCES.get(name, ""))
        for name in (*_CIS490_SOURCES, "labels.jsonl", "events.jsonl")
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for each in inputs:
        by_host[each.host] += 1
        if by_host[each.host] > MAX_FILES:
            continue
        try:
            members = read_members(each)
        except ImportRefusal as bad:
            kinds["labels.jsonl"].add_problem(bad)
            continue
        for name, kind in kinds.items():
            stamps: list[int] = []
            kind.files += name in members
            try:
                for _, row in iter_episode_lines(members, name, each.name):
                    _add_row(kind, row, ())
                    if type(stamp := row.get("t_mono_ns")) is int:
                        stamps.append(stamp)
            except ImportRefusal as bad:
                kind.add_problem(bad)
            _end_file(kind, stamps, rates[name])
    read: set[tuple[SourceKind, str]] = set()
    for name, source in _CIS490_SOURCES.items():
        for f in list_field_plans(plan, source, name):
            stats = kinds[name].columns.get(f.column)
            if stats is not None and (source, f.spec.field) not in read and set(stats.types) != {"null"}:
                stats.becomes = f"{source}.{f.spec.field} ({f.kind})"
                read.add((source, f.spec.field))
    for kind in kinds.values():
        for column, what in (("t_wall_ns", "clock (Unix ns)"), ("t_mono_ns", "clock"), ("phase", "label")):
            if column in kind.columns:
                kind.columns[column].becomes = what
    return SourceReport(
        inputs=len(inputs),
        kinds=tuple(kinds.values()),
        unmatched=tuple(f.relative for f in rest),
        left_out=plan.left_out,
        channels=_list_channels(read),
    )
