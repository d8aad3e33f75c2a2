"""Record one slot on one VM and build its bundle.

`run_episode` boots the VM, warms it up, lets it settle, steps through the planned phases and samples all sources
meanwhile. `build_bundle` turns the result into the bytes of a bundle.
"""

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

__all__ = ["LEAD_IN_S", "ClockPairs", "EpisodeContext", "RecordedEpisode", "build_bundle", "run_episode"]

LEAD_IN_S = 10.0  # readings before the first label: they open the first bin, and the polling itself settles
_PREPARE_TIMEOUT_S = 180.0  # warm-up or installation, while a neighbour does the same
_END_MARGIN_NS = 500_000_000  # no phase begins in the last half second
_HALF_SECOND_NS = 500_000_000
_SELF_ENDING_PHASES = (Phase.INFECTING, Phase.ACTIVE)  # their `finished` message ends the phase

# Clock base → (time in that clock, Unix time) at the first and at the last reading, all in ns.
ClockPairs = dict[ClockBase, tuple[tuple[int, int], tuple[int, int]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedEpisode:
    """The recording of one slot.

    Attributes:
        facts: Facts about the VM.
        marks: Phase starts, then the end.
        logs: Rows of each source; the guest source only if its agent was on.
        pairs: Other clocks of the host paired with Unix time, at the first and the last reading.
        settle_s: Seconds from the guest's ready message to the first label.
        late, skipped, failed: Numbers of sampler ticks (see `TelemetrySampler`).
        guest_bad: Number of agent lines that were refused or dropped.
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
        """Mean number of vCPU threads that waited for a core between first label and end; None if it was not read."""
        column = N_STAMPS + [spec.field for spec in list_raw_fields(SourceKind.PROC)].index("vcpu_wait_ns")
        t0_ns, end_ns = self.marks[0].t_mono_ns, self.marks[-1].t_mono_ns
        rows = self.logs[SourceKind.PROC].rows
        readings = [(row[1] or 0, row[column] or 0) for row in rows if row[column] is not None]
        readings = [(t_mono_ns, waited_ns) for t_mono_ns, waited_ns in readings if t0_ns <= t_mono_ns <= end_ns]
        if len(readings) < 2:
            return None
        (first_ns, first), (last_ns, last) = readings[0], readings[-1]
        return (last - first) / (last_ns - first_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeContext:
    """Facts about an episode that its recording does not contain.

    Attributes:
        slot: The planned slot.
        shape: Shape of the host.
        session: Name of the recording session.
        episode_id: Id of the episode.
        neighbours: Ids of the episodes that ran beside it.
    """

    slot: RecordingSlot
    shape: HostShape
    session: str
    episode_id: EpisodeId
    neighbours: tuple[str, ...]


async def run_episode(machine: LabMachine, slot: RecordingSlot, clock: AsyncClock) -> RecordedEpisode:
    """Boot a VM, record a slot on it and stop it in any case.

    Raises:
        VmError: If the VM does not boot or ends early, or if the guest refuses or does not answer a command.
    """
    try:
        facts = await machine.boot()
        exited = asyncio.ensure_future(machine.wait_exited())
        run = asyncio.ensure_future(_EpisodeRun(machine, slot, clock, facts).run())
        try:
            await asyncio.wait((exited, run), return_when=asyncio.FIRST_COMPLETED)
            if not run.done():
                raise VmError(f"{slot.host_id}: QEMU died in the middle of {slot.sample_name}")
            return await run
        finally:
            for task in (exited, run):
                task.cancel()
            await asyncio.gather(exited, run, return_exceptions=True)
    finally:
        stopping = asyncio.ensure_future(machine.stop())
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            await stopping  # a half-stopped VM would run as long as this process
            raise


class _EpisodeRun:
    """State of one slot while it is recorded."""

    def __init__(self, machine: LabMachine, slot: RecordingSlot, clock: AsyncClock, facts: MachineFacts) -> None:
        self._machine, self._slot, self._clock, self._facts = machine, slot, clock, facts
        self._marks: list[LabelMark] = []
        self._logs = {source: RowLog(source, clock) for source in HOST_SOURCES}
        self._guest: GuestReader | None = None
        if slot.agent:
            self._logs[SourceKind.GUEST] = RowLog(SourceKind.GUEST, clock)
            self._guest = machine.build_agent_reader(self._logs[SourceKind.GUEST])

    async def run(self) -> RecordedEpisode:
        """Record the slot to its end."""
        try:
            await self._prepare()
            return await self._record()
        finally:
            if self._guest:
                await self._guest.close()

    async def _record(self) -> RecordedEpisode:
        """Wait until the VM has settled, then sample while the phases run."""
        clock, slot, guest, logs = self._clock, self._slot, self._guest, self._logs
        lead_ns = round(LEAD_IN_S * 1e9)
        t0_ns = max(self._facts.booted_mono_ns + round(slot.settle_s * 1e9), clock.mono_ns() + lead_ns)
        await clock.sleep_until(t0_ns - lead_ns)

        sources = self._machine.sources()
        sampler = TelemetrySampler([*sources], [logs[source.source] for source in sources], clock)
        first = _read_clocks(clock)
        sampling: asyncio.Task[None] | None = None
        try:
            for source in sources:
                await self._open(source)
            if guest:
                guest.start()
            sampling = asyncio.create_task(sampler.run())
            # The first label is at a whole half second, so that sampler ticks stay in the middle of bins.
            now_ns = clock.mono_ns()
            t0_ns = max(t0_ns, now_ns)
            t0_ns += -(clock.wall_ns() + t0_ns - now_ns) % _HALF_SECOND_NS
            await clock.sleep_until(t0_ns)
            await self._run_phases()
        finally:
            if sampling is not None:
                sampling.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await sampling
            for source in sources:
                await source.close()
        last = _read_clocks(clock)
        await self._machine.send("hello")  # a guest that hung in its last phase did not run it
        return RecordedEpisode(
            facts=self._facts,
            marks=tuple(self._marks),
            logs=logs,
            pairs={base: (first[base], last[base]) for base in first},
            settle_s=round((self._marks[0].t_mono_ns - self._facts.booted_mono_ns) / 1e9, 3),
            late=sampler.late,
            skipped=sampler.skipped,
            failed=sampler.failed,
            guest_bad=guest.bad + guest.dropped if guest else 0,
        )

    async def _prepare(self) -> None:
        """Bring the guest into the state that the first label describes."""
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
        """Step through the phases; the next phase starts as soon as the work of the current one ends by itself."""
        clock = self._clock
        plan = list(self._slot.phases)
        ack = await self._step(plan[0][0])
        end_ns = ack.t_mono_ns + round(self._slot.duration_s * 1e9)
        place = 0
        while True:
            phase, seconds = plan[place]
            until_ns = end_ns if place == len(plan) - 1 else min(end_ns, ack.t_mono_ns + round(seconds * 1e9))
            ended = phase in _SELF_ENDING_PHASES and await self._wait_finished_before(ack.id, until_ns)
            if not ended:
                await clock.sleep_until(until_ns)
            if clock.mono_ns() >= end_ns - _END_MARGIN_NS:
                break
            if ended and place == len(plan) - 1:
                plan.append((Phase.DORMANT, 0.0))
            place += 1
            ack = await self._step(plan[place][0])
        await clock.sleep_until(end_ns)
        self._marks.append(LabelMark(t_wall_ns=clock.wall_ns(), t_mono_ns=clock.mono_ns(), phase=None))

    async def _step(self, phase: Phase) -> CommandAck:
        ack = await self._machine.send("phase", *self._build_phase_arguments(phase))
        self._marks.append(LabelMark(t_wall_ns=ack.t_wall_ns, t_mono_ns=ack.t_mono_ns, phase=phase))
        return ack

    async def _wait_finished_before(self, number: int, until_ns: int) -> bool:
        """Wait until the work of a command ends by itself or the time is up; return whether it ended."""
        ended = asyncio.ensure_future(self._machine.wait_finished(number, timeout_s=3600))
        timeout = asyncio.ensure_future(self._clock.sleep_until(until_ns))
        try:
            await asyncio.wait((ended, timeout), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ended.result()  # raises if the guest refused or the connection broke
                return True
            return False
        finally:
            ended.cancel()
            timeout.cancel()
            await asyncio.gather(ended, timeout, return_exceptions=True)

    async def _open(self, reader: TelemetrySource | GuestReader) -> None:
        try:
            await reader.open()
        except OSError as exc:
            raise VmError(f"{self._slot.host_id}: a source could not be opened: {exc}") from exc

    async def _run_to_completion(self, verb: str, *arguments: str) -> None:
        ack = await self._machine.send(verb, *arguments)
        code = await self._machine.wait_finished(ack.id, timeout_s=_PREPARE_TIMEOUT_S)
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


def _find_absent_channels(episode: RecordedEpisode, *, arch: str) -> dict[str, str]:
    """Return the reason of each channel that this VM could not provide."""
    reasons = {channel.full_name: _explain_absence(channel, episode, arch) for channel in CHANNELS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _explain_absence(channel: ChannelSpec, episode: RecordedEpisode, arch: str) -> str | None:
    if channel.source is SourceKind.GUEST and SourceKind.GUEST not in episode.logs:
        return "the agent was off"
    if channel.accel == "tcg" and episode.facts.accel != "tcg":
        return f"only TCG counts it, this VM ran on {episode.facts.accel}"
    if channel.accel == "kvm" and episode.facts.accel != "kvm":
        return f"only KVM counts it, this VM ran on {episode.facts.accel}"
    if channel.arch == "x86" and arch != "x86_64":
        return f"the monitor shows no such flag on {arch}"
    if not all(_has_reading(episode.logs[channel.source], channel.source, field) for field in channel.fields):
        return "it could not be read once"
    return None


def _has_reading(log: RowLog, source: SourceKind, field: str) -> bool:
    column = N_STAMPS + [spec.field for spec in list_raw_fields(source)].index(field)
    return any(row[column] is not None for row in log.rows)


def build_bundle(episode: RecordedEpisode, context: EpisodeContext) -> bytes:
    """Build the bundle of one recorded slot.

    Raises:
        BundleError: If the recording breaks a rule of the format.
    """
    logs = {source: log for source, log in episode.logs.items() if log.rows}
    members = {"labels.jsonl": encode_labels(episode.marks)}
    members |= {f"{source}.jsonl": encode_rows(source, log.rows) for source, log in logs.items()}
    return pack_bundle(_build_manifest(episode, context), members)


def _build_manifest(episode: RecordedEpisode, context: EpisodeContext) -> Manifest:
    slot, shape = context.slot, context.shape
    facts, absent = episode.facts, _find_absent_channels(episode, arch=shape.arch)
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
        episode_id=context.episode_id,
        host=host,
        profile=slot.profile,
        sample_name=slot.sample_name,
        sample_kind=slot.sample_kind,
        origin=EpisodeOrigin.RECORDED,
        role=slot.role,
        started_wall_ns=episode.marks[0].t_wall_ns,
        duration_s=round((episode.marks[-1].t_wall_ns - episode.marks[0].t_wall_ns) / 1e9, 3),
        session=context.session,
        neighbours=context.neighbours,
        plan_seed=slot.plan_seed,
        plan=slot.phases,
        agent=slot.agent,
        nominal_hz={source: GUEST_HZ if source is SourceKind.GUEST else 2.0 for source in episode.logs},
        rows_emitted={source: log.emitted for source, log in episode.logs.items()},
        channels_available=tuple(c.full_name for c in CHANNELS if c.full_name not in absent),
        fields={source: tuple(spec.field for spec in list_raw_fields(source)) for source in episode.logs},
        clocks=ClockMetadata(base=dict.fromkeys(episode.logs, ClockBase.UNIX), pairs=episode.pairs),
        recording=RecordingMetadata(
            boot_s=facts.boot_s,
            settle_s=episode.settle_s,
            pinning=facts.pinning,
            knobs=dict(slot.knobs) | {f"background.{name}": value for name, value in slot.background_knobs},
            background=slot.background,
            absent=absent,
        ),
        members={},
    )
