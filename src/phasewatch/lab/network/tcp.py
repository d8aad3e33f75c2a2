"""The answering side of one TCP connection: enough of RFC 9293 for one lossless hop, pure and without buffers."""

from __future__ import annotations

from phasewatch.lab.network.frames import ACK, FIN, PSH, RST, SYN, TcpSegment
from phasewatch.lab.network.services import TcpService

MSS = 1460
# Eight segments in flight, either way. A unix datagram socket queues ten (net.unix.max_dgram_qlen), and QEMU spins
# while the queue is full; a round trip is about a millisecond, so this is still some 10 MB/s. No window scaling.
RECEIVE_WINDOW_BYTES = 8 * MSS
_BURST_BYTES = 8 * MSS
_RTO_NS = 300_000_000
_MAX_RTO_NS = 5_000_000_000
_DELAYED_ACK_NS = 40_000_000
_MAX_RETRIES = 10
IDLE_TIMEOUT_NS = 600_000_000_000


def _compute_signed_difference(difference: int) -> int:
    """Read a difference of sequence numbers as the nearer of the two ways round."""
    difference &= 0xFFFFFFFF
    return difference - 2**32 if difference >= 2**31 else difference


class TcpConnection:
    """Stands between a guest's segments and a service.

    Positions `_una` and `_next` count bytes of the service's answer (the FIN is the byte after the last one), so a
    retransmission asks the answer for the same part again.
    """

    def __init__(self, syn: TcpSegment, isn: int, service: TcpService, now_ns: int) -> None:
        self.is_over = False
        self._service = service
        self._isn = isn
        self._irs = syn.seq
        self._expected = (syn.seq + 1) & 0xFFFFFFFF
        self._mss = min(MSS, syn.mss or 536)
        self._window = syn.window
        self._is_open = False  # the guest has acknowledged our SYN
        self._guest_ended = False
        self._una = 0
        self._next = 0
        self._high = 0  # the furthest that was ever sent; `_next` falls back when something is sent again
        self._repeats = 0
        self._mend_to = 0  # a hole below this is being mended: no second alarm for the same loss
        self._is_mending = False
        self._retries = 0
        self._timer_ns: int | None = now_ns + _RTO_NS
        self._ack_ns: int | None = None
        self._unacked = 0
        self._seen_ns = now_ns

    @property
    def deadline_ns(self) -> int:
        """When `due` wants to be called next."""
        times = (self._timer_ns, self._ack_ns, self._service.wake_ns)
        idle = self._seen_ns + IDLE_TIMEOUT_NS
        if self._service.wake_ns is not None:  # a long poll is silent by design
            idle = max(idle, self._service.wake_ns + IDLE_TIMEOUT_NS)
        return min([idle, *(time for time in times if time is not None)])

    def build_syn_ack(self) -> TcpSegment:
        """Give the SYN/ACK."""
        return TcpSegment(self._isn, self._expected, SYN | ACK, RECEIVE_WINDOW_BYTES, MSS, b"")

    def is_retried_syn(self, segment: TcpSegment) -> bool:
        """Tell whether a SYN asks for this very connection again."""
        return segment.seq == self._irs and not self._is_open

    def receive(self, segment: TcpSegment, now_ns: int) -> list[TcpSegment]:
        """Take one segment (not a SYN) of the guest; give what goes back."""
        self._seen_ns = now_ns
        if segment.flags & RST:
            self.is_over = _compute_signed_difference(segment.seq - self._expected) >= 0
            return []
        if not segment.flags & ACK:
            return []
        has_hole = self._take_ack(segment, now_ns)
        if not self._is_open:  # it has not seen our SYN: what it says belongs to some other connection
            return []
        is_urgent = self._take_data(segment, now_ns)
        out = [self._slice(self._una, self._mss)] if has_hole else []
        out += self._send(now_ns)
        if not out and is_urgent:
            out = [self._bare_ack()]
        self._settle()
        return out

    def handle_timers(self, now_ns: int) -> list[TcpSegment]:
        """Do what time demands: answer a long poll, acknowledge, send again."""
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
        if is_late:  # start over at the first byte that was not acknowledged
            self._next, self._mend_to, self._is_mending = self._una, self._high, False
        out = self._send(now_ns)
        if not out and is_late and self._una < self._find_end():
            out = [self._slice(self._una, 1)]  # the guest's window is closed: knock with one byte
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

    def _take_ack(self, segment: TcpSegment, now_ns: int) -> bool:
        """Move `_una`; tell whether the byte there is missing at the guest (RFC 6582, three repeated ACKs, then one a hole)."""
        moved = _compute_signed_difference(segment.ack - (self._isn + 1 + self._una))
        if moved >= 0 and not self._is_open:
            self._is_open, self._retries, self._timer_ns = True, 0, None
        has_hole = False
        if 0 < moved <= self._high - self._una:
            self._una += moved
            self._next = max(self._next, self._una)
            self._repeats = self._retries = 0
            self._timer_ns = now_ns + _RTO_NS if self._una < self._next else None
            self._is_mending &= self._una < self._mend_to
            has_hole = self._is_mending
        elif moved == 0 and self._una < self._next and not segment.payload and segment.window == self._window:
            self._repeats += 1
            has_hole = self._repeats == 3 and self._una >= self._mend_to
            if has_hole:
                self._mend_to, self._is_mending = self._high, True
        if moved >= 0:
            self._window = segment.window
            if not segment.window:  # closed, but alive: knocking may go on
                self._retries = 0
        return has_hole

    def _take_data(self, segment: TcpSegment, now_ns: int) -> bool:
        """Deliver in-order bytes; tell whether an ACK is due at once."""
        ahead = _compute_signed_difference(segment.seq - self._expected)
        size = len(segment.payload)
        has_fin = bool(segment.flags & FIN)
        if not size and not has_fin:
            return ahead < 0  # a keep-alive wants an answer
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
        """Send what the guest's window and the burst allow."""
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
        return TcpSegment(self._isn + 1 + start, self._expected, flags, RECEIVE_WINDOW_BYTES, 0, payload)

    def _bare_ack(self) -> TcpSegment:
        self._reset_ack_timer()
        return TcpSegment(self._isn + 1 + self._next, self._expected, ACK, RECEIVE_WINDOW_BYTES, 0, b"")

    def _reset_ack_timer(self) -> None:
        self._unacked, self._ack_ns = 0, None

    def _settle(self) -> None:
        if self._guest_ended and self._service.answer.is_final and self._una == self._find_end():
            self.is_over = True
