"""Flow counters by direction, in agreement with dpkt."""

from __future__ import annotations

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasewatch.channels import list_raw_fields
from phasewatch.telemetry.netflow import FlowCounter, NetflowReading, TrafficLog, parse_headers
from phasewatch.types import SourceKind

GUEST, FAR = b"\x0a\x00\x02\x0f", b"\xc6\x33\x64\x07"
SYN, RST, ACK = 2, 4, 16


def frame(
    protocol: int, sport: int, dport: int, *, out: bool = True, flags: int = 0, data: bytes = b"", far: bytes = FAR
) -> bytes:
    body: dpkt.Packet
    if protocol == 6:
        body = dpkt.tcp.TCP(sport=sport, dport=dport, flags=flags, data=data)
    else:
        body = dpkt.udp.UDP(sport=sport, dport=dport, ulen=8 + len(data), data=data)
    packet = dpkt.ip.IP(src=GUEST if out else far, dst=far if out else GUEST, p=protocol, data=body)
    packet.len = 20 + len(bytes(body))
    return bytes(dpkt.ethernet.Ethernet(data=packet))


def counted(*frames: tuple[bytes, bool]) -> NetflowReading:
    counter = FlowCounter()
    for data, outgoing in frames:
        counter.count_frame(data, outgoing)
    return counter.pop_reading()


def test_a_reading_is_in_the_order_of_the_raw_table() -> None:
    assert NetflowReading._fields == tuple(spec.field for spec in list_raw_fields(SourceKind.NETFLOW))


def test_frames_and_bytes_are_counted_by_direction() -> None:
    ask, answer = frame(17, 5000, 53, data=b"x" * 30), frame(17, 53, 5000, out=False, data=b"y" * 90)

    reading = counted((ask, True), (ask, True), (answer, False))

    assert (reading.out_pkts, reading.out_bytes) == (2, 2 * (14 + 20 + 8 + 30))
    assert (reading.in_pkts, reading.in_bytes) == (1, 14 + 20 + 8 + 90)


def test_a_flow_is_new_once_and_its_answer_is_the_same_flow() -> None:
    reading = counted(
        (frame(6, 4000, 80, flags=SYN), True),
        (frame(6, 80, 4000, out=False, flags=SYN | ACK), False),
        (frame(6, 4000, 80, flags=ACK), True),
        (frame(6, 4001, 80, flags=SYN), True),
        (frame(17, 4001, 80), True),
    )

    assert reading.new_flows == 3


def test_only_the_guests_opening_syn_and_refusals_to_it_count() -> None:
    reading = counted(
        (frame(6, 4000, 80, flags=SYN), True),
        (frame(6, 80, 4000, flags=SYN | ACK), True),
        (frame(6, 80, 4000, flags=SYN, out=False), False),
        (frame(6, 80, 4000, flags=RST | ACK, out=False), False),
        (frame(6, 80, 4000, flags=RST), True),
    )

    assert (reading.syn_out, reading.rst_in) == (1, 1)


def test_a_dns_query_is_a_datagram_to_port_53() -> None:
    reading = counted(
        (frame(17, 4000, 53), True), (frame(17, 53, 4000, out=False), False), (frame(6, 4000, 53, flags=SYN), True)
    )

    assert reading.dns_queries == 1


def test_destinations_are_counted_anew_in_each_tick() -> None:
    counter = FlowCounter()
    for port in (80, 81, 80):
        counter.count_frame(frame(6, 4000, port, flags=SYN, far=bytes((198, 18, 0, port))), True)
    counter.count_frame(frame(6, 99, 4000, out=False), False)

    first, second = counter.pop_reading(), counter.pop_reading()

    assert (first.dst_ports, first.dst_ips) == (2, 2)
    assert (second.dst_ports, second.dst_ips, second.syn_out) == (0, 0, 3)


def test_padding_is_not_parsed_as_ports() -> None:
    bare = dpkt.ip.IP(src=GUEST, dst=FAR, p=6)
    padded = bytes(dpkt.ethernet.Ethernet(data=bare)).ljust(60, b"\x01")

    assert counted((padded, True))[:10] == (1, 60, 0, 0, 0, 0, 0, 0, 0, 1)


def test_a_later_fragment_has_no_ports() -> None:
    whole = bytearray(frame(17, 4000, 53, data=bytes(64)))
    whole[20:22] = (185).to_bytes(2, "big")

    assert counted((bytes(whole), True))[:10] == (1, len(whole), 0, 0, 0, 0, 0, 0, 0, 1)


def test_a_cut_frame_counts_with_its_original_size() -> None:
    whole = frame(6, 4000, 80, flags=SYN, data=bytes(1400))
    cut, full = FlowCounter(), FlowCounter()

    cut.count_frame(whole[:96], True, wire_bytes=len(whole))
    full.count_frame(whole, True)

    assert cut.pop_reading() == full.pop_reading()


def test_the_flow_table_is_bounded_and_counts_forgotten_flows() -> None:
    counter = FlowCounter(max_flows=100)

    for port in range(1000):
        counter.count_frame(frame(17, 4000, 1 + port), True)
        counter.count_frame(frame(17, 4000, 1), True)  # always in use, never forgotten

    assert counter.pop_reading().new_flows == 1000
    assert 800 < counter.forgotten < 1000
    assert len(counter._young) + len(counter._old) <= 100


def test_a_traffic_log_has_one_row_per_remote_address_and_port() -> None:
    log = TrafficLog(max_rows=3)
    log.add_frame(frame(17, 4000, 53, data=b"ab"), True)
    log.add_frame(frame(17, 4001, 53, data=b"ab"), True)
    log.add_frame(frame(17, 53, 4000, out=False), False)
    log.add_frame(b"\xff" * 42, True)
    log.add_frame(frame(6, 4000, 80), True)

    rows = log.rows()

    assert [(row.outgoing, row.protocol, row.ip, row.port, row.frames, row.bytes) for row in rows] == [
        (False, "udp", "198.51.100.7", 53, 1, 42),
        (True, "other", "", 0, 1, 42),
        (True, "udp", "198.51.100.7", 53, 2, 88),
    ]
    assert log.frames_beyond == 1


def six(sport: int, dport: int, *, protocol: int = 6, out: bool = True, flags: int = SYN, far: int = 7) -> bytes:
    """Build what `frame` builds, over IPv6."""
    guest, other = b"\xfd" + bytes(14) + b"\x0f", b"\xfd" + bytes(14) + bytes([far])
    body = bytes(
        dpkt.tcp.TCP(sport=sport, dport=dport, flags=flags) if protocol == 6 else dpkt.udp.UDP(sport=sport, dport=dport)
    )
    ends = guest + other if out else other + guest
    return bytes(12) + b"\x86\xdd\x60\0\0\0" + len(body).to_bytes(2, "big") + bytes([protocol, 64]) + ends + body


def test_ipv6_is_counted_like_ipv4() -> None:
    reading = counted(
        (six(4000, 80), True),
        (six(80, 4000, out=False, flags=RST | ACK), False),
        (six(4001, 81, far=8), True),
        (six(4002, 53, protocol=17), True),
    )

    assert reading[4:10] == (3, 2, 1, 1, 3, 2)  # flows, SYNs, refusals, questions, ports, addresses


def test_vlan_frames_are_counted_like_others() -> None:
    plain = frame(6, 4000, 80, flags=SYN)

    reading = counted((plain[:12] + b"\x81\0\0\5" + plain[12:], True))

    assert reading[4:10] == (1, 1, 0, 0, 1, 1)


OPAQUE = bytes(12) + b"\x88\xe5" + bytes(60)  # MACsec: encrypted
GROUP = b"\x01" + OPAQUE[1:]


@pytest.mark.parametrize(
    ("frames", "is_known"),
    [
        pytest.param([], True, id="nothing passes"),
        pytest.param([(OPAQUE, True)] * 3, True, id="too few to judge by"),
        pytest.param([(OPAQUE, True)] * 5 + [(frame(6, 1, 2), True)] * 5, True, id="half of them"),
        pytest.param([(OPAQUE, True)] * 6 + [(frame(6, 1, 2), True)] * 5, False, id="most that the guest sends"),
        pytest.param([(OPAQUE, False)] * 6 + [(frame(6, 1, 2), True)] * 50, False, id="most that it is sent"),
        pytest.param([(GROUP, False)] * 50, True, id="others talk to everybody"),
        pytest.param([(GROUP, True)] * 50, False, id="the guest talks to everybody"),
        pytest.param([(bytes(12) + b"\x08\x06" + bytes(28), True)] * 50, True, id="ARP"),
        pytest.param([(bytes(12) + b"\x08\0" + bytes(50), True)] * 50, False, id="no IPv4 where it should stand"),
    ],
)
def test_flows_are_unknown_while_most_frames_cannot_be_parsed(frames: list[tuple[bytes, bool]], is_known: bool) -> None:
    reading = counted(*frames)

    assert reading.out_pkts == sum(outgoing for _, outgoing in frames)
    assert {n is None for n in reading[4:]} == {not is_known}


def test_frames_cut_before_their_ports_count_as_unparsed() -> None:
    counter = FlowCounter()
    for _ in range(5):
        counter.count_frame(frame(6, 4000, 80, flags=SYN)[:40], True, wire_bytes=1500)

    assert counter.pop_reading().new_flows is None


def test_flows_are_known_again_after_parsed_frames() -> None:
    counter = FlowCounter()
    for _ in range(10):
        counter.count_frame(OPAQUE, True)
    first = counter.pop_reading()
    for port in range(11):
        counter.count_frame(frame(6, 4000, 1 + port, flags=SYN), True)

    second = counter.pop_reading()

    assert (first.new_flows, second.new_flows, second.out_pkts) == (None, 11, 21)


def test_all_fields_are_unknown_while_frame_starts_are_unknown() -> None:
    counter = FlowCounter()
    for _ in range(5):
        counter.count_frame(b"\xff" * 60, True, start=None)

    assert set(counter.pop_reading()) == {None}


def oracle(frames: list[tuple[bytes, bool]]) -> NetflowReading:
    """Count with dpkt, sets and no bounds."""
    flows, ports, ips = set(), set(), set()
    total = dict.fromkeys(NetflowReading._fields, 0)
    for data, outgoing in frames:
        side = "out" if outgoing else "in"
        total[f"{side}_pkts"] += 1
        total[f"{side}_bytes"] += len(data)
        packet = dpkt.ethernet.Ethernet(data).data
        if not isinstance(packet, dpkt.ip.IP):
            continue
        if outgoing:
            ips.add(packet.dst)
        body = packet.data
        if not isinstance(body, dpkt.tcp.TCP | dpkt.udp.UDP):
            continue
        near, far = (packet.src, body.sport), (packet.dst, body.dport)
        flows.add((packet.p, *((near, far) if outgoing else (far, near))))
        flags = body.flags if isinstance(body, dpkt.tcp.TCP) else 0
        if outgoing:
            ports.add(body.dport)
            total["syn_out"] += flags & dpkt.tcp.TH_SYN != 0 and flags & dpkt.tcp.TH_ACK == 0
            total["dns_queries"] += isinstance(body, dpkt.udp.UDP) and body.dport == 53
        else:
            total["rst_in"] += flags & dpkt.tcp.TH_RST != 0
    return NetflowReading(**total | {"new_flows": len(flows), "dst_ports": len(ports), "dst_ips": len(ips)})


PORTS = st.sampled_from([53, 80, 443, 4000, 4001, 65535])
ADDRESSES = st.sampled_from([bytes((198, 18, 0, n)) for n in range(4)])


@st.composite
def passing_frames(draw: st.DrawFn) -> tuple[bytes, bool]:
    out = draw(st.booleans())
    kind = draw(st.sampled_from([6, 6, 17, 17, 1, 0x0806]))
    if kind == 0x0806:
        return bytes(dpkt.ethernet.Ethernet(type=kind, data=dpkt.arp.ARP())), out
    if kind == 1:
        echo = dpkt.icmp.ICMP(type=8, data=dpkt.icmp.ICMP.Echo(id=1, seq=2))
        return bytes(
            dpkt.ethernet.Ethernet(data=dpkt.ip.IP(src=GUEST, dst=draw(ADDRESSES), p=1, len=28, data=echo))
        ), out
    flags = draw(st.integers(0, 63))
    data = draw(st.binary(max_size=30))
    return frame(kind, draw(PORTS), draw(PORTS), out=out, flags=flags, data=data, far=draw(ADDRESSES)), out


@given(st.lists(passing_frames(), max_size=25))
def test_counts_agree_with_dpkt(frames: list[tuple[bytes, bool]]) -> None:
    assert counted(*frames)[:10] == oracle(frames)[:10]  # the oracle of the others is tests/oracle/flows.py


@given(passing_frames(), st.integers(0, 80), st.integers(0, 79), st.integers(0, 255), st.booleans())
def test_broken_frames_are_counted_without_an_error(
    whole: tuple[bytes, bool], cut: int, at: int, value: int, outgoing: bool
) -> None:
    broken = bytearray(whole[0])
    if at < len(broken):
        broken[at] = value
    counter, log = FlowCounter(), TrafficLog()

    counter.count_frame(bytes(broken[:cut]), outgoing)
    log.add_frame(bytes(broken[:cut]), outgoing)

    assert sum(n or 0 for n in counter.pop_reading()[:4]) == 1 + min(cut, len(broken))


@pytest.mark.parametrize("data", [b"", b"\0" * 13, b"\xff" * 33, b"\0" * 12 + b"\x08\0" + b"\x45" * 20])
def test_other_bytes_have_no_headers(data: bytes) -> None:
    assert parse_headers(data) is None or len(data) >= 34
