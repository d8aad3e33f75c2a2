"""Who looks at what arrives: a function handed in judges bundles a few at a time, beside the receiver's own work."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_AT_ONCE = 4  # bundles held in memory for judging


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
    """Collects what waits to be judged, so that one start of the judge serves all that came meanwhile."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._waiting: list[tuple[Arrival, asyncio.Future[Judgement]]] = []
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._working: asyncio.Task[None] | None = None

    async def judge(self, arrive: Callable[[], Arrival]) -> Judgement:
        """Judge one bundle; it is read when its turn has come.

        Raises:
            Exception: What the judge raised.
        """
        async with self._places:
            arrival = await asyncio.to_thread(arrive)
            answer: asyncio.Future[Judgement] = asyncio.get_running_loop().create_future()
            self._waiting.append((arrival, answer))
            if self._working is None or self._working.done():
                self._working = asyncio.create_task(self._work())
            return await answer

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                said = await asyncio.to_thread(lambda arrivals: list(self._judge(arrivals)), [a for a, _ in batch])
            except Exception as exc:
                for _, answer in batch:
                    answer.set_exception(exc)
                continue
            for (_, answer), judgement in zip(batch, said, strict=True):
                answer.set_result(judgement)
