"""Frames out of a pcap file that grows, in either byte order, with micro- or nanoseconds (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

ETHERNET = 1
MAX_FRAME_BYTES = 1 << 18
_FILE, _RECORD = (
    "IHHiIII",
    "IIII",
)  # magic, version, zone, accuracy, snap length, link type; s, fraction, kept, true bytes
_MAGICS = (0xA1B2C3D4, 0xA1B23C4D)  # fractions are micro-, nanoseconds
_ORDERS = {Struct(f"{order}I").pack(magic): order for order in "<>" for magic in _MAGICS}
_FILE_BYTES = Struct(f"<{_FILE}").size
_RECORD_BYTES = Struct(f"<{_RECORD}").size


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
    def has_part(self) -> bool:
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
        order = _ORDERS.get(self._held[:4])
        if order is None:
            raise ValueError("the dump is no pcap")
        *_, snap, link = Struct(f"{order}{_FILE}").unpack_from(self._held)
        if link & 0xFFFF != ETHERNET:  # above stands whether frames end with a checksum
            raise ValueError(f"the dump is no pcap of Ethernet frames, but of link type {link & 0xFFFF}")
        self._record = Struct(f"{order}{_RECORD}")
        self._max_kept = min(snap, MAX_FRAME_BYTES) if snap else MAX_FRAME_BYTES
        return _FILE_BYTES
