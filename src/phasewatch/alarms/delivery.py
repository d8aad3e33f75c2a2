"""Deliver items to a receiver that may be slow or down: a bounded queue, retries with back-off, and counts."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = [
    "DEFAULT_RETRY_POLICY",
    "DeliveryFailure",
    "DeliveryQueue",
    "OutputCounters",
    "RetryPolicy",
    "compute_pause_s",
]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class DeliveryFailure(Exception):
    """A receiver did not take an item.

    Attributes:
        reason: Why, for a log message.
        is_final: Whether another attempt with the same item is useless, for example because it was refused.
    """

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        self.reason, self.is_final = reason, is_final
        super().__init__(reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How a queue treats failures.

    Attributes:
        size: Items that may wait; if more come, the oldest one is dropped and counted.
        first_pause_s: Pause before the second attempt; it doubles with each further one.
        longest_pause_s: Longest pause.
        flush_s: How long the end waits for queued items.
    """

    size: int = 256
    first_pause_s: float = 0.2
    longest_pause_s: float = 30.0
    flush_s: float = 3.0


DEFAULT_RETRY_POLICY = RetryPolicy()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputCounters:
    """Counts of one output.

    Attributes:
        name: Name of the output, such as ``webhook``.
        sent, lost: Items that were delivered, and that were not and never will be.
        backlog: Items that wait.
        is_failing: Whether the last attempt failed.
    """

    name: str
    sent: int
    lost: int
    backlog: int
    is_failing: bool


def compute_pause_s(n_failures: int, policy: RetryPolicy) -> float:
    """Return the pause after `n_failures` failures in a row.

    >>> [compute_pause_s(n, RetryPolicy()) for n in (1, 2, 3, 100)]
    [0.2, 0.4, 0.8, 30.0]
    """
    return min(policy.longest_pause_s, policy.first_pause_s * 2.0 ** min(n_failures - 1, 60))


class FailureLog:
    """Logs when an output starts to fail and when it works again, and nothing in between.

    Args:
        name: Name of the output.

    Attributes:
        n_failures: Failed attempts in a row after which another one is made.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._reason = ""
        self.n_failures = 0

    @property
    def is_failing(self) -> bool:
        """Whether the last attempt failed."""
        return bool(self._reason)

    def add_failure(self, failure: DeliveryFailure) -> None:
        """Count a failed attempt."""
        if not self._reason:
            then = "the alarm is lost" if failure.is_final else "alarms wait and are sent again"
            logger.warning("%s: delivery fails: %s; %s", self._name, failure.reason, then)
        self._reason = failure.reason or "failed"
        self.n_failures += not failure.is_final

    def add_success(self, *, lost: int) -> None:
        """Count a delivery.

        Args:
            lost: Items lost so far.
        """
        if self._reason:
            logger.warning("%s: delivery works again; %d lost so far", self._name, lost)
        self._reason, self.n_failures = "", 0


class DeliveryQueue(Generic[_T]):
    """Sends items one after the other; an item is retried until it is delivered, refused, or pushed out by newer ones.

    Args:
        name: Name of the output.
        send: Delivers one item, or raises DeliveryFailure.
        policy: Bounds.
        sleep: How to wait; a test passes its own.

    Attributes:
        sent, lost: Items that were delivered, and that were not.
    """

    def __init__(
        self,
        name: str,
        send: Callable[[_T], Awaitable[None]],
        *,
        policy: RetryPolicy = DEFAULT_RETRY_POLICY,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name, self._send, self._policy, self._sleep = name, send, policy, sleep
        self._waiting: deque[_T] = deque()
        self._is_sending = self._is_dropped = self._is_closed = False
        self._wake: asyncio.Event | None = None
        self._idle: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self._failures = FailureLog(name)
        self.sent = self.lost = 0

    def put(self, item: _T) -> None:
        """Queue an item, from the event loop; drop the oldest one if too many wait."""
        if self._is_closed:
            self.lost += 1
            return
        if self._task is None:
            self._wake, self._idle = asyncio.Event(), asyncio.Event()
            self._task = asyncio.create_task(self._run(self._wake, self._idle))
        if self.backlog >= self._policy.size:
            self._drop_oldest()
        self._waiting.append(item)
        if self._wake is not None and self._idle is not None:
            self._idle.clear()
            self._wake.set()

    @property
    def backlog(self) -> int:
        """Number of items that wait or are being sent."""
        return len(self._waiting) + (self._is_sending and not self._is_dropped)

    @property
    def counters(self) -> OutputCounters:
        """The counts so far."""
        return OutputCounters(
            name=self.name,
            sent=self.sent,
            lost=self.lost,
            backlog=self.backlog,
            is_failing=self._failures.is_failing,
        )

    async def close(self) -> None:
        """Wait up to `RetryPolicy.flush_s` for queued items, then stop and count the rest as lost."""
        self._is_closed = True
        if self._task is None or self._idle is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._policy.flush_s):
                await self._idle.wait()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self.lost += self.backlog
        self._waiting.clear()
        self._is_sending = False

    def _drop_oldest(self) -> None:
        """Drop the item that has waited longest; if that is being retried, its retries end."""
        self.lost += 1
        if self._is_sending and not self._is_dropped:
            self._is_dropped = True
        else:
            self._waiting.popleft()

    async def _run(self, wake: asyncio.Event, idle: asyncio.Event) -> None:
        while True:
            if not self._waiting:
                idle.set()
                wake.clear()
                await wake.wait()
                continue
            item = self._waiting.popleft()
            self._is_sending, self._is_dropped = True, False
            await self._deliver(item)
            self._is_sending = False

    async def _deliver(self, item: _T) -> None:
        while not self._is_dropped:
            try:
                await self._send(item)
            except DeliveryFailure as exc:
                self._failures.add_failure(exc)
                if exc.is_final:
                    self.lost += not self._is_dropped
                    return
                await self._sleep(compute_pause_s(self._failures.n_failures, self._policy))
                continue
            self.sent += 1
            self.lost -= self._is_dropped  # counted as lost while this attempt was under way
            self._failures.add_success(lost=self.lost)
            return
