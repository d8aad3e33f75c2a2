"""Watch many VMs in one process: find them, attach to each, follow them as they come and go, restore all at the end.

All VMs share one event loop, one sampling tick, one loaded model per channel set and one cleanup process. A VM that
cannot be watched is reported with the reason and tried again, less and less often; it never holds up another.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import resource
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from phasewatch.events.schema import EventEnvelope
from phasewatch.inference.model_selection import ModelCandidate
from phasewatch.inference.predictor import PhasePredictor
from phasewatch.live.cleanup import CleanupProcess
from phasewatch.live.discover import RunningVm, VmIdentity, VmScanner, identify_vms, matches_pattern
from phasewatch.live.fleet_member import FleetMember, MemberReport, MemberStatus, MemberStatusKind
from phasewatch.live.session import (
    AttachedVm,
    WatchRequest,
    attach_vm,
    check_save_folder,
    select_models,
    supervise_cleanup_process,
)
from phasewatch.live.state import WatchState
from phasewatch.live.watch_loop import WatchLoop
from phasewatch.live.watcher import WatchCallbacks, WatchEndReason
from phasewatch.models.smoothing import SMOOTHING_NONE
from phasewatch.telemetry.base import AsyncClock, HostClock
from phasewatch.telemetry.libvirt import LibvirtHypervisor
from phasewatch.telemetry.process import PROC_ROOT

__all__ = ["DEFAULT_MAX_VMS", "FleetReport", "FleetRequest", "FleetWatch", "raise_file_limit"]

logger = logging.getLogger(__name__)

DEFAULT_MAX_VMS = 256
SCAN_INTERVAL_NS = 2_000_000_000
_START_INTERVAL_NS = 250_000_000
_STARTS_AT_ONCE = 8  # begun in one interval, so that a storm of VMs does not take the time of those that are watched
_FILES_PER_VM = 48  # open files: /proc, monitor, dumps and sockets
_FILES_BESIDE = 128
_MAX_REPORTS = 1000  # VMs that are gone in the final report


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRequest:
    """Which VMs to watch, and how.

    Attributes:
        patterns: Names, UUIDs, or patterns of names (``*``, ``?``, ``[…]``).
        exclude: The same, of VMs that are not watched.
        models, channels, save, smoothing, seconds, state: As in `WatchRequest`.
        max_vms: Maximum number of VMs that are watched at a time; further ones are reported.
    """

    patterns: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    models: tuple[ModelCandidate, ...] = ()
    channels: str = ""
    save: Path | None = None
    smoothing: str = SMOOTHING_NONE
    seconds: float = 0.0
    state: Path | None = None
    max_vms: int = DEFAULT_MAX_VMS


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """Result of the watch of many VMs.

    Attributes:
        why: Why it ended.
        vms: The VMs in the order in which they were found; of those that are gone the last thousand.
        n_gone: Number of VMs that ended meanwhile.
        windows, alarms, activity_alarms: Sums over all VMs.
        left_as_found: False if something that the watch added may still be in a VM.
    """

    why: WatchEndReason
    vms: tuple[MemberReport, ...]
    n_gone: int
    windows: int
    alarms: int
    activity_alarms: int
    left_as_found: bool


def raise_file_limit() -> int:
    """Raise this process's limit of open files to what it may be, and return it.

    Source: ``getrlimit(2)``, ``RLIMIT_NOFILE``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


class FleetWatch:
    """Watches all VMs that match a request until it is cancelled or the time is up.

    Args:
        request: Which VMs, and how.
        callbacks: Receivers of the events of all VMs. If one raises, the watch ends with that error.
        on_status: Receives the status of a VM whenever it changed; may not block or raise.
        clock: Clock of the host.
        proc: Path of /proc.
        file_limit: Number of files that this process may open, which bounds the number of VMs.
        hypervisor: The libvirt daemon that is asked about its domains; None for that of this host.

    Attributes:
        request, callbacks, clock, proc: As above; an error of a callback is kept back until the watch has ended.
        loop: The common sampling loop.
        state: Alarms of all VMs.
        writer: Thread that writes the bundles of all VMs.
    """

    def __init__(
        self,
        request: FleetRequest,
        callbacks: WatchCallbacks,
        *,
        on_status: Callable[[MemberStatus], None] = lambda status: None,
        clock: AsyncClock | None = None,
        proc: Path = PROC_ROOT,
        file_limit: int | None = None,
        hypervisor: LibvirtHypervisor | None = None,
    ) -> None:
        self.request, self.proc = request, proc
        self.clock: AsyncClock = clock or HostClock()
        self.callbacks = replace(callbacks, on_event=self._send_event)
        self.loop = WatchLoop(self.clock)
        self.state = WatchState(request.state)
        self.writer = ThreadPoolExecutor(1)  # starts its thread with the first bundle
        self._on_event, self._on_status = callbacks.on_event, on_status
        self._cleanup = CleanupProcess()
        self._hypervisor = hypervisor or LibvirtHypervisor(self.clock)
        self._scanner = VmScanner(proc)
        models = select_models(request.models, request.channels)
        self._models = tuple(replace(model, load=functools.cache(model.load)) for model in models)
        self._predictors: dict[tuple[str, str, int, str], PhasePredictor] = {}
        files = file_limit if file_limit is not None else raise_file_limit()
        self._max_vms = max(1, min(request.max_vms, (files - _FILES_BESIDE) // _FILES_PER_VM))
        self._members: dict[tuple[int, int], FleetMember] = {}
        self._tasks: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._waiting: list[tuple[RunningVm, VmIdentity]] = []
        self._refused: frozenset[int] = frozenset()
        self._gone: deque[MemberReport] = deque(maxlen=_MAX_REPORTS)
        self._totals = [0, 0, 0]
        self._n_gone = 0
        self._is_left_as_found = True
        self._failure: Exception | None = None
        self._has_failed = asyncio.Event()

    async def run(self) -> FleetReport:
        """Watch until cancelled or the time is up, then restore all VMs and return what was counted.

        Raises:
            PhasewatchError: If the watch cannot begin.
            Exception: If a callback failed.
        """
        why = WatchEndReason.TIMEOUT
        check_save_folder(self.request.save)
        with self.state, self._cleanup, closing(self._hypervisor):
            tasks = [
                asyncio.create_task(work)
                for work in (
                    self.loop.run(),
                    self._follow_vms(),
                    supervise_cleanup_process(self._cleanup),
                    self._has_failed.wait(),
                )
            ]
            deadline = asyncio.create_task(self._wait(self.request.seconds)) if self.request.seconds else None
            waited = [*tasks, *([deadline] if deadline else [])]
            try:
                done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # raises: a programming error that concerns all VMs
            except asyncio.CancelledError:
                why = WatchEndReason.INTERRUPTED
                if current := asyncio.current_task():
                    current.uncancel()  # else Python before 3.11.3 (Debian 12) takes time-outs of the clean-up for it
            finally:
                members = tuple(self._tasks.values())
                for task in members:
                    task.cancel()
                await asyncio.gather(*members, return_exceptions=True)
                for task in waited:
                    task.cancel()
                await asyncio.gather(*waited, return_exceptions=True)
        for key in tuple(self._members):
            self._remove_member(key, is_gone=False)
        if self._failure is not None:
            raise self._failure
        windows, alarms, activity_alarms = self._totals
        return FleetReport(
            why=why,
            vms=tuple(self._gone),
            n_gone=self._n_gone,
            windows=windows,
            alarms=alarms,
            activity_alarms=activity_alarms,
            left_as_found=self._is_left_as_found,
        )

    async def attach(self, machine: RunningVm) -> AttachedVm:
        """Attach to a VM; VMs of the same channel set get the same loaded model."""
        request = WatchRequest(
            machine=machine,
            models=self._models,
            channels=self.request.channels,
            save=self.request.save,
            smoothing=self.request.smoothing,
        )
        vm = await attach_vm(request, self._cleanup, clock=self.clock, proc=self.proc, hypervisor=self._hypervisor)
        if vm.predictor is not None:
            own = vm.predictor
            key = own.model, own.threat, own.seed, str(own.spec.table)
            vm.predictor = self._predictors.setdefault(key, own)
        return vm

    def report_status(self, status: MemberStatus) -> None:
        """Report that the status of a VM changed."""
        self._on_status(status)

    async def _follow_vms(self) -> None:
        """Look for VMs every two seconds, and begin to watch those that are new, a few at a time."""
        scan_ns = self.clock.mono_ns()
        while True:
            now_ns = self.clock.mono_ns()
            if now_ns >= scan_ns:
                scan_ns = now_ns + SCAN_INTERVAL_NS
                self._scan()
            for machine, identity in self._waiting[:_STARTS_AT_ONCE]:
                self._add_member(machine, identity)
            del self._waiting[:_STARTS_AT_ONCE]
            next_ns = now_ns + _START_INTERVAL_NS if self._waiting else scan_ns
            await self.clock.sleep_until(min(next_ns, scan_ns))

    def _scan(self) -> None:
        for key, task in tuple(self._tasks.items()):
            if task.done():
                self._remove_member(key, is_gone=True)
                del self._tasks[key]
                if not task.cancelled() and (error := task.exception()) is not None:
                    logger.error("a VM is no longer followed: %s: %s", type(error).__name__, error, exc_info=error)
        running = self._scanner.scan()
        identities = identify_vms(running)
        wanted = [machine for machine in running if self._is_wanted(machine)]
        new = [machine for machine in wanted if (machine.pid, machine.start_ticks) not in self._members]
        n_free = max(0, self._max_vms - len(self._members))
        self._waiting = [(machine, identities[machine.pid]) for machine in new[:n_free]]
        self._report_refused(new[n_free:])

    def _is_wanted(self, machine: RunningVm) -> bool:
        if any(matches_pattern(machine, pattern) for pattern in self.request.exclude):
            return False
        return any(matches_pattern(machine, pattern) for pattern in self.request.patterns)

    def _report_refused(self, refused: Sequence[RunningVm]) -> None:
        """Report VMs that are not watched because there are too many."""
        before, self._refused = self._refused, frozenset(machine.pid for machine in refused)
        for machine in refused:
            if machine.pid not in before:
                self._on_status(
                    MemberStatus(
                        name=machine.name,
                        host=machine.host_id,
                        pid=machine.pid,
                        kind=MemberStatusKind.NOT_WATCHED,
                        reason=f"{self._max_vms} VMs are watched, which is the limit (--max-vms, open files)",
                    )
                )

    def _add_member(self, machine: RunningVm, identity: VmIdentity) -> None:
        key = machine.pid, machine.start_ticks
        self._members[key] = FleetMember(machine, identity, self)
        self._on_status(self._members[key].status)
        self._tasks[key] = asyncio.create_task(self._members[key].run())

    def _remove_member(self, key: tuple[int, int], *, is_gone: bool) -> None:
        report = self._members.pop(key).build_report()
        watched = report.watched
        for at, count in enumerate((watched.windows, watched.alarms, watched.activity_alarms)):
            self._totals[at] += count
        self._is_left_as_found &= report.left_as_found
        self._n_gone += is_gone
        self._gone.append(report)

    async def _wait(self, seconds: float) -> None:
        await self.clock.sleep_until(self.clock.mono_ns() + round(seconds * 1e9))

    def _send_event(self, event: EventEnvelope, is_alarm_change: bool) -> None:
        """Pass an event on; a receiver that fails ends the watch of all VMs, not that of this one."""
        if self._failure is not None:
            return
        try:
            self._on_event(event, is_alarm_change)
        except Exception as exc:
            self._failure = exc
            self._has_failed.set()
