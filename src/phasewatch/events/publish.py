"""Send events to a dashboard by HTTP, or as lines to a file or a pipe, on the schedule of a replay."""

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

__all__ = [
    "FIRST_RETRY_WAIT_S",
    "MAX_POST_BYTES",
    "EventFileWriter",
    "EventNumberer",
    "EventPoster",
    "EventReceiver",
    "send_on_schedule",
]

_POST_ATTEMPTS = 5
FIRST_RETRY_WAIT_S = 0.25
_MAX_RETRY_WAIT_S = 60.0  # even if the dashboard asks for more
_LATE_AFTER_S = BIN_NS / 1e9
MAX_POST_BYTES = 900 * 1024  # less than the maximum that a dashboard accepts


class EventNumberer:
    """Wrap event data in envelopes with consecutive numbers."""

    def __init__(self, producer: str, run: str, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._producer, self._run, self._now_ns = producer, run, now_ns
        self._number = 0

    def wrap(self, data: EventData) -> EventEnvelope:
        """Return the data in an envelope with the next number."""
        self._number += 1
        return EventEnvelope(id=f"{self._producer}-{self._number}", t_wall_ns=self._now_ns(), run=self._run, data=data)


class EventReceiver(Protocol):
    """Destination of the events of a producer."""

    async def send(self, events: list[EventEnvelope]) -> None:
        """Send events in order."""

    async def aclose(self) -> None:
        """Release the resources."""


class EventFileWriter:
    """Write events as lines of JSON."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    async def send(self, events: list[EventEnvelope]) -> None:
        """Write events and flush the file."""
        self._file.write(b"".join(render_event(event) + b"\n" for event in events))
        self._file.flush()

    async def aclose(self) -> None:
        """Do nothing; the caller closes the file."""


class EventPoster:
    """Post events to a dashboard, with retries while it is unavailable or limits the rate.

    Args:
        url: Address of the dashboard, with or without `/events`.
        token: Token of the dashboard.

    Raises:
        UsageError: If the token would be sent unencrypted over a network, or is not valid in a request.
    """

    def __init__(self, url: str, token: str) -> None:
        from phasewatch.http_client import is_clear_text, make_http_client

        if is_clear_text(url):
            raise UsageError(
                f"{url}: the token would be sent in the clear; use https://, or forward the port of the dashboard "
                "(`ssh -L 8765:127.0.0.1:8765 HOST`) and use http://127.0.0.1:8765"
            )
        base = url.rstrip("/")
        self._url = base if base.endswith("/events") else base + "/events"
        self._client = make_http_client(token=token, timeout=10)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._client.aclose()

    async def send(self, events: list[EventEnvelope]) -> None:
        """Post events in as few requests as the size limit allows.

        Raises:
            MachineError: If the dashboard does not answer or refuses access.
            EventError: If the dashboard rejects the events as malformed.
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
        problem = ""
        for _ in range(_POST_ATTEMPTS):
            try:
                answer = await self._client.post(self._url, content=body)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as exc:
                raise MachineError(f"{self._url}: {exc}; an address looks like http://127.0.0.1:8765") from exc
            except httpx.HTTPError as exc:
                problem = str(exc) or type(exc).__name__
            else:
                if answer.status_code == 202:
                    return
                problem = f"{answer.status_code} {answer.text[:300].strip()}"
                if answer.status_code in (400, 413):
                    raise EventError(f"{self._url}: {problem}")
                if answer.status_code not in (408, 429, 503):
                    raise MachineError(f"{self._url}: {problem}; is this a dashboard, and is the token correct?")
                after = answer.headers.get("Retry-After", "")  # may be a date too
                wait_s = max(wait_s, min(_MAX_RETRY_WAIT_S, float(after)) if after.isdecimal() else 0.0)
            await asyncio.sleep(wait_s)
            wait_s = min(8.0, 2 * wait_s)
        raise MachineError(f"{self._url}: {problem}; start a dashboard with `phasewatch dashboard RUN`")


async def send_on_schedule(
    steps: Iterable[ReplayStep],
    send: Callable[[EventData], Awaitable[None]],
    *,
    speed: float,
    meter: ProcessMeter | None = None,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Send each event of a replay when it is due; late events are counted and sent, never skipped.

    Args:
        steps: Events in order of time.
        send: Receives the data of the events.
        speed: Playback speed (1 = real time); 0 sends without waiting.
        meter: Counts the events sent more than a bin late.
        monotonic, sleep: Clock, in seconds.
    """
    start_s = monotonic()
    for step in steps:
        due_s = start_s + (step.at_s / speed if speed else 0.0)
        if speed and (ahead_s := due_s - monotonic()) > 0:
            await sleep(ahead_s)
        await send(step.data)
        if meter is not None and speed and monotonic() - due_s > _LATE_AFTER_S / speed:
            meter.add_late_ticks()
