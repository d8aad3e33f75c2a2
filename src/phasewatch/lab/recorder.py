"""Record the sessions of a plan into a store.

`PlanRecorder` runs the sessions one after the other, each on an idle machine. A recording can be resumed: slots that
the store already holds are skipped, and a bundle is written whole or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from phasewatch.bundle.archive import unpack_manifest
from phasewatch.errors import BundleError, MachineError, VmError
from phasewatch.lab.host import MAX_IDLE_LOAD_CORES, wait_until_idle
from phasewatch.lab.plan import RecordingSession, RecordingSlot
from phasewatch.lab.qemu_command import HostShape
from phasewatch.lab.session import EpisodeContext, RecordedEpisode, build_bundle, run_episode
from phasewatch.lab.vm import LabMachine
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.store.local import SENT_FOLDER, DiskStore
from phasewatch.telemetry.base import AsyncClock
from phasewatch.types import MAX_WAIT_CORES, EpisodeId, EpisodeRole, build_uuid7

__all__ = [
    "MIN_FREE_BYTES",
    "MachineFactory",
    "PendingSession",
    "PlanRecorder",
    "RecordingRound",
    "RecordingSummary",
    "estimate_round_s",
    "iterate_rounds",
    "pop_round",
]

logger = logging.getLogger(__name__)

MIN_FREE_BYTES = 256 << 20
_MAX_SLOT_RETRIES = 2  # further attempts at a slot whose VM failed
_ROUND_OVERHEAD_S = 15.0  # boot, idle check and packing of one round

# A session, and those of its slots that are not recorded yet.
PendingSession = tuple[RecordingSession, tuple[RecordingSlot, ...]]
RecordingRound = tuple[PendingSession, ...]
MachineFactory = Callable[[HostShape, int, tuple[int, ...]], LabMachine]  # shape, place in the round, cores to pin to


def pop_round(queue: deque[PendingSession], shapes: Mapping[str, HostShape], cores: int) -> RecordingRound:
    """Remove the next round from the queue and return it.

    A round is one session, except for soak episodes. A soak episode is a session of its own and keeps one core busy
    for ten minutes, so the next soak episode of another host runs beside it. Both are benign, so neither reveals the
    phase of the other; they remain two sessions.

    Args:
        queue: The sessions in their order, at least one. The returned sessions are removed from it.
        shapes: Host id → shape.
        cores: Number of cores for vCPU threads.
    """
    first = queue.popleft()
    if not _is_lone_soak(first, shapes):
        return (first,)
    (slot,) = first[1]
    free = cores - shapes[slot.host_id].vcpus
    for place, other in enumerate(queue):
        if (
            _is_lone_soak(other, shapes)
            and other[0].host_id != slot.host_id
            and other[1][0].duration_s == slot.duration_s
            and shapes[other[0].host_id].vcpus <= free
        ):
            del queue[place]
            return first, other
    return (first,)


def iterate_rounds(
    queue: deque[PendingSession], shapes: Mapping[str, HostShape], cores: int
) -> Iterator[RecordingRound]:
    """Yield the rounds until the queue is empty."""
    while queue:
        yield pop_round(queue, shapes, cores)


def estimate_round_s(sessions: RecordingRound) -> float:
    """Estimate the duration of a round, in seconds."""
    return max(slot.settle_s + slot.duration_s for _, slots in sessions for slot in slots) + _ROUND_OVERHEAD_S


def _is_lone_soak(pending: PendingSession, shapes: Mapping[str, HostShape]) -> bool:
    session, slots = pending
    return len(slots) == 1 and slots[0].role is EpisodeRole.SOAK and not shapes[session.host_id].is_alone


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingSummary:
    """The result of recording a plan.

    Attributes:
        recorded: Episodes written by this run.
        crowded: Recorded episodes with CPU contention: their vCPUs waited too long for a core.
        present: Slots that the store already held.
        failed: Abandoned slots, one line each, with the reason.
        late, skipped: Late and skipped sampler ticks over all episodes.
        recorder_cpu_s: CPU seconds of this process and of its ended children except QEMU.
        wall_s: Elapsed seconds.
    """

    recorded: int
    crowded: int
    present: int
    failed: tuple[str, ...]
    late: int
    skipped: int
    recorder_cpu_s: float
    wall_s: float


@dataclass(slots=True)
class _RecordingTotals:
    recorded: int = 0
    crowded: int = 0
    late: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)
    requeued: set[int] = field(default_factory=set)


@dataclass(slots=True, kw_only=True)
class PlanRecorder:
    """Records the sessions of a plan, round by round.

    Attributes:
        store: Receives the bundles.
        shapes: Host id → shape.
        machines: Creates a VM.
        progress: Receives the number of finished slots under the task ``record``.
        idle_wait_s: Longest wait for an idle machine, in seconds. After it the session starts anyway, with a warning.
        cores: Cores for vCPU threads.
        disk_folders: Folders whose disks must have free space.
    """

    store: DiskStore
    shapes: dict[str, HostShape]
    machines: MachineFactory
    clock: AsyncClock
    progress: Progress = NO_PROGRESS
    idle_wait_s: float = 600.0
    cores: tuple[int, ...] = ()
    disk_folders: tuple[Path, ...] = ()
    _totals: _RecordingTotals = field(default_factory=_RecordingTotals)

    async def record(self, sessions: Sequence[RecordingSession]) -> RecordingSummary:
        """Record every slot that the store does not hold yet.

        Raises:
            MachineError: If a disk is full.
        """
        began_ns, cpu_s = self.clock.mono_ns(), sum(os.times()[:2])
        recorded_slots = self._find_recorded_slots()
        queue: deque[PendingSession] = deque()
        total = present = 0
        for session in sessions:
            slots = tuple(slot for slot in session.slots if (slot.host_id, slot.plan_seed) not in recorded_slots)
            total, present = total + len(session.slots), present + len(session.slots) - len(slots)
            if slots:
                queue.append((session, slots))
        while queue:
            rounds = iterate_rounds(queue.copy(), self.shapes, len(self.cores))
            left_s = sum(estimate_round_s(each) for each in rounds)
            current = pop_round(queue, self.shapes, len(self.cores))
            done = present + self._count_finished_slots()
            self.progress.update("record", done, total, f"{_describe_round(current)}; {_render_time_left(left_s)}")
            queue.extend(await self._record_round(current))
        self.progress.update("record", present + self._count_finished_slots(), total)
        totals = self._totals
        return RecordingSummary(
            recorded=totals.recorded,
            crowded=totals.crowded,
            present=present,
            failed=tuple(totals.failed),
            late=totals.late,
            skipped=totals.skipped,
            recorder_cpu_s=sum(os.times()[:2]) - cpu_s,
            wall_s=(self.clock.mono_ns() - began_ns) / 1e9,
        )

    def _count_finished_slots(self) -> int:
        totals = self._totals
        return totals.recorded - len(totals.requeued) + len(totals.failed)

    async def _record_round(self, current: RecordingRound) -> list[PendingSession]:
        """Record the slots of a round at the same time, and return the sessions to queue again."""
        self._check_free_space()
        names = ", ".join(session.session for session, _ in current)
        load = await wait_until_idle(self.clock, at_most_s=self.idle_wait_s, purpose=names)
        if load >= MAX_IDLE_LOAD_CORES:
            logger.warning("%s: other work keeps %.1f cores busy; recording beside it", names, load)
        planned = [(session, slot, self.shapes[session.host_id]) for session, slots in current for slot in slots]
        pins = self._assign_cores([shape.vcpus for _, _, shape in planned])
        machines = [self.machines(shape, place, pins[place]) for place, (_, _, shape) in enumerate(planned)]
        results = await asyncio.gather(
            *(run_episode(machine, slot, self.clock) for machine, (_, slot, _) in zip(machines, planned, strict=True)),
            return_exceptions=True,
        )
        ids = {
            slot.plan_seed: self._new_id()
            for (_, slot, _), result in zip(planned, results, strict=True)
            if isinstance(result, RecordedEpisode)
        }
        retries: list[PendingSession] = []
        for (session, slot, shape), result in zip(planned, results, strict=True):
            if isinstance(result, RecordedEpisode):
                context = EpisodeContext(
                    slot=slot,
                    shape=shape,
                    session=session.session,
                    episode_id=ids[slot.plan_seed],
                    neighbours=tuple(other for seed, other in ids.items() if seed != slot.plan_seed),
                )
                try:
                    self._store(result, context)
                except BundleError as exc:
                    must_retry = self._may_retry(slot, exc)
                else:
                    must_retry = self._must_repeat(result, slot)
            elif isinstance(result, VmError):
                must_retry = self._may_retry(slot, result)
            else:
                raise result  # a defect, a full disk or Ctrl-C: not the fault of this one slot
            if must_retry:
                retries.append((session, (slot,)))
        return retries

    def _store(self, episode: RecordedEpisode, context: EpisodeContext) -> None:
        slot, data = context.slot, build_bundle(episode, context)
        try:
            self.store.put(slot.host_id, context.episode_id, data)
        except OSError as exc:
            raise MachineError(
                f"{self.store.path}: {exc.strerror}; make room or mend it, then record again: what is there is kept"
            ) from exc
        totals = self._totals
        totals.recorded += 1
        totals.late += episode.late
        totals.skipped += episode.skipped
        logger.info("%s", _describe_episode(episode, context, len(data)))

    def _must_repeat(self, episode: RecordedEpisode, slot: RecordingSlot) -> bool:
        """Count an episode with CPU contention; return whether its slot is recorded once more."""
        wait = episode.vcpu_wait
        if wait is None or wait <= MAX_WAIT_CORES:
            return False
        self._totals.crowded += 1
        if slot.plan_seed in self._totals.requeued:
            return False
        self._totals.requeued.add(slot.plan_seed)
        logger.warning(
            "%s: %s: its vCPUs waited %.2f cores' worth of time for a core; queued once more",
            slot.host_id,
            slot.sample_name,
            wait,
        )
        return True

    def _may_retry(self, slot: RecordingSlot, error: VmError | BundleError) -> bool:
        self._totals.attempts[slot.plan_seed] += 1
        if self._totals.attempts[slot.plan_seed] <= _MAX_SLOT_RETRIES:
            logger.warning("%s; tried again later", error)
            return True
        self._totals.failed.append(
            f"{slot.host_id}: {slot.profile}/{slot.sample_name} (seed {slot.plan_seed}): {error}"
        )
        logger.warning("%s; given up after %d attempts", error, _MAX_SLOT_RETRIES + 1)
        return False

    def _find_recorded_slots(self) -> frozenset[tuple[str, int]]:
        """Return (host id, plan seed) of each slot that the store already holds."""
        if not self.store.path.exists():
            return frozenset()
        recorded = set()
        for store in (self.store, DiskStore(self.store.path / SENT_FOLDER)):  # a shipper moves bundles to `sent`
            for item in store.walk() if store.path.is_dir() else ():
                with suppress(BundleError):  # the validator reports a broken bundle; its slot is recorded again
                    manifest = unpack_manifest(store.read(item), file=item.path)
                    recorded.add((manifest.host.host_id, manifest.plan_seed))
        return frozenset(recorded)

    def _assign_cores(self, vcpus: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the cores of each VM of a round; empty for a VM that they do not suffice for."""
        pins = []
        for place, count in enumerate(vcpus):
            first = sum(vcpus[:place])
            cores = self.cores[first : first + count]
            pins.append(cores if len(cores) == count else ())
        return pins

    def _check_free_space(self) -> None:
        for folder in self.disk_folders:
            free = shutil.disk_usage(folder).free
            if free < MIN_FREE_BYTES:
                raise MachineError(
                    f"{folder}: {free >> 20} MiB free, {MIN_FREE_BYTES >> 20} MiB needed; make room, then record "
                    "again: what is there is kept"
                )

    def _new_id(self) -> EpisodeId:
        return build_uuid7(self.clock.wall_ns() // 1_000_000, os.urandom(10))


def _describe_round(current: RecordingRound) -> str:
    return "; ".join(
        f"{session.host_id}: {', '.join(f'{slot.profile}/{slot.sample_name}' for slot in slots)}"
        for session, slots in current
    )


def _describe_episode(episode: RecordedEpisode, context: EpisodeContext, n_bytes: int) -> str:
    slot, wait = context.slot, episode.vcpu_wait
    rows = " ".join(f"{source}={log.emitted}" for source, log in episode.logs.items())
    rows += f" ({episode.guest_bad} of the agent's lines refused)" if episode.guest_bad else ""
    return (
        f"{slot.host_id}/{context.episode_id} {slot.profile}/{slot.sample_name} {slot.role} {slot.duration_s:.0f} s, "
        f"boot {episode.facts.boot_s:.1f} s, settle {episode.settle_s:.0f} s, {rows}, late {episode.late}, "
        f"skipped {episode.skipped}, failed {episode.failed}, wait {'?' if wait is None else f'{wait:.3f}'}, "
        f"{n_bytes // 1000} kB: {' '.join(str(mark.phase or 'end') for mark in episode.marks)}"
    )


def _render_time_left(seconds: float) -> str:
    """Return a remaining time as text.

    >>> _render_time_left(4000), _render_time_left(95)
    ('1 h 07 min left', '2 min left')
    """
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min left" if minutes >= 60 else f"{minutes} min left"
