"""The receiver on a socket: uvicorn, by connections whose number and patience have an end."""

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

CONNECTION_LIMITS = ConnectionLimits(drain_bytes=2 * limits.MAX_COMPRESSED_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenAddress:
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


def parse_listen_address(text: str, *, cert: Path | None, key: Path | None, behind_proxy: bool) -> ListenAddress:
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
    return ListenAddress(host=host, port=int(digits), cert=cert, key=key, behind_proxy=behind_proxy)


def bind_socket(listen: ListenAddress) -> socket.socket:
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


def build_server_config(
    receiver: BundleReceiver,
    listen: ListenAddress,
    bounds: ReceiverLimits,
    *,
    connections: ConnectionLimits = CONNECTION_LIMITS,
) -> uvicorn.Config:
    """Say how uvicorn shall serve.

    Behind a proxy all connections are the proxy's: it has no token of its own, and no address to be bounded by.

    Raises:
        UsageError: If certificate or key cannot be used.
    """
    connections = fit_to_file_limit(connections)
    if listen.behind_proxy:
        connections = replace(
            connections, reserved=0, per_address=connections.connections, idle_s=connections.owner_idle_s,
            stranger_s=float("inf"), stranger_requests=sys.maxsize,
        )  # fmt: skip
    # uvloop reads from a connection before a handshake of our own can begin, and the client's first bytes are lost.
    loop: Literal["asyncio", "auto"] = "asyncio" if listen.cert else "auto"
    options: dict[str, Any] = {}
    if listen.cert and listen.key:
        options = {"ssl_certfile": str(listen.cert), "ssl_keyfile": str(listen.key)}
    config = uvicorn.Config(
        receiver.app, http="h11", loop=loop, ws="none", lifespan="on", log_config=None, access_log=False,
        server_header=False, proxy_headers=listen.behind_proxy, h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=math.ceil(connections.owner_idle_s), timeout_graceful_shutdown=int(bounds.grace_s), **options,
    )  # fmt: skip
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a stranger's broken request is no news
    try:
        config.load()
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        raise UsageError(f"--cert {listen.cert} --key {listen.key}: {exc}; both must be readable PEM files") from exc
    install_protocol(config, ConnectionMonitor(connections))
    return config


def serve_receiver(
    receiver: BundleReceiver, listen: ListenAddress, bound: socket.socket, bounds: ReceiverLimits
) -> None:
    """Answer until SIGTERM or SIGINT; then finish what is in flight, for at most its grace.

    Raises:
        UsageError: If certificate or key cannot be used.
    """
    config = build_server_config(receiver, listen, bounds)
    # uvicorn raises the signal again when it has stopped; it has done its work by then.
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config).run(sockets=[bound])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
