"""Start child processes and a scratch folder that do not outlive the recorder, not even after ``kill -9``."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = [
    "create_scratch_folder",
    "die_with_parent",
    "find_scratch_parent",
    "kill_process",
    "start_process",
    "sweep_scratch_folders",
]

_SCRATCH_PREFIX = "pw-"

_PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent(members_fd: int | None = None) -> Callable[[], None]:
    """Return a `preexec_fn` that asks the kernel to kill the child when its parent dies.

    The C library is loaded here, before the fork, because no lock may be taken between fork and exec.

    Args:
        members_fd: Open file ``cgroup.procs`` of a group that the child joins; None leaves it where it is.
    """
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if members_fd is not None:
            os.write(members_fd, b"0")  # the process that writes

    return prepare


async def start_process(
    command: Sequence[str], *, log: IO[bytes], members_file: Path | None = None
) -> asyncio.subprocess.Process:
    """Start a child in a session of its own that dies with this process; both outputs go to `log`.

    Its own session keeps a terminal's Ctrl-C from the child, which the recorder stops itself. It also gives the child a
    scheduling group of its own, so that a busy VM does not starve the sampler.

    Args:
        command: Program and arguments.
        log: Receives both outputs.
        members_file: ``cgroup.procs`` of the group that the child joins before it runs.

    Raises:
        OSError: If it cannot be started, or the group cannot be joined.
    """
    members_fd = None if members_file is None else os.open(members_file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent(members_fd),
        )
    except subprocess.SubprocessError as exc:  # the preexec_fn raised
        raise OSError(0, f"the child could not join {members_file}") from exc
    finally:
        if members_fd is not None:
            os.close(members_fd)


async def kill_process(process: asyncio.subprocess.Process) -> None:
    """Kill a child and its process group, and wait until it has exited."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


@contextmanager
def create_scratch_folder(parent: Path) -> Iterator[Path]:
    """Create a private folder and remove it at the end.

    Its name is short, because a socket's path must fit in 108 bytes. A guard process holds the read end of a pipe: when
    this process is killed, the pipe closes and the guard removes the folder. It removes it twice, because a QEMU that
    is ending too may still create a socket in it. This process holds a lock on the folder, so that another recorder
    can tell it from one whose guard was killed as well (`sweep_scratch_folders`).
    """
    unlocked = Path(tempfile.mkdtemp(prefix=f".{_SCRATCH_PREFIX}", dir=parent))
    lock = os.open(unlocked, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    folder = unlocked.rename(parent / unlocked.name[1:])  # no sweep sees it before it is locked
    script = 'read -r _; rm -rf -- "$1"; sleep 1; rm -rf -- "$1"'
    guard = subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        guard.kill()  # no need for its second attempt: all children have ended
        if guard.stdin is not None:
            guard.stdin.close()
        guard.wait()
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep_scratch_folders(parent: Path) -> int:
    """Remove the scratch folders of this user's recorders that no longer run, and return their number."""
    removed = 0
    for folder in parent.glob(f"{_SCRATCH_PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
        except BlockingIOError:
            pass  # its recorder is alive
        finally:
            os.close(lock)
    return removed


def find_scratch_parent() -> Path:
    """Return the parent folder for overlays: on disk, because `cache=none` needs O_DIRECT, which a tmpfs may lack."""
    chosen = os.environ.get("TMPDIR")
    if chosen:
        return Path(chosen)
    disk = Path("/var/tmp")
    return disk if os.access(disk, os.W_OK) else Path(tempfile.gettempdir())
