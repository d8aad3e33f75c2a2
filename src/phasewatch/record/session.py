"""One slot played on one machine: warm up, settle, walk through the phases, read all the while."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from phasewatch.channels import raw_fields
from phasewatch.episode.model import LabelMark
from phasewatch.errors import VmError
from phasewatch.record.base import STAMPS, Clock, RowLog, TelemetrySource, Ticker
from phasewatch.record.driver import Ack
from phasewatch.record.guest import GuestReader
from phasewatch.record.plan import Slot
from phasewatch.record.vm import Machine, MachineFacts
from phasewatch.vocab import ClockBase, Phase, Source

HOST_SOURCES = (Source.PROC, Source.QMP, Source.NETFLOW)
LEAD_S = 10.0  # of readings before the first label: they open the first bin, and our own polling settles too
PREPARE_TIMEOUT_S = 180.0  # warm-up or installation, with a neighbour that does the same
TAIL_NS = 500_000_000  # nothing is begun in the last half second
HALF_SECOND_NS = 500_000_000
ENDS_BY_ITSELF = (Phase.INFECTING, Phase.ACTIVE)  # whose `finished` means that the phase is over

ClockPairs = dict[ClockBase, tuple[tuple[int, int], tuple[int, int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """What one played slot gave.

    Attributes:
        marks: Phase starts, and the end.
        logs: Rows per source; the guest's only if its agent was on.
        pairs: The host's other clocks against Unix time, at the first reading and at the last.
        settle_s: From the guest's first word to the first label.
        late, skipped, failed: Ticks (see `Ticker`).
        guest_bad: The agent's lines that were refused or dropped.
    """

    facts: MachineFacts
    marks: tuple[LabelMark, ...]
    logs: dict[Source, RowLog]
    pairs: ClockPairs
    settle_s: float
    late: int
    skipped: int
    failed: int
    guest_bad: int

    @property
    def vcpu_wait(self) -> float | None:
        """Cores' worth of time for which the vCPU threads waited between first label and end; None if never read."""
        at = STAMPS + [spec.field for spec in raw_fields(Source.PROC)].index("vcpu_wait_ns")
        t0_ns, end_ns = self.marks[0].t_mono_ns, self.marks[-1].t_mono_ns
        read = [(row[1] or 0, row[at] or 0) for row in self.logs[Source.PROC].rows if row[at] is not None]
        read = [(t_mono_ns, waited_ns) for t_mono_ns, waited_ns in read if t0_ns <= t_mono_ns <= end_ns]
        if len(read) < 2:
            return None
        (first_ns, first), (last_ns, last) = read[0], read[-1]
        return (last - first) / (last_ns - first_ns)


async def play(machine: Machine, slot: Slot, clock: Clock) -> Take:
    """Boot a machine, play a slot on it and stop it, whatever happens.

    Raises:
        VmError: If it does not boot, dies, refuses a command or stays silent.
    """
    try:
        facts = await machine.boot()
        died = asyncio.ensure_future(machine.died())
        played = asyncio.ensure_future(_Performance(machine, slot, clock, facts).play())
        try:
            await asyncio.wait((died, played), return_when=asyncio.FIRST_COMPLETED)
            if not played.done():
                raise VmError(f"{slot.host_id}: QEMU died in the middle of {slot.sample_name}")
            return await played
        finally:
            for task in (died, played):
                task.cancel()
            await asyncio.gather(died, played, return_exceptions=True)
    finally:
        stopping = asyncio.ensure_future(machine.stop())
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            await stopping  # a machine half stopped would run on for as long as we do
            raise


class _Performance:
    """The state of one slot being played."""

    def __init__(self, machine: Machine, slot: Slot, clock: Clock, facts: MachineFacts) -> None:
        self._machine, self._slot, self._clock, self._facts = machine, slot, clock, facts
        self._marks: list[LabelMark] = []
        self._logs = {source: RowLog(source, clock) for source in HOST_SOURCES}
        self._guest: GuestReader | None = None
        if slot.agent:
            self._logs[Source.GUEST] = RowLog(Source.GUEST, clock)
            self._guest = machine.listen(self._logs[Source.GUEST])

    async def play(self) -> Take:
        """Play the slot to its end."""
        try:
            await self._prepare()
            return await self._record()
        finally:
            if self._guest:
                await self._guest.close()

    async def _record(self) -> Take:
        """Wait until the machine has settled, then read while the phases pass."""
        clock, slot, guest, logs = self._clock, self._slot, self._guest, self._logs
        lead_ns = round(LEAD_S * 1e9)
        t0_ns = max(self._facts.booted_mono_ns + round(slot.settle_s * 1e9), clock.mono_ns() + lead_ns)
        await clock.sleep_until(t0_ns - lead_ns)

        sources = self._machine.sources()
        ticker = Ticker([*sources], [logs[source.source] for source in sources], clock)
        first = _read_clocks(clock)
        ticking: asyncio.Task[None] | None = None
        try:
            for source in sources:
                await self._open(source)
            if guest:
                guest.start()
            ticking = asyncio.create_task(ticker.run())
            # The first label falls on a whole half second, so that ticks stay in the middle of bins.
            now_ns = clock.mono_ns()
            t0_ns = max(t0_ns, now_ns)
            t0_ns += -(clock.wall_ns() + t0_ns - now_ns) % HALF_SECOND_NS
            await clock.sleep_until(t0_ns)
            await self._walk()
        finally:
            if ticking is not None:
                ticking.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await ticking
            for source in sources:
                await source.close()
        last = _read_clocks(clock)
        await self._machine.send("hello")  # a guest that hung in its last phase has not played it
        return Take(
            facts=self._facts,
            marks=tuple(self._marks),
            logs=logs,
            pairs={base: (first[base], last[base]) for base in first},
            settle_s=round((self._marks[0].t_mono_ns - self._facts.booted_mono_ns) / 1e9, 3),
            late=ticker.late,
            skipped=ticker.skipped,
            failed=ticker.failed,
            guest_bad=guest.bad + guest.dropped if guest else 0,
        )

    async def _prepare(self) -> None:
        """Bring the guest to the state in which the first label will find it."""
        slot = self._slot
        await self._machine.send("hello")
        await self._complete("warmup")
        if self._guest:
            await self._open(self._guest)
            await self._machine.send("agent", "on")
        await self._machine.send("chatter", str(slot.plan_seed), f"{slot.chatter_s:g}")
        if slot.background:
            await self._machine.send("load", slot.background, str(slot.plan_seed), *_spell(slot.background_knobs))
        if slot.phases[0][0] is not Phase.CLEAN:
            await self._complete("install", *self._words(slot.phases[0][0]))

    async def _walk(self) -> None:
        """Step through the phases; a phase whose work ended by itself is followed at once."""
        clock = self._clock
        plan = list(self._slot.phases)
        ack = await self._step(plan[0][0])
        end_ns = ack.t_mono_ns + round(self._slot.duration_s * 1e9)
        at = 0
        while True:
            phase, seconds = plan[at]
            until_ns = end_ns if at == len(plan) - 1 else min(end_ns, ack.t_mono_ns + round(seconds * 1e9))
            ended = phase in ENDS_BY_ITSELF and await self._ended_before(ack.id, until_ns)
            if not ended:
                await clock.sleep_until(until_ns)
            if clock.mono_ns() >= end_ns - TAIL_NS:
                break
            if ended and at == len(plan) - 1:
                plan.append((Phase.DORMANT, 0.0))
            at += 1
            ack = await self._step(plan[at][0])
        await clock.sleep_until(end_ns)
        self._marks.append(LabelMark(t_wall_ns=clock.wall_ns(), t_mono_ns=clock.mono_ns(), phase=None))

    async def _step(self, phase: Phase) -> Ack:
        ack = await self._machine.send("phase", *self._words(phase))
        self._marks.append(LabelMark(t_wall_ns=ack.t_wall_ns, t_mono_ns=ack.t_mono_ns, phase=phase))
        return ack

    async def _ended_before(self, number: int, until_ns: int) -> bool:
        """Wait until the work of a command ends by itself or the time is up; say whether it ended."""
        ended = asyncio.ensure_future(self._machine.finished(number, timeout_s=3600))
        asleep = asyncio.ensure_future(self._clock.sleep_until(until_ns))
        try:
            await asyncio.wait((ended, asleep), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ended.result()  # a refusal or a cut line speaks up here
                return True
            return False
        finally:
            ended.cancel()
            asleep.cancel()
            await asyncio.gather(ended, asleep, return_exceptions=True)

    async def _open(self, reader: TelemetrySource | GuestReader) -> None:
        try:
            await reader.open()
        except OSError as exc:
            raise VmError(f"{self._slot.host_id}: a source could not be opened: {exc}") from exc

    async def _complete(self, verb: str, *arguments: str) -> None:
        ack = await self._machine.send(verb, *arguments)
        code = await self._machine.finished(ack.id, timeout_s=PREPARE_TIMEOUT_S)
        if code:
            raise VmError(f"{self._slot.host_id}: {verb} {' '.join(arguments)}: ended with {code} in the guest")

    def _words(self, phase: Phase) -> tuple[str, ...]:
        slot = self._slot
        return (str(phase), slot.profile, slot.sample_name, str(slot.plan_seed), *_spell(slot.knobs))


def _spell(knobs: Sequence[tuple[str, float]]) -> tuple[str, ...]:
    return tuple(f"{name}={value:.6g}" for name, value in knobs)


def _read_clocks(clock: Clock) -> dict[ClockBase, tuple[int, int]]:
    wall_ns = clock.wall_ns()
    return {ClockBase.MONOTONIC: (clock.mono_ns(), wall_ns), ClockBase.BOOTTIME: (clock.boot_ns(), wall_ns)}
