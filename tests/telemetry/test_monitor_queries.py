"""Queries to one monitor: a slow, silent or refused one affects only itself, and is finally given up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from tests.factories.vms import FakeClock

from phasewatch.errors import VmError
from phasewatch.telemetry.monitor_queries import NOT_ASKED, MonitorQuery, QueryRound
from phasewatch.telemetry.qmp_connection import AnswerWaiter, MonitorCommand, PendingAnswer

DEADLINE_S = 0.05


@dataclass
class FakeAnswers:
    """A fake monitor whose answers a test gives, in any order."""

    clock: FakeClock = field(default_factory=FakeClock)
    waiting: dict[str, list[asyncio.Future[Any]]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    takes_ns: int = 0

    def make_query(self, name: str, **options: Any) -> MonitorQuery:
        async def ask() -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            if name in self.refused:
                raise VmError("refused")
            if name in self.held:
                future = asyncio.get_running_loop().create_future()
                self.waiting.setdefault(name, []).append(future)
                return await future
            self.clock.now_ns += self.takes_ns
            return f"{name} {self.counts[name]}"

        return MonitorQuery(name, ask, **options)

    def answer(self, name: str) -> None:
        self.waiting[name].pop(0).set_result("late")

    def round(self, *names: str, **options: Any) -> QueryRound:
        return QueryRound([self.make_query(name, **options) for name in names], self.clock, deadline_s=DEADLINE_S)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def answers(round_: QueryRound) -> list[Any]:
    return [query.answer for query in round_.queries]


@pytest.mark.parametrize("slow", ["a", "b", "c"])
def test_a_query_without_answer_does_not_affect_others(slow: str) -> None:
    async def main() -> None:
        asked = FakeAnswers(held={slow})
        round_ = asked.round("a", "b", "c")

        assert await round_.ask()
        assert answers(round_) == [None if name == slow else f"{name} 1" for name in "abc"]
        assert [q.lost for q in round_.queries] == [name == slow for name in "abc"]
        await round_.close()

    run(main())


def test_an_outstanding_query_is_not_repeated_and_its_late_answer_is_dropped() -> None:
    async def main() -> None:
        asked = FakeAnswers(held={"a"})
        round_ = asked.round("a", "b")
        for _ in range(3):
            await round_.ask()
        assert asked.counts == {"a": 1, "b": 3}

        asked.held.clear()
        asked.answer("a")
        await round_.ask()  # the late answer is taken in, and belongs to no round
        assert answers(round_)[0] != "late"
        for _ in range(3):
            await round_.ask()

        assert answers(round_) == ["a 2", "b 7"]
        await round_.close()

    run(main())


def test_a_query_that_is_always_late_is_given_up_with_a_note() -> None:
    async def main() -> None:
        asked = FakeAnswers(held={"slow"})
        round_ = asked.round("fast", "slow")
        for _ in range(20):
            await round_.ask()
            if asked.waiting.get("slow"):
                asked.answer("slow")
                await asyncio.sleep(0)

        assert asked.counts["slow"] == 3
        assert asked.counts["fast"] == 20
        assert len(round_.pop_notes()) == 1
        assert round_.pop_notes() == []
        await round_.close()

    run(main())


def test_a_query_behind_a_slow_one_is_not_given_up() -> None:
    async def main() -> None:
        line = asyncio.Lock()  # QEMU: one after the other, in the order in which they came
        done = asyncio.Event()

        async def slow() -> str:
            async with line:
                await done.wait()
                return "slow"

        async def fast() -> str:
            async with line:
                return "fast"

        round_ = QueryRound(
            [MonitorQuery("slow", slow), MonitorQuery("fast", fast)], FakeClock(), deadline_s=DEADLINE_S
        )
        for _ in range(12):
            done.clear()
            await round_.ask()
            done.set()
            await asyncio.sleep(0.001)

        assert round_.queries[0].give_up_reason
        assert not round_.queries[1].give_up_reason
        assert answers(round_) == [None, "fast"]

    run(main())


def test_a_refused_query_is_repeated_less_often_and_finally_given_up() -> None:
    async def main() -> None:
        asked = FakeAnswers(refused={"a"})
        round_ = asked.round("a", "b")
        for _ in range(40):
            await round_.ask()

        assert asked.counts == {"a": 8, "b": 40}
        assert round_.queries[0].lost == 40
        assert len(round_.pop_notes()) == 1

    run(main())


def test_a_query_recovers_from_temporary_refusals() -> None:
    async def main() -> None:
        asked = FakeAnswers(refused={"a"})
        round_ = asked.round("a", "b")
        for _ in range(8):
            await round_.ask()
        asked.refused.clear()
        for _ in range(8):
            await round_.ask()

        assert answers(round_)[0] is not None
        assert round_.pop_notes() == []

    run(main())


@pytest.mark.parametrize("silence", ["refused", "held"])
def test_no_query_is_given_up_while_the_whole_monitor_is_silent(silence: str) -> None:
    async def main() -> None:
        asked = FakeAnswers(**{silence: {"a", "b"}})  # type: ignore[arg-type]
        round_ = asked.round("a", "b")
        for _ in range(25):
            assert not await round_.ask()
            asked.clock.now_ns += 500_000_000
        asked.refused.clear()
        asked.held.clear()
        for waiting in asked.waiting.values():
            waiting.pop().set_result("late")
        for _ in range(5):
            await round_.ask()

        assert None not in answers(round_)
        assert round_.pop_notes() == []

    run(main())


def test_an_overdue_answer_is_abandoned() -> None:
    async def main() -> None:
        asked = FakeAnswers(held={"a"})
        round_ = asked.round("a", "b")
        for _ in range(22):
            await round_.ask()
            asked.clock.now_ns += 500_000_000
        asked.held.clear()
        for _ in range(4):
            await round_.ask()

        assert asked.counts["a"] == 2
        assert answers(round_)[0] == "a 2"

    run(main())


def test_a_query_slower_than_its_limit_is_given_up_for_good() -> None:
    async def main() -> None:
        asked = FakeAnswers(takes_ns=6_000_000)
        round_ = asked.round("a", limit_s=0.005)
        for _ in range(5):
            await round_.ask()
        round_.revive()
        await round_.ask()

        assert asked.counts["a"] == 3
        assert len(round_.pop_notes()) == 1

    run(main())


def test_a_query_with_nothing_to_ask_counts_neither_as_answered_nor_as_lost() -> None:
    async def main() -> None:
        async def ask() -> Any:
            return NOT_ASKED

        round_ = QueryRound([MonitorQuery("none", ask)], FakeClock(), deadline_s=DEADLINE_S)

        assert not await round_.ask()
        assert round_.queries[0].lost == 0

    run(main())


def test_one_late_answer_gives_up_a_query_with_a_limit() -> None:
    async def main() -> None:
        asked = FakeAnswers(held={"a"})
        round_ = asked.round("b", "a", limit_s=0.005)
        await round_.ask()
        asked.answer("a")
        await asyncio.sleep(0)
        await round_.ask()

        assert round_.queries[1].give_up_reason
        assert round_.pop_notes()

    run(main())


class FakeLine:
    """A monitor that answers posted commands in order, as far as a test lets it."""

    def __init__(self) -> None:
        self.writes: list[list[str]] = []
        self.waiting: list[PendingAnswer] = []
        self.held: str | None = None

    def make_query(self, name: str, **options: Any) -> MonitorQuery:
        async def ask() -> Any:
            raise VmError("not asked by itself")

        commands = (MonitorCommand(name),)
        return MonitorQuery(name, ask, list_commands=lambda: commands, **options)

    def post(self, commands: Sequence[MonitorCommand], waiter: AnswerWaiter) -> list[PendingAnswer]:
        self.writes.append([command.name for command in commands])
        answers = [PendingAnswer(command, waiter) for command in commands]
        self.waiting += answers
        self.work()
        return answers

    def work(self) -> None:
        while self.waiting and self.waiting[0].command.name != self.held:
            self.waiting.pop(0).settle(msgspec.Raw(b"1"))

    def round(self, *names: str) -> QueryRound:
        queries = [self.make_query(name) for name in names]
        return QueryRound(queries, FakeClock(), deadline_s=DEADLINE_S, post=self.post)


def test_plain_commands_of_a_round_are_sent_in_one_write() -> None:
    async def main() -> None:
        line = FakeLine()
        round_ = line.round("a", "b", "c")

        assert await round_.ask()
        assert await round_.ask()
        assert line.writes == [["a", "b", "c"]] * 2
        assert answers(round_) == [1, 1, 1]

    run(main())


@pytest.mark.parametrize(("held", "given"), [("a", [None, None, None]), ("b", [1, None, None]), ("c", [1, 1, None])])
def test_a_command_that_hangs_is_given_up_and_those_behind_it_are_not(held: str, given: list[Any]) -> None:
    async def main() -> None:
        line = FakeLine()
        round_ = line.round("a", "b", "c", "d")
        for turn in range(20):
            line.held = held
            await round_.ask()
            if turn == 0:
                assert answers(round_)[:3] == given
            line.held = None
            line.work()

        assert [bool(query.give_up_reason) for query in round_.queries] == [name == held for name in "abcd"]
        await round_.close()

    run(main())


def test_commands_that_cannot_be_sent_are_lost_and_sent_again() -> None:
    async def main() -> None:
        line = FakeLine()
        is_gone = True

        def post(commands: Sequence[MonitorCommand], waiter: AnswerWaiter) -> list[PendingAnswer]:
            if is_gone:
                raise VmError("gone")
            return line.post(commands, waiter)

        round_ = QueryRound([line.make_query("a")], FakeClock(), deadline_s=DEADLINE_S, post=post)
        assert not await round_.ask()
        is_gone = False

        assert await round_.ask()
        assert (answers(round_), round_.queries[0].lost) == ([1], 1)

    run(main())
