"""Frames out of a pcap file that grows, in either byte order, with micro- or nanoseconds (pure)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from struct import Struct

from phasewatch.errors import VmError
from phasewatch.telemetry.qmp import QmpMonitor

LINKTYPE_ETHERNET = 1
MAX_FRAME_BYTES = 1 << 18
_FILE_FORMAT, _RECORD_FORMAT = (
    "IHHiIII",
    "IIII",
)  # magic, version, zone, accuracy, snap length, link type; s, fraction, kept, true bytes
_MAGICS = (0xA1B2C3D4, 0xA1B23C4D)  # fractions are micro-, nanoseconds
_BYTE_ORDERS = {Struct(f"{order}I").pack(magic): order for order in "<>" for magic in _MAGICS}
_FILE_BYTES = Struct(f"<{_FILE_FORMAT}").size
_RECORD_BYTES = Struct(f"<{_RECORD_FORMAT}").size


class PcapReader:
    """Cuts frames out of a pcap file that grows; a frame that is cut in the middle waits for its rest.

    Raises:
        ValueError: If what comes is no pcap of Ethernet frames, or a record contradicts itself.
    """

    def __init__(self) -> None:
        self._held = b""
        self._record: Struct | None = None
        self._max_kept = MAX_FRAME_BYTES

    @property
    def has_partial_frame(self) -> bool:
        """Whether the beginning of a frame waits for its rest."""
        return self._record is not None and bool(self._held)

    def feed(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        """Yield each frame that is complete now: what was kept of it, and its true size."""
        self._held += data
        at = 0
        if self._record is None:
            if len(self._held) < _FILE_BYTES:
                return
            at = self._read_head()
        record = self._record
        if record is None:
            return
        while len(self._held) - at >= _RECORD_BYTES:
            _, _, kept, size = record.unpack_from(self._held, at)
            if not 0 < kept <= min(self._max_kept, size) or size > MAX_FRAME_BYTES:  # a hole reads as frames of nothing
                raise ValueError("the dump holds no frame where one must stand")
            if len(self._held) - at - _RECORD_BYTES < kept:
                break
            at += _RECORD_BYTES + kept
            yield self._held[at - kept : at], size
        self._held = self._held[at:]

    def _read_head(self) -> int:
        order = _BYTE_ORDERS.get(self._held[:4])
        if order is None:
            raise ValueError("the dump is no pcap")
        *_, snap, link = Struct(f"{order}{_FILE_FORMAT}").unpack_from(self._held)
        if link & 0xFFFF != LINKTYPE_ETHERNET:  # above stands whether frames end with a checksum
            raise ValueError(f"the dump is no pcap of Ethernet frames, but of link type {link & 0xFFFF}")
        self._record = Struct(f"{order}{_RECORD_FORMAT}")
        self._max_kept = min(snap, MAX_FRAME_BYTES) if snap else MAX_FRAME_BYTES
        return _FILE_BYTES


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
        monitor: A connected `QmpMonitor`; it is left open.
        netdev: QEMU's id of the card's backend.
        queue: `OUTGOING` or `INCOMING`.
        folder: A private folder in memory, which the guard removes.
        ids: Two object ids that the guard knows, used in turn.
    """

    def __init__(self, *, monitor: QmpMonitor, netdev: str, queue: str, folder: Path, ids: tuple[str, str]) -> None:
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
    def has_partial_frame(self) -> bool:
        """Whether the newest frame is there in part only."""
        return self._reader.has_partial_frame

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


def list_open_dumps(pid: int, folder: Path, proc: Path) -> frozenset[tuple[int, int]] | None:
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
