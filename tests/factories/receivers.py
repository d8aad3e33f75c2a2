"""A receiver in this process, asked without a socket, and the headers that a sender gives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx

from phasewatch.store.base import BundleStore, open_store
from phasewatch.store.quota import ReceiverLimits
from phasewatch.transfer.admission import CheckArrivals
from phasewatch.transfer.auth import parse_tokens
from phasewatch.transfer.receiver import BundleReceiver, render_content_digest

IDS = [f"0199c82c-c000-7000-8000-0000000000{i:02d}" for i in range(64)]
TOKENS = {"pc-a": "token-of-pc-a-0001", "pc-b": "token-of-pc-b-0002"}
ROOMY = ReceiverLimits(min_free_bytes=0)


def path_of(number: int = 0, host_id: str = "pc-a") -> str:
    return f"/v1/episodes/{host_id}/{IDS[number]}"


def headers_of(data: bytes, *, token: str = TOKENS["pc-a"], **more: str) -> dict[str, str]:
    digest = render_content_digest(sha256(data).hexdigest())
    return {"Authorization": f"Bearer {token}", "Content-Digest": digest} | more


class Desk:
    """One receiver over one store."""

    def __init__(
        self,
        store: BundleStore | Path,
        *,
        bounds: ReceiverLimits = ROOMY,
        judge: CheckArrivals | None = None,
        refuse: Iterable[str] = (),
        tokens: Mapping[str, str] = TOKENS,
        tidy_s: float = 600.0,
    ) -> None:
        self.store: BundleStore = open_store(store) if isinstance(store, Path) else store
        self.log: list[dict[str, Any]] = []
        known = parse_tokens("".join(f"{h}: {t}\n" for h, t in tokens.items()), file="tokens")
        with self.store.receiving():
            pass  # makes the folder; a test holds no lock
        self.receiver = BundleReceiver(
            self.store, known, bounds=bounds, log=self.log.append, judge=judge, refuse=frozenset(refuse), tidy_s=tidy_s
        )

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.receiver.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://store", timeout=30) as client:
            yield client

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())

    def put(self, data: bytes, number: int = 0, **headers: str) -> httpx.Response:
        return self.ask("PUT", path_of(number), content=data, headers=headers_of(data, **headers))

    def feed(self, scope: dict[str, Any], messages: Iterable[dict[str, Any] | float]) -> list[dict[str, Any]]:
        """Hand the app exactly these messages (a number is seconds of silence) and give what it sends."""
        sent: list[dict[str, Any]] = []
        queue = list(messages)

        async def receive() -> dict[str, Any]:
            while queue and isinstance(queue[0], float):
                await asyncio.sleep(queue.pop(0))  # type: ignore[arg-type]
            return queue.pop(0) if queue else {"type": "http.disconnect"}  # type: ignore[return-value]

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(self.receiver.app(scope, receive, send))  # type: ignore[arg-type]
        return sent


def scope_of(method: str = "PUT", number: int = 0, **headers: str) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path_of(number), "raw_path": path_of(number).encode(), "query_string": b"", "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()], "client": None,
        "server": ("store", 80),
    }  # fmt: skip


def piece(data: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}
