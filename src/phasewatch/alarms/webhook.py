"""Post alarms to a webhook as JSON events."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

from phasewatch.alarms.config import is_http_url
from phasewatch.alarms.delivery import DEFAULT_RETRY_POLICY, DeliveryFailure, DeliveryQueue, OutputCounters, RetryPolicy
from phasewatch.errors import UsageError
from phasewatch.events.schema import EventEnvelope, render_event
from phasewatch.http_client import make_http_client

if TYPE_CHECKING:
    import httpx

__all__ = ["HttpPoster", "Webhook", "build_tls_context"]

_TIMEOUT_S = 5.0  # of one step
_TOTAL_TIMEOUT_S = 15.0  # of one attempt: a server may answer byte by byte
_MAX_ANSWER_BYTES = 4096
_TEMPORARY_CODES = frozenset({408, 425, 429})  # beside 5xx


class HttpPoster:
    """Posts JSON to one server over a kept connection.

    Args:
        token: Bearer token; None for none.
        ca_file: PEM file that the server's certificate is checked against; empty for the system's.

    Raises:
        UsageError: If the file holds no certificates.
    """

    def __init__(self, *, token: str | None = None, ca_file: str = "") -> None:
        import httpx  # now, not at the first alarm: the import takes long

        self._httpx, self._token = httpx, token
        self._client: httpx.AsyncClient | None = None
        self._verify: ssl.SSLContext | bool = build_tls_context(ca_file) if ca_file else True

    async def post(self, url: str, body: bytes) -> None:
        """Post a body.

        Raises:
            DeliveryFailure: If the server cannot be reached or does not accept it.
        """
        try:
            if self._client is None:
                self._client = make_http_client(token=self._token, timeout=_TIMEOUT_S, verify=self._verify)
            async with asyncio.timeout(_TOTAL_TIMEOUT_S):
                code = await self._post(self._client, url, body)
        except (self._httpx.HTTPError, self._httpx.InvalidURL, OSError) as exc:  # TimeoutError is an OSError
            raise DeliveryFailure(str(exc) or type(exc).__name__) from exc
        if not 200 <= code < 300:
            raise DeliveryFailure(f"it answered {code}", is_final=code < 500 and code not in _TEMPORARY_CODES)

    async def _post(self, client: httpx.AsyncClient, url: str, body: bytes) -> int:
        headers = {"content-type": "application/json"}
        async with client.stream("POST", url, content=body, headers=headers) as response:
            size = 0
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size > _MAX_ANSWER_BYTES:
                    break
            return response.status_code

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None


def build_tls_context(ca_file: str) -> ssl.SSLContext:
    """Return how a server's certificate is checked.

    Args:
        ca_file: PEM file; empty for the certificates of the system.

    Raises:
        UsageError: If the file holds no certificates.
    """
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as exc:
        raise UsageError(f"{ca_file}: {exc.strerror or exc}; PEM certificates are needed") from exc


class Webhook:
    """Posts events to a URL one after the other; see `DeliveryQueue` for what happens while it is down.

    Args:
        url: http or https address.
        token: Bearer token; None for none.
        ca_file: PEM file that the server's certificate is checked against; empty for the system's.
        policy: Bounds of the queue.

    Raises:
        UsageError: If the URL is not http or https, or names no host.
    """

    def __init__(
        self, url: str, *, token: str | None = None, ca_file: str = "", policy: RetryPolicy = DEFAULT_RETRY_POLICY
    ) -> None:
        if not is_http_url(url):
            raise UsageError(f"--webhook {url}: an http or https URL is needed")
        self._url, self._poster = url, HttpPoster(token=token, ca_file=ca_file)
        self._queue: DeliveryQueue[bytes] = DeliveryQueue("webhook", self._send, policy=policy)

    @property
    def sent(self) -> int:
        """Events that were delivered."""
        return self._queue.sent

    @property
    def lost(self) -> int:
        """Events that were not delivered and never will be."""
        return self._queue.lost

    @property
    def counters(self) -> OutputCounters:
        """The counts so far."""
        return self._queue.counters

    def post(self, event: EventEnvelope) -> None:
        """Queue an event; drop the oldest one if the queue is full."""
        self._queue.put(render_event(event))

    def count_backlog(self) -> int:
        """Return the number of queued events."""
        return self._queue.backlog

    async def close(self) -> None:
        """Wait a few seconds for queued events, then stop and count the rest as lost."""
        await self._queue.close()
        await self._poster.close()

    async def _send(self, body: bytes) -> None:
        await self._poster.post(self._url, body)
