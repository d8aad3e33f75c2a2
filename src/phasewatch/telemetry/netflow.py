"""Count flows from Ethernet frames: the raw fields of source `netflow`, and a bounded traffic log (pure)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from phasewatch.telemetry.dns import DNS_PORT, DnsCounter
from phasewatch.telemetry.flow_table import FlowTable
from phasewatch.telemetry.headers import (
    PROTOCOL_ICMP,
    PROTOCOL_ICMPV6,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    TCP_ACK,
    TCP_RST,
    TCP_SYN,
    FrameKind,
    IpHeaders,
    parse_frame,
)

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "FLOW_FIELDS",
    "PARSING_WINDOW_READINGS",
    "FlowCounter",
    "NetflowReading",
    "TrafficLog",
    "TrafficRow",
    "parse_headers",
]

_PROTOCOL_NAMES = {PROTOCOL_ICMP: "icmp", PROTOCOL_TCP: "tcp", PROTOCOL_UDP: "udp", PROTOCOL_ICMPV6: "icmpv6"}
PARSING_WINDOW_READINGS = 20  # readings over which the share of unparsed frames is computed: 10 s
_MIN_UNPARSED_FRAMES = 4  # fewer unparsed frames say nothing about the others


class NetflowReading(NamedTuple):
    """One reading, in the order of `RAW`; None for fields that are unknown because most frames could not be parsed.

    All fields are counters since the start, except `dst_ports` and `dst_ips`, which count distinct values in this tick,
    and the levels `conn_open` and `rhythm`.
    """

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
    dst_new: int | None = 0
    dst_bytes: int | None = 0
    dst_new_bytes: int | None = 0
    dst_top_bytes: int | None = 0
    dst_top_out_bytes: int | None = 0
    conn_accepted: int | None = 0
    conn_refused: int | None = 0
    conn_silent: int | None = 0
    conn_closed: int | None = 0
    conn_closed_ns: int | None = 0
    conn_open: int | None = 0
    rhythm: int | None = 0
    dns_asked: int | None = 0
    dns_new_names: int | None = 0
    dns_name_bytes: int | None = 0
    dns_entropy: int | None = 0
    dns_txt: int | None = 0
    dns_answers: int | None = 0
    dns_nxdomain: int | None = 0


FLOW_FIELDS = frozenset(NetflowReading._fields[4:])


def parse_headers(frame: bytes) -> IpHeaders | None:
    """Return the IP and TCP or UDP headers of a whole or cut frame; None for anything else. Never raises."""
    headers = parse_frame(frame)
    return headers if isinstance(headers, IpHeaders) else None


class FlowCounter:
    """Counts the frames of a machine's network cards.

    A frame whose content cannot be parsed counts as a frame. While most frames of the last `PARSING_WINDOW_READINGS`
    readings are such, the fields that need a frame's content (`FLOW_FIELDS`) are None, because unseen flows are not
    zero flows. While the start of most frames is unknown, all fields are None.

    Memory is bounded: about `max_flows` flows are remembered, in two generations. A forgotten flow counts as new when
    it returns. Distinct addresses of a tick are counted up to `max_flows`. `FlowTable` and `DnsCounter` have bounds of
    their own.

    Args:
        max_flows: Maximum number of remembered flows.

    Attributes:
        forgotten: Number of forgotten flows.
        table: Destinations and connections; its `evicted` counts what it forgot.
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
        self.table, self._dns = FlowTable(), DnsCounter()

    def count_frame(
        self, frame: bytes, outgoing: bool, wire_bytes: int | None = None, *, start: int | None = 0, t_ns: int = 0
    ) -> None:
        """Count one frame.

        Args:
            frame: The frame, or as much of it as was captured.
            outgoing: Whether the guest sent it.
            wire_bytes: Size of the whole frame, `start` included; None if `frame` is whole.
            start: Offset of the Ethernet header; None if unknown.
            t_ns: When it passed, on a clock that does not step back.
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
        # A multicast from others belongs to no flow of the guest, so it does not count as unparsed.
        now = self._parsing.now
        if not isinstance(headers, IpHeaders):
            if outgoing or len(frame) <= start or not frame[start] & 1:
                now[outgoing] += 1
                now[2 + outgoing] += headers is not FrameKind.LINK
            return
        now[outgoing] += 1
        now[2 + outgoing] += headers.is_cut
        protocol, _, _, ports, flags, _, at = headers
        self.table.add_frame(headers, outgoing, size, t_ns)
        self._note_ports(headers, outgoing)
        if ports is None:
            return
        if protocol == PROTOCOL_UDP and ports[outgoing] == DNS_PORT:
            self._dns.add_message(frame, at, size + start, outgoing=outgoing)
        if outgoing:
            self._syn_out += flags & (TCP_SYN | TCP_ACK) == TCP_SYN
            self._dns_queries += protocol == PROTOCOL_UDP and ports[1] == DNS_PORT
        else:
            self._rst_in += bool(flags & TCP_RST)

    def count_run(self, headers: IpHeaders, outgoing: bool, sizes: np.ndarray, times_ns: np.ndarray) -> None:
        """Count frames of one flow at once, with the result of `count_frame` for each.

        None of them opens or ends a connection or is a DNS message, all have ports, and less than
        `EXCHANGE_PAUSE_NS` is between the first and the last.

        Args:
            headers: Headers of the first frame.
            outgoing: Whether the guest sent them.
            sizes: ``(n,)`` int64, bytes of each whole frame.
            times_ns: ``(n,)`` int64, when each passed, on a clock that does not step back.
        """
        count, total = len(sizes), int(sizes.sum())
        if outgoing:
            self._out_pkts += count
            self._out_bytes += total
        else:
            self._in_pkts += count
            self._in_bytes += total
        self._parsing.now[outgoing] += count
        self.table.add_run(headers, outgoing, sizes, times_ns)
        self._note_ports(headers, outgoing)

    def pop_reading(self, t_ns: int = 0) -> NetflowReading:
        """Return the counters and start a new tick.

        Args:
            t_ns: The time now, on the clock of the frames.
        """
        reading = NetflowReading(
            out_pkts=self._out_pkts,
            out_bytes=self._out_bytes,
            in_pkts=self._in_pkts,
            in_bytes=self._in_bytes,
            new_flows=self._new_flows,
            syn_out=self._syn_out,
            rst_in=self._rst_in,
            dns_queries=self._dns_queries,
            dst_ports=len(self._ports),
            dst_ips=len(self._addresses),
            **self.table.pop_reading(t_ns)._asdict(),
            **self._dns.pop_reading()._asdict(),
        )
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
        """Fields that are None at present because most frames could not be parsed."""
        if not self._parsing.is_located():
            return frozenset(NetflowReading._fields)
        return frozenset() if self._parsing.is_parsed() else FLOW_FIELDS

    def _note_ports(self, headers: IpHeaders, outgoing: bool) -> None:
        """Note a frame's addresses and ports, which count once however many frames have them."""
        protocol, src, dst, ports = headers[:4]
        if outgoing and (len(self._addresses) < 2 * self._half or dst in self._addresses):
            self._addresses.add(dst)
        if ports is None:
            return
        if outgoing:
            self._ports.add(ports[1])
            self._remember((protocol, src, dst, *ports))
        else:
            self._remember((protocol, dst, src, ports[1], ports[0]))

    def _remember(self, flow: tuple[object, ...]) -> None:
        if flow in self._young:
            return
        self._new_flows += flow not in self._old
        if len(self._young) >= self._half:
            self.forgotten += len(self._old - self._young)
            self._young, self._old = set(), self._young
        self._young.add(flow)


class _ParsingShare:
    """Counts which share of the frames of the last readings could be parsed, separately for each direction.

    Attributes:
        now: Counts of the present reading: frames in, frames out, unparsed frames in and out, and frames whose start is
            unknown.
    """

    def __init__(self) -> None:
        self.now = [0] * 5
        self._readings: deque[list[int]] = deque(maxlen=PARSING_WINDOW_READINGS)
        self._totals = [0] * 5

    def end_reading(self) -> None:
        """Complete the present reading, and update the totals."""
        self._readings.append(self.now)
        self._totals = [sum(counts) for counts in zip(*self._readings, strict=True)]
        self.now = [0] * 5

    def is_located(self) -> bool:
        """Return whether the start of most frames is known."""
        seen_in, seen_out, *_, unlocated = self._totals
        return unlocated < _MIN_UNPARSED_FRAMES or 2 * unlocated <= seen_in + seen_out

    def is_parsed(self) -> bool:
        """Return whether most frames could be parsed, in both directions."""
        seen, unparsed = self._totals[:2], self._totals[2:4]
        return not any(bad >= _MIN_UNPARSED_FRAMES and 2 * bad > n for bad, n in zip(unparsed, seen, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficRow:
    """Traffic of the guest with one remote address and port.

    Attributes:
        outgoing: Whether the guest sent it.
        protocol: Such as ``tcp``; ``other`` for frames without IP.
        ip: Remote address; empty for frames without IP.
        port: Remote port; 0 if there is none.
        frames, bytes: Totals.
    """

    outgoing: bool
    protocol: str
    ip: str
    port: int
    frames: int
    bytes: int


class TrafficLog:
    """Sums traffic per direction, protocol, remote address and remote port.

    Args:
        max_rows: Maximum number of rows; further traffic is summed up together.
    """

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
        """Number of frames that no row was left for."""
        return self._beyond[0]

    def rows(self) -> tuple[TrafficRow, ...]:
        """Return all rows in order of direction, protocol, address and port."""
        return tuple(
            TrafficRow(
                outgoing=outgoing,
                protocol="other" if protocol < 0 else _PROTOCOL_NAMES.get(protocol, str(protocol)),
                ip=str(ip_address(address)) if address else "",
                port=port,
                frames=total[0],
                bytes=total[1],
            )
            for (outgoing, protocol, address, port), total in sorted(self._totals.items())
        )
