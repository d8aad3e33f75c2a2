"""Flow counters from Ethernet frames: the netflow fields of RAW, and a bounded log of who was spoken to (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address
from struct import Struct
from typing import NamedTuple

_IPV4 = Struct("!2xHxxHxB2x4s4s")  # total length, fragment, protocol, source, destination, from the version byte on
_PORTS = Struct("!HH")
_TCP, _UDP = 6, 17
_SYN, _RST, _ACK = 2, 4, 16
PROTOCOLS = {1: "icmp", _TCP: "tcp", _UDP: "udp"}


class Headers(NamedTuple):
    """What the counters need of an IPv4 frame; ports are None where there are none, or where the frame is cut short."""

    protocol: int
    src: bytes
    dst: bytes
    ports: tuple[int, int] | None
    flags: int


class Counters(NamedTuple):
    """One reading, in RAW order; the last two are of this tick alone."""

    out_pkts: int
    out_bytes: int
    in_pkts: int
    in_bytes: int
    new_flows: int
    syn_out: int
    rst_in: int
    dns_queries: int
    dst_ports: int
    dst_ips: int


def read_headers(frame: bytes) -> Headers | None:
    """Read the IPv4 and TCP or UDP headers of a whole or cut frame; None for anything else. Never raises."""
    if len(frame) < 34 or frame[12:14] != b"\x08\0" or frame[14] >> 4 != 4:
        return None
    head = (frame[14] & 15) * 4
    total, fragment, protocol, src, dst = _IPV4.unpack_from(frame, 14)
    if head < 20 or total < head:
        return None
    at = 14 + head
    end = min(len(frame), 14 + total)  # what lies behind is padding, not ports
    if protocol not in (_TCP, _UDP) or fragment & 0x1FFF or end - at < (20 if protocol == _TCP else 8):
        return Headers(protocol, src, dst, None, 0)
    return Headers(protocol, src, dst, _PORTS.unpack_from(frame, at), frame[at + 13] if protocol == _TCP else 0)


class FlowCounter:
    """Counts frames of one network card.

    Memory is bounded: of the flows the last `max_flows` or so are remembered in two generations; one that falls out
    (counted in `forgotten`) is new again when it comes back. Addresses of a tick are counted up to `max_flows`.
    """

    def __init__(self, *, max_flows: int = 65536) -> None:
        self.forgotten = 0
        self._half = max(1, max_flows // 2)
        self._young: set[tuple[object, ...]] = set()
        self._old: set[tuple[object, ...]] = set()
        self._out_pkts = self._out_bytes = self._in_pkts = self._in_bytes = 0
        self._new_flows = self._syn_out = self._rst_in = self._dns_queries = 0
        self._ports: set[int] = set()
        self._addresses: set[bytes] = set()

    def see(self, frame: bytes, outgoing: bool, wire_bytes: int | None = None) -> None:
        """Count one frame; `wire_bytes` is its true size where `frame` is only its beginning."""
        size = len(frame) if wire_bytes is None else wire_bytes
        if outgoing:
            self._out_pkts += 1
            self._out_bytes += size
        else:
            self._in_pkts += 1
            self._in_bytes += size
        headers = read_headers(frame)
        if headers is None:
            return
        protocol, src, dst, ports, flags = headers
        if outgoing and (len(self._addresses) < 2 * self._half or dst in self._addresses):
            self._addresses.add(dst)
        if ports is None:
            return
        if outgoing:
            self._ports.add(ports[1])
            self._syn_out += flags & (_SYN | _ACK) == _SYN
            self._dns_queries += protocol == _UDP and ports[1] == 53
            self._remember((protocol, src, dst, *ports))
        else:
            self._rst_in += bool(flags & _RST)
            self._remember((protocol, dst, src, ports[1], ports[0]))

    def take(self) -> Counters:
        """Give the counters and begin a new tick."""
        reading = Counters(
            self._out_pkts, self._out_bytes, self._in_pkts, self._in_bytes, self._new_flows, self._syn_out,
            self._rst_in, self._dns_queries, len(self._ports), len(self._addresses),
        )  # fmt: skip
        self._ports, self._addresses = set(), set()
        return reading

    def _remember(self, flow: tuple[object, ...]) -> None:
        if flow in self._young:
            return
        self._new_flows += flow not in self._old
        if len(self._young) >= self._half:
            self.forgotten += len(self._old - self._young)
            self._young, self._old = set(), self._young
        self._young.add(flow)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficRow:
    """Totals of one far end: direction as the guest sees it, `ip` empty for what is not IPv4."""

    outgoing: bool
    protocol: str
    ip: str
    port: int
    frames: int
    bytes: int


class TrafficLog:
    """Totals per (direction, protocol, far address, far port), at most `max_rows`; what is beyond is added up in one."""

    def __init__(self, *, max_rows: int = 8192) -> None:
        self._max = max_rows
        self._totals: dict[tuple[bool, int, bytes, int], list[int]] = {}
        self._beyond = [0, 0]

    def see(self, frame: bytes, outgoing: bool) -> None:
        """Add one frame."""
        headers = read_headers(frame)
        key = (outgoing, -1, b"", 0)
        if headers is not None:
            side = 1 if outgoing else 0
            address = headers.dst if outgoing else headers.src
            key = (outgoing, headers.protocol, address, headers.ports[side] if headers.ports else 0)
        total = self._totals.get(key)
        if total is None:
            total = self._totals.setdefault(key, [0, 0]) if len(self._totals) < self._max else self._beyond
        total[0] += 1
        total[1] += len(frame)

    @property
    def frames_beyond(self) -> int:
        """Frames of far ends that no row was left for."""
        return self._beyond[0]

    def rows(self) -> tuple[TrafficRow, ...]:
        """Give all rows, in order of direction, protocol, address and port."""
        return tuple(
            TrafficRow(
                outgoing=outgoing,
                protocol="other" if protocol < 0 else PROTOCOLS.get(protocol, str(protocol)),
                ip=str(IPv4Address(address)) if address else "",
                port=port,
                frames=total[0],
                bytes=total[1],
            )
            for (outgoing, protocol, address, port), total in sorted(self._totals.items())
        )
