"""Watch one VM: read its sources twice a second, close bins by the clock, tell what the tracker decides."""

from __future__ import annotations

import asyncio
import os
import resource
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from phasewatch.errors import VmError
from phasewatch.grid.stream import LATENESS_NS
from phasewatch.live.announce import Announcer, Cost, is_news
from phasewatch.live.attach import Survey
from phasewatch.live.envelope import Event
from phasewatch.live.scorer import Scorer
from phasewatch.live.tracker import Decision, Step, Tracker
from phasewatch.record.base import Clock, Row, RowLog, TelemetrySource, Ticker
from phasewatch.record.process import read_start_ticks
from phasewatch.vocab import BIN_NS, Source

LOOK_NS = 250_000_000  # the longest sleep: a clock that steps is noticed within it
HEALTH_NS = 2_000_000_000
PERF_NS = 5_000_000_000
WORLD = Path("/proc")
TIME_UP, INTERRUPTED = "the time is up", "interrupted"  # why a watch ended


@dataclass(slots=True, kw_only=True)
class Watched:
    """What a watch came to.

    Attributes:
        why: Why it ended.
        windows, alarms: Judged windows, alarms raised.
        late, skipped, failed: Readings that came after their bin was closed, ticks that never were, readings that failed.
        restarts: How often the grid was begun anew because the clock jumped or the machine slept.
        states: What became of the VM, in the order of time: ``paused``, ``running``, ``rebooted``, ``silent``, ``gone``.
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
    states: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    not_saved: int = 0
    save_failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlets:
    """Where a watcher's news go.

    Attributes:
        emit: Takes every event; must not block. The second value is whether an alarm was raised or ended with it.
        say: Takes a line for people.
        keep: Takes every reading, for `--save`.
        on_step: Takes every closed bin, for `commission`.
        backlog: Gives how many events wait to be sent.
    """

    emit: Callable[[Event, bool], None]
    say: Callable[[str], None]
    keep: Callable[[Source, Row], None] | None = None
    on_step: Callable[[Step], None] | None = None
    backlog: Callable[[], int] = lambda: 0


class Watcher:
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
        found: Survey,
        sources: Sequence[TelemetrySource],
        scorer: Scorer | None,
        outlets: Outlets,
        clock: Clock,
        *,
        host: str = "",
    ) -> None:
        self._found, self._scorer, self._outlets, self._clock = found, scorer, outlets, clock
        self._logs = [RowLog(source.source, clock) for source in sources]
        self._ticker = Ticker(sources, self._logs, clock)
        self._tracker = Tracker(scorer)
        facts = found.facts
        self._announcer = Announcer(
            vm=facts.name, host=host, masked=tuple(found.masked), caveat=scorer.caveat(facts.accel, facts.arch) if scorer else ""
        )  # fmt: skip
        self._before: Decision | None = None
        self._latencies: deque[float] = deque(maxlen=1000)
        self._began_ns, self._cpu_s = clock.mono_ns(), _cpu_s()
        self.result = Watched()

    async def run(self, *, seconds: float = 0.0) -> Watched:
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
                self.close_due()
            if health.done():
                health.result()  # an outlet that broke there is not the end of the VM
            self.result.why = "the VM is gone" if health.done() else TIME_UP
        except asyncio.CancelledError:
            self.result.why = INTERRUPTED
            if task := asyncio.current_task():
                task.uncancel()  # else Python before 3.11.3 (Debian 12) takes time-outs of the farewell for it
        finally:
            for task in (ticking, health):
                task.cancel()
            await asyncio.gather(ticking, health, return_exceptions=True)
            self.close_due()
            result = self.result
            result.late, result.restarts = self._tracker.late, self._tracker.restarts
            result.skipped, result.failed = self._ticker.skipped, self._ticker.failed
        return result

    def close_due(self) -> None:
        """Hand the readings so far to the tracker, and tell what it decides."""
        for log in self._logs:
            rows, log.rows = log.rows, []
            for row in rows:
                self._tracker.add(log.source, row)
                if self._outlets.keep is not None:
                    self._outlets.keep(log.source, row)
        wall_ns, mono_ns = self._clock.wall_ns(), self._clock.mono_ns()
        restarts = self._tracker.restarts
        steps = self._tracker.advance(wall_ns, mono_ns)
        if self._tracker.restarts > restarts:
            self._outlets.say("the clock jumped, or the machine slept: windows begin anew")
        if not steps:
            return
        emit, announcer = self._outlets.emit, self._announcer
        for step in steps:
            if step.decision is not None and self._scorer is not None:
                event = announcer.phase(step.decision, self._scorer, now_ns=self._clock.wall_ns())
                news = is_news(self._before, step.decision)
                self.result.windows += 1
                self.result.alarms += step.decision.raised
                self._before = step.decision
                emit(event, news)
                self._latencies.append((self._clock.wall_ns() - step.bin.end_ns - LATENESS_NS) / 1e6)
            if self._outlets.on_step is not None:
                self._outlets.on_step(step)
        emit(announcer.telemetry(steps[-240:], now_ns=wall_ns, late=self._tracker.late, lost=self._lost()), False)

    def _lost(self) -> int:
        return self._ticker.skipped + self._ticker.failed

    async def _sleep(self, end_ns: int | None) -> None:
        """Sleep until the next bin is due, but never so long that a step of the clock goes unnoticed."""
        now_ns, wall_ns = self._clock.mono_ns(), self._clock.wall_ns()
        due_ns = now_ns + LOOK_NS
        if self._tracker.next_close_ns is not None:
            due_ns = min(now_ns + BIN_NS, now_ns + max(0, self._tracker.next_close_ns - wall_ns))
        await self._clock.sleep_until(min(due_ns, end_ns) if end_ns is not None else due_ns)

    async def _watch_health(self) -> None:
        """Look after the VM every two seconds, and at ourselves every five; ends when the VM is gone."""
        perf_ns = self._clock.mono_ns() + PERF_NS
        state, resets = "", self._resets()
        while True:
            await self._clock.sleep_until(self._clock.mono_ns() + HEALTH_NS)
            now = await self._state()
            if self._resets() > resets:
                resets = self._resets()
                self._note("rebooted")
            if now != state and (state or now != "running"):
                self._note(now)
            state = now
            if now == "gone":
                return
            if now == "silent":
                await self._reconnect()
            if self._clock.mono_ns() >= perf_ns:
                perf_ns = self._clock.mono_ns() + PERF_NS
                self._outlets.emit(self._announcer.perf(self.cost(), now_ns=self._clock.wall_ns()), False)

    def _note(self, state: str) -> None:
        self.result.states.append(state)
        self._outlets.say(f"{self._found.facts.name}: {state}")

    def _resets(self) -> int:
        monitor = self._found.monitor
        return monitor.events["RESET"] if monitor is not None else 0

    async def _state(self) -> str:
        """Say how the VM is: ``gone``, ``silent`` (its monitor does not answer), ``paused`` or ``running``."""
        if not is_alive(self._found):
            return "gone"
        if self._found.monitor is None:
            return "running"
        try:
            status = str((await self._found.monitor.ask("query-status"))["status"])
        except (VmError, KeyError, TypeError):
            return "silent" if is_alive(self._found) else "gone"
        return status

    async def _reconnect(self) -> None:
        """Try the monitor's door again: QEMU may have dropped us, or only be slow."""
        monitor = self._found.monitor
        if monitor is None or monitor.is_connected:
            return
        await monitor.close()
        with suppress(VmError):
            await monitor.connect()

    def cost(self) -> Cost:
        """Measure what watching costs, since it began."""
        measured_s = (self._clock.mono_ns() - self._began_ns) / 1e9
        return Cost(
            measured_s=measured_s, latencies_ms=tuple(max(0.0, ms) for ms in self._latencies), rss_bytes=_rss_bytes(),
            cpu_cores=max(0.0, (_cpu_s() - self._cpu_s) / measured_s) if measured_s else 0.0, late=self._tracker.late,
            backlog=self._outlets.backlog(),
        )  # fmt: skip


def is_alive(found: Survey) -> bool:
    """Return whether the VM's process still runs: the same one, and not one that only waits to be reaped."""
    return read_start_ticks(found.facts.pid, found.proc) == found.start_ticks


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _rss_bytes() -> int:
    with suppress(OSError, ValueError, IndexError):
        return int((WORLD / "self" / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
