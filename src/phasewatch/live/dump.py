"""The frames of a foreign VM's card, through a filter that QEMU itself runs: the `netflow` source of a watcher.

QEMU's `filter-dump` writes each frame's beginning to a file; a FIFO would freeze the VM when it is full, so it is a
regular file in memory (tmpfs), read at every tick, stamped at the reader (its own stamps are wrong by the VM's uptime),
and given up for a new one at 8 MiB. Memory is bounded by the guard besides, should the reader stall.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from struct import Struct

from phasewatch.errors import VmError
from phasewatch.record.base import Values, nothing_of
from phasewatch.record.netflow import FlowCounter
from phasewatch.record.qmp import Monitor
from phasewatch.vocab import Source

SNAP_BYTES = 96
ROTATE_BYTES = 8 << 20
READ_BYTES = 4 << 20  # at most so much is taken in at one tick: half a second of 80,000 frames
_FILE = Struct("<IHHiIII")  # pcap: magic, version, zone, accuracy, snap length, link type
_RECORD = Struct("<IIII")  # seconds, microseconds, kept bytes, true bytes
_MAGIC, _ETHERNET = 0xA1B2C3D4, 1
_MAX_FRAME = 1 << 18


class PcapReader:
    """Cuts frames out of a pcap file that grows; a frame that is cut in the middle waits for its rest.

    Raises:
        ValueError: If what comes is no pcap.
    """

    def __init__(self) -> None:
        self._held = b""
        self._is_open = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        """Give each frame that is complete now: what was kept of it, and its true size."""
        self._held += data
        at = 0
        if not self._is_open:
            if len(self._held) < _FILE.size:
                return
            magic, *_, link = _FILE.unpack_from(self._held)
            if magic != _MAGIC or link != _ETHERNET:
                raise ValueError("the dump is no pcap of Ethernet frames")
            self._is_open, at = True, _FILE.size
        while len(self._held) - at >= _RECORD.size:
            _, _, kept, size = _RECORD.unpack_from(self._held, at)
            if not 0 < kept <= min(SNAP_BYTES, size) or size > _MAX_FRAME:  # a hole reads as frames of nothing
                raise ValueError("the dump holds no frame where one must stand")
            if len(self._held) - at - _RECORD.size < kept:
                break
            at += _RECORD.size + kept
            yield self._held[at - kept : at], size
        self._held = self._held[at:]


class DumpSource:
    """Counts the frames of one network card.

    Args:
        monitor: A connected `Monitor`; the source leaves it open.
        netdev: QEMU's id of the card's backend.
        mac: The guest's address, which tells out from in.
        folder: A private folder in memory, which the guard removes.
        ids: Two object ids that the guard knows, used in turn.
    """

    source = Source.NETFLOW

    def __init__(self, *, monitor: Monitor, netdev: str, mac: bytes, folder: Path, ids: tuple[str, str]) -> None:
        self._monitor, self._netdev, self._mac, self._folder, self._ids = monitor, netdev, mac, folder, ids
        self._turn = 0
        self._fd: int | None = None
        self._read = 0
        self._reader = PcapReader()
        self._counter = FlowCounter()
        self._wanted = False
        self.lost_files = 0

    async def open(self) -> None:
        """Put the filter in.

        Raises:
            VmError: If QEMU refuses it.
        """
        await self._start()
        self._wanted = True

    async def close(self) -> None:
        """Take the filter out, and the file with it."""
        self._wanted = False
        await self._stop()

    async def read(self) -> Values:
        """Take one reading; None-filled while there is no filter, which is put in again as soon as QEMU lets us."""
        if self._fd is None:
            if self._wanted:
                await self._rotate()
            return nothing_of(self.source)
        try:
            self._drain()
        except (OSError, ValueError):
            self.lost_files += 1
            await self._rotate()
            return nothing_of(self.source)
        if self._read >= ROTATE_BYTES:
            await self._rotate()
        return tuple(self._counter.take())

    def _drain(self) -> None:
        taken = 0
        while self._fd is not None and taken < READ_BYTES:
            data = os.pread(self._fd, 1 << 16, self._read)
            if not data:
                # The guard cuts a file that nobody seems to read: what was in it is gone. Where QEMU wrote on meanwhile
                # the file is long enough, and its hole is what the reader refuses.
                if os.fstat(self._fd).st_size < self._read:
                    raise ValueError("the dump was cut")
                return
            self._read += len(data)
            taken += len(data)
            for frame, size in self._reader.feed(data):
                self._counter.see(frame, frame[6:12] == self._mac, size)

    async def _rotate(self) -> None:
        """Go on in a new file; what passes between the two filters, less than a millisecond, is not counted."""
        await self._stop()
        with suppress(VmError):
            await self._start()

    async def _start(self) -> None:
        self._turn += 1  # never a name twice in a row: the filter of a question that timed out may stand after all
        path = self._path
        await self._monitor.ask(
            "object-add", **{"qom-type": "filter-dump", "id": self._id, "netdev": self._netdev, "file": str(path), "maxlen": SNAP_BYTES}
        )  # fmt: skip
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            await self._monitor.ask("object-del", id=self._id)
            raise VmError(f"{path}: QEMU wrote no dump that this process can read: {exc.strerror}") from exc
        self._read, self._reader = 0, PcapReader()

    async def _stop(self) -> None:
        if self._fd is None:
            return
        is_out = False
        try:
            await self._monitor.ask("object-del", id=self._id)
            is_out = True
            self._drain()
        except (VmError, OSError, ValueError):
            self.lost_files += 1
        os.close(self._fd)
        self._fd = None
        if is_out:  # else QEMU may write on, and only a file that has a name is kept small by the guard
            self._path.unlink(missing_ok=True)

    @property
    def _id(self) -> str:
        return self._ids[self._turn % 2]

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._id}-{self._turn}"


class TapSource:
    """Reads the counters of a tap device: frames and bytes; what needs a look into a frame is None.

    Args:
        name: Of the device on the host.
        net: Where the kernel shows its devices; tests hand in a made-up one.
    """

    source = Source.NETFLOW

    def __init__(self, *, name: str, net: Path = Path("/sys/class/net")) -> None:
        self._folder = net / name / "statistics"

    async def open(self) -> None:
        """Look whether it is there; raises OSError if not."""
        self._count("rx_packets")

    async def close(self) -> None:
        """Nothing is held."""

    async def read(self) -> Values:
        """Take one reading; None-filled when the device is gone."""
        # What the host's end of the tap receives is what the guest sent.
        try:
            counts = [self._count(name) for name in ("rx_packets", "rx_bytes", "tx_packets", "tx_bytes")]
        except (OSError, ValueError):
            return nothing_of(self.source)
        return (*counts, *(None for _ in range(6)))

    def _count(self, name: str) -> int:
        return int((self._folder / name).read_text("ascii"))
