"""The non-blocking writer: lines in order for a reader, dropped and counted without one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TextIO

import pytest

from phasewatch.live import outputs
from phasewatch.live.outputs import NonBlockingWriter


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "LINES_FLUSH_TIMEOUT_S", 0.2)


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        yield reader, stream
    os.close(reader)


def read_all(reader: int) -> list[str]:
    found = b""
    os.set_blocking(reader, False)
    try:
        while data := os.read(reader, 1 << 16):
            found += data
            time.sleep(0.02)  # a blocked writer fills what was just emptied
    except BlockingIOError:
        pass
    return found.decode().splitlines()


def test_lines_arrive_whole_and_in_order(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    out = NonBlockingWriter(stream)
    for number in range(100):
        out.put(f"line {number}")

    assert out.close() == 0
    assert read_all(reader) == [f"line {number}" for number in range(100)]


@pytest.mark.parametrize("blocks", [True, False])
def test_a_stalled_reader_delays_nobody_and_the_oldest_lines_are_dropped(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch, blocks: bool
) -> None:
    monkeypatch.setattr(outputs, "MAX_QUEUED_LINES", 10)
    reader, stream = pipe
    os.set_blocking(stream.fileno(), blocks)
    out = NonBlockingWriter(stream)
    for number in range(1000):
        out.put(f"{number:03} " + "x" * 1000)
        time.sleep(0)
    not_written = out.close()

    said = [int(line[:3]) for line in read_all(reader)]
    assert not_written > 800
    assert said == sorted(set(said))
    assert said[-10:] == list(range(990, 1000))


def test_lines_without_a_reader_are_counted_as_lost() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        out = NonBlockingWriter(stream)
        out.put("into nothing")
        out._thread.join(5)
        out.put("the next")

        assert out.is_gone
        assert out.close() == 2


class FullThenRoom(NonBlockingWriter):
    """Writes to a disk that has room for three bytes, then none, then all."""

    turns = 0

    def _write_some(self, data: bytes) -> int:
        self.turns += 1
        if self.turns == 1:
            return super()._write_some(data[:3])
        if self.turns == 2:
            raise OSError(28, "No space left on device")
        return super()._write_some(data)


def test_a_line_lost_to_a_full_disk_does_not_damage_the_next(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    out = FullThenRoom(stream)
    out.put("first")
    out.put("second")

    assert out.close() == 1
    assert not out.is_gone
    assert out.failure is not None
    assert read_all(reader) == ["fir", "second"]
