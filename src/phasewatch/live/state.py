"""Store the alarms of all VMs over restarts of the watcher: the file ``watch_v1.json`` of the state folder.

A watcher that starts again continues the alarms that were on: it does not raise them again, and does not forget them.
The file is replaced as a whole after each change, so that a killed watcher leaves the last complete one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import msgspec

from phasewatch import atomic
from phasewatch.errors import MachineError, describe_os_error
from phasewatch.inference.predictor import AlarmMemory
from phasewatch.live.discover import VmIdentity
from phasewatch.models.alarm import AlarmKind, AlarmState

__all__ = ["STATE_FILE", "STATE_FORMAT", "WatchState"]

logger = logging.getLogger(__name__)

STATE_FILE = "watch_v1.json"
STATE_FORMAT = "phasewatch-watch-state-1"
_MAX_FILE_BYTES = 8 << 20
_MAX_VMS = 4096
_MEMORY_NS = 60 * 10**9  # the windows that a rule remembers are continued after a shorter pause than this
_KEEP_ACTIVE_NS = 30 * 24 * 3600 * 10**9  # an alarm of a VM that is gone is kept this long
_KEEP_QUIET_NS = 3600 * 10**9
_SAVE_INTERVAL_NS = 10 * 10**9  # between two writes while no alarm changes
_CLOSE_TIMEOUT_S = 5.0


class StoredAlarm(msgspec.Struct, frozen=True, kw_only=True):
    """One alarm of one VM.

    Attributes:
        active: Whether it is on.
        since_ns: End of the window at which it started (Unix time); None while it is off.
        recent: Whether each of the last windows reached the threshold, oldest first.
    """

    active: bool = False
    since_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None
    recent: Annotated[tuple[bool, ...], msgspec.Meta(max_length=100)] = ()


class StoredVm(msgspec.Struct, frozen=True, kw_only=True):
    """The alarms of one VM.

    Attributes:
        identity: `VmIdentity.key`.
        process: `VmIdentity.process`.
        name: Name of the VM, for people.
        seen_ns: When the last window was decided (Unix time).
        alarms: Kind of alarm → its state.
    """

    identity: Annotated[str, msgspec.Meta(max_length=4096)]
    process: Annotated[str, msgspec.Meta(max_length=256)]
    name: Annotated[str, msgspec.Meta(max_length=4096)]
    seen_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    alarms: Annotated[dict[str, StoredAlarm], msgspec.Meta(max_length=8)]

    @property
    def is_active(self) -> bool:
        """Whether an alarm is on."""
        return any(alarm.active for alarm in self.alarms.values())


class _StateFile(msgspec.Struct, frozen=True, kw_only=True):
    format: str
    vms: Annotated[tuple[StoredVm, ...], msgspec.Meta(max_length=_MAX_VMS)]


class WatchState:
    """A context manager that holds the alarms of all VMs, and writes them into a folder if one is given.

    Writes run in a thread, because a disk may be slow. A failed write is logged once and tried again.

    Args:
        folder: State folder; None keeps the alarms in memory only.

    Raises:
        BusyError: At the start of the block, if another watcher uses the folder.
        MachineError: At the start of the block, if the folder cannot be used.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._vms: dict[str, StoredVm] = {}
        self._stack = ExitStack()
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._is_changed = self._is_urgent = self._is_failing = False
        self._saved_ns = 0

    def __enter__(self) -> Self:
        if self._folder is None:
            return self
        try:
            self._stack.enter_context(atomic.lock(self._folder))
            self._read(self._folder / STATE_FILE)
        except OSError as exc:
            raise MachineError(f"--state {describe_os_error(exc)}") from exc
        self._writer = ThreadPoolExecutor(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._collect_result(timeout_s=_CLOSE_TIMEOUT_S)
            if self._is_changed and self._writing is None:
                self._submit(self._saved_ns)
                self._collect_result(timeout_s=_CLOSE_TIMEOUT_S)
        finally:
            if self._writer is not None:
                self._writer.shutdown(wait=False, cancel_futures=True)
            self._stack.close()

    def find_alarms(self, identity: VmIdentity, now_ns: int) -> dict[AlarmKind, AlarmMemory]:
        """Return the alarms of a VM from an earlier watch; empty if it was never watched.

        An alarm that was on stays on until as many windows in a row as its rule looks at do not reach the threshold.
        The windows themselves are remembered only if the same process was watched a minute ago.
        """
        stored = self._vms.get(identity.key)
        if stored is None:  # it had another identity while another VM had its name or UUID
            stored = next((vm for vm in self._vms.values() if vm.process == identity.process), None)
        if stored is None:
            return {}
        is_continued = stored.process == identity.process and 0 <= now_ns - stored.seen_ns < _MEMORY_NS
        found = {}
        for kind in AlarmKind:
            alarm = stored.alarms.get(kind)
            if alarm is not None:
                recent = alarm.recent if is_continued else (True,) if alarm.active else ()
                found[kind] = AlarmMemory(
                    state=AlarmState(recent=recent, is_active=alarm.active),
                    since_ns=alarm.since_ns if alarm.active else None,
                )
        return found

    def update(self, identity: VmIdentity, name: str, alarms: Mapping[AlarmKind, AlarmMemory], now_ns: int) -> None:
        """Store the alarms of a VM after a decision, and write the file if an alarm changed or some time has passed."""
        before = self._vms.get(identity.key)
        stored = StoredVm(
            identity=identity.key,
            process=identity.process,
            name=name,
            seen_ns=max(0, now_ns),
            alarms={
                str(kind): StoredAlarm(active=alarm.state.is_active, since_ns=alarm.since_ns, recent=alarm.state.recent)
                for kind, alarm in alarms.items()
            },
        )
        self._vms[identity.key] = stored
        self._is_changed = True
        self._is_urgent |= _list_active(before) != _list_active(stored)
        self._save_if_due(now_ns)

    def _save_if_due(self, now_ns: int) -> None:
        if self._writer is None:
            return
        self._collect_result(timeout_s=0.0)
        if self._writing is None and (self._is_urgent or abs(now_ns - self._saved_ns) >= _SAVE_INTERVAL_NS):
            self._submit(now_ns)

    def _submit(self, now_ns: int) -> None:
        if self._writer is None or self._folder is None:
            return
        self._forget_old(now_ns)
        self._saved_ns, self._is_changed, self._is_urgent = now_ns, False, False
        data = msgspec.json.encode(_StateFile(format=STATE_FORMAT, vms=tuple(self._vms.values())))
        self._writing = self._writer.submit(atomic.write_atomic, self._folder / STATE_FILE, data)

    def _collect_result(self, *, timeout_s: float) -> None:
        """Collect the result of a finished write; a failed one is tried again later."""
        if self._writing is None:
            return
        try:
            self._writing.result(timeout_s)
        except FutureTimeoutError:
            return
        except OSError as exc:
            self._is_changed = True
            if not self._is_failing:
                self._is_failing = True
                logger.warning(
                    "--state %s: the alarms cannot be saved: %s; the watch goes on",
                    self._folder,
                    describe_os_error(exc),
                )
        else:
            if self._is_failing:
                self._is_failing = False
                logger.warning("--state %s: the alarms are saved again", self._folder)
        self._writing = None

    def _forget_old(self, now_ns: int) -> None:
        """Drop VMs that were not seen for long, and the oldest of too many."""
        kept = [
            vm
            for vm in self._vms.values()
            if now_ns - vm.seen_ns < (_KEEP_ACTIVE_NS if vm.is_active else _KEEP_QUIET_NS)
        ]
        kept.sort(key=lambda vm: (vm.is_active, vm.seen_ns))
        self._vms = {vm.identity: vm for vm in kept[-_MAX_VMS:]}

    def _read(self, path: Path) -> None:
        """Read the file; one that is damaged is moved aside, because the watch is more important."""
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return
        try:
            stored = msgspec.json.decode(data, type=_StateFile)
            problem = "" if stored.format == STATE_FORMAT else f"format {stored.format[:40]!r}, not {STATE_FORMAT!r}"
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            problem = str(exc)
        if problem:
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            logger.warning("%s: %s; it was moved to %s, and all alarms begin as off", path, problem, aside)
            return
        self._vms = {vm.identity: vm for vm in stored.vms}


def _list_active(vm: StoredVm | None) -> list[tuple[str, int | None]]:
    return sorted((kind, alarm.since_ns) for kind, alarm in vm.alarms.items() if alarm.active) if vm else []
