"""The questions that one monitor is asked at every tick: each with its own deadline, its own count of losses, its own end.

QEMU answers in the order in which it was asked. So a question is asked only when the one before was answered, or has
used up its patience; and no question is asked again while its former answer is still to come. A late answer is dropped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Any, Final

from phasewatch.errors import VmError
from phasewatch.telemetry.base import AsyncClock

ROUND_DEADLINE_S = 0.3  # of one round: a reading that takes longer belongs to another bin
QUERY_PATIENCE_S = 0.05  # the next question is asked after that long, whether this one was answered or not
ANSWER_OVERDUE_S = 10.0  # an answer that others have overtaken for so long will not come
RETRY_ROUNDS = 4  # after three failures in a row: every two seconds at 2 Hz
QUICK_RETRIES = 3
NOT_ASKED: Final = object()  # the answer of a question that has nothing to ask for now
MAX_FAILURES, MAX_LATE_ANSWERS, MAX_SLOW_ANSWERS = 8, 3, 3  # in a row, until a question is given up


class MonitorQuery:
    """One question.

    Args:
        name: For messages and counts, such as ``query-blockstats``.
        ask: Return the answer.
        limit_s: Give the question up when its answers take longer; None where that does not matter.

    Attributes:
        lost: Rounds in which it gave no reading.
        given_up: Why it is no longer asked; empty while it is.
        answer: Of this round; None where there is none.
    """

    def __init__(self, name: str, ask: Callable[[], Awaitable[Any]], *, limit_s: float | None = None) -> None:
        self.name, self._ask, self.limit_s = name, ask, limit_s
        self.lost, self.given_up = 0, ""
        self.answer: Any = None
        self.task: asyncio.Task[tuple[Any, int]] | None = None
        self._is_behind = False
        self._asked_ns = self._round_asked = 0
        self._failures = self._late = self._rest = 0
        self._refusal = ""
        self._took_s: deque[float] = deque(maxlen=MAX_SLOW_ANSWERS)

    def start(self, round_: int, clock: AsyncClock, *, is_behind: bool) -> None:
        """Ask, unless an answer is still to come, the question rests after failures, or it was given up.

        Args:
            round_: Number of the round.
            clock: Measures how long the answer takes.
            is_behind: Whether QEMU has still to answer another question before.
        """
        self.answer = None
        self.collect(round_)  # the late answer to an earlier round
        if self.given_up or self.task is not None:
            return
        if self._rest > 0:
            self._rest -= 1
            return
        self._asked_ns, self._round_asked, self._is_behind = clock.mono_ns(), round_, is_behind
        self.task = asyncio.ensure_future(_ask_timed(self._ask, clock))

    def is_asked_in(self, round_: int) -> bool:
        """Return whether it was last asked in this round."""
        return self._round_asked == round_

    def collect(self, round_: int) -> None:
        """Store the answer, if it came; drop one to an earlier round."""
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
        """Count what this round came to.

        Args:
            round_: Number of the round.
            clock: Says how long an answer is waited for.
            is_answered: Whether any question was answered in this round.
        """
        self.lost += self.answer is None
        refusal, self._refusal = self._refusal, ""
        if refusal and is_answered:  # else the monitor as a whole fails, and no question is to blame
            self._fail(refusal)
        if self.task is None and self._round_asked != round_ and not is_answered:
            self._late = 0  # QEMU is no faster without this question: it is not to blame
        if is_answered and self.task is not None and clock.mono_ns() - self._asked_ns > ANSWER_OVERDUE_S * 1e9:
            self.abandon()
            self._is_behind = False
            self._fail_late(ANSWER_OVERDUE_S)

    def refuse(self, why: str) -> None:
        """Count this round's answer as none: it has another shape than expected."""
        self.answer = None
        self.lost += 1
        self._fail(why)

    def give_up(self, why: str) -> None:
        """Never ask again."""
        self.given_up = why

    def revive(self) -> None:
        """Reset the question, unless it was too slow: the machine or the connection is another one now."""
        if self.limit_s is None:
            self.given_up = ""
        self._failures = self._late = self._rest = 0

    def _check_limit(self, took_s: float, limit_s: float) -> None:
        self._took_s.append(took_s)
        best_s = min(self._took_s)
        if len(self._took_s) == MAX_SLOW_ANSWERS and best_s > limit_s:
            self.give_up(
                f"{MAX_SLOW_ANSWERS} answers in a row took {best_s * 1e3:.1f} ms or more (limit {limit_s * 1e3:g} ms)"
            )

    def _fail(self, why: str) -> None:
        self._failures += 1
        if self._failures >= QUICK_RETRIES:
            self._rest = RETRY_ROUNDS - 1
        if self._failures >= MAX_FAILURES:
            self.give_up(f"it failed {self._failures} times in a row: {why}")

    def _fail_late(self, took_s: float) -> None:
        if self._is_behind:
            return  # it only waited for the answer to another
        self._late += 1
        self._rest = RETRY_ROUNDS - 1
        if self.limit_s is not None:
            self.give_up(f"an answer took {took_s * 1e3:.0f} ms (limit {self.limit_s * 1e3:g} ms)")
        elif self._late >= MAX_LATE_ANSWERS:
            self.give_up(f"{self._late} answers in a row came too late (the last took {took_s:.1f} s)")

    def abandon(self) -> None:
        """Wait for no answer any more."""
        if self.task is not None:
            self.task.cancel()
            self.task = None


async def _ask_timed(ask: Callable[[], Awaitable[Any]], clock: AsyncClock) -> tuple[Any, int]:
    """Return the answer or QEMU's refusal, and when it came."""
    try:
        answer = await ask()
    except (VmError, KeyError, TypeError, ValueError) as exc:  # refused, or an answer of another shape
        answer = exc
    return answer, clock.mono_ns()


class QueryRound:
    """Asks some questions once a tick, in order."""

    def __init__(
        self, questions: Sequence[MonitorQuery], clock: AsyncClock, *, deadline_s: float = ROUND_DEADLINE_S
    ) -> None:
        self.questions = list(questions)
        self._clock, self._deadline_s = clock, deadline_s
        self._round = 0
        self._said: set[str] = set()
        self._notes: list[str] = []

    async def ask(self) -> bool:
        """Send all questions; return whether any was answered. The answers stand in the questions."""
        self._round += 1
        await asyncio.sleep(0)  # late answers come in
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._deadline_s
        patience_s = min(QUERY_PATIENCE_S, self._deadline_s / (len(self.questions) + 1))
        for question in self.questions:
            is_behind = any(other.task is not None for other in self.questions if other is not question)
            question.start(self._round, self._clock, is_behind=is_behind)
            await self._wait([question], min(loop.time() + patience_s, end_s))
        await self._wait(self.questions, end_s)
        is_answered = any(question.answer not in (None, NOT_ASKED) for question in self.questions)
        for question in self.questions:
            question.end_round(self._round, self._clock, is_answered=is_answered)
            if question.given_up and question.name not in self._said:
                self._said.add(question.name)
                self._notes.append(f"{question.name} is not asked any more: {question.given_up}")
        return is_answered

    async def _wait(self, questions: Sequence[MonitorQuery], end_s: float) -> None:
        """Wait for the answers to what was asked in this round, until `end_s` of the loop's time."""
        loop = asyncio.get_running_loop()
        for turn in count():  # whoever is late himself grants one turn all the same
            for question in questions:
                if question.is_asked_in(self._round):
                    question.collect(self._round)
            tasks = [q.task for q in questions if q.task is not None and q.is_asked_in(self._round)]
            left_s = end_s - loop.time()
            if not tasks or (left_s <= 0 and turn):
                return
            await asyncio.wait(tasks, timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED)

    def revive(self) -> None:
        """Resume what was given up, except what was too slow."""
        for question in self.questions:
            question.revive()
            if not question.given_up:
                self._said.discard(question.name)

    def pop_notes(self) -> list[str]:
        """Return what people must know since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def remove(self, question: MonitorQuery) -> None:
        """Stop asking one of them, without a message."""
        question.abandon()
        self.questions.remove(question)

    async def close(self) -> None:
        """Stop waiting for answers."""
        for question in self.questions:
            question.abandon()
        await asyncio.sleep(0)  # they end before the loop does
