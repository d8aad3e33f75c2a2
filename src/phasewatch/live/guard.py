"""The guard child: when the watcher dies, even by kill -9, it takes out of the VM what the watcher had put in.

It holds the read end of a pipe whose write end only the watcher has. While the watcher lives it also sees to it that
the dump in memory stays small, should nobody read it. Told ``done`` it leaves the VM alone; a watcher that could not
give the VM back itself says nothing.
"""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

LOOK_S = 2.0
MOST_BYTES = 32 << 20  # of all dumps: twice what a reading watcher lets them grow to
TRIES = 20
DONE = b"done\n"


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be undone.

    Attributes:
        qmp: The monitor's socket; empty where none is used.
        objects: Object ids that may stand in the VM.
        balloon: Its path in QEMU's tree, and the polling interval (s) that it had; empty where it was left alone.
        folder: The private folder, to be removed; empty where there is none.
    """

    qmp: str = ""
    objects: tuple[str, ...] = ()
    balloon: str = ""
    interval_s: int = 0
    folder: str = ""


class Guard:
    """Starts a guard for a task, before the VM is touched; leaving the block sends it away, or to work if it was not dismissed."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._child: subprocess.Popen[bytes] | None = None
        self._is_needed = True

    def dismiss(self) -> None:
        """Say that the VM is as it was: nothing is left to be undone."""
        self._is_needed = False

    def __enter__(self) -> Self:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "phasewatch.live.guard", msgspec.json.encode(self._task).decode()],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is the watcher's
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        child, self._child = self._child, None
        if child is None or child.stdin is None:
            return
        if not self._is_needed:
            with suppress(OSError):
                child.stdin.write(DONE)
                child.stdin.flush()
        with suppress(OSError):
            child.stdin.close()
        if self._is_needed:
            return  # it may take its time; the monitor's only line may be this process's until that ends
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=5)

    @property
    def pid(self) -> int:
        """The guard's process, 0 when it was sent away."""
        return self._child.pid if self._child is not None else 0


def watch_over(task: Task, pipe: int) -> None:
    """Wait for the watcher's end, and clean up unless it says that it did."""
    said = b""
    while DONE not in said:
        ready, _, _ = select.select([pipe], [], [], LOOK_S)
        if ready:
            data = os.read(pipe, 4096)
            if not data:
                asyncio.run(undo(task))
                break
            said = (said + data)[-len(DONE) :]
        elif task.folder:
            bound(Path(task.folder))
    if task.folder:
        shutil.rmtree(task.folder, ignore_errors=True)


def bound(folder: Path) -> None:
    """Cut the largest files until all are within the bound; QEMU writes on behind the hole, which takes no memory."""
    with suppress(OSError):
        sizes = sorted(((path.stat().st_blocks * 512, path) for path in folder.iterdir()), reverse=True)
        excess = sum(size for size, _ in sizes) - MOST_BYTES
        for size, path in sizes:
            if excess <= 0:
                break
            os.truncate(path, 0)
            excess -= size


async def undo(task: Task) -> None:
    """Take the objects out of the VM and give the balloon its interval back; a VM that is gone needs neither."""
    if not task.qmp or not (task.objects or task.balloon):
        return
    from phasewatch.errors import VmError
    from phasewatch.record.qmp import POLLING, Monitor

    for _ in range(TRIES):  # the monitor serves one client, and the dead one's connection may still be closing
        monitor = Monitor(Path(task.qmp))
        try:
            await monitor.connect()
        except VmError:
            if not Path(task.qmp).exists():
                return
            await asyncio.sleep(0.5)
            continue
        for name in task.objects:
            with suppress(VmError):  # most of them are not there
                await monitor.ask("object-del", id=name)
        if task.balloon:
            with suppress(VmError):
                await monitor.ask("qom-set", path=task.balloon, property=POLLING, value=task.interval_s)
        await monitor.close()
        return


def main() -> None:
    """Guard what the only argument says.

    A service manager sends its signal to every process of a service, and so to the guard of a watcher that was killed:
    it ends by its pipe alone.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watch_over(msgspec.json.decode(sys.argv[1], type=Task), sys.stdin.fileno())


if __name__ == "__main__":
    main()
