"""Import tables by a map: read their files side by side in the order of time, and cut episodes into bundles."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phasewatch.importing.accesses import AccessCounter
from phasewatch.importing.builder import EpisodeFacts, FieldColumns, PackedEpisode, PhaseSpan, pack_episode
from phasewatch.importing.clocks import build_clock
from phasewatch.importing.labels import LabelMode, LabelRange, find_spans, parse_phase, read_ranges
from phasewatch.importing.mapping import FieldPlan, MapPlan, TablePlan, TextRule
from phasewatch.importing.numbers import Number, convert_number, parse_number
from phasewatch.importing.problems import ImportCode, ImportRefusal
from phasewatch.importing.readers import RowFormat, SourceFile, bind_column, iter_table
from phasewatch.types import BENIGN_PROFILE, BIN_NS, HOST_ID_PATTERN, SampleKind, SourceKind

__all__ = ["MAX_FILES_AT_A_TIME", "TableGroup", "TableImport", "group_files"]

MAX_PART_NS = 1_800 * 10**9
MAX_PART_ROWS = 18_000
MAX_ROW_GAP_NS = 60 * 10**9  # a longer time without rows ends a part
MAX_ACCESS_GAP_NS = 600 * 10**9  # an access list without lines is a disk at rest
MAX_OPEN_CELLS = 16_000_000  # values that wait for the end of their parts, of all episodes together
MAX_REORDERED_ROWS = 1_000_000
MAX_FILES_AT_A_TIME = 400
_MAX_NAME = 120

_EpisodeName = tuple[str, str]  # host as it is written, key


@dataclass(frozen=True, slots=True, kw_only=True)
class TableGroup:
    """The files that are read together, because the names in their paths are equal.

    Attributes:
        name: The names in the path, as ``host=a,run=7``; ``all files`` without names.
        names: The same by name.
        files: Number of the table in the map, and the file.
    """

    name: str
    names: Mapping[str, str]
    files: tuple[tuple[int, SourceFile], ...]


def group_files(plan: MapPlan, files: Sequence[SourceFile]) -> tuple[list[TableGroup], list[SourceFile]]:
    """Group files by the names in their paths.

    Returns:
        The groups by name, and the files that match no pattern.
    """
    groups: dict[str, tuple[dict[str, str], list[tuple[int, SourceFile]]]] = {}
    unmatched = []
    for file in sorted(files, key=lambda f: f.relative):
        for number, table in enumerate(plan.tables):
            names = table.pattern.match(file.relative)
            if names is not None:
                key = ",".join(f"{k}={v}" for k, v in sorted(names.items())) or "all files"
                groups.setdefault(key, (names, []))[1].append((number, file))
                break
        else:
            unmatched.append(file)
    return [TableGroup(name=n, names=g[0], files=tuple(g[1])) for n, g in sorted(groups.items())], unmatched


class _FieldReader:
    """Converts one column of one episode: counters as they are, rates and increments summed up exactly."""

    def __init__(self, plan: FieldPlan) -> None:
        self._plan = plan
        self._is_float = plan.spec.type == "float"
        self._is_plain = plan.kind in ("counter", "gauge", "tick")
        self._total: Number = 0
        self._last_ns: int | None = None
        self._has_gap = False

    def convert(self, stamp_ns: int, value: Number | None) -> int | float | None:
        """Return the raw field of a row; None without a reading."""
        plan = self._plan
        if value is None:
            self._has_gap = True
            return None
        if self._is_plain:
            made: Number = value if plan.factor == 1 else value * plan.factor
        else:
            if plan.kind == "increment":  # an increment that is missing is unknown: the total starts again
                is_known = self._last_ns is not None and not self._has_gap
                self._total = self._total + value * plan.factor if is_known else 0
            elif self._last_ns is not None:
                self._total += value * plan.factor * (stamp_ns - self._last_ns) / 10**9
            made = self._total
        self._last_ns, self._has_gap = stamp_ns, False
        return convert_number(made, is_float=self._is_float, column=plan.column)


@dataclass(slots=True, kw_only=True)
class _OpenTable:
    """One table of one open episode."""

    plan: TablePlan
    columns: FieldColumns
    readers: list[_FieldReader] = field(default_factory=list)
    counter: AccessCounter | None = None
    tick_ns: int = 0  # end of the last half second of an access list that was written


@dataclass(slots=True, kw_only=True)
class _OpenEpisode:
    """An episode whose present part is not finished."""

    host_id: str
    texts: dict[str, str]
    ranges: list[PhaseSpan] | None
    tables: dict[int, _OpenTable] = field(default_factory=dict)
    spans: list[PhaseSpan] = field(default_factory=list)
    start_ns: int = 0
    last_ns: int = 0
    cells: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _BoundFile:
    """The getters of one file, for its columns."""

    relative: str
    table: int
    values: tuple[tuple[str, Callable[[Any], Any] | None], ...]
    texts: Mapping[str, Callable[[Any], Any] | None]
    null: frozenset[str]

    def read_number(self, row: Any, place: int) -> Number | None:
        """Return a value of a row as a number; None without a reading."""
        column, getter = self.values[place]
        value = getter(row) if getter is not None else None
        if value is None or (isinstance(value, str) and (not value.strip() or value.strip() in self.null)):
            return None
        return parse_number(value, column)


_Event = tuple[int, int, int, int, _BoundFile, Any]  # time, number of the file, order, line, getters, row


class TableImport:
    """Imports one group of files.

    Args:
        plan: The map.
        root: The source folder.
        group: The files.
        mode: Which labels are kept.
        emit: Receives each finished part.
        refuse: Receives each refused episode: its name and why.
    """

    def __init__(
        self,
        plan: MapPlan,
        root: Path,
        group: TableGroup,
        *,
        mode: LabelMode,
        emit: Callable[[str, PackedEpisode], None],
        refuse: Callable[[str, ImportRefusal], None],
    ) -> None:
        self._plan, self._group, self._mode = plan, group, mode
        self._emit, self._refuse = emit, refuse
        self.skipped: list[int] = []
        self._open: OrderedDict[_EpisodeName, _OpenEpisode] = OrderedDict()
        self._refused: set[_EpisodeName] = set()
        self._cells = 0
        labels = plan.rules.labels
        self._keeps_labels = labels is not None and (bool(labels.evidence) or mode is LabelMode.TOLD)
        self._ranges: tuple[LabelRange, ...] | None = None
        if labels is not None and labels.file and self._keeps_labels:
            base = root if root.is_dir() else root.parent
            self._ranges = read_ranges(base / labels.file, tuple(sorted(labels.values.items())))

    def run(self) -> None:
        """Read all files.

        Raises:
            ImportRefusal: If a file cannot be read on; parts that are finished stay.
        """
        if len(self._group.files) > MAX_FILES_AT_A_TIME:
            words = f"{len(self._group.files):,} files of one group; name what parts them in braces in `files`"
            raise ImportRefusal(ImportCode.TOO_MANY, words)
        streams = [self._iter_events(i, table, file) for i, (table, file) in enumerate(self._group.files)]
        for event in heapq.merge(*streams, key=lambda e: e[:3]):
            self._add_event(event)
        for name in list(self._open):
            self._finish(name)

    def _iter_events(self, number: int, table: int, file: SourceFile) -> Iterator[_Event]:
        """Yield the rows of one file in the order of time."""
        plan = self._plan.tables[table]
        rule = plan.rule
        form = RowFormat(kind=rule.format, columns=rule.columns, delimiter=rule.delimiter)
        skipped: list[int] = []
        bound: _BoundFile | None = None
        clock: Callable[[Any], int] | None = None
        waiting: list[_Event] = []
        newest = 0
        rows = iter_table(file, form, skips=rule.skip_bad_lines, skipped=skipped)
        with closing(rows):
            for order, (line, row, columns) in enumerate(rows):
                try:
                    if clock is None or bound is None:
                        bound = self._bind_file(table, file, columns)
                        clock = build_clock(rule.clock, self._plan.rules.facts, columns, self._group.names)
                    stamp_ns = clock(row)
                except ImportRefusal as bad:
                    bad.file, bad.line = file.relative, line
                    if len(skipped) < rule.skip_bad_lines and clock is not None:
                        skipped.append(line)
                        continue
                    raise
                event = (stamp_ns, number, order, line, bound, row)
                if not plan.reorder_ns:
                    yield event
                    continue
                heapq.heappush(waiting, event)
                newest = max(newest, stamp_ns)
                while waiting and waiting[0][0] < newest - plan.reorder_ns:
                    yield heapq.heappop(waiting)
                if len(waiting) > MAX_REORDERED_ROWS:
                    words = f"more than {MAX_REORDERED_ROWS:,} rows within `out_of_order_within`"
                    raise ImportRefusal(ImportCode.TOO_MANY, words, file=file.relative, line=line)
        while waiting:
            yield heapq.heappop(waiting)
        self.skipped += skipped

    def _bind_file(self, table: int, file: SourceFile, columns: tuple[str, ...]) -> _BoundFile:
        plan, rules = self._plan.tables[table], self._plan.rules
        needed: list[tuple[str, bool]] = [(f.column, f.optional) for f in plan.fields]
        if plan.accesses is not None:
            needed = [(plan.accesses.address, False), (plan.accesses.size, False)]
            needed += [(s.column, s.optional) for s in plan.accesses.sums]
        values = []
        for column, optional in needed:
            getter = bind_column(column, columns)
            if getter is None and not optional:
                raise ImportRefusal(ImportCode.COLUMN_MISSING, f"no column {column!r}, which the map needs")
            values.append((column, getter))
        texts = {"host": rules.episode.host, "key": rules.episode.key, "profile": rules.episode.profile}
        texts |= {"sample": rules.episode.sample, "kind": rules.episode.kind}
        texts["phase"] = rules.labels.phase if rules.labels else None
        getters = {
            name: bind_column(rule.column, columns) if rule is not None and rule.column else None
            for name, rule in texts.items()
        }
        return _BoundFile(
            relative=file.relative, table=table, values=tuple(values), texts=getters, null=frozenset(plan.rule.null)
        )

    def _read_text(self, name: str, rule: TextRule | None, bound: _BoundFile, row: Any) -> str:
        """Return a text of the map for a row; empty without a rule or a value."""
        if rule is None:
            return ""
        if rule.column:
            getter = bound.texts[name]
            value = getter(row) if getter is not None else None
            if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
                raise ImportRefusal(ImportCode.VALUE_TYPE, f"{rule.column} is no text or whole number")
            word = "" if value is None else str(value).strip()
        else:
            word = rule.text or self._group.names[rule.path]
        return rule.convert(word) if word else ""

    def _add_event(self, event: _Event) -> None:
        stamp_ns, _, _, line, bound, row = event
        episode = self._plan.rules.episode
        name: _EpisodeName | None = None
        try:
            host, key = (self._read_text(n, getattr(episode, n), bound, row) for n in ("host", "key"))
            name = (host, key)
            if name in self._refused:
                return
            self._add_row(name, stamp_ns, bound, row)
        except ImportRefusal as bad:
            if not bad.file:
                bad.file, bad.line = bound.relative, line
            if name is None:
                raise
            self._drop(name, bad)

    def _drop(self, name: _EpisodeName, bad: ImportRefusal) -> None:
        self._refused.add(name)
        if name in self._open:
            self._cells -= self._open.pop(name).cells
        self._refuse("/".join(filter(None, name)), bad)

    def _add_row(self, name: _EpisodeName, stamp_ns: int, bound: _BoundFile, row: Any) -> None:
        episode = self._open.get(name)
        if episode is None:
            episode = self._open[name] = self._begin(name, bound, row)
        else:
            self._open.move_to_end(name)
        if episode.last_ns:
            if stamp_ns < episode.last_ns:
                words = f"{(episode.last_ns - stamp_ns) / 1e9:.3f} s earlier than a row of the episode before"
                raise ImportRefusal(ImportCode.CLOCK_BACKWARDS, f"{words}; see `out_of_order_within`")
            gap_ns = MAX_ROW_GAP_NS
            if all(t.counter is not None for t in episode.tables.values()):
                gap_ns = MAX_ACCESS_GAP_NS
            if stamp_ns - episode.last_ns > gap_ns:
                if episode.cells:
                    self._cut(name, episode, None)
                episode.tables.clear()
            elif episode.cells and stamp_ns > episode.start_ns + MAX_PART_NS:
                self._cut(name, episode, episode.start_ns + MAX_PART_NS)
        if not episode.cells:
            episode.start_ns = stamp_ns // BIN_NS * BIN_NS
        episode.last_ns = max(stamp_ns, episode.last_ns)
        self._add_phase(episode, stamp_ns, bound, row)
        table = episode.tables.get(bound.table)
        if table is None:
            plan = self._plan.tables[bound.table]
            table = episode.tables[bound.table] = _OpenTable(plan=plan, columns=FieldColumns(plan.specs))
            if plan.accesses is not None:
                table.counter = AccessCounter(plan.accesses)
            table.readers = [_FieldReader(f) for f in plan.fields]
        before = len(table.columns)
        if table.counter is not None:
            self._add_access(table, stamp_ns, bound, row)
        else:
            values = [r.convert(stamp_ns, bound.read_number(row, i)) for i, r in enumerate(table.readers)]
            table.columns.append(stamp_ns, values)
        added = max(len(table.columns) - before, 1) * (len(table.columns.specs) + 1)
        episode.cells += added
        self._cells += added
        if len(table.columns) >= MAX_PART_ROWS:
            self._cut(name, episode, stamp_ns)
        while self._cells > MAX_OPEN_CELLS and len(self._open) > 1:
            oldest = next(iter(self._open))
            self._finish(oldest)

    def _begin(self, name: _EpisodeName, bound: _BoundFile, row: Any) -> _OpenEpisode:
        host, key = name
        host_id = host.lower()
        if not HOST_ID_PATTERN.fullmatch(host_id):
            words = f"host {host[:60]!r}; expected letters, digits, '.', '_' and '-', at most 63"
            raise ImportRefusal(ImportCode.HOST, words)
        if len(key) > _MAX_NAME:
            raise ImportRefusal(ImportCode.EPISODE, f"its key has {len(key)} characters; at most {_MAX_NAME}")
        rules = self._plan.rules.episode
        texts = {n: self._read_text(n, getattr(rules, n), bound, row) for n in ("profile", "sample", "kind")}
        if texts["kind"] and texts["kind"] not in list(SampleKind):
            words = f"kind {texts['kind'][:40]!r}; expected {', '.join(SampleKind)}"
            raise ImportRefusal(ImportCode.VALUE_TYPE, words)
        ranges = find_spans(self._ranges, host_id, key) if self._ranges is not None else None
        return _OpenEpisode(host_id=host_id, texts=texts, ranges=ranges)

    def _add_phase(self, episode: _OpenEpisode, stamp_ns: int, bound: _BoundFile, row: Any) -> None:
        labels = self._plan.rules.labels
        if labels is None or labels.phase is None or not self._keeps_labels:
            return
        word = self._read_text("phase", labels.phase, bound, row)
        if word:
            phase = parse_phase(word)
            if not episode.spans or episode.spans[-1][1] is not phase:
                episode.spans.append((stamp_ns if labels.phase.column else 0, phase))

    def _add_access(self, table: _OpenTable, stamp_ns: int, bound: _BoundFile, row: Any) -> None:
        counter = table.counter
        address, size, *sums = (bound.read_number(row, i) for i in range(len(bound.values)))
        if counter is None or address is None or size is None:
            raise ImportRefusal(ImportCode.VALUE_TYPE, "an access without address or size")
        if not len(table.columns):
            self._tick(table, (stamp_ns - 1) // BIN_NS * BIN_NS)
        self._tick_until(table, stamp_ns - 1)
        counter.add(stamp_ns, address, size, sums)

    def _tick(self, table: _OpenTable, tick_ns: int) -> None:
        """Write the counters of an access list as they are at the end of a half second."""
        if table.counter is None:
            return
        values = [
            None if value is None else convert_number(value, is_float=spec.type == "float", column=spec.field)
            for spec, value in zip(table.plan.specs, table.counter.snapshot(), strict=True)
        ]
        table.columns.append(tick_ns, values)
        table.tick_ns = tick_ns

    def _tick_until(self, table: _OpenTable, until_ns: int) -> None:
        while table.tick_ns + BIN_NS <= until_ns:
            self._tick(table, table.tick_ns + BIN_NS)

    def _finish(self, name: _EpisodeName) -> None:
        """Write the last part of an episode and close it."""
        episode = self._open[name]
        try:
            if episode.cells:
                self._cut(name, episode, None)
        except ImportRefusal as bad:
            self._drop(name, bad)
            return
        self._open.pop(name, None)

    def _cut(self, name: _EpisodeName, episode: _OpenEpisode, boundary_ns: int | None) -> None:
        """Write the present part, and begin the next one if there is a boundary between them.

        Raises:
            ImportRefusal: If the rows contradict each other; a part that is too short is only told.
        """
        listed = list(episode.tables.values())
        access = [t for t in listed if t.counter is not None and len(t.columns)]
        if access:
            until_ns = -(-episode.last_ns // BIN_NS) * BIN_NS if boundary_ns is None else boundary_ns
            first_ns = min(t.columns.stamps[0] for t in listed if len(t.columns))
            for table in access:
                self._tick_until(table, until_ns)
                self._lead_in(table, first_ns)
        sources: dict[SourceKind, list[FieldColumns]] = {}
        for table in listed:
            sources.setdefault(table.plan.rule.source, []).append(table.columns)
        spans = episode.spans if episode.ranges is None else episode.ranges
        try:
            packed = pack_episode(self._build_facts(name, episode), sources, spans)
            self._emit("/".join(filter(None, name)), packed)
        except ImportRefusal as bad:
            if bad.code is not ImportCode.SPAN:
                raise
            self._refuse("/".join(filter(None, name)), bad)
        self._cells -= episode.cells
        episode.cells = 0
        episode.spans = episode.spans[-1:]
        for table in listed:
            table.columns = FieldColumns(table.plan.specs)
            if table.counter is not None and boundary_ns is not None and table.tick_ns:
                self._tick(table, table.tick_ns)
        if boundary_ns is not None:
            episode.start_ns = boundary_ns // BIN_NS * BIN_NS

    def _lead_in(self, table: _OpenTable, first_ns: int) -> None:
        """Insert half seconds without accesses before the first one of a list, where other rows begin earlier."""
        old = table.columns
        ticks = range(-(-first_ns // BIN_NS) * BIN_NS, old.stamps[0], BIN_NS)
        if not ticks:
            return
        table.columns = FieldColumns(old.specs)
        first = [v[0] if known[0] else None for v, known in zip(old.values, old.present, strict=True)]
        for tick_ns in ticks:
            table.columns.append(tick_ns, first)
        for i, stamp_ns in enumerate(old.stamps):
            table.columns.append(
                stamp_ns, [v[i] if known[i] else None for v, known in zip(old.values, old.present, strict=True)]
            )

    def _build_facts(self, name: _EpisodeName, episode: _OpenEpisode) -> EpisodeFacts:
        rules, texts = self._plan.rules, episode.texts
        profile = texts["profile"] or "unknown"
        kind = texts["kind"] or (SampleKind.BENIGN if profile == BENIGN_PROFILE else SampleKind.LIVE)
        how = f"labels {self._mode}" if self._keeps_labels else "no labels"
        return EpisodeFacts(
            host_id=episode.host_id,
            key="\0".join((*(f"{k}={v}" for k, v in sorted(self._group.names.items())), *name)),
            recorder=f"import table, map {rules.name} {self._plan.digest}, {how}",
            layout="table",
            profile=profile,
            sample=texts["sample"] or "unknown",
            kind=SampleKind(kind),
            machine=rules.machine,
        )
