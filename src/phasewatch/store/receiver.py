"""The receiver's answers: a bundle is acknowledged when it, its receipt and their folder are on the disk, never before."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, TypeVar, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phasewatch.errors import LostStoreError, PhasewatchError, TakenError
from phasewatch.http_server.connections import prove_owner
from phasewatch.store.admission import Arrival, Gate, Judge, Judgement
from phasewatch.store.base import Store, StoreItem
from phasewatch.store.digests import parse_digest, render_digest
from phasewatch.store.disk import NO_DIGEST, SUFFIX, render_receipt
from phasewatch.store.room import Bounds, FreeFiles, Room
from phasewatch.store.tokens import Token, host_of
from phasewatch.store.upload import Upload
from phasewatch.vocab import EPISODE_ID, HOST_ID

PATH = "/v1/episodes/{host_id}/{episode_id}"
# The stored bundle's digest, spelled as in Content-Digest: the answer to a HEAD has no body to carry it.
RECEIPT_HEADER = "Phasewatch-Receipt"
TIDY_S = 600.0
OLD_S = 86_400.0  # an unfinished write of that age has no living writer
CLOSED = 499  # the client went away; only the log sees it

_PIECE_BYTES = 256 << 10
_THREADS = 16  # fsync waits for the disk, not for a core
_FULL = {errno.ENOSPC, errno.EDQUOT}

T = TypeVar("T")
Log = Callable[[dict[str, Any]], None]


class _Refused(Exception):
    """An answer that is not yes."""

    def __init__(self, status: int, words: str, **headers: str) -> None:
        self.status, self.words, self.headers = status, words, headers
        super().__init__(words)


class _Worthless(_Refused):
    """A bundle that was read whole and is refused for what it is; its host pays for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What the store holds as an upload begins."""

    item: StoreItem | None
    free: int | None
    files: FreeFiles | None
    held: list[tuple[float, int]]


class Receiver:
    """Takes bundles over HTTP into a store; `app` is what a server runs."""

    def __init__(
        self,
        store: Store,
        tokens: Sequence[Token],
        *,
        bounds: Bounds,
        log: Log,
        judge: Judge | None = None,
        refuse: frozenset[str] = frozenset(),
        tidy_s: float = TIDY_S,
    ) -> None:
        """Set up; nothing is touched yet.

        Args:
            store: Where bundles go; the caller holds it by `Store.receiving`.
            tokens: Who may send.
            bounds: How much.
            log: Takes one record a request; it never holds a token or a body.
            judge: Looks at each bundle before it is stored; None stores unseen.
            refuse: Statuses that are answered 422 and not stored; others are kept, as evidence.
            tidy_s: How often to look for what killed writers left.
        """
        self._store, self._tokens, self._bounds, self._log = store, tokens, bounds, log
        self._gate = Gate(judge) if judge else None
        self._refuse, self._tidy_s = refuse, tidy_s
        self._room = Room(bounds)
        self._looking: asyncio.Future[str] | None = None
        self._threads = ThreadPoolExecutor(_THREADS)
        routes = [
            Route(PATH, self._episode, methods=["GET", "PUT"]),
            Route("/healthz", self._health, methods=["GET", "HEAD"]),
        ]
        app = Starlette(routes=routes, lifespan=self._alive, exception_handlers={HTTPException: _not_here})
        app.router.redirect_slashes = False
        self.app: ASGIApp = self._logged(app)

    @asynccontextmanager
    async def _alive(self, app: Starlette) -> AsyncIterator[None]:
        """Look for old leftovers now and then, as long as the server runs."""

        async def tidy() -> None:
            while True:
                with suppress(OSError, PhasewatchError):  # uploads will meet the same fault, and say so
                    await self._in_thread(partial(self._store.tidy, older_than_s=OLD_S))
                await asyncio.sleep(self._tidy_s)

        task = asyncio.create_task(tidy())
        yield
        task.cancel()
        self._threads.shutdown()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Do something that waits for the disk. Cancelled, wait until it is done: its file must not be dropped under it."""
        job = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            await asyncio.wait([job])
            raise

    def _logged(self, app: ASGIApp) -> ASGIApp:
        """Write one record a request: who, what, how it ended; no header, no query, no body."""

        async def logged(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            began_s, note = time.monotonic(), {"status": CLOSED}
            scope["phasewatch"] = note

            async def sent(message: Message) -> None:
                if message["type"] == "http.response.start":
                    note["status"] = message["status"]
                await send(message)

            try:
                await app(scope, receive, sent)
            finally:
                client = scope.get("client") or ("", 0)
                head = {"client": client[0], "method": scope["method"], "path": scope["path"][:200]}
                with suppress(OSError):  # a log that cannot be written stops no upload
                    self._log({**head, **note, "ms": round((time.monotonic() - began_s) * 1e3, 1)})

        return logged

    async def _episode(self, request: Request) -> Response:
        """Answer for one episode, to its own host alone; whatever goes wrong becomes an answer too."""
        try:
            host_id, episode_id = request.path_params["host_id"], request.path_params["episode_id"]
            if not HOST_ID.fullmatch(host_id) or not EPISODE_ID.fullmatch(episode_id):
                raise _Refused(404, "no host_id/episode_id of a bundle")
            sender = host_of(self._tokens, request.headers.get("authorization", ""))
            if sender is None:
                raise _Refused(401, "no token, or an unknown one", **{"WWW-Authenticate": "Bearer"})
            request.scope["phasewatch"]["host"] = sender
            prove_owner(request.scope, sender)
            if sender != host_id:
                raise _Refused(403, "this token writes another host")
            answer = self._put if request.method == "PUT" else self._get
            return await answer(request, host_id, episode_id)
        except _Refused as refused:
            return _problem(request, refused)
        except TakenError:
            return _problem(request, _Refused(409, "other bytes already stand under this id"))
        except LostStoreError as error:
            request.scope["phasewatch"]["detail"] = str(error)
            return _problem(request, _Refused(503, "the store's disk is not in its place", **{"Retry-After": "60"}))
        except ClientDisconnect:
            request.scope["phasewatch"]["why"] = "the client went away"
            return Response(status_code=CLOSED)  # nobody reads it
        except OSError as exc:
            if exc.errno in _FULL:
                return _problem(request, _Refused(507, "no room on the store's disk", **{"Retry-After": "60"}))
            return _problem(request, _Refused(500, f"the store failed: {exc.strerror}"))
        except PhasewatchError as error:
            request.scope["phasewatch"]["detail"] = str(error)
            return _problem(request, _Refused(500, "the store failed"))

    async def _health(self, request: Request) -> Response:
        if self._looking is None:  # whoever asks meanwhile shares the answer: the disk is asked once
            self._looking = asyncio.ensure_future(self._in_thread(self._look_at_store))
            self._looking.add_done_callback(lambda looked: setattr(self, "_looking", None))
        status = await asyncio.shield(self._looking)
        said = {"status": status, "in_flight": self._room.in_flight}
        return JSONResponse(said, status_code=200 if status == "ok" else 503)

    def _look_at_store(self) -> str:
        try:
            self._store.check_place()
            has_room = self._bounds.has_room(self._store.free_bytes(), self._store.free_files())
        except LostStoreError:
            return "the store is not in its place"
        except OSError:
            return "the store is out of reach"
        return "ok" if has_room else "no room"

    async def _get(self, request: Request, host_id: str, episode_id: str) -> Response:
        def look() -> StoreItem | None:
            self._store.check_place()
            return self._store.find(host_id, episode_id)

        item = await self._in_thread(look)
        if item is None or item.is_missing or item.receipt in NO_DIGEST:
            raise _Refused(404, "no receipt for this episode")
        return _receipt(200, str(item.receipt), episode_id)

    async def _put(self, request: Request, host_id: str, episode_id: str) -> Response:
        size, digest = _read_length(request, self._bounds.bundle_bytes), _read_digest(request)
        must_learn = self._room.must_learn(host_id)

        def look() -> _Seen:
            self._store.check_place()
            held = self._store.held(host_id) if must_learn else []
            item = self._store.find(host_id, episode_id)
            return _Seen(item=item, free=self._store.free_bytes(), files=self._store.free_files(), held=held)

        seen = await self._in_thread(look)
        item = seen.item
        if item and item.receipt not in NO_DIGEST | {digest}:
            raise _Refused(409, "other bytes already stand under this id")
        if size < self._bounds.least_bytes:
            raise _Refused(400, f"no bundle has {size:,} bytes; the least has {self._bounds.least_bytes:,}")
        if must_learn:
            self._room.learn(host_id, seen.held)
        refusal = self._room.take(
            host_id, size, now_s=time.time(), free_bytes=seen.free, files=seen.files,
            is_known=item is not None and not item.is_missing and item.receipt == digest,
        )  # fmt: skip
        if refusal:
            raise _Refused(refusal.status, refusal.words, **{"Retry-After": str(refusal.retry_after_s)})
        stored_s = refused_s = None
        try:
            is_new = await self._take(request, host_id, episode_id, size, digest)
            stored_s = time.time() if is_new else None
        except _Worthless:
            refused_s = time.time()
            raise
        finally:
            self._room.give_back(host_id, size, stored_s=stored_s, refused_s=refused_s)
        return _receipt(201 if is_new else 200, digest, episode_id)

    async def _take(self, request: Request, host_id: str, episode_id: str, size: int, digest: str) -> bool:
        """Stream a body aside, verify it, and publish it; give whether the bundle is new."""
        upload = Upload(partial(self._store.receive, host_id, episode_id))
        try:
            if await self._stream(request, upload, size) != digest:
                raise _Worthless(400, "the body's sha256 is not the one that Content-Digest tells")
            judgement = await self._judge(upload, host_id, episode_id, digest)
            if judgement and judgement.status in self._refuse:
                request.scope["phasewatch"]["judged"] = judgement.status
                raise _Worthless(422, f"{judgement.status}: {', '.join(judgement.reasons)}: {judgement.detail}")

            def publish() -> bool:
                self._store.check_place()
                return upload.publish(digest)

            is_new = await self._in_thread(publish)
            if judgement:
                request.scope["phasewatch"]["judged"] = judgement.status
                text = judgement.render(digest=digest)
                await self._in_thread(partial(self._store.write_status, host_id, episode_id, text))
            return is_new
        finally:
            if upload.is_begun:
                await self._in_thread(upload.drop)

    async def _piece(self, body: AsyncIterator[bytes]) -> bytes:
        async with asyncio.timeout(self._bounds.silence_s):
            return await anext(body, b"")

    async def _stream(self, request: Request, upload: Upload, size: int) -> str:
        """Take the body as it comes and give its sha256; too much, too little and too slow are refused."""
        hasher, taken = sha256(), 0
        note = request.scope["phasewatch"]
        body = request.stream()
        try:
            async with asyncio.timeout(self._bounds.deadline_s(size)):
                while piece := await self._piece(body):
                    taken += len(piece)
                    note["bytes"] = taken
                    if taken > size:
                        raise _Refused(413, f"the body is longer than the {size:,} bytes announced")
                    hasher.update(piece)
                    upload.held += piece
                    if len(upload.held) >= _PIECE_BYTES:
                        await self._in_thread(upload.flush)
        except TimeoutError:
            raise _Refused(408, "the body came too slowly", **{"Connection": "close"}) from None
        if taken < size:
            raise _Refused(400, f"the body ended after {taken:,} of {size:,} bytes")
        return hasher.hexdigest()

    async def _judge(self, upload: Upload, host_id: str, episode_id: str, digest: str) -> Judgement | None:
        """Have a bundle judged that was not yet."""
        if self._gate is None or await self._in_thread(partial(self._store.has_status, host_id, episode_id)):
            return None
        return await self._gate.judge(
            host_id, lambda: Arrival(host_id=host_id, episode_id=episode_id, sha256=digest, data=upload.content())
        )


def _read_length(request: Request, most: int) -> int:
    """Read how long the body will be."""
    text = request.headers.get("content-length", "")
    if not text.isdecimal() or not text.isascii():
        raise _Refused(411, "a Content-Length is needed")
    if len(text) > 18 or int(text) > most:
        raise _Refused(413, f"a bundle has at most {most:,} bytes")
    return int(text)


def _read_digest(request: Request) -> str:
    """Read the sha256 that the sender vouches for, in hex."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise _Refused(415, "a bundle comes as it is, without Content-Encoding")
    digest = parse_digest(request.headers.getlist("content-digest"))
    if digest is None:
        raise _Refused(400, "a Content-Digest with one sha-256=:BASE64: is needed (RFC 9530)")
    return digest


def _receipt(status: int, digest: str, episode_id: str) -> Response:
    text = render_receipt(digest, f"{episode_id}{SUFFIX}")
    return Response(text, status, {RECEIPT_HEADER: render_digest(digest)}, media_type="text/plain")


def _problem(request: Request, refused: _Refused) -> Response:
    """Answer no, in the form of RFC 9457."""
    request.scope["phasewatch"]["why"] = refused.words
    text = json.dumps({"status": refused.status, "detail": refused.words}) + "\n"
    return Response(text, refused.status, refused.headers, media_type="application/problem+json")


async def _not_here(request: Request, exc: Exception) -> Response:
    """Answer what no route takes: an unknown path, or a method that it does not have."""
    refusal = cast(HTTPException, exc)  # it is registered for no other kind
    headers = dict(refusal.headers or {})
    if "Allow" in headers:
        headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))  # from a set
    return _problem(request, _Refused(refusal.status_code, refusal.detail, **headers))
