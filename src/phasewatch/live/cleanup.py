"""The guard child: when the watcher dies, even by kill -9, it takes out of the VM what the watcher had put in.

It holds the read end of a pipe whose write end only the watcher has. While the watcher lives it also sees to it that
the dump in memory stays small, should nobody read it. Told ``done`` it leaves the VM alone; a watcher that could not
give the VM back itself says nothing. A guard whose VM does not answer tries again until it does, is gone, or a later
watcher has cleaned up. A guard that dies is replaced by the watcher; where both die, `ownership` has what is needed.
"""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

if TYPE_CHECKING:
    from phasewatch.telemetry.qmp import QmpMonitor

CLEANUP_POLL_S = 2.0
CLEANUP_RETRY_S = 10.0  # between two rounds of a VM that does not answer
MAX_DUMP_BYTES = 32 << 20  # of all dumps: twice what a reading watcher lets them grow to
CONNECT_ATTEMPTS = 20
DISMISS_MESSAGE = b"done\n"


class CleanupTask(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be undone.

    Attributes:
        qmp: The monitor's socket; empty where none is used.
        objects: Object ids that may stand in the VM.
        balloon: Its path in QEMU's tree, and the polling interval (s) that it had; empty where it was left alone.
        folder: The private folder, to be removed; empty where there is none.
        vm_pid, vm_start_ticks: The QEMU process, so that a later one with its socket or number is left alone; 0 for any.
        proc: Where /proc is.
    """

    vm_pid: int = 0
    vm_start_ticks: int = 0
    proc: str = "/proc"
    qmp: str = ""
    objects: tuple[str, ...] = ()
    balloon: str = ""
    interval_s: int = 0
    folder: str = ""


class CleanupProcess:
    """Starts a guard for a task, before the VM is touched; leaving the block sends it away, or to work if it was not dismissed."""

    def __init__(self, task: CleanupTask) -> None:
        self._task = task
        self._child: subprocess.Popen[bytes] | None = None
        self._is_needed = True

    def dismiss(self) -> None:
        """Say that the VM is as it was: nothing is left to be undone."""
        self._is_needed = False

    def restart_if_dead(self) -> bool:
        """Start another guard if this one is gone; return whether it was.

        Raises:
            OSError: If none can be started.
        """
        if self._child is not None and self._child.poll() is None:
            return False
        before, self._child = self._child, None
        if before is not None and before.stdin is not None:
            with suppress(OSError):
                before.stdin.close()
        self._start()
        return True

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "phasewatch.live.cleanup", msgspec.json.encode(self._task).decode()],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is the watcher's
        )  # fmt: skip

    def __enter__(self) -> Self:
        try:
            self._start()
        except OSError:
            _remove_folder(self._task.folder)  # nothing was touched yet
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_needed:
            with suppress(OSError):  # no process to be had: the next watch of this VM cleans up
                self.restart_if_dead()
        child, self._child = self._child, None
        if child is None or child.stdin is None:
            return
        if not self._is_needed:
            with suppress(OSError):
                child.stdin.write(DISMISS_MESSAGE)
                child.stdin.flush()
        with suppress(OSError):
            child.stdin.close()
        if self._is_needed:
            return  # it may take its time; the monitor's only line may be this process's until that ends
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)
        _remove_folder(self._task.folder)  # a guard that was killed could not

    @property
    def pid(self) -> int:
        """The guard's process, 0 when it was sent away."""
        return self._child.pid if self._child is not None else 0


def _clean_up_after_watcher(task: CleanupTask, pipe: int) -> None:
    """Wait for the watcher's end, and clean up unless it says that it did."""
    said = b""
    while DISMISS_MESSAGE not in said:
        ready, _, _ = select.select([pipe], [], [], CLEANUP_POLL_S)
        if ready:
            data = os.read(pipe, 4096)
            if not data:
                _undo_with_retries(task)
                break
            said = (said + data)[-len(DISMISS_MESSAGE) :]
        elif task.folder:
            truncate_dumps(Path(task.folder))
    _remove_folder(task.folder)


def _undo_with_retries(task: CleanupTask) -> None:
    """Undo what the watcher did, and try again while the VM does not answer; meanwhile its dump stays small."""
    while not asyncio.run(undo_changes(task)):
        until_s = time.monotonic() + CLEANUP_RETRY_S
        while time.monotonic() < until_s:
            if task.folder and not Path(task.folder).exists():
                return  # a later watcher has cleaned up
            if task.folder:
                truncate_dumps(Path(task.folder))
            time.sleep(CLEANUP_POLL_S)


def _remove_folder(folder: str) -> None:
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def truncate_dumps(folder: Path) -> None:
    """Cut the largest files until all are within the bound; QEMU writes on behind the hole, which takes no memory."""
    with suppress(OSError):
        sizes = sorted(((path.stat().st_blocks * 512, path) for path in folder.iterdir()), reverse=True)
        excess = sum(size for size, _ in sizes) - MAX_DUMP_BYTES
        for size, path in sizes:
            if excess <= 0:
                break
            os.truncate(path, 0)
            excess -= size


async def undo_changes(task: CleanupTask) -> bool:
    """Remove the objects from the VM and restore the balloon's interval; a VM that is gone needs neither.

    Returns:
        False if the VM still runs and did not answer.
    """
    if not task.qmp or not (task.objects or task.balloon):
        return True
    from phasewatch.errors import VmError
    from phasewatch.telemetry.process import translate_threads
    from phasewatch.telemetry.qmp import QmpMonitor

    for _ in range(
        CONNECT_ATTEMPTS
    ):  # the monitor serves one client, and the dead one's connection may still be closing
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
            if task.vm_pid and translate_threads(task.vm_pid, await monitor.vcpu_tids(), Path(task.proc)) is None:
                return True  # another machine has the socket now
            if await _restore_vm(task, monitor):
                return True
        except (VmError, KeyError, TypeError):
            await asyncio.sleep(0.5)
        finally:
            await monitor.close()
    return False


async def _restore_vm(task: CleanupTask, monitor: QmpMonitor) -> bool:
    """Remove what is ours; return whether none of it is left in the VM."""
    from phasewatch.errors import VmError
    from phasewatch.live.ownership import find_other_watchers
    from phasewatch.telemetry.qmp import BALLOON_POLLING_PROPERTY

    async def standing() -> set[str]:
        return {child["name"] for child in await monitor.ask("qom-list", path="/objects")} & set(task.objects)

    for name in await standing():
        await monitor.ask("object-del", id=name)
    # Another watcher that still runs wants the balloon polled, and knows what the interval was.
    if task.balloon and not find_other_watchers(task.vm_pid, task.vm_start_ticks, Path(task.proc)):
        with suppress(VmError):  # unplugged meanwhile
            await monitor.ask("qom-set", path=task.balloon, property=BALLOON_POLLING_PROPERTY, value=task.interval_s)
    return not await standing()


def _is_vm_gone(task: CleanupTask) -> bool:
    from phasewatch.telemetry.process import read_start_ticks

    return bool(task.vm_pid) and read_start_ticks(task.vm_pid, Path(task.proc)) != task.vm_start_ticks


def main() -> None:
    """Guard what the only argument says.

    A service manager sends its signal to every process of a service, and so to the guard of a watcher that was killed:
    it ends by its pipe alone.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _clean_up_after_watcher(msgspec.json.decode(sys.argv[1], type=CleanupTask), sys.stdin.fileno())


if __name__ == "__main__":
    main()
