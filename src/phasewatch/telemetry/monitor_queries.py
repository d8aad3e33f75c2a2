"""Send several queries to one QEMU monitor at every tick, so that a slow or failing query costs only its own fields.

QEMU answers commands in order. The queries that are plain commands are sent in one write, and each is timed from the
answer before its own. The others follow one by one: each is sent only after the one before was answered, or has waited
for `_QUERY_PATIENCE_S`. No query is sent again while its last answer is outstanding. A late answer is dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from typing import Any, Final, Protocol

from phasewatch.errors import VmError
from phasewatch.telemetry.base import AsyncClock
from phasewatch.telemetry.qmp_connection import AnswerWaiter, MonitorCommand, PendingAnswer

__all__ = ["ANSWER_OVERDUE_S", "NOT_ASKED", "RETRY_ROUNDS", "ROUND_DEADLINE_S", "MonitorQuery", "QueryRound"]

ROUND_DEADLINE_S = 0.3  # of one round: a reading that takes longer belongs to another bin
ANSWER_OVERDUE_S = 10.0  # an answer that is still outstanding after this time will not come
RETRY_ROUNDS = 4  # rounds between two attempts after three failures in a row: 2 s at 2 Hz
NOT_ASKED: Final = object()  # answer of a query that has nothing to ask for now
_QUERY_PATIENCE_S = 0.05  # the next query is sent after this time, even without an answer
_QUICK_RETRIES = 3
_MAX_FAILURES, _MAX_LATE_ANSWERS, _MAX_SLOW_ANSWERS = 8, 3, 3  # in a row, until a query is given up


_ASK_ERRORS = (VmError, KeyError, TypeError, ValueError)  # refused, or an answer of an unknown shape


class _CommandPoster(Protocol):
    def __call__(self, commands: Sequence[MonitorCommand], waiter: AnswerWaiter) -> Sequence[PendingAnswer]: ...


class _OutstandingAsk(Protocol):
    """A query that was sent: by its own coroutine, or as some commands."""

    def done(self) -> bool: ...

    def cancel(self) -> object: ...

    def get_future(self) -> asyncio.Future[Any]:
        """Return a future that is done when the query is."""

    def result(self) -> tuple[Any, int]:
        """Return the answer, or the error in its place, and its monotonic time (ns)."""


class _AskTask:
    """A query that its own coroutine asks."""

    def __init__(self, ask: Callable[[], Awaitable[Any]], clock: AsyncClock) -> None:
        self._task = asyncio.ensure_future(_ask_timed(ask, clock))
        self.done, self.cancel, self.result = self._task.done, self._task.cancel, self._task.result

    def get_future(self) -> asyncio.Future[Any]:
        return self._task


class _PostedCommands:
    """The commands of one query, sent together with those of others."""

    def __init__(self, combine: Callable[[Sequence[PendingAnswer]], Any]) -> None:
        self._combine = combine
        self._future: asyncio.Future[None] | None = None
        self.answers: Sequence[PendingAnswer] = ()

    def done(self) -> bool:
        return all(answer.is_done for answer in self.answers)

    def cancel(self) -> None:
        """Ignore the answers, which cannot be called back."""

    def get_future(self) -> asyncio.Future[None]:
        if self._future is None:
            self._future = asyncio.get_running_loop().create_future()
        self.wake()
        return self._future

    def wake(self) -> None:
        """Complete the future, if somebody waits for it and every answer has come."""
        if self._future is not None and not self._future.done() and self.done():
            self._future.set_result(None)

    @property
    def done_ns(self) -> int:
        """Monotonic time of the last answer."""
        return max(answer.done_ns for answer in self.answers)

    def result(self) -> tuple[Any, int]:
        try:
            return self._combine(self.answers), self.done_ns
        except _ASK_ERRORS as exc:
            return exc, self.done_ns


def _decode_only(answers: Sequence[PendingAnswer]) -> Any:
    (answer,) = answers
    return answer.decode()


class MonitorQuery:
    """One query that is repeated in every round.

    Args:
        name: Name for messages and counts, such as ``query-blockstats``.
        ask: Sends the query and returns the answer; may raise VmError, KeyError, TypeError or ValueError.
        limit_s: The query is given up when its answers take longer; None if that does not matter.
        list_commands: Returns the commands that are the query, to be sent in one write with those of other queries;
            None if this round needs `ask`.
        combine: Returns the answer from those of the commands; may raise what `ask` may.

    Attributes:
        lost: Rounds without an answer.
        give_up_reason: Why the query is no longer sent, for people; None while it is.
        answer: Answer of this round; None if there is none.
        task: The outstanding query; None if there is none.
    """

    def __init__(
        self,
        name: str,
        ask: Callable[[], Awaitable[Any]],
        *,
        limit_s: float | None = None,
        list_commands: Callable[[], Sequence[MonitorCommand] | None] = lambda: None,
        combine: Callable[[Sequence[PendingAnswer]], Any] = _decode_only,
    ) -> None:
        self.name, self._ask, self.limit_s = name, ask, limit_s
        self._list_commands, self._combine = list_commands, combine
        self.lost = 0
        self.give_up_reason: str | None = None
        self.answer: Any = None
        self.task: _OutstandingAsk | None = None
        self._is_behind = False
        self._asked_ns = self._round_asked = 0
        self._failures = self._late = self._rest = 0
        self._refusal = ""
        self._took_s: deque[float] = deque(maxlen=_MAX_SLOW_ANSWERS)

    def prepare(self, round_: int) -> tuple[bool, Sequence[MonitorCommand]]:
        """Forget the answer of the round before; return whether the query is due, and its commands if it has any.

        It is not due while an answer is outstanding, while it pauses after failures, and after it was given up.
        """
        self.answer = None
        self.collect(round_)  # the late answer to an earlier round
        if self.give_up_reason is not None or self.task is not None:
            return False, ()
        if self._rest > 0:
            self._rest -= 1
            return False, ()
        return True, self._list_commands() or ()

    def start(self, round_: int, clock: AsyncClock, *, is_behind: bool) -> None:
        """Send the query by `ask`.

        Args:
            round_: Number of the round.
            clock: Measures how long the answer takes.
            is_behind: Whether QEMU must answer another query before this one.
        """
        self._asked_ns, self._round_asked, self._is_behind = clock.mono_ns(), round_, is_behind
        self.task = _AskTask(self._ask, clock)

    def start_commands(self, round_: int, clock: AsyncClock) -> _PostedCommands:
        """Note that the commands are being sent, and return what receives their answers."""
        self._asked_ns, self._round_asked, self._is_behind = clock.mono_ns(), round_, False
        posted = self.task = _PostedCommands(self._combine)
        return posted

    def begin_timing(self, asked_ns: int, *, is_behind: bool) -> None:
        """Time the answer from when QEMU came to this query.

        Args:
            asked_ns: Monotonic time of the answer to the query before.
            is_behind: Whether that has not come yet.
        """
        self._asked_ns, self._is_behind = max(self._asked_ns, asked_ns), is_behind

    def fail_to_send(self, reason: str) -> None:
        """Note that the commands could not be sent."""
        self.task, self._refusal = None, reason

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
    except _ASK_ERRORS as exc:
        answer = exc
    return answer, clock.mono_ns()


class QueryRound:
    """Sends several queries once a tick, in order.

    Args:
        queries: The queries.
        clock: Clock of the host.
        deadline_s: Deadline of one round.
        post: Sends commands in one write; only needed for queries with commands.
    """

    def __init__(
        self,
        queries: Sequence[MonitorQuery],
        clock: AsyncClock,
        *,
        deadline_s: float = ROUND_DEADLINE_S,
        post: _CommandPoster | None = None,
    ) -> None:
        self.queries = list(queries)
        self._clock, self._deadline_s, self._post = clock, deadline_s, post
        self._round = 0
        self._posted: list[tuple[MonitorQuery, _PostedCommands]] = []
        self._is_behind_earlier = False
        self._reported: set[str] = set()
        self._notes: list[str] = []

    async def ask(self) -> bool:
        """Send all queries; return whether any was answered. Each query holds its answer."""
        self._round += 1
        self._posted = []
        if any(query.task is not None for query in self.queries):
            await asyncio.sleep(0)  # lets late answers arrive
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._deadline_s
        patience_s = min(_QUERY_PATIENCE_S, self._deadline_s / (len(self.queries) + 1))
        due = [(query, *query.prepare(self._round)) for query in self.queries]
        if self._post is not None and any(commands for _, _, commands in due):
            posted = {query: commands for query, _, commands in due if commands}
            await self._ask_at_once(posted, self._post, min(loop.time() + patience_s * len(posted), end_s))
        for query, is_due, commands in due:
            if is_due and not (commands and self._post):
                is_behind = any(other.task is not None for other in self.queries if other is not query)
                query.start(self._round, self._clock, is_behind=is_behind)
                await self._wait([query], min(loop.time() + patience_s, end_s))
        if any(query.task is not None and query.is_asked_in(self._round) for query in self.queries):
            await self._wait(self.queries, end_s)
            self._time_posted()
        is_answered = any(query.answer not in (None, NOT_ASKED) for query in self.queries)
        for query in self.queries:
            query.end_round(self._round, self._clock, is_answered=is_answered)
            if query.give_up_reason is not None and query.name not in self._reported:
                self._reported.add(query.name)
                self._notes.append(f"{query.name} is no longer read: {query.give_up_reason}")
        return is_answered

    async def _ask_at_once(
        self, posted: Mapping[MonitorQuery, Sequence[MonitorCommand]], post: _CommandPoster, end_s: float
    ) -> None:
        """Send the commands of several queries in one write, and wait for the answers."""
        earlier = [query for query in self.queries if query.task is not None]
        groups = [
            (query, query.start_commands(self._round, self._clock), commands) for query, commands in posted.items()
        ]
        commands = [command for _, _, own in groups for command in own]
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        left = len(commands)

        def finish() -> None:
            if not done.done():
                done.set_result(None)

        def take(answer: PendingAnswer) -> None:
            nonlocal left
            left -= 1
            answer.done_ns = self._clock.mono_ns()
            for _, group, _ in groups:
                group.wake()
            if not left:
                finish()

        try:
            answers = post(commands, take)
        except VmError as exc:
            for query, _, _ in groups:
                query.fail_to_send(str(exc))
            return
        at = 0
        for _, group, own in groups:
            group.answers = answers[at : at + len(own)]
            at += len(own)
        if left:
            deadline = loop.call_at(end_s, finish)
            try:
                await done
            finally:
                deadline.cancel()
        self._posted = [(query, group) for query, group, _ in groups]
        self._is_behind_earlier = any(query.task is not None and not query.task.done() for query in earlier)
        self._time_posted()
        for query, _ in self._posted:
            query.collect(self._round)

    def _time_posted(self) -> None:
        """Time each posted query from the answer before its own; one that still waits for that is behind."""
        before_ns, is_behind = 0, self._is_behind_earlier
        for query, group in self._posted:
            query.begin_timing(before_ns, is_behind=is_behind)
            if not group.done():
                is_behind = True
            elif not is_behind:
                before_ns = max(before_ns, group.done_ns)

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
            await asyncio.wait(
                [task.get_future() for task in tasks], timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED
            )

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
