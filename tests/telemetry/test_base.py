"""Sampling at 2 Hz: times of the ticks, failing sources, missed ticks."""

from __future__ import annotations

import asyncio

from tests.factories.vms import FakeClock, FakeSource

from phasewatch.telemetry.base import ReadingValues, RowLog, TelemetrySampler, build_missing_reading
from phasewatch.types import SourceKind


class SlowSource(FakeSource):
    """A source of which one reading takes long."""

    takes_s: float = 0.0
    slow_at: int = 0

    async def read(self) -> ReadingValues:
        if self.reads + 1 == self.slow_at:
            self.clock.now_ns += round(self.takes_s * 1e9)
        return await super().read()


class BrokenSource(FakeSource):
    """A source that raises at every reading."""

    async def read(self) -> ReadingValues:
        raise RuntimeError("no luck")


def tick(sources: list[FakeSource], clock: FakeClock, *, seconds: float) -> tuple[TelemetrySampler, list[RowLog]]:
    logs = [RowLog(source.source, clock) for source in sources]
    ticker = TelemetrySampler([*sources], logs, clock)

    async def work() -> None:
        task = asyncio.create_task(ticker.run())
        await clock.sleep_until(round(seconds * 1e9))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    clock.run(work())
    return ticker, logs


def test_ticks_are_midway_between_whole_half_seconds() -> None:
    clock = FakeClock()
    clock.now_ns = 100_000_000

    _, (log,) = tick([FakeSource(SourceKind.PROC, clock)], clock, seconds=2)

    assert [row[1] for row in log.rows] == [250_000_000, 750_000_000, 1_250_000_000, 1_750_000_000]
    assert [row[2] for row in log.rows] == [0, 1, 2, 3]


def test_a_failing_source_gives_none_and_the_others_go_on() -> None:
    clock = FakeClock()

    ticker, (broken, sound) = tick(
        [BrokenSource(SourceKind.QMP, clock), FakeSource(SourceKind.PROC, clock)], clock, seconds=1
    )

    assert [row[3:] for row in broken.rows] == [build_missing_reading(SourceKind.QMP)] * 2
    assert [row[3] for row in sound.rows] == [1, 2]
    assert ticker.failed == 2


def test_a_missed_tick_is_skipped() -> None:
    clock = FakeClock()
    source = SlowSource(SourceKind.PROC, clock)
    source.takes_s, source.slow_at = 1.2, 2

    ticker, (log,) = tick([source], clock, seconds=3)

    assert [round((row[1] or 0) / 1e9, 2) for row in log.rows] == [0.25, 1.95, 2.25, 2.75]
    assert (ticker.skipped, ticker.late) == (2, 0)
    assert log.emitted == 4


def test_a_sampler_cancelled_during_a_reading_ends() -> None:
    # asyncio.wait_for of Python 3.11 keeps such a cancellation to itself, and the watch went on for ever.
    async def work() -> bool:
        reading: asyncio.Future[ReadingValues] = asyncio.get_running_loop().create_future()

        class Prompt(FakeSource):
            async def read(self) -> ReadingValues:
                return await reading

        clock = FakeClock()
        ticker = TelemetrySampler([Prompt(SourceKind.PROC, clock)], [RowLog(SourceKind.PROC, clock)], clock)

        async def tick_on() -> None:
            while True:
                await ticker.tick()
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick_on())
        await asyncio.sleep(0.01)
        reading.set_result(build_missing_reading(SourceKind.PROC))
        await asyncio.sleep(0)
        ticking.cancel()
        done, _ = await asyncio.wait([ticking], timeout=1.0)
        ticking.cancel()
        return ticking in done

    assert asyncio.run(work())


class WaitingSource(FakeSource):
    """A source whose readings wait for an event; it notes how they ended."""

    def __init__(self, source: SourceKind, clock: FakeClock) -> None:
        super().__init__(source, clock)
        self.event, self.ended = asyncio.Event(), ""

    async def read(self) -> ReadingValues:
        try:
            await asyncio.sleep(0)  # waits more than once
            await self.event.wait()
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        self.ended = "complete"
        return await super().read()


def test_a_reading_that_waits_is_complete_when_its_event_comes() -> None:
    async def work() -> None:
        clock = FakeClock()
        source, log = WaitingSource(SourceKind.PROC, clock), RowLog(SourceKind.PROC, clock)
        ticking = asyncio.create_task(TelemetrySampler([source], [log], clock).tick())
        for _ in range(5):
            await asyncio.sleep(0)
        assert log.rows == []

        source.event.set()
        await ticking

        assert (source.ended, log.rows[0][3]) == ("complete", 1)

    asyncio.run(work())


def test_a_reading_that_waits_too_long_is_ended_and_counted() -> None:
    async def work() -> None:
        clock = FakeClock()
        source, log = WaitingSource(SourceKind.PROC, clock), RowLog(SourceKind.PROC, clock)
        sampler = TelemetrySampler([source], [log], clock)
        sampler.timeout_s = 0.01

        await sampler.tick()

        assert (source.ended, sampler.failed) == ("cancelled", 1)
        assert log.rows[0][3:] == build_missing_reading(SourceKind.PROC)

    asyncio.run(work())
