"""Parse a growing pcap in chunks, in either byte order, cut or corrupt."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from struct import pack

import dpkt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewatch.telemetry.pcap import PcapReader


def head(order: str = "<", magic: int = 0xA1B2C3D4, *, snap: int = 160, link: int = 1) -> bytes:
    return pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, snap, link)


def record(frame: bytes, size: int | None = None, order: str = "<") -> bytes:
    return pack(f"{order}IIII", 1, 2, len(frame), len(frame) if size is None else size) + frame


FRAME = bytes(range(60))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.binary(min_size=14, max_size=96), max_size=20),
    st.lists(st.integers(1, 40), min_size=1, max_size=9),
    st.sampled_from("<>"),
    st.sampled_from([0xA1B2C3D4, 0xA1B23C4D]),
)
def test_frames_are_whole_for_any_chunks_byte_order_and_resolution(
    frames: list[bytes], portions: list[int], order: str, magic: int
) -> None:
    data = head(order, magic) + b"".join(record(frame, len(frame) + 5, order) for frame in frames)
    reader, found, at, turn = PcapReader(), [], 0, 0
    while at < len(data):
        size = portions[turn % len(portions)]
        found += list(reader.feed(data[at : at + size]))
        at, turn = at + size, turn + 1

    assert found == [(frame, len(frame) + 5) for frame in frames]
    assert not reader.has_partial_frame


def test_the_reader_agrees_with_dpkt(tmp_path: Path) -> None:
    path = tmp_path / "x.pcap"
    path.write_bytes(head() + b"".join(record(FRAME[:n]) for n in (14, 30, 60)))
    with path.open("rb") as file:
        expected = [frame for _, frame in dpkt.pcap.Reader(file)]

    assert [frame for frame, _ in PcapReader().feed(path.read_bytes())] == expected


def test_an_incomplete_frame_waits_for_its_rest() -> None:
    reader = PcapReader()
    data = head() + record(FRAME)

    assert list(reader.feed(data[:-1])) == []
    assert reader.has_partial_frame
    assert [frame for frame, _ in reader.feed(data[-1:])] == [FRAME]


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(b"GIF89a" + b"\0" * 40, id="no pcap"),
        pytest.param(b"\x0a\x0d\x0d\x0a" + b"\0" * 40, id="pcapng"),
        pytest.param(head(link=113), id="another link type"),
        pytest.param(head() + pack("<IIII", 0, 0, 1 << 20, 1 << 20), id="a huge frame"),
        pytest.param(head(snap=0) + pack("<IIII", 0, 0, 1 << 30, 1 << 30), id="a huge frame without a bound"),
        pytest.param(head() + b"\0" * 400, id="a hole"),
        pytest.param(head() + pack("<IIII", 0, 0, 60, 20) + b"\0" * 60, id="more kept than there was"),
        pytest.param(head() + record(FRAME, order=">"), id="a record in the other order"),
    ],
)
def test_a_file_that_is_no_pcap_is_refused(lie: bytes) -> None:
    with pytest.raises(ValueError, match="dump"):
        list(PcapReader().feed(lie))


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_read_or_raise_value_error(data: bytes, has_head: bool) -> None:
    with suppress(ValueError):
        list(PcapReader().feed((head() if has_head else b"") + data))
