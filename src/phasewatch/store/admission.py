"""Who looks at what arrives: a function handed in judges bundles a few at a time, beside the receiver's own work."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

_AT_ONCE = 8  # bundles held in memory for judging
_AT_ONCE_PER_HOST = 4
_JUDGES = 2  # batches at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A bundle that came, and what its sender says it is."""

    host_id: str
    episode_id: str
    sha256: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
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


Judge = Callable[[Sequence[Arrival]], Iterable[Judgement]]  # in the arrivals' order; what hangs or dies is its to name


class Gate:
    """Collects what waits to be judged, so that one start of the judge serves all of a host that came meanwhile.

    Hosts take turns: a host has at most half of the places and one batch at a time, so that its bundles, however slow to
    judge, hold up nobody else's.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._waiting: dict[
            str, list[tuple[Arrival, asyncio.Future[Judgement]]]
        ] = {}  # by host, who waits longest first
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._host_places: dict[str, tuple[asyncio.Semaphore, int]] = {}  # and how many hold or wait for one
        self._working: dict[str, asyncio.Task[None]] = {}

    @property
    def waiting(self) -> int:
        """How many bundles wait for a judge to be free."""
        return sum(map(len, self._waiting.values()))

    async def judge(self, host_id: str, arrive: Callable[[], Arrival]) -> Judgement:
        """Judge one bundle of a host; it is read when its turn has come.

        Raises:
            Exception: What the judge raised.
        """
        async with self._host_place(host_id), self._places:
            arrival = await asyncio.to_thread(arrive)
            answer: asyncio.Future[Judgement] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(host_id, []).append((arrival, answer))
            self._start()
            return await answer

    @asynccontextmanager
    async def _host_place(self, host_id: str) -> AsyncIterator[None]:
        places, users = self._host_places.get(host_id, (asyncio.Semaphore(_AT_ONCE_PER_HOST), 0))
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

    def _start(self) -> None:
        """Begin batches while judges are free."""
        for host_id in [each for each in self._waiting if each not in self._working]:
            if len(self._working) >= _JUDGES:
                return
            batch = self._waiting.pop(host_id)
            task = asyncio.create_task(self._work(batch))
            self._working[host_id] = task
            task.add_done_callback(partial(self._go_on, host_id))

    def _go_on(self, host_id: str, task: asyncio.Task[None]) -> None:
        del self._working[host_id]
        if not task.cancelled():
            self._start()

    async def _work(self, batch: Sequence[tuple[Arrival, asyncio.Future[Judgement]]]) -> None:
        """Judge a batch; whoever went away meanwhile is passed over, and the others get their answers."""
        loop = asyncio.get_running_loop()
        answers = [answer for _, answer in batch]

        def work() -> None:
            judgements = self._judge([arrival for arrival, _ in batch])
            for answer, judgement in zip(answers, judgements, strict=True):
                loop.call_soon_threadsafe(_answer, answer, judgement)

        try:
            await asyncio.to_thread(work)
        except Exception as exc:
            for answer in answers:
                if not answer.done():
                    answer.set_exception(exc)


def _answer(answer: asyncio.Future[Judgement], judgement: Judgement) -> None:
    if not answer.done():  # its upload may have been cancelled
        answer.set_result(judgement)
