"""Where the Ethernet frame begins in what QEMU dumps: before 8.0 a virtio-net header may stand before each frame (pure).

The header has 10, 12 or 20 bytes or is absent: that depends on backend, card and guest driver, and changes when the
guest loads another driver. QEMU does not tell it, so each frame is looked at. An IP or ARP header in its place is the
best evidence: what the guest writes into its own header or addresses cannot make one appear at a second place in
frames that others accept.
"""

from __future__ import annotations

from collections.abc import Iterable

from phasewatch.telemetry.headers import ETHERNET_HEADER_BYTES, find_network_header, has_network_header

HEADER_LENGTHS = (0, 12, 10, 20)  # none; modern or with merged buffers; legacy, e1000e, vmxnet3; with hash report
_SEGMENTATION_TYPES = frozenset({0, 1, 3, 4, 5})  # VIRTIO_NET_HDR_GSO_NONE, TCPV4, UDP, TCPV6, UDP_L4
_SEGMENTATION_ECN_FLAG = 0x80
_ZERO_MAC = bytes(6)


class VnetHeaderFinder:
    """Finds the length of the virtio-net header before each frame of one card.

    Args:
        macs: Addresses that the card is known by; they decide where a frame's content does not.

    Attributes:
        length: That of the newest frame that showed it; None before the first.
    """

    def __init__(self, macs: Iterable[bytes] = ()) -> None:
        self.length: int | None = None
        self._macs = frozenset(macs)

    def add_macs(self, macs: Iterable[bytes]) -> None:
        """Add addresses, as the guest may set others."""
        self._macs |= frozenset(macs)

    def locate(self, frame: bytes, wire_bytes: int, *, outgoing: bool) -> int | None:
        """Return where the Ethernet header of a dumped frame begins; None where no place fits.

        Args:
            frame: What was kept of it, a virtio-net header included.
            wire_bytes: Its true size, likewise.
            outgoing: Whether the guest sent it.
        """
        known = self.length
        if known is not None and has_network_header(frame, known, wire_bytes):
            return known
        intact = [
            n
            for n in HEADER_LENGTHS
            if n != known and has_network_header(frame, n, wire_bytes) and _is_plausible(frame, n)
        ]
        if intact:
            # Two places fit only by chance or on purpose: the address decides, then the longer header.
            self.length = max(intact, key=lambda n: (self._has_guest_mac(frame, n, outgoing), n > 0, -n))
            return self.length
        fits = [n for n in HEADER_LENGTHS if _is_plausible(frame, n)]
        named = [n for n in fits if self._has_guest_mac(frame, n, outgoing)]
        if known in (named or fits):
            return known
        return next(iter(named or fits), None)

    def _has_guest_mac(self, frame: bytes, start: int, outgoing: bool) -> bool:
        at = start + 6 if outgoing else start
        return frame[at : at + 6] in self._macs


def _is_plausible(frame: bytes, start: int) -> bool:
    """Return whether a virtio-net header can end, and an Ethernet header begin, at `start`."""
    if len(frame) < start + ETHERNET_HEADER_BYTES:
        return False
    if start and (frame[0] > 7 or frame[1] & ~_SEGMENTATION_ECN_FLAG not in _SEGMENTATION_TYPES):
        return False
    to, sender = frame[start : start + 6], frame[start + 6 : start + 12]
    if to == _ZERO_MAC or sender == _ZERO_MAC or sender[0] & 1:
        return False
    found = find_network_header(frame, start)
    return found is not None and (found[0] >= 0x0600 or found[0] <= 1500)
