"""The kernel filter keeps what the raw fields need, and a ring's memory is read as the kernel writes it."""

from __future__ import annotations

from struct import pack, pack_into, unpack_from

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.factories.frame_batches import run_filter
from tests.factories.frames import ASK, SYN, ethernet, ipv4, ipv6

from phasewatch.telemetry.headers import parse_frame
from phasewatch.telemetry.netflow import FlowCounter
from phasewatch.telemetry.packet_socket import (
    BLOCK_BYTES,
    LONG_SNAP_BYTES,
    SHORT_SNAP_BYTES,
    SLOT_BYTES,
    SLOTS_PER_BLOCK,
    PacketRing,
    build_snap_filter,
)

SECOND_NS = 1_000_000_000
BODY = bytes(1400)
WEB = pack("!HHHH", 4000, 443, 8, 0)
PLAIN = {
    "TCP": ethernet(0x0800, ipv4(SYN + BODY)),
    "TCP over IPv6": ethernet(0x86DD, ipv6(SYN + BODY)),
    "UDP": ethernet(0x0800, ipv4(WEB + BODY, 17)),
    "UDP over IPv6": ethernet(0x86DD, ipv6(WEB + BODY, 17)),
    "ICMP": ethernet(0x0800, ipv4(BODY, 1)),
    "ICMP over IPv6": ethernet(0x86DD, ipv6(BODY, 58)),
    "ARP": ethernet(0x0806, bytes(100)),
}
LONG = {
    "DNS question": ethernet(0x0800, ipv4(ASK + BODY, 17)),
    "DNS question over IPv6": ethernet(0x86DD, ipv6(ASK + BODY, 17)),
    "options": ethernet(0x0800, ipv4(SYN + BODY, options=bytes(40))),
    "authentication header": ethernet(0x0800, ipv4(BODY, 51)),
    "hop-by-hop header": ethernet(0x86DD, ipv6(bytes([6, 0, 1, 4, 0, 0, 0, 0]) + SYN + BODY, 0)),
    "fragment header": ethernet(0x86DD, ipv6(bytes([6, 0, 0, 1, 0, 0, 0, 0]) + SYN + BODY, 44)),
    "tag within a tag": ethernet(0x8100, b"\0\5\x08\0" + ipv4(SYN + BODY)),
    "PPPoE": ethernet(0x8864, b"\x11\0\0\1\0\0\0\x21" + ipv4(SYN + BODY)),
    "unknown": ethernet(0x88E5, BODY),
}


@pytest.mark.parametrize("frame", PLAIN.values(), ids=PLAIN.keys())
def test_frames_whose_headers_are_in_a_known_place_are_cut_short(frame: bytes) -> None:
    assert run_filter(frame) == SHORT_SNAP_BYTES


@pytest.mark.parametrize("frame", LONG.values(), ids=LONG.keys())
def test_frames_that_need_more_bytes_are_cut_later(frame: bytes) -> None:
    assert run_filter(frame) == LONG_SNAP_BYTES


@given(
    st.sampled_from([*PLAIN.values(), *LONG.values()]),
    st.integers(0, 300),
    st.dictionaries(st.integers(0, 99), st.integers(0, 255), max_size=4),
    st.booleans(),
)
def test_the_filter_discards_no_frame_and_no_byte_that_counts(
    frame: bytes, size: int, changes: dict[int, int], outgoing: bool
) -> None:
    frame = bytes(changes.get(at, byte) for at, byte in enumerate(frame[:size])) + frame[max(size, 200) :]
    kept = run_filter(frame)
    cut, long = FlowCounter(), FlowCounter()

    cut.count_frame(frame[:kept], outgoing, len(frame))
    long.count_frame(frame[:LONG_SNAP_BYTES], outgoing, len(frame))

    assert kept in (SHORT_SNAP_BYTES, LONG_SNAP_BYTES)
    assert parse_frame(frame[:kept], 0, len(frame)) == parse_frame(frame[:LONG_SNAP_BYTES], 0, len(frame))
    assert cut.pop_reading() == long.pop_reading()


def test_the_filter_is_one_that_the_kernel_accepts() -> None:
    program = build_snap_filter()

    assert program[-1][0] == 0x06
    assert all(at + 1 + max(yes, no) < len(program) for at, (_, yes, no, _) in enumerate(program[:-2]))


class Kernel:
    """Fills the slots of a ring as the kernel does."""

    def __init__(self, blocks: int = 1) -> None:
        self.memory = bytearray(blocks * BLOCK_BYTES)
        self._at, self._n_slots = 0, blocks * SLOTS_PER_BLOCK

    def offset(self, slot: int) -> int:
        block, place = divmod(slot % self._n_slots, SLOTS_PER_BLOCK)
        return block * BLOCK_BYTES + place * SLOT_BYTES

    def deliver(
        self, frame: bytes, *, size: int = 0, packet_type: int = 0, status: int = 1, t_ns: int = 0, mac: int = 66
    ) -> bool:
        at = self.offset(self._at)
        if unpack_from("I", self.memory, at)[0] & 1:
            return False  # full: dropped
        self._at += 1
        stamp = divmod(t_ns, SECOND_NS)
        head = (size or len(frame), len(frame), mac, mac + 14, *stamp, 5, 0x8100)
        pack_into("IIHHIIHH4x", self.memory, at + 4, *head)
        pack_into("HHiHBB8s", self.memory, at + 32, 17, 0x0300, 3, 1, packet_type, 6, bytes(8))
        self.memory[at + mac : at + mac + len(frame)] = frame
        pack_into("I", self.memory, at, status)
        return True


def take(ring: PacketRing, limit: int = 1000, *, macvtap: bool = False, now_ns: int = 0, wall_ns: int = 0) -> list:
    count = ring.count_ready(limit)
    if not count:
        return []
    batch = ring.take(count, from_guest_is_outgoing=macvtap, now_ns=now_ns, wall_ns=wall_ns)
    return [
        (row[:captured].tobytes(), int(size), bool(outgoing), int(t_ns))
        for row, captured, size, outgoing, t_ns in zip(
            batch.data, batch.captured, batch.sizes, batch.outgoing, batch.t_ns, strict=True
        )
    ]


def test_frames_are_taken_in_order_with_their_size() -> None:
    kernel = Kernel()
    ring = PacketRing(kernel.memory)
    for n in range(3):
        kernel.deliver(bytes([n]) * 60, size=1500 + n)

    assert [(frame[0], len(frame), size) for frame, size, _, _ in take(ring)] == [
        (0, 60, 1500),
        (1, 60, 1501),
        (2, 60, 1502),
    ]
    assert take(ring) == []


def test_a_full_ring_takes_new_frames_once_it_was_read() -> None:
    kernel = Kernel(2)
    ring, numbers = PacketRing(kernel.memory), []
    sent = iter(range(10_000))
    for _ in range(5):
        while kernel.deliver(pack("I", number := next(sent))):
            pass
        kernel_lost = number
        while frames := take(ring, 100):
            numbers += [unpack_from("I", frame)[0] for frame, _, _, _ in frames]
        assert numbers[-1] == kernel_lost - 1

    assert len(numbers) == 5 * 2 * SLOTS_PER_BLOCK


def test_the_direction_of_a_tap_is_that_of_its_guest() -> None:
    kernel = Kernel()
    ring = PacketRing(kernel.memory)
    for packet_type in (0, 1, 2, 3, 4):  # for the host, broadcast, multicast, for another host, sent by the host
        kernel.deliver(bytes(60), packet_type=packet_type)

    assert [outgoing for _, _, outgoing, _ in take(ring)] == [True, True, True, True, False]


def test_the_direction_of_a_macvtap_is_the_other_way_round() -> None:
    kernel = Kernel()
    ring = PacketRing(kernel.memory)
    for packet_type in (0, 1, 4):
        kernel.deliver(bytes(60), packet_type=packet_type)

    assert [outgoing for _, _, outgoing, _ in take(ring, macvtap=True)] == [False, False, True]


def test_a_tag_that_the_kernel_removed_counts_as_part_of_the_frame() -> None:
    kernel = Kernel()
    ring = PacketRing(kernel.memory)
    kernel.deliver(bytes(60), status=1)
    kernel.deliver(bytes(60), status=1 | 1 << 4 | 1 << 6)

    assert [size for _, size, _, _ in take(ring)] == [60, 64]


def test_times_are_on_the_clock_of_the_reading_and_never_after_it() -> None:
    kernel = Kernel()
    ring = PacketRing(kernel.memory)
    for t_ns in (100 * SECOND_NS, 100 * SECOND_NS + 1, 90 * SECOND_NS, 101 * SECOND_NS):
        kernel.deliver(bytes(60), t_ns=t_ns)

    times = [t_ns for _, _, _, t_ns in take(ring, now_ns=7 * SECOND_NS, wall_ns=100 * SECOND_NS + 10)]

    assert times == [7 * SECOND_NS - 10, 7 * SECOND_NS - 9, 7 * SECOND_NS, 7 * SECOND_NS]


def test_frames_at_another_offset_are_read_from_there() -> None:
    kernel = Kernel()
    ring = PacketRing(kernel.memory)
    for mac in (66, 66, 82):
        kernel.deliver(b"\7" * 60, mac=mac)

    assert [frame for frame, _, _, _ in take(ring) + take(ring)] == [b"\7" * 60] * 3
