"""One slot played on one machine: warm up, settle, walk through the phases, read all the while."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from phasewatch._version import __version__
from phasewatch.bundle.archive import encode_labels, pack_bundle
from phasewatch.bundle.model import BUNDLE_FORMAT, ClockMetadata, HostMetadata, LabelMark, Manifest, RecordingMetadata
from phasewatch.bundle.rows import encode_rows
from phasewatch.channels import CHANNELS, ChannelSpec, list_raw_fields
from phasewatch.errors import VmError
from phasewatch.lab.guest_driver import CommandAck
from phasewatch.lab.plan import RecordingSlot
from phasewatch.lab.qemu_command import HostShape
from phasewatch.lab.vm import LabMachine, MachineFacts
from phasewatch.telemetry.base import N_STAMPS, AsyncClock, RowLog, TelemetrySampler, TelemetrySource
from phasewatch.telemetry.guest_agent import GUEST_NOMINAL_HZ as GUEST_HZ
from phasewatch.telemetry.guest_agent import GuestReader
from phasewatch.types import HOST_SOURCES, ClockBase, EpisodeId, EpisodeOrigin, Phase, SourceKind

LEAD_IN_S = 10.0  # of readings before the first label: they open the first bin, and our own polling settles too
PREPARE_TIMEOUT_S = 180.0  # warm-up or installation, with a neighbour that does the same
END_MARGIN_NS = 500_000_000  # nothing is begun in the last half second
HALF_SECOND_NS = 500_000_000
SELF_ENDING_PHASES = (Phase.INFECTING, Phase.ACTIVE)  # whose `finished` means that the phase is over

ClockPairs = dict[ClockBase, tuple[tuple[int, int], tuple[int, int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedEpisode:
    """What one played slot gave.

    Attributes:
        marks: Phase starts, and the end.
        logs: Rows per source; the guest's only if its agent was on.
        pairs: The host's other clocks against Unix time, at the first reading and at the last.
        settle_s: From the guest's first word to the first label.
        late, skipped, failed: Ticks (see `TelemetrySampler`).
        guest_bad: The agent's lines that were refused or dropped.
    """

    facts: MachineFacts
    marks: tuple[LabelMark, ...]
    logs: dict[SourceKind, RowLog]
    pairs: ClockPairs
    settle_s: float
    late: int
    skipped: int
    failed: int
    guest_bad: int

    @property
    def vcpu_wait(self) -> float | None:
        """Cores' worth of time for which the vCPU threads waited between first label and end; None if never read."""
        at = N_STAMPS + [spec.field for spec in list_raw_fields(SourceKind.PROC)].index("vcpu_wait_ns")
        t0_ns, end_ns = self.marks[0].t_mono_ns, self.marks[-1].t_mono_ns
        read = [(row[1] or 0, row[at] or 0) for row in self.logs[SourceKind.PROC].rows if row[at] is not None]
        read = [(t_mono_ns, waited_ns) for t_mono_ns, waited_ns in read if t0_ns <= t_mono_ns <= end_ns]
        if len(read) < 2:
            return None
        (first_ns, first), (last_ns, last) = read[0], read[-1]
        return (last - first) / (last_ns - first_ns)


async def run_episode(machine: LabMachine, slot: RecordingSlot, clock: AsyncClock) -> RecordedEpisode:
    """Boot a machine, play a slot on it and stop it, whatever happens.

    Raises:
        VmError: If it does not boot, dies, refuses a command or stays silent.
    """
    try:
        facts = await machine.boot()
        died = asyncio.ensure_future(machine.wait_exited())
        played = asyncio.ensure_future(_EpisodeRun(machine, slot, clock, facts).run())
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


class _EpisodeRun:
    """The state of one slot being played."""

    def __init__(self, machine: LabMachine, slot: RecordingSlot, clock: AsyncClock, facts: MachineFacts) -> None:
        self._machine, self._slot, self._clock, self._facts = machine, slot, clock, facts
        self._marks: list[LabelMark] = []
        self._logs = {source: RowLog(source, clock) for source in HOST_SOURCES}
        self._guest: GuestReader | None = None
        if slot.agent:
            self._logs[SourceKind.GUEST] = RowLog(SourceKind.GUEST, clock)
            self._guest = machine.build_agent_reader(self._logs[SourceKind.GUEST])

    async def run(self) -> RecordedEpisode:
        """Play the slot to its end."""
        try:
            await self._prepare()
            return await self._record()
        finally:
            if self._guest:
                await self._guest.close()

    async def _record(self) -> RecordedEpisode:
        """Wait until the machine has settled, then read while the phases pass."""
        clock, slot, guest, logs = self._clock, self._slot, self._guest, self._logs
        lead_ns = round(LEAD_IN_S * 1e9)
        t0_ns = max(self._facts.booted_mono_ns + round(slot.settle_s * 1e9), clock.mono_ns() + lead_ns)
        await clock.sleep_until(t0_ns - lead_ns)

        sources = self._machine.sources()
        ticker = TelemetrySampler([*sources], [logs[source.source] for source in sources], clock)
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
            await self._run_phases()
        finally:
            if ticking is not None:
                ticking.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await ticking
            for source in sources:
                await source.close()
        last = _read_clocks(clock)
        await self._machine.send("hello")  # a guest that hung in its last phase has not played it
        return RecordedEpisode(
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
        await self._run_to_completion("warmup")
        if self._guest:
            await self._open(self._guest)
            await self._machine.send("agent", "on")
        await self._machine.send("chatter", str(slot.plan_seed), f"{slot.chatter_s:g}")
        if slot.background:
            await self._machine.send(
                "load", slot.background, str(slot.plan_seed), *_render_knobs(slot.background_knobs)
            )
        if slot.phases[0][0] is not Phase.CLEAN:
            await self._run_to_completion("install", *self._build_phase_arguments(slot.phases[0][0]))

    async def _run_phases(self) -> None:
        """Step through the phases; a phase whose work ended by itself is followed at once."""
        clock = self._clock
        plan = list(self._slot.phases)
        ack = await self._step(plan[0][0])
        end_ns = ack.t_mono_ns + round(self._slot.duration_s * 1e9)
        at = 0
        while True:
            phase, seconds = plan[at]
            until_ns = end_ns if at == len(plan) - 1 else min(end_ns, ack.t_mono_ns + round(seconds * 1e9))
            ended = phase in SELF_ENDING_PHASES and await self._wait_finished_before(ack.id, until_ns)
            if not ended:
                await clock.sleep_until(until_ns)
            if clock.mono_ns() >= end_ns - END_MARGIN_NS:
                break
            if ended and at == len(plan) - 1:
                plan.append((Phase.DORMANT, 0.0))
            at += 1
            ack = await self._step(plan[at][0])
        await clock.sleep_until(end_ns)
        self._marks.append(LabelMark(t_wall_ns=clock.wall_ns(), t_mono_ns=clock.mono_ns(), phase=None))

    async def _step(self, phase: Phase) -> CommandAck:
        ack = await self._machine.send("phase", *self._build_phase_arguments(phase))
        self._marks.append(LabelMark(t_wall_ns=ack.t_wall_ns, t_mono_ns=ack.t_mono_ns, phase=phase))
        return ack

    async def _wait_finished_before(self, number: int, until_ns: int) -> bool:
        """Wait until the work of a command ends by itself or the time is up; say whether it ended."""
        ended = asyncio.ensure_future(self._machine.wait_finished(number, timeout_s=3600))
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

    async def _run_to_completion(self, verb: str, *arguments: str) -> None:
        ack = await self._machine.send(verb, *arguments)
        code = await self._machine.wait_finished(ack.id, timeout_s=PREPARE_TIMEOUT_S)
        if code:
            raise VmError(f"{self._slot.host_id}: {verb} {' '.join(arguments)}: ended with {code} in the guest")

    def _build_phase_arguments(self, phase: Phase) -> tuple[str, ...]:
        slot = self._slot
        return (str(phase), slot.profile, slot.sample_name, str(slot.plan_seed), *_render_knobs(slot.knobs))


def _render_knobs(knobs: Sequence[tuple[str, float]]) -> tuple[str, ...]:
    return tuple(f"{name}={value:.6g}" for name, value in knobs)


def _read_clocks(clock: AsyncClock) -> dict[ClockBase, tuple[int, int]]:
    wall_ns = clock.wall_ns()
    return {ClockBase.MONOTONIC: (clock.mono_ns(), wall_ns), ClockBase.BOOTTIME: (clock.boot_ns(), wall_ns)}


def _find_absent_channels(take: RecordedEpisode, *, arch: str) -> dict[str, str]:
    """Say of each channel that this VM could not give, why."""
    absent = {}
    for channel in CHANNELS:
        why = _explain_absence(channel, take, arch)
        if why:
            absent[channel.full_name] = why
    return absent


def _explain_absence(channel: ChannelSpec, take: RecordedEpisode, arch: str) -> str | None:
    if channel.source is SourceKind.GUEST and SourceKind.GUEST not in take.logs:
        return "the agent was off"
    if channel.accel == "tcg" and take.facts.accel != "tcg":
        return f"only TCG counts it, this VM ran on {take.facts.accel}"
    if channel.arch == "x86" and arch != "x86_64":
        return f"the monitor shows no such flag on {arch}"
    if not all(_has_reading(take.logs[channel.source], channel.source, field) for field in channel.fields):
        return "it could not be read once"
    return None


def _has_reading(log: RowLog, source: SourceKind, field: str) -> bool:
    at = N_STAMPS + [spec.field for spec in list_raw_fields(source)].index(field)
    return any(row[at] is not None for row in log.rows)


def build_bundle(
    take: RecordedEpisode,
    slot: RecordingSlot,
    shape: HostShape,
    *,
    session: str,
    episode_id: EpisodeId,
    neighbours: tuple[str, ...],
) -> bytes:
    """Make the bundle of one played slot.

    Raises:
        BundleError: If what was recorded breaks a rule of the format.
    """
    logs = {source: log for source, log in take.logs.items() if log.rows}
    members = {"labels.jsonl": encode_labels(take.marks)}
    members |= {f"{source}.jsonl": encode_rows(source, log.rows) for source, log in logs.items()}
    return pack_bundle(_build_manifest(take, slot, shape, session, episode_id, neighbours), members)


def _build_manifest(
    take: RecordedEpisode,
    slot: RecordingSlot,
    shape: HostShape,
    session: str,
    episode_id: EpisodeId,
    neighbours: tuple[str, ...],
) -> Manifest:
    facts, absent = take.facts, _find_absent_channels(take, arch=shape.arch)
    throttle = f", {shape.iops} iops" if shape.iops else ""
    host = HostMetadata(
        host_id=shape.host_id,
        arch=shape.arch,
        accel=facts.accel,
        machine=shape.machine,
        cpu=shape.cpu,
        vcpus=shape.vcpus,
        mem_mib=shape.mem_mib,
        disk=f"virtio-blk, qcow2, cache={shape.cache}, {shape.data_mib} MiB of data{throttle}",
        nic=facts.nic,
        hypervisor=facts.hypervisor,
        guest_kernel=facts.guest_kernel,
        recorder=f"phasewatch {__version__}, guest image {facts.guest_image}, on {facts.processor}",
    )
    return Manifest(
        format=BUNDLE_FORMAT,
        episode_id=episode_id,
        host=host,
        profile=slot.profile,
        sample_name=slot.sample_name,
        sample_kind=slot.sample_kind,
        origin=EpisodeOrigin.RECORDED,
        role=slot.role,
        started_wall_ns=take.marks[0].t_wall_ns,
        duration_s=round((take.marks[-1].t_wall_ns - take.marks[0].t_wall_ns) / 1e9, 3),
        session=session,
        neighbours=neighbours,
        plan_seed=slot.plan_seed,
        plan=slot.phases,
        agent=slot.agent,
        nominal_hz={source: GUEST_HZ if source is SourceKind.GUEST else 2.0 for source in take.logs},
        rows_emitted={source: log.emitted for source, log in take.logs.items()},
        channels_available=tuple(c.full_name for c in CHANNELS if c.full_name not in absent),
        fields={source: tuple(spec.field for spec in list_raw_fields(source)) for source in take.logs},
        clocks=ClockMetadata(base=dict.fromkeys(take.logs, ClockBase.UNIX), pairs=take.pairs),
        recording=RecordingMetadata(
            boot_s=facts.boot_s,
            settle_s=take.settle_s,
            pinning=facts.pinning,
            knobs=dict(slot.knobs) | {f"background.{name}": value for name, value in slot.background_knobs},
            background=slot.background,
            absent=absent,
        ),
        members={},
    )
