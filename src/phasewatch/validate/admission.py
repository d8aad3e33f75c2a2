"""Judging bundles on their arrival, each in a process that a hostile one can only take with it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

from phasewatch.store.admission import Arrival, Judgement
from phasewatch.store.base import Store
from phasewatch.store.disk import SUFFIX
from phasewatch.validate.copies import CONTESTED, DUPLICATE
from phasewatch.validate.sweep import BUNDLE_TIMEOUT_S
from phasewatch.validate.verdict import USABLE, Place, Verdict, examine, unreadable
from phasewatch.vocab import EpisodeId, HostId, Status
from phasewatch.workers import map_ordered


class ArrivalJudge:
    """Judges bundles in their order, as a sweep would, and refuses telemetry that another one brought before.

    What came before is known from the words that stand beside the bundles of the store, and from this process's own. A
    bundle that came before admission was turned on is not known; the next sweep finds its copies.
    """

    def __init__(self, store: Store) -> None:
        """Set up; the store is read when the first bundle comes."""
        self._store = store
        self._reading = threading.Lock()  # batches of two hosts are judged side by side
        self._first: dict[str, str] | None = None  # telemetry → host/episode that brought it first

    def __call__(self, arrivals: Sequence[Arrival]) -> Iterator[Judgement]:
        """Judge some bundles; see `store.admission.Judge`."""
        first = self._brought()
        for arrival, judgement in zip(arrivals, judge(arrivals), strict=True):
            name = f"{arrival.host_id}/{arrival.episode_id}"
            if judgement.status not in USABLE or not judgement.telemetry_sha256:
                yield judgement
                continue
            owner = first.setdefault(judgement.telemetry_sha256, name)
            yield judgement if owner == name else _refuse_copy(judgement, name, owner)

    def _brought(self) -> dict[str, str]:
        with self._reading:
            if self._first is None:
                self._first = self._read_store()
            return self._first

    def _read_store(self) -> dict[str, str]:
        first: dict[str, str] = {}
        for item in self._store.walk():
            text = self._store.read_status(item.host_id, item.episode_id) if item.host_id and item.episode_id else None
            if text is None:
                continue
            with suppress(ValueError, KeyError, TypeError):
                said = json.loads(text)
                if said["status"] in USABLE and said["sha256"] == item.receipt and said["telemetry_sha256"]:
                    first.setdefault(str(said["telemetry_sha256"]), f"{item.host_id}/{item.episode_id}")
        return first


def judge(arrivals: Sequence[Arrival]) -> Iterator[Judgement]:
    """Judge bundles in their order, as a sweep would, each by itself; `ArrivalJudge` also finds copies."""
    workers = min(2, len(arrivals))
    for arrival, result in zip(
        arrivals, map_ordered(judge_one, arrivals, workers=workers, timeout_s=BUNDLE_TIMEOUT_S), strict=True
    ):
        if result.value is not None:
            yield result.value
        else:
            yield _judged(unreadable(_place(arrival), "worker-lost", result.error or "", len(arrival.data)))


def judge_one(arrival: Arrival) -> Judgement:
    """Judge one bundle; runs in a worker."""
    return _judged(examine(arrival.data, _place(arrival)).verdict)


def _judged(verdict: Verdict) -> Judgement:
    return Judgement(
        status=str(verdict.status), reasons=verdict.reasons, detail=verdict.detail,
        telemetry_sha256=verdict.telemetry_sha256,
    )  # fmt: skip


def _refuse_copy(judgement: Judgement, name: str, owner: str) -> Judgement:
    """Reject the newcomer. Its labels are not held against the owner's: the sweep does that, which has both."""
    is_foreign = name.partition("/")[0] != owner.partition("/")[0]
    codes = (CONTESTED, DUPLICATE) if is_foreign else (DUPLICATE,)
    words = f"{name}{SUFFIX}: the same telemetry as {owner}" + (", under another host" if is_foreign else "")
    reasons = (*codes, *(code for code in judgement.reasons if code not in codes))
    return Judgement(
        status=str(Status.REJECTED), reasons=reasons, detail=f"{words}; that one came before",
        telemetry_sha256=judgement.telemetry_sha256,
    )  # fmt: skip


def _place(arrival: Arrival) -> Place:
    path = f"{arrival.host_id}/{arrival.episode_id}{SUFFIX}"
    return Place(
        path=path,
        host_id=HostId(arrival.host_id),
        episode_id=EpisodeId(arrival.episode_id),
        receipt=arrival.sha256,
    )
