"""Follow one VM of a fleet: attach, watch, attach again after a failure or when more can be read, until it is gone."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from phasewatch.errors import PhasewatchError, VmError
from phasewatch.live.access import connect_monitor
from phasewatch.live.discover import RunningVm, VmIdentity, read_running_vm
from phasewatch.live.session import AttachedVm, VmWatch
from phasewatch.live.state import WatchState
from phasewatch.live.survey import VmSurvey
from phasewatch.live.watch_loop import WatchLoop
from phasewatch.live.watcher import WatchCallbacks, WatchResult
from phasewatch.telemetry.base import AsyncClock
from phasewatch.telemetry.process import ProcessHandle
from phasewatch.types import LIVE_STRIDE_BINS, SourceKind

__all__ = ["FleetMember", "MemberReport", "MemberStatus", "MemberStatusKind", "SharedWatch"]

logger = logging.getLogger(__name__)

_FIRST_RETRY_NS = 5_000_000_000
_MAX_RETRY_NS = 300_000_000_000
_ATTACH_TIMEOUT_S = 60.0  # a monitor may answer each of many questions just before its deadline
PROBE_INTERVAL_NS = 30_000_000_000  # between two looks for a monitor or hardware that was not there
_MAX_NAME_CHARS = 200  # of a name in a status; QEMU bounds none
_GROWABLE_SOURCES = (f"{SourceKind.QMP}.", f"{SourceKind.NETFLOW}.")


class MemberStatusKind(StrEnum):
    """Whether a VM is watched."""

    ATTACHING = "attaching"
    WATCHED = "watched"
    NOT_WATCHED = "not watched"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberStatus:
    """State of one VM of a fleet.

    Attributes:
        name, host, pid: Name, host id and process id of the VM.
        kind: Whether it is watched.
        reason: Why it is not watched; empty if it is.
        model, threat: Name of the model and of its channel set; empty without a model.
        vm_state: State of the VM, such as ``paused``; empty before it is known.
        masked: Number of channels that it cannot provide.
    """

    name: str
    host: str
    pid: int
    kind: MemberStatusKind
    reason: str = ""
    model: str = ""
    threat: str = ""
    vm_state: str = ""
    masked: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberReport:
    """Result of the watch of one VM of a fleet.

    Attributes:
        name, host, pid, identity: Name, host id, process id and `VmIdentity.key` of the VM.
        watched: Counts and states, summed over all times that it was attached.
        model, threat: The last model and its channel set; empty if it was never watched.
        reason: Why it was not watched at the end; empty if it was.
        left_as_found: False if something that the watch added may still be in the VM.
    """

    name: str
    host: str
    pid: int
    identity: str
    watched: WatchResult
    model: str
    threat: str
    reason: str
    left_as_found: bool


class SharedWatch(Protocol):
    """What all VMs of a fleet share."""

    @property
    def clock(self) -> AsyncClock:
        """Clock of the host."""

    @property
    def proc(self) -> Path:
        """Path of /proc."""

    @property
    def loop(self) -> WatchLoop:
        """The common sampling loop."""

    @property
    def state(self) -> WatchState:
        """Alarms of all VMs."""

    @property
    def callbacks(self) -> WatchCallbacks:
        """Receivers of events; they do not raise."""

    @property
    def writer(self) -> ThreadPoolExecutor:
        """Thread that writes the bundles of all VMs."""

    async def attach(self, machine: RunningVm) -> AttachedVm:
        """Attach to a VM."""

    def report_status(self, status: MemberStatus) -> None:
        """Report that the status of a VM changed."""


class FleetMember:
    """One VM of a fleet, from the scan that found it until its process is gone.

    Args:
        machine: The VM.
        identity: What tells it from others in the state.
        shared: What all VMs share.

    Attributes:
        machine, identity: As above.
        status: Its present status.
    """

    def __init__(self, machine: RunningVm, identity: VmIdentity, shared: SharedWatch) -> None:
        self.machine, self.identity, self._shared = machine, identity, shared
        self._process = ProcessHandle(machine.pid, machine.start_ticks, shared.proc)
        self._total = WatchResult()
        self._next_event = 1
        self._model = self._threat = ""
        self._left: list[AttachedVm] = []  # attached earlier, and not restored
        self.status = MemberStatus(
            name=machine.name[:_MAX_NAME_CHARS],
            host=machine.host_id,
            pid=machine.pid,
            kind=MemberStatusKind.ATTACHING,
        )

    async def run(self) -> None:
        """Follow the VM until its process is gone, or the task is cancelled."""
        retry_ns = _FIRST_RETRY_NS
        try:
            while self._process.is_alive:
                began_ns = self._shared.clock.mono_ns()
                reason = await self._try_watch()
                if not self._process.is_alive:
                    break
                if not reason:  # more can be read now
                    retry_ns = _FIRST_RETRY_NS
                    continue
                if self._shared.clock.mono_ns() - began_ns > _MAX_RETRY_NS:  # it was watched for long
                    retry_ns = _FIRST_RETRY_NS
                self._set_status(kind=MemberStatusKind.NOT_WATCHED, reason=reason)
                await self._sleep_while_alive(retry_ns)
                retry_ns = min(2 * retry_ns, _MAX_RETRY_NS)
            for vm in self._left:  # a VM that is gone needs no cleanup
                vm.dismiss_cleanup()
            self._left.clear()
            self._set_status(kind=MemberStatusKind.GONE, reason="", vm_state="gone")
        finally:
            self._process.close()

    def build_report(self) -> MemberReport:
        """Return the result so far."""
        return MemberReport(
            name=self.status.name,
            host=self.status.host,
            pid=self.machine.pid,
            identity=self.identity.key,
            watched=self._total,
            model=self._model,
            threat=self._threat,
            reason=self.status.reason,
            left_as_found=not self._left,
        )

    async def _try_watch(self) -> str:
        """Attach and watch; return why that ended, or an empty text to attach again at once."""
        try:
            async with asyncio.timeout(_ATTACH_TIMEOUT_S):
                vm = await self._shared.attach(self._refresh())
        except TimeoutError:
            return f"it could not be attached within {_ATTACH_TIMEOUT_S:g} s"
        except Exception as exc:  # whatever is wrong with this VM, the others go on
            return _describe_failure(exc)
        for old in self._left:  # `attach` removed what they had left
            old.dismiss_cleanup()
        self._left.clear()
        try:
            return await self._watch(vm)
        except Exception as exc:
            return _describe_failure(exc)
        finally:
            if not await vm.close():
                self._left.append(vm)

    async def _watch(self, vm: AttachedVm) -> str:
        shared = self._shared
        watch = VmWatch(
            vm,
            replace(shared.callbacks, on_vm_state=self._set_vm_state),
            clock=shared.clock,
            state=shared.state,
            identity=self.identity,
            first_event=self._next_event,
            grid_bins=LIVE_STRIDE_BINS,
            writer=shared.writer,
        )
        predictor = vm.predictor
        self._model, self._threat = (predictor.model, predictor.threat) if predictor else ("", "")
        self._set_status(
            kind=MemberStatusKind.WATCHED,
            reason="",
            model=self._model,
            threat=self._threat,
            masked=len(vm.survey.masked),
        )
        watching = asyncio.create_task(watch.run(loop=shared.loop))
        probing = asyncio.create_task(self._wait_for_more(vm.survey))
        try:
            await asyncio.wait({watching, probing}, return_when=asyncio.FIRST_COMPLETED)
            news = probing.result() if probing.done() else ""
        finally:
            for task in (watching, probing):
                task.cancel()
            await asyncio.gather(watching, probing, return_exceptions=True)
            self._next_event = watch.watcher.next_event
            _add_counts(self._total, watch.watcher.result)
        watching.result()  # raises: a source or the model failed
        if news and vm.survey.is_alive:
            logger.info("%s: %s: attached again", self.machine.name, news)
        return ""

    async def _wait_for_more(self, survey: VmSurvey) -> str:
        """Return what is new once the VM has a monitor or hardware that could fill a missing channel."""
        before = await _list_hardware(survey)
        while True:
            await self._shared.clock.sleep_until(self._shared.clock.mono_ns() + PROBE_INTERVAL_NS)
            if survey.monitor is None:
                if await _can_connect(self._refresh(), self._shared.proc):
                    return "its monitor answers now"
            elif any(name.startswith(_GROWABLE_SOURCES) for name in survey.masked):
                now = await _list_hardware(survey)
                if now is not None and before is not None and now != before:
                    return "its hardware changed"
                before = now if before is None else before

    def _refresh(self) -> RunningVm:
        """Return the VM as it is now; monitors and taps may have come since it was found."""
        now = read_running_vm(self.machine.pid, self._shared.proc)
        if now is None or now.start_ticks != self.machine.start_ticks:
            return self.machine
        return replace(now, has_unique_name=self.machine.has_unique_name)

    async def _sleep_while_alive(self, duration_ns: int) -> None:
        clock = self._shared.clock
        end_ns = clock.mono_ns() + duration_ns
        while self._process.is_alive and clock.mono_ns() < end_ns:
            await clock.sleep_until(min(end_ns, clock.mono_ns() + 2_000_000_000))

    def _set_vm_state(self, state: str) -> None:
        self._set_status(vm_state=state)

    def _set_status(self, **changes: object) -> None:
        status = replace(self.status, **changes)  # type: ignore[arg-type]
        if status != self.status:
            self.status = status
            self._shared.report_status(status)


def _describe_failure(error: Exception) -> str:
    if isinstance(error, PhasewatchError | OSError):
        return str(error) or type(error).__name__
    logger.debug("a VM could not be watched", exc_info=error)
    return f"{type(error).__name__}: {error}"


async def _list_hardware(survey: VmSurvey) -> tuple[str, ...] | None:
    """Return the devices of a VM that can be plugged; None if its monitor does not tell.

    Source: QMP ``qom-list`` of ``/machine/peripheral`` and ``/machine/peripheral-anon``.
    """
    monitor = survey.monitor
    if monitor is None:
        return None
    names: list[str] = []
    try:
        for parent in ("/machine/peripheral", "/machine/peripheral-anon"):
            names += [str(child["name"]) for child in await monitor.ask("qom-list", path=parent)]
    except (VmError, KeyError, TypeError):
        return None
    return tuple(sorted(names))


async def _can_connect(machine: RunningVm, proc: Path) -> bool:
    if not machine.qmp:
        return False
    with suppress(VmError):
        monitor = await connect_monitor(machine, None, proc)
        await monitor.close()
        return True
    return False


def _add_counts(total: WatchResult, more: WatchResult) -> None:
    """Add the counts of one watch of a VM to those of the earlier ones."""
    total.why = more.why
    for name in ("windows", "alarms", "activity_alarms", "late", "skipped", "failed", "restarts", "contended"):
        setattr(total, name, getattr(total, name) + getattr(more, name))
    for name, count in more.lost.items():
        total.lost[name] = total.lost.get(name, 0) + count
    total.states = [*total.states, *more.states][-1000:]
    total.saved += more.saved
    total.not_saved += more.not_saved
    total.save_failure = more.save_failure or total.save_failure
