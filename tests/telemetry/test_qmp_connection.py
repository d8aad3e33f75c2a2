"""A QMP connection: answers by id, every size bounded, a hostile or silent monitor ends or is refused."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.factories.qemu import FakeQemu

from phasewatch.errors import VmError
from phasewatch.telemetry.qmp import QmpMonitor
from phasewatch.telemetry.qmp_connection import MAX_LINE_BYTES, MonitorCommand, PendingAnswer, QmpConnection

STATUS = MonitorCommand("query-status")


class FakeTransport:
    """Records what is written, and whether the connection reads."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.unsent, self.is_reading, self.is_aborted = 0, True, False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def abort(self) -> None:
        self.is_aborted = True


class Wire:
    """A connection without a socket."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.transport, self.settled = FakeTransport(), list[PendingAnswer]()
        self.connection = QmpConnection(self.events)
        self.connection.connection_made(cast(asyncio.Transport, self.transport))

    def post(self, *commands: MonitorCommand) -> list[PendingAnswer]:
        return self.connection.post(commands, self.settled.append)

    def receive(self, data: bytes) -> None:
        while data and not self.transport.is_aborted:
            view = self.connection.get_buffer(-1)
            n = min(len(view), len(data))
            view[:n] = data[:n]
            self.connection.buffer_updated(n)
            data = data[n:]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def answer(number: int, result: object) -> bytes:
    return msgspec.json.encode({"return": result, "id": number}) + b"\r\n"


def test_commands_go_out_in_one_write_and_answers_are_matched_by_id() -> None:
    async def main() -> None:
        wire = Wire()
        first, second = wire.post(STATUS, MonitorCommand("qom-get", {"path": "/m"}))
        wire.receive(answer(2, {"b": 2}) + answer(1, {"a": 1}))

        assert [msgspec.json.decode(line) for line in wire.transport.written[0].splitlines()] == [
            {"execute": "query-status", "id": 1},
            {"execute": "qom-get", "arguments": {"path": "/m"}, "id": 2},
        ]
        assert (first.decode(), second.decode()) == ({"a": 1}, {"b": 2})
        assert wire.settled == [second, first]

    run(main())


@given(cuts=st.lists(st.integers(1, 120), max_size=8))
@settings(max_examples=50, deadline=None)
def test_answers_may_arrive_in_pieces(cuts: list[int]) -> None:
    async def main() -> None:
        wire = Wire()
        asked = wire.post(STATUS, STATUS)
        data = answer(1, "x" * 50) + b'{"event":"RESET","data":{}}\r\n' + answer(2, None)
        for cut in cuts:
            wire.receive(data[:cut])
            data = data[cut:]
        wire.receive(data)

        assert [each.decode() for each in asked] == ["x" * 50, None]
        assert wire.events == {"RESET": 1}

    run(main())


def test_a_refusal_is_an_error_with_qemus_words() -> None:
    async def main() -> None:
        wire = Wire()
        (asked,) = wire.post(STATUS)
        wire.receive(b'{"id":1,"error":{"class":"GenericError","desc":"no such thing"}}\r\n')

        with pytest.raises(VmError, match="no such thing"):
            asked.decode()

    run(main())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"x" * (MAX_LINE_BYTES + 100_000), id="a line without an end"),
        pytest.param(b"hello\r\n", id="not JSON"),
        pytest.param(b'{"id":"x"}\r\n', id="an id of another kind"),
        pytest.param(b"[" * 100_000 + b"\r\n", id="deep nesting"),
        pytest.param(b'{"error":{"desc":"bad JSON"}}\r\n', id="an error without an id"),
        pytest.param(b'{"return":"\xff","event":7}\r\n', id="not UTF-8"),
    ],
)
def test_what_is_not_qmp_ends_the_connection_and_fails_what_was_asked(data: bytes) -> None:
    async def main() -> None:
        wire = Wire()
        (asked,) = wire.post(STATUS)
        wire.receive(data)

        assert wire.transport.is_aborted
        with pytest.raises(VmError):
            asked.decode()
        with pytest.raises(VmError):
            wire.post(STATUS)

    run(main())


def test_a_flood_of_events_is_not_read_before_the_next_command() -> None:
    async def main() -> None:
        wire = Wire()
        event = b'{"event":"FLOOD","data":{}}\r\n'
        for _ in range(200):
            wire.receive(event * 1000)
        assert not wire.transport.is_reading

        wire.post(STATUS)

        assert wire.transport.is_reading

    run(main())


def test_made_up_event_names_take_bounded_memory() -> None:
    async def main() -> None:
        wire = Wire()
        for number in range(2000):
            wire.receive(b'{"event":"E%d"}\r\n' % number)
        wire.receive(b'{"event":"E1"}\r\n')

        assert len(wire.events) < 300
        assert (wire.events["E1"], wire.events.total()) == (2, 2001)

    run(main())


def test_commands_are_refused_while_qemu_reads_none() -> None:
    async def main() -> None:
        wire = Wire()
        wire.transport.unsent = 1 << 20

        with pytest.raises(VmError, match="does not read"):
            wire.post(STATUS)

    run(main())


def test_an_answer_whose_deadline_passed_is_dropped(tmp_path: Path) -> None:
    async def main(qemu: FakeQemu) -> None:
        monitor = QmpMonitor(qemu.path)
        await monitor.connect()
        qemu.delays_s["query-status"] = 0.2
        with pytest.raises(VmError, match="no answer within"):
            await monitor.ask("query-status", timeout_s=0.01)

        assert (await monitor.ask("query-target"))["arch"] == "x86_64"
        assert monitor.is_connected
        await monitor.close()
        assert not monitor.is_connected

    with FakeQemu(tmp_path / "q.sock") as qemu:
        run(main(qemu))
