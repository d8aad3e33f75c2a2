"""The six events that producers send and the dashboard shows: what they are, how they are written, what is refused.

Names are safe to hand to any page: one that is not of `NAME` is replaced when the event is made, wherever it came from.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec.structs import force_setattr

from phasewatch.errors import EventError
from phasewatch.vocab import PHASES

VERSION = 1
MAX_BYTES = 256 * 1024  # of one event
MAX_NAME = 80
NAME = re.compile(r"[A-Za-z0-9._/-]{1,80}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._/-]+")

_Meta = msgspec.Meta
Name = Annotated[str, _Meta(max_length=4096)]  # replaced if it is not of NAME
Words = Annotated[str, _Meta(max_length=600)]  # free text; a page sets it as text, never as markup
Count = Annotated[int, _Meta(ge=0, le=2**63 - 1)]
Stamp = Annotated[int, _Meta(ge=0, le=2**63 - 1)]  # ns since 1970, the host's wall clock
Share = Annotated[float, _Meta(ge=0, le=1)]
Amount = Annotated[float, _Meta(ge=0)]
Names = Annotated[tuple[Name, ...], _Meta(max_length=256)]


def safe_name(text: str) -> str:
    """Give a name back as it is, or one that is safe to show in its stead; different names stay different.

    >>> safe_name("held_out_host")
    'held_out_host'
    >>> safe_name("<b>")
    '_b_-507ca5'
    """
    if NAME.fullmatch(text):
        return text
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{_UNSAFE.sub('_', text)[: MAX_NAME - 7] or 'unnamed'}-{mark}"


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen record whose names are replaced where they are not safe."""

    _names: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in self._names:
            value: str | tuple[str, ...] | None = getattr(self, field)
            if value is not None:
                safe = safe_name(value) if isinstance(value, str) else tuple(safe_name(v) for v in value)
                force_setattr(self, field, safe)


class Telemetry(_Record, frozen=True, kw_only=True):
    """Some bins of one VM, one after the other.

    Attributes:
        vm: Which machine; the key of its scene.
        host: Its host or shape; None where that is not known.
        origin: ``recorded``, ``simulated`` or ``live``.
        t0_ns: Where the first bin begins.
        bin_s: Width of a bin.
        channels: Full names of the columns, at most 256.
        values: One row a bin, at most 240, of one value a channel in its unit; None = not known.
        flags: One a bin, `phasewatch.grid.align`.
        masked: Channels that this VM cannot give.
        late_rows, lost_rows: Readings that came too late, or never, since the machine is watched.
        lateness_s: How long after its end the last bin was closed; None in a replay.
    """

    _names = ("vm", "host", "origin", "channels", "masked")

    vm: Name
    host: Name | None = None
    origin: Name
    t0_ns: Stamp
    bin_s: Annotated[float, _Meta(gt=0, le=3600)]
    channels: Names
    values: Annotated[tuple[Annotated[tuple[float | None, ...], _Meta(max_length=256)], ...], _Meta(max_length=240)]
    flags: Annotated[tuple[Count, ...], _Meta(max_length=240)]
    masked: Names = ()
    late_rows: Count = 0
    lost_rows: Count = 0
    lateness_s: Amount | None = None

    def __post_init__(self) -> None:
        """Refuse rows of another width."""
        _Record.__post_init__(self)
        _need(len(set(self.channels)) == len(self.channels), "a channel stands twice")
        _need(len(self.flags) == len(self.values), f"{len(self.flags)} flags of {len(self.values)} bins")
        for row in self.values:
            _need(len(row) == len(self.channels), f"a bin of {len(row)} values for {len(self.channels)} channels")


class PhaseSeen(_Record, frozen=True, kw_only=True):
    """What a model says of one window of one VM.

    Attributes:
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

    _names = ("vm", "host", "decision", "truth", "model", "threat", "table", "filter")

    vm: Name
    host: Name | None = None
    t_start_ns: Stamp
    t_end_ns: Stamp
    p: tuple[Share, Share, Share, Share, Share]
    decision: Name
    truth: Name | None = None
    alarm: bool | None = None
    alarm_since_ns: Stamp | None = None
    threshold: Annotated[float, _Meta(ge=0)] | None = None
    model: Name
    threat: Name
    table: Name = "raw"
    filter: Name = "none"
    latency_ms: Amount | None = None
    caveat: Words | None = None

    def __post_init__(self) -> None:
        """Refuse phases that there are not, and a window that ends before it starts."""
        _Record.__post_init__(self)
        for phase in (self.decision, self.truth):
            _need(phase is None or phase in PHASES, f"no phase {phase!r}")
        _need(self.t_start_ns < self.t_end_ns, "the window ends before it starts")


class ScoreRow(_Record, frozen=True, kw_only=True):
    """One line of a leaderboard; without an interval `why` says why there is none.

    Attributes:
        agent: Scored on episodes where the guest's agent was ``on`` or ``off``; None = both.
        p_holm: Of the paired gap to the first row, corrected for all pairs.
    """

    _names = ("model", "threat", "table", "agent")

    model: Name
    threat: Name
    table: Name
    agent: Name | None = None
    value: float
    low: float | None = None
    high: float | None = None
    why: Words | None = None
    is_baseline: bool = False
    p_holm: Share | None = None
    seeds: Count = 1
    n_episodes: Count = 0
    n_sessions: Count = 0
    n_hosts: Count = 0


class Inflation(_Record, frozen=True, kw_only=True):
    """What the same model would have scored under another way of splitting."""

    _names = ("recipe",)

    recipe: Name
    value: float
    low: float | None = None
    high: float | None = None


class Score(_Record, frozen=True, kw_only=True):
    """A leaderboard: who scored how well, how sure that is, and what an easier split would have claimed.

    Attributes:
        metric: As in `metrics_v1.json`, without what follows its ``@``: `tested` of `registered` malicious profiles.
        rows: Best first.
        inflation: Most flattering split first; all of one model, `inflation_of`.
    """

    _names = ("metric", "recipe", "inflation_of")

    metric: Name
    tested: Count
    registered: Count
    recipe: Name
    rows: Annotated[tuple[ScoreRow, ...], _Meta(max_length=200)]
    inflation: Annotated[tuple[Inflation, ...], _Meta(max_length=32)] = ()
    inflation_of: Name | None = None
    headline: Words | None = None
    notes: Annotated[tuple[Words, ...], _Meta(max_length=32)] = ()


class Confusion(_Record, frozen=True, kw_only=True):
    """Truth (rows) against decision (columns) over the union of their labels, in windows, seeds averaged."""

    _names = ("model", "recipe", "threat", "table", "agent", "labels")

    model: Name
    recipe: Name
    threat: Name
    table: Name
    agent: Name | None = None
    labels: Annotated[tuple[Name, ...], _Meta(min_length=1, max_length=32)]
    counts: Annotated[tuple[tuple[Amount, ...], ...], _Meta(max_length=32)]
    n_episodes: Count = 0
    n_hosts: Count = 0

    def __post_init__(self) -> None:
        """Refuse what is not a square."""
        _Record.__post_init__(self)
        k = len(self.labels)
        _need(len(self.counts) == k and all(len(row) == k for row in self.counts), f"counts are not {k} by {k}")


class Perf(_Record, frozen=True, kw_only=True):
    """What a running process costs and how fast it is, measured on itself.

    Attributes:
        process: What it does: ``watch``, ``replay``.
        measured_s: Over how long.
        windows: That it judged in that time.
        latency_edges_ms: ``m`` rising edges of the histogram.
        latency_counts: ``m + 1`` counts: below the first edge, between, from the last on.
        p50_ms, p99_ms: Of the latencies themselves; None before the first window.
        cpu_cores: CPU seconds a second.
        late_ticks: Readings that came after their bin was closed.
        backlog: Events that wait to be sent.
    """

    _names = ("process", "vm")

    process: Name
    vm: Name | None = None
    measured_s: Amount
    windows: Count
    windows_per_s: Amount
    latency_edges_ms: Annotated[tuple[Amount, ...], _Meta(max_length=64)]
    latency_counts: Annotated[tuple[Count, ...], _Meta(max_length=65)]
    p50_ms: Amount | None = None
    p99_ms: Amount | None = None
    rss_bytes: Count
    cpu_cores: Amount
    late_ticks: Count = 0
    backlog: Count = 0
    about: Words | None = None

    def __post_init__(self) -> None:
        """Refuse a histogram whose counts do not fit its edges."""
        _Record.__post_init__(self)
        edges = self.latency_edges_ms
        _need(list(edges) == sorted(set(edges)), "edges of latency do not rise")
        _need(len(self.latency_counts) == len(edges) + 1, f"{len(self.latency_counts)} counts for {len(edges)} edges")


class ProfileCell(_Record, frozen=True, kw_only=True):
    """One number of a profile on a host."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    why: Words | None = None
    n_windows: Count = 0
    n_episodes: Count = 0


class ProfileTable(_Record, frozen=True, kw_only=True):
    """How well each profile is told on each host.

    Attributes:
        cells: One row a profile, one cell a host; None = untested.
        untested_profiles: Registered profiles without a single test window.
    """

    _names = ("metric", "recipe", "threat", "model", "agent", "profiles", "hosts", "untested_profiles")

    metric: Name
    recipe: Name
    threat: Name
    model: Name
    agent: Name | None = None
    profiles: Names
    hosts: Names
    cells: Annotated[
        tuple[Annotated[tuple[ProfileCell | None, ...], _Meta(max_length=256)], ...], _Meta(max_length=256)
    ]
    untested_profiles: Names = ()

    def __post_init__(self) -> None:
        """Refuse a table whose cells do not fit its margins."""
        _Record.__post_init__(self)
        _need(len(self.cells) == len(self.profiles), f"{len(self.cells)} rows for {len(self.profiles)} profiles")
        for row in self.cells:
            _need(len(row) == len(self.hosts), f"a row of {len(row)} cells for {len(self.hosts)} hosts")


Data = Telemetry | PhaseSeen | Score | Confusion | Perf | ProfileTable
TYPES: dict[str, type[Data]] = {
    "telemetry": Telemetry, "phase": PhaseSeen, "score": Score, "confusion": Confusion, "perf": Perf,
    "profile": ProfileTable,
}  # fmt: skip
_TYPE_OF = {kind: name for name, kind in TYPES.items()}


class Event(_Record, frozen=True, kw_only=True):
    """An event in its envelope.

    Attributes:
        id: The producer's number of it; a hub numbers events anew for its viewers.
        t_wall_ns: When it was made.
        run: What it belongs to: a run's name, or ``live``.
    """

    _names = ("id", "run")

    id: Name
    t_wall_ns: Stamp
    run: Name
    data: Data

    @property
    def type(self) -> str:
        """One of TYPES."""
        return _TYPE_OF[type(self.data)]


class _Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    v: int
    type: str
    id: Name
    t_wall_ns: Stamp
    run: Name
    data: msgspec.Raw


def render_event(event: Event) -> bytes:
    """Give an event as one line of JSON, without its end.

    Raises:
        EventError: If it is larger than MAX_BYTES.
    """
    envelope = {
        "v": VERSION, "type": event.type, "id": event.id, "t_wall_ns": event.t_wall_ns, "run": event.run,
        "data": event.data,
    }  # fmt: skip
    line = msgspec.json.encode(envelope)
    _bound(line)
    return line


def parse_event(line: bytes) -> Event:
    """Read an event.

    Raises:
        EventError: If it is larger than MAX_BYTES, malformed, of another version or of an unknown type.
    """
    _bound(line)
    try:
        envelope = msgspec.json.decode(line, type=_Envelope)
        if envelope.v != VERSION:
            raise EventError(f"event: version {envelope.v}, this reader knows {VERSION}")
        kind = TYPES.get(envelope.type)
        if kind is None:
            raise EventError(f"event: no type {envelope.type[:40]!r}; there are {', '.join(TYPES)}")
        data: Any = msgspec.json.decode(envelope.data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise EventError(f"event: {exc}; docs/formats/events.md says what one is") from exc
    return Event(id=envelope.id, t_wall_ns=envelope.t_wall_ns, run=envelope.run, data=data)


def _bound(line: bytes) -> None:
    if len(line) > MAX_BYTES:
        raise EventError(f"event: {len(line):,} bytes, at most {MAX_BYTES:,}; send fewer bins or rows in each")


def _need(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(words)
