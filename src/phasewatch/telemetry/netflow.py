"""Flow counters from Ethernet frames: the netflow fields of RAW, and a bounded log of who was spoken to (pure)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from ipaddress import ip_address
from typing import NamedTuple

from phasewatch.telemetry.headers import (
    PROTOCOL_ICMP,
    PROTOCOL_ICMPV6,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    FrameKind,
    IpHeaders,
    parse_frame,
)

_SYN, _RST, _ACK = 2, 4, 16
PROTOCOL_NAMES = {PROTOCOL_ICMP: "icmp", PROTOCOL_TCP: "tcp", PROTOCOL_UDP: "udp", PROTOCOL_ICMPV6: "icmpv6"}
PARSING_WINDOW_READINGS = 20  # readings over which the share of frames that were not understood is taken: 10 s
MIN_UNPARSED_FRAMES = 4  # frames; fewer say nothing about the others


class NetflowReading(NamedTuple):
    """One reading, in RAW order; the last two are of this tick alone. None where most frames could not be parsed."""

    out_pkts: int | None
    out_bytes: int | None
    in_pkts: int | None
    in_bytes: int | None
    new_flows: int | None
    syn_out: int | None
    rst_in: int | None
    dns_queries: int | None
    dst_ports: int | None
    dst_ips: int | None


FLOW_FIELDS = frozenset(NetflowReading._fields[4:])


def parse_headers(frame: bytes) -> IpHeaders | None:
    """Parse the IP and TCP or UDP headers of a whole or cut frame; None for anything else. Never raises."""
    found = parse_frame(frame)
    return found if isinstance(found, IpHeaders) else None


class FlowCounter:
    """Counts the frames of a machine's network cards.

    A frame whose content cannot be parsed counts as a frame. While most frames of the last `PARSING_WINDOW_READINGS` readings
    are such, the fields that need a look into frames are None: flows that nobody saw are not zero flows. While it is
    not even known where most frames begin, all fields are None.

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
        self._parsing = _ParsingShare()

    def count_frame(
        self, frame: bytes, outgoing: bool, wire_bytes: int | None = None, *, start: int | None = 0
    ) -> None:
        """Count one frame.

        Args:
            frame: The frame or its beginning.
            outgoing: Whether the guest sent it.
            wire_bytes: Its true size where `frame` is only its beginning, `start` included.
            start: Where the Ethernet header begins; None where that cannot be told.
        """
        size = (len(frame) if wire_bytes is None else wire_bytes) - (start or 0)
        if outgoing:
            self._out_pkts += 1
            self._out_bytes += size
        else:
            self._in_pkts += 1
            self._in_bytes += size
        if start is None:
            self._parsing.now[outgoing] += 1
            self._parsing.now[2 + outgoing] += 1
            self._parsing.now[4] += 1
            return
        headers = parse_frame(frame, start, wire_bytes)
        # What others on the wire send to everybody belongs to no flow of the guest, whether it can be parsed or not.
        now = self._parsing.now
        if not isinstance(headers, IpHeaders):
            if outgoing or len(frame) <= start or not frame[start] & 1:
                now[outgoing] += 1
                now[2 + outgoing] += headers is not FrameKind.LINK
            return
        now[outgoing] += 1
        now[2 + outgoing] += headers.is_cut
        protocol, src, dst, ports, flags, _ = headers
        if outgoing and (len(self._addresses) < 2 * self._half or dst in self._addresses):
            self._addresses.add(dst)
        if ports is None:
            return
        if outgoing:
            self._ports.add(ports[1])
            self._syn_out += flags & (_SYN | _ACK) == _SYN
            self._dns_queries += protocol == PROTOCOL_UDP and ports[1] == 53
            self._remember((protocol, src, dst, *ports))
        else:
            self._rst_in += bool(flags & _RST)
            self._remember((protocol, dst, src, ports[1], ports[0]))

    def pop_reading(self) -> NetflowReading:
        """Return the counters and begin a new tick."""
        reading = NetflowReading(
            self._out_pkts, self._out_bytes, self._in_pkts, self._in_bytes, self._new_flows, self._syn_out,
            self._rst_in, self._dns_queries, len(self._ports), len(self._addresses),
        )  # fmt: skip
        self._ports, self._addresses = set(), set()
        self._parsing.end_reading()
        unknown = self.unknown_fields
        if unknown:
            reading = NetflowReading(
                *(None if name in unknown else n for name, n in zip(NetflowReading._fields, reading, strict=True))
            )
        return reading

    @property
    def unknown_fields(self) -> frozenset[str]:
        """Fields that are None at present, because most frames could not be parsed."""
        if not self._parsing.is_located():
            return frozenset(NetflowReading._fields)
        return frozenset() if self._parsing.is_parsed() else FLOW_FIELDS

    def _remember(self, flow: tuple[object, ...]) -> None:
        if flow in self._young:
            return
        self._new_flows += flow not in self._old
        if len(self._young) >= self._half:
            self.forgotten += len(self._old - self._young)
            self._young, self._old = set(), self._young
        self._young.add(flow)


class _ParsingShare:
    """How many of the frames of the last readings could be parsed, each direction by itself.

    Attributes:
        now: Of the present reading: frames in, frames out, those in and out that could not be parsed, and those whose
            beginning is unknown.
    """

    def __init__(self) -> None:
        self.now = [0] * 5
        self._readings: deque[list[int]] = deque(maxlen=PARSING_WINDOW_READINGS)
        self._totals = [0] * 5

    def end_reading(self) -> None:
        """Begin the next reading; judged are those that ended."""
        self._readings.append(self.now)
        self._totals = [sum(counts) for counts in zip(*self._readings, strict=True)]
        self.now = [0] * 5

    def is_located(self) -> bool:
        """Return whether it is known where most frames begin."""
        seen_in, seen_out, *_, unlocated = self._totals
        return unlocated < MIN_UNPARSED_FRAMES or 2 * unlocated <= seen_in + seen_out

    def is_parsed(self) -> bool:
        """Return whether the content of most frames is known, in both directions."""
        seen, unparsed = self._totals[:2], self._totals[2:4]
        return not any(bad >= MIN_UNPARSED_FRAMES and 2 * bad > n for bad, n in zip(unparsed, seen, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficRow:
    """Totals of one far end: direction as the guest sees it, `ip` empty for what is not IP."""

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

    def add_frame(self, frame: bytes, outgoing: bool) -> None:
        """Add one frame."""
        headers = parse_headers(frame)
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
                protocol="other" if protocol < 0 else PROTOCOL_NAMES.get(protocol, str(protocol)),
                ip=str(ip_address(address)) if address else "",
                port=port,
                frames=total[0],
                bytes=total[1],
            )
            for (outgoing, protocol, address, port), total in sorted(self._totals.items())
        )
