"""Runs the application on this machine's own address: one socket, one loop, the producers beside it."""

from __future__ import annotations

import asyncio
import math
import secrets
import signal
import socket
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from phasewatch.dashboard.auth import AccessControl
from phasewatch.dashboard.hub import EventHub
from phasewatch.errors import EventError, MachineError, PhasewatchError
from phasewatch.events.schema import MAX_EVENT_BYTES, parse_event
from phasewatch.http_server.connections import ConnectionLimits
from phasewatch.http_server.heads import MAX_HEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence


DASHBOARD_ADDRESS = "127.0.0.1"
TCP_STALL_MS = 20_000  # a peer that acknowledges nothing for so long is gone

MAX_UNAUTHENTICATED = 64  # connections that may be open without cookie or token; all come from this machine
DASHBOARD_LIMITS = ConnectionLimits(owner_idle_s=20.0, stall_s=30.0, drain_bytes=2 << 20)

EventProducer = Callable[[EventHub], Awaitable[None]]


def bind_socket(port: int) -> socket.socket:
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
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_STALL_MS)
        sock.bind((DASHBOARD_ADDRESS, port))
        sock.listen(512)
    except OSError as exc:
        sock.close()
        raise MachineError(
            f"{DASHBOARD_ADDRESS}:{port}: {exc.strerror}; choose another port with --port, 0 takes a free one"
        ) from exc
    return sock


def _build_connection_limits(viewers: int) -> ConnectionLimits:
    """Return what a dashboard grants its connections: each viewer its stream, and room for what pages load beside it."""
    most = viewers + 2 * MAX_UNAUTHENTICATED
    return replace(
        DASHBOARD_LIMITS,
        connections=most,
        reserved=most - MAX_UNAUTHENTICATED,
        per_address=MAX_UNAUTHENTICATED,
        per_owner=most,
    )


def make_hub() -> EventHub:
    """Make a hub with this machine's clocks."""
    return EventHub(boot=secrets.token_hex(4), now_ns=time.time_ns, monotonic=time.monotonic)


def serve_dashboard(
    sock: socket.socket,
    hub: EventHub,
    gate: AccessControl,
    *,
    title: str,
    producers: Sequence[EventProducer] = (),
    tell: Callable[[str], None],
) -> None:
    """Serve until told to stop.

    Args:
        sock: From `bind_socket`.
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
    from phasewatch.http_server.protocol import ConnectionMonitor, fit_to_file_limit, install_protocol

    app = build_app(hub, gate, title=title)
    # No access log: the first address carries the token.
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", access_log=False, log_level="error",
        timeout_graceful_shutdown=3, server_header=False, h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=math.ceil(DASHBOARD_LIMITS.owner_idle_s),
    )  # fmt: skip
    config.load()
    install_protocol(config, ConnectionMonitor(fit_to_file_limit(_build_connection_limits(hub.limits.viewers))))

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
        tasks = [asyncio.create_task(_run_producer(producer, hub, tell)) for producer in producers]
        try:
            await server.serve(sockets=[sock])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return caught

    if signal.SIGINT in asyncio.run(run()):
        raise KeyboardInterrupt


async def _run_producer(producer: EventProducer, hub: EventHub, tell: Callable[[str], None]) -> None:
    try:
        await producer(hub)
    except PhasewatchError as exc:
        tell(str(exc))
    except Exception as exc:  # broken code: said at once, for the page goes on and would only stay empty
        traceback.print_exc()
        tell(f"a part of the page broke and sends no more: {type(exc).__name__}: {exc}")


WATCHER_EXIT_TIMEOUT_S = 5.0  # a watcher has so long to leave its machine as it was


async def relay_watcher(command: Sequence[str], hub: EventHub, name: str) -> None:
    """Start a watcher and publish what it says, until it ends or this is cancelled.

    Args:
        command: Prints one event a line.
        hub: Takes the events.
        name: What is watched, for messages.

    Raises:
        MachineError: If the watcher failed; has its last words.
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, limit=2 * MAX_EVENT_BYTES)
    if process.stdout is None or process.stderr is None:
        raise RuntimeError("a process without pipes")
    words = asyncio.create_task(_read_last_line(process.stderr))
    try:
        async for line in process.stdout:
            with suppress(EventError):  # its last line is its result, no event
                hub.publish(parse_event(line))
        code = await process.wait()
        said = await words
    finally:
        words.cancel()
        if process.returncode is None:
            process.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCHER_EXIT_TIMEOUT_S):
                    await process.wait()
    if code:
        raise MachineError(f"{name}: its watcher ended ({code}): {said.removeprefix('error: ')}")


async def _read_last_line(stream: asyncio.StreamReader) -> str:
    last = ""
    async for line in stream:
        last = line.decode("utf-8", "replace").strip()[:500] or last
    return last
