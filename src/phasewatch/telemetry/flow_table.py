"""Remember whom a VM talks to: destinations, connection attempts, rhythms and DNS names (pure, bounded).

A destination is a remote address, port and protocol that the guest contacted first; broadcast and multicast are none.
Only counts leave the table. Times are nanoseconds of any one clock that does not step back.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from phasewatch.telemetry.headers import (
    PROTOCOL_ICMP,
    PROTOCOL_ICMPV6,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    TCP_ACK,
    TCP_FIN,
    TCP_RST,
    TCP_SYN,
    IpHeaders,
)

if TYPE_CHECKING:
    import numpy as np

__all__ = ["EXCHANGE_PAUSE_NS", "LEARNING_NS", "MAX_FLOWS", "NEW_NS", "SILENT_NS", "FlowReading", "FlowTable"]

MAX_FLOWS = 4096
LEARNING_NS = 30_000_000_000  # destinations of this first time are known ones, not new ones
NEW_NS = 60_000_000_000  # a destination is new for this long
SILENT_NS = 3_000_000_000  # a connection attempt without an answer for this long is silent
EXCHANGE_PAUSE_NS = 1_000_000_000  # a frame after this time without any begins another exchange
_IDLE_NS = 600_000_000_000  # an open connection without a frame for this long is forgotten
_MIN_INTERVALS, _MAX_INTERVALS = 3, 12  # between the exchanges of which a rhythm is computed
_RHYTHM_PRIOR = 2  # a rhythm of n intervals counts n / (n + 2) of its regularity
_FIRST_FREE_PORT = 1024  # ports below are those of services
_FIRST_GROUP_BYTE = 224  # of an IPv4 address; of IPv6 it is 255
_ICMP = (PROTOCOL_ICMP, PROTOCOL_ICMPV6)

_T = TypeVar("_T")
_FlowKey = tuple[int, bytes, int]  # protocol, remote address, remote port
_ConnectionKey = tuple[bytes, int, int]  # remote address, remote port, local port


class _FirstFrame(Enum):
    """What the first frame that passes with a remote end says about it."""

    CONTACT = "contact"  # the guest contacts it
    SERVED = "served"  # it contacts the guest
    LATE = "late"  # they talked before frames were counted


class FlowReading(NamedTuple):
    """One reading, in the order of the raw fields; `conn_open` and `rhythm` are levels, all others counters."""

    dst_new: int
    dst_bytes: int
    dst_new_bytes: int
    dst_top_bytes: int
    dst_top_out_bytes: int
    conn_accepted: int
    conn_refused: int
    conn_silent: int
    conn_closed: int
    conn_closed_ns: int
    conn_open: int
    rhythm: int


@dataclass(slots=True)
class _Flow:
    """One remote end.

    Attributes:
        new_until_ns: Time until which it is a new destination.
        is_served: Whether the remote end contacted the guest, so that it is no destination.
        last_ns: Time of the newest frame.
        starts_ns: Times at which the guest began the last exchanges.
        tick, bytes, out_bytes: The newest tick with a frame, and the bytes in it.
    """

    new_until_ns: int
    is_served: bool
    last_ns: int
    starts_ns: deque[int] = field(default_factory=lambda: deque(maxlen=_MAX_INTERVALS + 1))
    tick: int = -1
    bytes: int = 0
    out_bytes: int = 0


class FlowTable:
    """Counts what the frames of a machine's network cards say about destinations.

    Args:
        max_flows: Maximum number of remote ends, of open connections, and of unanswered attempts; the one that was used
            longest ago goes first. A forgotten destination is new when it returns.

    Attributes:
        evicted: Number of forgotten remote ends, connections and attempts.
    """

    def __init__(self, *, max_flows: int = MAX_FLOWS) -> None:
        self._max = max_flows
        self.evicted = 0
        self._flows: OrderedDict[_FlowKey, _Flow] = OrderedDict()
        self._touched: list[_Flow] = []
        self._rhythmic: dict[_FlowKey, _Flow] = {}
        self._pending: OrderedDict[_ConnectionKey, int] = OrderedDict()  # time of the first SYN
        self._silent: OrderedDict[_ConnectionKey, None] = OrderedDict()  # whose SYN may be repeated
        self._open: OrderedDict[_ConnectionKey, list[int]] = OrderedDict()  # times of the answer and the newest frame
        self._begin_ns: int | None = None
        self._tick = 0
        self._dst_new = self._dst_bytes = self._dst_new_bytes = self._top_bytes = self._top_out_bytes = 0
        self._accepted = self._refused = self._silenced = self._closed = self._closed_ns = 0

    def __len__(self) -> int:
        return len(self._flows)

    def add_frame(self, headers: IpHeaders, outgoing: bool, size: int, t_ns: int) -> None:
        """Count one frame.

        Args:
            headers: Its headers.
            outgoing: Whether the guest sent it.
            size: Bytes of the whole frame.
            t_ns: When it passed.
        """
        protocol, src, dst, ports, flags = headers[:5]
        if ports is None:
            if protocol not in _ICMP:
                return
            ports = (0, 0)
        if dst[0] >= _FIRST_GROUP_BYTE and _is_group_address(dst):
            return
        if outgoing:
            remote, (local_port, remote_port) = dst, ports
        else:
            remote, (remote_port, local_port) = src, ports
        key = (protocol, remote, remote_port)
        flow = self._flows.get(key)
        if flow is None:
            flow = self._add_flow(key, t_ns, kind=_classify_first_frame(headers, outgoing))
        else:
            self._flows.move_to_end(key)
        if not flow.is_served:
            self._count_bytes(key, flow, outgoing, size, t_ns)
        if protocol == PROTOCOL_TCP:
            self._follow_connection((remote, remote_port, local_port), flags, outgoing, t_ns)

    def add_run(self, headers: IpHeaders, outgoing: bool, sizes: np.ndarray, times_ns: np.ndarray) -> None:
        """Count frames of one flow, with the result of `add_frame` for each.

        None of them opens or ends a connection, all have ports, and less than `EXCHANGE_PAUSE_NS` is between the first
        and the last.

        Args:
            headers: Headers of the first frame.
            outgoing: Whether the guest sent them.
            sizes: ``(n,)`` int64, bytes of each whole frame.
            times_ns: ``(n,)`` int64, when each passed.
        """
        protocol, src, dst, ports = headers[:4]
        if ports is None or _is_group_address(dst):
            return
        self.add_frame(headers, outgoing, int(sizes[0]), int(times_ns[0]))
        remote, remote_port, local_port = (dst, ports[1], ports[0]) if outgoing else (src, ports[0], ports[1])
        flow, sizes, times_ns = self._flows[protocol, remote, remote_port], sizes[1:], times_ns[1:]
        if not len(sizes):
            return
        if not flow.is_served:
            total = int(sizes.sum())
            self._dst_bytes += total
            self._dst_new_bytes += int(sizes[times_ns < flow.new_until_ns].sum())
            flow.bytes += total
            if outgoing:
                flow.out_bytes += total
            flow.last_ns = max(flow.last_ns, int(times_ns.max()))
        connection = self._open.get((remote, remote_port, local_port)) if protocol == PROTOCOL_TCP else None
        if connection is not None:
            connection[1] = int(times_ns[-1])

    def pop_reading(self, t_ns: int) -> FlowReading:
        """Return the counters and start a new tick; attempts without an answer for `SILENT_NS` become silent."""
        busiest = max(self._touched, key=lambda flow: flow.bytes, default=None)
        if busiest is not None:
            self._top_bytes += busiest.bytes
            self._top_out_bytes += busiest.out_bytes
        self._touched, self._tick = [], self._tick + 1
        while self._pending and t_ns - next(iter(self._pending.values())) >= SILENT_NS:
            key, _ = self._pending.popitem(last=False)
            self._silenced += 1
            self._insert(self._silent, key, None)
        while self._open and t_ns - next(iter(self._open.values()))[1] >= _IDLE_NS:
            self._open.popitem(last=False)
        return FlowReading(
            dst_new=self._dst_new,
            dst_bytes=self._dst_bytes,
            dst_new_bytes=self._dst_new_bytes,
            dst_top_bytes=self._top_bytes,
            dst_top_out_bytes=self._top_out_bytes,
            conn_accepted=self._accepted,
            conn_refused=self._refused,
            conn_silent=self._silenced,
            conn_closed=self._closed,
            conn_closed_ns=self._closed_ns,
            conn_open=len(self._open),
            rhythm=self._compute_rhythm(t_ns),
        )

    def _add_flow(self, key: _FlowKey, t_ns: int, *, kind: _FirstFrame) -> _Flow:
        if self._begin_ns is None:
            self._begin_ns = t_ns
        is_new = kind is _FirstFrame.CONTACT and t_ns - self._begin_ns >= LEARNING_NS
        self._dst_new += is_new
        if len(self._flows) >= self._max:
            gone, _ = self._flows.popitem(last=False)
            self._rhythmic.pop(gone, None)
            self.evicted += 1
        flow = self._flows[key] = _Flow(
            new_until_ns=t_ns + NEW_NS if is_new else t_ns,
            is_served=kind is _FirstFrame.SERVED,
            last_ns=t_ns - EXCHANGE_PAUSE_NS,
        )
        return flow

    def _count_bytes(self, key: _FlowKey, flow: _Flow, outgoing: bool, size: int, t_ns: int) -> None:
        self._dst_bytes += size
        if t_ns < flow.new_until_ns:
            self._dst_new_bytes += size
        if flow.tick != self._tick:
            flow.tick, flow.bytes, flow.out_bytes = self._tick, 0, 0
            if len(self._touched) < self._max:
                self._touched.append(flow)
        flow.bytes += size
        if outgoing:
            flow.out_bytes += size
            if t_ns - flow.last_ns >= EXCHANGE_PAUSE_NS:
                flow.starts_ns.append(t_ns)
                if len(flow.starts_ns) > _MIN_INTERVALS:
                    self._rhythmic[key] = flow
        if t_ns > flow.last_ns:
            flow.last_ns = t_ns

    def _follow_connection(self, key: _ConnectionKey, flags: int, outgoing: bool, t_ns: int) -> None:
        """Follow a TCP connection that the guest opens, from its SYN to the first FIN or RST."""
        kind = flags & (TCP_SYN | TCP_ACK | TCP_RST)
        if outgoing and kind == TCP_SYN:
            self._open.pop(key, None)  # the guest uses the port again
            if key in self._silent:
                self._silent.move_to_end(key)
            elif key not in self._pending:
                self._insert(self._pending, key, t_ns)
            return
        times = self._open.get(key)
        if times is not None:
            times[1] = t_ns
            self._open.move_to_end(key)
            if flags & (TCP_FIN | TCP_RST):
                del self._open[key]
                self._closed += 1
                self._closed_ns += max(0, t_ns - times[0])
        elif not outgoing and (self._pending or self._silent):
            self._answer_attempt(key, flags, t_ns)

    def _answer_attempt(self, key: _ConnectionKey, flags: int, t_ns: int) -> None:
        is_refused = bool(flags & TCP_RST)
        if not is_refused and flags & (TCP_SYN | TCP_ACK) != TCP_SYN | TCP_ACK:
            return
        was_pending = self._pending.pop(key, None) is not None
        was_silent = key in self._silent
        if was_silent:
            del self._silent[key]
        if not (was_pending or was_silent):
            return
        if was_pending:  # an attempt counts once: a late answer does not
            self._refused += is_refused
            self._accepted += not is_refused
        if not is_refused:
            self._insert(self._open, key, [t_ns, t_ns])

    def _insert(self, table: OrderedDict[_ConnectionKey, _T], key: _ConnectionKey, value: _T) -> None:
        if len(table) >= self._max:
            table.popitem(last=False)
            self.evicted += 1
        table[key] = value

    def _compute_rhythm(self, t_ns: int) -> int:
        """Return the largest regularity of any destination, 0 to 1000.

        Of n intervals between the starts of exchanges it is (1 − σ/μ) · n / (n + 2), at least 0. A destination that
        missed two of its mean intervals has none.
        """
        largest = 0.0
        for key, flow in list(self._rhythmic.items()):
            starts = list(flow.starts_ns)
            intervals = [after - before for before, after in pairwise(starts)]
            mean = statistics.fmean(intervals)
            if t_ns - starts[-1] > 2 * mean + EXCHANGE_PAUSE_NS:
                del self._rhythmic[key]
                flow.starts_ns.clear()
                continue
            regularity = 1.0 - statistics.pstdev(intervals, mean) / mean if mean > 0 else 0.0
            largest = max(largest, regularity * len(intervals) / (len(intervals) + _RHYTHM_PRIOR))
        return round(1000 * largest)


def _classify_first_frame(headers: IpHeaders, outgoing: bool) -> _FirstFrame:
    """Classify a frame. Those of both directions may come in another order than they passed, tick by tick."""
    if not outgoing:
        return _FirstFrame.SERVED
    remote_first = headers.flags & (TCP_SYN | TCP_ACK)
    if headers.protocol == PROTOCOL_TCP and remote_first != TCP_SYN:
        return _FirstFrame.SERVED if remote_first == TCP_SYN | TCP_ACK else _FirstFrame.LATE
    if headers.protocol == PROTOCOL_UDP and headers.ports and headers.ports[0] < _FIRST_FREE_PORT <= headers.ports[1]:
        return _FirstFrame.SERVED  # the answer of a service of the guest
    return _FirstFrame.CONTACT


def _is_group_address(address: bytes) -> bool:
    """Return whether an address is IPv4 multicast or the limited broadcast, or IPv6 multicast."""
    if len(address) == 4:
        return 224 <= address[0] <= 239 or address == b"\xff\xff\xff\xff"
    return address[:1] == b"\xff"
