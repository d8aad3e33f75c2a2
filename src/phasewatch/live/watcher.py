"""Watch one VM: read its sources twice a second, close bins by the clock, tell what the tracker decides."""

from __future__ import annotations

import asyncio
import os
import resource
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from phasewatch.errors import VmError
from phasewatch.grid.stream import LATENESS_NS
from phasewatch.live.announce import Announcer, Cost, CostMeter, is_news
from phasewatch.live.attach import Survey, channels_of
from phasewatch.live.capture import NetworkSource
from phasewatch.live.envelope import Event
from phasewatch.live.quality import WindowQuality
from phasewatch.live.scorer import Scorer
from phasewatch.live.silence import SilenceWatch
from phasewatch.live.tracker import Decision, Step, Tracker
from phasewatch.record.base import STAMPS, Clock, NotedSource, Row, RowLog, TelemetrySource, Ticker
from phasewatch.record.process import read_start_ticks
from phasewatch.record.qmp import QmpSource
from phasewatch.vocab import Source

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
        lost: Readings that never came, of each source that lost any; for the monitor also of each question, such as
            ``qmp query-blockstats``. A skipped tick counts for every source.
        contended: Judged windows in which the vCPUs waited for a core for more than a tenth of the time.
        restarts: How often the grid was begun anew because the clock jumped or the machine slept.
        states: What became of the VM, in the order of time: ``paused``, ``running``, ``rebooted``, ``silent``, ``gone``;
            of its host: ``contended``, ``uncontended``; of a source: ``proc silent``, ``qmp partly silent``, ``proc back``;
            and of its network, `phasewatch.live.capture.NetworkNotice`.
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
        self._cards = next((source for source in sources if isinstance(source, NetworkSource)), None)
        self._tracker = Tracker(scorer)
        facts = found.facts
        self._announcer = Announcer(
            vm=facts.name, host=host, masked=tuple(found.masked), caveat=scorer.caveat(facts.accel, facts.arch) if scorer else ""
        )  # fmt: skip
        self._masked = tuple(found.masked)
        self._before: Decision | None = None
        self._meter = CostMeter(clock.mono_ns(), _cpu_s())
        self._sources = tuple(sources)
        # A network source reports what it cannot see itself, with its reason.
        silent = [source.source for source in sources if not isinstance(source, NetworkSource)]
        self._silence = SilenceWatch(silent, found.masked, clock.mono_ns())
        self._quality = WindowQuality(scorer.channels if scorer else ())
        self._empty: Counter[Source] = Counter()
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
            self._tell_notes()
            result.lost = self._lost_of_each()
        return result

    def close_due(self) -> None:
        """Hand the readings so far to the tracker, and tell what it decides."""
        for log in self._logs:
            rows, log.rows = log.rows, []
            for row in rows:
                self._tracker.add(log.source, row)
                self._silence.see(log.source, row)
                self._empty[log.source] += all(value is None for value in row[STAMPS:])
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
            self._quality.add(step.bin.values, began=step.began)
            if step.decision is not None and self._scorer is not None:
                words = self._judge_quality()
                event = announcer.phase(step.decision, self._scorer, now_ns=self._clock.wall_ns(), words=words)
                news = is_news(self._before, step.decision)
                self.result.windows += 1
                self.result.alarms += step.decision.raised
                self._before = step.decision
                emit(event, news)
                latency_ms = (self._clock.wall_ns() - step.bin.end_ns - LATENESS_NS) / 1e6
                self._meter.add_window(self._clock.mono_ns(), latency_ms)
            if self._outlets.on_step is not None:
                self._outlets.on_step(step)
        self._tell_of_network()
        emit(announcer.telemetry(steps[-240:], now_ns=wall_ns, late=self._tracker.late, lost=self._lost()), False)

    def _judge_quality(self) -> list[str]:
        """Return what a reader must know of the readings of the window that just ended."""
        quality = self._quality
        self.result.contended += quality.is_crowded
        if quality.judge_contention():
            self._note("contended" if quality.is_contended else "uncontended")
        words = []
        if thin := quality.thin_sources():
            words.append(f"readings of {', '.join(thin)} are missing")
        if quality.is_crowded:
            words.append(
                f"contention: the vCPUs waited for {quality.wait_cores:.2f} cores, which holds every rate down"
            )
        return words

    def _tell_of_network(self) -> None:
        """Note what the cards have to say, and mask what they cannot give at present."""
        if self._cards is None:
            return
        for notice in self._cards.take_notices():
            self.result.states.append(notice.code)
            self._outlets.say(f"{self._found.facts.name}: {notice.code}: {notice.text}")
        blind = channels_of(Source.NETFLOW, self._cards.unknown_fields)
        self._announcer.masked = tuple(dict.fromkeys((*self._masked, *blind)))

    def _lost(self) -> int:
        return self._ticker.skipped + self._empty.total()

    def _lost_of_each(self) -> dict[str, int]:
        """Return the readings lost of each source, and of each question of the monitor."""
        lost = {str(s.source): self._empty[s.source] + self._ticker.skipped for s in self._sources}
        for source in self._sources:
            if isinstance(source, QmpSource):
                lost |= {f"{source.source} {question}": count for question, count in source.lost.items()}
        return {name: count for name, count in lost.items() if count}

    def _tell_notes(self) -> None:
        """Report what the sources note about themselves."""
        for source in self._sources:
            if isinstance(source, NotedSource):
                for line in source.take_notes():
                    self._outlets.say(f"{self._found.facts.name}: {source.source}: {line}")

    async def _sleep(self, end_ns: int | None) -> None:
        """Sleep until the next bin is due, but never so long that a step of the clock goes unnoticed."""
        now_ns, wall_ns = self._clock.mono_ns(), self._clock.wall_ns()
        due_ns = now_ns + LOOK_NS
        if self._tracker.next_close_ns is not None:
            due_ns = min(due_ns, now_ns + max(0, self._tracker.next_close_ns - wall_ns))
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
            self._tell_notes()
            self._tell_silence(is_running=now == "running")
            if now == "gone":
                return
            if now == "silent":
                await self._reconnect()
            if self._clock.mono_ns() >= perf_ns:
                perf_ns = self._clock.mono_ns() + PERF_NS
                self._outlets.emit(self._announcer.perf(self.cost(), now_ns=self._clock.wall_ns()), False)

    def _tell_silence(self, *, is_running: bool) -> None:
        now_ns = self._clock.mono_ns()
        if not is_running:
            self._silence.pause(now_ns)
        for note in self._silence.check(now_ns):
            self.result.states.append(note.state)
            self._outlets.say(f"{self._found.facts.name}: {note.words}")

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
        """Measure what watching costs, over the last minutes."""
        return self._meter.read(
            self._clock.mono_ns(), _cpu_s(), rss_bytes=_rss_bytes(), late=self._tracker.late, backlog=self._outlets.backlog()
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
