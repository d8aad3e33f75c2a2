"""Answer the frames of a guest: one frame in, the answering frames out. No input or output of its own."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import IPv4Address

from phasewatch.lab.network import frames
from phasewatch.lab.network.addresses import (
    DNS_IP,
    DNS_PORT,
    LOCAL_NET,
    SINK_MAC,
    TIME_IP,
    TIME_PORT,
    WEB_IP,
    PortBehaviour,
    find_address,
    find_port_behaviour,
    find_scan_behaviour,
    is_lab_address,
)
from phasewatch.lab.network.frames import ACK, RST, SYN, FrameEndpoints, Ipv4Packet, TcpSegment
from phasewatch.lab.network.services import DiscardService, HttpService, TcpService, answer_dns, answer_time
from phasewatch.lab.network.tcp import TcpConnection
from phasewatch.lab.network.world import EpisodeWorld, ServerBehaviour, WorldServer
from phasewatch.lab.network.world_services import WorldService
from phasewatch.telemetry.headers import ETHERTYPE_ARP, ETHERTYPE_IPV4, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP

__all__ = ["IgnoredFrames", "NetworkResponder"]

_BROADCAST_MAC = b"\xff" * 6
_WORLD_BEHAVIOURS = {
    ServerBehaviour.ACCEPT: PortBehaviour.SERVE,
    ServerBehaviour.SLOW: PortBehaviour.SERVE,
    ServerBehaviour.TLS: PortBehaviour.SERVE,
    ServerBehaviour.REFUSE: PortBehaviour.REFUSE,
    ServerBehaviour.SILENT: PortBehaviour.SILENT,
    ServerBehaviour.NXDOMAIN: PortBehaviour.SILENT,
}


@dataclass(slots=True, kw_only=True)
class IgnoredFrames:
    """Numbers of frames without an answer, by reason; `silent` is normal behaviour.

    Attributes:
        malformed: Invalid headers.
        not_for_us: Another hardware address: multicast, neighbour discovery.
        unknown_protocol: Neither ARP nor IPv4; UDP to a port without a service; ICMP other than echo.
        outside: Packets to an address outside the simulated network; they break the safety contract.
        silent: Connection requests to silent ports of the scan range.
        evicted: Connections dropped because too many were open.
    """

    malformed: int = 0
    not_for_us: int = 0
    unknown_protocol: int = 0
    outside: int = 0
    silent: int = 0
    evicted: int = 0


class NetworkResponder:
    """Answers the frames of one guest according to `addresses`.

    Time is an argument: ns of any monotonic clock. After each call, `next_due_ns` is the time to call `handle_timers`.

    Args:
        mac: Hardware address of all simulated hosts.
        max_connections: Largest number of open TCP connections; beyond it the oldest is dropped.
    """

    def __init__(self, *, mac: bytes = SINK_MAC, max_connections: int = 4096) -> None:
        self.ignored = IgnoredFrames()
        self._mac = mac
        self._max = max_connections
        self._open: dict[FrameEndpoints, TcpConnection] = {}
        self._servers: dict[tuple[IPv4Address, int], WorldServer] = {}
        self._names: dict[bytes, IPv4Address | None] = {}
        self._resolvers, self._clocks = {(DNS_IP, DNS_PORT)}, {(TIME_IP, TIME_PORT)}
        self._timers: list[tuple[int, FrameEndpoints]] = []
        self._scheduled_ns: dict[FrameEndpoints, int] = {}  # the earliest timer of each connection in the heap

    @property
    def next_due_ns(self) -> int | None:
        """When `handle_timers` must be called next, in ns; None if no timer is set."""
        return self._timers[0][0] if self._timers else None

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._open)

    def set_world(self, world: EpisodeWorld) -> None:
        """Set the servers of an episode; open connections stay as they are."""
        servers = {(IPv4Address(server.address), server.port): server for server in world.servers}
        self._servers = {at: server for at, server in servers.items() if server.role not in ("dns", "ntp")}
        self._names = {
            server.name.encode(): None if server.behaviour is ServerBehaviour.NXDOMAIN else IPv4Address(server.address)
            for server in world.servers
            if server.name
        }
        self._resolvers = {(DNS_IP, DNS_PORT)} | {at for at, server in servers.items() if server.role == "dns"}
        self._clocks = {(TIME_IP, TIME_PORT)} | {at for at, server in servers.items() if server.role == "ntp"}

    def handle(self, frame: bytes, now_ns: int) -> list[bytes]:
        """Handle one frame of the guest and return the frames to send at once; any bytes are allowed."""
        if frame[:6] not in (self._mac, _BROADCAST_MAC):
            self.ignored.not_for_us += 1
            return []
        kind = frames.parse_ethertype(frame)
        if kind == ETHERTYPE_ARP:
            return self._handle_arp(frame)
        if kind != ETHERTYPE_IPV4:
            self.ignored.unknown_protocol += 1
            return []
        packet = frames.parse_ipv4(frame)
        if packet is None:
            self.ignored.malformed += 1
            return []
        return self._handle_ipv4(packet, now_ns)

    def handle_timers(self, now_ns: int) -> list[bytes]:
        """Return the frames that are due: answers to long polls, delayed ACKs, retransmissions."""
        out: list[bytes] = []
        while self._timers and self._timers[0][0] <= now_ns:
            at_ns, ends = heapq.heappop(self._timers)
            if self._scheduled_ns.get(ends) != at_ns:  # replaced by an earlier timer, or the connection is closed
                continue
            del self._scheduled_ns[ends]
            connection = self._open[ends]
            if connection.deadline_ns <= now_ns:
                out += [frames.build_tcp(ends, segment) for segment in connection.handle_timers(now_ns)]
            self._update_connection(ends, connection)
        return out

    def _handle_arp(self, frame: bytes) -> list[bytes]:
        request = frames.parse_arp(frame)
        # A request for the sender's own address is a duplicate address test.
        if request is None or request.target == request.sender or request.sender == b"\0\0\0\0":
            self.ignored.malformed += request is None
            return []
        return [frames.build_arp_reply(request, self._mac)]

    def _handle_ipv4(self, packet: Ipv4Packet, now_ns: int) -> list[bytes]:
        address = IPv4Address(packet.dst)
        if not is_lab_address(address):
            self.ignored.outside += 1
        if packet.protocol == PROTOCOL_TCP:
            return self._handle_tcp(packet, address, now_ns)
        if packet.protocol == PROTOCOL_UDP:
            return self._handle_udp(packet, address)
        if packet.protocol == PROTOCOL_ICMP and packet.payload[:2] == b"\x08\0" and len(packet.payload) >= 8:
            return [frames.build_echo_reply(self._build_endpoints(packet, 0, 0), packet.payload)]
        self.ignored.unknown_protocol += 1
        return []

    def _handle_udp(self, packet: Ipv4Packet, address: IPv4Address) -> list[bytes]:
        datagram = frames.parse_udp(packet.payload)
        if datagram is None:
            self.ignored.malformed += 1
            return []
        src_port, dst_port, data = datagram
        answer = None
        if (address, dst_port) in self._resolvers:
            answer = answer_dns(data, self._find_address)
        elif (address, dst_port) in self._clocks:
            answer = answer_time(data)
        if answer is None:
            self.ignored.unknown_protocol += 1
            return []
        return [frames.build_udp(self._build_endpoints(packet, src_port, dst_port), answer)]

    def _handle_tcp(self, packet: Ipv4Packet, address: IPv4Address, now_ns: int) -> list[bytes]:
        parsed = frames.parse_tcp(packet.payload)
        if parsed is None:
            self.ignored.malformed += 1
            return []
        src_port, dst_port, segment = parsed
        ends = self._build_endpoints(packet, src_port, dst_port)
        connection = self._open.get(ends)
        if segment.flags & SYN:
            if segment.flags & (ACK | RST):
                return []
            if connection is None or not connection.is_retried_syn(segment):
                return self._open_connection(ends, address, segment, now_ns)
            return [frames.build_tcp(ends, connection.build_syn_ack())]
        if connection is None:
            return [] if segment.flags & RST else [frames.build_tcp(ends, _build_reset(segment))]
        replies = connection.receive(segment, now_ns)
        self._update_connection(ends, connection)
        return [frames.build_tcp(ends, reply) for reply in replies]

    def _open_connection(self, ends: FrameEndpoints, address: IPv4Address, syn: TcpSegment, now_ns: int) -> list[bytes]:
        server = self._servers.get((address, ends.host_port))
        behaviour = self._find_behaviour(address, ends.host_port, server)
        if behaviour is PortBehaviour.SILENT:
            self.ignored.silent += 1
            return []
        if behaviour is PortBehaviour.REFUSE:
            return [frames.build_tcp(ends, _build_reset(syn))]
        self._remove_connection(ends)
        if len(self._open) >= self._max:
            self._remove_connection(next(iter(self._open)))
            self.ignored.evicted += 1
        service: TcpService = DiscardService()
        if behaviour is PortBehaviour.SERVE:
            service = WorldService(server) if server else HttpService()
        connection = TcpConnection(syn, _compute_initial_sequence(ends, now_ns), service, now_ns)
        self._update_connection(ends, connection)
        return [frames.build_tcp(ends, connection.build_syn_ack())]

    def _find_behaviour(self, address: IPv4Address, port: int, server: WorldServer | None) -> PortBehaviour:
        if server is not None:
            return _WORLD_BEHAVIOURS[server.behaviour]
        if self._servers and address in LOCAL_NET and address not in (DNS_IP, TIME_IP, WEB_IP):
            return find_scan_behaviour(address, port)  # in a world, the own network has other machines
        return find_port_behaviour(address, port)

    def _find_address(self, name: bytes) -> IPv4Address | None:
        return self._names[name.lower()] if name.lower() in self._names else find_address(name)

    def _update_connection(self, ends: FrameEndpoints, connection: TcpConnection) -> None:
        if connection.is_over:
            self._remove_connection(ends)
            return
        self._open[ends] = connection
        at_ns = connection.deadline_ns
        scheduled_ns = self._scheduled_ns.get(ends)
        if scheduled_ns is None or at_ns < scheduled_ns:  # a later timer can wait until the earlier one has fired
            self._scheduled_ns[ends] = at_ns
            heapq.heappush(self._timers, (at_ns, ends))
            if len(self._timers) > 64 + 4 * len(self._scheduled_ns):  # most of them were replaced by earlier ones
                self._timers = [(set_ns, key) for key, set_ns in self._scheduled_ns.items()]
                heapq.heapify(self._timers)

    def _remove_connection(self, ends: FrameEndpoints) -> None:
        self._open.pop(ends, None)
        self._scheduled_ns.pop(ends, None)

    def _build_endpoints(self, packet: Ipv4Packet, src_port: int, dst_port: int) -> FrameEndpoints:
        return FrameEndpoints(packet.src_mac, packet.src, src_port, self._mac, packet.dst, dst_port)


def _build_reset(segment: TcpSegment) -> TcpSegment:
    """Build the RST that answers a segment without a connection (RFC 9293, section 3.10.7.1)."""
    if segment.flags & ACK:
        return TcpSegment(segment.ack, 0, RST, 0, 0, b"")
    size = len(segment.payload) + bool(segment.flags & SYN) + bool(segment.flags & frames.FIN)
    return TcpSegment(0, segment.seq + size, RST | ACK, 0, 0, b"")


def _compute_initial_sequence(ends: FrameEndpoints, now_ns: int) -> int:
    """Compute an initial sequence number that grows with time, so that a reused port is a new connection."""
    text = b"".join((ends.guest, ends.guest_port.to_bytes(2, "big"), ends.host, ends.host_port.to_bytes(2, "big")))
    return (int.from_bytes(blake2b(text, digest_size=4).digest(), "big") + now_ns // 4000) & 0xFFFFFFFF
