"""What every telemetry source is, and the clock and the 2 Hz loop that read them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from phasewatch.channels import list_raw_fields
from phasewatch.types import BIN_NS, SourceKind

ReadingValues = tuple[
    int | float | None, ...
]  # one reading: the source's raw fields in the order of RAW, None = no reading of it
ReadingRow = tuple[int | float | None, ...]  # t_wall_ns, t_mono_ns, seq, then the values
N_STAMPS = 3  # that many values stand before a row's readings

SAMPLE_PERIOD_NS = 500_000_000  # 2 Hz, the bins' own pace
SAMPLE_OFFSET_NS = (
    BIN_NS // 2
)  # ticks fall in the middle between two whole half seconds of wall time (DESIGN section 4, "Live")
LATE_SAMPLE_NS = 100_000_000  # a tick that starts later than this counts as late: a fifth of its period


class AsyncClock(Protocol):
    """The host's clocks and the art of waiting; a test hands in one that jumps."""

    def wall_ns(self) -> int:
        """Unix time."""

    def mono_ns(self) -> int:
        """Time that never steps."""

    def boot_ns(self) -> int:
        """The same, counting on while the machine is suspended."""

    async def sleep_until(self, mono_ns: int) -> None:
        """Wait until `mono_ns` has passed."""


class HostClock:
    """The machine's own clocks."""

    def wall_ns(self) -> int:
        """Unix time."""
        return time.time_ns()

    def mono_ns(self) -> int:
        """Time that never steps."""
        return time.monotonic_ns()

    def boot_ns(self) -> int:
        """The same, counting on while the machine is suspended."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    async def sleep_until(self, mono_ns: int) -> None:
        """Wait until `mono_ns` has passed."""
        await asyncio.sleep(max(0, mono_ns - time.monotonic_ns()) / 1e9)


class TelemetrySource(Protocol):
    """One counter of one VM. It never writes to disk, and a failing read gives None-filled values, not an exception.

    A failure that will not heal (no such process, no such socket) is an `OSError` or `VmError` of `open`.
    """

    @property
    def source(self) -> SourceKind:
        """Which rows it fills."""

    async def open(self) -> None:
        """Find what is to be read."""

    async def read(self) -> ReadingValues:
        """Take one reading; returns at once when it is complete."""

    async def close(self) -> None:
        """Let go of files and sockets; may be called twice."""


@runtime_checkable
class NoteSource(Protocol):
    """A source that has something to tell people now and then."""

    @property
    def source(self) -> SourceKind:
        """Which rows it fills."""

    def pop_notes(self) -> list[str]:
        """Return what people must know since the last call."""


def build_missing_reading(source: SourceKind) -> ReadingValues:
    """Give the reading of a source that could not be read: every field None."""
    return (None,) * len(list_raw_fields(source))


@dataclass(slots=True)
class RowLog:
    """The rows that one source of one VM gave so far, stamped when read, and how many."""

    source: SourceKind
    clock: AsyncClock
    rows: list[ReadingRow] = field(default_factory=list)
    emitted: int = 0

    def add(self, values: ReadingValues) -> None:
        """Stamp and keep one reading."""
        self.rows.append((self.clock.wall_ns(), self.clock.mono_ns(), self.emitted, *values))
        self.emitted += 1


def _compute_first_tick_ns(wall_ns: int, mono_ns: int) -> int:
    """Give the monotonic time of the next tick: 0.25 s after a whole half second of wall time.

    >>> first_tick_ns(wall_ns=1_100_000_000, mono_ns=5_000_000_000)
    5150000000
    """
    return mono_ns + (SAMPLE_OFFSET_NS - wall_ns) % SAMPLE_PERIOD_NS


@dataclass(slots=True)
class TelemetrySampler:
    """Reads the sources of one VM at 2 Hz into their logs, one after the other, until cancelled.

    A row is stamped when its reading is complete: what it says was true before its stamp, so that a bin knows nothing
    after its end. A tick that was missed altogether is skipped, never made up for: two readings at once would show a
    rate that never was.

    Attributes:
        late: Ticks that began more than `LATE_SAMPLE_NS` after their time.
        skipped: Ticks that never were.
        failed: Readings that raised; their rows hold None only.
    """

    sources: Sequence[TelemetrySource]
    logs: Sequence[RowLog]
    clock: AsyncClock
    timeout_s: float = 0.4
    late: int = 0
    skipped: int = 0
    failed: int = 0

    async def run(self) -> None:
        """Tick for ever."""
        due_ns = _compute_first_tick_ns(self.clock.wall_ns(), self.clock.mono_ns())
        while True:
            await self.clock.sleep_until(due_ns)
            self.late += self.clock.mono_ns() - due_ns > LATE_SAMPLE_NS
            await self.tick()
            behind = (self.clock.mono_ns() - due_ns) // SAMPLE_PERIOD_NS
            self.skipped += behind
            due_ns += (behind + 1) * SAMPLE_PERIOD_NS

    async def tick(self) -> None:
        """Read every source once."""
        for source, log in zip(self.sources, self.logs, strict=True):
            try:
                async with asyncio.timeout(self.timeout_s):
                    values = await source.read()
            except Exception:  # whatever a reader met, the other sources and the next tick go on
                self.failed += 1
                values = build_missing_reading(source.source)
            log.add(values)


async def close_guest_connection(task: asyncio.Task[None] | None, writer: asyncio.StreamWriter | None) -> None:
    """End who listens to a guest's line and close it; a guest that does not let go is waited for a second."""
    if task is not None:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
    if writer is not None:
        writer.close()
        with suppress(Exception):
            async with asyncio.timeout(1.0):
                await writer.wait_closed()
