"""Destinations, connection attempts and rhythms of a VM, and the bounds of the flow table."""

from __future__ import annotations

import pytest

from phasewatch.telemetry.flow_table import LEARNING_NS, MAX_FLOWS, NEW_NS, SILENT_NS, FlowReading, FlowTable
from phasewatch.telemetry.headers import IpHeaders

S = 1_000_000_000
GUEST, FAR, OTHER = b"\x0a\x00\x02\x0f", b"\xc6\x33\x64\x07", b"\xc6\x33\x64\x08"
SYN, RST, FIN, ACK = 2, 4, 1, 16
TCP, UDP = 6, 17
T1 = LEARNING_NS + S  # after the time in which every destination counts as known


class Wire:
    """Passes frames between the guest and remote ends."""

    def __init__(self, **settings: int) -> None:
        self.table = FlowTable(**settings)
        self.send(0.0, TCP, OTHER, 9, flags=SYN)  # the first frame begins the learning

    def send(self, t_s: float, protocol: int, far: bytes, port: int, *, near: int = 40_000, flags: int = ACK,
             size: int = 100) -> None:  # fmt: skip
        headers = IpHeaders(protocol, GUEST, far, (near, port), flags if protocol == TCP else 0)
        self.table.add_frame(headers, True, size, round(t_s * S))

    def receive(self, t_s: float, protocol: int, far: bytes, port: int, *, near: int = 40_000, flags: int = ACK,
                size: int = 100) -> None:  # fmt: skip
        headers = IpHeaders(protocol, far, GUEST, (port, near), flags if protocol == TCP else 0)
        self.table.add_frame(headers, False, size, round(t_s * S))

    def read(self, t_s: float) -> FlowReading:
        return self.table.pop_reading(round(t_s * S))


@pytest.fixture
def wire() -> Wire:
    return Wire()


def test_a_destination_is_an_address_port_and_protocol(wire: Wire) -> None:
    for far, port, protocol in ((FAR, 80, TCP), (FAR, 80, TCP), (FAR, 81, TCP), (FAR, 81, UDP), (OTHER, 80, TCP)):
        wire.send(T1 / S, protocol, far, port, flags=SYN)

    assert wire.read(T1 / S).dst_new == 4


def test_destinations_of_the_first_half_minute_are_known(wire: Wire) -> None:
    wire.send(20, TCP, FAR, 80, flags=SYN)
    wire.send(T1 / S, TCP, FAR, 80, flags=SYN)

    assert wire.read(T1 / S).dst_new == 0


def test_bytes_of_a_new_destination_count_as_new_for_a_minute(wire: Wire) -> None:
    begin = T1 / S
    wire.read(begin)
    before = wire.read(begin)
    wire.send(begin, UDP, FAR, 123, size=70)
    wire.receive(begin + 1, UDP, FAR, 123, size=30)
    wire.send(begin + NEW_NS / S, UDP, FAR, 123, size=500)

    reading = wire.read(begin + NEW_NS / S)

    assert reading.dst_bytes - before.dst_bytes == 600
    assert reading.dst_new_bytes == 100


def test_a_client_of_the_guest_is_no_destination(wire: Wire) -> None:
    before = wire.read(T1 / S)
    wire.receive(T1 / S, TCP, FAR, 50_000, near=22, flags=SYN)
    wire.send(T1 / S, TCP, FAR, 50_000, near=22, flags=SYN | ACK)
    wire.send(T1 / S, UDP, FAR, 50_000, near=53)  # its answer is read before the question

    reading = wire.read(T1 / S)

    assert (reading.dst_new, reading.dst_bytes) == (0, before.dst_bytes)


def test_group_addresses_are_no_destinations(wire: Wire) -> None:
    before = wire.read(T1 / S)
    for far in (b"\xe0\0\0\xfb", b"\xff\xff\xff\xff", b"\xff\x02" + bytes(14)):
        wire.send(T1 / S, UDP, far, 5353)

    assert wire.read(T1 / S)[:2] == (0, before.dst_bytes)


def test_the_busiest_destination_of_each_tick_counts(wire: Wire) -> None:
    before = wire.read(1)
    wire.send(1, UDP, FAR, 1, size=60)
    wire.receive(1, UDP, FAR, 1, size=140)
    wire.send(1, UDP, OTHER, 2, size=150)
    first = wire.read(1.5)
    wire.send(2, UDP, OTHER, 2, size=50)
    second = wire.read(2)

    assert (first.dst_top_bytes - before.dst_top_bytes, first.dst_top_out_bytes - before.dst_top_out_bytes) == (200, 60)
    assert second.dst_top_bytes - first.dst_top_bytes == 50


def test_attempts_are_accepted_refused_or_silent(wire: Wire) -> None:
    before = wire.read(10)
    for near, far, port in ((1, FAR, 80), (2, FAR, 81), (3, OTHER, 82)):
        wire.send(10, TCP, far, port, near=near, flags=SYN)
    wire.receive(10.1, TCP, FAR, 80, near=1, flags=SYN | ACK)
    wire.receive(10.1, TCP, FAR, 81, near=2, flags=RST | ACK)
    reading, late = wire.read(10 + SILENT_NS / S - 0.1), wire.read(10 + SILENT_NS / S)

    assert (reading.conn_accepted, reading.conn_refused, reading.conn_silent - before.conn_silent) == (1, 1, 0)
    assert (late.conn_accepted, late.conn_refused, late.conn_silent - before.conn_silent) == (1, 1, 1)


def test_a_repeated_syn_is_the_same_attempt(wire: Wire) -> None:
    before = wire.read(10).conn_silent
    for t_s in (10, 11, 13, 17):
        wire.send(t_s, TCP, FAR, 80, flags=SYN)
        wire.read(t_s)
    wire.receive(18, TCP, FAR, 80, flags=SYN | ACK)
    reading = wire.read(30)

    assert (reading.conn_silent - before, reading.conn_accepted, reading.conn_open) == (1, 0, 1)


@pytest.mark.parametrize("ending", [FIN | ACK, RST])
def test_a_connection_is_open_from_the_answer_to_the_first_end(wire: Wire, ending: int) -> None:
    wire.send(10, TCP, FAR, 80, flags=SYN)
    wire.receive(10.5, TCP, FAR, 80, flags=SYN | ACK)
    is_open = wire.read(11)
    wire.send(14.5, TCP, FAR, 80, flags=ending)
    wire.receive(14.6, TCP, FAR, 80, flags=FIN | ACK)
    is_closed = wire.read(15)

    assert (is_open.conn_open, is_open.conn_closed) == (1, 0)
    assert (is_closed.conn_open, is_closed.conn_closed, is_closed.conn_closed_ns) == (0, 1, 4 * S)


def test_an_idle_connection_is_forgotten_after_ten_minutes(wire: Wire) -> None:
    wire.send(10, TCP, FAR, 80, flags=SYN)
    wire.receive(10, TCP, FAR, 80, flags=SYN | ACK)
    wire.send(300, TCP, FAR, 80)

    assert (wire.read(890).conn_open, wire.read(901).conn_open) == (1, 0)


def test_a_clocklike_beacon_has_a_rhythm_and_a_burst_has_none(wire: Wire) -> None:
    for turn in range(12):
        wire.send(10 + 10 * turn, UDP, FAR, 443)
        wire.send(10.2 + 10 * turn, UDP, FAR, 443)  # the same exchange
    for frame in range(50):
        wire.send(120 + frame / 100, UDP, OTHER, 80)

    assert wire.read(121).rhythm == round(1000 * 11 / 13)


def test_a_rhythm_ends_when_beats_are_missed(wire: Wire) -> None:
    for turn in range(5):
        wire.send(10 + 10 * turn, UDP, FAR, 443)

    assert wire.read(60).rhythm > 600
    assert wire.read(72).rhythm == 0


def test_irregular_exchanges_have_a_smaller_rhythm(wire: Wire) -> None:
    for t_s in (10, 12, 31, 33.5, 70):
        wire.send(t_s, UDP, FAR, 443)

    assert wire.read(71).rhythm < 200


def test_a_flood_of_destinations_stays_within_the_bound() -> None:
    wire = Wire(max_flows=100)
    for number in range(1000):
        wire.send(T1 / S, TCP, FAR, number + 1, near=number, flags=SYN)
    reading = wire.read(T1 / S)

    assert len(wire.table) == 100
    assert reading.dst_new == 1000
    assert wire.table.evicted == (1 + 1000 - 100) * 2  # destinations and attempts
    assert MAX_FLOWS == 4096
