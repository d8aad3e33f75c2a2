"""Parse Ethernet frames into IP addresses, ports and TCP flags; any bytes are allowed and none raise (pure).

Supported before IP: VLAN tags (802.1Q, 802.1ad), LLC/SNAP, PPPoE sessions, MPLS labels; behind IP: IPv6 extension
headers, AH. The number of headers is bounded, so that one frame costs a bounded time.
"""

from __future__ import annotations

from enum import Enum
from struct import Struct
from typing import NamedTuple

__all__ = [
    "ETHERNET_HEADER_BYTES",
    "ETHERTYPE_ARP",
    "ETHERTYPE_IPV4",
    "ETHERTYPE_IPV6",
    "ETHERTYPE_RARP",
    "MAX_EXTENSION_HEADERS",
    "PROTOCOL_ICMP",
    "PROTOCOL_ICMPV6",
    "PROTOCOL_TCP",
    "PROTOCOL_UDP",
    "TCP_ACK",
    "TCP_FIN",
    "TCP_PSH",
    "TCP_RST",
    "TCP_SYN",
    "FrameKind",
    "IpHeaders",
    "find_network_header",
    "has_network_header",
    "parse_frame",
]

ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_ARP, ETHERTYPE_RARP = 0x0800, 0x86DD, 0x0806, 0x8035
PROTOCOL_TCP, PROTOCOL_UDP, PROTOCOL_ICMP, PROTOCOL_ICMPV6 = 6, 17, 1, 58
TCP_FIN, TCP_SYN, TCP_RST, TCP_PSH, TCP_ACK = 1, 2, 4, 8, 16
ETHERNET_HEADER_BYTES = 14
_MAX_LINK_TAGS = 8
MAX_EXTENSION_HEADERS = 16

_IPV4_STRUCT = Struct("!2xHxxHxB2x4s4s")  # total length, fragment, protocol, source, destination
_PORTS_STRUCT = Struct("!HH")
_MIN_HEADER_BYTES = {PROTOCOL_TCP: 20, PROTOCOL_UDP: 8}
_TAG_TYPES = frozenset({0x8100, 0x88A8, 0x9100, 0x9200})
_MPLS_TYPES = frozenset({0x8847, 0x8848})
_PPPOE_SESSION = 0x8864
_PPP_TYPES = {0x0021: ETHERTYPE_IPV4, 0x0057: ETHERTYPE_IPV6}
_SNAP_HEADER = b"\xaa\xaa\x03\x00\x00\x00"
_EXTENSION_PROTOCOLS = frozenset({0, 43, 60, 135, 139, 140})  # hop-by-hop, routing, destination, mobility, HIP, shim6
_FRAGMENT, _AUTHENTICATION = 44, 51
# Protocols of the link layer itself, which carry no IP flows.
_LINK_TYPES = frozenset({
    ETHERTYPE_ARP, ETHERTYPE_RARP, 0x0842, 0x22F0, 0x8808, 0x8809, 0x8863, 0x8899, 0x888E, 0x88CC, 0x88E1, 0x88F7,
    0x88FB, 0x8902, 0x893A, 0x9000,
})  # fmt: skip


class FrameKind(Enum):
    """Kind of a frame without an IP header."""

    LINK = "link"  # ARP, LLDP, spanning tree: known, and without flows
    OPAQUE = "opaque"  # not parsed: encrypted or of an unknown type
    BROKEN = "broken"  # its headers contradict its type or its length


class IpHeaders(NamedTuple):
    """Addresses and ports of an IP packet.

    Attributes:
        protocol: IP protocol number, such as TCP or UDP.
        src, dst: Addresses, 4 bytes (IPv4) or 16 (IPv6).
        ports: Source and destination port; None if there are none, or they cannot be read.
        flags: TCP flags; 0 for other protocols.
        is_cut: Whether the ports are behind the captured bytes, in another fragment, or behind too many headers.
        at: Offset of the TCP or UDP header; 0 without ports.
    """

    protocol: int
    src: bytes
    dst: bytes
    ports: tuple[int, int] | None
    flags: int
    is_cut: bool = False
    at: int = 0


def parse_frame(frame: bytes, start: int = 0, wire_bytes: int | None = None) -> IpHeaders | FrameKind:
    """Parse one frame.

    Args:
        frame: The frame, or as much of it as was captured.
        start: Offset of the Ethernet header.
        wire_bytes: Size of the whole frame, `start` included; None if `frame` is whole.
    """
    is_cut = wire_bytes is not None and wire_bytes > len(frame)
    at = start + ETHERNET_HEADER_BYTES
    ethertype = frame[at - 2] << 8 | frame[at - 1] if len(frame) >= at else -1
    if ethertype not in (ETHERTYPE_IPV4, ETHERTYPE_IPV6):  # else IP follows at once, as in nearly every frame
        found = find_network_header(frame, start)
        if found is None:
            return FrameKind.OPAQUE if is_cut else FrameKind.BROKEN
        ethertype, at = found
    if ethertype == ETHERTYPE_IPV4:
        return _parse_ipv4(frame, at, is_cut)
    if ethertype == ETHERTYPE_IPV6:
        return _parse_ipv6(frame, at, is_cut)
    if ethertype < 0x0600 or ethertype in _LINK_TYPES:
        return FrameKind.LINK
    return FrameKind.OPAQUE


def find_network_header(frame: bytes, start: int = 0) -> tuple[int, int] | None:
    """Return the Ethernet type of a frame's payload and its offset; None if the frame ends before.

    A type below 0x0600 is an LLC frame. An unsupported encapsulation is returned as its own type.
    """
    at = start + ETHERNET_HEADER_BYTES
    if len(frame) < at:
        return None
    ethertype = frame[at - 2] << 8 | frame[at - 1]
    if ethertype in (ETHERTYPE_IPV4, ETHERTYPE_IPV6):
        return ethertype, at
    for _ in range(_MAX_LINK_TAGS):
        if ethertype not in _TAG_TYPES:
            break
        if len(frame) < at + 4:
            return None
        ethertype, at = frame[at + 2] << 8 | frame[at + 3], at + 4
    if ethertype < 0x0600 and frame[at : at + 6] == _SNAP_HEADER and len(frame) >= at + 8:
        ethertype, at = frame[at + 6] << 8 | frame[at + 7], at + 8
    if ethertype == _PPPOE_SESSION and len(frame) >= at + 8:
        ppp_type = frame[at + 6] << 8 | frame[at + 7]
        return _PPP_TYPES.get(ppp_type, 0 if ppp_type >= 0x8000 else _PPPOE_SESSION), at + 8
    if ethertype in _MPLS_TYPES:
        return _find_mpls_payload(frame, at, ethertype)
    return ethertype, at


def _find_mpls_payload(frame: bytes, at: int, ethertype: int) -> tuple[int, int]:
    for _ in range(_MAX_LINK_TAGS):
        if len(frame) < at + 5:
            break
        is_last, at = frame[at + 2] & 1, at + 4
        if is_last:
            version = frame[at] >> 4
            return (ETHERTYPE_IPV4 if version == 4 else ETHERTYPE_IPV6 if version == 6 else ethertype), at
    return ethertype, at


def _parse_ipv4(frame: bytes, at: int, is_cut: bool) -> IpHeaders | FrameKind:
    if len(frame) < at + 20:
        return FrameKind.OPAQUE if is_cut else FrameKind.BROKEN
    first = frame[at]
    total, fragment, protocol, src, dst = _IPV4_STRUCT.unpack_from(frame, at)
    head = (first & 15) * 4
    if first >> 4 != 4 or head < 20 or 0 < total < head:
        return FrameKind.BROKEN
    if fragment & 0x1FFF:  # a later fragment has no ports
        return IpHeaders(protocol, src, dst, None, 0)
    # Bytes behind the packet are padding. A length of 0 means one that 16 bits cannot hold (segmentation offload).
    end = min(len(frame), at + total) if total else len(frame)
    is_cut = (is_cut and end == len(frame)) or bool(fragment & 0x2000)  # the rest is in another fragment
    if protocol == _AUTHENTICATION:
        return _parse_extensions(frame, at + head, end, protocol, src, dst, is_cut)
    return _parse_ports(frame, at + head, end, protocol, src, dst, is_cut)


def _parse_ipv6(frame: bytes, at: int, is_cut: bool) -> IpHeaders | FrameKind:
    if len(frame) < at + 40:
        return FrameKind.OPAQUE if is_cut else FrameKind.BROKEN
    if frame[at] >> 4 != 6:
        return FrameKind.BROKEN
    size, protocol = frame[at + 4] << 8 | frame[at + 5], frame[at + 6]
    src, dst = frame[at + 8 : at + 24], frame[at + 24 : at + 40]
    at += 40
    end = min(len(frame), at + size) if size else len(frame)  # 0: a jumbogram
    return _parse_extensions(frame, at, end, protocol, src, dst, is_cut and end == len(frame))


def _parse_extensions(
    frame: bytes, at: int, end: int, protocol: int, src: bytes, dst: bytes, is_cut: bool
) -> IpHeaders:
    """Parse the protocol behind IPv6 extension headers or AH."""
    for _ in range(MAX_EXTENSION_HEADERS):
        if protocol in _EXTENSION_PROTOCOLS:
            step = 8 * (frame[at + 1] + 1) if at + 8 <= end else 0
        elif protocol == _FRAGMENT:
            step = 8 if at + 8 <= end else 0
            if step and (frame[at + 2] << 8 | frame[at + 3]) & 0xFFF8:
                return IpHeaders(frame[at], src, dst, None, 0)
            is_cut |= bool(step and frame[at + 3] & 1)
        elif protocol == _AUTHENTICATION:
            step = 4 * (frame[at + 1] + 2) if at + 8 <= end else 0
        else:
            return _parse_ports(frame, at, end, protocol, src, dst, is_cut)
        if not step:
            return IpHeaders(protocol, src, dst, None, 0, is_cut)
        protocol, at = frame[at], at + step
    return IpHeaders(protocol, src, dst, None, 0, True)


def _parse_ports(frame: bytes, at: int, end: int, protocol: int, src: bytes, dst: bytes, is_cut: bool) -> IpHeaders:
    needed = _MIN_HEADER_BYTES.get(protocol)
    if needed is None:
        return IpHeaders(protocol, src, dst, None, 0)
    if end - at < needed:
        return IpHeaders(protocol, src, dst, None, 0, is_cut)
    flags = frame[at + 13] if protocol == PROTOCOL_TCP else 0
    return IpHeaders(protocol, src, dst, _PORTS_STRUCT.unpack_from(frame, at), flags, False, at)


def has_network_header(frame: bytes, start: int, wire_bytes: int) -> bool:
    """Return whether a valid IP or ARP header follows an Ethernet header at `start`.

    Args:
        frame: The frame, or as much of it as was captured.
        start: Supposed offset of the Ethernet header.
        wire_bytes: Size of the whole frame, counted from its first byte.
    """
    at = start + ETHERNET_HEADER_BYTES
    ethertype = frame[at - 2] << 8 | frame[at - 1] if len(frame) >= at else -1
    if ethertype not in (ETHERTYPE_IPV4, ETHERTYPE_IPV6):
        found = find_network_header(frame, start)
        if found is None:
            return False
        ethertype, at = found
    rest = wire_bytes - at
    if ethertype == ETHERTYPE_IPV4 and len(frame) >= at + 20:
        total, head = frame[at + 2] << 8 | frame[at + 3], (frame[at] & 15) * 4
        return frame[at] >> 4 == 4 and 20 <= head <= (total or rest) <= rest
    if ethertype == ETHERTYPE_IPV6 and len(frame) >= at + 40:
        return frame[at] >> 4 == 6 and 40 + (frame[at + 4] << 8 | frame[at + 5]) <= rest
    return ethertype in (ETHERTYPE_ARP, ETHERTYPE_RARP) and frame[at : at + 6] == b"\x00\x01\x08\x00\x06\x04"
