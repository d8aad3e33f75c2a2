"""Who looks at what arrives: a function handed in judges bundles a few at a time, beside the receiver's own work."""

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

_MAX_HELD_BUNDLES = 8  # bundles held in memory for judging
_MAX_HELD_BUNDLES_PER_HOST = 4
_MAX_BATCHES = 2  # batches at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleArrival:
    """A bundle that came, and what its sender says it is."""

    host_id: str
    episode_id: str
    sha256: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionVerdict:
    """What is said of a bundle on its arrival.

    Attributes:
        status: ``accepted``, ``degraded``, ``rejected`` or ``errored``.
        reasons: Codes, worst first.
        detail: The worst one's place and words.
        telemetry_sha256: Of all its rows without their stamps, so that a copy is known; empty if it could not be read.
    """

    status: str
    reasons: tuple[str, ...]
    detail: str
    telemetry_sha256: str = ""

    def render(self, *, digest: str) -> bytes:
        """Spell it as the file that stands beside the bundle."""
        said = {"status": self.status, "reasons": list(self.reasons), "detail": self.detail, "sha256": digest}
        if self.telemetry_sha256:
            said["telemetry_sha256"] = self.telemetry_sha256
        return (json.dumps(said, indent=1, sort_keys=True) + "\n").encode()


CheckArrivals = Callable[
    [Sequence[BundleArrival]], Iterable[AdmissionVerdict]
]  # in the arrivals' order; what hangs or dies is its to name


class AdmissionQueue:
    """Collects what waits to be judged, so that one start of the judge serves all of a host that came meanwhile.

    Hosts take turns: a host has at most half of the places and one batch at a time, so that its bundles, however slow to
    judge, hold up nobody else's.
    """

    def __init__(self, judge: CheckArrivals) -> None:
        self._check_arrivals = judge
        self._waiting: dict[
            str, list[tuple[BundleArrival, asyncio.Future[AdmissionVerdict]]]
        ] = {}  # by host, who waits longest first
        self._places = asyncio.Semaphore(_MAX_HELD_BUNDLES)
        self._host_places: dict[str, tuple[asyncio.Semaphore, int]] = {}  # and how many hold or wait for one
        self._working: dict[str, asyncio.Task[None]] = {}

    @property
    def waiting(self) -> int:
        """How many bundles wait for a judge to be free."""
        return sum(map(len, self._waiting.values()))

    async def check_bundle(self, host_id: str, arrive: Callable[[], BundleArrival]) -> AdmissionVerdict:
        """Judge one bundle of a host; it is read when its turn has come.

        Raises:
            Exception: What the judge raised.
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
        """Begin batches while judges are free."""
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
        """Judge a batch; whoever went away meanwhile is passed over, and the others get their answers."""
        loop = asyncio.get_running_loop()
        answers = [answer for _, answer in batch]

        def work() -> None:
            judgements = self._check_arrivals([arrival for arrival, _ in batch])
            for answer, judgement in zip(answers, judgements, strict=True):
                loop.call_soon_threadsafe(_set_result, answer, judgement)

        try:
            await asyncio.to_thread(work)
        except Exception as exc:
            for answer in answers:
                if not answer.done():
                    answer.set_exception(exc)


def _set_result(answer: asyncio.Future[AdmissionVerdict], judgement: AdmissionVerdict) -> None:
    if not answer.done():  # its upload may have been cancelled
        answer.set_result(judgement)


class ArrivalValidator:
    """Judges bundles in their order, as a sweep would, and refuses telemetry that another one brought before.

    What came before is known from the words that stand beside the bundles of the store, and from this process's own. A
    bundle that came before admission was turned on is not known; the next sweep finds its copies.
    """

    def __init__(self, store: BundleStore) -> None:
        """Set up; the store is read when the first bundle comes."""
        self._store = store
        self._reading = threading.Lock()  # batches of two hosts are judged side by side
        self._first_owner: dict[str, str] | None = None  # telemetry → host/episode that brought it first

    def __call__(self, arrivals: Sequence[BundleArrival]) -> Iterator[AdmissionVerdict]:
        """Judge some bundles; see `store.admission.Judge`."""
        first = self._load_first_owners()
        for arrival, judgement in zip(arrivals, validate_arrivals(arrivals), strict=True):
            name = f"{arrival.host_id}/{arrival.episode_id}"
            if judgement.status not in USABLE_STATUSES or not judgement.telemetry_sha256:
                yield judgement
                continue
            owner = first.setdefault(judgement.telemetry_sha256, name)
            yield judgement if owner == name else _reject_duplicate(judgement, name, owner)

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
                said = json.loads(text)
                if said["status"] in USABLE_STATUSES and said["sha256"] == item.receipt and said["telemetry_sha256"]:
                    first.setdefault(str(said["telemetry_sha256"]), f"{item.host_id}/{item.episode_id}")
        return first


def validate_arrivals(arrivals: Sequence[BundleArrival]) -> Iterator[AdmissionVerdict]:
    """Judge bundles in their order, as a sweep would, each by itself; `ArrivalValidator` also finds copies."""
    workers = min(2, len(arrivals))
    for arrival, result in zip(
        arrivals, map_ordered(_validate_arrival, arrivals, workers=workers, timeout_s=BUNDLE_TIMEOUT_S), strict=True
    ):
        if result.value is not None:
            yield result.value
        else:
            yield _build_judgement(
                build_unreadable_verdict(_build_location(arrival), "worker-lost", result.error or "", len(arrival.data))
            )


def _validate_arrival(arrival: BundleArrival) -> AdmissionVerdict:
    """Judge one bundle; runs in a worker."""
    return _build_judgement(validate_bundle(arrival.data, _build_location(arrival)).verdict)


def _build_judgement(verdict: BundleVerdict) -> AdmissionVerdict:
    return AdmissionVerdict(
        status=str(verdict.status), reasons=verdict.reasons, detail=verdict.detail,
        telemetry_sha256=verdict.telemetry_sha256,
    )  # fmt: skip


def _reject_duplicate(judgement: AdmissionVerdict, name: str, owner: str) -> AdmissionVerdict:
    """Reject the newcomer. Its labels are not held against the owner's: the sweep does that, which has both."""
    is_foreign = name.partition("/")[0] != owner.partition("/")[0]
    codes = (CONTESTED_CODE, DUPLICATE_CODE) if is_foreign else (DUPLICATE_CODE,)
    words = f"{name}{BUNDLE_SUFFIX}: the same telemetry as {owner}" + (", under another host" if is_foreign else "")
    reasons = (*codes, *(code for code in judgement.reasons if code not in codes))
    return AdmissionVerdict(
        status=str(BundleStatus.REJECTED), reasons=reasons, detail=f"{words}; that one came before",
        telemetry_sha256=judgement.telemetry_sha256,
    )  # fmt: skip


def _build_location(arrival: BundleArrival) -> BundleLocation:
    path = f"{arrival.host_id}/{arrival.episode_id}{BUNDLE_SUFFIX}"
    return BundleLocation(
        path=path,
        host_id=HostId(arrival.host_id),
        episode_id=EpisodeId(arrival.episode_id),
        receipt=arrival.sha256,
    )
