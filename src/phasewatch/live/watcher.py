"""Watch one attached VM: sample its sources twice a second, close bins on time, report events and messages."""

from __future__ import annotations

import asyncio
import logging
import math
import resource
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
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
from phasewatch.inference.predictor import AlarmMemory, PhaseDecision, PhasePredictor
from phasewatch.live.events import CostMeter, EventBuilder, WatchCost, find_active_alarms, find_alarm_changes
from phasewatch.live.silence import SilenceDetector
from phasewatch.live.survey import VmSurvey, list_source_channels
from phasewatch.live.tracker import TrackedBin, TrackerStep, VmTracker, predict_due_windows
from phasewatch.live.watch_loop import WatchLoop
from phasewatch.models.alarm import AlarmKind
from phasewatch.telemetry.base import (
    N_STAMPS,
    AsyncClock,
    LossSource,
    NoteSource,
    ReadingRow,
    RowLog,
    TelemetrySampler,
    TelemetrySource,
)
from phasewatch.telemetry.capture import NetworkSource
from phasewatch.telemetry.qmp import REGISTER_FIELDS, QmpSource
from phasewatch.types import MAX_WAIT_CORES, WINDOW_BINS, SourceKind

__all__ = ["VmWatcher", "WatchCallbacks", "WatchEndReason", "WatchResult", "WindowQuality"]

logger = logging.getLogger(__name__)

_MIN_READING_SHARE = 0.9  # below this share of a source's readings, a window's source counts as incomplete
_CONTENTION_WINDOWS = 11  # consecutive windows, one each second, before the contention state changes
_HEALTH_INTERVAL_NS = 2_000_000_000
_PERF_INTERVAL_NS = 5_000_000_000
_MAX_EVENT_BINS = 240  # bins in one telemetry event
_MAX_STATES = 1000  # state changes kept of one watch, which may last for months
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
        self._wait_cores: deque[float] = deque(maxlen=WINDOW_BINS)
        self._known: deque[NDArray[np.int64]] = deque(maxlen=WINDOW_BINS)  # known readings per source of each bin
        self._members = np.array(
            [[name in channels and name.startswith(f"{source}.") for source in SourceKind] for name in CHANNEL_NAMES],
            np.int64,
        )
        self._n_members = self._members.sum(axis=0)
        self._streak = 0
        self.is_contended = False

    def add(self, values: NDArray[np.float32], *, began: bool) -> None:
        """Add one bin.

        Args:
            values: ``(73,)`` float32 in the order of `CHANNEL_NAMES`; NaN where unknown.
            began: Whether a new sequence of bins begins, which discards the bins before.
        """
        if began:
            self._wait_cores.clear()
            self._known.clear()
        self._wait_cores.append(float(values[_VCPU_WAIT_INDEX]))
        self._known.append(np.isfinite(values) @ self._members)

    def find_incomplete_sources(self) -> tuple[SourceKind, ...]:
        """Return the sources that lack more than a tenth of the window's readings for the model's channels."""
        if not self._known:
            return ()
        n_readings = len(self._known) * self._n_members
        share = np.array(self._known).sum(axis=0) / np.maximum(n_readings, 1)
        is_incomplete = (share < _MIN_READING_SHARE) & (n_readings > 0)
        return tuple(
            source for source, is_lacking in zip(SourceKind, is_incomplete.tolist(), strict=True) if is_lacking
        )

    @property
    def wait_cores(self) -> float:
        """Mean number of cores that the vCPUs waited for during the window; NaN where unknown."""
        known = [wait for wait in self._wait_cores if math.isfinite(wait)]
        return sum(known) / len(known) if known else math.nan

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
        states: The last thousand state changes in order of time. VM: ``paused``, ``running``, ``rebooted``,
            ``silent``, ``gone``; host: ``contended``, ``uncontended``; source: ``proc silent``,
            ``qmp partly silent``, ``proc back``; network: the codes of
            `phasewatch.telemetry.capture.NetworkNoticeCode`.
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
        wants_bins: Whether `on_event` needs the events of bins and costs. If not, they are not built, and counters
            that only they would show are not read.
        on_row: Receives every reading; None if nobody records them.
        on_step: Receives every closed bin; None if nobody needs them.
        on_vm_state: Receives the state of the VM when it changed, such as ``paused``; None if nobody needs it.
        count_backlog: Returns how many events wait to be sent.
    """

    on_event: Callable[[EventEnvelope, bool], None] = _ignore_event
    wants_bins: bool = True
    on_row: Callable[[SourceKind, ReadingRow], None] | None = None
    on_step: Callable[[TrackerStep], None] | None = None
    on_vm_state: Callable[[str], None] | None = None
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
        memory: Alarms of the same VM from an earlier watch.
        first_event: Number of the first event.
        grid_bins: As in `VmTracker`.

    Attributes:
        result: Counts so far.
        state: State of the VM as last seen, such as ``running``; empty at first.
        last_decision: The newest decision; None before the first.
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
        memory: Mapping[AlarmKind, AlarmMemory] | None = None,
        first_event: int = 1,
        grid_bins: int = 1,
    ) -> None:
        self._survey, self._predictor, self._callbacks, self._clock = survey, predictor, callbacks, clock
        self._sources = tuple(sources)
        self._logs = [RowLog(source.source, clock) for source in sources]
        self._sampler = TelemetrySampler(sources, self._logs, clock)
        self._ticking: asyncio.Task[None] | None = None
        # Looked up once: asking a protocol for its members takes longer than a reading.
        self._note_sources = [source for source in sources if isinstance(source, NoteSource)]
        self._loss_sources = [source for source in sources if isinstance(source, LossSource)]
        self._network = next((source for source in sources if isinstance(source, NetworkSource)), None)
        self._tracker = VmTracker(predictor, grid_bins=grid_bins)
        self._active_alarms = frozenset(kind for kind, alarm in (memory or {}).items() if alarm.state.is_active)
        self._tracker.restore_alarms(memory or {})
        facts = survey.facts
        self._skip_unused_registers()
        self._masked = tuple(survey.masked)
        self._unknown_fields: frozenset[str] = frozenset()
        self._events = EventBuilder(
            vm=facts.name,
            host=host,
            masked=self._masked,
            caveat=predictor.caveat(facts.accel, facts.arch) if predictor else "",
            number=first_event,
        )
        self.state = ""
        self.last_decision: PhaseDecision | None = None
        self._failed: asyncio.Future[None] | None = None
        self._meter = CostMeter(clock.mono_ns(), _read_cpu_s())
        # A network source reports missing data itself, with the reason.
        others = [source.source for source in sources if not isinstance(source, NetworkSource)]
        self._silence = SilenceDetector(others, survey.masked, clock.mono_ns())
        self._quality = WindowQuality(predictor.channels if predictor else ())
        self._reference = QuietReference(predictor.channels if predictor else ())
        self._n_empty: Counter[SourceKind] = Counter()
        self.result = WatchResult()

    def _skip_unused_registers(self) -> None:
        """Sample no registers, ten times a second, unless the model, an event or a recording shows them."""
        callbacks, predictor = self._callbacks, self._predictor
        is_shown = callbacks.wants_bins or callbacks.on_row is not None or callbacks.on_step is not None
        names = list_source_channels(SourceKind.QMP, REGISTER_FIELDS)
        if is_shown or predictor is None or not set(names).isdisjoint(predictor.channels):
            return
        for source in self._sources:
            if isinstance(source, QmpSource):
                source.stop_registers()
                reason = "not read: neither the model nor a receiver of events uses them"
                self._survey.mask(SourceKind.QMP, reason, REGISTER_FIELDS)

    @property
    def next_close_ns(self) -> int | None:
        """Wall time (ns) at which the next bin is due; None before the first proc reading."""
        return self._tracker.next_close_ns

    @property
    def restarts(self) -> int:
        """How often the bins began again because of the clock."""
        return self._tracker.restarts

    @property
    def next_event(self) -> int:
        """Number of the next event."""
        return self._events.number

    @property
    def alarms(self) -> dict[AlarmKind, AlarmMemory]:
        """The alarms and what their rules remember; empty without a model."""
        return self._tracker.alarms

    async def run(self, *, seconds: float = 0.0, loop: WatchLoop | None = None) -> WatchResult:
        """Watch until the end, and return what was counted.

        Args:
            seconds: Maximum duration; 0 watches for as long as the VM lives.
            loop: The running loop of a watch of several VMs; None runs one for this VM alone.

        Raises:
            Exception: If a source, the model or a callback failed with a programming error.
        """
        own = None
        if loop is None:
            loop = WatchLoop(self._clock)
            own = asyncio.create_task(loop.run())
        self._failed = asyncio.get_running_loop().create_future()
        health = asyncio.create_task(self._watch_health())
        deadline = asyncio.create_task(self._wait(seconds)) if seconds else None
        waited = [task for task in (health, self._failed, own, deadline) if task is not None]
        loop.add(self)
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            for task in waited:
                if task.done():
                    task.result()  # raises: a callback that failed is not the end of the VM
            self.result.why = WatchEndReason.VM_GONE if health.done() else WatchEndReason.TIMEOUT
        except asyncio.CancelledError:
            self.result.why = WatchEndReason.INTERRUPTED
            if current := asyncio.current_task():
                current.uncancel()  # else Python before 3.11.3 (Debian 12) takes time-outs of the clean-up for it
        finally:
            loop.remove(self)
            tasks = [task for task in (health, own, deadline, self._ticking) if task is not None]
            for each in (self._failed, *tasks):
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not self._failed.done() or self._failed.cancelled():
                closed = self.close_bins()
                self.report_bins(closed, predict_due_windows([b.window for b in closed if b.window is not None]))
            result = self.result
            result.late, result.restarts = self._tracker.late, self._tracker.restarts
            result.skipped, result.failed = self._sampler.skipped, self._sampler.failed
            self._report_notes()
            result.lost = self._count_lost_by_source()
        return result

    def start_tick(self) -> None:
        """Start one reading of the sources; skip it if the one before still runs."""
        before = self._ticking
        if before is not None and not before.done():
            self._sampler.skipped += 1
            return
        if before is not None and not before.cancelled() and (error := before.exception()) is not None:
            self.fail(error if isinstance(error, Exception) else RuntimeError(str(error)))
            return
        self._ticking = asyncio.create_task(self._sampler.tick())

    def add_skipped(self, count: int) -> None:
        """Count ticks that the loop skipped."""
        self._sampler.skipped += count

    def fail(self, error: Exception) -> None:
        """End the watch with an error."""
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(error)

    def close_bins(self) -> list[TrackedBin]:
        """Pass the new readings to the tracker, and close every bin that is due."""
        for log in self._logs:
            rows, log.rows = log.rows, []
            for row in rows:
                self._tracker.add(log.source, row)
                self._silence.add_row(log.source, row)
                self._n_empty[log.source] += all(value is None for value in row[N_STAMPS:])
                if self._callbacks.on_row is not None:
                    self._callbacks.on_row(log.source, row)
        return self._tracker.close_bins(self._clock.wall_ns(), self._clock.mono_ns())

    def report_bins(self, closed: Sequence[TrackedBin], predicted: Sequence[NDArray[np.float64] | Exception]) -> None:
        """Decide on closed bins, and report them.

        Args:
            closed: From `close_bins`.
            predicted: One entry for each window among them, from `predict_due_windows`.
        """
        if not closed:
            return
        steps = self._tracker.decide(closed, predicted)
        for step in steps:
            self._handle_step(step)
        self._report_network()
        if not self._callbacks.wants_bins:
            return
        event = self._events.build_telemetry(
            steps[-_MAX_EVENT_BINS:], now_ns=self._clock.wall_ns(), late=self._tracker.late, lost=self._count_lost()
        )
        self._callbacks.on_event(event, False)

    def _handle_step(self, step: TrackerStep) -> None:
        self._quality.add(step.bin.values, began=step.began)
        active = self._active_alarms if step.decision is None else find_active_alarms(step.decision)
        self._reference.add(step.bin.values, is_quiet=not active)
        if step.decision is not None and self._predictor is not None:
            caveats = self._assess_quality()
            changes = find_alarm_changes(self._active_alarms, step.decision)
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
            self._active_alarms = find_active_alarms(step.decision)
            self.last_decision = step.decision
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
            self._add_state(notice.code)
            logger.info("%s: %s: %s", self._survey.facts.name, notice.code, notice.text)
        unknown_fields = self._network.unknown_fields
        if unknown_fields != self._unknown_fields:
            self._unknown_fields = unknown_fields
            unknown = list_source_channels(SourceKind.NETFLOW, unknown_fields)
            self._events.masked = tuple(dict.fromkeys((*self._masked, *unknown)))

    def _count_lost(self) -> int:
        return self._sampler.skipped + self._n_empty.total()

    def _count_lost_by_source(self) -> dict[str, int]:
        """Return the number of lost readings per source and per monitor query, without zeros."""
        lost = {str(s.source): self._n_empty[s.source] + self._sampler.skipped for s in self._sources}
        for source in self._loss_sources:
            lost |= {f"{source.source} {query}": count for query, count in source.lost.items()}
        return {name: count for name, count in lost.items() if count}

    def _report_notes(self) -> None:
        for source in self._note_sources:
            for note in source.pop_notes():
                logger.info("%s: %s: %s", self._survey.facts.name, source.source, note)

    async def _wait(self, seconds: float) -> None:
        await self._clock.sleep_until(self._clock.mono_ns() + round(seconds * 1e9))

    async def _watch_health(self) -> None:
        """Check the VM every two seconds and the watcher's own cost every five; return when the VM is gone."""
        perf_ns = self._clock.mono_ns() + _PERF_INTERVAL_NS
        n_resets = self._count_resets()
        while True:
            await self._clock.sleep_until(self._clock.mono_ns() + _HEALTH_INTERVAL_NS)
            now = await self._read_state()
            if self._count_resets() > n_resets:
                n_resets = self._count_resets()
                self._report_state("rebooted")
            if now != self.state and (self.state or now != "running"):
                self._report_state(now)
            if now != self.state and self._callbacks.on_vm_state is not None:
                self._callbacks.on_vm_state(now)
            self.state = now
            self._report_notes()
            self._report_silence(is_running=now == "running")
            if now == "gone":
                return
            if now == "silent":
                await self._reconnect()
            if self._callbacks.wants_bins and self._clock.mono_ns() >= perf_ns:
                perf_ns = self._clock.mono_ns() + _PERF_INTERVAL_NS
                event = self._events.build_perf(self.measure_cost(), now_ns=self._clock.wall_ns())
                self._callbacks.on_event(event, False)

    def _report_silence(self, *, is_running: bool) -> None:
        now_ns = self._clock.mono_ns()
        if not is_running:
            self._silence.pause(now_ns)
        for note in self._silence.find_changes(now_ns):
            self._add_state(note.state)
            logger.log(
                logging.INFO if note.is_back else logging.WARNING, "%s: %s", self._survey.facts.name, note.render()
            )

    def _report_state(self, state: str) -> None:
        self._add_state(state)
        logger.info("%s: %s", self._survey.facts.name, state)

    def _add_state(self, state: str) -> None:
        self.result.states.append(state)
        del self.result.states[:-_MAX_STATES]

    def _count_resets(self) -> int:
        survey = self._survey
        if survey.domain is not None:
            return survey.domain.resets
        return survey.monitor.events["RESET"] if survey.monitor is not None else 0

    async def _read_state(self) -> str:
        """Return ``gone``, ``silent`` (the monitor or libvirt does not answer) or the state of QMP ``query-status``."""
        if not self._survey.is_alive:
            return "gone"
        if self._survey.domain is not None:
            return self._survey.domain.state
        if self._survey.monitor is None:
            return "running"
        try:
            return str((await self._survey.monitor.ask("query-status"))["status"])
        except (VmError, KeyError, TypeError):
            return "silent" if self._survey.is_alive else "gone"

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


def _read_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
