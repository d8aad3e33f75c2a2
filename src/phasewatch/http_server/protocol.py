"""uvicorn's HTTP/1.1 with strict request heads and time limits; uvicorn itself limits only pauses between requests."""

from __future__ import annotations

import asyncio
import json
import resource
import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from phasewatch.http_server.connections import (
    ConnectionEntry,
    ConnectionLimits,
    ConnectionStage,
    ConnectionTable,
    attach_connection,
)
from phasewatch.http_server.heads import MAX_HEAD_BYTES, find_head_fault

__all__ = [
    "ConnectionMonitor",
    "fit_to_file_limit",
    "install_protocol",
]

_RESERVED_FILES = 64  # descriptors that a server needs beside its connections


class StrictConnection(h11.Connection):
    """h11's state machine, with the stricter `find_head_fault`."""

    fault = "this is not HTTP/1.1"

    def next_event(self) -> Any:
        """Return the next event of the client.

        Raises:
            h11.RemoteProtocolError: If the client's bytes are refused; `fault` names the reason.
        """
        if self.their_state is h11.IDLE:
            fault = find_head_fault(self.trailing_data[0])
            if fault is not None:
                self.fault = fault
                raise h11.RemoteProtocolError(fault)
        return super().next_event()


class ConnectionMonitor:
    """A table of connections with a clock; it disconnects those that exceed a time limit."""

    def __init__(self, limits: ConnectionLimits, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Start without connections."""
        self.table = ConnectionTable(limits)
        self.limits, self.clock_s = limits, clock_s
        self._timer: asyncio.TimerHandle | None = None

    def open(self, peer: Any, transport: asyncio.Transport, stage: ConnectionStage) -> ConnectionEntry | None:
        """Add a new connection, see `ConnectionTable.open`, and check it from now on."""
        name = transport.get_extra_info("peername")
        address = str(name[0]) if isinstance(name, tuple) else ""
        entry = self.table.open(peer, address, stage, now_s=self.clock_s())
        self._keep_sweeping(asyncio.get_running_loop())
        return entry

    def _keep_sweeping(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is None and len(self.table):
            self._timer = loop.call_later(self.limits.sweep_s, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        for entry in self.table.find_overdue(now_s=self.clock_s()):
            entry.peer.abort()
        self._keep_sweeping(loop)


class BoundedProtocol(H11Protocol):
    """One connection; it is disconnected when it exceeds a time limit."""

    def __init__(self, *args: Any, keeper: ConnectionMonitor, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = StrictConnection(h11.SERVER, MAX_HEAD_BYTES)
        self.entry: ConnectionEntry | None = None
        self._monitor = keeper
        self._is_draining = False  # the last response was sent; further bytes are discarded
        self._drained = 0
        self._early_data = bytearray()  # received with the end of a TLS handshake, before `connection_made`
        loaded = self.app

        async def app(scope: Any, receive: Any, send: Any) -> None:
            attach_connection(scope, self)
            await loaded(scope, receive, send)

        self.app = app

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Add the connection to the table, or close it."""
        super().connection_made(transport)
        if self.entry is None:
            self.entry = self._monitor.open(self, transport, ConnectionStage.HEAD)
        else:
            self.entry.peer = self  # its TLS handshake had the place until now
        if self.entry is None:
            self.abort()
        elif self._early_data:
            early, self._early_data = bytes(self._early_data), bytearray()
            self.data_received(early)

    def set_owner(self, owner: str) -> None:
        """Record the owner of the valid token that was shown."""
        if self.entry is not None:
            self._monitor.table.set_owner(self.entry, owner)

    def abort(self) -> None:
        """Close the connection at once; pending data is not sent."""
        self.transport.abort()

    def find_stage(self) -> ConnectionStage:
        """Return what the connection is busy with now."""
        if self.transport.is_closing():
            return ConnectionStage.CLOSING
        if self._is_draining:
            return ConnectionStage.DRAIN
        if self.cycle is not None and not self.cycle.response_complete:
            return ConnectionStage.ANSWER
        if self.conn.their_state is h11.SEND_BODY:
            return ConnectionStage.DRAIN
        return ConnectionStage.HEAD if self.cycle is None or self.conn.trailing_data[0] else ConnectionStage.IDLE

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, unless the last response was sent."""
        if self.transport is None:
            self._early_data += data
            return
        if self._is_draining or self.find_stage() is ConnectionStage.DRAIN:
            self._drained += len(data)
            if self._drained > self._monitor.limits.drain_bytes:
                self.abort()
                return
        if not self._is_draining:
            super().data_received(data)
        self._note_stage()

    def on_response_complete(self) -> None:
        """Continue with the next request, or close a connection that must not be used again."""
        if self.entry is not None:
            self.entry.requests += 1
            is_spent = self._monitor.table.is_exhausted(self.entry, now_s=self._monitor.clock_s())
            # HTTP servers disagree on where a chunked body ends, so nothing after one is read.
            if is_spent or any(name == b"transfer-encoding" for name, _ in self.headers):
                self._drain()
        self._drained = 0
        super().on_response_complete()
        self._note_stage()

    def handle_events(self) -> None:
        """Handle parsed events, unless the last response was sent."""
        if not self._is_draining:
            super().handle_events()

    def send_400_response(self, msg: str) -> None:
        """Refuse a malformed request and close the connection."""
        connection = cast(StrictConnection, self.conn)
        body = (json.dumps({"status": 400, "detail": connection.fault}) + "\n").encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/problem+json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        answer = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        try:
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # another response has begun
            self.abort()
            return
        self._drain()

    def _drain(self) -> None:
        """Close our side and let the client finish; an immediate close could lose the response."""
        self._is_draining = True
        self._drained = 0
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
            self.flow.resume_reading()
        else:
            self.transport.close()

    def eof_received(self) -> None:
        """Close the transport."""

    def pause_writing(self) -> None:
        """Record that the client does not read its response."""
        super().pause_writing()
        if self.entry is not None:
            self.entry.blocked_since_s = self._monitor.clock_s()

    def resume_writing(self) -> None:
        """Record that the client reads again."""
        super().resume_writing()
        if self.entry is not None:
            self.entry.blocked_since_s = None

    def shutdown(self) -> None:
        """Start an orderly shutdown."""
        if self._is_draining:
            self.transport.close()
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection from the table."""
        if self.entry is not None:
            self._monitor.table.close(self.entry)
        if self.transport is not None:  # otherwise its TLS handshake failed
            super().connection_lost(exc)

    def _note_stage(self) -> None:
        stage = self.find_stage()
        if self.entry is not None and stage is not self.entry.stage:
            self.entry.stage, self.entry.since_s = stage, self._monitor.clock_s()


class TlsHandshake(asyncio.Protocol):
    """A connection in its TLS handshake, with a place in the table; asyncio does not limit their number."""

    def __init__(self, make: Callable[[], BoundedProtocol], keeper: ConnectionMonitor, context: ssl.SSLContext) -> None:
        self._make_protocol, self._monitor, self._context = make, keeper, context
        self._transport: asyncio.Transport | None = None
        self._entry: ConnectionEntry | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Add the connection to the table, then start the handshake."""
        self._transport = cast(asyncio.Transport, transport)
        self._entry = self._monitor.open(self, self._transport, ConnectionStage.HANDSHAKE)
        if self._entry is None:
            self.abort()
            return
        self._task = asyncio.get_running_loop().create_task(self._handshake(self._transport, self._entry))

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection from the table."""
        if self._entry is not None:
            self._monitor.table.close(self._entry)

    def find_stage(self) -> ConnectionStage:
        """Return what the connection is busy with now."""
        return ConnectionStage.HANDSHAKE

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    async def _handshake(self, transport: asyncio.Transport, held: ConnectionEntry) -> None:
        inner = self._make_protocol()
        inner.entry = held
        limits = self._monitor.limits
        try:
            secured = await asyncio.get_running_loop().start_tls(
                transport,
                inner,
                self._context,
                server_side=True,
                ssl_handshake_timeout=limits.handshake_s,
                ssl_shutdown_timeout=limits.drain_s,
            )
        except OSError:  # no TLS, no supported version, too slow, or closed
            secured = None
        if secured is None:
            self._monitor.table.close(held)
            transport.abort()
            return
        inner.connection_made(secured)


def install_protocol(config: uvicorn.Config, keeper: ConnectionMonitor) -> None:
    """Set `BoundedProtocol` as the connection class of a loaded uvicorn configuration."""
    context, config.ssl = config.ssl, None  # the handshake is done by TlsHandshake

    def make(**options: Any) -> asyncio.Protocol:
        inner = partial(BoundedProtocol, keeper=keeper, **options)
        return TlsHandshake(inner, keeper, context) if context is not None else inner()

    config.http_protocol_class = cast(Any, make)


def fit_to_file_limit(limits: ConnectionLimits) -> ConnectionLimits:
    """Return the limits with at most as many connections as the process may open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft - _RESERVED_FILES >= limits.connections:
        return limits
    most = max(8, soft - _RESERVED_FILES)
    return replace(
        limits,
        connections=most,
        reserved=limits.reserved * most // limits.connections,
        per_address=max(1, limits.per_address * most // limits.connections),
    )
