"""Deliver a watch's outputs without blocking it: alarms to a webhook, lines to a stream."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from phasewatch.errors import UsageError
from phasewatch.events.schema import EventEnvelope, render_event
from phasewatch.http_client import make_http_client

if TYPE_CHECKING:
    import httpx

__all__ = ["NonBlockingWriter", "Webhook"]

logger = logging.getLogger(__name__)

WEBHOOK_QUEUE_SIZE = 64
WEBHOOK_RETRY_S = 0.2  # before the second attempt; four times as long before each further one
WEBHOOK_FLUSH_TIMEOUT_S = 3.0  # how long the end of a watch waits for queued events
MAX_QUEUED_LINES = 2048  # over ten minutes of events
LINES_FLUSH_TIMEOUT_S = 2.0  # how long the end of a watch waits for queued lines
_WEBHOOK_ATTEMPTS = 4
_WEBHOOK_TIMEOUT_S = 5.0
_READER_GONE_ERRNOS = frozenset({errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ENOTCONN})


class Webhook:
    """Posts events to a URL one after the other, with at most four attempts each.

    A slow, unreachable or refusing server delays nothing: events wait in a bounded queue, and if it is full the oldest
    event is dropped and counted.

    Attributes:
        sent, lost: Events that were delivered, and that were not.

    Raises:
        UsageError: If the URL is not http or https, or names no host.
    """

    def __init__(self, url: str) -> None:
        import httpx  # now, not at the first alarm: the import takes long

        try:
            is_url = url.startswith(("http://", "https://")) and bool(httpx.URL(url).host)
        except (httpx.InvalidURL, UnicodeError):
            is_url = False
        if not is_url:
            raise UsageError(f"--webhook {url}: an http or https URL is needed")
        self._url, self._httpx = url, httpx
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(WEBHOOK_QUEUE_SIZE)
        self._task: asyncio.Task[None] | None = None
        self.sent = self.lost = 0
        self._open = 0  # queued or being posted

    def post(self, event: EventEnvelope) -> None:
        """Queue an event; drop the oldest one if the queue is full."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        if self._queue.full():
            self._queue.get_nowait()
            self._queue.task_done()
            self.lost += 1
            self._open -= 1
        self._queue.put_nowait(render_event(event))
        self._open += 1

    def count_backlog(self) -> int:
        """Return the number of queued events."""
        return self._queue.qsize()

    async def close(self) -> None:
        """Wait up to `WEBHOOK_FLUSH_TIMEOUT_S` for queued events, then stop and count the rest as lost."""
        if self._task is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(WEBHOOK_FLUSH_TIMEOUT_S):
                await self._queue.join()
        self.lost, self._open = self.lost + self._open, 0
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        try:
            client = make_http_client(timeout=_WEBHOOK_TIMEOUT_S)
        except OSError as exc:  # certificates that cannot be read
            await self._discard_all(exc.strerror or str(exc))
            return
        async with client:
            while True:
                body = await self._queue.get()
                failure: str | None = None
                for attempt in range(_WEBHOOK_ATTEMPTS):
                    if attempt:
                        await asyncio.sleep(WEBHOOK_RETRY_S * 4 ** (attempt - 1))
                    failure = await self._try_post(client, body)
                    if failure is None:
                        break
                self.sent += failure is None
                self.lost += failure is not None
                self._open -= 1
                if failure is not None:
                    logger.warning("webhook: an alarm was not delivered: %s", failure)
                self._queue.task_done()

    async def _try_post(self, client: httpx.AsyncClient, body: bytes) -> str | None:
        """Post one event; return the failure for a log message, or None."""
        errors = (self._httpx.HTTPError, self._httpx.InvalidURL, OSError)
        try:
            response = await client.post(self._url, content=body, headers={"content-type": "application/json"})
        except errors as exc:
            return str(exc) or type(exc).__name__
        return None if response.is_success else f"it answered {response.status_code}"

    async def _discard_all(self, reason: str) -> None:
        """Discard all events from now on; log the reason once."""
        logger.warning("webhook: no alarm can be delivered: %s", reason)
        while True:
            await self._queue.get()
            self.lost += 1
            self._open -= 1
            self._queue.task_done()


class NonBlockingWriter:
    """Writes lines to a stream in a thread of its own, so that a slow reader delays nobody.

    A line that cannot be written is dropped and counted, and the next one is tried.

    Args:
        stream: A stream with a file descriptor; lines go to the descriptor, past the stream's own buffer.
    """

    def __init__(self, stream: TextIO) -> None:
        stream.flush()
        self._fd = stream.fileno()
        self._waiting: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._is_closed = self._is_gone = self._is_cut = False
        self._failure: OSError | None = None
        self._lost = 0
        # A daemon thread: it may wait for ever for a reader, and must not keep the process alive.
        self._thread = threading.Thread(target=self._write, name="lines", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue a line; drop the oldest one if too many wait."""
        with self._changed:
            if self._is_gone or len(self._waiting) >= MAX_QUEUED_LINES:
                self._lost += 1
            if self._is_gone:
                return
            if len(self._waiting) >= MAX_QUEUED_LINES:
                self._waiting.popleft()
            self._waiting.append(line.encode("utf-8", "backslashreplace") + b"\n")
            self._changed.notify()

    @property
    def failure(self) -> OSError | None:
        """The first write error, such as a full disk; None if there was none."""
        with self._changed:
            return self._failure

    @property
    def is_gone(self) -> bool:
        """Whether the reader has closed its end, so that nothing can be written any more."""
        with self._changed:
            return self._is_gone

    def close(self) -> int:
        """Wait up to `LINES_FLUSH_TIMEOUT_S` for queued lines; return how many lines were not written."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(LINES_FLUSH_TIMEOUT_S)
        with self._changed:
            return self._lost + len(self._waiting) + self._thread.is_alive()

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                data = self._waiting.popleft()
            if self._is_cut:
                data = b"\n" + data  # end the line before, of which only a part was written
            n_bytes = len(data)
            try:
                while data:
                    data = data[self._write_some(data) :]
                self._is_cut = False
            except OSError as exc:
                self._is_cut = self._is_cut or len(data) < n_bytes
                with self._changed:
                    self._failure = self._failure or exc
                    self._is_gone = exc.errno in _READER_GONE_ERRNOS
                    self._lost += 1
                    if self._is_gone:
                        self._lost += len(self._waiting)
                        self._waiting.clear()
                        return

    def _write_some(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:  # another program made the descriptor non-blocking
            select.select([], [self._fd], [])
            return 0
