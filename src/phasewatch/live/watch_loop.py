"""Sample all watched VMs at the same instants, close their bins together, and decide on all their windows at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phasewatch.live.tracker import TrackedBin, predict_due_windows
from phasewatch.telemetry.base import SAMPLE_PERIOD_NS, AsyncClock, compute_first_tick_ns

__all__ = ["LoopMember", "WatchLoop"]

logger = logging.getLogger(__name__)

_MAX_SLEEP_NS = 250_000_000  # upper limit of one sleep, so that a clock step is noticed soon


class LoopMember(Protocol):
    """One watched VM, as the loop sees it."""

    @property
    def next_close_ns(self) -> int | None:
        """Wall time (ns) at which its next bin is due; None before its first reading."""

    @property
    def restarts(self) -> int:
        """How often its bins began again because of the clock."""

    def start_tick(self) -> None:
        """Start one reading of its sources; skip it if the one before still runs."""

    def add_skipped(self, count: int) -> None:
        """Count ticks that the loop skipped."""

    def close_bins(self) -> list[TrackedBin]:
        """Close its due bins."""

    def report_bins(self, closed: Sequence[TrackedBin], predicted: Sequence[NDArray[np.float64] | Exception]) -> None:
        """Decide on closed bins and report them; `predicted` has one entry for each window among them."""

    def fail(self, error: Exception) -> None:
        """End its watch with an error."""


class WatchLoop:
    """The common clock of all VMs that one process watches.

    Ticks are 0.25 s after each whole half second of wall time; bins are closed as soon as they are due. An error of one
    VM ends the watch of that VM alone, and a VM that answers slowly delays nobody: it skips its own ticks.

    Args:
        clock: Clock of the host.

    Attributes:
        skipped: Ticks that were skipped because the loop was late.
    """

    def __init__(self, clock: AsyncClock) -> None:
        self._clock = clock
        self._members: list[LoopMember] = []
        self.skipped = 0

    def add(self, member: LoopMember) -> None:
        """Begin to sample a VM at the next tick."""
        self._members.append(member)

    def remove(self, member: LoopMember) -> None:
        """Stop sampling a VM."""
        if member in self._members:
            self._members.remove(member)

    async def run(self) -> None:
        """Sample and close bins for ever."""
        sampling = asyncio.create_task(self._sample())
        try:
            while True:
                await self._clock.sleep_until(self._compute_next_close_ns())
                if sampling.done():
                    sampling.result()  # raises: the loop itself is broken
                self.close_due_bins()
        finally:
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)

    def close_due_bins(self) -> None:
        """Close the due bins of every VM, predict their windows together, and report them."""
        n_restarts = sum(member.restarts for member in self._members)
        closed: list[tuple[LoopMember, list[TrackedBin]]] = []
        for member in tuple(self._members):
            try:
                closed.append((member, member.close_bins()))
            except Exception as exc:  # the other VMs go on
                member.fail(exc)
        if sum(member.restarts for member in self._members) > n_restarts:
            logger.warning("the clock jumped or the host slept: windows start again")
        predicted = predict_due_windows([bin_.window for _, bins in closed for bin_ in bins if bin_.window is not None])
        at = 0
        for member, bins in closed:
            n_windows = sum(bin_.window is not None for bin_ in bins)
            try:
                member.report_bins(bins, predicted[at : at + n_windows])
            except Exception as exc:  # the other VMs go on
                member.fail(exc)
            at += n_windows

    async def _sample(self) -> None:
        clock = self._clock
        due_ns = compute_first_tick_ns(clock.wall_ns(), clock.mono_ns())
        while True:
            await clock.sleep_until(due_ns)
            for member in tuple(self._members):
                member.start_tick()
            behind = (clock.mono_ns() - due_ns) // SAMPLE_PERIOD_NS
            if behind:  # a missed tick is never repeated: two readings at once would show a rate that never occurred
                self.skipped += behind
                for member in self._members:
                    member.add_skipped(behind)
            due_ns += (behind + 1) * SAMPLE_PERIOD_NS

    def _compute_next_close_ns(self) -> int:
        """Return the monotonic time at which the next bin is due, at most `_MAX_SLEEP_NS` from now."""
        now_ns, wall_ns = self._clock.mono_ns(), self._clock.wall_ns()
        due = [member.next_close_ns for member in self._members]
        next_ns = min((close_ns for close_ns in due if close_ns is not None), default=None)
        if next_ns is None:
            return now_ns + _MAX_SLEEP_NS
        return min(now_ns + _MAX_SLEEP_NS, now_ns + max(0, next_ns - wall_ns))
