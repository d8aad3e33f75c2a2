"""Run the dashboard on the loopback address, with its event producers in the same event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from phasewatch.dashboard.auth import AccessControl
from phasewatch.dashboard.hub import EventHub
from phasewatch.dashboard.intake import AlarmKeeper, EventIntake, EventProducer
from phasewatch.errors import EventError, MachineError, PhasewatchError
from phasewatch.events.schema import MAX_EVENT_BYTES, parse_event
from phasewatch.http_server.connections import ConnectionLimits
from phasewatch.http_server.heads import MAX_HEAD_BYTES

__all__ = ["DASHBOARD_ADDRESS", "bind_socket", "make_intake", "relay_watcher", "serve_dashboard"]

logger = logging.getLogger(__name__)

DASHBOARD_ADDRESS = "127.0.0.1"
_TCP_STALL_MS = 20_000  # a peer that acknowledges nothing for this long is disconnected
_MAX_UNAUTHENTICATED = 64  # open connections without cookie or token
_WATCHER_EXIT_TIMEOUT_S = 5.0  # time for a watcher to restore the settings of its VM
_DASHBOARD_LIMITS = ConnectionLimits(owner_idle_s=20.0, stall_s=30.0, drain_bytes=2 << 20)


def bind_socket(port: int) -> socket.socket:
    """Bind a port of the loopback address; 0 chooses a free port.

    Raises:
        MachineError: If the port is in use or not permitted.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # inherited by every connection; disconnects stalled viewers
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _TCP_STALL_MS)
        sock.bind((DASHBOARD_ADDRESS, port))
        sock.listen(512)
    except OSError as exc:
        sock.close()
        raise MachineError(
            f"{DASHBOARD_ADDRESS}:{port}: {exc.strerror}; choose another port with --port; 0 chooses a free one"
        ) from exc
    return sock


def _build_connection_limits(viewers: int) -> ConnectionLimits:
    """Return the connection limits: one stream per viewer, and room for the other requests of the pages."""
    most = viewers + 2 * _MAX_UNAUTHENTICATED
    return replace(
        _DASHBOARD_LIMITS,
        connections=most,
        reserved=most - _MAX_UNAUTHENTICATED,
        per_address=_MAX_UNAUTHENTICATED,
        per_owner=most,
    )


def make_intake(keeper: AlarmKeeper | None = None) -> EventIntake:
    """Create the intake and its hub, with the clocks of this machine and the alarm history of a state folder."""
    hub = EventHub(boot=secrets.token_hex(4), now_ns=time.time_ns, monotonic=time.monotonic)
    return EventIntake(hub, now_ns=time.time_ns, keeper=keeper)


def serve_dashboard(
    sock: socket.socket,
    intake: EventIntake,
    access: AccessControl,
    *,
    title: str,
    producers: Sequence[EventProducer] = (),
) -> None:
    """Serve the dashboard until SIGINT or SIGTERM.

    Args:
        sock: Socket of `bind_socket`.
        intake: Receives the events, and distributes them by its hub.
        access: Access rules.
        title: Title of the page.
        producers: Run beside the server; a producer that fails is logged and does not stop the page or the others.

    Raises:
        KeyboardInterrupt: After the shutdown, if SIGINT ended it.
    """
    import uvicorn

    from phasewatch.dashboard.app import build_app
    from phasewatch.http_server.protocol import ConnectionMonitor, fit_to_file_limit, install_protocol

    hub = intake.hub
    app = build_app(intake, access, title=title)
    # No access log, because the start address contains the token.
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="error",
        timeout_graceful_shutdown=3,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=math.ceil(_DASHBOARD_LIMITS.owner_idle_s),
    )
    config.load()
    install_protocol(config, ConnectionMonitor(fit_to_file_limit(_build_connection_limits(hub.limits.viewers))))

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # uvicorn's own version raises the signal again before the watchers are stopped

    async def run() -> list[int]:
        caught: list[int] = []
        server = Server(config)

        def end(sig: int) -> None:
            server.force_exit = bool(caught)  # a second signal exits at once
            caught.append(sig)
            hub.close()  # ends the streams, so that the shutdown does not cut them
            server.should_exit = True

        for sig in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(sig, end, sig)
        tasks = [asyncio.create_task(_run_producer(producer, intake)) for producer in producers]
        try:
            await server.serve(sockets=[sock])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return caught

    if signal.SIGINT in asyncio.run(run()):
        raise KeyboardInterrupt


async def _run_producer(producer: EventProducer, intake: EventIntake) -> None:
    try:
        await producer(intake)
    except PhasewatchError as exc:
        logger.error("%s", exc)
    except Exception as exc:  # the page keeps running without this producer, so its failure must be visible
        logger.exception("a producer of events failed and sends no more: %s: %s", type(exc).__name__, exc)


async def relay_watcher(command: Sequence[str], intake: EventIntake, name: str) -> None:
    """Start a watcher process and publish its events, until it ends or this task is cancelled.

    Args:
        command: Command line of a process that prints one event per line.
        intake: Receives the events.
        name: Name of the watched machine, for messages.

    Raises:
        MachineError: If the watcher failed; the message has the last line of its stderr.
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, limit=2 * MAX_EVENT_BYTES)
    if process.stdout is None or process.stderr is None:
        raise RuntimeError("the watcher process has no pipes")
    last_line = asyncio.create_task(_read_last_line(process.stderr))
    try:
        async for line in process.stdout:
            with suppress(EventError):  # the last line is the result of the command, not an event
                intake.publish(parse_event(line))
        code = await process.wait()
        message = await last_line
    finally:
        last_line.cancel()
        if process.returncode is None:
            process.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(_WATCHER_EXIT_TIMEOUT_S):
                    await process.wait()
    if code:
        raise MachineError(f"{name}: the watcher failed with exit code {code}: {message.removeprefix('error: ')}")


async def _read_last_line(stream: asyncio.StreamReader) -> str:
    last = ""
    async for line in stream:
        last = line.decode("utf-8", "replace").strip()[:500] or last
    return last
