"""A plan becomes a store of episodes: session by session on an idle machine, resumable, nothing half-written."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from phasewatch.episode.bundle import peek
from phasewatch.errors import BundleError, MachineError, VmError
from phasewatch.record.base import Clock
from phasewatch.record.hosts import HostShape
from phasewatch.record.idle import IDLE_CORES, wait_until_idle
from phasewatch.record.outcome import build_bundle
from phasewatch.record.plan import Session, Slot
from phasewatch.record.progress import Progress
from phasewatch.record.rounds import Round, Waiting, round_s, rounds, take_round
from phasewatch.record.session import Take, play
from phasewatch.record.vm import Machine
from phasewatch.store.disk import SENT, DiskStore
from phasewatch.vocab import EpisodeId, uuid7

CROWDED = 0.10  # cores' worth of waiting above which an episode is degraded, and its slot queued once more
RETRIES = 2  # further attempts at a slot whose VM failed
FREE_BYTES = 256 << 20

MachineFactory = Callable[[HostShape, int, tuple[int, ...]], Machine]  # shape, place in the round, cores to pin to


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
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
class _Tally:
    recorded: int = 0
    crowded: int = 0
    late: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)
    requeued: set[int] = field(default_factory=set)


@dataclass(slots=True, kw_only=True)
class Recorder:
    """Records the sessions of a plan, round by round.

    Attributes:
        store: Where bundles go.
        shapes: Host id → shape.
        machines: Makes a VM.
        idle_wait_s: How long at most to wait for an idle machine; then the session starts regardless, and says so.
        cores: Cores for vCPU threads.
        room: Folders whose disks must have space left.
    """

    store: DiskStore
    shapes: dict[str, HostShape]
    machines: MachineFactory
    clock: Clock
    progress: Progress
    idle_wait_s: float = 600.0
    cores: tuple[int, ...] = ()
    room: tuple[Path, ...] = ()
    _tally: _Tally = field(default_factory=_Tally)

    async def record(self, sessions: Sequence[Session]) -> Summary:
        """Record every slot that the store does not hold yet.

        Raises:
            MachineError: If a disk is full.
        """
        began_ns, cpu_s = self.clock.mono_ns(), sum(os.times()[:2])
        held = self._held()
        queue: deque[Waiting] = deque()
        total = present = 0
        for session in sessions:
            slots = tuple(slot for slot in session.slots if (slot.host_id, slot.plan_seed) not in held)
            total, present = total + len(session.slots), present + len(session.slots) - len(slots)
            if slots:
                queue.append((session, slots))
        while queue:
            left_s = sum(round_s(one) for one in rounds(queue.copy(), self.shapes, len(self.cores)))
            this = take_round(queue, self.shapes, len(self.cores))
            what = "; ".join(
                f"{session.host_id}: {', '.join(f'{slot.profile}/{slot.sample_name}' for slot in slots)}"
                for session, slots in this
            )
            done = present + self._tally.recorded - len(self._tally.requeued) + len(self._tally.failed)
            self.progress.now(what, done=done, total=total, left_s=left_s)
            queue.extend(await self._record_round(this))
        tally = self._tally
        return Summary(
            recorded=tally.recorded,
            crowded=tally.crowded,
            present=present,
            failed=tuple(tally.failed),
            late=tally.late,
            skipped=tally.skipped,
            recorder_cpu_s=sum(os.times()[:2]) - cpu_s,
            wall_s=(self.clock.mono_ns() - began_ns) / 1e9,
        )

    async def _record_round(self, this: Round) -> list[Waiting]:
        """Play the slots at the same time and store what came of it; gives the slots to be queued again."""
        self._check_room()
        names = ", ".join(session.session for session, _ in this)
        load = await wait_until_idle(
            self.clock,
            at_most_s=self.idle_wait_s,
            on_busy=lambda load: self.progress.line(
                f"{names}: other work keeps {load:.1f} cores busy; waiting up to {self.idle_wait_s:.0f} s for it"
            ),
        )
        if load >= IDLE_CORES:
            self.progress.line(f"{names}: other work keeps {load:.1f} cores busy; recording beside it")
        played = [(session, slot, self.shapes[session.host_id]) for session, slots in this for slot in slots]
        pins = self._pins([shape.vcpus for _, _, shape in played])
        machines = [self.machines(shape, place, pins[place]) for place, (_, _, shape) in enumerate(played)]
        takes = await asyncio.gather(
            *(play(machine, slot, self.clock) for machine, (_, slot, _) in zip(machines, played, strict=True)),
            return_exceptions=True,
        )
        again: list[Waiting] = []
        ids = {
            slot.plan_seed: self._new_id()
            for (_, slot, _), take in zip(played, takes, strict=True)
            if isinstance(take, Take)
        }
        for (session, slot, shape), take in zip(played, takes, strict=True):
            once_more = (session, (slot,))
            if isinstance(take, Take):
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
        self, take: Take, slot: Slot, shape: HostShape, session: str, episode_id: EpisodeId, neighbours: tuple[str, ...]
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

    def _is_crowded(self, take: Take, slot: Slot) -> bool:
        """Say whether the slot is to be recorded once more because its VM had to wait for a core."""
        wait = take.vcpu_wait
        if wait is None or wait <= CROWDED:
            return False
        self._tally.crowded += 1
        if slot.plan_seed in self._tally.requeued:
            return False
        self._tally.requeued.add(slot.plan_seed)
        self.progress.line(f"{slot.host_id}: {slot.sample_name} waited {wait:.2f} cores for a core; queued once more")
        return True

    def _may_retry(self, slot: Slot, error: VmError | BundleError) -> bool:
        self._tally.attempts[slot.plan_seed] += 1
        if self._tally.attempts[slot.plan_seed] <= RETRIES:
            self.progress.line(f"{error}; tried again later")
            return True
        self._tally.failed.append(f"{slot.host_id}: {slot.profile}/{slot.sample_name} (seed {slot.plan_seed}): {error}")
        self.progress.line(f"{error}; given up after {RETRIES + 1} attempts")
        return False

    def _held(self) -> frozenset[tuple[str, int]]:
        """Read which slots the store holds already."""
        if not self.store.path.exists():
            return frozenset()
        held = set()
        for store in (self.store, DiskStore(self.store.path / SENT)):  # what a shipper has taken is recorded, too
            for item in store.walk() if store.path.is_dir() else ():
                with suppress(BundleError):  # a broken bundle is the validator's to report; its slot is recorded again
                    manifest = peek(store.read(item), file=item.path)
                    held.add((manifest.host.host_id, manifest.plan_seed))
        return frozenset(held)

    def _pins(self, vcpus: Sequence[int]) -> list[tuple[int, ...]]:
        """Give each VM of a round the cores of its vCPUs; none where there are not enough for all of them."""
        pins = []
        for place, many in enumerate(vcpus):
            first = sum(vcpus[:place])
            cores = self.cores[first : first + many]
            pins.append(cores if len(cores) == many else ())
        return pins

    def _check_room(self) -> None:
        for folder in self.room:
            free = shutil.disk_usage(folder).free
            if free < FREE_BYTES:
                raise MachineError(
                    f"{folder}: {free >> 20} MiB free, {FREE_BYTES >> 20} MiB needed; make room, then record again: "
                    "what is there is kept"
                )

    def _new_id(self) -> EpisodeId:
        return uuid7(self.clock.wall_ns() // 1_000_000, os.urandom(10))
