"""The six events that producers send and the dashboard shows: what each holds, and within which bounds.

Names are safe to hand to any page: one that is not of `NAME` is replaced when the event is made, wherever it came from.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, ClassVar

import msgspec
from msgspec.structs import force_setattr

from phasewatch.vocab import PHASES

MAX_NAME = 80
NAME_READ = 4096  # characters of a name that is read, to be replaced by a safe one
NAME = re.compile(r"[A-Za-z0-9._/-]{1,80}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._/-]+")

_Meta = msgspec.Meta
Name = Annotated[str, _Meta(max_length=NAME_READ)]  # replaced if it is not of NAME
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


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen record whose names are replaced where they are not safe."""

    _names: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in self._names:
            value: str | tuple[str, ...] | None = getattr(self, field)
            if value is not None:
                safe = safe_name(value) if isinstance(value, str) else tuple(safe_name(v) for v in value)
                force_setattr(self, field, safe)


class Telemetry(Record, frozen=True, kw_only=True):
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
        flags: One a bin, `phasewatch.grid.align`.
        masked: Channels that this VM cannot give, or not at present.
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
        Record.__post_init__(self)
        _need(len(set(self.channels)) == len(self.channels), "a channel stands twice")
        _need(len(self.flags) == len(self.values), f"{len(self.flags)} flags of {len(self.values)} bins")
        for row in self.values:
            _need(len(row) == len(self.channels), f"a bin of {len(row)} values for {len(self.channels)} channels")


class PhaseSeen(Record, frozen=True, kw_only=True):
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
        Record.__post_init__(self)
        for phase in (self.decision, self.truth):
            _need(phase is None or phase in PHASES, f"no phase {phase!r}")
        _need(self.t_start_ns < self.t_end_ns, "the window ends before it starts")


class ScoreRow(Record, frozen=True, kw_only=True):
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


class Inflation(Record, frozen=True, kw_only=True):
    """What the same model would have scored under another way of splitting.

    Attributes:
        recipe: How that holds out.
        value: The score.
        low, high: Its 95 % interval; None where there is none.
    """

    _names = ("recipe",)

    recipe: Name
    value: float
    low: float | None = None
    high: float | None = None


class Score(Record, frozen=True, kw_only=True):
    """A leaderboard: who scored how well, how sure that is, and what an easier split would have claimed.

    Sent by ``produce metrics``.

    Attributes:
        metric: As in `metrics_v1.json`, without what follows its ``@``: `tested` of `registered` malicious profiles.
        tested, registered: Malicious profiles with test windows, and those that there are.
        recipe: How it was held out.
        rows: Best first.
        inflation: Most flattering split first; all of one model, `inflation_of`.
        inflation_of: That model; None without one.
        headline: The run's first sentence.
        notes: What a reader must know beside it.
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


class Confusion(Record, frozen=True, kw_only=True):
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
        Record.__post_init__(self)
        k = len(self.labels)
        _need(len(self.counts) == k and all(len(row) == k for row in self.counts), f"counts are not {k} by {k}")


class Perf(Record, frozen=True, kw_only=True):
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
        Record.__post_init__(self)
        edges = self.latency_edges_ms
        _need(list(edges) == sorted(set(edges)), "edges of latency do not rise")
        _need(len(self.latency_counts) == len(edges) + 1, f"{len(self.latency_counts)} counts for {len(edges)} edges")


class ProfileCell(Record, frozen=True, kw_only=True):
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
    why: Words | None = None
    n_windows: Count = 0
    n_episodes: Count = 0


class ProfileTable(Record, frozen=True, kw_only=True):
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
        Record.__post_init__(self)
        _need(len(self.cells) == len(self.profiles), f"{len(self.cells)} rows for {len(self.profiles)} profiles")
        for row in self.cells:
            _need(len(row) == len(self.hosts), f"a row of {len(row)} cells for {len(self.hosts)} hosts")


Data = Telemetry | PhaseSeen | Score | Confusion | Perf | ProfileTable
TYPES: dict[str, type[Data]] = {
    "telemetry": Telemetry, "phase": PhaseSeen, "score": Score, "confusion": Confusion, "perf": Perf,
    "profile": ProfileTable,
}  # fmt: skip


def _need(holds: bool, words: str) -> None:
    if not holds:
        raise ValueError(words)
