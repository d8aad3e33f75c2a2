"""The six events that producers send and the dashboard shows: what each holds, and within which bounds.

Names are safe to hand to any page: one that is not of `SAFE_NAME_PATTERN` is replaced when the event is made, wherever it came from.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec.structs import force_setattr

from phasewatch.errors import EventError
from phasewatch.types import PHASES

MAX_NAME_CHARS = 80
MAX_RAW_NAME_CHARS = 4096  # characters of a name that is read, to be replaced by a safe one
SAFE_NAME_PATTERN = re.compile(r"[A-Za-z0-9._/-]{1,80}")
_UNSAFE_CHARS_PATTERN = re.compile(r"[^A-Za-z0-9._/-]+")

_Meta = msgspec.Meta
SafeName = Annotated[str, _Meta(max_length=MAX_RAW_NAME_CHARS)]  # replaced if it is not of NAME
FreeText = Annotated[str, _Meta(max_length=600)]  # free text; a page sets it as text, never as markup
NonNegativeInt = Annotated[int, _Meta(ge=0, le=2**63 - 1)]
TimestampNs = Annotated[int, _Meta(ge=0, le=2**63 - 1)]  # ns since 1970, the host's wall clock
UnitFraction = Annotated[float, _Meta(ge=0, le=1)]
NonNegativeFloat = Annotated[float, _Meta(ge=0)]
SafeNames = Annotated[tuple[SafeName, ...], _Meta(max_length=256)]


def make_safe_name(text: str) -> str:
    """Give a name back as it is, or one that is safe to show in its stead; different names stay different.

    >>> safe_name("held_out_host")
    'held_out_host'
    >>> safe_name("<b>")
    '_b_-507ca5'
    """
    if SAFE_NAME_PATTERN.fullmatch(text):
        return text
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{_UNSAFE_CHARS_PATTERN.sub('_', text)[: MAX_NAME_CHARS - 7] or 'unnamed'}-{mark}"


class EventRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen record whose names are replaced where they are not safe."""

    _name_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in self._name_fields:
            value: str | tuple[str, ...] | None = getattr(self, field)
            if value is not None:
                safe = make_safe_name(value) if isinstance(value, str) else tuple(make_safe_name(v) for v in value)
                force_setattr(self, field, safe)


class TelemetryEvent(EventRecord, frozen=True, kw_only=True):
    """Some bins of one VM, one after the other.

    Sent by ``watch`` and ``produce replay``.

    Attributes:
        vm: Which machine; the key of its scene.
        host: Its host or shape; None where that is not known.
        origin: ``recorded``, ``simulated`` or ``live``.
        t0_ns: Where the first bin begins.
        bin_s: Width of a bin.
        channels: Full names of the columns, at most 256.
        values: One row a bin, at most 240, of one value a channel in its unit; None = not known.
        flags: One a bin, `phasewatch.binning.align`.
        masked: Channels that this VM cannot give, or not at present.
        late_rows, lost_rows: Readings that came too late, or never, since the machine is watched.
        lateness_s: How long after its end the last bin was closed; None in a replay.
    """

    _name_fields = ("vm", "host", "origin", "channels", "masked")

    vm: SafeName
    host: SafeName | None = None
    origin: SafeName
    t0_ns: TimestampNs
    bin_s: Annotated[float, _Meta(gt=0, le=3600)]
    channels: SafeNames
    values: Annotated[tuple[Annotated[tuple[float | None, ...], _Meta(max_length=256)], ...], _Meta(max_length=240)]
    flags: Annotated[tuple[NonNegativeInt, ...], _Meta(max_length=240)]
    masked: SafeNames = ()
    late_rows: NonNegativeInt = 0
    lost_rows: NonNegativeInt = 0
    lateness_s: NonNegativeFloat | None = None

    def __post_init__(self) -> None:
        """Refuse rows of another width."""
        EventRecord.__post_init__(self)
        _require(len(set(self.channels)) == len(self.channels), "a channel stands twice")
        _require(len(self.flags) == len(self.values), f"{len(self.flags)} flags of {len(self.values)} bins")
        for row in self.values:
            _require(len(row) == len(self.channels), f"a bin of {len(row)} values for {len(self.channels)} channels")


class PhaseEvent(EventRecord, frozen=True, kw_only=True):
    """What a model says of one window of one VM.

    Sent by ``watch`` and ``produce replay``.

    Attributes:
        vm: Which machine; the key of its scene.
        host: Its host or shape; None where that is not known.
        t_start_ns, t_end_ns: The window.
        p: Probabilities of clean, armed, infecting, active, dormant, after calibration and filter.
        decision: The phase decided for.
        truth: The phase that the recording's labels give; None where nobody knows.
        alarm: Whether the alarm stands after this window; None where no threshold was trained.
        alarm_since_ns: Since when it stands.
        threshold: Of p(infecting) + p(active).
        model, threat, table, filter: As in a run's predictions.
        latency_ms: From the end of the window to this event; None in a replay.
        caveat: What a reader must know, such as an accelerator that training never saw.
    """

    _name_fields = ("vm", "host", "decision", "truth", "model", "threat", "table", "filter")

    vm: SafeName
    host: SafeName | None = None
    t_start_ns: TimestampNs
    t_end_ns: TimestampNs
    p: tuple[UnitFraction, UnitFraction, UnitFraction, UnitFraction, UnitFraction]
    decision: SafeName
    truth: SafeName | None = None
    alarm: bool | None = None
    alarm_since_ns: TimestampNs | None = None
    threshold: Annotated[float, _Meta(ge=0)] | None = None
    model: SafeName
    threat: SafeName
    table: SafeName = "raw"
    filter: SafeName = "none"
    latency_ms: NonNegativeFloat | None = None
    caveat: FreeText | None = None

    def __post_init__(self) -> None:
        """Refuse phases that there are not, and a window that ends before it starts."""
        EventRecord.__post_init__(self)
        for phase in (self.decision, self.truth):
            _require(phase is None or phase in PHASES, f"no phase {phase!r}")
        _require(self.t_start_ns < self.t_end_ns, "the window ends before it starts")


class ScoreRow(EventRecord, frozen=True, kw_only=True):
    """One line of a leaderboard; without an interval `why` says why there is none.

    Attributes:
        model, threat, table: As in a run's predictions.
        agent: Scored on episodes where the guest's agent was ``on`` or ``off``; None = both.
        value: The score itself, of the metric that the leaderboard names.
        low, high: Its 95 % interval; None where there is none.
        why: Why there is no interval.
        is_baseline: Whether it is there to be beaten.
        p_holm: Of the paired gap to the first row, corrected for all pairs.
        seeds: Trainings that are averaged.
        n_episodes, n_sessions, n_hosts: What it was tested on.
    """

    _name_fields = ("model", "threat", "table", "agent")

    model: SafeName
    threat: SafeName
    table: SafeName
    agent: SafeName | None = None
    value: float
    low: float | None = None
    high: float | None = None
    why: FreeText | None = None
    is_baseline: bool = False
    p_holm: UnitFraction | None = None
    seeds: NonNegativeInt = 1
    n_episodes: NonNegativeInt = 0
    n_sessions: NonNegativeInt = 0
    n_hosts: NonNegativeInt = 0


class SplitProtocolScore(EventRecord, frozen=True, kw_only=True):
    """What the same model would have scored under another way of splitting.

    Attributes:
        recipe: How that holds out.
        value: The score.
        low, high: Its 95 % interval; None where there is none.
    """

    _name_fields = ("recipe",)

    recipe: SafeName
    value: float
    low: float | None = None
    high: float | None = None


class ScoreEvent(EventRecord, frozen=True, kw_only=True):
    """A leaderboard: who scored how well, how sure that is, and what an easier split would have claimed.

    Sent by ``produce metrics``.

    Attributes:
        metric: As in `metrics_v2.json`; it tested `tested` of `registered` malicious profiles.
        tested, registered: Malicious profiles with test windows, and those that there are.
        recipe: How it was held out.
        rows: Best first.
        inflation: Most flattering split first; all of one model, `inflation_of`.
        inflation_of: That model; None without one.
        headline: The run's first sentence.
        notes: What a reader must know beside it.
    """

    _name_fields = ("metric", "recipe", "inflation_of")

    metric: SafeName
    tested: NonNegativeInt
    registered: NonNegativeInt
    recipe: SafeName
    rows: Annotated[tuple[ScoreRow, ...], _Meta(max_length=200)]
    inflation: Annotated[tuple[SplitProtocolScore, ...], _Meta(max_length=32)] = ()
    inflation_of: SafeName | None = None
    headline: FreeText | None = None
    notes: Annotated[tuple[FreeText, ...], _Meta(max_length=32)] = ()


class ConfusionEvent(EventRecord, frozen=True, kw_only=True):
    """Truth (rows) against decision (columns) over the union of their labels, in windows, seeds averaged.

    Sent by ``produce metrics``.

    Attributes:
        model, threat, table: As in a run's predictions.
        recipe: How it was held out.
        agent: Of episodes where the guest's agent was ``on`` or ``off``; None = both.
        labels: Of rows and columns alike.
        counts: One row a label, one count a label.
        n_episodes, n_hosts: What it was tested on.
    """

    _name_fields = ("model", "recipe", "threat", "table", "agent", "labels")

    model: SafeName
    recipe: SafeName
    threat: SafeName
    table: SafeName
    agent: SafeName | None = None
    labels: Annotated[tuple[SafeName, ...], _Meta(min_length=1, max_length=32)]
    counts: Annotated[tuple[tuple[NonNegativeFloat, ...], ...], _Meta(max_length=32)]
    n_episodes: NonNegativeInt = 0
    n_hosts: NonNegativeInt = 0

    def __post_init__(self) -> None:
        """Refuse what is not a square."""
        EventRecord.__post_init__(self)
        k = len(self.labels)
        _require(len(self.counts) == k and all(len(row) == k for row in self.counts), f"counts are not {k} by {k}")


class PerfEvent(EventRecord, frozen=True, kw_only=True):
    """What a running process costs and how fast it is, measured on itself.

    Sent by ``watch`` and ``produce perf``.

    Attributes:
        process: What it does: ``watch``, ``replay``.
        vm: The machine that it watches; None where that is not one.
        measured_s: Over how long.
        windows, windows_per_s: That it judged in that time.
        latency_edges_ms: ``m`` rising edges of the histogram.
        latency_counts: ``m + 1`` counts: below the first edge, between, from the last on.
        p50_ms, p99_ms: Of the latencies themselves; None before the first window.
        rss_bytes: Its resident memory.
        cpu_cores: CPU seconds a second.
        late_ticks: Readings that came after their bin was closed.
        backlog: Events that wait to be sent.
        about: What was measured, where that needs a word.
    """

    _name_fields = ("process", "vm")

    process: SafeName
    vm: SafeName | None = None
    measured_s: NonNegativeFloat
    windows: NonNegativeInt
    windows_per_s: NonNegativeFloat
    latency_edges_ms: Annotated[tuple[NonNegativeFloat, ...], _Meta(max_length=64)]
    latency_counts: Annotated[tuple[NonNegativeInt, ...], _Meta(max_length=65)]
    p50_ms: NonNegativeFloat | None = None
    p99_ms: NonNegativeFloat | None = None
    rss_bytes: NonNegativeInt
    cpu_cores: NonNegativeFloat
    late_ticks: NonNegativeInt = 0
    backlog: NonNegativeInt = 0
    about: FreeText | None = None

    def __post_init__(self) -> None:
        """Refuse a histogram whose counts do not fit its edges."""
        EventRecord.__post_init__(self)
        edges = self.latency_edges_ms
        _require(list(edges) == sorted(set(edges)), "edges of latency do not rise")
        _require(
            len(self.latency_counts) == len(edges) + 1, f"{len(self.latency_counts)} counts for {len(edges)} edges"
        )


class ProfileCell(EventRecord, frozen=True, kw_only=True):
    """One number of a profile on a host.

    Attributes:
        value: The score; None where it cannot be said.
        low, high: Its 95 % interval; None where there is none.
        why: Why there is no number or no interval.
        n_windows, n_episodes: What it was tested on.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    why: FreeText | None = None
    n_windows: NonNegativeInt = 0
    n_episodes: NonNegativeInt = 0


class ProfileTableEvent(EventRecord, frozen=True, kw_only=True):
    """How well each profile is told on each host.

    Sent by ``produce profiles``.

    Attributes:
        metric, recipe: What is scored, and how it was held out.
        model, threat: As in a run's predictions.
        agent: Of episodes where the guest's agent was ``on`` or ``off``; None = both.
        profiles, hosts: The table's margins.
        cells: One row a profile, one cell a host; None = untested.
        untested_profiles: Registered profiles without a single test window.
    """

    _name_fields = ("metric", "recipe", "threat", "model", "agent", "profiles", "hosts", "untested_profiles")

    metric: SafeName
    recipe: SafeName
    threat: SafeName
    model: SafeName
    agent: SafeName | None = None
    profiles: SafeNames
    hosts: SafeNames
    cells: Annotated[
        tuple[Annotated[tuple[ProfileCell | None, ...], _Meta(max_length=256)], ...], _Meta(max_length=256)
    ]
    untested_profiles: SafeNames = ()

    def __post_init__(self) -> None:
        """Refuse a table whose cells do not fit its margins."""
        EventRecord.__post_init__(self)
        _require(len(self.cells) == len(self.profiles), f"{len(self.cells)} rows for {len(self.profiles)} profiles")
        for row in self.cells:
            _require(len(row) == len(self.hosts), f"a row of {len(row)} cells for {len(self.hosts)} hosts")


EventData = TelemetryEvent | PhaseEvent | ScoreEvent | ConfusionEvent | PerfEvent | ProfileTableEvent
EVENT_TYPES: dict[str, type[EventData]] = {
    "telemetry": TelemetryEvent, "phase": PhaseEvent, "score": ScoreEvent, "confusion": ConfusionEvent, "perf": PerfEvent,
    "profile": ProfileTableEvent,
}  # fmt: skip


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(words)


EVENT_FORMAT_VERSION = 1
MAX_EVENT_BYTES = 256 * 1024  # of one event
_EVENT_TYPE_NAMES = {kind: name for name, kind in EVENT_TYPES.items()}


class EventEnvelope(EventRecord, frozen=True, kw_only=True):
    """An event in its envelope.

    Attributes:
        id: The producer's number of it; a hub numbers events anew for its viewers.
        t_wall_ns: When it was made.
        run: What it belongs to: a run's name, or ``live``.
    """

    _name_fields = ("id", "run")

    id: SafeName
    t_wall_ns: TimestampNs
    run: SafeName
    data: EventData

    @property
    def type(self) -> str:
        """One of TYPES."""
        return _EVENT_TYPE_NAMES[type(self.data)]


class _RawEnvelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    v: int
    type: str
    id: SafeName
    t_wall_ns: TimestampNs
    run: SafeName
    data: msgspec.Raw


def render_event(event: EventEnvelope) -> bytes:
    """Give an event as one line of JSON, without its end.

    Raises:
        EventError: If it is larger than MAX_BYTES.
    """
    envelope = {
        "v": EVENT_FORMAT_VERSION, "type": event.type, "id": event.id, "t_wall_ns": event.t_wall_ns, "run": event.run,
        "data": event.data,
    }  # fmt: skip
    line = msgspec.json.encode(envelope)
    _check_event_size(line)
    return line


def parse_event(line: bytes) -> EventEnvelope:
    """Read an event.

    Raises:
        EventError: If it is larger than MAX_BYTES, malformed, of another version or of an unknown type.
    """
    _check_event_size(line)
    try:
        envelope = msgspec.json.decode(line, type=_RawEnvelope)
        if envelope.v != EVENT_FORMAT_VERSION:
            raise EventError(f"event: version {envelope.v}, this reader knows {EVENT_FORMAT_VERSION}")
        kind = EVENT_TYPES.get(envelope.type)
        if kind is None:
            raise EventError(f"event: no type {envelope.type[:40]!r}; there are {', '.join(EVENT_TYPES)}")
        data: Any = msgspec.json.decode(envelope.data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise EventError(f"event: {exc}; docs/formats/events.md says what one is") from exc
    return EventEnvelope(id=envelope.id, t_wall_ns=envelope.t_wall_ns, run=envelope.run, data=data)


def _check_event_size(line: bytes) -> None:
    if len(line) > MAX_EVENT_BYTES:
        raise EventError(f"event: {len(line):,} bytes, at most {MAX_EVENT_BYTES:,}; send fewer bins or rows in each")
