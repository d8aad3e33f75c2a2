"""Send several queries to one QEMU monitor at every tick, so that a slow or failing query costs only its own fields.

QEMU answers commands in order. So a query is sent only after the one before was answered, or has waited for
`_QUERY_PATIENCE_S`; and no query is sent again while its last answer is outstanding. A late answer is dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Any, Final

from phasewatch.errors import VmError
from phasewatch.telemetry.base import AsyncClock

__all__ = ["ANSWER_OVERDUE_S", "NOT_ASKED", "RETRY_ROUNDS", "ROUND_DEADLINE_S", "MonitorQuery", "QueryRound"]

ROUND_DEADLINE_S = 0.3  # of one round: a reading that takes longer belongs to another bin
ANSWER_OVERDUE_S = 10.0  # an answer that is still outstanding after this time will not come
RETRY_ROUNDS = 4  # rounds between two attempts after three failures in a row: 2 s at 2 Hz
NOT_ASKED: Final = object()  # answer of a query that has nothing to ask for now
_QUERY_PATIENCE_S = 0.05  # the next query is sent after this time, even without an answer
_QUICK_RETRIES = 3
_MAX_FAILURES, _MAX_LATE_ANSWERS, _MAX_SLOW_ANSWERS = 8, 3, 3  # in a row, until a query is given up


class MonitorQuery:
    """One query that is repeated in every round.

    Args:
        name: Name for messages and counts, such as ``query-blockstats``.
        ask: Sends the query and returns the answer; may raise VmError, KeyError, TypeError or ValueError.
        limit_s: The query is given up when its answers take longer; None if that does not matter.

    Attributes:
        lost: Rounds without an answer.
        give_up_reason: Why the query is no longer sent, for people; None while it is.
        answer: Answer of this round; None if there is none.
        task: The outstanding query; None if there is none.
    """

    def __init__(self, name: str, ask: Callable[[], Awaitable[Any]], *, limit_s: float | None = None) -> None:
        self.name, self._ask, self.limit_s = name, ask, limit_s
        self.lost = 0
        self.give_up_reason: str | None = None
        self.answer: Any = None
        self.task: asyncio.Task[tuple[Any, int]] | None = None
        self._is_behind = False
        self._asked_ns = self._round_asked = 0
        self._failures = self._late = self._rest = 0
        self._refusal = ""
        self._took_s: deque[float] = deque(maxlen=_MAX_SLOW_ANSWERS)

    def start(self, round_: int, clock: AsyncClock, *, is_behind: bool) -> None:
        """Send the query, unless an answer is outstanding, it pauses after failures, or it was given up.

        Args:
            round_: Number of the round.
            clock: Measures how long the answer takes.
            is_behind: Whether QEMU must answer another query before this one.
        """
        self.answer = None
        self.collect(round_)  # the late answer to an earlier round
        if self.give_up_reason is not None or self.task is not None:
            return
        if self._rest > 0:
            self._rest -= 1
            return
        self._asked_ns, self._round_asked, self._is_behind = clock.mono_ns(), round_, is_behind
        self.task = asyncio.ensure_future(_ask_timed(self._ask, clock))

    def is_asked_in(self, round_: int) -> bool:
        """Return whether the query was last sent in this round."""
        return self._round_asked == round_

    def collect(self, round_: int) -> None:
        """Store the answer if it arrived; drop an answer to an earlier round."""
        task = self.task
        if task is None or not task.done():
            return
        self.task = None
        answer, done_ns = task.result()
        took_s = (done_ns - self._asked_ns) / 1e9
        if isinstance(answer, Exception):
            self._refusal = str(answer) or type(answer).__name__
        elif self._round_asked != round_:
            self._fail_late(took_s)
        else:
            self.answer, self._failures, self._late = answer, 0, 0
            if self.limit_s is not None and not self._is_behind:
                self._check_limit(took_s, self.limit_s)

    def end_round(self, round_: int, clock: AsyncClock, *, is_answered: bool) -> None:
        """Count the outcome of this round.

        Args:
            round_: Number of the round.
            clock: Measures how long an answer is outstanding.
            is_answered: Whether any query was answered in this round.
        """
        self.lost += self.answer is None
        refusal, self._refusal = self._refusal, ""
        if refusal and is_answered:  # else the whole monitor fails, which is no fault of this query
            self._fail(refusal)
        if self.task is None and self._round_asked != round_ and not is_answered:
            self._late = 0  # QEMU is no faster without this query: it is not the cause
        if is_answered and self.task is not None and clock.mono_ns() - self._asked_ns > ANSWER_OVERDUE_S * 1e9:
            self.abandon()
            self._is_behind = False
            self._fail_late(ANSWER_OVERDUE_S)

    def refuse(self, reason: str) -> None:
        """Count this round as lost, because its answer has an unknown shape."""
        self.answer = None
        self.lost += 1
        self._fail(reason)

    def give_up(self, reason: str) -> None:
        """Stop sending the query."""
        self.give_up_reason = reason

    def revive(self) -> None:
        """Reset the query after a restart of the VM or of the connection; one that was too slow stays given up."""
        if self.limit_s is None:
            self.give_up_reason = None
        self._failures = self._late = self._rest = 0

    def _check_limit(self, took_s: float, limit_s: float) -> None:
        self._took_s.append(took_s)
        best_s = min(self._took_s)
        if len(self._took_s) == _MAX_SLOW_ANSWERS and best_s > limit_s:
            self.give_up(
                f"{_MAX_SLOW_ANSWERS} answers in a row took {best_s * 1e3:.1f} ms or more (limit {limit_s * 1e3:g} ms)"
            )

    def _fail(self, reason: str) -> None:
        self._failures += 1
        if self._failures >= _QUICK_RETRIES:
            self._rest = RETRY_ROUNDS - 1
        if self._failures >= _MAX_FAILURES:
            self.give_up(f"it failed {self._failures} times in a row: {reason}")

    def _fail_late(self, took_s: float) -> None:
        if self._is_behind:
            return  # it only waited for another query's answer
        self._late += 1
        self._rest = RETRY_ROUNDS - 1
        if self.limit_s is not None:
            self.give_up(f"an answer took {took_s * 1e3:.0f} ms (limit {self.limit_s * 1e3:g} ms)")
        elif self._late >= _MAX_LATE_ANSWERS:
            self.give_up(f"{self._late} answers in a row came too late (the last took {took_s:.1f} s)")

    def abandon(self) -> None:
        """Cancel the outstanding query, if any."""
        if self.task is not None:
            self.task.cancel()
            self.task = None


async def _ask_timed(ask: Callable[[], Awaitable[Any]], clock: AsyncClock) -> tuple[Any, int]:
    """Return the answer, or the error in its place, and its monotonic time."""
    try:
        answer = await ask()
    except (VmError, KeyError, TypeError, ValueError) as exc:  # refused, or an answer of an unknown shape
        answer = exc
    return answer, clock.mono_ns()


class QueryRound:
    """Sends several queries once a tick, in order.

    Args:
        queries: The queries.
        clock: Clock of the host.
        deadline_s: Deadline of one round.
    """

    def __init__(
        self, queries: Sequence[MonitorQuery], clock: AsyncClock, *, deadline_s: float = ROUND_DEADLINE_S
    ) -> None:
        self.queries = list(queries)
        self._clock, self._deadline_s = clock, deadline_s
        self._round = 0
        self._reported: set[str] = set()
        self._notes: list[str] = []

    async def ask(self) -> bool:
        """Send all queries; return whether any was answered. Each query holds its answer."""
        self._round += 1
        await asyncio.sleep(0)  # lets late answers arrive
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._deadline_s
        patience_s = min(_QUERY_PATIENCE_S, self._deadline_s / (len(self.queries) + 1))
        for query in self.queries:
            is_behind = any(other.task is not None for other in self.queries if other is not query)
            query.start(self._round, self._clock, is_behind=is_behind)
            await self._wait([query], min(loop.time() + patience_s, end_s))
        await self._wait(self.queries, end_s)
        is_answered = any(query.answer not in (None, NOT_ASKED) for query in self.queries)
        for query in self.queries:
            query.end_round(self._round, self._clock, is_answered=is_answered)
            if query.give_up_reason is not None and query.name not in self._reported:
                self._reported.add(query.name)
                self._notes.append(f"{query.name} is no longer read: {query.give_up_reason}")
        return is_answered

    async def _wait(self, queries: Sequence[MonitorQuery], end_s: float) -> None:
        """Wait for the answers to this round's queries, until `end_s` of the event loop's time."""
        loop = asyncio.get_running_loop()
        for turn in count():  # one turn even if the deadline has passed already
            for query in queries:
                if query.is_asked_in(self._round):
                    query.collect(self._round)
            tasks = [q.task for q in queries if q.task is not None and q.is_asked_in(self._round)]
            left_s = end_s - loop.time()
            if not tasks or (left_s <= 0 and turn):
                return
            await asyncio.wait(tasks, timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)

    def revive(self) -> None:
        """Resume queries that were given up, except those that were too slow."""
        for query in self.queries:
            query.revive()
            if query.give_up_reason is None:
                self._reported.discard(query.name)

    def pop_notes(self) -> list[str]:
        """Return and clear the messages since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def remove(self, query: MonitorQuery) -> None:
        """Remove a query, without a message."""
        query.abandon()
        self.queries.remove(query)

    async def close(self) -> None:
        """Cancel all outstanding queries."""
        for query in self.queries:
            query.abandon()
        await asyncio.sleep(0)  # lets the cancelled tasks end before the event loop does
