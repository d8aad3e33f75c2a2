"""Receive bundles over HTTP; one is acknowledged only when it and its receipt are on the disk."""

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

__all__ = [
    "RECEIPT_HEADER",
    "BundleReceiver",
    "render_content_digest",
]


class _BufferedUpload:
    """Buffers an upload, and opens an `IncomingBundle` only when the buffer is full or published.

    Most bundles fit in the buffer, and need one disk operation instead of four.
    """

    def __init__(self, begin: Callable[[], IncomingBundle]) -> None:
        """Start with an empty buffer.

        Args:
            begin: Opens the unfinished bundle.
        """
        self.buffer = bytearray()
        self._begin = begin
        self._incoming: IncomingBundle | None = None

    @property
    def is_begun(self) -> bool:
        """Whether there is an unfinished bundle to drop."""
        return self._incoming is not None

    def flush(self) -> IncomingBundle:
        """Write the buffer to the unfinished bundle, and return that."""
        if self._incoming is None:
            self._incoming = self._begin()
        self._incoming.write(bytes(self.buffer))
        self.buffer.clear()
        return self._incoming

    def content(self) -> bytes:
        """Return all bytes of the upload so far."""
        return bytes(self.buffer) if self._incoming is None else self.flush().content()

    def publish(self, digest: str) -> bool:
        """Publish the bundle with its receipt; see `IncomingBundle.publish`."""
        is_new = self.flush().publish(digest)
        if is_new:
            self._incoming = None
        return is_new

    def drop(self) -> None:
        """Remove the unfinished bundle, if any."""
        if self._incoming is not None:
            self._incoming.drop()
            self._incoming = None


_SHA256_FIELD = re.compile(r"\s*sha-256=:([A-Za-z0-9+/]{43}=):\s*(?:;.*)?")


def render_content_digest(digest: str) -> str:
    """Return the Content-Digest header (RFC 9530) of a SHA-256 in hex."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode()}:"


def _parse_content_digest(fields: Sequence[str]) -> str | None:
    """Return the SHA-256 in Content-Digest headers, in hex; None without exactly one."""
    digests = [match[1] for field in ",".join(fields).split(",") if (match := _SHA256_FIELD.fullmatch(field))]
    return base64.b64decode(digests[0]).hex() if len(digests) == 1 else None


_EPISODE_ROUTE = "/v1/episodes/{host_id}/{episode_id}"
# Digest of the stored bundle, in the form of Content-Digest, for responses to HEAD, which have no body.
RECEIPT_HEADER = "Phasewatch-Receipt"
_CLEANUP_INTERVAL_S = 600.0
_LEFTOVER_AGE_S = 86_400.0  # older unfinished files have no running writer
_CLIENT_CLOSED_STATUS = 499  # the client closed the connection; only logged

_CONFLICT = "the store holds other bytes under this id"
_PIECE_BYTES = 256 << 10
_THREADS = 16  # fsync waits for the disk, not for a core

T = TypeVar("T")
RequestLogger = Callable[[dict[str, Any]], None]  # receives one record per request


class _UploadRefusedError(Exception):
    """An upload is refused."""

    def __init__(self, status: int, words: str, **headers: str) -> None:
        self.status, self.words, self.headers = status, words, headers
        super().__init__(words)


class _BadBundleError(_UploadRefusedError):
    """A bundle was read completely and refused for its content; its host is charged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoreState:
    """The state of the store at the start of an upload."""

    item: StoreItem | None
    free: int | None
    files: FreeFiles | None
    held: list[tuple[float, int]]


class BundleReceiver:
    """Receives bundles over HTTP into a store; `app` is its ASGI application."""

    def __init__(
        self,
        store: BundleStore,
        tokens: Sequence[HostToken],
        *,
        bounds: ReceiverLimits,
        log: RequestLogger,
        judge: CheckArrivals | None = None,
        refuse: frozenset[str] = frozenset(),
        tidy_s: float = _CLEANUP_INTERVAL_S,
    ) -> None:
        """Prepare the application, without accessing the store.

        Args:
            store: The store, which the caller holds by `BundleStore.receiving`.
            tokens: Tokens of the hosts.
            bounds: Limits.
            log: Receives one record per request, without tokens and bodies.
            judge: Validates each bundle before it is stored; None stores without validation.
            refuse: Statuses that are answered with 422 and not stored; others are stored as evidence.
            tidy_s: Interval of the search for files of killed writers.
        """
        self._store, self._tokens, self._bounds, self._log = store, tokens, bounds, log
        self._admission = AdmissionQueue(judge) if judge else None
        self._refused_statuses, self._tidy_s = refuse, tidy_s
        self._quota = UploadQuota(bounds)
        self._health_check: asyncio.Future[str] | None = None
        self._threads = ThreadPoolExecutor(_THREADS)
        routes = [
            Route(_EPISODE_ROUTE, self._handle_episode, methods=["GET", "PUT"]),
            Route("/healthz", self._handle_health, methods=["GET", "HEAD"]),
        ]
        app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _handle_http_error})
        app.router.redirect_slashes = False
        self.app: ASGIApp = self._log_requests(app)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Remove old unfinished files from time to time while the server runs."""

        async def tidy() -> None:
            while True:
                with suppress(OSError, PhasewatchError):  # uploads report the same error
                    await self._run_in_thread(partial(self._store.remove_leftovers, older_than_s=_LEFTOVER_AGE_S))
                await asyncio.sleep(self._tidy_s)

        task = asyncio.create_task(tidy())
        yield
        task.cancel()
        self._threads.shutdown()

    async def _run_in_thread(self, work: Callable[[], T]) -> T:
        """Run disk work in a thread; if cancelled, wait until it is done, because it uses the unfinished file."""
        job = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            await asyncio.wait([job])
            raise

    def _log_requests(self, app: ASGIApp) -> ASGIApp:
        """Return an application that logs one record per request, without headers, query and body."""

        async def logged(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            began_s, note = time.monotonic(), {"status": _CLIENT_CLOSED_STATUS}
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
                with suppress(OSError):  # a failing log stops no upload
                    self._log({**head, **note, "ms": round((time.monotonic() - began_s) * 1e3, 1)})

        return logged

    async def _handle_episode(self, request: Request) -> Response:
        """Answer a request for one episode, for its own host only; errors become responses."""
        try:
            host_id, episode_id = request.path_params["host_id"], request.path_params["episode_id"]
            if not HOST_ID_PATTERN.fullmatch(host_id) or not EPISODE_ID_PATTERN.fullmatch(episode_id):
                raise _UploadRefusedError(404, "not a valid host_id/episode_id")
            sender = find_host(self._tokens, request.headers.get("authorization", ""))
            if sender is None:
                raise _UploadRefusedError(401, "no token, or an unknown one", **{"WWW-Authenticate": "Bearer"})
            request.scope["phasewatch"]["host"] = sender
            set_connection_owner(request.scope, sender)
            if sender != host_id:
                raise _UploadRefusedError(403, "this token is for another host")
            answer = self._handle_put if request.method == "PUT" else self._handle_get
            return await answer(request, host_id, episode_id)
        except _UploadRefusedError as refused:
            return _problem_response(request, refused)
        except IdConflictError:
            return _problem_response(request, _UploadRefusedError(409, _CONFLICT))
        except StoreReplacedError as error:
            request.scope["phasewatch"]["detail"] = str(error)
            return _problem_response(
                request, _UploadRefusedError(503, "the store's disk is not in its place", **{"Retry-After": "60"})
            )
        except ClientDisconnect:
            request.scope["phasewatch"]["why"] = "the client closed the connection"
            return Response(status_code=_CLIENT_CLOSED_STATUS)  # only logged
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
        if self._health_check is None:  # parallel requests share one access to the disk
            self._health_check = asyncio.ensure_future(self._run_in_thread(self._check_store))
            self._health_check.add_done_callback(lambda looked: setattr(self, "_health_check", None))
        status = await asyncio.shield(self._health_check)
        content = {"status": status, "in_flight": self._quota.in_flight}
        return JSONResponse(content, status_code=200 if status == "ok" else 503)

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
            raise _UploadRefusedError(409, _CONFLICT)
        if size < self._bounds.min_bundle_bytes:
            raise _UploadRefusedError(
                400, f"no bundle has {size:,} bytes; the least has {self._bounds.min_bundle_bytes:,}"
            )
        if must_learn:
            self._quota.load_history(host_id, seen.held)
        refusal = self._quota.reserve(
            host_id,
            size,
            now_s=time.time(),
            free_bytes=seen.free,
            files=seen.files,
            is_known=item is not None and not item.is_missing and item.receipt == digest,
        )
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
        """Read a body, verify it and publish it; return whether the bundle is new."""
        upload = _BufferedUpload(partial(self._store.receive, host_id, episode_id))
        try:
            if await self._read_body(request, upload, size) != digest:
                raise _BadBundleError(400, "the SHA-256 of the body differs from Content-Digest")
            verdict = await self._check_bundle(upload, host_id, episode_id, digest)
            if verdict and verdict.status in self._refused_statuses:
                request.scope["phasewatch"]["judged"] = verdict.status
                raise _BadBundleError(422, f"{verdict.status}: {', '.join(verdict.reasons)}: {verdict.detail}")

            def publish() -> bool:
                self._store.check_location()
                return upload.publish(digest)

            is_new = await self._run_in_thread(publish)
            if verdict:
                request.scope["phasewatch"]["judged"] = verdict.status
                text = verdict.render(digest=digest)
                await self._run_in_thread(partial(self._store.write_status, host_id, episode_id, text))
            return is_new
        finally:
            if upload.is_begun:
                await self._run_in_thread(upload.drop)

    async def _read_piece(self, body: AsyncIterator[bytes]) -> bytes:
        async with asyncio.timeout(self._bounds.read_timeout_s):
            return await anext(body, b"")

    async def _read_body(self, request: Request, upload: _BufferedUpload, size: int) -> str:
        """Read the body into the upload and return its SHA-256 in hex.

        Raises:
            _UploadRefusedError: If the body is too long, too short or too slow.
        """
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
        self, upload: _BufferedUpload, host_id: str, episode_id: str, digest: str
    ) -> AdmissionVerdict | None:
        """Return the verdict on a bundle; None without validation, or if the store has a verdict."""
        if self._admission is None or await self._run_in_thread(partial(self._store.has_status, host_id, episode_id)):
            return None
        return await self._admission.check_bundle(
            host_id, lambda: BundleArrival(host_id=host_id, episode_id=episode_id, sha256=digest, data=upload.content())
        )


def _read_length(request: Request, most: int) -> int:
    """Return the Content-Length of a request in bytes.

    Raises:
        _UploadRefusedError: If it is missing, malformed or too large.
    """
    text = request.headers.get("content-length", "")
    if not text.isdecimal() or not text.isascii():
        raise _UploadRefusedError(411, "a Content-Length is needed")
    if len(text) > 18 or int(text) > most:
        raise _UploadRefusedError(413, f"a bundle has at most {most:,} bytes")
    return int(text)


def _read_digest(request: Request) -> str:
    """Return the SHA-256 in the Content-Digest of a request, in hex.

    Raises:
        _UploadRefusedError: If there is not exactly one, or the body is encoded.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise _UploadRefusedError(415, "Content-Encoding is not supported; send the bundle as it is")
    digest = _parse_content_digest(request.headers.getlist("content-digest"))
    if digest is None:
        raise _UploadRefusedError(400, "a Content-Digest with one sha-256=:BASE64: is needed (RFC 9530)")
    return digest


def _receipt_response(status: int, digest: str, episode_id: str) -> Response:
    text = render_receipt(digest, f"{episode_id}{BUNDLE_SUFFIX}")
    return Response(text, status, {RECEIPT_HEADER: render_content_digest(digest)}, media_type="text/plain")


def _problem_response(request: Request, refused: _UploadRefusedError) -> Response:
    """Return an error response in the form of RFC 9457."""
    request.scope["phasewatch"]["why"] = refused.words
    text = json.dumps({"status": refused.status, "detail": refused.words}) + "\n"
    return Response(text, refused.status, refused.headers, media_type="application/problem+json")


async def _handle_http_error(request: Request, exc: Exception) -> Response:
    """Return the response for an unknown path or method."""
    refusal = cast(HTTPException, exc)  # registered for this type only
    headers = dict(refusal.headers or {})
    if "Allow" in headers:
        headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))  # from a set
    return _problem_response(request, _UploadRefusedError(refusal.status_code, refusal.detail, **headers))
