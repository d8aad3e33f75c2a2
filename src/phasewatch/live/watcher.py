"""Watch one attached VM: sample its sources twice a second, close bins on time, report events and messages."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from phasewatch.binning.stream import LATENESS_NS
from phasewatch.channels import CHANNEL_NAMES
from phasewatch.errors import VmError
from phasewatch.events.evidence import QuietReference
from phasewatch.events.perf import read_own_rss_bytes
from phasewatch.events.schema import EventEnvelope
from phasewatch.inference.predictor import PhaseDecision, PhasePredictor
from phasewatch.live.events import CostMeter, EventBuilder, WatchCost, find_alarm_changes
from phasewatch.live.silence import SilenceDetector
from phasewatch.live.survey import VmSurvey, list_source_channels
from phasewatch.live.tracker import TrackerStep, VmTracker
from phasewatch.telemetry.base import (
    N_STAMPS,
    AsyncClock,
    NoteSource,
    ReadingRow,
    RowLog,
    TelemetrySampler,
    TelemetrySource,
)
from phasewatch.telemetry.capture import NetworkSource
from phasewatch.telemetry.process import read_start_ticks
from phasewatch.telemetry.qmp import QmpSource
from phasewatch.types import MAX_WAIT_CORES, WINDOW_BINS, SourceKind

__all__ = ["VmWatcher", "WatchCallbacks", "WatchEndReason", "WatchResult", "WindowQuality", "is_vm_alive"]

logger = logging.getLogger(__name__)

_MIN_READING_SHARE = 0.9  # below this share of a source's readings, a window's source counts as incomplete
_CONTENTION_WINDOWS = 11  # consecutive windows, one each second, before the contention state changes
_MAX_SLEEP_NS = 250_000_000  # upper limit of one sleep, so that a clock step is noticed soon
_HEALTH_INTERVAL_NS = 2_000_000_000
_PERF_INTERVAL_NS = 5_000_000_000
_MAX_EVENT_BINS = 240  # bins in one telemetry event
_VCPU_WAIT_INDEX = CHANNEL_NAMES.index("proc.vcpu_wait")


class WatchEndReason(StrEnum):
    """Why a watch ended; the value is part of the command's JSON result."""

    TIMEOUT = "the time is up"
    INTERRUPTED = "interrupted"
    VM_GONE = "the VM is gone"


class WindowQuality:
    """Measures how complete and undisturbed the readings of the current window are.

    Args:
        channels: Full names of the channels that the model reads.

    Attributes:
        is_contended: Whether CPU contention has lasted for several windows.
    """

    def __init__(self, channels: Sequence[str]) -> None:
        self._bins: deque[NDArray[np.float32]] = deque(maxlen=WINDOW_BINS)
        self._columns = {
            source: [CHANNEL_NAMES.index(name) for name in channels if name.startswith(f"{source}.")]
            for source in SourceKind
        }
        self._streak = 0
        self.is_contended = False

    def add(self, values: NDArray[np.float32], *, began: bool) -> None:
        """Add one bin.

        Args:
            values: ``(73,)`` float32 in the order of `CHANNEL_NAMES`; NaN where unknown.
            began: Whether a new sequence of bins begins, which discards the bins before.
        """
        if began:
            self._bins.clear()
        self._bins.append(values)

    def find_incomplete_sources(self) -> tuple[SourceKind, ...]:
        """Return the sources that lack more than a tenth of the window's readings for the model's channels."""
        bins = np.array(self._bins)
        return tuple(
            source
            for source, columns in self._columns.items()
            if columns and len(bins) and np.isfinite(bins[:, columns]).mean() < _MIN_READING_SHARE
        )

    @property
    def wait_cores(self) -> float:
        """Mean number of cores that the vCPUs waited for during the window; NaN where unknown."""
        wait = np.array([values[_VCPU_WAIT_INDEX] for values in self._bins])
        known = wait[np.isfinite(wait)]
        return float(known.mean()) if len(known) else float("nan")

    @property
    def has_cpu_contention(self) -> bool:
        """Whether the vCPUs waited longer than `MAX_WAIT_CORES`, the limit that `inspect` uses for recordings."""
        return self.wait_cores > MAX_WAIT_CORES

    def update_contention(self) -> bool:
        """Update `is_contended` at the end of a window; return whether it changed."""
        self._streak = self._streak + 1 if self.has_cpu_contention != self.is_contended else 0
        if self._streak < _CONTENTION_WINDOWS:
            return False
        self.is_contended, self._streak = not self.is_contended, 0
        return True


@dataclass(slots=True, kw_only=True)
class WatchResult:
    """Counts and states of one finished watch.

    Attributes:
        why: Why it ended; None while it runs.
        windows: Number of windows with a decision.
        alarms, activity_alarms: Number of infection and of activity alarms raised.
        late: Readings that arrived after their bin was closed.
        skipped: Sampling ticks that were skipped.
        failed: Readings that raised an error.
        lost: Missing readings per source; for the QEMU monitor also per query, such as ``qmp query-blockstats``.
            A skipped tick counts for every source.
        contended: Windows in which the vCPUs waited for a core for more than a tenth of the time.
        restarts: How often binning restarted because the clock jumped or the host slept.
        states: State changes in order of time. VM: ``paused``, ``running``, ``rebooted``, ``silent``, ``gone``;
            host: ``contended``, ``uncontended``; source: ``proc silent``, ``qmp partly silent``, ``proc back``;
            network: the codes of `phasewatch.telemetry.capture.NetworkNoticeCode`.
        saved: Paths of the bundles that were written.
        not_saved: Number of bundles that could not be written.
        save_failure: The last write error; empty if there was none.
    """

    why: WatchEndReason | None = None
    windows: int = 0
    alarms: int = 0
    activity_alarms: int = 0
    late: int = 0
    skipped: int = 0
    failed: int = 0
    restarts: int = 0
    contended: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    not_saved: int = 0
    save_failure: str = ""


def _ignore_event(event: EventEnvelope, is_alarm_change: bool) -> None:
    """Do nothing."""


def _report_no_backlog() -> int:
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchCallbacks:
    """Receivers of a watch's data; messages for people go to `logging` instead. No callback may block.

    Attributes:
        on_event: Receives every event, and whether an alarm was raised or ended with it.
        on_row: Receives every reading; None if nobody records them.
        on_step: Receives every closed bin; None if nobody needs them.
        count_backlog: Returns how many events wait to be sent.
    """

    on_event: Callable[[EventEnvelope, bool], None] = _ignore_event
    on_row: Callable[[SourceKind, ReadingRow], None] | None = None
    on_step: Callable[[TrackerStep], None] | None = None
    count_backlog: Callable[[], int] = _report_no_backlog


class VmWatcher:
    """Watches one attached VM until it is gone, the time is up, or the task is cancelled.

    Args:
        survey: The VM.
        sources: Its open telemetry sources, from `attach`.
        predictor: The model; None only makes bins.
        callbacks: Receivers of events, readings and bins.
        clock: Clock of the host.
        host: Host name in events.

    Attributes:
        result: Counts so far.
    """

    def __init__(
        self,
        survey: VmSurvey,
        sources: Sequence[TelemetrySource],
        predictor: PhasePredictor | None,
        callbacks: WatchCallbacks,
        clock: AsyncClock,
        *,
        host: str = "",
    ) -> None:
        self._survey, self._predictor, self._callbacks, self._clock = survey, predictor, callbacks, clock
        self._sources = tuple(sources)
        self._logs = [RowLog(source.source, clock) for source in sources]
        self._sampler = TelemetrySampler(sources, self._logs, clock)
        self._network = next((source for source in sources if isinstance(source, NetworkSource)), None)
        self._tracker = VmTracker(predictor)
        facts = survey.facts
        self._masked = tuple(survey.masked)
        self._events = EventBuilder(
            vm=facts.name,
            host=host,
            masked=self._masked,
            caveat=predictor.caveat(facts.accel, facts.arch) if predictor else "",
        )
        self._last_decision: PhaseDecision | None = None
        self._meter = CostMeter(clock.mono_ns(), _read_cpu_s())
        # A network source reports missing data itself, with the reason.
        others = [source.source for source in sources if not isinstance(source, NetworkSource)]
        self._silence = SilenceDetector(others, survey.masked, clock.mono_ns())
        self._quality = WindowQuality(predictor.channels if predictor else ())
        self._reference = QuietReference(predictor.channels if predictor else ())
        self._n_empty: Counter[SourceKind] = Counter()
        self.result = WatchResult()

    async def run(self, *, seconds: float = 0.0) -> WatchResult:
        """Watch until the end, and return what was counted.

        Args:
            seconds: Maximum duration; 0 watches for as long as the VM lives.
        """
        end_ns = self._clock.mono_ns() + round(seconds * 1e9) if seconds else None
        sampling = asyncio.create_task(self._sampler.run())
        health = asyncio.create_task(self._watch_health())
        try:
            while not health.done() and (end_ns is None or self._clock.mono_ns() < end_ns):
                await self._sleep(end_ns)
                if sampling.done():
                    sampling.result()  # raises: a programming error in a source, which no reading may hide
                self.close_due_bins()
            if health.done():
                health.result()  # raises: a callback that failed there is not the end of the VM
            self.result.why = WatchEndReason.VM_GONE if health.done() else WatchEndReason.TIMEOUT
        except asyncio.CancelledError:
            self.result.why = WatchEndReason.INTERRUPTED
            if task := asyncio.current_task():
                task.uncancel()  # else Python before 3.11.3 (Debian 12) takes time-outs of the clean-up for it
        finally:
            for task in (sampling, health):
                task.cancel()
            await asyncio.gather(sampling, health, return_exceptions=True)
            self.close_due_bins()
            result = self.result
            result.late, result.restarts = self._tracker.late, self._tracker.restarts
            result.skipped, result.failed = self._sampler.skipped, self._sampler.failed
            self._report_notes()
            result.lost = self._count_lost_by_source()
        return result

    def close_due_bins(self) -> None:
        """Pass the new readings to the tracker, close every bin that is due, and report the decisions."""
        for log in self._logs:
            rows, log.rows = log.rows, []
            for row in rows:
                self._tracker.add(log.source, row)
                self._silence.add_row(log.source, row)
                self._n_empty[log.source] += all(value is None for value in row[N_STAMPS:])
                if self._callbacks.on_row is not None:
                    self._callbacks.on_row(log.source, row)
        wall_ns, mono_ns = self._clock.wall_ns(), self._clock.mono_ns()
        restarts = self._tracker.restarts
        steps = self._tracker.advance(wall_ns, mono_ns)
        if self._tracker.restarts > restarts:
            logger.warning("the clock jumped or the host slept: windows start again")
        if not steps:
            return
        for step in steps:
            self._handle_step(step)
        self._report_network()
        event = self._events.build_telemetry(
            steps[-_MAX_EVENT_BINS:], now_ns=wall_ns, late=self._tracker.late, lost=self._count_lost()
        )
        self._callbacks.on_event(event, False)

    def _handle_step(self, step: TrackerStep) -> None:
        self._quality.add(step.bin.values, began=step.began)
        last = step.decision or self._last_decision
        self._reference.add(step.bin.values, is_quiet=last is None or not (last.alarm or last.activity_alarm))
        if step.decision is not None and self._predictor is not None:
            caveats = self._assess_quality()
            changes = find_alarm_changes(self._last_decision, step.decision)
            is_raised = step.decision.raised or step.decision.activity_raised
            event = self._events.build_phase(
                step.decision,
                self._predictor,
                now_ns=self._clock.wall_ns(),
                changes=changes,
                caveats=caveats,
                evidence=self._reference.explain() if is_raised else (),
            )
            self.result.windows += 1
            self.result.alarms += step.decision.raised
            self.result.activity_alarms += step.decision.activity_raised
            self._last_decision = step.decision
            self._callbacks.on_event(event, bool(changes))
            latency_ms = (self._clock.wall_ns() - step.bin.end_ns - LATENESS_NS) / 1e6
            self._meter.add_window(self._clock.mono_ns(), latency_ms)
        if self._callbacks.on_step is not None:
            self._callbacks.on_step(step)

    def _assess_quality(self) -> list[str]:
        """Return caveats about the readings of the window that just ended."""
        quality = self._quality
        self.result.contended += quality.has_cpu_contention
        if quality.update_contention():
            self._report_state("contended" if quality.is_contended else "uncontended")
        caveats = []
        if incomplete := quality.find_incomplete_sources():
            caveats.append(f"readings of {', '.join(incomplete)} are missing")
        if quality.has_cpu_contention:
            caveats.append(f"contention: the vCPUs waited for {quality.wait_cores:.2f} cores, which lowers every rate")
        return caveats

    def _report_network(self) -> None:
        """Report the notices of the network source, and mask the channels that it cannot read at present."""
        if self._network is None:
            return
        for notice in self._network.pop_notices():
            self.result.states.append(notice.code)
            logger.info("%s: %s: %s", self._survey.facts.name, notice.code, notice.text)
        unknown = list_source_channels(SourceKind.NETFLOW, self._network.unknown_fields)
        self._events.masked = tuple(dict.fromkeys((*self._masked, *unknown)))

    def _count_lost(self) -> int:
        return self._sampler.skipped + self._n_empty.total()

    def _count_lost_by_source(self) -> dict[str, int]:
        """Return the number of lost readings per source and per monitor query, without zeros."""
        lost = {str(s.source): self._n_empty[s.source] + self._sampler.skipped for s in self._sources}
        for source in self._sources:
            if isinstance(source, QmpSource):
                lost |= {f"{source.source} {query}": count for query, count in source.lost.items()}
        return {name: count for name, count in lost.items() if count}

    def _report_notes(self) -> None:
        for source in self._sources:
            if isinstance(source, NoteSource):
                for note in source.pop_notes():
                    logger.info("%s: %s: %s", self._survey.facts.name, source.source, note)

    async def _sleep(self, end_ns: int | None) -> None:
        """Sleep until the next bin is due, at most `_MAX_SLEEP_NS`."""
        now_ns, wall_ns = self._clock.mono_ns(), self._clock.wall_ns()
        due_ns = now_ns + _MAX_SLEEP_NS
        if self._tracker.next_close_ns is not None:
            due_ns = min(due_ns, now_ns + max(0, self._tracker.next_close_ns - wall_ns))
        await self._clock.sleep_until(min(due_ns, end_ns) if end_ns is not None else due_ns)

    async def _watch_health(self) -> None:
        """Check the VM every two seconds and the watcher's own cost every five; return when the VM is gone."""
        perf_ns = self._clock.mono_ns() + _PERF_INTERVAL_NS
        state, n_resets = "", self._count_resets()
        while True:
            await self._clock.sleep_until(self._clock.mono_ns() + _HEALTH_INTERVAL_NS)
            now = await self._read_state()
            if self._count_resets() > n_resets:
                n_resets = self._count_resets()
                self._report_state("rebooted")
            if now != state and (state or now != "running"):
                self._report_state(now)
            state = now
            self._report_notes()
            self._report_silence(is_running=now == "running")
            if now == "gone":
                return
            if now == "silent":
                await self._reconnect()
            if self._clock.mono_ns() >= perf_ns:
                perf_ns = self._clock.mono_ns() + _PERF_INTERVAL_NS
                event = self._events.build_perf(self.measure_cost(), now_ns=self._clock.wall_ns())
                self._callbacks.on_event(event, False)

    def _report_silence(self, *, is_running: bool) -> None:
        now_ns = self._clock.mono_ns()
        if not is_running:
            self._silence.pause(now_ns)
        for note in self._silence.find_changes(now_ns):
            self.result.states.append(note.state)
            logger.log(
                logging.INFO if note.is_back else logging.WARNING, "%s: %s", self._survey.facts.name, note.render()
            )

    def _report_state(self, state: str) -> None:
        self.result.states.append(state)
        logger.info("%s: %s", self._survey.facts.name, state)

    def _count_resets(self) -> int:
        monitor = self._survey.monitor
        return monitor.events["RESET"] if monitor is not None else 0

    async def _read_state(self) -> str:
        """Return ``gone``, ``silent`` (the monitor does not answer) or the state of QMP ``query-status``."""
        if not is_vm_alive(self._survey):
            return "gone"
        if self._survey.monitor is None:
            return "running"
        try:
            return str((await self._survey.monitor.ask("query-status"))["status"])
        except (VmError, KeyError, TypeError):
            return "silent" if is_vm_alive(self._survey) else "gone"

    async def _reconnect(self) -> None:
        """Connect to the monitor again if the connection broke; QEMU may also just be slow."""
        monitor = self._survey.monitor
        if monitor is None or monitor.is_connected:
            return
        await monitor.close()
        with suppress(VmError):
            await monitor.connect()

    def measure_cost(self) -> WatchCost:
        """Return the watcher's own CPU, memory and latency over the last minutes."""
        return self._meter.read(
            self._clock.mono_ns(),
            _read_cpu_s(),
            rss_bytes=read_own_rss_bytes(),
            late=self._tracker.late,
            backlog=self._callbacks.count_backlog(),
        )


def is_vm_alive(survey: VmSurvey) -> bool:
    """Return whether the VM's QEMU process still runs; a zombie or a later process with its pid does not count."""
    return read_start_ticks(survey.facts.pid, survey.proc) == survey.start_ticks


def _read_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
