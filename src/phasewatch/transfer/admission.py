"""Validate bundles on arrival, a few at a time, beside the work of the receiver."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from phasewatch.parallel.pool import map_ordered
from phasewatch.store.base import BundleStore
from phasewatch.store.local import BUNDLE_SUFFIX
from phasewatch.types import BundleStatus, EpisodeId, HostId
from phasewatch.validate.copies import CONTESTED_CODE, DUPLICATE_CODE
from phasewatch.validate.sweep import BUNDLE_TIMEOUT_S
from phasewatch.validate.verdict import (
    USABLE_STATUSES,
    BundleLocation,
    BundleVerdict,
    build_unreadable_verdict,
    validate_bundle,
)

__all__ = [
    "AdmissionQueue",
    "AdmissionVerdict",
    "ArrivalValidator",
    "BundleArrival",
    "CheckArrivals",
    "validate_arrivals",
]

_MAX_HELD_BUNDLES = 8  # in memory at a time
_MAX_HELD_BUNDLES_PER_HOST = 4
_MAX_BATCHES = 2  # parallel batches


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleArrival:
    """A bundle that arrived, with the ids and the SHA-256 that its sender claims."""

    host_id: str
    episode_id: str
    sha256: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionVerdict:
    """The verdict on a bundle on its arrival.

    Attributes:
        status: ``accepted``, ``degraded``, ``rejected`` or ``errored``.
        reasons: Codes of the findings, worst first.
        detail: Place and text of the worst finding.
        telemetry_sha256: Digest of the readings without stamps, to find copies; empty if the bundle is unreadable.
    """

    status: str
    reasons: tuple[str, ...]
    detail: str
    telemetry_sha256: str = ""

    def render(self, *, digest: str) -> bytes:
        """Return the content of the status file that is stored beside the bundle.

        Args:
            digest: SHA-256 of the bundle, in hex.
        """
        content = {"status": self.status, "reasons": list(self.reasons), "detail": self.detail, "sha256": digest}
        if self.telemetry_sha256:
            content["telemetry_sha256"] = self.telemetry_sha256
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


# Yields the verdicts in the order of the arrivals, also on bundles whose validation hangs or dies.
CheckArrivals = Callable[[Sequence[BundleArrival]], Iterable[AdmissionVerdict]]


class AdmissionQueue:
    """Collects bundles that wait for validation, and validates those of one host in batches.

    A host has at most half of the places and one batch at a time, so that its slow bundles do not delay other hosts.
    """

    def __init__(self, judge: CheckArrivals) -> None:
        self._check_arrivals = judge
        # By host, the host that waits longest first.
        self._waiting: dict[str, list[tuple[BundleArrival, asyncio.Future[AdmissionVerdict]]]] = {}
        self._places = asyncio.Semaphore(_MAX_HELD_BUNDLES)
        self._host_places: dict[str, tuple[asyncio.Semaphore, int]] = {}  # and the number of its users
        self._working: dict[str, asyncio.Task[None]] = {}

    @property
    def waiting(self) -> int:
        """Number of bundles that wait for validation."""
        return sum(map(len, self._waiting.values()))

    async def check_bundle(self, host_id: str, arrive: Callable[[], BundleArrival]) -> AdmissionVerdict:
        """Validate one bundle of a host.

        Args:
            host_id: The host.
            arrive: Reads the bundle; called when it is the bundle's turn.

        Raises:
            Exception: The error of the validation.
        """
        async with self._host_place(host_id), self._places:
            arrival = await asyncio.to_thread(arrive)
            answer: asyncio.Future[AdmissionVerdict] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(host_id, []).append((arrival, answer))
            self._start_batches()
            return await answer

    @asynccontextmanager
    async def _host_place(self, host_id: str) -> AsyncIterator[None]:
        places, users = self._host_places.get(host_id, (asyncio.Semaphore(_MAX_HELD_BUNDLES_PER_HOST), 0))
        self._host_places[host_id] = places, users + 1
        try:
            async with places:
                yield
        finally:
            users = self._host_places[host_id][1] - 1
            if users:
                self._host_places[host_id] = places, users
            else:
                del self._host_places[host_id]

    def _start_batches(self) -> None:
        """Start batches while there are free places."""
        for host_id in [each for each in self._waiting if each not in self._working]:
            if len(self._working) >= _MAX_BATCHES:
                return
            batch = self._waiting.pop(host_id)
            task = asyncio.create_task(self._check_batch(batch))
            self._working[host_id] = task
            task.add_done_callback(partial(self._finish_batch, host_id))

    def _finish_batch(self, host_id: str, task: asyncio.Task[None]) -> None:
        del self._working[host_id]
        if not task.cancelled():
            self._start_batches()

    async def _check_batch(self, batch: Sequence[tuple[BundleArrival, asyncio.Future[AdmissionVerdict]]]) -> None:
        """Validate a batch and set the results of the uploads that still wait."""
        loop = asyncio.get_running_loop()
        answers = [answer for _, answer in batch]

        def work() -> None:
            verdicts = self._check_arrivals([arrival for arrival, _ in batch])
            for answer, verdict in zip(answers, verdicts, strict=True):
                loop.call_soon_threadsafe(_set_result, answer, verdict)

        try:
            await asyncio.to_thread(work)
        except Exception as exc:
            for answer in answers:
                if not answer.done():
                    answer.set_exception(exc)


def _set_result(answer: asyncio.Future[AdmissionVerdict], verdict: AdmissionVerdict) -> None:
    if not answer.done():  # its upload may have been cancelled
        answer.set_result(verdict)


class ArrivalValidator:
    """Validates bundles in their order and rejects telemetry that arrived before with another bundle.

    Earlier telemetry is known from the status files in the store and from this process. Bundles stored without
    validation are not known; the validation of the store finds their copies.
    """

    def __init__(self, store: BundleStore) -> None:
        """Remember the store; its status files are read when the first bundle arrives."""
        self._store = store
        self._reading = threading.Lock()  # batches of two hosts run in parallel
        self._first_owner: dict[str, str] | None = None  # by telemetry digest: host/episode of the first bundle

    def __call__(self, arrivals: Sequence[BundleArrival]) -> Iterator[AdmissionVerdict]:
        """Yield the verdicts on some bundles; see `CheckArrivals`."""
        first = self._load_first_owners()
        for arrival, verdict in zip(arrivals, validate_arrivals(arrivals), strict=True):
            name = f"{arrival.host_id}/{arrival.episode_id}"
            if verdict.status not in USABLE_STATUSES or not verdict.telemetry_sha256:
                yield verdict
                continue
            owner = first.setdefault(verdict.telemetry_sha256, name)
            yield verdict if owner == name else _reject_duplicate(verdict, name, owner)

    def _load_first_owners(self) -> dict[str, str]:
        with self._reading:
            if self._first_owner is None:
                self._first_owner = self._read_store()
            return self._first_owner

    def _read_store(self) -> dict[str, str]:
        first: dict[str, str] = {}
        for item in self._store.walk():
            text = self._store.read_status(item.host_id, item.episode_id) if item.host_id and item.episode_id else None
            if text is None:
                continue
            with suppress(ValueError, KeyError, TypeError):
                status = json.loads(text)
                digest = status["telemetry_sha256"]
                if status["status"] in USABLE_STATUSES and status["sha256"] == item.receipt and digest:
                    first.setdefault(str(digest), f"{item.host_id}/{item.episode_id}")
        return first


def validate_arrivals(arrivals: Sequence[BundleArrival]) -> Iterator[AdmissionVerdict]:
    """Yield the verdicts on bundles in their order, each by itself; `ArrivalValidator` also finds copies."""
    workers = min(2, len(arrivals))
    for arrival, result in zip(
        arrivals, map_ordered(_validate_arrival, arrivals, workers=workers, timeout_s=BUNDLE_TIMEOUT_S), strict=True
    ):
        if result.value is not None:
            yield result.value
        else:
            yield _build_admission_verdict(
                build_unreadable_verdict(_build_location(arrival), "worker-lost", result.error or "", len(arrival.data))
            )


def _validate_arrival(arrival: BundleArrival) -> AdmissionVerdict:
    """Validate one bundle; runs in a worker process."""
    return _build_admission_verdict(validate_bundle(arrival.data, _build_location(arrival)).verdict)


def _build_admission_verdict(verdict: BundleVerdict) -> AdmissionVerdict:
    return AdmissionVerdict(
        status=str(verdict.status),
        reasons=verdict.reasons,
        detail=verdict.detail,
        telemetry_sha256=verdict.telemetry_sha256,
    )


def _reject_duplicate(verdict: AdmissionVerdict, name: str, owner: str) -> AdmissionVerdict:
    """Return the rejection of a later bundle; only the validation of the store compares the labels of both."""
    is_foreign = name.partition("/")[0] != owner.partition("/")[0]
    codes = (CONTESTED_CODE, DUPLICATE_CODE) if is_foreign else (DUPLICATE_CODE,)
    words = f"{name}{BUNDLE_SUFFIX}: the same telemetry as {owner}" + (", under another host" if is_foreign else "")
    reasons = (*codes, *(code for code in verdict.reasons if code not in codes))
    return AdmissionVerdict(
        status=str(BundleStatus.REJECTED),
        reasons=reasons,
        detail=f"{words}; that one came before",
        telemetry_sha256=verdict.telemetry_sha256,
    )


def _build_location(arrival: BundleArrival) -> BundleLocation:
    path = f"{arrival.host_id}/{arrival.episode_id}{BUNDLE_SUFFIX}"
    return BundleLocation(
        path=path,
        host_id=HostId(arrival.host_id),
        episode_id=EpisodeId(arrival.episode_id),
        receipt=arrival.sha256,
    )
