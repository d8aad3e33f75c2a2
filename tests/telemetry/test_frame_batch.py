"""Frames that are counted at once give what each of them gives alone."""

from __future__ import annotations

from pathlib import Path
from struct import pack
from time import thread_time_ns

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.factories.frame_batches import Passed, make_batch
from tests.factories.frames import ethernet

from phasewatch.telemetry.frame_batch import count_batch
from phasewatch.telemetry.netflow import FlowCounter
from phasewatch.telemetry.pcap import PcapReader

DUMP = Path(__file__).parent / "tap-virtio-net.pcap"
DUMP_MAC = bytes.fromhex("525400150010")
GUEST = {4: bytes([10, 0, 0, 1]), 6: bytes.fromhex("fd00") + bytes(13) + b"\1"}
PEERS = {
    4: [bytes([10, 0, 0, n]) for n in (2, 3)] + [bytes([224, 0, 0, 251]), b"\xff" * 4],
    6: [bytes.fromhex("fd00") + bytes(13) + bytes([n]) for n in (2, 3)] + [bytes.fromhex("ff02") + bytes(13) + b"\1"],
}
MILLISECOND_NS = 1_000_000


def packet(version: int, protocol: int, src: bytes, dst: bytes, body: bytes) -> bytes:
    if version == 4:
        return ethernet(0x0800, pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0, src, dst) + body)
    return ethernet(0x86DD, pack("!IHBB16s16s", 6 << 28, len(body), protocol, 64, src, dst) + body)


def tcp(source: int, to: int, flags: int) -> bytes:
    return pack("!HHIIBBHHH", source, to, 1, 1, 0x50, flags, 100, 0, 0)


def udp(source: int, to: int, body: bytes) -> bytes:
    return pack("!HHHH", source, to, 8 + len(body), 0) + body


QUESTION = bytes.fromhex("000101000001000000000000") + b"\7example\4test\0" + b"\0\1\0\1"


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    version = draw(st.sampled_from([4, 6]))
    ends = GUEST[version], draw(st.sampled_from(PEERS[version]))
    src, dst = ends if draw(st.booleans()) else ends[::-1]
    ports = draw(st.sampled_from([(40000, 443), (443, 40000), (40001, 443), (5000, 5001), (40000, 53), (53, 40000)]))
    body = bytes(draw(st.sampled_from([0, 10, 1400])))
    if draw(st.booleans()):
        flags = draw(st.sampled_from([16, 16, 16, 24, 2, 18, 17, 4, 20, 0]))
        frame = packet(version, 6, src, dst, tcp(*ports, flags) + body)
    else:
        frame = packet(version, 17, src, dst, udp(*ports, QUESTION if 53 in ports else body))
    match draw(st.integers(0, 30)):
        case 0:
            return frame[: draw(st.integers(0, 60))]  # shorter than its headers
        case 1:
            return frame[:20] + b"\x20\0" + frame[22:]  # the first of several fragments, or another flow label
        case 2:
            return frame[:12] + b"\x81\0\0\5" + frame[12:]
        case 3:
            return ethernet(0x0806, bytes(46))
        case 4:
            return ethernet(0x88E5, bytes(60))
    return frame


@st.composite
def passages(draw: st.DrawFn) -> list[Passed]:
    known = draw(st.lists(st.tuples(frames(), st.booleans()), min_size=1, max_size=12))
    chosen = draw(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 8)), min_size=60, max_size=120))
    t_ns, passed = 0, []
    for number, step in chosen:
        t_ns += step * MILLISECOND_NS
        passed.append((*known[number % len(known)], t_ns))
    return passed


def count_alone(counter: FlowCounter, passed: list[Passed]) -> None:
    for frame, outgoing, t_ns in passed:
        counter.count_frame(frame[:256], outgoing, len(frame), t_ns=t_ns)


@settings(max_examples=30, deadline=None)
@given(st.lists(passages(), min_size=1, max_size=3), st.sampled_from([400, 31_000, 59_800]))
def test_a_batch_counts_as_its_frames_one_by_one(batches: list[list[Passed]], gap_ms: int) -> None:
    alone, together = FlowCounter(), FlowCounter()

    for number, passed in enumerate(batches):  # with times in which destinations are learnt, new, and no longer new
        late = [(frame, outgoing, t_ns + number * gap_ms * MILLISECOND_NS) for frame, outgoing, t_ns in passed]
        count_alone(alone, late)
        count_batch(together, make_batch(late))
        assert together.pop_reading(late[-1][2]) == alone.pop_reading(late[-1][2])


def test_a_transfer_and_its_connection_are_counted_together() -> None:
    guest, peer = GUEST[4], PEERS[4][0]
    sent = packet(4, 6, guest, peer, tcp(40000, 443, 16) + bytes(1400))
    passed: list[Passed] = [
        (packet(4, 6, guest, peer, tcp(40000, 443, 2)), True, 0),
        (packet(4, 6, peer, guest, tcp(443, 40000, 18)), False, 1),
        *((sent, True, 2 + n) for n in range(500)),
        (packet(4, 6, guest, peer, tcp(40000, 443, 17)), True, 600),
    ]
    counter = FlowCounter()

    count_batch(counter, make_batch(passed))

    reading = counter.pop_reading(600)
    assert (reading.out_pkts, reading.in_pkts, reading.syn_out, reading.new_flows) == (502, 1, 1, 1)
    assert (reading.conn_accepted, reading.conn_closed, reading.conn_closed_ns) == (1, 1, 599)
    assert reading.dst_top_out_bytes == 500 * len(sent) + 2 * len(passed[0][0])


def test_the_frames_of_a_real_tap_are_counted_alike_in_a_batch_and_one_by_one() -> None:
    dumped = list(PcapReader().feed(DUMP.read_bytes()))
    passed: list[Passed] = [
        (frame[12:].ljust(size - 12, b"\0"), frame[18:24] == DUMP_MAC, n) for n, (frame, size) in enumerate(dumped)
    ]
    alone, together = FlowCounter(), FlowCounter()

    count_alone(alone, passed)
    count_batch(together, make_batch(passed))

    reading = together.pop_reading(400)
    assert reading == alone.pop_reading(400)
    assert (reading.out_pkts, reading.in_pkts) == (202, 198)


def test_a_transfer_costs_less_in_a_batch() -> None:
    sent = packet(4, 6, GUEST[4], PEERS[4][0], tcp(40000, 443, 16) + bytes(1400))
    passed: list[Passed] = [(sent, True, n) for n in range(2000)]
    batch = make_batch(passed)
    count_batch(FlowCounter(), batch)

    begin_ns = thread_time_ns()
    count_batch(FlowCounter(), batch)
    together_ns = thread_time_ns() - begin_ns
    count_alone(FlowCounter(), passed)

    assert 3 * together_ns < thread_time_ns() - begin_ns


@pytest.mark.parametrize("count", [1, 47, 48, 200])
def test_frames_that_are_more_than_an_exchange_apart_begin_exchanges(count: int) -> None:
    sent = packet(4, 17, GUEST[4], PEERS[4][0], udp(5000, 5001, bytes(10)))
    passed: list[Passed] = [(sent, True, n * 2000 * MILLISECOND_NS) for n in range(count)]
    alone, together = FlowCounter(), FlowCounter()

    count_alone(alone, passed)
    count_batch(together, make_batch(passed))

    assert together.pop_reading(passed[-1][2]) == alone.pop_reading(passed[-1][2])


def test_runs_of_a_new_destination_count_while_it_is_new() -> None:
    known = packet(4, 17, GUEST[4], PEERS[4][0], udp(5000, 5001, bytes(10)))
    new = packet(4, 17, GUEST[4], PEERS[4][1], udp(5000, 5001, bytes(10)))
    second_ns = 1000 * MILLISECOND_NS
    batches: list[list[Passed]] = [
        [(known, True, n) for n in range(60)],
        [(new, True, 40 * second_ns + n * MILLISECOND_NS) for n in range(60)],
        [(new, True, 100 * second_ns + (n - 30) * MILLISECOND_NS) for n in range(60)],  # it is new for 60 s
    ]
    alone, together = FlowCounter(), FlowCounter()

    for passed in batches:
        count_alone(alone, passed)
        count_batch(together, make_batch(passed))
        reading = together.pop_reading(passed[-1][2])
        assert reading == alone.pop_reading(passed[-1][2])

    assert (reading.dst_new, reading.dst_new_bytes) == (1, 90 * len(new))


def test_a_run_that_follows_another_within_a_second_begins_no_exchange() -> None:
    frame = packet(4, 17, GUEST[4], PEERS[4][0], udp(5000, 5001, bytes(10)))
    counter = FlowCounter()

    for exchange in range(8):
        for pause_ms in (0, 1030):  # the first run lasts 59 ms
            begin_ns = (exchange * 10_000 + pause_ms) * MILLISECOND_NS
            count_batch(counter, make_batch([(frame, True, begin_ns + n * MILLISECOND_NS) for n in range(60)]))

    assert counter.pop_reading(72_000 * MILLISECOND_NS).rhythm == round(1000 * 7 / 9)


def test_open_connections_of_runs_are_not_forgotten() -> None:
    guest, peer = GUEST[4], PEERS[4][0]
    opening: list[Passed] = [
        (packet(4, 6, guest, peer, tcp(40000, 443, 2)), True, 0),
        (packet(4, 6, peer, guest, tcp(443, 40000, 18)), False, 1),
    ]
    data = packet(4, 6, guest, peer, tcp(40000, 443, 16) + bytes(100))
    counter = FlowCounter()
    count_batch(counter, make_batch(opening))

    for minute in range(0, 30, 5):
        count_batch(counter, make_batch([(data, True, minute * 60_000 * MILLISECOND_NS + 2 + n) for n in range(60)]))
        assert counter.pop_reading(minute * 60_000 * MILLISECOND_NS + 100).conn_open == 1
