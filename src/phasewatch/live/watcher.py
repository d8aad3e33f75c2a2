"""Watch one VM: read its sources twice a second, close bins by the clock, tell what the tracker decides."""

from __future__ import annotations

import asyncio
import os
import resource
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phasewatch.binning.stream import LATENESS_NS
from phasewatch.channels import CHANNEL_NAMES
from phasewatch.errors import VmError
from phasewatch.events.schema import EventEnvelope
from phasewatch.inference.predictor import PhaseDecision, PhasePredictor
from phasewatch.live.attach import VmSurvey, list_source_channels
from phasewatch.live.events import CostMeter, EventBuilder, WatchCost, has_alarm_changed
from phasewatch.live.silence import SilenceDetector
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
from phasewatch.telemetry.process import PROC_ROOT, read_start_ticks
from phasewatch.telemetry.qmp import QmpSource
from phasewatch.types import MAX_WAIT_CORES, WINDOW_BINS, SourceKind

MIN_READING_SHARE = 0.9  # share of a source's readings in a window
CONTENTION_WINDOWS = 3  # in a row, until contention is said to have begun or ended
_VCPU_WAIT_INDEX = CHANNEL_NAMES.index("proc.vcpu_wait")


class WindowQuality:
    """Keeps the bins of one window.

    Args:
        channels: Full names of those that the model reads.
    """

    def __init__(self, channels: Sequence[str]) -> None:
        self._bins: deque[NDArray[np.float32]] = deque(maxlen=WINDOW_BINS)
        self._places = {
            source: [CHANNEL_NAMES.index(name) for name in channels if name.startswith(f"{source}.")]
            for source in SourceKind
        }
        self._streak = 0
        self.is_contended = False

    def add(self, values: NDArray[np.float32], *, began: bool) -> None:
        """Add a bin, ``(46,)`` float32; `began` where bins begin anew."""
        if began:
            self._bins.clear()
        self._bins.append(values)

    def find_incomplete_sources(self) -> tuple[SourceKind, ...]:
        """Return the sources of which the model misses more than a tenth of the window's readings."""
        bins = np.array(self._bins)
        return tuple(
            source for source, places in self._places.items()
            if places and len(bins) and np.isfinite(bins[:, places]).mean() < MIN_READING_SHARE
        )  # fmt: skip

    @property
    def wait_cores(self) -> float:
        """Mean cores for which the vCPUs waited in the window; NaN where nobody knows."""
        wait = np.array([values[_VCPU_WAIT_INDEX] for values in self._bins])
        known = wait[np.isfinite(wait)]
        return float(known.mean()) if len(known) else float("nan")

    @property
    def has_cpu_contention(self) -> bool:
        """Whether they waited for so long that `inspect` would call a recording of it degraded."""
        return self.wait_cores > MAX_WAIT_CORES

    def update_contention(self) -> bool:
        """Update at the end of a window; return whether contention began or ended with it."""
        self._streak = self._streak + 1 if self.has_cpu_contention != self.is_contended else 0
        if self._streak < CONTENTION_WINDOWS:
            return False
        self.is_contended, self._streak = not self.is_contended, 0
        return True


MAX_SLEEP_NS = 250_000_000  # the longest sleep: a clock that steps is noticed within it
HEALTH_INTERVAL_NS = 2_000_000_000
PERF_INTERVAL_NS = 5_000_000_000
ENDED_BY_TIMEOUT, ENDED_BY_INTERRUPT = "the time is up", "interrupted"  # why a watch ended


@dataclass(slots=True, kw_only=True)
class WatchResult:
    """What a watch came to.

    Attributes:
        why: Why it ended.
        windows, alarms: Judged windows, alarms raised.
        late, skipped, failed: Readings that came after their bin was closed, ticks that never were, readings that failed.
        lost: Readings that never came, of each source that lost any; for the monitor also of each question, such as
            ``qmp query-blockstats``. A skipped tick counts for every source.
        contended: Judged windows in which the vCPUs waited for a core for more than a tenth of the time.
        restarts: How often the grid was begun anew because the clock jumped or the machine slept.
        states: What became of the VM, in the order of time: ``paused``, ``running``, ``rebooted``, ``silent``, ``gone``;
            of its host: ``contended``, ``uncontended``; of a source: ``proc silent``, ``qmp partly silent``, ``proc back``;
            and of its network, `phasewatch.telemetry.capture.NetworkNoticeCode`.
        saved: Bundles written.
        not_saved: Bundles that could not be written; `save_failure` says why.
    """

    why: str = ""
    windows: int = 0
    alarms: int = 0
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


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchCallbacks:
    """Where a watcher's news go.

    Attributes:
        on_event: Takes every event; must not block. The second value is whether an alarm was raised or ended with it.
        on_message: Takes a line for people.
        on_row: Takes every reading, for `--save`.
        on_step: Takes every closed bin, for `commission`.
        backlog: Gives how many events wait to be sent.
    """

    on_event: Callable[[EventEnvelope, bool], None]
    on_message: Callable[[str], None]
    on_row: Callable[[SourceKind, ReadingRow], None] | None = None
    on_step: Callable[[TrackerStep], None] | None = None
    backlog: Callable[[], int] = lambda: 0


class VmWatcher:
    """Watches one attached VM until it is gone, the time is up, or it is cancelled.

    Args:
        found: The VM.
        sources: From `attach`, open.
        scorer: The model; None only makes bins.
        outlets: Where news go.
        clock: The host's clocks, and the art of waiting.
        host: What the host is called in events.
    """

    def __init__(
        self,
        found: VmSurvey,
        sources: Sequence[TelemetrySource],
        scorer: PhasePredictor | None,
        outlets: WatchCallbacks,
        clock: AsyncClock,
        *,
        host: str = "",
    ) -> None:
        self._found, self._scorer, self._outlets, self._clock = found, scorer, outlets, clock
        self._logs = [RowLog(source.source, clock) for source in sources]
        self._ticker = TelemetrySampler(sources, self._logs, clock)
        self._cards = next((source for source in sources if isinstance(source, NetworkSource)), None)
        self._tracker = VmTracker(scorer)
        facts = found.facts
        self._announcer = EventBuilder(
            vm=facts.name, host=host, masked=tuple(found.masked), caveat=scorer.caveat(facts.accel, facts.arch) if scorer else ""
        )  # fmt: skip
        self._masked = tuple(found.masked)
        self._before: PhaseDecision | None = None
        self._meter = CostMeter(clock.mono_ns(), _read_cpu_s())
        self._sources = tuple(sources)
        # A network source reports what it cannot see itself, with its reason.
        silent = [source.source for source in sources if not isinstance(source, NetworkSource)]
        self._silence = SilenceDetector(silent, found.masked, clock.mono_ns())
        self._quality = WindowQuality(scorer.channels if scorer else ())
        self._empty: Counter[SourceKind] = Counter()
        self.result = WatchResult()

    async def run(self, *, seconds: float = 0.0) -> WatchResult:
        """Watch.

        Args:
            seconds: Until when; 0 for as long as the VM lives.
        """
        end_ns = self._clock.mono_ns() + round(seconds * 1e9) if seconds else None
        ticking = asyncio.create_task(self._ticker.run())
        health = asyncio.create_task(self._watch_health())
        try:
            while not health.done() and (end_ns is None or self._clock.mono_ns() < end_ns):
                await self._sleep(end_ns)
                if ticking.done():
                    ticking.result()  # a reader broke in a way that no reading may
                self.close_due_bins()
            if health.done():
                health.result()  # an outlet that broke there is not the end of the VM
            self.result.why = "the VM is gone" if health.done() else ENDED_BY_TIMEOUT
        except asyncio.CancelledError:
            self.result.why = ENDED_BY_INTERRUPT
            if task := asyncio.current_task():
                task.uncancel()  # else Python before 3.11.3 (Debian 12) takes time-outs of the farewell for it
        finally:
            for task in (ticking, health):
                task.cancel()
            await asyncio.gather(ticking, health, return_exceptions=True)
            self.close_due_bins()
            result = self.result
            result.late, result.restarts = self._tracker.late, self._tracker.restarts
            result.skipped, result.failed = self._ticker.skipped, self._ticker.failed
            self._report_notes()
            result.lost = self._count_lost_by_source()
        return result

    def close_due_bins(self) -> None:
        """Hand the readings so far to the tracker, and tell what it decides."""
        for log in self._logs:
            rows, log.rows = log.rows, []
            for row in rows:
                self._tracker.add(log.source, row)
                self._silence.add_row(log.source, row)
                self._empty[log.source] += all(value is None for value in row[N_STAMPS:])
                if self._outlets.on_row is not None:
                    self._outlets.on_row(log.source, row)
        wall_ns, mono_ns = self._clock.wall_ns(), self._clock.mono_ns()
        restarts = self._tracker.restarts
        steps = self._tracker.advance(wall_ns, mono_ns)
        if self._tracker.restarts > restarts:
            self._outlets.on_message("the clock jumped, or the machine slept: windows begin anew")
        if not steps:
            return
        emit, announcer = self._outlets.on_event, self._announcer
        for step in steps:
            self._quality.add(step.bin.values, began=step.began)
            if step.decision is not None and self._scorer is not None:
                words = self._assess_quality()
                event = announcer.build_phase(step.decision, self._scorer, now_ns=self._clock.wall_ns(), words=words)
                news = has_alarm_changed(self._before, step.decision)
                self.result.windows += 1
                self.result.alarms += step.decision.raised
                self._before = step.decision
                emit(event, news)
                latency_ms = (self._clock.wall_ns() - step.bin.end_ns - LATENESS_NS) / 1e6
                self._meter.add_window(self._clock.mono_ns(), latency_ms)
            if self._outlets.on_step is not None:
                self._outlets.on_step(step)
        self._report_network()
        emit(
            announcer.build_telemetry(steps[-240:], now_ns=wall_ns, late=self._tracker.late, lost=self._count_lost()),
            False,
        )

    def _assess_quality(self) -> list[str]:
        """Return what a reader must know of the readings of the window that just ended."""
        quality = self._quality
        self.result.contended += quality.has_cpu_contention
        if quality.update_contention():
            self._report_state("contended" if quality.is_contended else "uncontended")
        words = []
        if thin := quality.find_incomplete_sources():
            words.append(f"readings of {', '.join(thin)} are missing")
        if quality.has_cpu_contention:
            words.append(
                f"contention: the vCPUs waited for {quality.wait_cores:.2f} cores, which holds every rate down"
            )
        return words

    def _report_network(self) -> None:
        """Note what the cards have to say, and mask what they cannot give at present."""
        if self._cards is None:
            return
        for notice in self._cards.take_notices():
            self.result.states.append(notice.code)
            self._outlets.on_message(f"{self._found.facts.name}: {notice.code}: {notice.text}")
        blind = list_source_channels(SourceKind.NETFLOW, self._cards.unknown_fields)
        self._announcer.masked = tuple(dict.fromkeys((*self._masked, *blind)))

    def _count_lost(self) -> int:
        return self._ticker.skipped + self._empty.total()

    def _count_lost_by_source(self) -> dict[str, int]:
        """Return the readings lost of each source, and of each question of the monitor."""
        lost = {str(s.source): self._empty[s.source] + self._ticker.skipped for s in self._sources}
        for source in self._sources:
            if isinstance(source, QmpSource):
                lost |= {f"{source.source} {question}": count for question, count in source.lost.items()}
        return {name: count for name, count in lost.items() if count}

    def _report_notes(self) -> None:
        """Report what the sources note about themselves."""
        for source in self._sources:
            if isinstance(source, NoteSource):
                for line in source.pop_notes():
                    self._outlets.on_message(f"{self._found.facts.name}: {source.source}: {line}")

    async def _sleep(self, end_ns: int | None) -> None:
        """Sleep until the next bin is due, but never so long that a step of the clock goes unnoticed."""
        now_ns, wall_ns = self._clock.mono_ns(), self._clock.wall_ns()
        due_ns = now_ns + MAX_SLEEP_NS
        if self._tracker.next_close_ns is not None:
            due_ns = min(due_ns, now_ns + max(0, self._tracker.next_close_ns - wall_ns))
        await self._clock.sleep_until(min(due_ns, end_ns) if end_ns is not None else due_ns)

    async def _watch_health(self) -> None:
        """Look after the VM every two seconds, and at ourselves every five; ends when the VM is gone."""
        perf_ns = self._clock.mono_ns() + PERF_INTERVAL_NS
        state, resets = "", self._count_resets()
        while True:
            await self._clock.sleep_until(self._clock.mono_ns() + HEALTH_INTERVAL_NS)
            now = await self._read_state()
            if self._count_resets() > resets:
                resets = self._count_resets()
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
                perf_ns = self._clock.mono_ns() + PERF_INTERVAL_NS
                self._outlets.on_event(
                    self._announcer.build_perf(self.measure_cost(), now_ns=self._clock.wall_ns()), False
                )

    def _report_silence(self, *, is_running: bool) -> None:
        now_ns = self._clock.mono_ns()
        if not is_running:
            self._silence.pause(now_ns)
        for note in self._silence.find_changes(now_ns):
            self.result.states.append(note.state)
            self._outlets.on_message(f"{self._found.facts.name}: {note.text}")

    def _report_state(self, state: str) -> None:
        self.result.states.append(state)
        self._outlets.on_message(f"{self._found.facts.name}: {state}")

    def _count_resets(self) -> int:
        monitor = self._found.monitor
        return monitor.events["RESET"] if monitor is not None else 0

    async def _read_state(self) -> str:
        """Say how the VM is: ``gone``, ``silent`` (its monitor does not answer), ``paused`` or ``running``."""
        if not is_vm_alive(self._found):
            return "gone"
        if self._found.monitor is None:
            return "running"
        try:
            status = str((await self._found.monitor.ask("query-status"))["status"])
        except (VmError, KeyError, TypeError):
            return "silent" if is_vm_alive(self._found) else "gone"
        return status

    async def _reconnect(self) -> None:
        """Try the monitor's door again: QEMU may have dropped us, or only be slow."""
        monitor = self._found.monitor
        if monitor is None or monitor.is_connected:
            return
        await monitor.close()
        with suppress(VmError):
            await monitor.connect()

    def measure_cost(self) -> WatchCost:
        """Measure what watching costs, over the last minutes."""
        return self._meter.read(
            self._clock.mono_ns(), _read_cpu_s(), rss_bytes=_read_rss_bytes(), late=self._tracker.late, backlog=self._outlets.backlog()
        )  # fmt: skip


def is_vm_alive(found: VmSurvey) -> bool:
    """Return whether the VM's process still runs: the same one, and not one that only waits to be reaped."""
    return read_start_ticks(found.facts.pid, found.proc) == found.start_ticks


def _read_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _read_rss_bytes() -> int:
    with suppress(OSError, ValueError, IndexError):
        return int((PROC_ROOT / "self" / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
