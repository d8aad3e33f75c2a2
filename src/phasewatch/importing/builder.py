"""Build bundles from the rows of an imported episode; an episode is cut into parts that fit the format."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.bundle.archive import encode_labels, pack_bundle
from phasewatch.bundle.limits import MAX_LABEL_ROWS, MAX_NOMINAL_HZ
from phasewatch.bundle.model import (
    BUNDLE_FORMAT,
    ClockMetadata,
    HostMetadata,
    LabelMark,
    Manifest,
    RecordingMetadata,
    SourceRows,
)
from phasewatch.bundle.rows import encode_columns
from phasewatch.channels import CHANNELS, RawFieldSpec, list_raw_fields
from phasewatch.errors import BundleError
from phasewatch.importing.mapping import MachineRule
from phasewatch.importing.problems import ImportCode, ImportRefusal
from phasewatch.types import (
    BENIGN_PROFILE,
    BIN_NS,
    ClockBase,
    EpisodeId,
    EpisodeOrigin,
    EpisodeRole,
    Phase,
    SampleKind,
    SourceKind,
    build_uuid7,
)

__all__ = [
    "MIN_PART_NS",
    "EpisodeFacts",
    "FieldColumns",
    "PackedEpisode",
    "PhaseSpan",
    "build_episode_id",
    "join_columns",
    "pack_episode",
]

MIN_PART_NS = 12_000_000_000  # a shorter bundle holds no complete window
_MONO_LEAD_NS = 3_600_000_000_000
_NO_TELEMETRY = "the imported recording has no telemetry of this kind"
_NO_COLUMN = "the imported recording has no such readings"

PhaseSpan = tuple[int, Phase]  # Unix time in ns from which on a phase holds


class FieldColumns:
    """Rows of one table of one episode, in columns: stamps, values, and which are present.

    Args:
        specs: The raw fields.
    """

    def __init__(self, specs: Sequence[RawFieldSpec]) -> None:
        self.specs = tuple(specs)
        self.stamps = array("q")
        self.monos = array("q")  # empty unless the source has a monotonic clock of its own
        self.values = [array("d" if spec.type == "float" else "q") for spec in specs]
        self.present = [bytearray() for _ in specs]

    def __len__(self) -> int:
        return len(self.stamps)

    def append(self, stamp_ns: int, values: Sequence[int | float | None], mono_ns: int | None = None) -> None:
        """Append one row; None stands for no reading."""
        self.stamps.append(stamp_ns)
        if mono_ns is not None:
            self.monos.append(mono_ns)
        for column, known, value in zip(self.values, self.present, values, strict=True):
            known.append(value is not None)
            column.append(0 if value is None else value)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeFacts:
    """What the manifest says of an episode besides its rows.

    Attributes:
        episode_id: The id; derived from host, key and start if None.
        recorder: Who recorded, imported and labelled it.
        emitted: Rows that the recorder emitted, by source, where it is known.
        dropped: Reasons by source that was left out although it has rows.
    """

    host_id: str
    key: str
    recorder: str
    layout: str
    profile: str = "unknown"
    sample: str = "unknown"
    kind: SampleKind = SampleKind.LIVE
    machine: MachineRule = field(default_factory=MachineRule)
    episode_id: EpisodeId | None = None
    session: str = ""
    neighbours: tuple[str, ...] = ()
    emitted: Mapping[SourceKind, int] = field(default_factory=dict)
    dropped: Mapping[SourceKind, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedEpisode:
    """A finished bundle."""

    host_id: str
    episode_id: str
    data: bytes
    duration_s: float
    labels: dict[str, float]


def build_episode_id(layout: str, host_id: str, key: str, start_ns: int) -> EpisodeId:
    """Return the id of a part of an episode: its start and a digest of its names, so equal inputs have equal ids."""
    text = "\0".join(("phasewatch-import", layout, host_id, key, str(start_ns)))
    return build_uuid7(start_ns // 1_000_000, sha256(text.encode()).digest())


def join_columns(source: SourceKind, tables: Sequence[FieldColumns]) -> tuple[SourceRows, NDArray[np.int64]] | None:
    """Join tables of one source: rows with equal stamps become one row. Fields without any reading are left out.

    Returns:
        The rows without the monotonic stamps of the bundle, and the sources' own monotonic stamps (empty
        without); None without any row.

    Raises:
        ImportRefusal: If two tables fill one field at the same time, or a table has two rows at one time.
    """
    tables = [t for t in tables if len(t)]
    if not tables:
        return None
    specs = list_raw_fields(source)
    stamps = [np.frombuffer(t.stamps, np.int64) for t in tables]
    for stamp in stamps:
        if (stamp[1:] == stamp[:-1]).any():
            words = f"two rows of {source} at the same time; the clock is too coarse, or rows are repeated"
            raise ImportRefusal(ImportCode.CLOCK_REPEATED, words)
    wall = np.unique(np.concatenate(stamps))
    present = np.zeros((len(wall), len(specs)), np.bool_)
    columns: list[NDArray[Any]] = [np.zeros(len(wall), np.float64 if s.type == "float" else np.int64) for s in specs]
    place = {spec.field: i for i, spec in enumerate(specs)}
    for table, stamp in zip(tables, stamps, strict=True):
        rows = np.searchsorted(wall, stamp)
        for spec, values, known in zip(table.specs, table.values, table.present, strict=True):
            i, read = place[spec.field], np.frombuffer(known, np.bool_)
            if (present[rows, i] & read).any():
                words = f"two tables give {source}.{spec.field} at the same time"
                raise ImportRefusal(ImportCode.FIELD_TWICE, words)
            present[rows[read], i] = True
            columns[i][rows[read]] = np.frombuffer(values, columns[i].dtype)[read]
    monos = np.concatenate([np.frombuffer(t.monos, np.int64) for t in tables])
    if len(tables) > 1 or len(monos) != len(wall):
        monos = np.empty(0, np.int64)
    kept = np.flatnonzero(present.any(axis=0)).tolist()
    if not kept:
        return None
    rows_of_source = SourceRows(
        source=source,
        fields=tuple(specs[i].field for i in kept),
        t_wall_ns=wall,
        t_mono_ns=np.zeros(len(wall), np.int64),
        seq=np.arange(len(wall), dtype=np.int64),
        columns=tuple(columns[i] for i in kept),
        present=present[:, kept],
    )
    return rows_of_source, monos


def pack_episode(
    facts: EpisodeFacts,
    tables: Mapping[SourceKind, Sequence[FieldColumns]],
    spans: Sequence[PhaseSpan],
    *,
    start_ns: int | None = None,
    end_ns: int | None = None,
) -> PackedEpisode:
    """Build the bundle of one episode or part.

    Args:
        facts: Names, machine and recorder.
        tables: The rows by source.
        spans: Starts of phases in the order of time; before the first one the phase is unknown.
        start_ns, end_ns: First label and end; by default the first whole half second and the last row.

    Raises:
        ImportRefusal: If there are no rows, or the part is too short, too fast or breaks a rule of the format.
    """
    joined = {
        source: made
        for source in SourceKind
        if (made := join_columns(source, tables.get(source, ()))) and _has_channel(source, made[0].fields)
    }
    if not joined:
        raise ImportRefusal(ImportCode.NO_ROWS, "there is no reading of any channel")
    first_ns = min(int(rows.t_wall_ns[0]) for rows, _ in joined.values())
    last_ns = max(int(rows.t_wall_ns[-1]) for rows, _ in joined.values())
    t0_ns = -(-first_ns // BIN_NS) * BIN_NS if start_ns is None else start_ns
    t_end_ns = last_ns if end_ns is None else end_ns
    if t_end_ns - t0_ns < MIN_PART_NS:
        raise ImportRefusal(ImportCode.SPAN, f"{(t_end_ns - t0_ns) / 1e9:.1f} s; a bundle needs 12 s for one window")
    ahead = t0_ns - _MONO_LEAD_NS  # a monotonic clock that began an hour before the first label
    if SourceKind.PROC in joined and len(joined[SourceKind.PROC][1]):
        wall, mono = joined[SourceKind.PROC][0].t_wall_ns, joined[SourceKind.PROC][1]
        ahead = int(np.median(wall - mono))
    if ahead > first_ns:
        ahead = t0_ns - _MONO_LEAD_NS
    rows = {
        source: replace(made, t_mono_ns=monos if len(monos) else made.t_wall_ns - ahead)
        for source, (made, monos) in joined.items()
    }
    marks = _build_marks(spans, t0_ns, t_end_ns, ahead)
    members = {"labels.jsonl": encode_labels(marks)}
    members |= {f"{source}.jsonl": encode_columns(of_source) for source, of_source in rows.items()}
    manifest = _build_manifest(facts, rows, marks)
    try:
        data = pack_bundle(manifest, members, level=9)
    except BundleError as exc:
        raise ImportRefusal(ImportCode.BUNDLE, f"{exc.code}: {exc.words}") from None
    labels: dict[str, float] = {}
    for phase, seconds in manifest.plan:
        labels[phase] = round(labels.get(phase, 0.0) + seconds, 3)
    return PackedEpisode(
        host_id=facts.host_id,
        episode_id=manifest.episode_id,
        data=data,
        duration_s=manifest.duration_s,
        labels=labels,
    )


def _has_channel(source: SourceKind, fields: Sequence[str]) -> bool:
    """Return whether some channel can be computed from these raw fields; a bundle needs no other rows."""
    return any(c.source is source and set(fields).issuperset(c.fields) for c in CHANNELS)


def _build_marks(spans: Sequence[PhaseSpan], t0_ns: int, t_end_ns: int, ahead_ns: int) -> tuple[LabelMark, ...]:
    """Return the marks of the phases between two times, and the end mark.

    Raises:
        ImportRefusal: If there are more phases than a bundle may have.
    """
    phase, starts = Phase.UNKNOWN, [(t0_ns, Phase.UNKNOWN)]
    for at_ns, value in spans:
        if at_ns >= t_end_ns:
            break
        if at_ns <= t0_ns:
            phase, starts = value, [(t0_ns, value)]
        elif value is not phase:
            phase = value
            starts.append((at_ns, value))
    if len(starts) >= MAX_LABEL_ROWS:
        words = f"{len(starts):,} changes of phase in one part; at most {MAX_LABEL_ROWS - 1} are allowed"
        raise ImportRefusal(ImportCode.LABELS_MANY, words)
    return (
        *(LabelMark(t_wall_ns=at, t_mono_ns=at - ahead_ns, phase=value) for at, value in starts),
        LabelMark(t_wall_ns=t_end_ns, t_mono_ns=t_end_ns - ahead_ns, phase=None),
    )


def _build_manifest(facts: EpisodeFacts, rows: Mapping[SourceKind, SourceRows], marks: Sequence[LabelMark]) -> Manifest:
    t0_ns, t_end_ns = marks[0].t_wall_ns, marks[-1].t_wall_ns
    plan = tuple(
        (mark.phase or Phase.UNKNOWN, round((following.t_wall_ns - mark.t_wall_ns) / 1e9, 3))
        for mark, following in pairwise(marks)
    )
    episode_id = facts.episode_id or build_episode_id(facts.layout, facts.host_id, facts.key, t0_ns)
    read = {source: set(r.fields) for source, r in rows.items()}
    available, absent = [], {}
    for channel in CHANNELS:
        fields = read.get(channel.source)
        if fields is None:
            absent[channel.full_name] = facts.dropped.get(channel.source, _NO_TELEMETRY)
        elif fields.issuperset(channel.fields):
            available.append(channel.full_name)
        else:
            absent[channel.full_name] = _NO_COLUMN
    digest = sha256(repr([(str(p), s) for p, s in plan]).encode()).digest()
    return Manifest(
        format=BUNDLE_FORMAT,
        episode_id=episode_id,
        host=HostMetadata(
            host_id=facts.host_id, **msgspec.structs.asdict(facts.machine), recorder=to_plain_text(facts.recorder)
        ),
        profile=BENIGN_PROFILE if facts.kind is SampleKind.BENIGN else to_plain_text(facts.profile),
        sample_name=to_plain_text(facts.sample),
        sample_kind=facts.kind,
        origin=EpisodeOrigin.IMPORTED,
        role=EpisodeRole.LAB,
        started_wall_ns=t0_ns,
        duration_s=round((t_end_ns - t0_ns) / 1e9, 3),
        session=facts.session or episode_id,
        neighbours=facts.neighbours,
        plan_seed=int.from_bytes(digest[:6], "big"),
        plan=plan,
        agent=SourceKind.GUEST in rows,
        nominal_hz={source: _compute_hz(r) for source, r in rows.items()},
        rows_emitted={source: max(len(r), facts.emitted.get(source, 0)) for source, r in rows.items()},
        channels_available=tuple(available),
        fields={source: r.fields for source, r in rows.items()},
        clocks=ClockMetadata(base=dict.fromkeys(rows, ClockBase.UNIX), pairs={}),
        recording=RecordingMetadata(boot_s=0.0, settle_s=0.0, pinning=(), knobs={}, background="", absent=absent),
        members={},
    )


def _compute_hz(rows: SourceRows) -> float:
    """Return the median rate of a source's rows in Hz.

    Raises:
        ImportRefusal: If it is above what a bundle may have.
    """
    if len(rows) < 2:
        return 1.0
    hz = 1e9 / float(np.median(np.diff(rows.t_wall_ns)))
    if hz > MAX_NOMINAL_HZ:
        raise ImportRefusal(ImportCode.RATE, f"{hz:,.0f} rows of {rows.source} a second; at most 1,000 are allowed")
    return round(max(hz, 0.001), 3)


def to_plain_text(text: str) -> str:
    """Return a text as printable ASCII, which is all that a manifest may hold."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:200] or "unknown"
