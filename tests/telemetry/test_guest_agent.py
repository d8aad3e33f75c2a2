"""Rows of the untrusted guest agent: strict parsing, and floods that cost only the guest's own rows."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.factories.vms import FakeClock

from phasewatch.channels import list_raw_fields
from phasewatch.telemetry.base import RowLog
from phasewatch.telemetry.guest_agent import MAX_AGENT_LINES, MAX_BURST_ROWS, GuestReader, parse_agent_line
from phasewatch.types import SourceKind

REPORT = {spec.field: number for number, spec in enumerate(list_raw_fields(SourceKind.GUEST))}
LINE = msgspec.json.encode(REPORT)


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
