"""Parse and build Ethernet frames: ARP, IPv4, UDP, TCP and ICMP echo, with their checksums.

The parsers read whole packets of a cooperating guest and return None for anything else. `telemetry.headers` is the
parser for arbitrary traffic.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from phasewatch.telemetry.headers import ETHERTYPE_ARP, ETHERTYPE_IPV4, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP

__all__ = [
    "ACK",
    "FIN",
    "PSH",
    "RST",
    "SYN",
    "ArpRequest",
    "FrameEndpoints",
    "Ipv4Packet",
    "TcpSegment",
    "build_arp_reply",
    "build_echo_reply",
    "build_tcp",
    "build_udp",
    "parse_arp",
    "parse_ethertype",
    "parse_ipv4",
    "parse_tcp",
    "parse_udp",
]

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16

_ETHERNET_STRUCT = struct.Struct("!6s6sH")
_IPV4_STRUCT = struct.Struct("!BBHHHBBH4s4s")
_TCP_STRUCT = struct.Struct("!HHIIBBHHH")
_UDP_STRUCT = struct.Struct("!HHHH")
_ARP_STRUCT = struct.Struct("!HHBBH6s4s6s4s")


# Tuples, not dataclasses: one is created per frame, and a tuple costs a third of the time.
class Ipv4Packet(NamedTuple):
    """A whole IPv4 packet (not a fragment) with the hardware addresses of its frame."""

    dst_mac: bytes
    src_mac: bytes
    protocol: int
    src: bytes
    dst: bytes
    payload: bytes


class TcpSegment(NamedTuple):
    """A TCP segment without its ports; `mss` is 0 where the option is absent."""

    seq: int
    ack: int
    flags: int
    window: int
    mss: int
    payload: bytes


class ArpRequest(NamedTuple):
    """A request of `sender` for the hardware address of `target`."""

    sender_mac: bytes
    sender: bytes
    target: bytes


class FrameEndpoints(NamedTuple):
    """Addresses and ports of a conversation: the guest, and the host that it talks to."""

    guest_mac: bytes
    guest: bytes
    guest_port: int
    host_mac: bytes
    host: bytes
    host_port: int


def parse_ethertype(frame: bytes) -> int:
    """Return the EtherType of a frame; 0 if the frame is truncated."""
    return int.from_bytes(frame[12:14], "big") if len(frame) >= 14 else 0


def parse_arp(frame: bytes) -> ArpRequest | None:
    """Parse an ARP request for an IPv4 address; None for any other frame."""
    if len(frame) < 42:
        return None
    hardware, protocol, hlen, plen, op, mac, sender, _, target = _ARP_STRUCT.unpack_from(frame, 14)
    if (hardware, protocol, hlen, plen, op) != (1, ETHERTYPE_IPV4, 6, 4, 1):
        return None
    return ArpRequest(mac, sender, target)


def parse_ipv4(frame: bytes) -> Ipv4Packet | None:
    """Parse the IPv4 packet of a frame; None if its header is invalid or truncated, or if it is a fragment."""
    if len(frame) < 34:
        return None
    dst_mac, src_mac, _ = _ETHERNET_STRUCT.unpack_from(frame)
    first, _, total, _, fragment, _, protocol, _, src, dst = _IPV4_STRUCT.unpack_from(frame, 14)
    head = (first & 15) * 4
    # More-fragments flag or an offset: the guest never sends fragments.
    if first >> 4 != 4 or head < 20 or total < head or total > len(frame) - 14 or fragment & 0x3FFF:
        return None
    return Ipv4Packet(dst_mac, src_mac, protocol, src, dst, frame[14 + head : 14 + total])


def parse_udp(payload: bytes) -> tuple[int, int, bytes] | None:
    """Parse a UDP datagram into (source port, destination port, data); None if it is invalid."""
    if len(payload) < 8:
        return None
    src_port, dst_port, length, _ = _UDP_STRUCT.unpack_from(payload)
    return (src_port, dst_port, payload[8:length]) if 8 <= length <= len(payload) else None


def parse_tcp(payload: bytes) -> tuple[int, int, TcpSegment] | None:
    """Parse a TCP segment into (source port, destination port, segment); None if it is invalid."""
    if len(payload) < 20:
        return None
    src_port, dst_port, seq, ack, offset, flags, window, _, _ = _TCP_STRUCT.unpack_from(payload)
    head = (offset >> 4) * 4
    if not 20 <= head <= len(payload):
        return None
    mss = _parse_mss(payload[20:head]) if head > 20 and flags & SYN else 0
    return src_port, dst_port, TcpSegment(seq, ack, flags, window, mss, payload[head:])


def _parse_mss(options: bytes) -> int:
    at = 0
    while at < len(options) and options[at] != 0:
        if options[at] == 1:
            at += 1
            continue
        length = options[at + 1] if at + 1 < len(options) else 0
        if length < 2:
            break
        if options[at] == 2 and length == 4 and at + 4 <= len(options):
            return int.from_bytes(options[at + 2 : at + 4], "big")
        at += length
    return 0


def _compute_checksum(data: bytes) -> int:
    """Compute the Internet checksum (RFC 1071).

    The one's complement sum of 16-bit words is the whole number modulo 65535: one division instead of 730 additions.
    A sum of zero gives 0xFFFF, the form that UDP requires; receivers accept both.
    """
    value = int.from_bytes(data if len(data) % 2 == 0 else data + b"\0", "big")
    return 0xFFFF - value % 0xFFFF


def _build_ipv4(ends: FrameEndpoints, protocol: int, payload: bytes) -> bytes:
    head = _IPV4_STRUCT.pack(0x45, 0, 20 + len(payload), 0, 0x4000, 64, protocol, 0, ends.host, ends.guest)
    head = head[:10] + _compute_checksum(head).to_bytes(2, "big") + head[12:]
    return _ETHERNET_STRUCT.pack(ends.guest_mac, ends.host_mac, ETHERTYPE_IPV4) + head + payload


def _build_pseudo_header(ends: FrameEndpoints, protocol: int, size: int) -> bytes:
    return ends.host + ends.guest + bytes((0, protocol)) + size.to_bytes(2, "big")


def build_tcp(ends: FrameEndpoints, segment: TcpSegment) -> bytes:
    """Build the frame that carries a segment to the guest."""
    options = b"\x02\x04" + segment.mss.to_bytes(2, "big") if segment.mss else b""
    offset = (20 + len(options)) << 2
    seq, ack = segment.seq & 0xFFFFFFFF, segment.ack & 0xFFFFFFFF
    head = _TCP_STRUCT.pack(ends.host_port, ends.guest_port, seq, ack, offset, segment.flags, segment.window, 0, 0)
    body = head + options + segment.payload
    total = _compute_checksum(_build_pseudo_header(ends, PROTOCOL_TCP, len(body)) + body)
    return _build_ipv4(ends, PROTOCOL_TCP, body[:16] + total.to_bytes(2, "big") + body[18:])


def build_udp(ends: FrameEndpoints, data: bytes) -> bytes:
    """Build the frame that carries a datagram to the guest."""
    body = _UDP_STRUCT.pack(ends.host_port, ends.guest_port, 8 + len(data), 0) + data
    total = _compute_checksum(_build_pseudo_header(ends, PROTOCOL_UDP, len(body)) + body)
    return _build_ipv4(ends, PROTOCOL_UDP, body[:6] + total.to_bytes(2, "big") + body[8:])


def build_echo_reply(ends: FrameEndpoints, request: bytes) -> bytes:
    """Build the frame that answers an ICMP echo request (the whole ICMP message)."""
    body = b"\0\0\0\0" + request[4:]
    return _build_ipv4(ends, PROTOCOL_ICMP, body[:2] + _compute_checksum(body).to_bytes(2, "big") + body[4:])


def build_arp_reply(request: ArpRequest, mac: bytes) -> bytes:
    """Build the frame that answers an ARP request with `mac`."""
    body = _ARP_STRUCT.pack(1, ETHERTYPE_IPV4, 6, 4, 2, mac, request.target, request.sender_mac, request.sender)
    return _ETHERNET_STRUCT.pack(request.sender_mac, mac, ETHERTYPE_ARP) + body
