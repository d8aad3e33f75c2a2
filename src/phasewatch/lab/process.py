"""Child processes that never outlive the recorder, and a scratch folder that goes when it does, even by kill -9."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> Callable[[], None]:
    """Give a `preexec_fn` that asks the kernel to kill the child when its parent dies.

    The C library is looked up here, before the fork: between fork and exec nothing may take a lock.
    """
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


async def start_process(command: Sequence[str], *, log: IO[bytes]) -> asyncio.subprocess.Process:
    """Start a child in a session of its own that dies with us, both outputs in `log`.

    A session of its own keeps a terminal's Ctrl-C from it (the recorder ends it in order), and gives it a scheduling
    group of its own, so that a busy VM does not starve the sampler.
    """
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=die_with_parent(),
    )


async def kill_process(process: asyncio.subprocess.Process) -> None:
    """Kill a child and everything in its session's group, and wait until it is gone."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


@contextmanager
def create_scratch_folder(parent: Path) -> Iterator[Path]:
    """Give a private folder with a short name (a socket's path must fit in 108 bytes), removed at the end.

    A guard child holds the read end of a pipe of ours: when we die without a word, the pipe closes and it removes the
    folder. It looks twice, because a QEMU that is dying too may still be making a socket in it.
    """
    folder = Path(tempfile.mkdtemp(prefix="pw-", dir=parent))
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
        guard.kill()  # it need not wait its second: nothing of ours is left running
        if guard.stdin is not None:
            guard.stdin.close()
        guard.wait()
        shutil.rmtree(folder, ignore_errors=True)


def find_scratch_parent() -> Path:
    """Give the place for overlays: on disk, because `cache=none` needs O_DIRECT, which a tmpfs may not have."""
    chosen = os.environ.get("TMPDIR")
    if chosen:
        return Path(chosen)
    disk = Path("/var/tmp")
    return disk if os.access(disk, os.W_OK) else Path(tempfile.gettempdir())
