"""A queue to a receiver that is down for an hour: bounded, retried with back-off, counted, and said twice."""

from __future__ import annotations

import asyncio

import pytest

from phasewatch.alarms.delivery import DeliveryFailure, DeliveryQueue, RetryPolicy, compute_pause_s

POLICY = RetryPolicy(size=10, first_pause_s=1.0, longest_pause_s=60.0, flush_s=0.2)


class Receiver:
    """Yields items from a time on, by a clock that the queue's own sleeps advance."""

    def __init__(self, down_s: float = 0.0) -> None:
        self.now_s, self.down_s = 0.0, down_s
        self.taken: list[int] = []
        self.attempts_s: list[float] = []
        self.on_sleep = lambda: None

    async def send(self, item: int) -> None:
        self.attempts_s.append(self.now_s)
        if self.now_s < self.down_s:
            raise DeliveryFailure("connection refused")
        self.taken.append(item)

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.on_sleep()
        await asyncio.sleep(0)


def deliver(receiver: Receiver, items: range) -> DeliveryQueue[int]:
    async def main() -> DeliveryQueue[int]:
        queue: DeliveryQueue[int] = DeliveryQueue("test", receiver.send, policy=POLICY, sleep=receiver.sleep)
        for item in items:
            queue.put(item)
        await queue.close()
        return queue

    return asyncio.run(main())


def test_items_arrive_in_order() -> None:
    receiver = Receiver()

    queue = deliver(receiver, range(5))

    assert receiver.taken == [0, 1, 2, 3, 4]
    assert (queue.sent, queue.lost, queue.backlog) == (5, 0, 0)


def test_a_receiver_that_is_down_for_an_hour_gets_the_newest_items_afterwards(
    caplog: pytest.LogCaptureFixture,
) -> None:
    receiver = Receiver(down_s=3600)

    queue = deliver(receiver, range(25))

    assert receiver.taken == list(range(15, 25))
    assert (queue.sent, queue.lost) == (10, 15)
    assert 60 < len(receiver.attempts_s) < 90  # one a minute
    assert len(caplog.records) == 2


def test_items_that_come_while_the_receiver_is_down_push_out_the_one_that_is_retried() -> None:
    async def main() -> tuple[Receiver, DeliveryQueue[int]]:
        receiver = Receiver(down_s=100)
        queue: DeliveryQueue[int] = DeliveryQueue("test", receiver.send, policy=POLICY, sleep=receiver.sleep)
        numbers = iter(range(1, 1000))

        def come() -> None:
            if receiver.now_s < 100:
                for _ in range(4):
                    queue.put(next(numbers))

        receiver.on_sleep = come
        queue.put(0)
        while receiver.now_s < 100:
            await asyncio.sleep(0)
        await queue.close()
        return receiver, queue

    receiver, queue = asyncio.run(main())

    assert 0 < len(receiver.taken) <= POLICY.size
    assert receiver.taken == sorted(receiver.taken)
    assert 0 not in receiver.taken
    assert queue.sent == len(receiver.taken)


def test_what_is_left_at_the_end_is_counted() -> None:
    class Hanging(Receiver):
        async def send(self, item: int) -> None:
            await asyncio.Event().wait()

    queue = deliver(Hanging(), range(7))

    assert (queue.sent, queue.lost, queue.backlog) == (0, 7, 0)


def test_a_queue_that_is_closed_counts_what_still_comes() -> None:
    async def main() -> DeliveryQueue[int]:
        queue: DeliveryQueue[int] = DeliveryQueue("test", Receiver().send, policy=POLICY)
        await queue.close()
        queue.put(1)
        return queue

    assert asyncio.run(main()).lost == 1


def test_pauses_double_up_to_the_longest() -> None:
    assert [compute_pause_s(n, POLICY) for n in (1, 2, 3, 6, 7, 10_000)] == [1.0, 2.0, 4.0, 32.0, 60.0, 60.0]
