"""One direction of one network card, as QEMU's own `filter-dump` writes it to a file.

A FIFO would freeze the VM when it is full, so it is a regular file in memory (tmpfs), read at every tick, stamped at the
reader (its own stamps are wrong by the VM's uptime), and given up for a new one before it grows large. Memory is bounded by the guard
besides, should the reader stall.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from phasewatch.errors import VmError
from phasewatch.live.pcap import PcapReader
from phasewatch.record.qmp import Monitor

# Room for the longest virtio-net header, two VLAN tags, and either IPv4 with all options or IPv6 with three extension
# headers, before the first 20 bytes of TCP.
SNAP_BYTES = 160
ROTATE_BYTES = 16 << 20  # over all files; the guard cuts them at 32 MiB
MAX_UNREAD_BYTES = 24 << 20  # likewise
CHUNK_BYTES = 1 << 16
OUTGOING, INCOMING = "rx", "tx"  # what the backend receives from the card, and what it transmits to it


class DumpFile:
    """Reads the frames of one direction of one card.

    The direction is QEMU's own, by the side of the card that a frame comes from: no address that the guest writes is
    asked.

    Args:
        monitor: A connected `Monitor`; it is left open.
        netdev: QEMU's id of the card's backend.
        queue: `OUTGOING` or `INCOMING`.
        folder: A private folder in memory, which the guard removes.
        ids: Two object ids that the guard knows, used in turn.
    """

    def __init__(self, *, monitor: Monitor, netdev: str, queue: str, folder: Path, ids: tuple[str, str]) -> None:
        self._monitor, self._netdev, self._queue, self._folder, self._ids = monitor, netdev, queue, folder, ids
        self._turn = 0
        self._fd: int | None = None
        self._read_bytes = 0
        self._reader = PcapReader()

    @property
    def is_open(self) -> bool:
        """Whether there is a file that is read."""
        return self._fd is not None

    @property
    def is_outgoing(self) -> bool:
        """Whether the guest sends these frames."""
        return self._queue == OUTGOING

    @property
    def read_bytes(self) -> int:
        """How much of the file was read."""
        return self._read_bytes

    @property
    def has_part(self) -> bool:
        """Whether the newest frame is there in part only."""
        return self._reader.has_part

    @property
    def id(self) -> str:
        """The object that stands in QEMU now."""
        return self._ids[self._turn % 2]

    @property
    def ids(self) -> tuple[str, str]:
        """All objects that may stand in QEMU."""
        return self._ids

    async def start(self) -> None:
        """Add the filter, with a new file.

        Raises:
            VmError: If QEMU refuses it, or writes where this process cannot read.
        """
        self._turn += 1  # never a name twice in a row: the filter of a question that timed out may stand after all
        path = self._path
        await self._monitor.ask(
            "object-add", **{"qom-type": "filter-dump", "id": self.id, "netdev": self._netdev, "queue": self._queue, "file": str(path), "maxlen": SNAP_BYTES}
        )  # fmt: skip
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            await self._monitor.ask("object-del", id=self.id)
            raise VmError(f"{path}: QEMU wrote no dump that this process can read: {exc.strerror}") from exc
        self._read_bytes, self._reader = 0, PcapReader()

    async def stop(self, see: Callable[[bytes, int], None] | None = None) -> bool:
        """Remove the filter and its file; return whether all was read.

        Args:
            see: Called with what of a frame was kept, and its true size, for each that is still unread.
        """
        if self._fd is None:
            return True
        fd, is_whole = self._fd, True
        try:
            await self._monitor.ask("object-del", id=self.id)
            # Only a file that has a name is kept small by the guard, so it keeps it while QEMU may write on.
            self._path.unlink(missing_ok=True)
            while see is not None and self.read_chunk(see):
                pass
        except (VmError, OSError, ValueError):
            is_whole = False
        finally:
            self._fd = None
            os.close(fd)
        return is_whole

    def abandon(self) -> None:
        """Close the file of a filter that is not in QEMU any more."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            with suppress(OSError):
                self._path.unlink(missing_ok=True)

    def read_chunk(self, see: Callable[[bytes, int], None]) -> int:
        """Hand over the frames of the next 64 KiB; return how many bytes were read, 0 at the end.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it is no dump, or was cut while nobody read it.
        """
        if self._fd is None:
            return 0
        data = os.pread(self._fd, CHUNK_BYTES, self._read_bytes)
        if not data:
            # The guard cuts a file that nobody seems to read: what was in it is gone. Where QEMU wrote on meanwhile
            # the file is long enough, and its hole is what the reader refuses.
            if os.fstat(self._fd).st_size < self._read_bytes:
                raise ValueError("the dump was cut")
            return 0
        self._read_bytes += len(data)
        for frame, size in self._reader.feed(data):
            see(frame, size)
        return len(data)

    def unread_bytes(self) -> int:
        """Return how much was written and not read yet."""
        return max(0, os.fstat(self._fd).st_size - self._read_bytes) if self._fd is not None else 0

    def is_written(self, files: frozenset[tuple[int, int]]) -> bool:
        """Return whether QEMU still writes: whether its open files, by device and inode, hold this one."""
        if self._fd is None:
            return False
        stat = os.fstat(self._fd)
        return (stat.st_dev, stat.st_ino) in files

    @property
    def _path(self) -> Path:
        return self._folder / f"{self.id}-{self._turn}"


def open_dumps(pid: int, folder: Path, proc: Path) -> frozenset[tuple[int, int]] | None:
    """Return device and inode of every file of a folder that a process has open; None where that cannot be read."""
    found = set()
    try:
        for entry in (proc / str(pid) / "fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                if folder.name in str(entry.readlink()):
                    stat = entry.stat()
                    found.add((stat.st_dev, stat.st_ino))
    except OSError:
        return None
    return frozenset(found)
