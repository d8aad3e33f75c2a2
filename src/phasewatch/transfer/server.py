"""Serve the receiver with uvicorn, with limits on the number and the duration of connections."""

from __future__ import annotations

import logging
import math
import signal
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import uvicorn

from phasewatch.bundle import limits
from phasewatch.errors import MachineError, UsageError
from phasewatch.http_server.connections import ConnectionLimits
from phasewatch.http_server.heads import MAX_HEAD_BYTES
from phasewatch.http_server.protocol import ConnectionMonitor, fit_to_file_limit, install_protocol
from phasewatch.store.base import is_loopback
from phasewatch.store.quota import ReceiverLimits
from phasewatch.transfer.receiver import BundleReceiver

__all__ = [
    "CONNECTION_LIMITS",
    "ListenAddress",
    "bind_socket",
    "build_server_config",
    "parse_listen_address",
    "serve_receiver",
]

CONNECTION_LIMITS = ConnectionLimits(drain_bytes=2 * limits.MAX_COMPRESSED_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenAddress:
    """The address of the receiver.

    Attributes:
        cert, key: PEM files for TLS; both or neither.
        behind_proxy: A proxy on this machine terminates TLS and names the client.
    """

    host: str
    port: int
    cert: Path | None = None
    key: Path | None = None
    behind_proxy: bool = False

    @property
    def url(self) -> str:
        """The URL for shippers."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.cert else 'http'}://{host}:{self.port}"


def parse_listen_address(text: str, *, cert: Path | None, key: Path | None, behind_proxy: bool) -> ListenAddress:
    """Parse ``HOST:PORT``.

    Raises:
        UsageError: If it is malformed, or tokens would cross a network unencrypted.
    """
    host, _, digits = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not digits.isdecimal() or int(digits) > 65_535:
        raise UsageError(f"--listen {text}: HOST:PORT is needed, such as 127.0.0.1:8470 or [::1]:8470")
    if (cert is None) != (key is None):
        raise UsageError("--cert and --key need each other: pass both, or neither")
    if not (cert or behind_proxy or is_loopback(host)):
        raise UsageError(
            f"--listen {text}: tokens would cross the network unencrypted; pass --cert and --key, "
            "or --behind-proxy if a proxy terminates TLS, or listen on 127.0.0.1"
        )
    return ListenAddress(host=host, port=int(digits), cert=cert, key=key, behind_proxy=behind_proxy)


def bind_socket(listen: ListenAddress) -> socket.socket:
    """Bind the port and return the socket.

    Raises:
        MachineError: If the port is not available.
    """
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    try:
        return socket.create_server((listen.host, listen.port), family=family, backlog=128)
    except OSError as exc:
        raise MachineError(
            f"{listen.host}:{listen.port}: {exc.strerror}; choose another --listen, or stop what listens there"
        ) from exc


def build_server_config(
    receiver: BundleReceiver,
    listen: ListenAddress,
    bounds: ReceiverLimits,
    *,
    connections: ConnectionLimits = CONNECTION_LIMITS,
) -> uvicorn.Config:
    """Return the configuration of uvicorn.

    Behind a proxy, all connections are those of the proxy, so limits by address and token do not apply.

    Raises:
        UsageError: If certificate or key cannot be used.
    """
    connections = fit_to_file_limit(connections)
    if listen.behind_proxy:
        connections = replace(
            connections,
            reserved=0,
            per_address=connections.connections,
            idle_s=connections.owner_idle_s,
            stranger_s=float("inf"),
            stranger_requests=sys.maxsize,
        )
    # uvloop reads from a connection before our own TLS handshake begins, and loses the client's first bytes.
    loop: Literal["asyncio", "auto"] = "asyncio" if listen.cert else "auto"
    options: dict[str, Any] = {}
    if listen.cert and listen.key:
        options = {"ssl_certfile": str(listen.cert), "ssl_keyfile": str(listen.key)}
    config = uvicorn.Config(
        receiver.app,
        http="h11",
        loop=loop,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=listen.behind_proxy,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=math.ceil(connections.owner_idle_s),
        timeout_graceful_shutdown=int(bounds.grace_s),
        **options,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # malformed requests of strangers are not logged
    try:
        config.load()
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        raise UsageError(f"--cert {listen.cert} --key {listen.key}: {exc}; both must be readable PEM files") from exc
    install_protocol(config, ConnectionMonitor(connections))
    return config


def serve_receiver(
    receiver: BundleReceiver, listen: ListenAddress, bound: socket.socket, bounds: ReceiverLimits
) -> None:
    """Serve until SIGTERM or SIGINT; then finish the running uploads within their grace time.

    Raises:
        UsageError: If certificate or key cannot be used.
    """
    config = build_server_config(receiver, listen, bounds)
    # uvicorn raises the signal again after it has stopped.
    previous = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config).run(sockets=[bound])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
