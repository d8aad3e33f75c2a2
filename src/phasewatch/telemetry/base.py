"""Define what a telemetry source is, the clock, and the 2 Hz loop that samples the sources of one VM."""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Coroutine, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from phasewatch.channels import list_raw_fields
from phasewatch.types import BIN_NS, SourceKind

__all__ = [
    "N_STAMPS",
    "SAMPLE_PERIOD_NS",
    "AsyncClock",
    "HostClock",
    "LossSource",
    "NoteSource",
    "ReadingRow",
    "ReadingValues",
    "RowLog",
    "TelemetrySampler",
    "TelemetrySource",
    "build_missing_reading",
    "close_guest_connection",
    "compute_first_tick_ns",
]

ReadingValues = tuple[int | float | None, ...]  # the source's raw fields in the order of `RAW`; None: not known
ReadingRow = tuple[int | float | None, ...]  # t_wall_ns, t_mono_ns, seq, then the values of the reading
N_STAMPS = 3  # columns of a row before its reading

SAMPLE_PERIOD_NS = 500_000_000  # 2 Hz, the rate of the bins
_SAMPLE_OFFSET_NS = BIN_NS // 2  # ticks are in the middle between two whole half seconds of wall time
_LATE_SAMPLE_NS = 100_000_000  # a tick that starts later counts as late: a fifth of its period


class AsyncClock(Protocol):
    """Clocks of the host and sleeping by them; tests pass a clock of their own."""

    def wall_ns(self) -> int:
        """Return Unix time."""

    def mono_ns(self) -> int:
        """Return monotonic time, which never steps."""

    def boot_ns(self) -> int:
        """Return boot time: monotonic time that also runs while the host is suspended."""

    async def sleep_until(self, mono_ns: int) -> None:
        """Sleep until monotonic time `mono_ns`."""


class HostClock:
    """The clocks of this host."""

    def wall_ns(self) -> int:
        """Return Unix time."""
        return time.time_ns()

    def mono_ns(self) -> int:
        """Return monotonic time, which never steps."""
        return time.monotonic_ns()

    def boot_ns(self) -> int:
        """Return boot time: monotonic time that also runs while the host is suspended."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    async def sleep_until(self, mono_ns: int) -> None:
        """Sleep until monotonic time `mono_ns`."""
        await asyncio.sleep(max(0, mono_ns - time.monotonic_ns()) / 1e9)


class TelemetrySource(Protocol):
    """A set of counters of one VM. It never writes to disk, and a failed read returns None for every field.

    A permanent failure (no such process, no such socket) is an `OSError` or `VmError` raised by `open`.
    """

    @property
    def source(self) -> SourceKind:
        """Kind of the source, which names its raw fields."""

    async def open(self) -> None:
        """Find and open what is read."""

    def read(self) -> Coroutine[Any, Any, ReadingValues]:
        """Return one reading as soon as it is complete (a coroutine)."""

    async def close(self) -> None:
        """Close files and sockets; may be called twice."""


@runtime_checkable
class NoteSource(Protocol):
    """A source that has messages for people."""

    @property
    def source(self) -> SourceKind:
        """Kind of the source, which names its raw fields."""

    def pop_notes(self) -> list[str]:
        """Return and clear the messages since the last call."""


@runtime_checkable
class LossSource(Protocol):
    """A source that counts its lost readings by reason."""

    @property
    def source(self) -> SourceKind:
        """Kind of the source, which names its raw fields."""

    @property
    def lost(self) -> dict[str, int]:
        """Lost readings by reason, without zeros."""


def build_missing_reading(source: SourceKind) -> ReadingValues:
    """Return the reading of a source that could not be read: None for every raw field."""
    return (None,) * len(list_raw_fields(source))


@dataclass(slots=True)
class RowLog:
    """Collects the rows of one source, each stamped when its reading was complete.

    Attributes:
        source: Kind of the source.
        clock: Stamps the rows.
        rows: Rows that nobody has taken out yet.
        emitted: Number of rows so far; the next row's sequence number.
    """

    source: SourceKind
    clock: AsyncClock
    rows: list[ReadingRow] = field(default_factory=list)
    emitted: int = 0

    def add(self, values: ReadingValues) -> None:
        """Stamp one reading and append its row."""
        self.rows.append((self.clock.wall_ns(), self.clock.mono_ns(), self.emitted, *values))
        self.emitted += 1


def compute_first_tick_ns(wall_ns: int, mono_ns: int) -> int:
    """Return the monotonic time of the next tick: 0.25 s after a whole half second of wall time.

    >>> compute_first_tick_ns(wall_ns=1_100_000_000, mono_ns=5_000_000_000)
    5150000000
    """
    return mono_ns + (_SAMPLE_OFFSET_NS - wall_ns) % SAMPLE_PERIOD_NS


@dataclass(slots=True)
class TelemetrySampler:
    """Reads the sources of one VM at 2 Hz into their logs, one after the other, until cancelled.

    A row is stamped when its reading is complete, so that a bin contains nothing from after its end. A missed tick is
    skipped and never repeated: two readings at once would show a rate that never occurred.

    Attributes:
        sources, logs: The sources, and the log of each.
        clock: Clock of the host.
        timeout_s: Deadline of one reading.
        late: Ticks that began more than 0.1 s late.
        skipped: Ticks that were skipped.
        failed: Readings that raised an error; their rows hold None only.
    """

    sources: Sequence[TelemetrySource]
    logs: Sequence[RowLog]
    clock: AsyncClock
    timeout_s: float = 0.4
    late: int = 0
    skipped: int = 0
    failed: int = 0

    async def run(self) -> None:
        """Sample for ever."""
        due_ns = compute_first_tick_ns(self.clock.wall_ns(), self.clock.mono_ns())
        while True:
            await self.clock.sleep_until(due_ns)
            self.late += self.clock.mono_ns() - due_ns > _LATE_SAMPLE_NS
            await self.tick()
            behind = (self.clock.mono_ns() - due_ns) // SAMPLE_PERIOD_NS
            self.skipped += behind
            due_ns += (behind + 1) * SAMPLE_PERIOD_NS

    async def tick(self) -> None:
        """Read every source once."""
        for source, log in zip(self.sources, self.logs, strict=True):
            reading = source.read()
            try:
                # Most readings are complete at once and need no deadline, whose timer would stay for its whole length.
                waits_for = reading.send(None)
            except StopIteration as done:
                log.add(done.value)
                continue
            except Exception:
                self.failed += 1
                log.add(build_missing_reading(source.source))
                continue
            try:
                async with asyncio.timeout(self.timeout_s):
                    values = await _resume(reading, waits_for)
            except Exception:  # whatever one source raises, the others and the next tick go on
                self.failed += 1
                values = build_missing_reading(source.source)
            log.add(values)


@types.coroutine
def _resume(reading: Coroutine[Any, Any, ReadingValues], waits_for: Any) -> Generator[Any, Any, ReadingValues]:
    """Go on with a reading that was started by ``send(None)`` and waits for `waits_for`."""
    try:
        while True:
            try:
                answer = yield waits_for
            except BaseException as exc:
                waits_for = reading.throw(exc)
            else:
                waits_for = reading.send(answer)
    except StopIteration as done:
        values: ReadingValues = done.value
        return values


async def close_guest_connection(task: asyncio.Task[None] | None, writer: asyncio.StreamWriter | None) -> None:
    """Stop the task that reads from a guest's port and close the connection; wait at most a second for the guest."""
    if task is not None:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
    if writer is not None:
        writer.close()
        with suppress(Exception):
            async with asyncio.timeout(1.0):
                await writer.wait_closed()
