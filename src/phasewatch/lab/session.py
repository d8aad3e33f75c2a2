"""Record one slot on one VM and build its bundle.

`run_episode` boots the VM, warms it up, lets it settle, steps through the planned phases and samples all sources
meanwhile. `build_bundle` turns the result into the bytes of a bundle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phasewatch._version import __version__
from phasewatch.bundle.archive import encode_labels, pack_bundle
from phasewatch.bundle.contention import compute_quota_contention
from phasewatch.bundle.model import (
    BUNDLE_FORMAT,
    ClockMetadata,
    HostMetadata,
    LabelEvidence,
    LabelMark,
    Manifest,
    RecordingMetadata,
)
from phasewatch.bundle.rows import encode_rows
from phasewatch.channels import CHANNELS, ChannelSpec, list_raw_fields
from phasewatch.errors import UsageError, VmError, WorkloadError
from phasewatch.lab.guest_driver import CommandAck
from phasewatch.lab.network.world import render_world_knobs
from phasewatch.lab.plan import RecordingSlot
from phasewatch.lab.qemu_command import HostShape, describe_shape
from phasewatch.lab.vm import LabMachine, MachineFacts, choose_lab_jit_use
from phasewatch.profiles import IDLE_SAMPLE, IDLE_SAMPLES, find_sample
from phasewatch.telemetry.base import N_STAMPS, AsyncClock, RowLog, TelemetrySampler, TelemetrySource
from phasewatch.telemetry.guest_agent import GUEST_NOMINAL_HZ as GUEST_HZ
from phasewatch.telemetry.guest_agent import GuestReader
from phasewatch.telemetry.qmp import JIT_FIELDS, JitUse
from phasewatch.types import BENIGN_PROFILE, HOST_SOURCES, ClockBase, EpisodeId, EpisodeOrigin, Phase, SourceKind

__all__ = ["LEAD_IN_S", "ClockPairs", "EpisodeContext", "RecordedEpisode", "build_bundle", "run_episode"]

LEAD_IN_S = 10.0  # readings before the first label: they open the first bin, and the polling itself settles
_PREPARE_TIMEOUT_S = 180.0  # warm-up or installation, while a neighbour does the same
_WATCH_TIMEOUT_S = 7200.0  # longer than any episode
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
        loads: ``(kind, start, end)`` of each benign load that ran; Unix time in ns.
        evidence: What the guest answered to the command of each label.
        throttled_s: Seconds between first label and end that the CPU quota stopped the VM; None without a quota.
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
    loads: tuple[tuple[str, int, int], ...] = ()
    evidence: tuple[LabelEvidence, ...] = ()
    throttled_s: float | None = None

    @property
    def vcpu_wait(self) -> float | None:
        """Mean number of vCPU threads that waited for a core between first label and end; None if it was not read."""
        readings = self._read_cpu_times("vcpu_wait_ns")
        if len(readings) < 2:
            return None
        return float(readings[-1, 1] - readings[0, 1]) / float(readings[-1, 0] - readings[0, 0])

    def compute_contention(self, quota_cores: float) -> float | None:
        """Return the CPU time that other work took from the VM, in cores; None if it was not read.

        Args:
            quota_cores: Its CPU quota; without one (0), contention is `vcpu_wait`.
        """
        if not quota_cores or self.throttled_s is None:
            return self.vcpu_wait
        readings = self._read_cpu_times("vcpu_wait_ns", "vcpu_run_ns", "main_run_ns", "aux_run_ns")
        if len(readings) < 2:
            return None
        return compute_quota_contention(
            readings[:, 0],
            readings[:, 1],
            readings[:, 2:].sum(axis=1),
            quota_cores=quota_cores,
            throttled_s=self.throttled_s,
        )

    def _read_cpu_times(self, *fields: str) -> NDArray[np.float64]:
        """Return the readings of proc between first label and end that have all fields.

        Returns:
            ``(n, 1 + len(fields))`` float64: monotonic time and the fields, in ns.
        """
        names = [spec.field for spec in list_raw_fields(SourceKind.PROC)]
        columns = [1, *(N_STAMPS + names.index(name) for name in fields)]
        t0_ns, end_ns = self.marks[0].t_mono_ns, self.marks[-1].t_mono_ns
        rows = [[row[column] for column in columns] for row in self.logs[SourceKind.PROC].rows]
        kept = [row for row in rows if None not in row and t0_ns <= (row[0] or 0) <= end_ns]
        return np.array(kept, dtype=np.float64).reshape(-1, len(columns))


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
        WorkloadError: If a workload ends with an error, or a load ends at all: its label would have no act.
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
        self._steps: list[_Step] = []
        self._loads = _LoadTimeline(machine, slot, clock, self._watch)
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watches: list[asyncio.Task[int]] = []
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
            for task in self._watches:
                task.cancel()
            await asyncio.gather(*self._watches, return_exceptions=True)
            self._failure.cancel()
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
        throttled_s: float | None = None
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
            throttled_s = self._machine.read_throttled_s()
            await self._run_or_fail(self._run_phases(), self._loads.run(t0_ns, slot.duration_s))
            if throttled_s is not None:
                throttled_s = round((self._machine.read_throttled_s() or 0.0) - throttled_s, 6)
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
            loads=self._loads.list_ran(self._marks),
            evidence=tuple(step.build_evidence() for step in self._steps),
            throttled_s=throttled_s,
        )

    async def _prepare(self) -> None:
        """Bring the guest into the state that the first label describes."""
        slot = self._slot
        if slot.world.servers:
            await self._machine.set_world(slot.world)
        await self._machine.send("hello")
        await self._run_to_completion("warmup")
        if self._guest:
            await self._open(self._guest)
            await self._machine.send("agent", "on")
        servers = render_world_knobs(slot.world)
        await self._machine.send("chatter", str(slot.plan_seed), f"{slot.chatter_s:g}", *servers)
        await self._loads.start_first()
        if slot.phases[0][0] is not Phase.CLEAN:
            await self._run_to_completion("install", *self._build_phase_arguments(slot.phases[0][0]))

    async def _run_phases(self) -> None:
        """Step through the phases; the next phase starts as soon as the work of the current one ends by itself."""
        clock = self._clock
        plan = list(self._slot.phases)
        ack = await self._step(*plan[0])
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
            ack = await self._step(*plan[place])
        await clock.sleep_until(end_ns)
        self._marks.append(LabelMark(t_wall_ns=clock.wall_ns(), t_mono_ns=clock.mono_ns(), phase=None))

    async def _step(self, phase: Phase, seconds: float) -> CommandAck:
        arguments = self._build_phase_arguments(phase, seconds)
        ack = await self._machine.send("phase", *arguments)
        self._marks.append(LabelMark(t_wall_ns=ack.t_wall_ns, t_mono_ns=ack.t_mono_ns, phase=phase))
        name = " ".join(("phase", *arguments[:3]))
        self._steps.append(_Step(phase, name, ack.id, self._watch(ack.id, name, may_end=True)))
        return ack

    def _watch(self, number: int, name: str, *, may_end: bool) -> asyncio.Task[int]:
        """Watch the work of a command: its end with an error, or at all where it must not end, fails the episode."""

        async def wait() -> int:
            code = await self._machine.wait_finished(number, timeout_s=_WATCH_TIMEOUT_S)
            if (code or not may_end) and not self._failure.done():
                self._failure.set_exception(
                    WorkloadError(f"{self._slot.host_id}: {name}: ended with {code} in the guest")
                )
            return code

        task = asyncio.create_task(wait())
        self._watches.append(task)
        return task

    async def _run_or_fail(self, *works: Coroutine[Any, Any, None]) -> None:
        """Run coroutines at the same time until all have ended, one has raised or a workload has failed."""
        tasks = [asyncio.ensure_future(work) for work in works]
        both = asyncio.gather(*tasks)
        try:
            await asyncio.wait((both, self._failure), return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                self._failure.result()
            await both
        finally:
            both.cancel()
            await asyncio.gather(*tasks, both, return_exceptions=True)

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
            raise WorkloadError(f"{self._slot.host_id}: {verb} {' '.join(arguments)}: ended with {code} in the guest")

    def _build_phase_arguments(self, phase: Phase, seconds: float = 0.0) -> tuple[str, ...]:
        slot = self._slot
        # The loads of a benign walk are commands of their own; its label needs none.
        sample_name = IDLE_SAMPLE if slot.profile == BENIGN_PROFILE and slot.loads else slot.sample_name
        steps = [f"seconds={seconds:g}"] if seconds and slot.world.servers else []
        steps += [
            f"{name}={text}"
            for name, text in (("routine", slot.routine), ("armed", slot.armed_form), ("dormant", slot.dormant_form))
            if text
        ]
        return (
            str(phase),
            slot.profile,
            sample_name,
            str(slot.plan_seed),
            *_render_knobs(slot.knobs),
            *steps,
            *_render_cold(slot),
            *render_world_knobs(slot.world),
        )


class _Step(NamedTuple):
    """The command of one label, and the watch over its work."""

    phase: Phase
    name: str
    ack_id: int
    work: asyncio.Task[int]

    def build_evidence(self) -> LabelEvidence:
        ended = self.work.done() and not self.work.cancelled() and self.work.exception() is None
        return LabelEvidence(
            phase=self.phase, step=self.name, ack_id=self.ack_id, exit_code=self.work.result() if ended else None
        )


class _LoadTimeline:
    """Starts the benign loads of a slot at their times, and remembers when they ran."""

    def __init__(
        self, machine: LabMachine, slot: RecordingSlot, clock: AsyncClock, watch: Callable[..., asyncio.Task[int]]
    ) -> None:
        self._machine, self._slot, self._clock, self._watch = machine, slot, clock, watch
        self._started: list[tuple[str, int]] = []  # (kind, Unix time in ns)

    async def start_first(self) -> None:
        """Start the load of the first label before it, so that the label begins in the middle of the load."""
        if self._slot.loads and self._slot.loads[0].start_s == 0:
            await self._start(0)

    async def run(self, t0_ns: int, duration_s: float) -> None:
        """Start every further load at its time after `t0_ns`, which is monotonic."""
        for place, span in enumerate(self._slot.loads):
            if 0 < span.start_s < duration_s:
                await self._clock.sleep_until(t0_ns + round(span.start_s * 1e9))
                await self._start(place)

    def list_ran(self, marks: Sequence[LabelMark]) -> tuple[tuple[str, int, int], ...]:
        """Return ``(kind, start, end)`` of every load that ran, idle forms left out; Unix time in ns."""
        slot, end_ns = self._slot, marks[-1].t_wall_ns
        if not slot.loads and slot.profile == BENIGN_PROFILE and slot.sample_name not in IDLE_SAMPLES:
            return ((slot.sample_name, marks[0].t_wall_ns, end_ns),)  # the phase itself is the load
        starts = [*self._started, ("", end_ns)]
        return tuple(
            (kind, start_ns, until_ns)
            for (kind, start_ns), (_, until_ns) in pairwise(starts)
            if kind not in IDLE_SAMPLES
        )

    async def _start(self, place: int) -> None:
        slot, span = self._slot, self._slot.loads[place]
        arguments = (span.kind, str(slot.plan_seed + place), *_render_knobs(span.knobs))
        arguments += (*_render_cold(slot), *render_world_knobs(slot.world))
        ack = await self._machine.send("load", *arguments)
        self._watch(ack.id, f"load {span.kind}", may_end=False)
        self._started.append((span.kind, ack.t_wall_ns))


def _render_knobs(knobs: Sequence[tuple[str, float]]) -> tuple[str, ...]:
    return tuple(f"{name}={value:.6g}" for name, value in knobs)


def _render_cold(slot: RecordingSlot) -> tuple[str, ...]:
    return (f"cold={slot.cold:g}",) if slot.cold else ()


def _read_clocks(clock: AsyncClock) -> dict[ClockBase, tuple[int, int]]:
    wall_ns = clock.wall_ns()
    return {ClockBase.MONOTONIC: (clock.mono_ns(), wall_ns), ClockBase.BOOTTIME: (clock.boot_ns(), wall_ns)}


def _find_absent_channels(episode: RecordedEpisode, shape: HostShape) -> dict[str, str]:
    """Return the reason of each channel that this VM could not provide."""
    reasons = {channel.full_name: _explain_absence(channel, episode, shape) for channel in CHANNELS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _explain_absence(channel: ChannelSpec, episode: RecordedEpisode, shape: HostShape) -> str | None:
    if channel.source is SourceKind.GUEST and SourceKind.GUEST not in episode.logs:
        return "the agent was off"
    if channel.accel == "tcg" and episode.facts.accel != "tcg":
        return f"only TCG counts it, this VM ran on {episode.facts.accel}"
    if channel.accel == "kvm" and episode.facts.accel != "kvm":
        return f"only KVM counts it, this VM ran on {episode.facts.accel}"
    if channel.arch == "x86" and shape.arch != "x86_64":
        return f"the monitor shows no such flag on {shape.arch}"
    if JIT_FIELDS & set(channel.fields) and choose_lab_jit_use(shape) is JitUse.NEVER:
        return "not asked: x-query-jit stops a guest of this size for too long"
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
    facts, absent = episode.facts, _find_absent_channels(episode, shape)
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
            knobs=_list_knobs(slot),
            background=slot.background,
            absent=absent,
            load=episode.loads,
            routine=slot.routine or None,
            twin=_find_twin(slot),
            evidence=episode.evidence,
            shape=describe_shape(shape),
            image=shape.image,
            throttled_s=episode.throttled_s,
        ),
        members={},
    )


def _list_knobs(slot: RecordingSlot) -> dict[str, float]:
    """Return all intensities of a slot; those of a load walk are numbered by span."""
    knobs = dict(slot.knobs)
    if len(slot.loads) == 1:
        return knobs | {f"background.{name}": value for name, value in slot.loads[0].knobs}
    return knobs | {
        f"background.{place}.{name}": value for place, span in enumerate(slot.loads) for name, value in span.knobs
    }


def _find_twin(slot: RecordingSlot) -> str | None:
    """Return the declared twin of the slot's sample; None for a sample of a custom workload."""
    try:
        return find_sample(slot.profile, slot.sample_name).twin or None
    except UsageError:
        return None
