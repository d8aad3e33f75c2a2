"""The other side of the guest's network card: frames in, frames out, nothing else (pure)."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import IPv4Address

from phasewatch.lab.network import frames
from phasewatch.lab.network.addresses import (
    DNS_IP,
    DNS_PORT,
    SINK_MAC,
    TIME_IP,
    TIME_PORT,
    PortBehaviour,
    find_port_behaviour,
    is_lab_address,
)
from phasewatch.lab.network.frames import ACK, RST, SYN, FrameEndpoints, Ipv4Packet, TcpSegment
from phasewatch.lab.network.services import DiscardService, HttpService, TcpService, answer_dns, answer_time
from phasewatch.lab.network.tcp import TcpConnection

_BROADCAST_MAC = b"\xff" * 6


@dataclass(slots=True, kw_only=True)
class IgnoredFrames:
    """Frames of the guest that got no answer, by reason; silent ports are no fault and stand apart."""

    malformed: int = 0
    not_for_us: int = 0  # another hardware address: multicast, neighbour discovery
    unknown_protocol: int = 0  # neither ARP nor IPv4; UDP that nobody listens to; ICMP that is no echo
    outside: int = 0  # an address that the made-up network does not have: breaks the safety contract
    silent: int = 0  # scan range, by verdict
    evicted: int = 0  # connections given up because too many were open


class NetworkResponder:
    """Answers what a guest sends, as `network` says.

    Time is handed in (any monotonic clock, ns). After each call `next_due_ns` says when to call `handle_timers`.
    """

    def __init__(self, *, mac: bytes = SINK_MAC, max_connections: int = 4096) -> None:
        self.ignored = IgnoredFrames()
        self._mac = mac
        self._max = max_connections
        self._open: dict[FrameEndpoints, TcpConnection] = {}
        self._timers: list[tuple[int, FrameEndpoints]] = []
        self._set_ns: dict[FrameEndpoints, int] = {}  # the earliest alarm that stands in the heap for a connection

    @property
    def next_due_ns(self) -> int | None:
        """When `due` should be called next, None while nothing waits for time."""
        return self._timers[0][0] if self._timers else None

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._open)

    def handle(self, frame: bytes, now_ns: int) -> list[bytes]:
        """Take one frame of the guest; give the frames that go back at once. Never raises, whatever the bytes."""
        if frame[:6] not in (self._mac, _BROADCAST_MAC):
            self.ignored.not_for_us += 1
            return []
        kind = frames.parse_ethertype(frame)
        if kind == frames.ETHERTYPE_ARP:
            return self._arp(frame)
        if kind != frames.ETHERTYPE_IPV4:
            self.ignored.unknown_protocol += 1
            return []
        packet = frames.parse_ipv4(frame)
        if packet is None:
            self.ignored.malformed += 1
            return []
        return self._ipv4(packet, now_ns)

    def handle_timers(self, now_ns: int) -> list[bytes]:
        """Give the frames that time has ripened: long polls, delayed ACKs, retransmissions."""
        out: list[bytes] = []
        while self._timers and self._timers[0][0] <= now_ns:
            at_ns, ends = heapq.heappop(self._timers)
            if self._set_ns.get(ends) != at_ns:  # rung before, or the connection is gone
                continue
            del self._set_ns[ends]
            connection = self._open[ends]
            if connection.deadline_ns <= now_ns:
                out += [frames.build_tcp(ends, segment) for segment in connection.handle_timers(now_ns)]
            self._keep(ends, connection)
        return out

    def _arp(self, frame: bytes) -> list[bytes]:
        request = frames.parse_arp(frame)
        # Asking for one's own address tests whether somebody else has it.
        if request is None or request.target == request.sender or request.sender == b"\0\0\0\0":
            self.ignored.malformed += request is None
            return []
        return [frames.build_arp_reply(request, self._mac)]

    def _ipv4(self, packet: Ipv4Packet, now_ns: int) -> list[bytes]:
        address = IPv4Address(packet.dst)
        if not is_lab_address(address):
            self.ignored.outside += 1
        if packet.protocol == frames.PROTOCOL_TCP:
            return self._tcp(packet, address, now_ns)
        if packet.protocol == frames.PROTOCOL_UDP:
            return self._udp(packet, address)
        if packet.protocol == frames.PROTOCOL_ICMP and packet.payload[:2] == b"\x08\0" and len(packet.payload) >= 8:
            return [frames.build_echo_reply(self._ends(packet, 0, 0), packet.payload)]
        self.ignored.unknown_protocol += 1
        return []

    def _udp(self, packet: Ipv4Packet, address: IPv4Address) -> list[bytes]:
        datagram = frames.parse_udp(packet.payload)
        if datagram is None:
            self.ignored.malformed += 1
            return []
        src_port, dst_port, data = datagram
        answer = None
        if (address, dst_port) == (DNS_IP, DNS_PORT):
            answer = answer_dns(data)
        elif (address, dst_port) == (TIME_IP, TIME_PORT):
            answer = answer_time(data)
        if answer is None:
            self.ignored.unknown_protocol += 1
            return []
        return [frames.build_udp(self._ends(packet, src_port, dst_port), answer)]

    def _tcp(self, packet: Ipv4Packet, address: IPv4Address, now_ns: int) -> list[bytes]:
        parsed = frames.parse_tcp(packet.payload)
        if parsed is None:
            self.ignored.malformed += 1
            return []
        src_port, dst_port, segment = parsed
        ends = self._ends(packet, src_port, dst_port)
        connection = self._open.get(ends)
        if segment.flags & SYN:
            if segment.flags & (ACK | RST):
                return []
            if connection is None or not connection.is_retried_syn(segment):
                return self._begin(ends, address, segment, now_ns)
            return [frames.build_tcp(ends, connection.build_syn_ack())]
        if connection is None:
            return [] if segment.flags & RST else [frames.build_tcp(ends, _build_reset(segment))]
        replies = connection.receive(segment, now_ns)
        self._keep(ends, connection)
        return [frames.build_tcp(ends, reply) for reply in replies]

    def _begin(self, ends: FrameEndpoints, address: IPv4Address, syn: TcpSegment, now_ns: int) -> list[bytes]:
        verdict = find_port_behaviour(address, ends.host_port)
        if verdict is PortBehaviour.SILENT:
            self.ignored.silent += 1
            return []
        if verdict is PortBehaviour.REFUSE:
            return [frames.build_tcp(ends, _build_reset(syn))]
        self._forget(ends)
        if len(self._open) >= self._max:
            self._forget(next(iter(self._open)))
            self.ignored.evicted += 1
        service: TcpService = HttpService() if verdict is PortBehaviour.SERVE else DiscardService()
        connection = TcpConnection(syn, _compute_initial_sequence(ends, now_ns), service, now_ns)
        self._keep(ends, connection)
        return [frames.build_tcp(ends, connection.build_syn_ack())]

    def _keep(self, ends: FrameEndpoints, connection: TcpConnection) -> None:
        if connection.is_over:
            self._forget(ends)
            return
        self._open[ends] = connection
        at_ns = connection.deadline_ns
        standing = self._set_ns.get(ends)
        if standing is None or at_ns < standing:  # a later alarm may wait until the earlier one has rung
            self._set_ns[ends] = at_ns
            heapq.heappush(self._timers, (at_ns, ends))
            if len(self._timers) > 64 + 4 * len(self._set_ns):  # most of them were overtaken by earlier ones
                self._timers = [(set_ns, key) for key, set_ns in self._set_ns.items()]
                heapq.heapify(self._timers)

    def _forget(self, ends: FrameEndpoints) -> None:
        self._open.pop(ends, None)
        self._set_ns.pop(ends, None)

    def _ends(self, packet: Ipv4Packet, src_port: int, dst_port: int) -> FrameEndpoints:
        return FrameEndpoints(packet.src_mac, packet.src, src_port, self._mac, packet.dst, dst_port)


def _build_reset(segment: TcpSegment) -> TcpSegment:
    """Give the RST that answers a segment for which there is no connection (RFC 9293, section 3.10.7.1)."""
    if segment.flags & ACK:
        return TcpSegment(segment.ack, 0, RST, 0, 0, b"")
    size = len(segment.payload) + bool(segment.flags & SYN) + bool(segment.flags & frames.FIN)
    return TcpSegment(0, segment.seq + size, RST | ACK, 0, 0, b"")


def _compute_initial_sequence(ends: FrameEndpoints, now_ns: int) -> int:
    """Choose an initial sequence number that grows with time, so that a port used again is not taken for the old one."""
    text = b"".join((ends.guest, ends.guest_port.to_bytes(2, "big"), ends.host, ends.host_port.to_bytes(2, "big")))
    return (int.from_bytes(blake2b(text, digest_size=4).digest(), "big") + now_ns // 4000) & 0xFFFFFFFF
