"""Hold a store by its path, beside the lock in it: after its disk was unmounted, the lock in the folder is out of sight."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

from phasewatch.errors import BusyError


@contextmanager
def hold_path(path: Path) -> Iterator[None]:
    """Hold a path alone on this machine; the hold ends with the process, however that ends.

    Held by an abstract socket address (Linux), which lies on no disk; elsewhere nothing is held.

    Raises:
        BusyError: If another process (or another block of this one) holds the path.
    """
    if sys.platform != "linux":
        yield
        return
    with ExitStack() as stack:
        for each in sorted({path.absolute(), path.resolve()}):  # a link may be turned to another disk
            holder = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            try:
                holder.bind(_name(each))
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
                raise BusyError(f"{path}: another process is receiving here; wait for it, or end it") from None
        yield


def _name(path: Path) -> bytes:
    """Name a path: containers that share a network have roots of their own, and the same path there is another place."""
    root = Path("/").stat()
    return b"\0phasewatch/" + sha256(f"{root.st_dev}:{root.st_ino}:".encode() + os.fsencode(path)).hexdigest().encode()
