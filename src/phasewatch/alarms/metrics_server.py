"""Serve the figures of a watch for Prometheus on the loopback address."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

from phasewatch.alarms.metrics import CONTENT_TYPES, MetricsFormat, MetricsSnapshot, render_metrics
from phasewatch.errors import MachineError
from phasewatch.http_server.connections import ConnectionLimits
from phasewatch.http_server.heads import MAX_HEAD_BYTES

__all__ = ["METRICS_ADDRESS", "MetricsServer"]

METRICS_ADDRESS = "127.0.0.1"
_PATH = "/metrics"
_STOP_TIMEOUT_S = 2.0
# Any port is accepted: a tunnel or a proxy changes it, and the page of another site cannot change the host.
_LOCAL_HOST_PATTERN = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
_LIMITS = ConnectionLimits(
    connections=32, reserved=0, per_address=32, idle_s=90.0, stranger_s=86_400.0, stranger_requests=1_000_000
)
_Message = MutableMapping[str, Any]


class MetricsServer:
    """Answers ``GET /metrics``; the port is bound at once, so that a port in use is an error at the start.

    Args:
        port: Port of 127.0.0.1; 0 chooses a free one.
        take_snapshot: Returns the figures of now.

    Attributes:
        port: The port.

    Raises:
        MachineError: If the port is in use or not permitted.
        ModuleNotFoundError: If the extra ``serve`` is not installed.
    """

    def __init__(self, port: int, take_snapshot: Callable[[], MetricsSnapshot]) -> None:
        import uvicorn  # now: an extra that is missing must be an error at the start

        self._uvicorn, self._take_snapshot = uvicorn, take_snapshot
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._sock.bind((METRICS_ADDRESS, port))
            self._sock.listen(16)
        except OSError as exc:
            self._sock.close()
            raise MachineError(
                f"{METRICS_ADDRESS}:{port}: {exc.strerror}; choose another port for the metrics, or stop what listens"
            ) from exc
        self.port: int = self._sock.getsockname()[1]
        self._server: Any = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to answer, in the running event loop."""
        from phasewatch.http_server.protocol import ConnectionMonitor, fit_to_file_limit, install_protocol

        config = self._uvicorn.Config(
            self._answer,
            interface="asgi3",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            log_level="critical",
            server_header=False,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=90,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        config.load()
        install_protocol(config, ConnectionMonitor(fit_to_file_limit(_LIMITS)))

        class QuietServer(self._uvicorn.Server):  # type: ignore[misc,name-defined]
            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # signals belong to the watch

        self._server = QuietServer(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._sock]))

    async def close(self) -> None:
        """Stop answering and release the port."""
        if self._task is not None:
            self._server.should_exit = True
            with suppress(TimeoutError):
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await asyncio.wait([self._task])
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._sock.close()

    async def _answer(
        self, scope: _Message, receive: Callable[[], Awaitable[_Message]], send: Callable[[_Message], Awaitable[None]]
    ) -> None:
        """Answer one request; an ASGI application."""
        if scope["type"] != "http":
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        status, kind, body = 200, "text/plain; charset=utf-8", b""
        if not _LOCAL_HOST_PATTERN.fullmatch(
            headers.get(b"host", "")
        ):  # a page of another site reached us by a changed name
            status, body = 421, b"this address serves 127.0.0.1 and localhost only\n"
        elif scope["path"] != _PATH:
            status, body = 404, b"the metrics are at /metrics\n"
        elif scope["method"] not in ("GET", "HEAD"):
            status, body = 405, b"only GET is answered\n"
        else:
            accept = headers.get(b"accept", "")
            is_open = "application/openmetrics-text" in accept
            form = MetricsFormat.OPENMETRICS if is_open else MetricsFormat.PROMETHEUS
            kind, body = CONTENT_TYPES[form], render_metrics(self._take_snapshot(), form=form)
        length = (b"content-length", str(len(body)).encode())
        fields = [(b"content-type", kind.encode()), (b"cache-control", b"no-store"), length]
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
