"""Runs the application on this machine's own address: one socket, one loop, the producers beside it."""

from __future__ import annotations

import asyncio
import math
import secrets
import signal
import socket
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from phasewatch.dashboard.gate import Gate
from phasewatch.dashboard.hub import Hub
from phasewatch.errors import MachineError, PhasewatchError
from phasewatch.http_server.connections import ConnectionLimits
from phasewatch.http_server.heads import HEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

ADDRESS = "127.0.0.1"
STALL_MS = 20_000  # a peer that acknowledges nothing for so long is gone

STRANGERS = 64  # connections that may be open without cookie or token; all come from this machine
LIMITS = ConnectionLimits(owner_idle_s=20.0, stall_s=30.0, drain_bytes=2 << 20)

Producer = Callable[[Hub], Awaitable[None]]


def bind(port: int) -> socket.socket:
    """Take a port of this machine's own address; 0 takes any free one.

    Raises:
        MachineError: If another program has it, or it may not be taken.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(
            socket, "TCP_USER_TIMEOUT"
        ):  # inherited by every connection: a stalled viewer does not stay for ever
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_MS)
        sock.bind((ADDRESS, port))
        sock.listen(512)
    except OSError as exc:
        sock.close()
        raise MachineError(
            f"{ADDRESS}:{port}: {exc.strerror}; choose another port with --port, 0 takes a free one"
        ) from exc
    return sock


def limits_for(viewers: int) -> ConnectionLimits:
    """Return what a dashboard grants its connections: each viewer its stream, and room for what pages load beside it."""
    most = viewers + 2 * STRANGERS
    return replace(LIMITS, connections=most, reserved=most - STRANGERS, per_address=STRANGERS, per_owner=most)


def make_hub() -> Hub:
    """Make a hub with this machine's clocks."""
    return Hub(boot=secrets.token_hex(4), now_ns=time.time_ns, monotonic=time.monotonic)


def serve(
    sock: socket.socket,
    hub: Hub,
    gate: Gate,
    *,
    title: str,
    producers: Sequence[Producer] = (),
    tell: Callable[[str], None],
) -> None:
    """Serve until told to stop.

    Args:
        sock: From `bind`.
        hub: Where events go through.
        gate: Who may come in.
        title: What the page calls what it shows.
        producers: Run beside the server; one that fails is told of, and leaves the page and the others alone.
        tell: Takes one line for people.

    Raises:
        KeyboardInterrupt: If Ctrl-C ended it, when all is put away.
    """
    import uvicorn

    from phasewatch.dashboard.app import build_app
    from phasewatch.http_server.protocol import ConnectionKeeper, fit_to_process, install

    app = build_app(hub, gate, title=title)
    # No access log: the first address carries the token.
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", access_log=False, log_level="error",
        timeout_graceful_shutdown=3, server_header=False, h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_keep_alive=math.ceil(LIMITS.owner_idle_s),
    )  # fmt: skip
    config.load()
    install(config, ConnectionKeeper(fit_to_process(limits_for(hub.limits.viewers))))

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # ours: uvicorn's raises the signal again before watchers could be ended

    async def run() -> list[int]:
        caught: list[int] = []
        server = Server(config)

        def end(sig: int) -> None:
            server.force_exit = bool(caught)  # a second one waits for nobody
            caught.append(sig)
            hub.close()  # streams end by themselves, and nothing is cut
            server.should_exit = True

        for sig in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(sig, end, sig)
        tasks = [asyncio.create_task(_produce(producer, hub, tell)) for producer in producers]
        try:
            await server.serve(sockets=[sock])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return caught

    if signal.SIGINT in asyncio.run(run()):
        raise KeyboardInterrupt


async def _produce(producer: Producer, hub: Hub, tell: Callable[[str], None]) -> None:
    try:
        await producer(hub)
    except PhasewatchError as exc:
        tell(str(exc))
    except Exception as exc:  # broken code: said at once, for the page goes on and would only stay empty
        traceback.print_exc()
        tell(f"a part of the page broke and sends no more: {type(exc).__name__}: {exc}")
