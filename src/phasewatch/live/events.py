"""Build the events of a watch from bins, decisions and costs (pure)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from msgspec import UNSET

from phasewatch.binning.stream import ClosedBin
from phasewatch.channels import CHANNEL_NAMES
from phasewatch.events.schema import AlarmEvidence, EventEnvelope, PerfEvent, PhaseEvent, TelemetryEvent
from phasewatch.inference.predictor import PhaseDecision, PhasePredictor
from phasewatch.live.tracker import TrackerStep
from phasewatch.models.alarm import AlarmKind
from phasewatch.types import BIN_NS, LIVE_STRIDE_BINS

__all__ = ["CostMeter", "EventBuilder", "WatchCost", "find_active_alarms", "find_alarm_changes"]

_RUN_NAME = "live"
_COST_WINDOW_NS = 300_000_000_000  # costs are measured over the last five minutes
_MIN_KNOWN_SHARE = 0.9  # share of the model's readings below which a decision carries a caveat
_LATENCY_EDGES_MS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)


@dataclass(slots=True)
class EventBuilder:
    """Builds the events of one VM and numbers them.

    Attributes:
        vm, host: Names of the VM and of its host.
        masked: Channels that the VM cannot provide at present.
        caveat: Caveat of every decision; empty if there is none.
        number: Number of the next event.
    """

    vm: str
    host: str
    masked: tuple[str, ...]
    caveat: str
    number: int = 1

    def build_telemetry(self, steps: Sequence[TrackerStep], *, now_ns: int, late: int, lost: int) -> EventEnvelope:
        """Build the event of consecutive bins.

        Args:
            steps: The bins, at least one.
            now_ns: Wall time.
            late: Readings so far that arrived after their bin was closed.
            lost: Readings so far that never arrived.
        """
        first = steps[0].bin
        data = TelemetryEvent(
            vm=self.vm,
            host=self.host,
            origin="live",
            t0_ns=first.end_ns - BIN_NS,
            bin_s=BIN_NS / 1e9,
            channels=CHANNEL_NAMES,
            values=tuple(_render_bin(step.bin) for step in steps),
            flags=tuple(step.bin_flags for step in steps),
            masked=self.masked,
            late_rows=late,
            lost_rows=lost,
            lateness_s=max(0.0, (now_ns - steps[-1].bin.end_ns) / 1e9),
        )
        return self._build_event(data, now_ns)

    def build_phase(
        self,
        decision: PhaseDecision,
        predictor: PhasePredictor,
        *,
        now_ns: int,
        changes: Sequence[AlarmKind] = (),
        caveats: Sequence[str] = (),
        evidence: tuple[AlarmEvidence, ...] = (),
    ) -> EventEnvelope:
        """Build the event of a decision.

        Args:
            decision: Of one window.
            predictor: The model that made it.
            now_ns: Wall time.
            changes: Alarms that were raised or ended with it, from `find_alarm_changes`.
            caveats: What limits the quality of this window's readings, in words.
            evidence: Channels that moved most, if an alarm was raised.
        """
        caveats = [*([self.caveat] if self.caveat else []), *caveats]
        if decision.known < _MIN_KNOWN_SHARE:
            caveats.append(f"{decision.known:.0%} of the model's readings were there")
        if decision.flags:
            caveats.append("late readings or a clock step in this window")
        a, b, c, d, e = (min(1.0, max(0.0, p)) for p in decision.belief)
        data = PhaseEvent(
            vm=self.vm,
            host=self.host,
            t_start_ns=decision.t_start_ns,
            t_end_ns=decision.t_end_ns,
            p=(a, b, c, d, e),
            decision=str(decision.phase),
            alarm=decision.alarm,
            alarm_since_ns=decision.since_ns,
            threshold=_get_threshold(predictor, AlarmKind.INFECTION),
            activity_alarm=decision.activity_alarm,
            activity_alarm_since_ns=decision.activity_since_ns,
            activity_threshold=_get_threshold(predictor, AlarmKind.ACTIVITY),
            alarm_changes=tuple(str(kind) for kind in changes),
            model=predictor.model,
            threat=predictor.threat,
            table=str(predictor.spec.table),
            filter="phase" if predictor.filter else "none",
            latency_ms=max(0.0, (now_ns - decision.t_end_ns) / 1e6),
            caveat="; ".join(caveats) or None,
            evidence=evidence or UNSET,
        )
        return self._build_event(data, now_ns)

    def build_perf(self, cost: WatchCost, *, now_ns: int) -> EventEnvelope:
        """Build the event of the watcher's own cost."""
        latencies = sorted(cost.latencies_ms)
        counts = [0] * (len(_LATENCY_EDGES_MS) + 1)
        for ms in latencies:
            counts[sum(ms >= edge for edge in _LATENCY_EDGES_MS)] += 1
        data = PerfEvent(
            process="watch",
            vm=self.vm,
            measured_s=cost.measured_s,
            windows=len(latencies),
            windows_per_s=len(latencies) / cost.measured_s if cost.measured_s else 0.0,
            latency_edges_ms=_LATENCY_EDGES_MS,
            latency_counts=tuple(counts),
            p50_ms=_compute_quantile(latencies, 0.5),
            p99_ms=_compute_quantile(latencies, 0.99),
            rss_bytes=cost.rss_bytes,
            cpu_cores=cost.cpu_cores,
            late_ticks=cost.late,
            backlog=cost.backlog,
            about="from a window's close, 1 s after its end, to its event",
        )
        return self._build_event(data, now_ns)

    def _build_event(self, data: TelemetryEvent | PhaseEvent | PerfEvent, now_ns: int) -> EventEnvelope:
        number, self.number = self.number, self.number + 1
        # Two VMs may have one name; their host ids differ.
        return EventEnvelope(id=f"{self.host or self.vm}/{number}"[-80:], t_wall_ns=now_ns, run=_RUN_NAME, data=data)


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchCost:
    """Cost of a watcher over the last `measured_s` seconds.

    Attributes:
        measured_s: Length of the measured time.
        latencies_ms: Latency of each decision in that time.
        rss_bytes: Resident memory of the process.
        cpu_cores: Mean number of cores used.
        late: Readings so far that arrived after their bin was closed.
        backlog: Events that wait to be sent.
    """

    measured_s: float
    latencies_ms: tuple[float, ...]
    rss_bytes: int
    cpu_cores: float
    late: int
    backlog: int


class CostMeter:
    """Measures the cost of a watcher over its last minutes.

    Args:
        mono_ns: Monotonic time of the start.
        cpu_s: CPU seconds of the process so far.
    """

    def __init__(self, mono_ns: int, cpu_s: float) -> None:
        self._latencies: deque[tuple[int, float]] = deque()
        self._marks: deque[tuple[int, float]] = deque([(mono_ns, cpu_s)])

    def add_window(self, mono_ns: int, latency_ms: float) -> None:
        """Add the latency of one decision."""
        self._latencies.append((mono_ns, max(0.0, latency_ms)))

    def read(self, mono_ns: int, cpu_s: float, *, rss_bytes: int, late: int, backlog: int) -> WatchCost:
        """Return the cost of the last five minutes, or since the start if that is shorter."""
        while len(self._marks) > 1 and self._marks[1][0] <= mono_ns - _COST_WINDOW_NS:
            self._marks.popleft()
        since_ns, cpu_then_s = self._marks[0]
        self._marks.append((mono_ns, cpu_s))
        while self._latencies and self._latencies[0][0] <= since_ns:
            self._latencies.popleft()
        measured_s = (mono_ns - since_ns) / 1e9
        return WatchCost(
            measured_s=measured_s,
            latencies_ms=tuple(ms for _, ms in self._latencies),
            rss_bytes=rss_bytes,
            cpu_cores=max(0.0, (cpu_s - cpu_then_s) / measured_s) if measured_s else 0.0,
            late=late,
            backlog=backlog,
        )


def _compute_quantile(ordered: Sequence[float], q: float) -> float | None:
    """Return the smallest value that a share `q` of the ordered values does not exceed; None without values."""
    return ordered[min(len(ordered) - 1, max(0, math.ceil(q * len(ordered)) - 1))] if ordered else None


def find_active_alarms(decision: PhaseDecision) -> frozenset[AlarmKind]:
    """Return the alarms that are on after a decision."""
    active = {AlarmKind.INFECTION: decision.alarm, AlarmKind.ACTIVITY: decision.activity_alarm}
    return frozenset(kind for kind, is_active in active.items() if is_active)


def find_alarm_changes(before: Collection[AlarmKind], now: PhaseDecision) -> tuple[AlarmKind, ...]:
    """Return the alarms that were raised, or ended, with a decision.

    Args:
        before: Alarms that were on before it.
        now: The decision.
    """
    active = find_active_alarms(now)
    return tuple(kind for kind in AlarmKind if (kind in before) != (kind in active))


def _get_threshold(predictor: PhasePredictor, kind: AlarmKind) -> float | None:
    rule = predictor.find_rule(kind, LIVE_STRIDE_BINS)
    return None if rule is None else rule.theta


def _render_bin(closed: ClosedBin) -> tuple[float | None, ...]:
    """Return the values of a bin, which are finite or NaN; None where unknown."""
    return tuple([value if value == value else None for value in closed.values.tolist()])
