"""Find the frame behind a virtio-net header: in a real dump, for every kind of frame, and for ambiguous ones."""

from __future__ import annotations

from pathlib import Path
from struct import pack

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.factories.frames import ASK, SYN, ipv4, ipv6
from tests.factories.qemu import MAC

from phasewatch.telemetry.netflow import FlowCounter
from phasewatch.telemetry.pcap import PcapReader
from phasewatch.telemetry.vnet_header import HEADER_LENGTHS, VnetHeaderFinder

DUMP = Path(__file__).parent / "tap-virtio-net.pcap"  # 400 frames of a Debian guest on a tap, by QEMU 7.2
DUMP_MAC = bytes.fromhex("525400150010")
PEER = bytes.fromhex("525400aabb01")
# As Linux fills it: nothing, a checksum that is still to be made, a segment of 1448 bytes to be cut.
VNET = [bytes(12), bytes.fromhex("010000000000220006000000"), bytes.fromhex("01014200a805220006000000")]


def sent(ethertype: int, body: bytes, to: bytes = PEER) -> bytes:
    return to + MAC + pack("!H", ethertype) + body


ARP = b"\0\1\x08\0\6\4\0\1" + bytes(20)
FRAMES = {
    "IPv4": sent(0x0800, ipv4(SYN)),
    "IPv6": sent(0x86DD, ipv6(ASK, 17)),
    "ARP": sent(0x0806, ARP, b"\xff" * 6),
    "IPv4 multicast": sent(0x0800, ipv4(ASK, 17), b"\x01\x00\x5e\0\0\x01"),
    "IPv6 multicast": sent(0x86DD, ipv6(ASK, 17), b"\x33\x33\0\0\0\x01"),
    "VLAN": sent(0x8100, b"\0\5\x08\0" + ipv4(SYN)),
    "spanning tree": sent(38, b"\x42\x42\3" + bytes(35), b"\x01\x80\xc2\0\0\0"),
    "LLDP": sent(0x88CC, bytes(46), b"\x01\x80\xc2\0\0\x0e"),
    "unknown": sent(0x88B5, bytes(range(60))),
    "segments to be cut": sent(0x0800, ipv4(SYN + bytes(60000))),
}


def test_a_dump_of_a_real_tap_is_read_behind_its_virtio_headers() -> None:
    frames = list(PcapReader().feed(DUMP.read_bytes()))
    finder, counter = VnetHeaderFinder([DUMP_MAC]), FlowCounter()
    for frame, size in frames:
        outgoing = frame[18:24] == DUMP_MAC  # this dump holds both directions in one file
        counter.count_frame(frame, outgoing, size, start=finder.locate(frame, size, outgoing=outgoing))

    counts = counter.pop_reading()

    flows, syns, questions = count_with_dpkt([frame[12:] for frame, _ in frames])
    assert finder.length == 12
    assert (counts.out_pkts, counts.in_pkts) == (202, 198)
    assert (counts.out_bytes or 0) + (counts.in_bytes or 0) == sum(size for _, size in frames) - 12 * len(frames)
    assert (counts.new_flows, counts.syn_out, counts.dns_queries) == (len(flows), syns, questions)
    assert len(flows) > 10


def count_with_dpkt(frames: list[bytes]) -> tuple[set[frozenset[tuple[bytes, int]]], int, int]:
    """Return flows, opening SYNs and DNS questions of the guest."""
    flows, syns, questions = set(), 0, 0
    for frame in frames:
        packet = dpkt.ethernet.Ethernet(frame).data
        body = packet.data if isinstance(packet, dpkt.ip.IP | dpkt.ip6.IP6) else None
        if not isinstance(body, dpkt.tcp.TCP | dpkt.udp.UDP):
            continue
        flows.add(frozenset({(packet.src, body.sport), (packet.dst, body.dport)}))
        is_out = frame[6:12] == DUMP_MAC
        if isinstance(body, dpkt.tcp.TCP):
            syns += is_out and body.flags & (dpkt.tcp.TH_SYN | dpkt.tcp.TH_ACK) == dpkt.tcp.TH_SYN
        else:
            questions += is_out and body.dport == 53
    return flows, syns, questions


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("length", HEADER_LENGTHS)
@pytest.mark.parametrize("header", VNET, ids=["plain", "checksum", "segments"])
def test_the_first_frame_shows_the_header_length(name: str, length: int, header: bytes) -> None:
    frame = (header + bytes(8))[:length] + FRAMES[name]

    assert VnetHeaderFinder([MAC]).locate(frame, len(frame), outgoing=True) == length


@pytest.mark.parametrize("name", ["IPv4", "IPv6", "ARP", "VLAN", "segments to be cut"])
@pytest.mark.parametrize("length", HEADER_LENGTHS)
def test_a_changed_mac_address_does_not_matter(name: str, length: int) -> None:
    frame = VNET[1][:length].ljust(length, b"\0") + FRAMES[name]

    assert VnetHeaderFinder([b"\x02" + bytes(5)]).locate(frame, len(frame), outgoing=True) == length


def test_a_new_guest_driver_changes_the_header_without_losing_frames() -> None:
    finder = VnetHeaderFinder([MAC])
    found = []
    for length in (10, 10, 12, 12, 0, 12):  # firmware, the guest's driver; an announcement by QEMU itself has none
        frame = bytes(length) + FRAMES["IPv4"]
        found.append(finder.locate(frame, len(frame), outgoing=True))

    assert found == [10, 10, 12, 12, 0, 12]


def test_an_ambiguous_frame_uses_the_known_header_length() -> None:
    # At 0 as well: the guest filled its own header and addresses so that they look like a frame.
    decoy = MAC + PEER + b"\x08\x00" + b"\x45\x00\x00\x28" + bytes(5) + b"\x06"
    frame = VNET[0] + FRAMES["IPv4"]
    finder = VnetHeaderFinder([MAC])
    finder.locate(frame, len(frame), outgoing=True)

    for _ in range(50):
        finder.locate(decoy.ljust(90, b"\0"), 90, outgoing=True)

    assert finder.locate(frame, len(frame), outgoing=True) == 12


def test_bytes_without_a_frame_have_no_offset() -> None:
    assert VnetHeaderFinder([MAC]).locate(b"\xff" * 90, 90, outgoing=True) is None


@given(st.binary(max_size=160), st.integers(0, 70000), st.booleans())
def test_any_bytes_give_an_offset_inside_the_frame_or_none(frame: bytes, beyond: int, outgoing: bool) -> None:
    found = VnetHeaderFinder([MAC]).locate(frame, len(frame) + beyond, outgoing=outgoing)

    assert found is None or (found in HEADER_LENGTHS and found + 14 <= len(frame))
