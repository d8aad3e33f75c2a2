"""Upload the bundles of an outbox to a receiver; a bundle leaves the outbox only with a receipt for its bytes."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from enum import Enum
from hashlib import sha256
from pathlib import Path

import httpx

from phasewatch import atomic
from phasewatch.errors import BundleError, StoreError
from phasewatch.progress import NO_PROGRESS, Progress
from phasewatch.store.local import (
    MAX_RECEIPT_BYTES,
    RECEIPT_SUFFIX,
    REFUSED_FOLDER,
    SENT_FOLDER,
    UNREADABLE_RECEIPT,
    DiskStore,
    StoreItem,
    parse_receipt,
    render_receipt,
)
from phasewatch.transfer.receiver import render_content_digest

__all__ = [
    "HTTP_TIMEOUT",
    "MAX_RETRY_WAIT_S",
    "MIN_RETRY_WAIT_S",
    "REASON_SUFFIX",
    "BundleShipper",
    "ShipmentSummary",
    "UploadOutcome",
    "classify_status",
    "parse_retry_after",
]

logger = logging.getLogger(__name__)

REASON_SUFFIX = ".reason.json"
POLL_S = 2.0
MIN_RETRY_WAIT_S, MAX_RETRY_WAIT_S = 0.5, 60.0
MIN_BLOCKED_WAIT_S, MAX_BLOCKED_WAIT_S = 2.0, 300.0  # between attempts of a host whose token or address is wrong
MAX_RETRY_AFTER_S = 86_400.0  # maximum of a Retry-After that is obeyed
HTTP_TIMEOUT = httpx.Timeout(30.0, connect=10.0)

_PIECE_BYTES = 64 << 10
_MAX_ANSWER_BYTES = 64 << 10


class UploadOutcome(Enum):
    """The outcome of an upload."""

    ACKNOWLEDGED = "kept"  # stored, if the receipt names the bundle's bytes
    REFUSED = "poison"  # refused for good; the bundle is moved away with the reason
    BLOCKED = "blocked"  # the token or the address is wrong, not the bundle
    RETRY = "again"
    REMOVED = "gone"  # somebody removed it from the outbox


def classify_status(status: int) -> UploadOutcome:
    """Return what an HTTP status means for a bundle."""
    if status in (200, 201):
        return UploadOutcome.ACKNOWLEDGED
    if status in (408, 425, 429) or status >= 500:
        return UploadOutcome.RETRY
    if status in (401, 403, 404, 405) or status < 400:
        return UploadOutcome.BLOCKED
    return UploadOutcome.REFUSED


@dataclass(slots=True)
class ShipmentSummary:
    """The result of shipping an outbox.

    Attributes:
        sent, sent_bytes: Number and bytes of the acknowledged bundles, now in ``sent/``.
        refused: Path and reason of each bundle that was moved to ``refused/``.
        blocked: Reason by host whose token or address is wrong; its bundles stay in the outbox.
        left: Paths of the bundles that are still in the outbox.
        strange: Paths of files that are not named as bundles.
        last_trouble: Reason of the last failed attempt that will be repeated.
    """

    sent: int = 0
    sent_bytes: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    blocked: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    strange: list[str] = field(default_factory=list)
    last_trouble: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBlock:
    """A host whose token or address is wrong.

    Attributes:
        words: The receiver's reason.
        tries: Number of attempts so far.
        until_s: When the next attempt may be made.
    """

    words: str
    tries: int
    until_s: float


class BundleShipper:
    """Uploads one outbox; an object serves one call of `run`."""

    def __init__(
        self,
        outbox: Path,
        client: httpx.AsyncClient,
        tokens: Mapping[str, str],
        *,
        parallel: int = 4,
        patience_s: float = 0.0,
        progress: Progress = NO_PROGRESS,
        rng: random.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the upload.

        Args:
            outbox: A store's folder, as a recorder writes it.
            client: HTTP client with the receiver's URL as its base.
            tokens: Token by host id.
            parallel: Number of parallel uploads.
            patience_s: Give up if nothing was acknowledged for this time; 0 never gives up.
            progress: Progress of the task ``ship``.
            rng: Randomises the waiting times.
            sleep, now_s: The clock.
        """
        self._outbox, self._client, self._tokens = outbox, client, tokens
        self._parallel, self._patience_s = parallel, patience_s
        self._progress = progress
        self._rng, self._sleep, self._now_s = rng or random.Random(), sleep, now_s
        self._stop = asyncio.Event()
        self._last_progress_s = now_s()
        self._known = 0
        self._is_watching = False
        self._tries: Counter[str] = Counter()  # by path of the bundles that are not shipped yet
        self._blocks: dict[str, HostBlock] = {}
        self._resume_s: dict[str, float] = {}  # by host: when the receiver allows the next attempt
        self._first_upload_locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._authenticated_hosts: set[str] = set()  # hosts whose token was accepted
        self.summary = ShipmentSummary()

    def stop(self) -> None:
        """Finish the running uploads, then end."""
        self._stop.set()

    async def run(self, *, watch: bool = False) -> ShipmentSummary:
        """Upload the bundles of the outbox.

        Args:
            watch: Go on with new bundles until `stop`.

        Raises:
            StoreError: If there is no outbox.
            BusyError: If another shipper works on it.
        """
        if not self._outbox.is_dir():
            raise StoreError(f"{self._outbox}: there is no such outbox; record into it with `phasewatch record --out`")
        self._is_watching = watch
        with atomic.lock(self._outbox / SENT_FOLDER):
            self._clean()
            while True:
                items = await asyncio.to_thread(self._scan)
                self._known = self.summary.sent + len(self.summary.refused) + len(items)
                await self._ship_all(items)
                if not watch or self._stop.is_set():
                    break
                await self._pause(POLL_S)
            self.summary.left = [item.path for item in self._scan()]
        return self.summary

    def _clean(self) -> None:
        """Remove the temporary files of a killed shipper."""
        for folder in (self._outbox / SENT_FOLDER, self._outbox / REFUSED_FOLDER):
            if folder.is_dir():
                DiskStore(folder).remove_leftovers(older_than_s=0)

    def _scan(self) -> list[StoreItem]:
        """Return the bundles to upload; finish moves that a kill interrupted."""
        found: list[StoreItem] = []
        self.summary.strange = []
        for item in DiskStore(self._outbox).walk():
            top, _, name = item.path.partition("/")
            if top in (SENT_FOLDER, REFUSED_FOLDER) and item.episode_id is None:
                continue
            if item.host_id is None or item.episode_id is None or top in (SENT_FOLDER, REFUSED_FOLDER):
                self.summary.strange.append(item.path)
            elif not item.is_missing:
                found.append(item)
            elif any((self._outbox / place / top / name).exists() for place in (SENT_FOLDER, REFUSED_FOLDER)):
                atomic.remove(self._outbox / (item.path + RECEIPT_SUFFIX))
            else:
                self.summary.strange.append(item.path)
        return found

    async def _ship_all(self, items: Sequence[StoreItem]) -> None:
        waiting = list(reversed(items))
        self._last_progress_s = self._now_s()
        self.summary.blocked = {
            h: block.words for h, block in self._blocks.items() if block.until_s > self._last_progress_s
        }

        async def work() -> None:
            while waiting and not self._is_over():
                item = self._next_item(waiting)
                if item is not None:
                    await self._ship(item, waiting)
                    continue
                wait_s = self._shortest_wait_s(waiting)
                if self._is_watching or 0 < self._patience_s < self._now_s() + wait_s - self._last_progress_s:
                    return  # there may be new bundles; or the wait is longer than the remaining patience
                await self._pause(wait_s)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._parallel, len(waiting))):
                group.create_task(work())

    def _next_item(self, waiting: list[StoreItem]) -> StoreItem | None:
        """Return the next bundle of a host that need not wait, or None."""
        now_s = self._now_s()
        for at in range(len(waiting) - 1, -1, -1):
            if self._resume_s.get(str(waiting[at].host_id), 0.0) <= now_s:
                return waiting.pop(at)
        return None

    def _shortest_wait_s(self, waiting: Sequence[StoreItem]) -> float:
        now_s = self._now_s()
        return max(0.0, min(self._resume_s[host_id] for host_id in {str(item.host_id) for item in waiting}) - now_s)

    def _is_over(self) -> bool:
        is_late = self._patience_s > 0 and self._now_s() - self._last_progress_s > self._patience_s
        return self._stop.is_set() or is_late

    async def _ship(self, item: StoreItem, waiting: list[StoreItem]) -> None:
        """Try to upload one bundle until its outcome is final, its host has to wait, or the time is up."""
        host_id = str(item.host_id)
        while host_id not in self.summary.blocked:
            is_first, tries = item.path not in self._tries, min(self._tries[item.path], 16)
            self._tries[item.path] += 1
            try:
                outcome, words, wait_s = await self._upload_in_turn(item, is_first=is_first)
            except (httpx.HTTPError, OSError) as exc:
                outcome, words, wait_s = UploadOutcome.RETRY, str(exc) or type(exc).__name__, 0.0
            if outcome is UploadOutcome.BLOCKED:
                self._block_host(item, words, wait_s)
                return
            self._count_outcome(item, outcome, words)
            self._report(f"{item.path} {words}")
            if outcome is not UploadOutcome.RETRY:
                del self._tries[item.path]
                return
            self.summary.last_trouble = words
            # Random, so that shippers that lost their receiver at the same time do not return at the same time.
            longest_s = min(MAX_RETRY_WAIT_S, MIN_RETRY_WAIT_S * 2**tries)
            pause_s = max(wait_s, self._rng.uniform(0, longest_s))
            if wait_s > 0:  # a Retry-After for one bundle holds for its host
                self._resume_s[host_id] = self._now_s() + pause_s
                waiting.insert(0, item)
                return
            await self._pause(pause_s)
            if self._is_over():
                return

    def _count_outcome(self, item: StoreItem, outcome: UploadOutcome, words: str) -> None:
        if outcome is UploadOutcome.ACKNOWLEDGED:
            self.summary.sent += 1
            self.summary.sent_bytes += item.bytes
        if outcome is UploadOutcome.REFUSED:
            self.summary.refused.append((item.path, words))
        if outcome in (UploadOutcome.ACKNOWLEDGED, UploadOutcome.REFUSED):
            self._last_progress_s = self._now_s()
            self._authenticated_hosts.add(str(item.host_id))
            self._blocks.pop(str(item.host_id), None)

    def _block_host(self, item: StoreItem, words: str, wait_s: float) -> None:
        """Pause a host, longer each time; the user is warned once for each reason."""
        host_id = str(item.host_id)
        if host_id in self.summary.blocked:
            return
        before = self._blocks.get(host_id)
        tries = before.tries + 1 if before else 0
        pause_s = max(wait_s, min(MAX_BLOCKED_WAIT_S, MIN_BLOCKED_WAIT_S * 2 ** min(tries, 16)))
        self._blocks[host_id] = HostBlock(words=words, tries=tries, until_s=self._now_s() + pause_s)
        self._authenticated_hosts.discard(host_id)
        self.summary.blocked[host_id] = words
        if before is None or before.words != words:
            logger.warning("%s is blocked: %s", host_id, words)

    def _report(self, detail: str) -> None:
        self._progress.update("ship", self.summary.sent + len(self.summary.refused), self._known, detail)

    async def _upload_in_turn(self, item: StoreItem, *, is_first: bool) -> tuple[UploadOutcome, str, float]:
        """Try to upload a bundle once; one at a time per host until its token was accepted."""
        host_id = str(item.host_id)
        if host_id in self._authenticated_hosts:
            return await self._upload(item, is_first=is_first)
        async with self._first_upload_locks[host_id]:
            if host_id in self.summary.blocked:
                return UploadOutcome.BLOCKED, self.summary.blocked[host_id], 0.0
            return await self._upload(item, is_first=is_first)

    async def _pause(self, seconds: float) -> None:
        """Sleep until the time is over or `stop` is called."""
        sleeping = asyncio.ensure_future(self._sleep(seconds))
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({sleeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (sleeping, stopping):
            task.cancel()

    async def _upload(self, item: StoreItem, *, is_first: bool) -> tuple[UploadOutcome, str, float]:
        """Try to upload a bundle once; return the outcome, its reason, and the receiver's Retry-After in seconds."""
        token = self._tokens.get(str(item.host_id))
        if token is None:
            return (
                UploadOutcome.BLOCKED,
                f"no token for {item.host_id}; add a line `{item.host_id}: token` to the tokens file",
                0,
            )
        try:
            data = await asyncio.to_thread(DiskStore(self._outbox).read, item)
        except BundleError as error:
            if error.code == "bundle-missing":
                return await asyncio.to_thread(self._find_moved, item)
            if error.code == "bundle-unreadable":  # a problem of the disk or of permissions, not of the bundle
                return UploadOutcome.RETRY, error.words, 0.0
            return await asyncio.to_thread(self._move_to_refused, item, error.code, error.words)
        if item.receipt == UNREADABLE_RECEIPT:
            return UploadOutcome.RETRY, "its receipt in the outbox could not be read", 0.0
        digest = sha256(data).hexdigest()
        if item.receipt not in (None, digest):
            return await asyncio.to_thread(
                self._move_to_refused,
                item,
                "receipt",
                "its SHA-256 differs from that in its receipt in the outbox",
            )
        url = f"/v1/episodes/{item.host_id}/{item.episode_id}"
        headers = {"Authorization": f"Bearer {token}"}
        if not is_first:  # the last response may have been lost
            status, text, _ = await self._send_request("GET", url, headers)
            if status == 200 and self._is_receipt_for(text, item, digest):
                return await asyncio.to_thread(self._move_to_sent, item, digest)
            if status != 404 and classify_status(status) is UploadOutcome.BLOCKED:  # 404: the bundle has no receipt yet
                return UploadOutcome.BLOCKED, f"{status} {_parse_detail(text)}".strip(), 0.0
        length = {"Content-Length": str(len(data)), "Content-Digest": render_content_digest(digest)}
        status, text, wait_s = await self._send_request("PUT", url, headers | length, data)
        outcome = classify_status(status)
        if outcome is UploadOutcome.ACKNOWLEDGED:
            if self._is_receipt_for(text, item, digest):
                return await asyncio.to_thread(self._move_to_sent, item, digest)
            return UploadOutcome.RETRY, "the receiver's receipt names other bytes", wait_s
        words = f"{status} {_parse_detail(text)}".strip()
        if outcome is UploadOutcome.REFUSED:
            return await asyncio.to_thread(self._move_to_refused, item, str(status), words)
        return outcome, words, wait_s

    async def _send_request(
        self, method: str, url: str, headers: Mapping[str, str], data: bytes | None = None
    ) -> tuple[int, bytes, float]:
        """Send a request; return the status, the first bytes of the response, and its Retry-After in seconds."""
        content = _split_body(data) if data is not None else None
        async with self._client.stream(
            method, url, headers=headers, content=content, follow_redirects=False
        ) as response:
            text = b""
            async for piece in response.aiter_raw():
                text += piece
                if len(text) > _MAX_ANSWER_BYTES:
                    break
            return response.status_code, text, parse_retry_after(response.headers)

    def _is_receipt_for(self, text: bytes, item: StoreItem, digest: str) -> bool:
        return parse_receipt(text, item.path.partition("/")[2]) == digest

    def _move_to_sent(self, item: StoreItem, digest: str) -> tuple[UploadOutcome, str, float]:
        """Move an acknowledged bundle to ``sent/``; after a kill in between, it is uploaded again or already moved."""
        source, target = self._outbox / item.path, self._outbox / SENT_FOLDER / item.path
        atomic.make_folder(target.parent)
        atomic.write_atomic(target.with_name(target.name + RECEIPT_SUFFIX), render_receipt(digest, target.name))
        atomic.move(source, target)
        atomic.remove(source.with_name(source.name + RECEIPT_SUFFIX))
        return UploadOutcome.ACKNOWLEDGED, "sent", 0.0

    def _find_moved(self, item: StoreItem) -> tuple[UploadOutcome, str, float]:
        """Return the outcome of a bundle that left the outbox; an earlier attempt may have failed after the move."""
        for folder, outcome in ((SENT_FOLDER, UploadOutcome.ACKNOWLEDGED), (REFUSED_FOLDER, UploadOutcome.REFUSED)):
            if (self._outbox / folder / item.path).exists():
                atomic.remove(self._outbox / (item.path + RECEIPT_SUFFIX))
                return outcome, folder, 0.0
        return UploadOutcome.REMOVED, "it was removed", 0.0

    def _move_to_refused(self, item: StoreItem, code: str, words: str) -> tuple[UploadOutcome, str, float]:
        """Move a refused bundle to ``refused/``, its reason and its receipt first."""
        source, target = self._outbox / item.path, self._outbox / REFUSED_FOLDER / item.path
        receipt = source.with_name(source.name + RECEIPT_SUFFIX)
        atomic.make_folder(target.parent)
        reason = json.dumps({"code": code, "detail": words}, indent=1) + "\n"
        atomic.write_atomic(target.with_name(target.name + REASON_SUFFIX), reason.encode())
        if item.receipt is not None:
            with receipt.open(
                "rb"
            ) as file:  # a copy: after a kill here, the original still protects against sending damaged bytes
                atomic.write_atomic(target.with_name(target.name + RECEIPT_SUFFIX), file.read(MAX_RECEIPT_BYTES))
        atomic.move(source, target)
        atomic.remove(receipt)
        return UploadOutcome.REFUSED, words, 0.0


def parse_retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds of a Retry-After header; 0 if it is absent or malformed.

    A date is relative to the response's Date header, because the clocks of the two machines may differ.
    """
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdecimal():
        return min(float(text[:12]), MAX_RETRY_AFTER_S)
    try:
        wait = parsedate_to_datetime(text) - parsedate_to_datetime(headers.get("date", ""))
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(wait.total_seconds(), 0.0), MAX_RETRY_AFTER_S)


async def _split_body(data: bytes) -> AsyncIterator[bytes]:
    """Yield a body in pieces; the client's time-out holds per piece, and a slow line needs longer for the whole."""
    for at in range(0, len(data), _PIECE_BYTES):
        yield data[at : at + _PIECE_BYTES]


def _parse_detail(text: bytes) -> str:
    """Return the reason in a refusal; the server may not be a receiver."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        return str(json.loads(text)["detail"])[:300]
    return text[:80].decode("ascii", "replace").strip()
