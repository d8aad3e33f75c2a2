"""Judging bundles on their arrival, each in a process that a hostile one can only take with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from phasewatch.store.admission import Arrival, Judgement
from phasewatch.store.disk import SUFFIX
from phasewatch.validate.sweep import BUNDLE_TIMEOUT_S
from phasewatch.validate.verdict import Place, examine, unreadable
from phasewatch.vocab import EpisodeId, HostId
from phasewatch.workers import map_ordered


def judge(arrivals: Sequence[Arrival]) -> Iterator[Judgement]:
    """Judge bundles in their order, as a sweep would; copies are the sweep's to find, which sees all."""
    workers = min(2, len(arrivals))
    for arrival, result in zip(
        arrivals, map_ordered(judge_one, arrivals, workers=workers, timeout_s=BUNDLE_TIMEOUT_S), strict=True
    ):
        if result.value is not None:
            yield result.value
        else:
            lost = unreadable(_place(arrival), "worker-lost", result.error or "", len(arrival.data))
            yield Judgement(status=str(lost.status), reasons=lost.reasons, detail=lost.detail)


def judge_one(arrival: Arrival) -> Judgement:
    """Judge one bundle; runs in a worker."""
    verdict = examine(arrival.data, _place(arrival)).verdict
    return Judgement(status=str(verdict.status), reasons=verdict.reasons, detail=verdict.detail)


def _place(arrival: Arrival) -> Place:
    path = f"{arrival.host_id}/{arrival.episode_id}{SUFFIX}"
    return Place(
        path=path,
        host_id=HostId(arrival.host_id),
        episode_id=EpisodeId(arrival.episode_id),
        receipt=arrival.sha256,
    )
