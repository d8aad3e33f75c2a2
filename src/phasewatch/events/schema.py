"""Schema of the six event types that producers send and the dashboard shows, with their limits.

Names in events are safe for any page: a name that does not match `SAFE_NAME_PATTERN` is replaced on creation.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec.structs import force_setattr

from phasewatch.errors import EventError
from phasewatch.types import PHASES

__all__ = [
    "EVENT_FORMAT_VERSION",
    "EVENT_TYPES",
    "MAX_EVENT_BYTES",
    "MAX_NAME_CHARS",
    "MAX_RAW_NAME_CHARS",
    "SAFE_NAME_PATTERN",
    "AlarmEvidence",
    "ConfusionEvent",
    "EventData",
    "EventEnvelope",
    "EventRecord",
    "FreeText",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PerfEvent",
    "PhaseEvent",
    "ProfileCell",
    "ProfileTableEvent",
    "SafeName",
    "SafeNames",
    "ScoreEvent",
    "ScoreRow",
    "SplitProtocolScore",
    "TelemetryEvent",
    "TimestampNs",
    "UnitFraction",
    "make_safe_name",
    "parse_event",
    "render_event",
]

MAX_NAME_CHARS = 80
MAX_RAW_NAME_CHARS = 4096  # of a name in a received event, before it is replaced by a safe one
SAFE_NAME_PATTERN = re.compile(r"[A-Za-z0-9._/-]{1,80}")
_UNSAFE_CHARS_PATTERN = re.compile(r"[^A-Za-z0-9._/-]+")

_Meta = msgspec.Meta
SafeName = Annotated[str, _Meta(max_length=MAX_RAW_NAME_CHARS)]  # replaced if it does not match SAFE_NAME_PATTERN
FreeText = Annotated[str, _Meta(max_length=600)]  # pages must render it as text, never as markup
NonNegativeInt = Annotated[int, _Meta(ge=0, le=2**63 - 1)]
TimestampNs = Annotated[int, _Meta(ge=0, le=2**63 - 1)]  # nanoseconds since the epoch, wall clock of the host
UnitFraction = Annotated[float, _Meta(ge=0, le=1)]
NonNegativeFloat = Annotated[float, _Meta(ge=0)]
SafeNames = Annotated[tuple[SafeName, ...], _Meta(max_length=256)]


def make_safe_name(text: str) -> str:
    """Return the name unchanged if it is safe, else a safe replacement; different names have different replacements.

    >>> make_safe_name("held_out_host")
    'held_out_host'
    >>> make_safe_name("<b>")
    '_b_-507ca5'
    """
    if SAFE_NAME_PATTERN.fullmatch(text):
        return text
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{_UNSAFE_CHARS_PATTERN.sub('_', text)[: MAX_NAME_CHARS - 7] or 'unnamed'}-{mark}"


@lru_cache(maxsize=256)  # the channels of a machine are the same in each of its events
def _make_safe_names(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(make_safe_name(name) for name in names)


class EventRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of the event records; replaces unsafe names."""

    _name_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in self._name_fields:
            value: str | tuple[str, ...] | None = getattr(self, field)
            if value is not None:
                safe = make_safe_name(value) if isinstance(value, str) else _make_safe_names(value)
                force_setattr(self, field, safe)


class TelemetryEvent(EventRecord, frozen=True, kw_only=True):
    """Consecutive telemetry bins of one VM.

    Sent by ``watch`` and ``publish replay``.

    Attributes:
        vm: Name of the machine; the key of its scene.
        host: Host or shape of the machine; None if unknown.
        origin: ``recorded``, ``simulated`` or ``live``.
        t0_ns: Start of the first bin.
        bin_s: Width of a bin, seconds.
        channels: Full names of the columns, at most 256.
        values: One row per bin (at most 240) with one value per channel in its unit; None = unknown.
        flags: Flags of each bin, see `phasewatch.binning.align`.
        masked: Channels that are not available for this VM at present.
        late_rows, lost_rows: Number of readings that were late or lost since the start of the watch.
        lateness_s: Seconds between the end of the last bin and its closing; None in a replay.
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
        """Raise ValueError if the rows do not match the channels and flags."""
        EventRecord.__post_init__(self)
        _require(len(set(self.channels)) == len(self.channels), "a channel occurs twice")
        _require(len(self.flags) == len(self.values), f"{len(self.flags)} flags for {len(self.values)} bins")
        for row in self.values:
            _require(len(row) == len(self.channels), f"a bin with {len(row)} values for {len(self.channels)} channels")


class AlarmEvidence(EventRecord, frozen=True, kw_only=True):
    """A channel that moved far from its usual value when an alarm was raised.

    Attributes:
        channel: Full name of the channel.
        value: Its mean over the window of the alarm, in its unit.
        usual: Its median in the VM's quiet windows before, or in the VM's baseline.
        z: Deviation of `value` from `usual` in robust standard deviations.
    """

    _name_fields = ("channel",)

    channel: SafeName
    value: float
    usual: float
    z: float


class PhaseEvent(EventRecord, frozen=True, kw_only=True):
    """Prediction of a model for one window of one VM.

    Sent by ``watch`` and ``publish replay``.

    Attributes:
        vm: Name of the machine; the key of its scene.
        host: Host or shape of the machine; None if unknown.
        t_start_ns, t_end_ns: Start and end of the window.
        p: Probabilities of clean, armed, infecting, active, dormant, after calibration and filter.
        decision: The predicted phase.
        truth: The true phase by the labels of the recording; None if unknown.
        alarm: Whether the infection alarm is raised after this window; None without a threshold.
        alarm_since_ns: Time when it was raised.
        threshold: Its threshold of p(infecting), before the filter.
        activity_alarm: Whether the activity alarm is raised after this window; None without a threshold.
        activity_alarm_since_ns: Time when it was raised.
        activity_threshold: Its threshold of p(infecting) + p(active), before the filter.
        alarm_changes: Alarms that were raised or ended with this window: ``infection``, ``activity``.
        model, threat, table, filter: Model, channel set, input and filter, as in the predictions of a run.
        latency_ms: Milliseconds from the end of the window to this event; None in a replay.
        caveat: Warning for the viewer, such as an accelerator that is not in the training data.
        evidence: Channels that moved most, at most five; only with a raised alarm, else absent from the line.
    """

    _name_fields = ("vm", "host", "decision", "truth", "alarm_changes", "model", "threat", "table", "filter")

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
    activity_alarm: bool | None = None
    activity_alarm_since_ns: TimestampNs | None = None
    activity_threshold: Annotated[float, _Meta(ge=0)] | None = None
    alarm_changes: Annotated[tuple[SafeName, ...], _Meta(max_length=2)] = ()
    model: SafeName
    threat: SafeName
    table: SafeName = "raw"
    filter: SafeName = "none"
    latency_ms: NonNegativeFloat | None = None
    caveat: FreeText | None = None
    evidence: Annotated[tuple[AlarmEvidence, ...], _Meta(max_length=5)] | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown phase or a window that ends before it starts."""
        EventRecord.__post_init__(self)
        for phase in (self.decision, self.truth):
            _require(phase is None or phase in PHASES, f"unknown phase {phase!r}")
        _require(self.t_start_ns < self.t_end_ns, "the window ends before it starts")


class ScoreRow(EventRecord, frozen=True, kw_only=True):
    """One line of a leaderboard.

    Attributes:
        model, threat, table: Model, channel set and input, as in the predictions of a run.
        agent: Guest agent in the test episodes, ``on`` or ``off``; None = both.
        value: Score, of the metric of the leaderboard.
        low, high: 95 % interval; None without one.
        why: Reason for a missing interval.
        is_baseline: Whether the model is a baseline.
        p_holm: Holm-corrected p value of the paired difference to the first row.
        seeds: Number of seeds that are averaged.
        n_episodes, n_sessions, n_hosts: Size of the test set.
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
    """Score of a model under another split protocol.

    Attributes:
        recipe: Name of the split.
        value: Score.
        low, high: 95 % interval; None without one.
    """

    _name_fields = ("recipe",)

    recipe: SafeName
    value: float
    low: float | None = None
    high: float | None = None


class ScoreEvent(EventRecord, frozen=True, kw_only=True):
    """Leaderboard with intervals, and the scores of one model under other split protocols.

    Sent by ``publish metrics``.

    Attributes:
        metric: Name of the metric.
        tested, registered: Number of malicious profiles with test windows, and of all registered ones.
        recipe: Name of the split.
        rows: Leaderboard, best first.
        inflation: Scores by split protocol, easiest split first; all of the model `inflation_of`.
        inflation_of: Name of that model; None without one.
        headline: Headline of the run.
        notes: Notes of the evaluation.
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
    """Confusion matrix: number of windows by true phase (rows) and predicted phase (columns), averaged over seeds.

    Sent by ``publish metrics``.

    Attributes:
        model, threat, table: Model, channel set and input, as in the predictions of a run.
        recipe: Name of the split.
        agent: Guest agent in the test episodes, ``on`` or ``off``; None = both.
        labels: Labels of the rows and of the columns.
        counts: One row per label, with one count per label.
        n_episodes, n_hosts: Size of the test set.
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
        """Raise ValueError if the matrix does not match the labels."""
        EventRecord.__post_init__(self)
        k = len(self.labels)
        _require(len(self.counts) == k and all(len(row) == k for row in self.counts), f"counts are not {k} by {k}")


class PerfEvent(EventRecord, frozen=True, kw_only=True):
    """Latency, CPU and memory of a running process, measured by the process itself.

    Sent by ``watch`` and ``publish perf``.

    Attributes:
        process: Kind of process, such as ``watch`` or ``replay``.
        vm: Name of the watched machine; None without one.
        measured_s: Length of the measurement, seconds.
        windows, windows_per_s: Number and rate of the predicted windows.
        latency_edges_ms: ``m`` rising edges of the latency histogram.
        latency_counts: ``m + 1`` counts: below the first edge, between edges, and from the last edge.
        p50_ms, p99_ms: Quantiles of the latencies; None before the first window.
        rss_bytes: Resident memory.
        cpu_cores: CPU seconds per second.
        late_ticks: Number of readings that arrived after their bin was closed.
        backlog: Number of events that wait to be sent.
        about: Note on what was measured.
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
        """Raise ValueError if the counts of the histogram do not match its edges."""
        EventRecord.__post_init__(self)
        edges = self.latency_edges_ms
        _require(list(edges) == sorted(set(edges)), "the latency edges do not rise")
        _require(
            len(self.latency_counts) == len(edges) + 1, f"{len(self.latency_counts)} counts for {len(edges)} edges"
        )


class ProfileCell(EventRecord, frozen=True, kw_only=True):
    """Score of one profile on one host.

    Attributes:
        value: Score; None if it cannot be computed.
        low, high: 95 % interval; None without one.
        why: Reason for a missing score or interval.
        n_windows, n_episodes: Size of the test set.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    why: FreeText | None = None
    n_windows: NonNegativeInt = 0
    n_episodes: NonNegativeInt = 0


class ProfileTableEvent(EventRecord, frozen=True, kw_only=True):
    """Scores of one model by profile and host.

    Sent by ``publish profiles``.

    Attributes:
        metric, recipe: Name of the metric and of the split.
        model, threat: Model and channel set, as in the predictions of a run.
        agent: Guest agent in the test episodes, ``on`` or ``off``; None = both.
        profiles, hosts: Labels of the rows and of the columns.
        cells: One row per profile with one cell per host; None = untested.
        untested_profiles: Registered profiles without a test window.
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
        """Raise ValueError if the cells do not match the profiles and hosts."""
        EventRecord.__post_init__(self)
        _require(len(self.cells) == len(self.profiles), f"{len(self.cells)} rows for {len(self.profiles)} profiles")
        for row in self.cells:
            _require(len(row) == len(self.hosts), f"a row with {len(row)} cells for {len(self.hosts)} hosts")


EventData = TelemetryEvent | PhaseEvent | ScoreEvent | ConfusionEvent | PerfEvent | ProfileTableEvent
EVENT_TYPES: dict[str, type[EventData]] = {
    "telemetry": TelemetryEvent,
    "phase": PhaseEvent,
    "score": ScoreEvent,
    "confusion": ConfusionEvent,
    "perf": PerfEvent,
    "profile": ProfileTableEvent,
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


EVENT_FORMAT_VERSION = 2  # 1: one alarm, of p(infecting) + p(active)
MAX_EVENT_BYTES = 256 * 1024  # of one event
_EVENT_TYPE_NAMES = {kind: name for name, kind in EVENT_TYPES.items()}


class EventEnvelope(EventRecord, frozen=True, kw_only=True):
    """An event with its envelope.

    Attributes:
        id: Number of the event by its producer; a hub numbers events again for its viewers.
        t_wall_ns: Time when the event was created.
        run: Name of the run that the event belongs to, or ``live``.
        data: The event itself.
    """

    _name_fields = ("id", "run")

    id: SafeName
    t_wall_ns: TimestampNs
    run: SafeName
    data: EventData

    @property
    def type(self) -> str:
        """Name of the event type, a key of `EVENT_TYPES`."""
        return _EVENT_TYPE_NAMES[type(self.data)]


class _RawEnvelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    v: int
    type: str
    id: SafeName
    t_wall_ns: TimestampNs
    run: SafeName
    data: msgspec.Raw


def render_event(event: EventEnvelope) -> bytes:
    """Render an event as one line of JSON without a newline.

    Raises:
        EventError: If the line exceeds `MAX_EVENT_BYTES`.
    """
    envelope = {
        "v": EVENT_FORMAT_VERSION,
        "type": event.type,
        "id": event.id,
        "t_wall_ns": event.t_wall_ns,
        "run": event.run,
        "data": event.data,
    }
    line = msgspec.json.encode(envelope)
    _check_event_size(line)
    return line


def parse_event(line: bytes) -> EventEnvelope:
    """Parse an event.

    Raises:
        EventError: If the line exceeds `MAX_EVENT_BYTES`, is malformed, or has another version or an unknown type.
    """
    _check_event_size(line)
    try:
        envelope = msgspec.json.decode(line, type=_RawEnvelope)
        if envelope.v != EVENT_FORMAT_VERSION:
            raise EventError(f"event: version {envelope.v} is not supported; expected {EVENT_FORMAT_VERSION}")
        kind = EVENT_TYPES.get(envelope.type)
        if kind is None:
            raise EventError(f"event: unknown type {envelope.type[:40]!r}; expected one of {', '.join(EVENT_TYPES)}")
        data: Any = msgspec.json.decode(envelope.data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise EventError(f"event: {exc}; see docs/formats/events.md for the format") from exc
    return EventEnvelope(id=envelope.id, t_wall_ns=envelope.t_wall_ns, run=envelope.run, data=data)


def _check_event_size(line: bytes) -> None:
    if len(line) > MAX_EVENT_BYTES:
        raise EventError(f"event: {len(line):,} bytes, at most {MAX_EVENT_BYTES:,}; send fewer bins or rows per event")
