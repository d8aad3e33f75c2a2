"""Find the length of the virtio-net header before each frame in a dump of QEMU before 8.0 (pure).

The header has 10, 12 or 20 bytes or is absent. That depends on backend, card and guest driver, and changes when the
guest loads another driver. QEMU does not report it, so each frame is examined. An IP or ARP header at the right place
is the best evidence: the guest cannot make one appear at a second place in frames that others accept.
"""

from __future__ import annotations

from collections.abc import Iterable

from phasewatch.telemetry.headers import ETHERNET_HEADER_BYTES, find_network_header, has_network_header

__all__ = ["HEADER_LENGTHS", "VnetHeaderFinder"]

HEADER_LENGTHS = (0, 12, 10, 20)  # none; modern or with merged buffers; legacy, e1000e, vmxnet3; with hash report
_SEGMENTATION_TYPES = frozenset({0, 1, 3, 4, 5})  # VIRTIO_NET_HDR_GSO_NONE, TCPV4, UDP, TCPV6, UDP_L4
_SEGMENTATION_ECN_FLAG = 0x80
_ZERO_MAC = bytes(6)


class VnetHeaderFinder:
    """Finds the length of the virtio-net header before each frame of one card.

    Args:
        macs: MAC addresses of the card, 6 bytes each; they decide where a frame's content does not.

    Attributes:
        length: Header length of the newest frame that showed it; None before the first.
    """

    def __init__(self, macs: Iterable[bytes] = ()) -> None:
        self.length: int | None = None
        self._macs = frozenset(macs)

    def add_macs(self, macs: Iterable[bytes]) -> None:
        """Add MAC addresses, because the guest may set new ones."""
        self._macs |= frozenset(macs)

    def locate(self, frame: bytes, wire_bytes: int, *, outgoing: bool) -> int | None:
        """Return the offset of the Ethernet header in a dumped frame; None if no offset fits.

        Args:
            frame: The captured bytes, with a virtio-net header if there is one.
            wire_bytes: Original size of the same.
            outgoing: Whether the guest sent it.
        """
        known = self.length
        if known is not None and has_network_header(frame, known, wire_bytes):
            return known
        valid = [
            n
            for n in HEADER_LENGTHS
            if n != known and has_network_header(frame, n, wire_bytes) and _is_plausible(frame, n)
        ]
        if valid:
            # Two offsets fit only by chance or on purpose: the MAC address decides, then a header is better than none.
            self.length = max(valid, key=lambda n: (self._has_guest_mac(frame, n, outgoing), n > 0, -n))
            return self.length
        plausible = [n for n in HEADER_LENGTHS if _is_plausible(frame, n)]
        named = [n for n in plausible if self._has_guest_mac(frame, n, outgoing)]
        if known in (named or plausible):
            return known
        return next(iter(named or plausible), None)

    def _has_guest_mac(self, frame: bytes, start: int, outgoing: bool) -> bool:
        at = start + 6 if outgoing else start
        return frame[at : at + 6] in self._macs


def _is_plausible(frame: bytes, start: int) -> bool:
    """Return whether a virtio-net header can end at `start`, and an Ethernet header begin there."""
    if len(frame) < start + ETHERNET_HEADER_BYTES:
        return False
    if start and (frame[0] > 7 or frame[1] & ~_SEGMENTATION_ECN_FLAG not in _SEGMENTATION_TYPES):
        return False
    to, sender = frame[start : start + 6], frame[start + 6 : start + 12]
    if to == _ZERO_MAC or sender == _ZERO_MAC or sender[0] & 1:
        return False
    found = find_network_header(frame, start)
    return found is not None and (found[0] >= 0x0600 or found[0] <= 1500)
