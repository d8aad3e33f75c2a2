"""The receiver on a socket: uvicorn, with an end to connections that send a head or a refused body too slowly."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from phasewatch.episode import limits
from phasewatch.errors import MachineError, UsageError
from phasewatch.store.base import is_loopback
from phasewatch.store.receiver import Receiver
from phasewatch.store.room import Bounds

HEAD_BYTES = 16 << 10
HEAD_S = 10.0  # from a connection's, or a later request's, first byte to the end of its head
DRAIN_S = (
    5.0  # for the rest of a body that was refused: a client that hears nothing before its end still gets the answer
)
IDLE_S = 60
CONNECTIONS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """Where to listen, and how.

    Attributes:
        cert, key: PEM files of TLS; both or neither.
        behind_proxy: A proxy on this machine ends TLS and says who the client is.
    """

    host: str
    port: int
    cert: Path | None = None
    key: Path | None = None
    behind_proxy: bool = False

    @property
    def url(self) -> str:
        """What a shipper is told."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.cert else 'http'}://{host}:{self.port}"


def parse_listen(text: str, *, cert: Path | None, key: Path | None, behind_proxy: bool) -> Listen:
    """Parse ``HOST:PORT``.

    Raises:
        UsageError: If it is no such thing, or tokens would cross a network in the clear.
    """
    host, _, digits = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not digits.isdecimal() or int(digits) > 65_535:
        raise UsageError(f"--listen {text}: HOST:PORT is needed, such as 127.0.0.1:8470 or [::1]:8470")
    if (cert is None) != (key is None):
        raise UsageError("--cert and --key belong together: give both, or neither")
    if not (cert or behind_proxy or is_loopback(host)):
        raise UsageError(
            f"--listen {text}: tokens would cross the network in the clear; give --cert and --key, "
            "or --behind-proxy where a proxy ends TLS, or listen on 127.0.0.1"
        )
    return Listen(host=host, port=int(digits), cert=cert, key=key, behind_proxy=behind_proxy)


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, whose patience has an end; uvicorn itself bounds only the pause between two requests."""

    head_s = HEAD_S
    drain_s = DRAIN_S
    most = CONNECTIONS
    _head_timer: asyncio.TimerHandle | None = None
    _drain_timer: asyncio.TimerHandle | None = None
    _drained = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._head_timer = self.loop.call_later(self.head_s, self._give_up)

    def data_received(self, data: bytes) -> None:
        """Take bytes, and see whether they brought what is waited for."""
        super().data_received(data)
        self._drained += len(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Answered; what is still coming of the request is heard out for a while."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._drained = 0
            self._drain_timer = self.loop.call_later(self.drain_s, self._give_up)
        self._watch()

    def _watch(self) -> None:
        """Start and stop the timers, by what the connection waits for now."""
        if self.transport.is_closing():
            return
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer("_head_timer")
        elif self._head_timer is None and self.conn.trailing_data[0]:
            self._head_timer = self.loop.call_later(self.head_s, self._give_up)
        if self._drain_timer is None:
            return
        if self.conn.their_state is not h11.SEND_BODY:
            self._stop_timer("_drain_timer")
        elif self._drained > 2 * limits.COMPRESSED_BYTES:
            self._give_up()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._stop_timer("_head_timer")
        self._stop_timer("_drain_timer")
        super().connection_lost(exc)

    def _give_up(self) -> None:
        self.transport.abort()

    def _stop_timer(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)


def bind(listen: Listen) -> socket.socket:
    """Take the port, before anything is promised.

    Raises:
        MachineError: If it cannot be had.
    """
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    try:
        return socket.create_server((listen.host, listen.port), family=family, backlog=128)
    except OSError as exc:
        raise MachineError(
            f"{listen.host}:{listen.port}: {exc.strerror}; choose another --listen, or end what listens there"
        ) from exc


def configure(
    receiver: Receiver, listen: Listen, bounds: Bounds, *, protocol: type[H11Protocol] = PatientProtocol
) -> uvicorn.Config:
    """Say how uvicorn shall serve.

    Raises:
        UsageError: If certificate or key cannot be used.
    """
    options: dict[str, Any] = {}
    if listen.cert and listen.key:
        options = {"ssl_certfile": str(listen.cert), "ssl_keyfile": str(listen.key)}
    config = uvicorn.Config(
        receiver.app, http=protocol, ws="none", lifespan="on", log_config=None, access_log=False,
        server_header=False, proxy_headers=listen.behind_proxy, h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_keep_alive=IDLE_S, timeout_graceful_shutdown=int(bounds.grace_s), **options,
    )  # fmt: skip
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a stranger's broken request is no news
    try:
        config.load()
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        raise UsageError(f"--cert {listen.cert} --key {listen.key}: {exc}; both must be readable PEM files") from exc
    return config


def serve(receiver: Receiver, listen: Listen, bound: socket.socket, bounds: Bounds) -> None:
    """Answer until SIGTERM or SIGINT; then finish what is in flight, for at most its grace.

    Raises:
        UsageError: If certificate or key cannot be used.
    """
    config = configure(receiver, listen, bounds)
    # uvicorn raises the signal again when it has stopped; it has done its work by then.
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config).run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
