"""Record the sessions of a plan into a store.

`PlanRecorder` runs the sessions one after the other, each on an idle machine. A recording can be resumed: slots that
the store already holds are skipped, and a bundle is written whole or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil
from pathlib import Path

from phasewatch.bundle.archive import unpack_manifest
from phasewatch.errors import BootError, BundleError, MachineError, VmError, WorkloadError
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
    "SkipCode",
    "SkippedHost",
    "estimate_round_s",
    "iterate_rounds",
    "pop_round",
]

logger = logging.getLogger(__name__)

MIN_FREE_BYTES = 256 << 20
_MAX_SLOT_RETRIES = 2  # further attempts at a slot whose VM failed
_MAX_BOOT_FAILURES = 3  # rounds in a row in which no VM of a host booted; then the host is given up
_ROUND_OVERHEAD_S = 15.0  # boot, idle check and packing of one round

QUOTA_PER_CORE = 1.5  # VMs are idle most of the time; contention is measured for each episode
_ROUNDING_CORES = 1e-9

# A session, and those of its slots that are not recorded yet.
PendingSession = tuple[RecordingSession, tuple[RecordingSlot, ...]]
RecordingRound = tuple[PendingSession, ...]
MachineFactory = Callable[[HostShape, int, tuple[int, ...]], LabMachine]  # shape, place in the round, cores to pin to


class SkipCode(StrEnum):
    """Why the episodes of a host were not recorded."""

    NO_QUOTA = "no-cpu-quota"
    NO_IMAGE = "no-guest-image"
    NO_BOOT = "does-not-boot"


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedHost:
    """A host whose episodes were not recorded.

    Attributes:
        host_id: The host.
        episodes: Number of its episodes that were left out.
        code: The kind of obstacle.
        reason: The obstacle, and what to do.
    """

    host_id: str
    episodes: int
    code: SkipCode
    reason: str


def pop_round(
    queue: deque[PendingSession], shapes: Mapping[str, HostShape], cores: int, vms: int = 2
) -> RecordingRound:
    """Remove the next round from the queue and return it.

    A round is one session, or the part of it whose CPU quotas fit on the cores (`QUOTA_PER_CORE`). Soak episodes are an
    exception, and baseline episodes under quotas: they leave most of the cores free, so those of other hosts run beside
    them. All are benign, so none reveals the phase of another; they remain sessions of their own.

    Args:
        queue: The sessions in their order, at least one. The returned slots are removed from it.
        shapes: Host id → shape.
        cores: Number of cores for vCPU threads.
        vms: Largest number of VMs at a time.
    """
    session, slots = queue.popleft()
    shape = shapes[session.host_id]
    n_rounds = ceil(len(slots) / _count_fitting(shape, cores, vms))
    size = ceil(len(slots) / n_rounds)
    if slots[size:]:
        queue.appendleft((session, slots[size:]))
        return ((session, slots[:size]),)
    chosen = [(session, slots)]
    if not _may_share_round(chosen[0], shapes):
        return tuple(chosen)
    free_cores, free_places = _compute_budget(shape, cores) - len(slots) * shape.cores, vms - len(slots)
    for other in list(queue):
        other_shape, others = shapes[other[0].host_id], other[1]
        needed = len(others) * other_shape.cores
        if (
            len(others) <= free_places
            and needed <= free_cores + _ROUNDING_CORES
            and _may_share_round(other, shapes)
            and other[0].host_id not in {each.host_id for each, _ in chosen}
            and (others[0].role, others[0].duration_s) == (slots[0].role, slots[0].duration_s)
            and bool(other_shape.quota_cores) == bool(shape.quota_cores)
        ):
            queue.remove(other)
            chosen.append(other)
            free_cores, free_places = free_cores - needed, free_places - len(others)
    return tuple(chosen)


def _count_fitting(shape: HostShape, cores: int, vms: int) -> int:
    """Return how many VMs of a shape may run at a time. Without a quota, the plan alone decides."""
    budget = _compute_budget(shape, cores)
    return max(1, min(vms, int(budget / shape.quota_cores + _ROUNDING_CORES)) if shape.quota_cores else vms)


def _compute_budget(shape: HostShape, cores: int) -> float:
    """Return the largest sum of cores of the VMs of a round: of their quotas, or of their vCPUs without quotas."""
    return cores * QUOTA_PER_CORE if shape.quota_cores else cores


def iterate_rounds(
    queue: deque[PendingSession], shapes: Mapping[str, HostShape], cores: int, vms: int = 2
) -> Iterator[RecordingRound]:
    """Yield the rounds until the queue is empty."""
    while queue:
        yield pop_round(queue, shapes, cores, vms)


def estimate_round_s(sessions: RecordingRound) -> float:
    """Estimate the duration of a round, in seconds."""
    return max(slot.settle_s + slot.duration_s for _, slots in sessions for slot in slots) + _ROUND_OVERHEAD_S


def _may_share_round(pending: PendingSession, shapes: Mapping[str, HostShape]) -> bool:
    """Return whether sessions of other hosts may run beside one: a soak episode, or baseline episodes under quotas."""
    session, slots = pending
    shape, roles = shapes[session.host_id], {slot.role for slot in slots}
    is_soak = len(slots) == 1 and roles == {EpisodeRole.SOAK}
    return not shape.is_alone and (is_soak or (roles == {EpisodeRole.COMMISSION} and bool(shape.quota_cores)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingSummary:
    """The result of recording a plan.

    Attributes:
        recorded: Episodes written by this run.
        crowded: Recorded episodes with CPU contention: their vCPUs waited too long for a core that other work used.
        present: Slots that the store already held.
        failed: Abandoned slots, one line each, with the reason.
        failed_workloads: Attempts that were discarded because a workload failed in the guest.
        skipped_hosts: Hosts whose episodes were not recorded, with the reason.
        episodes_per_hour: Recorded episodes per elapsed hour; 0 without an episode.
        late, skipped: Late and skipped sampler ticks over all episodes.
        recorder_cpu_s: CPU seconds of this process and of its ended children except QEMU.
        wall_s: Elapsed seconds.
    """

    recorded: int
    crowded: int
    present: int
    failed: tuple[str, ...]
    failed_workloads: int
    skipped_hosts: tuple[SkippedHost, ...]
    episodes_per_hour: float
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
    failed_workloads: int = 0
    boot_failures: Counter[str] = field(default_factory=Counter)
    last_boot_error: dict[str, str] = field(default_factory=dict)
    skipped_hosts: list[SkippedHost] = field(default_factory=list)
    n_skipped: int = 0
    planned_s: float = 0.0  # estimated duration of the finished rounds


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
        vms: Largest number of VMs at a time.
        disk_folders: Folders whose disks must have free space.
    """

    store: DiskStore
    shapes: dict[str, HostShape]
    machines: MachineFactory
    clock: AsyncClock
    progress: Progress = NO_PROGRESS
    idle_wait_s: float = 600.0
    cores: tuple[int, ...] = ()
    vms: int = 2
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
            passed_s = (self.clock.mono_ns() - began_ns) / 1e9
            pace = self._describe_pace(queue, passed_s)
            current = pop_round(queue, self.shapes, len(self.cores), self.vms)
            done = present + self._count_finished_slots()
            self.progress.update("record", done, total, f"{_describe_round(current)}; {pace}")
            queue.extend(await self._record_round(current))
            self._totals.planned_s += estimate_round_s(current)
            self._give_up_hosts(queue)
        self.progress.update("record", present + self._count_finished_slots(), total)
        totals = self._totals
        wall_s = (self.clock.mono_ns() - began_ns) / 1e9
        return RecordingSummary(
            recorded=totals.recorded,
            crowded=totals.crowded,
            present=present,
            failed=tuple(totals.failed),
            failed_workloads=totals.failed_workloads,
            skipped_hosts=tuple(totals.skipped_hosts),
            episodes_per_hour=round(totals.recorded / wall_s * 3600, 1) if totals.recorded else 0.0,
            late=totals.late,
            skipped=totals.skipped,
            recorder_cpu_s=sum(os.times()[:2]) - cpu_s,
            wall_s=wall_s,
        )

    def _count_finished_slots(self) -> int:
        totals = self._totals
        return totals.recorded - len(totals.requeued) + len(totals.failed) + totals.n_skipped

    def _describe_pace(self, queue: deque[PendingSession], passed_s: float) -> str:
        """Return the time left and the rate so far as text; the estimate is scaled by how it fared so far."""
        rounds = iterate_rounds(queue.copy(), self.shapes, len(self.cores), self.vms)
        left_s = sum(estimate_round_s(each) for each in rounds)
        if not self._totals.planned_s:
            return _render_time_left(left_s)
        left_s *= passed_s / self._totals.planned_s
        return f"{_render_time_left(left_s)} at {self._totals.recorded / passed_s * 3600:.0f} episodes an hour"

    def _give_up_hosts(self, queue: deque[PendingSession]) -> None:
        """Remove the sessions of hosts that do not boot from the queue."""
        totals = self._totals
        for host_id, n_failures in totals.boot_failures.items():
            pending = [each for each in queue if each[0].host_id == host_id]
            if n_failures < _MAX_BOOT_FAILURES or not pending:
                continue
            for each in pending:
                queue.remove(each)
            n_slots = sum(len(slots) for _, slots in pending)
            reason = f"no VM of it booted in {n_failures} rounds: {totals.last_boot_error[host_id]}"
            totals.n_skipped += n_slots
            totals.skipped_hosts.append(
                SkippedHost(host_id=host_id, episodes=n_slots, code=SkipCode.NO_BOOT, reason=reason)
            )
            logger.warning("%s: given up with %d episodes: %s", host_id, n_slots, reason)

    async def _record_round(self, current: RecordingRound) -> list[PendingSession]:
        """Record the slots of a round at the same time, and return the sessions to queue again."""
        self._check_free_space()
        names = ", ".join(session.session for session, _ in current)
        load = await wait_until_idle(self.clock, at_most_s=self.idle_wait_s, purpose=names)
        if load >= MAX_IDLE_LOAD_CORES:
            logger.warning("%s: other work keeps %.1f cores busy; recording beside it", names, load)
        planned = [(session, slot, self.shapes[session.host_id]) for session, slots in current for slot in slots]
        pins = self._assign_cores([shape for _, _, shape in planned])
        machines = [self.machines(shape, place, pins[place]) for place, (_, _, shape) in enumerate(planned)]
        results = await asyncio.gather(
            *(run_episode(machine, slot, self.clock) for machine, (_, slot, _) in zip(machines, planned, strict=True)),
            return_exceptions=True,
        )
        self._count_boot_failures([slot.host_id for _, slot, _ in planned], results)
        results = [
            _find_failed_work(slot, result) or result for (_, slot, _), result in zip(planned, results, strict=True)
        ]
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
                    must_retry = self._must_repeat(result, slot, shape)
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

    def _must_repeat(self, episode: RecordedEpisode, slot: RecordingSlot, shape: HostShape) -> bool:
        """Count an episode with CPU contention; return whether its slot is recorded once more."""
        wait = episode.compute_contention(shape.quota_cores)
        if wait is None or wait <= MAX_WAIT_CORES:
            return False
        self._totals.crowded += 1
        if slot.plan_seed in self._totals.requeued:
            return False
        self._totals.requeued.add(slot.plan_seed)
        logger.warning(
            "%s: %s: other work took %.2f cores from its vCPUs; queued once more",
            slot.host_id,
            slot.sample_name,
            wait,
        )
        return True

    def _may_retry(self, slot: RecordingSlot, error: VmError | BundleError) -> bool:
        self._totals.attempts[slot.plan_seed] += 1
        self._totals.failed_workloads += isinstance(error, WorkloadError)
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

    def _count_boot_failures(self, host_ids: Sequence[str], results: Sequence[RecordedEpisode | BaseException]) -> None:
        """Count the rounds in a row in which no VM of a host booted."""
        by_host: defaultdict[str, list[RecordedEpisode | BaseException]] = defaultdict(list)
        for host_id, result in zip(host_ids, results, strict=True):
            by_host[host_id].append(result)
        for host_id, outcomes in by_host.items():
            if all(isinstance(outcome, BootError) for outcome in outcomes):
                self._totals.boot_failures[host_id] += 1
                self._totals.last_boot_error[host_id] = str(outcomes[0])
            else:
                self._totals.boot_failures[host_id] = 0

    def _assign_cores(self, shapes: Sequence[HostShape]) -> list[tuple[int, ...]]:
        """Return the cores of each VM of a round; empty for a VM that they do not suffice for.

        VMs with a quota are not pinned: the scheduler fits fractions of a core better than a fixed place.
        """
        if any(shape.quota_cores for shape in shapes):
            return [()] * len(shapes)
        vcpus = [shape.vcpus for shape in shapes]
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


def _find_failed_work(slot: RecordingSlot, result: RecordedEpisode | BaseException) -> WorkloadError | None:
    """Return an error if a label of an episode has no act, because its work ended with a failure."""
    if not isinstance(result, RecordedEpisode):
        return None
    for each in result.evidence:
        if each.exit_code:
            return WorkloadError(f"{slot.host_id}: {each.step}: ended with exit code {each.exit_code} in the guest")
    return None


def _describe_round(current: RecordingRound) -> str:
    return "; ".join(
        f"{session.host_id}: {', '.join(f'{slot.profile}/{slot.sample_name}' for slot in slots)}"
        for session, slots in current
    )


def _describe_episode(episode: RecordedEpisode, context: EpisodeContext, n_bytes: int) -> str:
    slot, wait = context.slot, episode.compute_contention(context.shape.quota_cores)
    rows = " ".join(f"{source}={log.emitted}" for source, log in episode.logs.items())
    rows += f" ({episode.guest_bad} of the agent's lines refused)" if episode.guest_bad else ""
    return (
        f"{slot.host_id}/{context.episode_id} {slot.profile}/{slot.sample_name} {slot.role} {slot.duration_s:.0f} s, "
        f"boot {episode.facts.boot_s:.1f} s, settle {episode.settle_s:.0f} s, {rows}, late {episode.late}, "
        f"skipped {episode.skipped}, failed {episode.failed}, contention {'?' if wait is None else f'{wait:.3f}'}"
        f"{'' if episode.throttled_s is None else f', throttled {episode.throttled_s:.1f} s'}, "
        f"{n_bytes // 1000} kB: {' '.join(str(mark.phase or 'end') for mark in episode.marks)}"
    )


def _render_time_left(seconds: float) -> str:
    """Return a remaining time as text.

    >>> _render_time_left(4000), _render_time_left(95)
    ('1 h 07 min left', '2 min left')
    """
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min left" if minutes >= 60 else f"{minutes} min left"
