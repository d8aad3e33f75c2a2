"""A dump that grows, is cut, is given up for a new one, and lies: frames are counted once or not at all."""

from __future__ import annotations

import asyncio
from pathlib import Path
from struct import pack
from typing import Any

import dpkt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.live.qemu import MAC

from phasewatch.errors import VmError
from phasewatch.live import dump
from phasewatch.live.dump import DumpSource, PcapReader, TapSource
from phasewatch.record.base import nothing_of
from phasewatch.record.qmp import Monitor
from phasewatch.vocab import Source

HEAD = pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 96, 1)
OUT = b"\xff" * 6 + MAC + b"\x08\x06" + b"\0" * 46


def record(frame: bytes, size: int | None = None) -> bytes:
    return pack("<IIII", 1, 2, len(frame), len(frame) if size is None else size) + frame


class Filters(Monitor):
    """A monitor that only knows filters, and writes their files as QEMU does."""

    def __init__(self) -> None:
        super().__init__(Path("fake"))
        self.files: dict[str, Path] = {}
        self.refused = ""

    async def ask(self, command: str, **arguments: Any) -> Any:
        if command == self.refused:
            raise VmError(f"{command}: refused")
        if command == "object-add":
            self.files[arguments["id"]] = Path(arguments["file"])
            self.files[arguments["id"]].write_bytes(HEAD)
        else:
            del self.files[arguments["id"]]
        return {}

    def write(self, data: bytes) -> None:
        (path,) = self.files.values()
        with path.open("ab") as file:
            file.write(data)


def source_of(monitor: Filters, folder: Path) -> DumpSource:
    return DumpSource(monitor=monitor, netdev="n0", mac=MAC, folder=folder, ids=("a", "b"))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.binary(min_size=14, max_size=96), max_size=20), st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_frames_come_out_whole_whatever_the_portions(frames: list[bytes], portions: list[int]) -> None:
    data = HEAD + b"".join(record(frame, len(frame) + 5) for frame in frames)
    reader, found, at, turn = PcapReader(), [], 0, 0
    while at < len(data):
        size = portions[turn % len(portions)]
        found += list(reader.feed(data[at : at + size]))
        at, turn = at + size, turn + 1

    assert found == [(frame, len(frame) + 5) for frame in frames]


def test_the_reader_agrees_with_dpkt(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    path.write_bytes(HEAD + b"".join(record(OUT[:n]) for n in (14, 30, 60)))
    with path.open("rb") as file:
        expected = [frame for _, frame in dpkt.pcap.Reader(file)]

    assert [frame for frame, _ in PcapReader().feed(path.read_bytes())] == expected


@pytest.mark.parametrize(
    "lie",
    [b"GIF89a" + b"\0" * 40, HEAD + pack("<IIII", 0, 0, 1 << 20, 1 << 20), HEAD + b"\0" * 400,
     HEAD + pack("<IIII", 0, 0, 60, 20) + b"\0" * 60],
    ids=["no pcap", "a huge frame", "a hole", "more kept than there was"],
)  # fmt: skip
def test_what_is_no_dump_is_refused(lie: bytes) -> None:
    with pytest.raises(ValueError, match="dump"):
        list(PcapReader().feed(lie))


def test_the_filter_goes_in_and_out_and_the_file_with_it(tmp_path: Path) -> None:
    monitor = Filters()

    async def main() -> None:
        source = source_of(monitor, tmp_path)
        await source.open()
        monitor.write(record(OUT, 1500))
        assert (await source.read())[:4] == (1, 1500, 0, 0)
        assert (await source.read())[:4] == (1, 1500, 0, 0)
        await source.close()
        assert await source.read() == nothing_of(Source.NETFLOW)

    asyncio.run(main())
    assert monitor.files == {}
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_is_given_up_for_a_new_one_and_no_frame_of_it_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump, "ROTATE_BYTES", 4000)
    monitor = Filters()

    async def main() -> tuple[int | float | None, ...]:
        source = source_of(monitor, tmp_path)
        await source.open()
        for _ in range(10):
            monitor.write(record(OUT) * 100)
            await source.read()
            assert len(list(tmp_path.iterdir())) == 1
        read = await source.read()
        await source.close()
        return read

    assert asyncio.run(main())[0] == 1000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(HEAD + b"\xff" * 400),
        lambda path: path.write_bytes(
            b"\0" * 4000 + record(OUT)
        ),  # the guard cut it, and QEMU wrote on behind the hole
    ],
    ids=["cut", "overwritten", "cut, and written on"],
)
def test_a_file_that_was_spoilt_costs_one_reading(tmp_path: Path, spoil: Any) -> None:
    monitor = Filters()

    async def main() -> None:
        source = source_of(monitor, tmp_path)
        await source.open()
        monitor.write(record(OUT))
        await source.read()
        spoil(next(iter(monitor.files.values())))
        assert await source.read() == nothing_of(Source.NETFLOW)
        monitor.write(record(OUT))
        assert (await source.read())[:4] == (2, 2 * len(OUT), 0, 0)
        assert source.lost_files >= 1
        await source.close()

    asyncio.run(main())


def test_a_monitor_that_fails_in_the_middle_leaves_nothing_readings_not_an_error(tmp_path: Path) -> None:
    monitor = Filters()

    async def main() -> None:
        source = source_of(monitor, tmp_path)
        await source.open()
        monitor.write(record(OUT))
        await source.read()
        next(iter(monitor.files.values())).write_bytes(b"")
        monitor.refused = "object-add"
        for _ in range(3):
            assert await source.read() == nothing_of(Source.NETFLOW)
        monitor.refused = ""
        assert await source.read() == nothing_of(Source.NETFLOW)  # it is in again, and counts from here on
        monitor.write(record(OUT))
        assert (await source.read())[0] == 2
        await source.close()

    asyncio.run(main())
    assert monitor.files == {}


def test_the_file_of_a_filter_that_may_still_write_is_left_to_the_guard_that_bounds_it(tmp_path: Path) -> None:
    monitor = Filters()

    async def main() -> None:
        source = source_of(monitor, tmp_path)
        await source.open()
        monitor.refused = "object-del"
        await source.close()

    asyncio.run(main())
    assert list(tmp_path.iterdir()) == list(monitor.files.values())


def test_a_tap_that_is_gone_gives_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        source = TapSource(name="tap0", net=tmp_path)
        with pytest.raises(OSError, match="No such file"):
            await source.open()
        assert await source.read() == nothing_of(Source.NETFLOW)
        await source.close()

    asyncio.run(main())
