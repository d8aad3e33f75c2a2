"""The server side of one TCP connection.

It implements as much of RFC 9293 as one lossless hop needs. It does no input or output and keeps no buffers: data for
a retransmission is read from the service again.
"""

from __future__ import annotations

from phasewatch.lab.network.frames import ACK, FIN, PSH, RST, SYN, TcpSegment
from phasewatch.lab.network.services import TcpService

__all__ = ["IDLE_TIMEOUT_NS", "TcpConnection"]

_MSS = 1460
# Eight segments in flight, either way. A unix datagram socket queues ten (net.unix.max_dgram_qlen), and QEMU spins
# while the queue is full; a round trip is about a millisecond, so this is still some 10 MB/s. No window scaling.
_RECEIVE_WINDOW_BYTES = 8 * _MSS
_BURST_BYTES = 8 * _MSS
_RTO_NS = 300_000_000
_MAX_RTO_NS = 5_000_000_000
_DELAYED_ACK_NS = 40_000_000
_MAX_RETRIES = 10
IDLE_TIMEOUT_NS = 600_000_000_000


def _compute_signed_difference(difference: int) -> int:
    """Return a difference of sequence numbers modulo 2^32 as a signed number."""
    difference &= 0xFFFFFFFF
    return difference - 2**32 if difference >= 2**31 else difference


class TcpConnection:
    """Connects the segments of a guest with a service.

    The positions `_una` and `_next` count bytes of the service's answer; the FIN is the byte after the last one. A
    retransmission reads the same part of the answer again.

    Args:
        syn: The guest's SYN.
        isn: Initial sequence number of this side.
        service: Consumes the guest's data and provides the answer.
        now_ns: Monotonic time in ns.
    """

    def __init__(self, syn: TcpSegment, isn: int, service: TcpService, now_ns: int) -> None:
        self.is_over = False
        self._service = service
        self._isn = isn
        self._irs = syn.seq
        self._expected = (syn.seq + 1) & 0xFFFFFFFF
        self._mss = min(_MSS, syn.mss or 536)
        self._window = syn.window
        self._is_open = False  # the guest has acknowledged our SYN
        self._guest_ended = False
        self._una = 0
        self._next = 0
        self._high = 0  # the highest position ever sent; a retransmission sets `_next` back
        self._repeats = 0
        self._recover_to = 0  # losses below this position are in recovery and not detected again
        self._is_recovering = False
        self._retries = 0
        self._timer_ns: int | None = now_ns + _RTO_NS
        self._ack_ns: int | None = None
        self._unacked = 0
        self._seen_ns = now_ns

    @property
    def deadline_ns(self) -> int:
        """When `handle_timers` must be called next, in ns of monotonic time."""
        times = (self._timer_ns, self._ack_ns, self._service.wake_ns)
        idle = self._seen_ns + IDLE_TIMEOUT_NS
        if self._service.wake_ns is not None:  # a long poll is silent by design
            idle = max(idle, self._service.wake_ns + IDLE_TIMEOUT_NS)
        return min([idle, *(time for time in times if time is not None)])

    def build_syn_ack(self) -> TcpSegment:
        """Build the SYN/ACK."""
        return TcpSegment(self._isn, self._expected, SYN | ACK, _RECEIVE_WINDOW_BYTES, _MSS, b"")

    def is_retried_syn(self, segment: TcpSegment) -> bool:
        """Return whether a SYN repeats the request for this connection."""
        return segment.seq == self._irs and not self._is_open

    def receive(self, segment: TcpSegment, now_ns: int) -> list[TcpSegment]:
        """Handle one segment of the guest (not a SYN), and return the segments to send."""
        self._seen_ns = now_ns
        if segment.flags & RST:
            self.is_over = _compute_signed_difference(segment.seq - self._expected) >= 0
            return []
        if not segment.flags & ACK:
            return []
        has_hole = self._handle_ack(segment, now_ns)
        if not self._is_open:  # the guest has not acknowledged our SYN, so the segment belongs to another connection
            return []
        is_urgent = self._handle_data(segment, now_ns)
        out = [self._slice(self._una, self._mss)] if has_hole else []
        out += self._send(now_ns)
        if not out and is_urgent:
            out = [self._bare_ack()]
        self._settle()
        return out

    def handle_timers(self, now_ns: int) -> list[TcpSegment]:
        """Answer a long poll, acknowledge and retransmit as due, and return the segments to send."""
        if now_ns - self._seen_ns >= IDLE_TIMEOUT_NS and self._service.wake_ns is None:
            self.is_over = True
            return []
        if self._service.wake_ns is not None and now_ns >= self._service.wake_ns:
            self._service.wake(now_ns)
            self._seen_ns = now_ns
        is_late = self._timer_ns is not None and now_ns >= self._timer_ns
        if is_late and not self._count_retry(now_ns):
            return [TcpSegment(self._isn + 1 + self._next, self._expected, RST | ACK, 0, 0, b"")]
        if not self._is_open:
            return [self.build_syn_ack()] if is_late else []
        if is_late:  # restart at the first unacknowledged byte
            self._next, self._recover_to, self._is_recovering = self._una, self._high, False
        out = self._send(now_ns)
        if not out and is_late and self._una < self._find_end():
            out = [self._slice(self._una, 1)]  # zero-window probe of one byte
            self._next = self._una + 1
            self._high = max(self._high, self._next)
        if not out and self._ack_ns is not None and now_ns >= self._ack_ns:
            out = [self._bare_ack()]
        return out

    def _count_retry(self, now_ns: int) -> bool:
        self._retries += self._una < self._next or not self._is_open
        self._timer_ns = now_ns + min(_MAX_RTO_NS, _RTO_NS << min(self._retries, 5))
        self.is_over = self._retries > _MAX_RETRIES
        return not self.is_over

    def _find_end(self) -> int:
        answer = self._service.answer
        return answer.size + answer.is_final

    def _handle_ack(self, segment: TcpSegment, now_ns: int) -> bool:
        """Advance `_una`; return whether the segment there was lost.

        A loss is three duplicate ACKs, or a partial ACK during recovery (RFC 6582).
        """
        moved = _compute_signed_difference(segment.ack - (self._isn + 1 + self._una))
        if moved >= 0 and not self._is_open:
            self._is_open, self._retries, self._timer_ns = True, 0, None
        has_hole = False
        if 0 < moved <= self._high - self._una:
            self._una += moved
            self._next = max(self._next, self._una)
            self._repeats = self._retries = 0
            self._timer_ns = now_ns + _RTO_NS if self._una < self._next else None
            self._is_recovering &= self._una < self._recover_to
            has_hole = self._is_recovering
        elif moved == 0 and self._una < self._next and not segment.payload and segment.window == self._window:
            self._repeats += 1
            has_hole = self._repeats == 3 and self._una >= self._recover_to
            if has_hole:
                self._recover_to, self._is_recovering = self._high, True
        if moved >= 0:
            self._window = segment.window
            if not segment.window:  # a closed window: probes may continue
                self._retries = 0
        return has_hole

    def _handle_data(self, segment: TcpSegment, now_ns: int) -> bool:
        """Deliver in-order bytes to the service; return whether an ACK is due at once."""
        ahead = _compute_signed_difference(segment.seq - self._expected)
        size = len(segment.payload)
        has_fin = bool(segment.flags & FIN)
        if not size and not has_fin:
            return ahead < 0  # a keep-alive needs an answer
        if ahead > 0 or ahead + size + has_fin <= 0:
            return True
        fresh = segment.payload[-ahead:]
        if fresh and not self._guest_ended:
            self._service.receive(fresh, now_ns)
        self._expected = (self._expected + len(fresh)) & 0xFFFFFFFF
        if has_fin and not self._guest_ended:
            self._guest_ended = True
            self._expected = (self._expected + 1) & 0xFFFFFFFF
            self._service.handle_eof(now_ns)
        self._unacked += 1
        if has_fin or self._unacked >= 2 or segment.flags & PSH:
            return True
        self._ack_ns = self._ack_ns or now_ns + _DELAYED_ACK_NS
        return False

    def _send(self, now_ns: int) -> list[TcpSegment]:
        """Return the segments that the guest's window and the burst limit allow."""
        size, goal = self._service.answer.size, self._find_end()
        limit = self._una + min(self._window, _BURST_BYTES)
        out = []
        while (
            self._is_open
            and self._next < goal
            and (self._next < limit or (self._next == size and self._next == self._una))
        ):
            out.append(self._slice(self._next, min(self._mss, max(1, limit - self._next))))
            self._next += len(out[-1].payload) + bool(out[-1].flags & FIN)
            self._high = max(self._high, self._next)
        if (out or self._una < goal) and self._timer_ns is None:
            self._timer_ns = now_ns + _RTO_NS
        return out

    def _slice(self, start: int, size: int) -> TcpSegment:
        answer = self._service.answer
        payload = answer.read_part(start, size) if start < answer.size else b""
        end = start + len(payload)
        flags = ACK | (PSH if payload and end == answer.size else 0)
        if answer.is_final and end == answer.size:
            flags |= FIN
        self._reset_ack_timer()
        return TcpSegment(self._isn + 1 + start, self._expected, flags, _RECEIVE_WINDOW_BYTES, 0, payload)

    def _bare_ack(self) -> TcpSegment:
        self._reset_ack_timer()
        return TcpSegment(self._isn + 1 + self._next, self._expected, ACK, _RECEIVE_WINDOW_BYTES, 0, b"")

    def _reset_ack_timer(self) -> None:
        self._unacked, self._ack_ns = 0, None

    def _settle(self) -> None:
        if self._guest_ended and self._service.answer.is_final and self._una == self._find_end():
            self.is_over = True
