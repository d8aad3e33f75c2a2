"""The cleanup process: when the watcher dies, even by kill -9, it undoes the watcher's changes to its VMs.

One process serves all VMs of a watcher. It holds the read end of a pipe whose write end only the watcher has; the
pipe's end means that the watcher is gone. Over the pipe the watcher adds the changes to a VM before it makes them, and
removes them once it undid them itself. If a VM does not answer, the process tries again until the VM answers, is gone,
or a later watcher has cleaned up; the VMs do not wait for each other. While the watcher lives, the process also keeps
the packet dumps in memory small. The watcher restarts a cleanup process that dies; if both die, the next watcher cleans
up with the help of `ownership`.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

if TYPE_CHECKING:
    from phasewatch.telemetry.qmp import QmpMonitor

__all__ = ["CleanupProcess", "CleanupTask", "truncate_dumps", "undo_changes"]

CONNECT_ATTEMPTS = 20
MAX_DUMP_BYTES = 32 << 20  # total of all dumps: twice what a watcher that reads them lets them grow to
_POLL_S = 2.0
_RETRY_S = 10.0  # between two attempts with a VM that does not answer
_PIPE_BYTES = 1 << 20  # holds the changes to a thousand VMs
_READ_BYTES = 1 << 16


class CleanupTask(msgspec.Struct, frozen=True, kw_only=True):
    """The changes to a VM that must be undone.

    Attributes:
        vm_pid, vm_start_ticks: The QEMU process; a later process with its number or socket is left alone. 0 for any.
        proc: Path of /proc.
        qmp: Path of the QMP socket; empty if none is used.
        objects: Ids of QEMU objects that may have been added to the VM.
        bitmaps: Names of dirty bitmaps that may have been added to its disks.
        balloon: Path of the balloon device in QEMU's object tree; empty if it was not changed.
        interval_s: The balloon's original polling interval.
        folder: The watcher's private folder, to be removed; empty if there is none.
    """

    vm_pid: int = 0
    vm_start_ticks: int = 0
    proc: str = "/proc"
    qmp: str = ""
    objects: tuple[str, ...] = ()
    bitmaps: tuple[str, ...] = ()
    balloon: str = ""
    interval_s: int = 0
    folder: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether nothing must be undone."""
        return not (self.objects or self.bitmaps or self.balloon or self.folder)


class _GuardMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line over the pipe: a task that is added, or without a task one that is removed."""

    key: int
    task: CleanupTask | None = None


class CleanupProcess:
    """A context manager that runs the cleanup process from the first change of a VM until the block ends.

    At the end the process undoes the changes that were not dismissed, or stops if there are none.
    """

    def __init__(self) -> None:
        self._tasks: dict[int, CleanupTask] = {}
        self._next_key = 0
        self._child: subprocess.Popen[bytes] | None = None

    def add(self, task: CleanupTask) -> int:
        """Register changes before they are made; return the key for `dismiss`.

        Raises:
            OSError: If no process can be started; nothing was changed yet, and the task's folder is removed.
        """
        key, self._next_key = self._next_key, self._next_key + 1
        if task.is_empty:
            return key
        self._tasks[key] = task
        try:
            if not self.restart_if_dead() and not self._send(_GuardMessage(key, task)):
                self._replace()
        except OSError:
            self._tasks.pop(key)
            _remove_folder(task.folder)
            raise
        return key

    def dismiss(self, key: int) -> None:
        """Declare that a VM is unchanged again, so that nothing must be undone; remove the task's folder."""
        task = self._tasks.pop(key, None)
        if task is not None:
            self._send(_GuardMessage(key))  # a process that is gone knows of no task once it is replaced
            _remove_folder(task.folder)

    def restart_if_dead(self) -> bool:
        """Start a new process if one is needed and the present one is gone; return whether it was.

        Raises:
            OSError: If no process can be started.
        """
        if not self._tasks or (self._child is not None and self._child.poll() is None):
            return False
        self._replace()
        return True

    def _replace(self) -> None:
        """Start a process that knows all tasks, in the place of one that is gone or does not read."""
        before, self._child = self._child, None
        if before is not None:
            before.kill()  # before its pipe ends, which it would take for the watcher's end
            before.wait()
            if before.stdin is not None:
                with suppress(OSError):
                    before.stdin.close()
        child = subprocess.Popen(
            [sys.executable, "-m", "phasewatch.live.cleanup"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal must reach the watcher alone
            bufsize=0,
        )
        if child.stdin is not None:
            with suppress(OSError):
                fcntl.fcntl(child.stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            with suppress(OSError):  # it died at once: the next check replaces it
                for key, task in self._tasks.items():
                    _write_all(child.stdin.fileno(), _render_message(_GuardMessage(key, task)))
            os.set_blocking(child.stdin.fileno(), False)
        self._child = child

    def _send(self, message: _GuardMessage) -> bool:
        """Send a message without waiting; return False if the process is gone or does not read."""
        if self._child is None or self._child.stdin is None:
            return False
        line = _render_message(message)
        with suppress(OSError):
            return os.write(self._child.stdin.fileno(), line) == len(line)
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks:
            with suppress(OSError):  # no process can be started: the next watch of these VMs cleans up
                self.restart_if_dead()
        child, self._child = self._child, None
        if child is None or child.stdin is None:
            return
        with suppress(OSError):
            child.stdin.close()
        if self._tasks:
            return  # do not wait: a monitor may serve this process alone until it ends
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)

    @property
    def pid(self) -> int:
        """Process id of the cleanup process; 0 before the start and after the end."""
        return self._child.pid if self._child is not None else 0


def _render_message(message: _GuardMessage) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _clean_up_after_watcher(pipe: int) -> None:
    """Follow the watcher's tasks until it ends, and undo those that are left."""
    tasks: dict[int, CleanupTask] = {}
    rest = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], _POLL_S)
        if not ready:
            for task in tasks.values():
                _truncate_task_dumps(task)
            continue
        data = os.read(pipe, _READ_BYTES)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            message = msgspec.json.decode(line, type=_GuardMessage)
            if message.task is not None:
                tasks[message.key] = message.task
            elif message.key in tasks:
                _remove_folder(tasks.pop(message.key).folder)
    # A message that was cut announces a change that was never made.
    asyncio.run(_undo_all(tuple(tasks.values())))


async def _undo_all(tasks: Sequence[CleanupTask]) -> None:
    await asyncio.gather(*(_undo_with_retries(task) for task in tasks), return_exceptions=True)


async def _undo_with_retries(task: CleanupTask) -> None:
    """Undo the changes, again and again while the VM does not answer; keep its dumps small meanwhile."""
    while not await undo_changes(task):
        until_s = time.monotonic() + _RETRY_S
        while time.monotonic() < until_s:
            if task.folder and not Path(task.folder).exists():
                return  # a later watcher has cleaned up
            _truncate_task_dumps(task)
            await asyncio.sleep(_POLL_S)
    _remove_folder(task.folder)


def _truncate_task_dumps(task: CleanupTask) -> None:
    if task.folder:
        truncate_dumps(Path(task.folder))


def _remove_folder(folder: str) -> None:
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def truncate_dumps(folder: Path) -> None:
    """Truncate the largest files until all together are within `MAX_DUMP_BYTES`.

    QEMU continues at its old offset; the hole before it takes no memory.
    """
    with suppress(OSError):
        sizes = sorted(((path.stat().st_blocks * 512, path) for path in folder.iterdir()), reverse=True)
        excess = sum(size for size, _ in sizes) - MAX_DUMP_BYTES
        for size, path in sizes:
            if excess <= 0:
                break
            os.truncate(path, 0)
            excess -= size


async def undo_changes(task: CleanupTask) -> bool:
    """Remove objects and dirty bitmaps from the VM and restore the balloon's interval; a VM that is gone needs neither.

    Returns:
        False if the VM still runs and did not answer.
    """
    if not task.qmp or not (task.objects or task.bitmaps or task.balloon):
        return True
    from phasewatch.errors import VmError
    from phasewatch.telemetry.process import owns_threads
    from phasewatch.telemetry.qmp import QmpMonitor

    for _ in range(CONNECT_ATTEMPTS):  # the monitor serves one client: the dead watcher's connection may still close
        if _is_vm_gone(task):
            return True
        monitor = QmpMonitor(Path(task.qmp))
        try:
            await monitor.connect()
        except VmError:
            if not Path(task.qmp).exists():
                return True
            await asyncio.sleep(0.5)
            continue
        try:
            if task.vm_pid and not owns_threads(task.vm_pid, await monitor.query_vcpu_threads(), Path(task.proc)):
                return True  # another VM has the socket now
            if await _restore_vm(task, monitor):
                return True
        except (VmError, KeyError, TypeError):
            await asyncio.sleep(0.5)
        finally:
            await monitor.close()
    return False


async def _restore_vm(task: CleanupTask, monitor: QmpMonitor) -> bool:
    """Undo the changes over a connected monitor; return whether none of the objects and bitmaps is left.

    Uses the QMP commands ``qom-list``, ``object-del``, ``query-named-block-nodes``, ``block-dirty-bitmap-remove`` and
    ``qom-set``.
    """
    from phasewatch.errors import VmError
    from phasewatch.live.ownership import find_other_watchers
    from phasewatch.telemetry.monitor_sensors import list_bitmaps, remove_bitmaps
    from phasewatch.telemetry.qmp import BALLOON_POLLING_PROPERTY

    async def list_left() -> set[str]:
        return {child["name"] for child in await monitor.ask("qom-list", path="/objects")} & set(task.objects)

    for name in await list_left():
        await monitor.ask("object-del", id=name)
    # Another running watcher needs the balloon polled, and knows the original interval.
    if task.balloon and not find_other_watchers(task.vm_pid, task.vm_start_ticks, Path(task.proc)):
        with suppress(VmError):  # unplugged meanwhile
            await monitor.ask("qom-set", path=task.balloon, property=BALLOON_POLLING_PROPERTY, value=task.interval_s)
    if await list_left():
        return False
    if not task.bitmaps:
        return True
    await remove_bitmaps(monitor.ask, task.bitmaps)
    return not {name for _, name in await list_bitmaps(monitor.ask)} & set(task.bitmaps)


def _is_vm_gone(task: CleanupTask) -> bool:
    from phasewatch.telemetry.process import read_start_ticks

    return bool(task.vm_pid) and read_start_ticks(task.vm_pid, Path(task.proc)) != task.vm_start_ticks


def main() -> None:
    """Run the cleanup process; its tasks come over standard input.

    Signals are ignored, because a service manager sends them to every process of a service, the cleanup process of a
    killed watcher included; only the end of the pipe ends it.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _clean_up_after_watcher(sys.stdin.fileno())


if __name__ == "__main__":
    main()
