"""The receiver's answers: a bundle is acknowledged when it, its receipt and their folder are on the disk, never before."""

from __future__ import annotations

import asyncio
import base64
import json
import re
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

from phasewatch.atomic import DISK_FULL_ERRNOS
from phasewatch.errors import IdConflictError, PhasewatchError, StoreReplacedError
from phasewatch.http_server.connections import set_connection_owner
from phasewatch.store.base import BundleStore, IncomingBundle, StoreItem
from phasewatch.store.local import BUNDLE_SUFFIX, INVALID_RECEIPTS, render_receipt
from phasewatch.store.quota import FreeFiles, ReceiverLimits, UploadQuota
from phasewatch.transfer.admission import AdmissionQueue, AdmissionVerdict, BundleArrival, CheckArrivals
from phasewatch.transfer.auth import HostToken, find_host
from phasewatch.types import EPISODE_ID_PATTERN, HOST_ID_PATTERN


class BufferedUpload:
    """Begins an `IncomingBundle` when there is something to write; most bundles need one step on the disk, not four."""

    def __init__(self, begin: Callable[[], IncomingBundle]) -> None:
        """Hold nothing yet.

        Args:
            begin: Opens the unfinished file.
        """
        self.buffer = bytearray()
        self._begin = begin
        self._incoming: IncomingBundle | None = None

    @property
    def is_begun(self) -> bool:
        """Whether there is an unfinished file to be dropped."""
        return self._incoming is not None

    def flush(self) -> IncomingBundle:
        """Write what is held."""
        if self._incoming is None:
            self._incoming = self._begin()
        self._incoming.write(bytes(self.buffer))
        self.buffer.clear()
        return self._incoming

    def content(self) -> bytes:
        """Give all bytes taken so far."""
        return bytes(self.buffer) if self._incoming is None else self.flush().content()

    def publish(self, digest: str) -> bool:
        """Publish the bundle with its receipt, see `IncomingBundle.publish`; then there is nothing left to drop."""
        is_new = self.flush().publish(digest)
        if is_new:
            self._incoming = None
        return is_new

    def drop(self) -> None:
        """Remove the unfinished file."""
        if self._incoming is not None:
            self._incoming.drop()
            self._incoming = None


_SHA256_FIELD = re.compile(r"\s*sha-256=:([A-Za-z0-9+/]{43}=):\s*(?:;.*)?")


def render_content_digest(digest: str) -> str:
    """Spell a sha256, given in hex."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode()}:"


def parse_content_digest(fields: Sequence[str]) -> str | None:
    """Give the one sha256 of the header's fields, in hex; None if there is none or several. Other algorithms are passed over."""
    found = [match[1] for field in ",".join(fields).split(",") if (match := _SHA256_FIELD.fullmatch(field))]
    return base64.b64decode(found[0]).hex() if len(found) == 1 else None


EPISODE_ROUTE = "/v1/episodes/{host_id}/{episode_id}"
# The stored bundle's digest, spelled as in Content-Digest: the answer to a HEAD has no body to carry it.
RECEIPT_HEADER = "Phasewatch-Receipt"
CLEANUP_INTERVAL_S = 600.0
LEFTOVER_AGE_S = 86_400.0  # an unfinished write of that age has no living writer
CLIENT_CLOSED_STATUS = 499  # the client went away; only the log sees it

_PIECE_BYTES = 256 << 10
_THREADS = 16  # fsync waits for the disk, not for a core

T = TypeVar("T")
LogRequest = Callable[[dict[str, Any]], None]


class _UploadRefusedError(Exception):
    """An answer that is not yes."""

    def __init__(self, status: int, words: str, **headers: str) -> None:
        self.status, self.words, self.headers = status, words, headers
        super().__init__(words)


class _BadBundleError(_UploadRefusedError):
    """A bundle that was read whole and is refused for what it is; its host pays for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoreState:
    """What the store holds as an upload begins."""

    item: StoreItem | None
    free: int | None
    files: FreeFiles | None
    held: list[tuple[float, int]]


class BundleReceiver:
    """Takes bundles over HTTP into a store; `app` is what a server runs."""

    def __init__(
        self,
        store: BundleStore,
        tokens: Sequence[HostToken],
        *,
        bounds: ReceiverLimits,
        log: LogRequest,
        judge: CheckArrivals | None = None,
        refuse: frozenset[str] = frozenset(),
        tidy_s: float = CLEANUP_INTERVAL_S,
    ) -> None:
        """Set up; nothing is touched yet.

        Args:
            store: Where bundles go; the caller holds it by `BundleStore.receiving`.
            tokens: Who may send.
            bounds: How much.
            log: Takes one record a request; it never holds a token or a body.
            judge: Looks at each bundle before it is stored; None stores unseen.
            refuse: Statuses that are answered 422 and not stored; others are kept, as evidence.
            tidy_s: How often to look for what killed writers left.
        """
        self._store, self._tokens, self._bounds, self._log = store, tokens, bounds, log
        self._admission = AdmissionQueue(judge) if judge else None
        self._refused_statuses, self._tidy_s = refuse, tidy_s
        self._quota = UploadQuota(bounds)
        self._health_check: asyncio.Future[str] | None = None
        self._threads = ThreadPoolExecutor(_THREADS)
        routes = [
            Route(EPISODE_ROUTE, self._handle_episode, methods=["GET", "PUT"]),
            Route("/healthz", self._handle_health, methods=["GET", "HEAD"]),
        ]
        app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _handle_http_error})
        app.router.redirect_slashes = False
        self.app: ASGIApp = self._log_requests(app)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Look for old leftovers now and then, as long as the server runs."""

        async def tidy() -> None:
            while True:
                with suppress(OSError, PhasewatchError):  # uploads will meet the same fault, and say so
                    await self._run_in_thread(partial(self._store.remove_leftovers, older_than_s=LEFTOVER_AGE_S))
                await asyncio.sleep(self._tidy_s)

        task = asyncio.create_task(tidy())
        yield
        task.cancel()
        self._threads.shutdown()

    async def _run_in_thread(self, work: Callable[[], T]) -> T:
        """Do something that waits for the disk. Cancelled, wait until it is done: its file must not be dropped under it."""
        job = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            await asyncio.wait([job])
            raise

    def _log_requests(self, app: ASGIApp) -> ASGIApp:
        """Write one record a request: who, what, how it ended; no header, no query, no body."""

        async def logged(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            began_s, note = time.monotonic(), {"status": CLIENT_CLOSED_STATUS}
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

    async def _handle_episode(self, request: Request) -> Response:
        """Answer for one episode, to its own host alone; whatever goes wrong becomes an answer too."""
        try:
            host_id, episode_id = request.path_params["host_id"], request.path_params["episode_id"]
            if not HOST_ID_PATTERN.fullmatch(host_id) or not EPISODE_ID_PATTERN.fullmatch(episode_id):
                raise _UploadRefusedError(404, "no host_id/episode_id of a bundle")
            sender = find_host(self._tokens, request.headers.get("authorization", ""))
            if sender is None:
                raise _UploadRefusedError(401, "no token, or an unknown one", **{"WWW-Authenticate": "Bearer"})
            request.scope["phasewatch"]["host"] = sender
            set_connection_owner(request.scope, sender)
            if sender != host_id:
                raise _UploadRefusedError(403, "this token writes another host")
            answer = self._handle_put if request.method == "PUT" else self._handle_get
            return await answer(request, host_id, episode_id)
        except _UploadRefusedError as refused:
            return _problem_response(request, refused)
        except IdConflictError:
            return _problem_response(request, _UploadRefusedError(409, "other bytes already stand under this id"))
        except StoreReplacedError as error:
            request.scope["phasewatch"]["detail"] = str(error)
            return _problem_response(
                request, _UploadRefusedError(503, "the store's disk is not in its place", **{"Retry-After": "60"})
            )
        except ClientDisconnect:
            request.scope["phasewatch"]["why"] = "the client went away"
            return Response(status_code=CLIENT_CLOSED_STATUS)  # nobody reads it
        except OSError as exc:
            if exc.errno in DISK_FULL_ERRNOS:
                return _problem_response(
                    request, _UploadRefusedError(507, "no room on the store's disk", **{"Retry-After": "60"})
                )
            return _problem_response(request, _UploadRefusedError(500, f"the store failed: {exc.strerror}"))
        except PhasewatchError as error:
            request.scope["phasewatch"]["detail"] = str(error)
            return _problem_response(request, _UploadRefusedError(500, "the store failed"))

    async def _handle_health(self, request: Request) -> Response:
        if self._health_check is None:  # whoever asks meanwhile shares the answer: the disk is asked once
            self._health_check = asyncio.ensure_future(self._run_in_thread(self._check_store))
            self._health_check.add_done_callback(lambda looked: setattr(self, "_health_check", None))
        status = await asyncio.shield(self._health_check)
        said = {"status": status, "in_flight": self._quota.in_flight}
        return JSONResponse(said, status_code=200 if status == "ok" else 503)

    def _check_store(self) -> str:
        try:
            self._store.check_location()
            has_room = self._bounds.has_room(self._store.free_bytes(), self._store.free_files())
        except StoreReplacedError:
            return "the store is not in its place"
        except OSError:
            return "the store is out of reach"
        return "ok" if has_room else "no room"

    async def _handle_get(self, request: Request, host_id: str, episode_id: str) -> Response:
        def look() -> StoreItem | None:
            self._store.check_location()
            return self._store.find(host_id, episode_id)

        item = await self._run_in_thread(look)
        if item is None or item.is_missing or item.receipt in INVALID_RECEIPTS:
            raise _UploadRefusedError(404, "no receipt for this episode")
        return _receipt_response(200, str(item.receipt), episode_id)

    async def _handle_put(self, request: Request, host_id: str, episode_id: str) -> Response:
        size, digest = _read_length(request, self._bounds.max_bundle_bytes), _read_digest(request)
        must_learn = self._quota.needs_history(host_id)

        def look() -> _StoreState:
            self._store.check_location()
            held = self._store.list_arrivals(host_id) if must_learn else []
            item = self._store.find(host_id, episode_id)
            return _StoreState(item=item, free=self._store.free_bytes(), files=self._store.free_files(), held=held)

        seen = await self._run_in_thread(look)
        item = seen.item
        if item and item.receipt not in INVALID_RECEIPTS | {digest}:
            raise _UploadRefusedError(409, "other bytes already stand under this id")
        if size < self._bounds.min_bundle_bytes:
            raise _UploadRefusedError(
                400, f"no bundle has {size:,} bytes; the least has {self._bounds.min_bundle_bytes:,}"
            )
        if must_learn:
            self._quota.load_history(host_id, seen.held)
        refusal = self._quota.reserve(
            host_id, size, now_s=time.time(), free_bytes=seen.free, files=seen.files,
            is_known=item is not None and not item.is_missing and item.receipt == digest,
        )  # fmt: skip
        if refusal:
            raise _UploadRefusedError(refusal.status, refusal.words, **{"Retry-After": str(refusal.retry_after_s)})
        stored_s = refused_s = None
        try:
            is_new = await self._store_body(request, host_id, episode_id, size, digest)
            stored_s = time.time() if is_new else None
        except _BadBundleError:
            refused_s = time.time()
            raise
        finally:
            self._quota.release(host_id, size, stored_s=stored_s, refused_s=refused_s)
        return _receipt_response(201 if is_new else 200, digest, episode_id)

    async def _store_body(self, request: Request, host_id: str, episode_id: str, size: int, digest: str) -> bool:
        """Stream a body aside, verify it, and publish it; give whether the bundle is new."""
        upload = BufferedUpload(partial(self._store.receive, host_id, episode_id))
        try:
            if await self._read_body(request, upload, size) != digest:
                raise _BadBundleError(400, "the body's sha256 is not the one that Content-Digest tells")
            judgement = await self._check_bundle(upload, host_id, episode_id, digest)
            if judgement and judgement.status in self._refused_statuses:
                request.scope["phasewatch"]["judged"] = judgement.status
                raise _BadBundleError(422, f"{judgement.status}: {', '.join(judgement.reasons)}: {judgement.detail}")

            def publish() -> bool:
                self._store.check_location()
                return upload.publish(digest)

            is_new = await self._run_in_thread(publish)
            if judgement:
                request.scope["phasewatch"]["judged"] = judgement.status
                text = judgement.render(digest=digest)
                await self._run_in_thread(partial(self._store.write_status, host_id, episode_id, text))
            return is_new
        finally:
            if upload.is_begun:
                await self._run_in_thread(upload.drop)

    async def _read_piece(self, body: AsyncIterator[bytes]) -> bytes:
        async with asyncio.timeout(self._bounds.read_timeout_s):
            return await anext(body, b"")

    async def _read_body(self, request: Request, upload: BufferedUpload, size: int) -> str:
        """Take the body as it comes and give its sha256; too much, too little and too slow are refused."""
        hasher, taken = sha256(), 0
        note = request.scope["phasewatch"]
        body = request.stream()
        try:
            async with asyncio.timeout(self._bounds.compute_deadline_s(size)):
                while piece := await self._read_piece(body):
                    taken += len(piece)
                    note["bytes"] = taken
                    if taken > size:
                        raise _UploadRefusedError(413, f"the body is longer than the {size:,} bytes announced")
                    hasher.update(piece)
                    upload.buffer += piece
                    if len(upload.buffer) >= _PIECE_BYTES:
                        await self._run_in_thread(upload.flush)
        except TimeoutError:
            raise _UploadRefusedError(408, "the body came too slowly", **{"Connection": "close"}) from None
        if taken < size:
            raise _UploadRefusedError(400, f"the body ended after {taken:,} of {size:,} bytes")
        return hasher.hexdigest()

    async def _check_bundle(
        self, upload: BufferedUpload, host_id: str, episode_id: str, digest: str
    ) -> AdmissionVerdict | None:
        """Have a bundle judged that was not yet."""
        if self._admission is None or await self._run_in_thread(partial(self._store.has_status, host_id, episode_id)):
            return None
        return await self._admission.check_bundle(
            host_id, lambda: BundleArrival(host_id=host_id, episode_id=episode_id, sha256=digest, data=upload.content())
        )


def _read_length(request: Request, most: int) -> int:
    """Read how long the body will be."""
    text = request.headers.get("content-length", "")
    if not text.isdecimal() or not text.isascii():
        raise _UploadRefusedError(411, "a Content-Length is needed")
    if len(text) > 18 or int(text) > most:
        raise _UploadRefusedError(413, f"a bundle has at most {most:,} bytes")
    return int(text)


def _read_digest(request: Request) -> str:
    """Read the sha256 that the sender vouches for, in hex."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise _UploadRefusedError(415, "a bundle comes as it is, without Content-Encoding")
    digest = parse_content_digest(request.headers.getlist("content-digest"))
    if digest is None:
        raise _UploadRefusedError(400, "a Content-Digest with one sha-256=:BASE64: is needed (RFC 9530)")
    return digest


def _receipt_response(status: int, digest: str, episode_id: str) -> Response:
    text = render_receipt(digest, f"{episode_id}{BUNDLE_SUFFIX}")
    return Response(text, status, {RECEIPT_HEADER: render_content_digest(digest)}, media_type="text/plain")


def _problem_response(request: Request, refused: _UploadRefusedError) -> Response:
    """Answer no, in the form of RFC 9457."""
    request.scope["phasewatch"]["why"] = refused.words
    text = json.dumps({"status": refused.status, "detail": refused.words}) + "\n"
    return Response(text, refused.status, refused.headers, media_type="application/problem+json")


async def _handle_http_error(request: Request, exc: Exception) -> Response:
    """Answer what no route takes: an unknown path, or a method that it does not have."""
    refusal = cast(HTTPException, exc)  # it is registered for no other kind
    headers = dict(refusal.headers or {})
    if "Allow" in headers:
        headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))  # from a set
    return _problem_response(request, _UploadRefusedError(refusal.status_code, refusal.detail, **headers))
