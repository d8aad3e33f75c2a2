"""Post alarms to a URL, beside the watching: a receiver that is slow, down or wrong delays nothing and is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from phasewatch.errors import UsageError
from phasewatch.http_client import make_http_client
from phasewatch.live.envelope import Event, render_event

QUEUE = 64
TRIES = 4
TIMEOUT_S = 5.0
PAUSE_S = 0.2  # before the second try; four times as long before each next
LAST_WORD_S = 3.0  # that the watcher waits at its end for what is still to be posted


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
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(QUEUE)
        self._task: asyncio.Task[None] | None = None
        self.sent = self.lost = 0
        self._open = 0  # queued or on its way

    def post(self, event: Event) -> None:
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
            async with asyncio.timeout(LAST_WORD_S):
                await self._queue.join()
        self.lost, self._open = self.lost + self._open, 0
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        httpx = self._web
        try:
            client = make_http_client(timeout=TIMEOUT_S)
        except OSError as exc:  # certificates that cannot be read
            await self._refuse(exc.strerror or str(exc))
            return
        async with client:
            while True:
                body = await self._queue.get()
                why = ""
                for attempt in range(TRIES):
                    if attempt:
                        await asyncio.sleep(PAUSE_S * 4 ** (attempt - 1))
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

    async def _refuse(self, why: str) -> None:
        """Discard events, for a reason that is reported once."""
        self._say(f"webhook: no alarm can be delivered: {why}")
        while True:
            await self._queue.get()
            self.lost += 1
            self._open -= 1
            self._queue.task_done()
