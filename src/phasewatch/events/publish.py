"""Puts data into envelopes and hands them on: to a dashboard by HTTP, or as lines to a file or a pipe; and keeps time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import BinaryIO, Protocol

from phasewatch.errors import EventError, MachineError, UsageError
from phasewatch.events.from_replay import ReplayStep
from phasewatch.events.perf import ProcessMeter
from phasewatch.events.schema import EventData, EventEnvelope, render_event
from phasewatch.types import BIN_NS

POST_ATTEMPTS = 5
FIRST_RETRY_WAIT_S = 0.25
MAX_RETRY_WAIT_S = 60.0  # whatever a page asks for
LATE_AFTER_S = BIN_NS / 1e9
MAX_POST_BYTES = 900 * 1024  # below what a dashboard takes at once

EventCallback = Callable[[EventEnvelope], Awaitable[None]]


class EventNumberer:
    """Puts data into envelopes, numbered in order."""

    def __init__(self, producer: str, run: str, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._producer, self._run, self._now_ns = producer, run, now_ns
        self._number = 0

    def wrap(self, data: EventData) -> EventEnvelope:
        """Give the next event."""
        self._number += 1
        return EventEnvelope(id=f"{self._producer}-{self._number}", t_wall_ns=self._now_ns(), run=self._run, data=data)


class EventReceiver(Protocol):
    """Where a producer's events go."""

    async def send(self, events: list[EventEnvelope]) -> None:
        """Hand some events on, in order."""

    async def aclose(self) -> None:
        """Let go of what was opened."""


class EventFileWriter:
    """Writes events as lines."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    async def send(self, events: list[EventEnvelope]) -> None:
        """Write them, and let whoever reads along see them."""
        self._file.write(b"".join(render_event(event) + b"\n" for event in events))
        self._file.flush()

    async def aclose(self) -> None:
        """Leave the file to whoever opened it."""


class EventPoster:
    """Posts events to a dashboard; waits and tries again while that is away or says that it is too much.

    Args:
        url: The dashboard's address, with or without `/events`.
        token: Its token.

    Raises:
        UsageError: If the token would cross a network in the clear, or cannot stand in a request.
    """

    def __init__(self, url: str, token: str) -> None:
        from phasewatch.http_client import is_clear_text, make_http_client

        if is_clear_text(url):
            raise UsageError(
                f"{url}: the token would cross the network in the clear; use https://, or forward the dashboard's port "
                "(`ssh -L 8765:127.0.0.1:8765 HOST`) and name http://127.0.0.1:8765"
            )
        base = url.rstrip("/")
        self._url = base if base.endswith("/events") else base + "/events"
        self._client = make_http_client(token=token, timeout=10)

    async def aclose(self) -> None:
        """Let the connection go."""
        await self._client.aclose()

    async def send(self, events: list[EventEnvelope]) -> None:
        """Post them in as few requests as fit.

        Raises:
            MachineError: If nobody answers, or the dashboard does not let this producer in.
            EventError: If the dashboard calls them malformed.
        """
        body: list[bytes] = []
        for line in map(render_event, events):
            if body and sum(map(len, body)) + len(line) > MAX_POST_BYTES:
                await self._post(b"\n".join(body))
                body = []
            body.append(line)
        if body:
            await self._post(b"\n".join(body))

    async def _post(self, body: bytes) -> None:
        import httpx

        wait_s = FIRST_RETRY_WAIT_S
        words = ""
        for _ in range(POST_ATTEMPTS):
            try:
                answer = await self._client.post(self._url, content=body)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as exc:
                raise MachineError(f"{self._url}: {exc}; an address looks like http://127.0.0.1:8765") from exc
            except httpx.HTTPError as exc:
                words = str(exc) or type(exc).__name__
            else:
                if answer.status_code == 202:
                    return
                words = f"{answer.status_code} {answer.text[:300].strip()}"
                if answer.status_code in (400, 413):
                    raise EventError(f"{self._url}: {words}")
                if answer.status_code not in (408, 429, 503):
                    raise MachineError(f"{self._url}: {words}; is it a dashboard, and this its token?")
                after = answer.headers.get("Retry-After", "")  # it may be a date, too
                wait_s = max(wait_s, min(MAX_RETRY_WAIT_S, float(after)) if after.isdecimal() else 0.0)
            await asyncio.sleep(wait_s)
            wait_s = min(8.0, 2 * wait_s)
        raise MachineError(f"{self._url}: {words}; start one with `phasewatch dashboard RUN`")


async def send_on_schedule(
    steps: Iterable[ReplayStep],
    hand_on: Callable[[EventData], Awaitable[None]],
    *,
    speed: float,
    meter: ProcessMeter | None = None,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Hand each step on when it is due; what comes late is counted, never skipped.

    Args:
        steps: In time's order.
        hand_on: Takes their data.
        speed: Seconds of the recording that go by in one of ours; 0 waits for nothing.
        meter: Counts the steps that were handed on more than a bin late.
        monotonic, sleep: The clock.
    """
    start_s = monotonic()
    for step in steps:
        due_s = start_s + (step.at_s / speed if speed else 0.0)
        if speed and (ahead_s := due_s - monotonic()) > 0:
            await sleep(ahead_s)
        await hand_on(step.data)
        if meter is not None and speed and monotonic() - due_s > LATE_AFTER_S / speed:
            meter.add_late_ticks()
