"""Convert one CIS490 episode: telemetry as JSON lines in two clocks, and phases that a schedule told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from phasewatch.bundle import limits
from phasewatch.importing.builder import (
    EpisodeFacts,
    FieldColumns,
    PackedEpisode,
    PhaseSpan,
    pack_episode,
    to_plain_text,
)
from phasewatch.importing.cis490_store import (
    DONE_FILE,
    EVENTS_FILE,
    LABELS_FILE,
    TELEMETRY_FILES,
    EpisodeInput,
    EpisodeMeta,
    Neighbours,
    SampleMeta,
    build_id,
    choose_host,
    iter_episode_lines,
    read_members,
    read_meta,
)
from phasewatch.importing.labels import LabelMode
from phasewatch.importing.mapping import FieldPlan, MachineRule, MapPlan, parse_map, read_map
from phasewatch.importing.numbers import Number, convert_number, parse_number
from phasewatch.importing.problems import ImportCode, ImportRefusal
from phasewatch.importing.readers import bind_column
from phasewatch.types import BENIGN_PROFILE, BIN_NS, Phase, SampleKind, SourceKind

__all__ = ["import_episode", "list_field_plans"]

MAX_CLOCK_ERROR_NS = 250_000_000
MAX_STRAY_NS = 60 * 10**9
EVIDENCE_WINDOW_NS = 2 * 10**9
PROC_HZ = 10.0

_PHASES = {
    "clean": Phase.CLEAN,
    "armed": Phase.ARMED,
    "infecting": Phase.INFECTING,
    "infected_running": Phase.ACTIVE,
    "dormant": Phase.DORMANT,
    "failed": Phase.UNKNOWN,
    "reverting": Phase.UNKNOWN,
    "snapshot_load": Phase.UNKNOWN,
}
_EVIDENCE = {Phase.INFECTING: ("exploit_fire",), Phase.ACTIVE: ("session_open",)}


def import_episode(source: EpisodeInput, plan: MapPlan, *, mode: LabelMode, neighbours: Neighbours) -> PackedEpisode:
    """Convert one episode.

    Args:
        source: The episode.
        plan: A map that adds spellings of keys; those of the shipped map come after it.
        mode: Which labels are kept.
        neighbours: Its session and neighbours.

    Raises:
        ImportRefusal: If it is unfinished, malformed, or has no telemetry of the QEMU process.
    """
    members = read_members(source)
    meta = read_meta(members, source.name)
    if DONE_FILE not in members:
        raise ImportRefusal(ImportCode.INCOMPLETE, f"there is no {DONE_FILE}", file=source.name)
    if meta.episode_id != source.ulid:
        words = f"meta.json names {meta.episode_id[:40]!r}, the path {source.ulid}"
        raise ImportRefusal(ImportCode.SCHEMA, words, file=source.name)
    labels = _read_labels(members, source.name)
    tables: dict[SourceKind, FieldColumns] = {}
    for kind, member in TELEMETRY_FILES.items():
        rows = _read_rows(members, kind, member, plan, source.name)
        if rows is not None:
            tables[kind] = rows
    start_ns = labels[0][0]
    proc = tables.get(SourceKind.PROC)
    if proc is None:
        words = f"{TELEMETRY_FILES[SourceKind.PROC]} has no known key"
        raise ImportRefusal(ImportCode.NO_ROWS, words, file=source.name)
    end_ns = max(max(proc.stamps), labels[-1][0] + 1_000_000)
    if not 12 * 10**9 <= end_ns - start_ns <= limits.MAX_LABELLED_NS:
        words = f"{(end_ns - start_ns) / 1e9:.1f} s; 12 s to an hour are allowed"
        raise ImportRefusal(ImportCode.SPAN, words, file=source.name)
    if 2 * len(proc) < PROC_HZ * (end_ns - start_ns) / 1e9:
        words = f"{len(proc)} rows of proc, {PROC_HZ * (end_ns - start_ns) / 1e9:.0f} were due"
        raise ImportRefusal(ImportCode.NO_ROWS, words, file=source.name)
    aligned, dropped = _align_clocks(tables, labels, start_ns, end_ns)
    told = [(wall, phase) for wall, _, phase in labels]
    spans = told if mode is LabelMode.TOLD else _keep_proven(members, labels, source.name)
    return pack_episode(
        _build_facts(source, meta, told, mode, neighbours, dropped),
        {kind: [rows] for kind, rows in aligned.items()},
        spans,
        start_ns=start_ns,
        end_ns=end_ns,
    )


_Label = tuple[int, int, Phase]  # wall, monotonic, phase


def _read_labels(members: Mapping[str, bytes], name: str) -> list[_Label]:
    labels: list[_Label] = []
    for line, row in iter_episode_lines(members, LABELS_FILE, name):
        wall, mono = (_read_stamp(row, key) for key in ("t_wall_ns", "t_mono_ns"))
        word = row.get("phase")
        bad = ""
        if not isinstance(word, str) or word not in _PHASES:
            bad = f"{str(word)[:40]!r} is no phase of the layout; known are {', '.join(_PHASES)}"
        elif labels and (wall <= labels[-1][0] or mono <= labels[-1][1]):
            bad = "a label is not later than the one before"
        elif not limits.MIN_STAMP_NS <= wall <= limits.MAX_STAMP_NS:
            bad = "t_wall_ns is not in the years 2006 to 2116"
        if bad:
            raise ImportRefusal(ImportCode.LABEL, bad, file=f"{name}/{LABELS_FILE}", line=line)
        labels.append((wall, mono, _PHASES[str(word)]))
        if len(labels) >= limits.MAX_LABEL_ROWS:
            raise ImportRefusal(ImportCode.LABELS_MANY, f"{len(labels)} labels", file=f"{name}/{LABELS_FILE}")
    if not labels:
        raise ImportRefusal(ImportCode.LABEL, "there is no label", file=f"{name}/{LABELS_FILE}")
    return labels


def _read_stamp(row: Mapping[str, Any], key: str) -> int:
    """Return a stamp of a row in ns; −1 if it is no whole number of 64 bits."""
    value = row.get(key)
    return value if type(value) is int and 0 <= value <= limits.INT64_MAX else -1


@lru_cache(maxsize=1)
def _read_shipped_plan() -> MapPlan:
    return parse_map(read_map("cis490"), where="cis490")


def list_field_plans(plan: MapPlan, kind: SourceKind, member: str) -> list[FieldPlan]:
    """Return the rules for a member: those of the map, then those of the shipped one."""
    tables = [t for p in (plan, _read_shipped_plan()) for t in p.tables]
    return [
        field for t in tables if t.rule.source is kind and t.pattern.match(member) is not None for field in t.fields
    ]


def _read_rows(
    members: Mapping[str, bytes], kind: SourceKind, member: str, plan: MapPlan, name: str
) -> FieldColumns | None:
    """Read the rows of a source; None if it has no known key with a value."""
    rows = list(islice(iter_episode_lines(members, member, name), limits.MAX_SOURCE_ROWS + 1))
    if len(rows) > limits.MAX_SOURCE_ROWS:
        words = f"more than {limits.MAX_SOURCE_ROWS:,} rows; a bundle holds no more of one source"
        raise ImportRefusal(ImportCode.TOO_MANY, words, file=f"{name}/{member}")
    chosen: dict[str, tuple[FieldPlan, Any]] = {}
    for field in list_field_plans(plan, kind, member):
        getter = bind_column(field.column, ())
        if field.spec.field not in chosen and getter and any(getter(row) is not None for _, row in rows):
            chosen[field.spec.field] = field, getter
    if not chosen:
        return None
    columns = FieldColumns([field.spec for field, _ in chosen.values()])
    totals: dict[str, Number] = {}
    for line, row in rows:
        try:
            wall, mono = _read_stamp(row, "t_wall_ns"), _read_stamp(row, "t_mono_ns")
            if wall < 0 or mono < 0:
                raise ImportRefusal(ImportCode.CLOCK, "t_wall_ns or t_mono_ns is no whole number of 64 bits")
            if len(columns) and mono <= columns.monos[-1]:
                raise ImportRefusal(ImportCode.CLOCK_BACKWARDS, "t_mono_ns is not later than in the row before")
            columns.append(wall, [_read_value(f, getter(row), totals) for f, getter in chosen.values()], mono)
        except ImportRefusal as bad:
            bad.file, bad.line = f"{name}/{member}", line
            raise
    return columns


def _read_value(plan: FieldPlan, value: Any, totals: dict[str, Number]) -> int | float | None:
    if value is None:
        return None
    number = parse_number(value, plan.column) * plan.factor
    if plan.kind == "increment":  # counts of a bucket; a bucket without a row counted nothing
        totals[plan.column] = number = totals.get(plan.column, 0) + number
    return convert_number(number, is_float=plan.spec.type == "float", column=plan.column)


def _align_clocks(
    tables: Mapping[SourceKind, FieldColumns], labels: Sequence[_Label], start_ns: int, end_ns: int
) -> tuple[dict[SourceKind, FieldColumns], set[SourceKind]]:
    """Bring all sources to the clocks of proc, and drop those that fit neither of them.

    Returns:
        The sources, and those that were dropped.

    Raises:
        ImportRefusal: If proc itself is not beside the labels, by either clock.
    """
    proc = tables[SourceKind.PROC]
    ahead = int(np.median(np.frombuffer(proc.stamps, np.int64) - np.frombuffer(proc.monos, np.int64)))
    if any(abs(wall - mono - ahead) > MAX_CLOCK_ERROR_NS for wall, mono, _ in labels):
        raise ImportRefusal(ImportCode.CLOCK, "the two clocks of the labels contradict those of the rows of proc")
    aligned: dict[SourceKind, FieldColumns] = {}
    dropped: set[SourceKind] = set()
    for kind, rows in tables.items():
        wall, mono = (np.frombuffer(a, np.int64) for a in (rows.stamps, rows.monos))
        if _is_near(wall, start_ns, end_ns):
            pass
        elif _is_near(mono + ahead, start_ns, end_ns):
            wall = mono + ahead
        else:
            dropped.add(kind)
            continue
        if abs(float(np.median(wall - mono)) - ahead) > MAX_CLOCK_ERROR_NS:  # a monotonic clock of another origin
            mono = wall - ahead
        fixed = FieldColumns(rows.specs)
        fixed.stamps.frombytes(wall.tobytes())
        fixed.monos.frombytes(mono.tobytes())
        fixed.values, fixed.present = rows.values, rows.present
        if (wall[1:] <= wall[:-1]).any():
            raise ImportRefusal(ImportCode.CLOCK_BACKWARDS, f"the wall clock of {kind} does not move forward")
        aligned[kind] = _fill_quiet_time(fixed, start_ns, end_ns, ahead) if kind is SourceKind.NETFLOW else fixed
    if SourceKind.PROC in dropped:
        raise ImportRefusal(ImportCode.CLOCK, "the rows of proc are more than a minute beside the labels")
    return aligned, dropped


def _is_near(wall: Any, start_ns: int, end_ns: int) -> bool:
    return start_ns - MAX_STRAY_NS <= int(np.median(wall)) <= end_ns + MAX_STRAY_NS


def _fill_quiet_time(rows: FieldColumns, start_ns: int, end_ns: int, ahead: int) -> FieldColumns:
    """Add rows with unchanged counters each half second in which no bucket has a row, between the labels."""
    filled = FieldColumns(rows.specs)
    values: list[int | float | None] = [0 for _ in rows.specs]

    def fill(until_ns: int) -> None:
        while filled.stamps[-1] + BIN_NS < until_ns:
            stamp_ns = filled.stamps[-1] + BIN_NS
            filled.append(stamp_ns, values, stamp_ns - ahead)

    if rows.stamps[0] > start_ns:
        filled.append(start_ns, values, start_ns - ahead)
    for i, stamp_ns in enumerate(rows.stamps):
        if len(filled):
            fill(stamp_ns)
        values = [v[i] if known[i] else None for v, known in zip(rows.values, rows.present, strict=True)]
        filled.append(stamp_ns, values, rows.monos[i])
    fill(end_ns)
    return filled


def _keep_proven(members: Mapping[str, bytes], labels: Sequence[_Label], name: str) -> list[PhaseSpan]:
    """Return the labels with evidence: phases of malware that no event proves become unknown."""
    events: list[tuple[int, str, Any]] = []
    for _, row in iter_episode_lines(members, EVENTS_FILE, name):
        word, data = row.get("name"), row.get("data")
        if isinstance(word, str):
            events.append((_read_stamp(row, "t_mono_ns"), word, data.get("phase") if isinstance(data, dict) else None))
    spans: list[PhaseSpan] = []
    has_run = False
    for wall, mono, phase in labels:
        is_proven = phase in (Phase.CLEAN, Phase.ARMED, Phase.UNKNOWN) or (phase is Phase.DORMANT and has_run)
        for at, word, about in events:
            if abs(at - mono) <= EVIDENCE_WINDOW_NS:
                is_proven |= word in _EVIDENCE.get(phase, ())
                is_proven |= word.startswith("workload") and isinstance(about, str) and _PHASES.get(about) is phase
        has_run |= is_proven and phase in (Phase.INFECTING, Phase.ACTIVE)
        spans.append((wall, phase if is_proven else Phase.UNKNOWN))
    return spans


def _build_facts(
    source: EpisodeInput,
    meta: EpisodeMeta,
    told: Sequence[PhaseSpan],
    mode: LabelMode,
    neighbours: Neighbours,
    dropped: Iterable[SourceKind],
) -> EpisodeFacts:
    host, sample, version = choose_host(source, meta), meta.sample or SampleMeta(), meta.code_version
    commit = (version.commit or meta.git_commit)[:12] or "of an unknown commit"
    is_benign = all(phase in (Phase.CLEAN, Phase.UNKNOWN) for _, phase in told) and not sample.sha256
    kind = SampleKind.BENIGN if is_benign else SampleKind.LIVE if sample.sha256 else SampleKind.EMULATED
    profile = BENIGN_PROFILE if is_benign else (sample.profile or "unknown")
    if kind is SampleKind.EMULATED and profile == BENIGN_PROFILE:
        kind = SampleKind.BENIGN
    how = "labels by the clock" if mode is LabelMode.TOLD else "labels proven"
    cap = f", cap {meta.vm.cgroup_cpu_cap}" if meta.vm.cgroup_cpu_cap else ""
    emitted: dict[SourceKind, int] = {}
    for source_kind in (SourceKind.PROC, SourceKind.QMP, SourceKind.GUEST):  # netflow has rows for frames alone
        rows = meta.result.get(f"rows_{source_kind}")
        if type(rows) is int and 0 <= rows <= limits.MAX_ROWS_EMITTED:
            emitted[source_kind] = rows
    reason = "its clock fits neither the labels nor the other sources"
    return EpisodeFacts(
        host_id=host,
        key=source.ulid,
        recorder=f"cis490 {commit}{' dirty' if version.dirty else ''}, import, {how}",
        layout="cis490",
        profile=profile,
        sample=sample.name or "unknown",
        kind=kind,
        machine=MachineRule(
            arch="x86_64",
            accel="kvm",
            cpu=to_plain_text(meta.host_fingerprint.cpu_model) if meta.host_fingerprint.cpu_model else "",
            vcpus=max(1, min(meta.vm.vcpus, 4096)),
            mem_mib=max(1, min(meta.vm.ram_mib, 1 << 30)),
            disk=to_plain_text(meta.vm.image_name + cap) if meta.vm.image_name + cap else "",
            hypervisor=to_plain_text(f"QEMU {meta.host_fingerprint.qemu_version}".strip()),
        ),
        episode_id=build_id(source.ulid),
        session=neighbours.session,
        neighbours=neighbours.ids,
        emitted=emitted,
        dropped=dict.fromkeys(dropped, reason),
    )
