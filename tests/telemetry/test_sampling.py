"""Sampling at 2 Hz, and rows of the untrusted guest agent."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.factories.vms import FakeClock, FakeSource

from phasewatch.channels import list_raw_fields
from phasewatch.telemetry.base import ReadingValues, RowLog, TelemetrySampler, build_missing_reading
from phasewatch.telemetry.guest_agent import MAX_AGENT_LINES, MAX_BURST_ROWS, GuestReader, parse_agent_line
from phasewatch.types import SourceKind

REPORT = {spec.field: number for number, spec in enumerate(list_raw_fields(SourceKind.GUEST))}
LINE = msgspec.json.encode(REPORT)


class Slow(FakeSource):
    """Takes its time over one reading."""

    takes_s: float = 0.0
    slow_at: int = 0

    async def read(self) -> ReadingValues:
        if self.reads + 1 == self.slow_at:
            self.clock.now_ns += round(self.takes_s * 1e9)
        return await super().read()


class Broken(FakeSource):
    """Fails at every reading."""

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
        [Broken(SourceKind.QMP, clock), FakeSource(SourceKind.PROC, clock)], clock, seconds=1
    )

    assert [row[3:] for row in broken.rows] == [build_missing_reading(SourceKind.QMP)] * 2
    assert [row[3] for row in sound.rows] == [1, 2]
    assert ticker.failed == 2


def test_a_missed_tick_is_skipped() -> None:
    clock = FakeClock()
    source = Slow(SourceKind.PROC, clock)
    source.takes_s, source.slow_at = 1.2, 2

    ticker, (log,) = tick([source], clock, seconds=3)

    assert [round((row[1] or 0) / 1e9, 2) for row in log.rows] == [0.25, 1.95, 2.25, 2.75]
    assert (ticker.skipped, ticker.late) == (2, 0)
    assert log.emitted == 4


def test_an_agent_row_is_parsed_in_the_order_of_raw_fields() -> None:
    assert parse_agent_line(LINE) == tuple(range(len(REPORT)))


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"[1]", id="no object"),
        pytest.param(LINE[:-1], id="cut short"),
        pytest.param(LINE.replace(b"ctxt", b"cxtt"), id="another field"),
        pytest.param(LINE.replace(b'"ctxt":4', b'"ctxt":4.5'), id="a fraction"),
        pytest.param(LINE.replace(b'"ctxt":4', b'"ctxt":null'), id="null"),
        pytest.param(LINE.replace(b'"ctxt":4', b'"ctxt":true'), id="a truth value"),
        pytest.param(LINE.replace(b'"ctxt":4', b'"ctxt":-4'), id="negative"),
        pytest.param(LINE.replace(b'"ctxt":4', b'"ctxt":9223372036854775808'), id="beyond 64 bits"),
        pytest.param(LINE.replace(b'"ctxt":4', b'"ctxt":1,"ctxt":4'), id="a field twice"),
        pytest.param(LINE[:-1] + b',"more":1}', id="a field too many"),
        pytest.param(b"[" * 100_000, id="bottomless"),
    ],
)
def test_a_malformed_agent_line_is_refused(line: bytes) -> None:
    assert parse_agent_line(line) is None


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_without_an_error(line: bytes) -> None:
    assert parse_agent_line(line) is None


def test_a_flood_of_agent_rows_is_dropped(tmp_path: Path) -> None:
    clock = FakeClock()
    log = RowLog(SourceKind.GUEST, clock)
    reader = GuestReader(path=tmp_path, log=log)

    reader.start()
    for _ in range(1000):
        reader.handle_line(LINE)
    clock.now_ns = 10_000_000_000
    for _ in range(1000):
        reader.handle_line(LINE)

    assert len(log.rows) == MAX_BURST_ROWS + 10
    assert reader.dropped == 2000 - MAX_BURST_ROWS - 10


def test_agent_rows_before_the_start_are_ignored(tmp_path: Path) -> None:
    log = RowLog(SourceKind.GUEST, FakeClock())
    reader = GuestReader(path=tmp_path, log=log)

    reader.handle_line(LINE)
    reader.start()
    reader.handle_line(LINE)

    assert len(log.rows) == 1


def test_an_endless_line_is_skipped_and_the_next_row_is_read(tmp_path: Path) -> None:
    clock = FakeClock()
    log = RowLog(SourceKind.GUEST, clock)

    async def work() -> int:
        async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"x" * 500_000 + b"\n" + LINE + b"\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_unix_server(guest, str(tmp_path / "tel"))
        reader = GuestReader(path=tmp_path / "tel", log=log)
        reader.start()
        await reader.open()
        for _ in range(1000):
            if log.rows:
                break
            await asyncio.sleep(0.001)
        await reader.close()
        server.close()
        await server.wait_closed()
        return reader.bad

    assert asyncio.run(work()) > 0
    assert [row[3:] for row in log.rows] == [tuple(range(len(REPORT)))]


def test_a_flood_of_lines_is_cut_off_before_it_delays_other_sources(tmp_path: Path) -> None:
    reader = GuestReader(path=tmp_path / "tel", log=RowLog(SourceKind.GUEST, FakeClock()))

    async def work() -> None:
        is_over = asyncio.Event()

        async def guest(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, TimeoutError):
                for _ in range(50):
                    writer.write(b"\n" * MAX_AGENT_LINES)
                    await asyncio.wait_for(writer.drain(), 0.5)
            writer.close()
            is_over.set()

        server = await asyncio.start_unix_server(guest, str(tmp_path / "tel"))
        reader.start()
        await reader.open()
        await is_over.wait()
        await reader.close()
        server.close()
        await server.wait_closed()

    asyncio.run(work())

    assert reader.bad == MAX_AGENT_LINES


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
