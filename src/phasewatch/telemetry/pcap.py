"""Read frames from growing pcap files, as the QEMU object ``filter-dump`` writes them.

`PcapReader` parses (pure), `DumpFile` adds and removes the filter and reads its file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from struct import Struct

from phasewatch.errors import VmError
from phasewatch.telemetry.qmp import QmpMonitor

__all__ = [
    "INCOMING",
    "MAX_UNREAD_BYTES",
    "OUTGOING",
    "ROTATE_BYTES",
    "DumpFile",
    "PcapReader",
    "list_open_dumps",
]

ROTATE_BYTES = 16 << 20  # total of all files before they are replaced; the cleanup process cuts them at 32 MiB
MAX_UNREAD_BYTES = 24 << 20  # total of unread bytes before they are given up
OUTGOING, INCOMING = "rx", "tx"  # QEMU's names: what the backend receives from the card, and transmits to it
# Room for the longest virtio-net header, two VLAN tags, and either IPv4 with all options or IPv6 with three extension
# headers, before the first 20 bytes of TCP. Over plain IPv4 that holds a DNS name of 190 characters.
_SNAP_BYTES = 256
_CHUNK_BYTES = 1 << 16
_MAX_WAIT_NS = 3_000_000_000  # between a frame and its reading, twice a second
_LINKTYPE_ETHERNET = 1
_MAX_FRAME_BYTES = 1 << 18
_FILE_FORMAT = "IHHiIII"  # magic, version (2), time zone, accuracy, snap length, link type
_RECORD_FORMAT = "IIII"  # seconds, fraction, captured bytes, original bytes
_MAGICS = (0xA1B2C3D4, 0xA1B23C4D)  # with microseconds, with nanoseconds
_BYTE_ORDERS = {Struct(f"{order}I").pack(magic): order for order in "<>" for magic in _MAGICS}
_FILE_BYTES = Struct(f"<{_FILE_FORMAT}").size
_RECORD_BYTES = Struct(f"<{_RECORD_FORMAT}").size


class PcapReader:
    """Parses a growing pcap file in either byte order; an incomplete frame waits for its rest."""

    def __init__(self) -> None:
        self._buffer = b""
        self._record: Struct | None = None
        self._max_kept = _MAX_FRAME_BYTES
        self._fraction_ns = 1_000
        self.stamp_ns = 0  # of the frame that was yielded last

    @property
    def has_partial_frame(self) -> bool:
        """Whether an incomplete frame waits for its rest."""
        return self._record is not None and bool(self._buffer)

    def feed(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        """Yield (captured bytes, original size) of each frame that is complete now.

        Raises:
            ValueError: If the data is no pcap of Ethernet frames, or a record contradicts itself.
        """
        self._buffer += data
        at = 0
        if self._record is None:
            if len(self._buffer) < _FILE_BYTES:
                return
            at = self._read_file_header()
        record = self._record
        if record is None:
            return
        while len(self._buffer) - at >= _RECORD_BYTES:
            seconds, fraction, kept, size = record.unpack_from(self._buffer, at)
            if (
                not 0 < kept <= min(self._max_kept, size) or size > _MAX_FRAME_BYTES
            ):  # a hole in the file reads as empty frames
                raise ValueError("the dump has no frame where one must be")
            if len(self._buffer) - at - _RECORD_BYTES < kept:
                break
            at += _RECORD_BYTES + kept
            self.stamp_ns = seconds * 1_000_000_000 + fraction * self._fraction_ns
            yield self._buffer[at - kept : at], size
        self._buffer = self._buffer[at:]

    def _read_file_header(self) -> int:
        order = _BYTE_ORDERS.get(self._buffer[:4])
        if order is None:
            raise ValueError("the dump is not a pcap file")
        magic, *_, snap, link = Struct(f"{order}{_FILE_FORMAT}").unpack_from(self._buffer)
        self._fraction_ns = 1 if magic == _MAGICS[1] else 1_000
        if link & 0xFFFF != _LINKTYPE_ETHERNET:  # the upper bits describe checksums
            raise ValueError(f"the dump has no Ethernet frames, but link type {link & 0xFFFF}")
        self._record = Struct(f"{order}{_RECORD_FORMAT}")
        self._max_kept = min(snap, _MAX_FRAME_BYTES) if snap else _MAX_FRAME_BYTES
        return _FILE_BYTES


class DumpFile:
    """Reads the frames of one direction of one network card.

    QEMU determines the direction by the side that a frame comes from, not by addresses that the guest writes.

    Args:
        monitor: A connected monitor; it is left open.
        netdev: QEMU's id of the card's backend.
        queue: `OUTGOING` or `INCOMING`.
        folder: A private folder in memory, which the cleanup process removes.
        ids: Two object ids that the cleanup process knows, used in turn.
    """

    def __init__(self, *, monitor: QmpMonitor, netdev: str, queue: str, folder: Path, ids: tuple[str, str]) -> None:
        self._monitor, self._netdev, self._queue, self._folder, self._ids = monitor, netdev, queue, folder, ids
        self._turn = 0
        self._fd: int | None = None
        self._read_bytes = 0
        self._reader = PcapReader()
        self._offset_ns: int | None = None
        self._identity = (0, 0)  # device and inode of the file
        self._writer = ""  # path of QEMU's descriptor of the file below /proc; empty: not known

    @property
    def is_open(self) -> bool:
        """Whether a dump is open."""
        return self._fd is not None

    @property
    def is_outgoing(self) -> bool:
        """Whether the guest sends these frames."""
        return self._queue == OUTGOING

    @property
    def read_bytes(self) -> int:
        """Number of bytes read from the present file."""
        return self._read_bytes

    @property
    def has_partial_frame(self) -> bool:
        """Whether the newest frame is incomplete."""
        return self._reader.has_partial_frame

    @property
    def id(self) -> str:
        """Id of the present filter object."""
        return self._ids[self._turn % 2]

    @property
    def ids(self) -> tuple[str, str]:
        """Ids of all filter objects that may be in QEMU."""
        return self._ids

    async def start(self) -> None:
        """Add a filter with a new file (QMP ``object-add``, type ``filter-dump``).

        Raises:
            VmError: If QEMU refuses it, or this process cannot read its file.
        """
        self._turn += 1  # alternate names, because a filter may exist although its command timed out
        path = self._path
        await self._monitor.ask(
            "object-add",
            **{
                "qom-type": "filter-dump",
                "id": self.id,
                "netdev": self._netdev,
                "queue": self._queue,
                "file": str(path),
                "maxlen": _SNAP_BYTES,
            },
        )
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            await self._monitor.ask("object-del", id=self.id)
            raise VmError(f"{path}: QEMU wrote no dump that this process can read: {exc.strerror}") from exc
        self._read_bytes, self._reader, self._offset_ns, self._writer = 0, PcapReader(), None, ""

    def locate_frame(self, now_ns: int) -> int:
        """Return when the newest frame passed, on the clock of `now_ns`.

        QEMU stamps frames with the guest's clock, which stops with the guest, and each file begins at another time. The
        clocks are compared by the frame that waited shortest; one that would have waited too long compares them again.

        Args:
            now_ns: The time now, on the clock of the result.
        """
        stamp_ns = self._reader.stamp_ns
        if self._offset_ns is None or not -_MAX_WAIT_NS <= stamp_ns + self._offset_ns - now_ns <= 0:
            self._offset_ns = now_ns - stamp_ns
        return stamp_ns + self._offset_ns

    async def stop(self, on_frame: Callable[[bytes, int], None] | None = None) -> bool:
        """Remove the filter and its file; return whether all frames were read.

        Args:
            on_frame: Receives the captured bytes and the original size of each unread frame; None discards them.
        """
        if self._fd is None:
            return True
        fd, is_whole = self._fd, True
        try:
            await self._monitor.ask("object-del", id=self.id)
            # The cleanup process truncates only files that have a name, so keep the name while QEMU may write.
            self._path.unlink(missing_ok=True)
            while on_frame is not None and self.read_chunk(on_frame):
                pass
        except (VmError, OSError, ValueError):
            is_whole = False
        finally:
            self._fd = None
            os.close(fd)
        return is_whole

    def abandon(self) -> None:
        """Close and remove the file of a filter that is no longer in QEMU."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            with suppress(OSError):
                self._path.unlink(missing_ok=True)

    def read_chunk(self, on_frame: Callable[[bytes, int], None]) -> int:
        """Read the next 64 KiB; return the number of bytes read, 0 at the end.

        Args:
            on_frame: Receives the captured bytes and the original size of each frame.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is not a dump, or was truncated before it was read.
        """
        if self._fd is None:
            return 0
        data = os.pread(self._fd, _CHUNK_BYTES, self._read_bytes)
        if not data:
            # The cleanup process truncates a file that nobody seems to read. If QEMU wrote on meanwhile, the file is
            # long enough, and the reader refuses the hole in it.
            if os.fstat(self._fd).st_size < self._read_bytes:
                raise ValueError("the dump was truncated")
            return 0
        self._read_bytes += len(data)
        for frame, size in self._reader.feed(data):
            on_frame(frame, size)
        return len(data)

    def unread_bytes(self) -> int:
        """Return the number of bytes that were written and not read yet."""
        return max(0, os.fstat(self._fd).st_size - self._read_bytes) if self._fd is not None else 0

    def find_writer(self, files: Mapping[tuple[int, int], str]) -> bool:
        """Return whether QEMU still has the file open, and remember under which descriptor.

        Args:
            files: From `list_open_dumps`.
        """
        if self._fd is None:
            return False
        stat = os.fstat(self._fd)
        self._identity = stat.st_dev, stat.st_ino
        self._writer = files.get(self._identity, "")
        return bool(self._writer)

    def is_still_written(self) -> bool:
        """Return whether QEMU has the file open under the descriptor that `find_writer` found; one system call.

        QEMU closes the file when the filter is deleted, also together with its card, and when there is no room left.
        False does not mean that the filter is gone, only that it must be looked for.
        """
        if self._fd is None or not self._writer:
            return False
        try:
            stat = os.stat(self._writer)  # noqa: PTH116 - twice a second for each card of each VM
        except OSError:
            return False
        return (stat.st_dev, stat.st_ino) == self._identity

    @property
    def _path(self) -> Path:
        return self._folder / f"{self.id}-{self._turn}"


def list_open_dumps(pid: int, folder: Path, proc: Path) -> dict[tuple[int, int], str] | None:
    """Return the files of a folder that a process has open; None if that cannot be read.

    Returns:
        (device, inode) of each file → path of its descriptor below ``/proc/PID/fd``.
    """
    files = {}
    try:
        for entry in (proc / str(pid) / "fd").iterdir():
            with suppress(OSError):  # closed after it was listed
                if folder.name in str(entry.readlink()):
                    stat = entry.stat()
                    files[stat.st_dev, stat.st_ino] = str(entry)
    except OSError:
        return None
    return files
