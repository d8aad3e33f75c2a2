"""A plan becomes a store of episodes: session by session on an idle machine, resumable, nothing half-written."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

from phasewatch.bundle.archive import unpack_manifest
from phasewatch.errors import BundleError, MachineError, VmError
from phasewatch.lab.host import MAX_IDLE_LOAD_CORES, wait_until_idle
from phasewatch.lab.plan import RecordingSession, RecordingSlot
from phasewatch.lab.qemu_command import HostShape
from phasewatch.lab.session import RecordedEpisode, build_bundle, run_episode
from phasewatch.lab.vm import LabMachine
from phasewatch.store.local import SENT_FOLDER, DiskStore
from phasewatch.telemetry.base import AsyncClock
from phasewatch.types import MAX_WAIT_CORES, EpisodeId, EpisodeRole, build_uuid7


class RecorderProgress(Protocol):
    """Hears what the recorder does."""

    def line(self, text: str) -> None:
        """Say something that stays on the screen."""

    def update(self, text: str, *, done: int, total: int, left_s: float) -> None:
        """Say what is going on, and how far it is."""


class SilentProgress:
    """Hears everything and says nothing."""

    def line(self, text: str) -> None:
        """Do nothing."""

    def update(self, text: str, *, done: int, total: int, left_s: float) -> None:
        """Do nothing."""


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """A bar on stderr; where that is no terminal, only the lines."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True, markup=False, highlight=False)
        self._bar = RichProgress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
            refresh_per_second=1,  # it shares the machine with what it measures
        )
        self._task = self._bar.add_task("", total=None, left="")

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def line(self, text: str) -> None:
        """Print one line above the bar."""
        self._bar.console.print(text, soft_wrap=True)

    def update(self, text: str, *, done: int, total: int, left_s: float) -> None:
        """Move the bar."""
        self._bar.update(self._task, description=text, completed=done, total=total, left=_render_time_left(left_s))


def _render_time_left(seconds: float) -> str:
    """Spell a time to go.

    >>> render_left(4000), render_left(95)
    ('1 h 07 min left', '2 min left')
    """
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min left" if minutes >= 60 else f"{minutes} min left"


ROUND_OVERHEAD_S = 15.0  # boot, idle check and packing of one round, for the time left

PendingSession = tuple[
    RecordingSession, tuple[RecordingSlot, ...]
]  # a session and those of its slots that are to be recorded still
RecordingRound = tuple[PendingSession, ...]


def pop_round(queue: deque[PendingSession], shapes: Mapping[str, HostShape], cores: int) -> RecordingRound:
    """Take from the queue what comes next.

    A soak episode is a session of its own (two on one host would have to be of one sample group, and a host needs one
    of each), and lasts ten minutes on one core. The next one of another host plays beside it: both are benign, so
    neither can tell the other's phase, and they stay two sessions.

    Args:
        queue: The sessions in their order, at least one; what is taken leaves it.
        shapes: Host id → shape.
        cores: How many cores there are for vCPU threads.
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
    """Empty the queue round by round."""
    while queue:
        yield pop_round(queue, shapes, cores)


def estimate_round_s(one: RecordingRound) -> float:
    """Estimate how long a round takes, in seconds."""
    return max(slot.settle_s + slot.duration_s for _, slots in one for slot in slots) + ROUND_OVERHEAD_S


def _is_lone_soak(one: PendingSession, shapes: Mapping[str, HostShape]) -> bool:
    session, slots = one
    return len(slots) == 1 and slots[0].role is EpisodeRole.SOAK and not shapes[session.host_id].is_alone


MAX_SLOT_RETRIES = 2  # further attempts at a slot whose VM failed
MIN_FREE_BYTES = 256 << 20

MachineFactory = Callable[[HostShape, int, tuple[int, ...]], LabMachine]  # shape, place in the round, cores to pin to


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingSummary:
    """What became of a plan.

    Attributes:
        recorded: Episodes written now; `crowded` of them with too much waiting.
        present: Slots that the store held already.
        failed: Slots given up, each with the reason.
        late, skipped: Ticks over all episodes.
        recorder_cpu_s, wall_s: CPU seconds of this process and of ended children other than QEMU's, and time passed.
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
        store: Where bundles go.
        shapes: Host id → shape.
        machines: Makes a VM.
        idle_wait_s: How long at most to wait for an idle machine; then the session starts regardless, and says so.
        cores: Cores for vCPU threads.
        disk_folders: Folders whose disks must have space left.
    """

    store: DiskStore
    shapes: dict[str, HostShape]
    machines: MachineFactory
    clock: AsyncClock
    progress: RecorderProgress
    idle_wait_s: float = 600.0
    cores: tuple[int, ...] = ()
    disk_folders: tuple[Path, ...] = ()
    _tally: _RecordingTotals = field(default_factory=_RecordingTotals)

    async def record(self, sessions: Sequence[RecordingSession]) -> RecordingSummary:
        """Record every slot that the store does not hold yet.

        Raises:
            MachineError: If a disk is full.
        """
        began_ns, cpu_s = self.clock.mono_ns(), sum(os.times()[:2])
        held = self._find_recorded_slots()
        queue: deque[PendingSession] = deque()
        total = present = 0
        for session in sessions:
            slots = tuple(slot for slot in session.slots if (slot.host_id, slot.plan_seed) not in held)
            total, present = total + len(session.slots), present + len(session.slots) - len(slots)
            if slots:
                queue.append((session, slots))
        while queue:
            left_s = sum(estimate_round_s(one) for one in iterate_rounds(queue.copy(), self.shapes, len(self.cores)))
            this = pop_round(queue, self.shapes, len(self.cores))
            what = "; ".join(
                f"{session.host_id}: {', '.join(f'{slot.profile}/{slot.sample_name}' for slot in slots)}"
                for session, slots in this
            )
            done = present + self._tally.recorded - len(self._tally.requeued) + len(self._tally.failed)
            self.progress.update(what, done=done, total=total, left_s=left_s)
            queue.extend(await self._record_round(this))
        tally = self._tally
        return RecordingSummary(
            recorded=tally.recorded,
            crowded=tally.crowded,
            present=present,
            failed=tuple(tally.failed),
            late=tally.late,
            skipped=tally.skipped,
            recorder_cpu_s=sum(os.times()[:2]) - cpu_s,
            wall_s=(self.clock.mono_ns() - began_ns) / 1e9,
        )

    async def _record_round(self, this: RecordingRound) -> list[PendingSession]:
        """Play the slots at the same time and store what came of it; gives the slots to be queued again."""
        self._check_free_space()
        names = ", ".join(session.session for session, _ in this)
        load = await wait_until_idle(
            self.clock,
            at_most_s=self.idle_wait_s,
            on_busy=lambda load: self.progress.line(
                f"{names}: other work keeps {load:.1f} cores busy; waiting up to {self.idle_wait_s:.0f} s for it"
            ),
        )
        if load >= MAX_IDLE_LOAD_CORES:
            self.progress.line(f"{names}: other work keeps {load:.1f} cores busy; recording beside it")
        played = [(session, slot, self.shapes[session.host_id]) for session, slots in this for slot in slots]
        pins = self._assign_cores([shape.vcpus for _, _, shape in played])
        machines = [self.machines(shape, place, pins[place]) for place, (_, _, shape) in enumerate(played)]
        takes = await asyncio.gather(
            *(run_episode(machine, slot, self.clock) for machine, (_, slot, _) in zip(machines, played, strict=True)),
            return_exceptions=True,
        )
        again: list[PendingSession] = []
        ids = {
            slot.plan_seed: self._new_id()
            for (_, slot, _), take in zip(played, takes, strict=True)
            if isinstance(take, RecordedEpisode)
        }
        for (session, slot, shape), take in zip(played, takes, strict=True):
            once_more = (session, (slot,))
            if isinstance(take, RecordedEpisode):
                neighbours = tuple(other for seed, other in ids.items() if seed != slot.plan_seed)
                try:
                    self._store(take, slot, shape, session.session, ids[slot.plan_seed], neighbours)
                except BundleError as exc:
                    again += [once_more] if self._may_retry(slot, exc) else []
                    continue
                if self._is_crowded(take, slot):
                    again.append(once_more)
            elif isinstance(take, VmError):
                if self._may_retry(slot, take):
                    again.append(once_more)
            else:
                raise take  # broken code, a full disk or Ctrl-C: not a matter of this one slot
        return again

    def _store(
        self,
        take: RecordedEpisode,
        slot: RecordingSlot,
        shape: HostShape,
        session: str,
        episode_id: EpisodeId,
        neighbours: tuple[str, ...],
    ) -> None:
        data = build_bundle(take, slot, shape, session=session, episode_id=episode_id, neighbours=neighbours)
        try:
            self.store.put(slot.host_id, episode_id, data)
        except OSError as exc:
            raise MachineError(
                f"{self.store.path}: {exc.strerror}; make room or mend it, then record again: what is there is kept"
            ) from exc
        tally = self._tally
        tally.recorded, tally.late, tally.skipped = (
            tally.recorded + 1,
            tally.late + take.late,
            tally.skipped + take.skipped,
        )
        wait = take.vcpu_wait
        rows = " ".join(f"{source}={log.emitted}" for source, log in take.logs.items())
        rows += f" ({take.guest_bad} of the agent's lines refused)" if take.guest_bad else ""
        self.progress.line(
            f"{slot.host_id}/{episode_id} {slot.profile}/{slot.sample_name} {slot.role} {slot.duration_s:.0f} s, "
            f"boot {take.facts.boot_s:.1f} s, settle {take.settle_s:.0f} s, {rows}, late {take.late}, "
            f"skipped {take.skipped}, failed {take.failed}, wait {'?' if wait is None else f'{wait:.3f}'}, "
            f"{len(data) // 1000} kB: {' '.join(str(mark.phase or 'end') for mark in take.marks)}"
        )

    def _is_crowded(self, take: RecordedEpisode, slot: RecordingSlot) -> bool:
        """Say whether the slot is to be recorded once more because its VM had to wait for a core."""
        wait = take.vcpu_wait
        if wait is None or wait <= MAX_WAIT_CORES:
            return False
        self._tally.crowded += 1
        if slot.plan_seed in self._tally.requeued:
            return False
        self._tally.requeued.add(slot.plan_seed)
        self.progress.line(f"{slot.host_id}: {slot.sample_name} waited {wait:.2f} cores for a core; queued once more")
        return True

    def _may_retry(self, slot: RecordingSlot, error: VmError | BundleError) -> bool:
        self._tally.attempts[slot.plan_seed] += 1
        if self._tally.attempts[slot.plan_seed] <= MAX_SLOT_RETRIES:
            self.progress.line(f"{error}; tried again later")
            return True
        self._tally.failed.append(f"{slot.host_id}: {slot.profile}/{slot.sample_name} (seed {slot.plan_seed}): {error}")
        self.progress.line(f"{error}; given up after {MAX_SLOT_RETRIES + 1} attempts")
        return False

    def _find_recorded_slots(self) -> frozenset[tuple[str, int]]:
        """Read which slots the store holds already."""
        if not self.store.path.exists():
            return frozenset()
        held = set()
        for store in (
            self.store,
            DiskStore(self.store.path / SENT_FOLDER),
        ):  # what a shipper has taken is recorded, too
            for item in store.walk() if store.path.is_dir() else ():
                with suppress(BundleError):  # a broken bundle is the validator's to report; its slot is recorded again
                    manifest = unpack_manifest(store.read(item), file=item.path)
                    held.add((manifest.host.host_id, manifest.plan_seed))
        return frozenset(held)

    def _assign_cores(self, vcpus: Sequence[int]) -> list[tuple[int, ...]]:
        """Give each VM of a round the cores of its vCPUs; none where there are not enough for all of them."""
        pins = []
        for place, many in enumerate(vcpus):
            first = sum(vcpus[:place])
            cores = self.cores[first : first + many]
            pins.append(cores if len(cores) == many else ())
        return pins

    def _check_free_space(self) -> None:
        for folder in self.disk_folders:
            free = shutil.disk_usage(folder).free
            if free < MIN_FREE_BYTES:
                raise MachineError(
                    f"{folder}: {free >> 20} MiB free, {MIN_FREE_BYTES >> 20} MiB needed; make room, then record again: "
                    "what is there is kept"
                )

    def _new_id(self) -> EpisodeId:
        return build_uuid7(self.clock.wall_ns() // 1_000_000, os.urandom(10))
