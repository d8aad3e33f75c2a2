"""Post alarms to a URL, beside the watching: a receiver that is slow, down or wrong delays nothing and is counted."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from phasewatch.errors import UsageError
from phasewatch.events.schema import EventEnvelope, render_event
from phasewatch.http_client import make_http_client

WEBHOOK_QUEUE_SIZE = 64
WEBHOOK_ATTEMPTS = 4
WEBHOOK_TIMEOUT_S = 5.0
WEBHOOK_RETRY_S = 0.2  # before the second try; four times as long before each next
WEBHOOK_FLUSH_TIMEOUT_S = 3.0  # that the watcher waits at its end for what is still to be posted


class Webhook:
    """Posts events one after the other, each at most four times; when too many wait, the oldest is given up.

    Raises:
        UsageError: If the URL is not http or https, or names no host.
    """

    def __init__(self, url: str, say: Callable[[str], None]) -> None:
        import httpx  # now, not at the first alarm

        try:
            is_url = url.startswith(("http://", "https://")) and bool(httpx.URL(url).host)
        except (httpx.InvalidURL, UnicodeError):
            is_url = False
        if not is_url:
            raise UsageError(f"--webhook {url}: an http or https URL is needed")
        self._url, self._say, self._web = url, say, httpx
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(WEBHOOK_QUEUE_SIZE)
        self._task: asyncio.Task[None] | None = None
        self.sent = self.lost = 0
        self._open = 0  # queued or on its way

    def post(self, event: EventEnvelope) -> None:
        """Queue an event."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        if self._queue.full():
            self._queue.get_nowait()
            self._queue.task_done()
            self.lost += 1
            self._open -= 1
        self._queue.put_nowait(render_event(event))
        self._open += 1

    def backlog(self) -> int:
        """Give how many events wait."""
        return self._queue.qsize()

    async def close(self) -> None:
        """Wait a little for what is queued, then let go."""
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
        httpx = self._web
        try:
            client = make_http_client(timeout=WEBHOOK_TIMEOUT_S)
        except OSError as exc:  # certificates that cannot be read
            await self._discard_all(exc.strerror or str(exc))
            return
        async with client:
            while True:
                body = await self._queue.get()
                why = ""
                for attempt in range(WEBHOOK_ATTEMPTS):
                    if attempt:
                        await asyncio.sleep(WEBHOOK_RETRY_S * 4 ** (attempt - 1))
                    try:
                        answer = await client.post(
                            self._url, content=body, headers={"content-type": "application/json"}
                        )
                        why = "" if answer.is_success else f"it answered {answer.status_code}"
                    except (httpx.HTTPError, httpx.InvalidURL, OSError) as exc:
                        why = str(exc) or type(exc).__name__
                    if not why:
                        break
                self.sent += not why
                self.lost += bool(why)
                self._open -= 1
                if why:
                    self._say(f"webhook: an alarm was not delivered: {why}")
                self._queue.task_done()

    async def _discard_all(self, why: str) -> None:
        """Discard events, for a reason that is reported once."""
        self._say(f"webhook: no alarm can be delivered: {why}")
        while True:
            await self._queue.get()
            self.lost += 1
            self._open -= 1
            self._queue.task_done()


MAX_QUEUED_LINES = 2048  # lines: a quarter of an hour of events
LINES_FLUSH_TIMEOUT_S = 2.0  # that the end waits for what is still to be written
_READER_GONE_ERRNOS = frozenset({errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ENOTCONN})


class NonBlockingWriter:
    """Writes lines in a thread of its own; what cannot be written is given up and counted, and the next line tried.

    Args:
        stream: Has a descriptor, which is written to past the stream's own buffer.
    """

    def __init__(self, stream: TextIO) -> None:
        stream.flush()
        self._fd = stream.fileno()
        self._waiting: deque[bytes] = deque()
        self._news = threading.Condition()
        self._is_closed = self._is_gone = self._is_cut = False
        self._failure: OSError | None = None
        self._lost = 0
        # A daemon: where nobody reads it waits for ever, and must not hold the process.
        self._thread = threading.Thread(target=self._write, name="lines", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue a line; of too many that wait the oldest is given up."""
        with self._news:
            if self._is_gone or len(self._waiting) >= MAX_QUEUED_LINES:
                self._lost += 1
            if self._is_gone:
                return
            if len(self._waiting) >= MAX_QUEUED_LINES:
                self._waiting.popleft()
            self._waiting.append(line.encode("utf-8", "backslashreplace") + b"\n")
            self._news.notify()

    @property
    def failure(self) -> OSError | None:
        """What the first line met that could not be written, such as a full disk; None so far."""
        with self._news:
            return self._failure

    @property
    def is_gone(self) -> bool:
        """Whether the reader has left for good: nothing can be written any more."""
        with self._news:
            return self._is_gone

    def close(self) -> int:
        """Wait a little for what is queued, then let go; return how many lines were not written."""
        with self._news:
            self._is_closed = True
            self._news.notify()
        self._thread.join(LINES_FLUSH_TIMEOUT_S)
        with self._news:
            return self._lost + len(self._waiting) + self._thread.is_alive()

    def _write(self) -> None:
        while True:
            with self._news:
                while not self._waiting and not self._is_closed:
                    self._news.wait()
                if not self._waiting:
                    return
                data = self._waiting.popleft()
            if self._is_cut:
                data = b"\n" + data  # what was written of the line before stands alone
            whole = len(data)
            try:
                while data:
                    data = data[self._write_some(data) :]
                self._is_cut = False
            except OSError as exc:
                self._is_cut = self._is_cut or len(data) < whole
                with self._news:
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
        except BlockingIOError:  # a descriptor that another program set so
            select.select([], [self._fd], [])
            return 0
