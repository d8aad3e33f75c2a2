"""Services of the simulated network: DNS, NTP, HTTP (downloads, long polls, uploads) and discard. No I/O."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b, shake_256
from ipaddress import IPv4Address
from math import isfinite
from typing import Protocol

from phasewatch.lab.network.addresses import find_address

__all__ = ["DiscardService", "HttpService", "ResponseStream", "TcpService", "answer_dns", "answer_time"]

_MAX_BODY_BYTES = 64 * 2**20
_MAX_WAIT_S = 3600.0
_MAX_HEAD_BYTES = 8192
_TTL_S = 60
_A, _TXT = 1, 16
_NXDOMAIN = 3


def answer_dns(query: bytes, find: Callable[[bytes], IPv4Address | None] = find_address) -> bytes | None:
    """Build the answer to a DNS query: A by name, TXT with a short text, no record for other types.

    Args:
        query: The datagram of the guest.
        find: Name → address; None makes the answer NXDOMAIN.

    Returns:
        The answer; None if the bytes are not a query with exactly one well-formed question.

    Source: RFC 1035.
    """
    if len(query) < 17:
        return None
    ident, flags, questions = struct.unpack_from("!HHH", query)
    at, labels = 12, []
    while at < len(query) and query[at]:
        size = query[at]
        if size > 63 or at + 1 + size >= len(query):  # compression pointers are not allowed in a question
            return None
        labels.append(query[at + 1 : at + 1 + size])
        at += 1 + size
    if flags & 0xF800 or questions != 1 or at + 5 > len(query) or at > 12 + 254:
        return None
    question = query[12 : at + 5]
    kind, klass = struct.unpack_from("!HH", query, at + 1)
    name = b".".join(labels)
    data, address = b"", find(name)
    if klass == 1 and kind == _A and address is not None:
        data = address.packed
    elif klass == 1 and kind == _TXT and address is not None:
        text = blake2b(name.lower(), digest_size=20, person=b"txt").hexdigest().encode()
        data = bytes((len(text),)) + text
    head = struct.pack(
        "!HHHHHH", ident, 0x8180 | flags & 0x0100 | (_NXDOMAIN if address is None else 0), 1, int(bool(data)), 0, 0
    )
    record = struct.pack("!HHHIH", 0xC00C, kind, 1, _TTL_S, len(data)) + data if data else b""
    return head + question + record


def answer_time(query: bytes) -> bytes | None:
    """Build the 48-byte answer to an NTP query; None if the query is too short.

    All stamps repeat the client's own, so the guest learns nothing about the host's clock. Source: RFC 5905.
    """
    if len(query) < 48:
        return None
    stamp = query[40:48]
    return struct.pack("!BBbbII4s", 0x24, 2, query[2] % 17, -20, 0, 0, b"SINK") + stamp * 4


@cache
def _build_noise() -> bytes:
    return shake_256(b"phasewatch sink").digest(2**20)


@dataclass(slots=True, kw_only=True)
class ResponseStream:
    """A stream whose parts can be read again, so that nothing is buffered for retransmission.

    Attributes:
        head: Its first bytes.
        body_bytes: Number of pseudo-random bytes that follow.
        is_final: Whether the stream is complete.
    """

    head: bytes = b""
    body_bytes: int = 0
    is_final: bool = False

    @property
    def size(self) -> int:
        """Number of bytes that are available so far."""
        return len(self.head) + self.body_bytes

    def read_part(self, start: int, size: int) -> bytes:
        """Return up to `size` bytes from position `start`."""
        size = min(size, self.size - start)
        literal = self.head[start : start + size]
        left = size - len(literal)
        if left <= 0:
            return literal
        noise = _build_noise()
        at = (max(0, start - len(self.head)) + self.body_bytes * 7919) % len(noise)
        body = noise[at : at + left]
        while len(body) < left:
            body += noise[: left - len(body)]
        return literal + body


class TcpService(Protocol):
    """The application behind an accepted TCP connection.

    Attributes:
        answer: The bytes to send.
        wake_ns: When to call `wake`, in ns of monotonic time; None for never.
    """

    answer: ResponseStream
    wake_ns: int | None

    def receive(self, data: bytes, now_ns: int) -> None:
        """Handle in-order data from the guest."""

    def handle_eof(self, now_ns: int) -> None:
        """Handle the end of the guest's data."""

    def wake(self, now_ns: int) -> None:
        """Continue after `wake_ns` has passed."""


class DiscardService:
    """Discards all data, sends none, and closes when the guest does (RFC 863)."""

    def __init__(self) -> None:
        self.answer = ResponseStream()
        self.wake_ns: int | None = None

    def receive(self, data: bytes, now_ns: int) -> None:
        """Discard the data."""

    def handle_eof(self, now_ns: int) -> None:
        """Close the connection."""
        self.answer.is_final = True

    def wake(self, now_ns: int) -> None:
        """Do nothing; this service never sets `wake_ns`."""


class HttpService:
    """Handles one HTTP/1.0 request: `/bytes/N`, `/wait/SECONDS`, small pages and discarded uploads."""

    def __init__(self) -> None:
        self.answer = ResponseStream()
        self.wake_ns: int | None = None
        self._head: bytes | None = b""  # None: the request's head is complete
        self._left: float = 0  # bytes of an upload still to come; infinite without Content-Length

    def receive(self, data: bytes, now_ns: int) -> None:
        """Parse the head of the request, then discard the body that it announces."""
        if self.answer.is_final:
            return
        if self._head is None:
            self._discard(len(data))
            return
        self._head += data
        ends = [(self._head.find(mark), len(mark)) for mark in (b"\r\n\r\n", b"\n\n") if mark in self._head]
        if ends:
            end, skip = min(ends)
            head, rest = self._head[:end], self._head[end + skip :]
            self._head = None
            self._begin(head, len(rest), now_ns)
        elif len(self._head) > _MAX_HEAD_BYTES:
            self._finish("400 Bad Request")

    def handle_eof(self, now_ns: int) -> None:
        """Complete an upload of unknown length; close without an answer if the head is incomplete."""
        if self._head is not None:
            self.answer.is_final = True
        elif self._left:
            self._finish("204 No Content")

    def wake(self, now_ns: int) -> None:
        """Answer the long poll."""
        if self.wake_ns is not None and now_ns >= self.wake_ns:
            self.wake_ns = None
            self._finish("200 OK", b"idle\n")

    def _begin(self, head: bytes, already: int, now_ns: int) -> None:
        lines = head.decode("latin-1").splitlines() or [""]
        method, _, rest = lines[0].partition(" ")
        path = rest.split(" ")[0].partition("?")[0]
        fields = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines[1:])}
        if method in ("POST", "PUT"):
            length = _parse_whole_number(fields.get("content-length", ""))
            self._left = float("inf") if length is None else length
            if fields.get("expect", "").lower() == "100-continue":
                self.answer.head += b"HTTP/1.0 100 Continue\r\n\r\n"
            self._discard(already)
        elif method not in ("GET", "HEAD"):
            self._finish("400 Bad Request")
        elif path.startswith("/bytes/"):
            size = _parse_whole_number(path.removeprefix("/bytes/"))
            is_served = size is not None and size <= _MAX_BODY_BYTES
            self._finish("200 OK" if is_served else "400 Bad Request", noise_bytes=size if is_served and size else 0)
        elif path.startswith("/wait/"):
            wait_s = _parse_wait_s(path.removeprefix("/wait/"))
            if wait_s is None:
                self._finish("400 Bad Request")
            else:
                self.wake_ns = now_ns + int(wait_s * 1e9)
        else:
            self._finish("200 OK", _build_page(path))
        if method == "HEAD":
            self.answer.body_bytes = 0

    def _discard(self, size: int) -> None:
        self._left = max(0, self._left - size)
        if not self._left:
            self._finish("204 No Content")

    def _finish(self, status: str, body: bytes = b"", noise_bytes: int = 0) -> None:
        length = "" if status.startswith("204") else f"Content-Length: {len(body) + noise_bytes}\r\n"
        self.answer.head += f"HTTP/1.0 {status}\r\nConnection: close\r\n{length}\r\n".encode() + body
        self.answer.body_bytes = noise_bytes
        self.answer.is_final = True


def _build_page(path: str) -> bytes:
    return f"<html><title>{blake2b(path.encode(), digest_size=8).hexdigest()}</title>".encode().ljust(200, b".")


def _parse_whole_number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _parse_wait_s(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) and 0 <= value <= _MAX_WAIT_S else None
