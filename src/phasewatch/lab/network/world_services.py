"""What a server of an episode's world answers over TCP: HTTP, a chat of lines, or bytes that look like TLS. No I/O.

One service speaks all protocols, because good and bad roles may share an address: the first bytes of the client decide.
"""

from __future__ import annotations

from hashlib import blake2b, shake_256

from phasewatch.lab.network.services import HttpService, ResponseStream, TcpService
from phasewatch.lab.network.world import ServerBehaviour, WorldServer

__all__ = ["ChatService", "TlsDisguise", "WorldService"]

_HTTP_METHODS = (b"GET ", b"POST", b"PUT ", b"HEAD")
_N_SNIFF = 4
_MAX_LINE_BYTES = 256
_MAX_REPLY_BYTES = 65536
_MAX_CHAT_BYTES = 256 * 2**20  # of all replies of one connection; after it the server says nothing
_DEFAULT_REPLY_BYTES = 64
_SLOW_RANGE_S = (0.5, 6.0)
_HANDSHAKE, _APPLICATION = 22, 23  # RFC 8446, section 5.1
_MASK = bytes(byte ^ 0x5A for byte in range(256))
_HELLO_RECORDS_BYTES = (90, 2800, 300)  # lengths like those of ServerHello, certificate and key exchange


class ChatService:
    """Answers each line: ``WORD N`` gets N bytes, ``PUT N`` swallows N bytes, any other line 64 bytes."""

    def __init__(self) -> None:
        self.answer = ResponseStream()
        self.wake_ns: int | None = None
        self._line = b""
        self._swallow = 0

    def receive(self, data: bytes, now_ns: int) -> None:
        """Answer the complete lines; an overlong one is dropped."""
        while data:
            if self._swallow:
                taken = min(self._swallow, len(data))
                self._swallow, data = self._swallow - taken, data[taken:]
                continue
            line, end, data = data.partition(b"\n")
            self._line = (self._line + line)[: _MAX_LINE_BYTES + 1]
            if end:
                self._answer_line(self._line)
                self._line = b""

    def handle_eof(self, now_ns: int) -> None:
        """Close the connection."""
        self.answer.is_final = True

    def wake(self, now_ns: int) -> None:
        """Do nothing; this service never sets `wake_ns`."""

    def _answer_line(self, line: bytes) -> None:
        word, _, number = line.partition(b" ")
        is_number = number.isdigit() and len(number) <= 9
        if word == b"PUT" and is_number:
            self._swallow = int(number)
            return
        size = min(int(number), _MAX_REPLY_BYTES) if is_number else _DEFAULT_REPLY_BYTES
        self.answer.body_bytes = min(self.answer.body_bytes + size, _MAX_CHAT_BYTES)


class TlsDisguise:
    """Strips records that look like TLS from what the guest sends, and puts them around the answers."""

    def __init__(self, name: str) -> None:
        noise = shake_256(name.encode()).digest(sum(_HELLO_RECORDS_BYTES))
        self.hello = b""
        at = 0
        for size in _HELLO_RECORDS_BYTES:
            self.hello += bytes((_HANDSHAKE, 3, 3)) + size.to_bytes(2, "big") + noise[at : at + size]
            at += size
        self.has_greeted = False
        self.is_broken = False
        self._head = b""
        self._left = 0
        self._kind = 0

    def unwrap(self, data: bytes) -> bytes:
        """Return what the application records carry. Bytes that do not look like TLS break the connection."""
        out = b""
        while data and not self.is_broken:
            if self._left:
                part, data = data[: self._left], data[self._left :]
                self._left -= len(part)
                if self._kind == _APPLICATION:
                    out += part.translate(_MASK)
                continue
            need = 5 - len(self._head)
            self._head, data = self._head + data[:need], data[need:]
            if len(self._head) == 5:
                self._kind, self._left = self._head[0], int.from_bytes(self._head[3:], "big")
                self.is_broken = self._kind not in (_HANDSHAKE, _APPLICATION) or self._head[1] != 3
                self.has_greeted = self.has_greeted or self._kind == _HANDSHAKE
                self._head = b""
        return out

    def wrap(self, answer: ResponseStream) -> ResponseStream:
        """Return the greeting, then the answer as one record; its body is noise and looks encrypted as it is."""
        head = self.hello if self.has_greeted else b""
        if answer.size:
            size = min(answer.size, 0xFFFF)
            head += bytes((_APPLICATION, 3, 3)) + size.to_bytes(2, "big") + answer.head.translate(_MASK)
        is_final = answer.is_final or self.is_broken
        return ResponseStream(head=head, body_bytes=answer.body_bytes, is_final=is_final)


class WorldService:
    """The application behind an accepted connection to a server of the world.

    Args:
        server: The server; a slow one holds back its first answer.
    """

    def __init__(self, server: WorldServer) -> None:
        self.answer = ResponseStream()
        self.wake_ns: int | None = None
        self._inner: TcpService | None = None
        self._first = b""
        self._tls = TlsDisguise(server.name) if server.behaviour is ServerBehaviour.TLS else None
        self._delay_ns = _compute_delay_ns(server) if server.behaviour is ServerBehaviour.SLOW else 0
        self._release_ns: int | None = None

    def receive(self, data: bytes, now_ns: int) -> None:
        """Hand the data to HTTP or the chat, whichever the first bytes ask for."""
        if self._delay_ns:
            self._release_ns, self._delay_ns = now_ns + self._delay_ns, 0
        self._feed(self._tls.unwrap(data) if self._tls else data, now_ns)
        self._update()

    def handle_eof(self, now_ns: int) -> None:
        """Pass the end on; a client that said nothing gets the end back."""
        self._choose(now_ns).handle_eof(now_ns)
        self._update()

    def wake(self, now_ns: int) -> None:
        """Release a held answer, or continue a long poll."""
        if self._release_ns is not None and now_ns >= self._release_ns:
            self._release_ns = None
        if self._inner is not None and self._inner.wake_ns is not None and now_ns >= self._inner.wake_ns:
            self._inner.wake(now_ns)
        self._update()

    def _feed(self, data: bytes, now_ns: int) -> None:
        if self._inner is not None:
            self._inner.receive(data, now_ns)
            return
        self._first += data
        if len(self._first) >= _N_SNIFF or b"\n" in self._first:
            self._choose(now_ns)

    def _choose(self, now_ns: int) -> TcpService:
        if self._inner is None:
            self._inner = HttpService() if self._first[:_N_SNIFF] in _HTTP_METHODS else ChatService()
            self._inner.receive(self._first, now_ns)
            self._first = b""
        return self._inner

    def _update(self) -> None:
        """Copy the answer and the next wake-up of the protocol, unless the answer is held back."""
        times = [self._release_ns, self._inner.wake_ns if self._inner is not None else None]
        self.wake_ns = min((time for time in times if time is not None), default=None)
        if self._release_ns is not None:
            return
        answer = self._inner.answer if self._inner is not None else ResponseStream()
        self.answer = self._tls.wrap(answer) if self._tls else answer


def _compute_delay_ns(server: WorldServer) -> int:
    draw = blake2b(server.name.encode(), digest_size=4, person=b"slow").digest()
    low, high = _SLOW_RANGE_S
    return int((low + (high - low) * int.from_bytes(draw, "big") / 2**32) * 1e9)
