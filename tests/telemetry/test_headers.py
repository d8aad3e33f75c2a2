"""Parse frame headers behind all encapsulations, in agreement with dpkt."""

from __future__ import annotations

from struct import pack

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.factories.frames import ASK, DST4, DST6, MACS, SRC4, SRC6, SYN, ethernet, ipv4, ipv6

from phasewatch.telemetry.headers import MAX_EXTENSION_HEADERS, FrameKind, IpHeaders, has_network_header, parse_frame

FOUR = IpHeaders(6, SRC4, DST4, (4000, 443), 2)
SIX = IpHeaders(6, SRC6, DST6, (4000, 443), 2)


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        pytest.param(ethernet(0x0800, ipv4(SYN)), FOUR, id="IPv4"),
        pytest.param(ethernet(0x0800, ipv4(SYN, options=b"\x01" * 40)), FOUR, id="IPv4 with all options"),
        pytest.param(ethernet(0x0800, ipv4(SYN, fragment=0x2000)), FOUR, id="first fragment"),
        pytest.param(
            ethernet(0x0800, ipv4(ASK, 17, fragment=7)), IpHeaders(17, SRC4, DST4, None, 0), id="later fragment"
        ),
        pytest.param(
            ethernet(0x0800, ipv4(pack("!BBHII", 6, 4, 0, 1, 1) + bytes(12) + SYN, 51)), FOUR, id="AH in IPv4"
        ),
        pytest.param(ethernet(0x86DD, ipv6(SYN)), SIX, id="IPv6"),
        pytest.param(ethernet(0x86DD, ipv6(ASK, 17)), IpHeaders(17, SRC6, DST6, (4000, 53), 0), id="IPv6 datagram"),
        pytest.param(
            ethernet(0x86DD, ipv6(pack("!BB6x", 60, 0) + pack("!BB14x", 43, 1) + pack("!BB6x", 6, 0) + SYN, 0)),
            SIX,
            id="hop-by-hop, destination, routing",
        ),
        pytest.param(ethernet(0x86DD, ipv6(pack("!BBHI", 6, 0, 1, 9) + SYN, 44)), SIX, id="first fragment of IPv6"),
        pytest.param(
            ethernet(0x86DD, ipv6(pack("!BBHI", 17, 0, 8, 9) + ASK, 44)),
            IpHeaders(17, SRC6, DST6, None, 0),
            id="later fragment of IPv6",
        ),
        pytest.param(ethernet(0x86DD, ipv6(pack("!BBHII", 6, 4, 0, 1, 1) + bytes(12) + SYN, 51)), SIX, id="AH in IPv6"),
        pytest.param(ethernet(0x86DD, ipv6(bytes(8), 59)), IpHeaders(59, SRC6, DST6, None, 0), id="nothing behind"),
        pytest.param(ethernet(0x8100, b"\0\5\x08\0" + ipv4(SYN)), FOUR, id="VLAN"),
        pytest.param(ethernet(0x88A8, b"\0\5\x81\0\0\6\x86\xdd" + ipv6(SYN)), SIX, id="QinQ"),
        pytest.param(ethernet(0x9100, b"\0\5\x91\0\0\6\x81\0\0\7\x08\0" + ipv4(SYN)), FOUR, id="three tags"),
        pytest.param(ethernet(8 + 40, b"\xaa\xaa\3\0\0\0\x08\0" + ipv4(SYN)), FOUR, id="LLC and SNAP"),
        pytest.param(ethernet(0x8864, b"\x11\0\0\1\0\x2a\0\x21" + ipv4(SYN)), FOUR, id="PPPoE"),
        pytest.param(ethernet(0x8847, b"\0\1\0\x40\0\2\1\x40" + ipv6(SYN)), SIX, id="two labels of MPLS"),
        pytest.param(ethernet(0x0800, ipv4(SYN)).ljust(90, b"\x99"), FOUR, id="padding"),
        pytest.param(
            ethernet(0x0800, ipv4(b"")).ljust(60, b"\x99"), IpHeaders(6, SRC4, DST4, None, 0), id="padding is no ports"
        ),
        pytest.param(ethernet(0x0800, ipv4(SYN + bytes(65000))), FOUR, id="as large as IPv4 goes"),
        pytest.param(ethernet(0x86DD, ipv6(SYN)[:4] + b"\0\0" + ipv6(SYN)[6:] + bytes(70000)), SIX, id="jumbogram"),
        pytest.param(ethernet(0x0806, bytes(28)), FrameKind.LINK, id="ARP"),
        pytest.param(ethernet(0x88CC, bytes(46)), FrameKind.LINK, id="LLDP"),
        pytest.param(ethernet(38, b"\x42\x42\3" + bytes(35)), FrameKind.LINK, id="spanning tree"),
        pytest.param(
            ethernet(0x8864, b"\x11\0\0\1\0\x2a\xc0\x21" + bytes(40)), FrameKind.LINK, id="PPPoE's own messages"
        ),
        pytest.param(ethernet(0x88E5, bytes(60)), FrameKind.OPAQUE, id="MACsec"),
        pytest.param(ethernet(0x88B5, bytes(60)), FrameKind.OPAQUE, id="a type that nobody knows"),
        pytest.param(ethernet(0x8847, b"\0\1\1\x40" + bytes(60)), FrameKind.OPAQUE, id="MPLS without IP"),
        pytest.param(ethernet(0x8100, b"\0\5\x81\0" * 100), FrameKind.OPAQUE, id="tags without end"),
        pytest.param(ethernet(0x0800, b"\x65" + ipv4(SYN)[1:]), FrameKind.BROKEN, id="another version"),
        pytest.param(b"", FrameKind.BROKEN, id="nothing"),
    ],
)
def test_headers_are_found_behind_all_supported_encapsulations(frame: bytes, expected: IpHeaders | FrameKind) -> None:
    found = parse_frame(frame)

    assert (found._replace(at=0) if isinstance(found, IpHeaders) else found) == expected


def test_a_frame_is_parsed_from_the_given_offset() -> None:
    assert parse_frame(bytes(12) + ethernet(0x0800, ipv4(SYN)), 12) == FOUR._replace(at=12 + 14 + 20)


def test_ports_behind_the_captured_bytes_are_marked_as_cut() -> None:
    whole = ethernet(0x86DD, ipv6(pack("!BB6x", 6, 0) + SYN, 60))

    cut = parse_frame(whole[:66], 0, len(whole))

    assert isinstance(cut, IpHeaders)
    assert (cut.ports, cut.is_cut) == (None, True)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(ethernet(0x0800, ipv4(SYN[:8], fragment=0x2000)), id="IPv4"),
        pytest.param(ethernet(0x86DD, ipv6(pack("!BBHI", 6, 0, 1, 9) + SYN[:8], 44)), id="IPv6"),
        pytest.param(ethernet(0x86DD, ipv6(pack("!BBHI", 60, 0, 1, 9) + pack("!BB6x", 6, 0), 44)), id="no TCP at all"),
    ],
)
def test_a_first_fragment_too_short_for_its_ports_hides_them(frame: bytes) -> None:
    found = parse_frame(frame)

    assert isinstance(found, IpHeaders)
    assert (found.ports, found.is_cut) == (None, True)


def test_the_number_of_extension_headers_is_bounded() -> None:
    chain = pack("!BB6x", 60, 0) * 8000

    found = parse_frame(ethernet(0x86DD, ipv6(chain, 60)))

    assert isinstance(found, IpHeaders)
    assert (found.ports, found.is_cut, MAX_EXTENSION_HEADERS <= 32) == (None, True, True)


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        pytest.param(ethernet(0x0800, ipv4(SYN)), True, id="IPv4"),
        pytest.param(ethernet(0x0800, ipv4(SYN)).ljust(60, b"\0"), True, id="padded"),
        pytest.param(ethernet(0x0800, ipv4(SYN))[:-1], False, id="shorter than it says"),
        pytest.param(ethernet(0x8100, b"\0\5\x86\xdd" + ipv6(SYN)), True, id="IPv6 in a VLAN"),
        pytest.param(ethernet(0x0806, b"\0\1\x08\0\6\4" + bytes(22)), True, id="ARP"),
        pytest.param(ethernet(0x0806, bytes(28)), False, id="ARP of nothing"),
        pytest.param(ethernet(0x88B5, bytes(60)), False, id="unknown"),
    ],
)
def test_a_network_header_needs_matching_type_version_and_length(frame: bytes, expected: bool) -> None:
    assert has_network_header(frame, 0, len(frame)) is expected
    assert has_network_header(bytes(12) + frame, 12, 12 + len(frame)) is expected


PORT = st.integers(1, 65535)


@st.composite
def packets(draw: st.DrawFn) -> tuple[bytes, tuple[int, bytes, bytes, tuple[int, int] | None]]:
    """Draw a frame as dpkt builds it, and what dpkt was told to build."""
    protocol, ports = draw(st.sampled_from([1, 6, 17])), (draw(PORT), draw(PORT))
    data = draw(st.binary(max_size=20))
    body: dpkt.Packet
    if protocol == 6:
        body = dpkt.tcp.TCP(sport=ports[0], dport=ports[1], flags=2, data=data)
    elif protocol == 17:
        body = dpkt.udp.UDP(sport=ports[0], dport=ports[1], ulen=8 + len(data), data=data)
    else:
        body = dpkt.icmp.ICMP(type=8, data=dpkt.icmp.ICMP.Echo(id=1, seq=2))
    raw = bytes(body)
    if draw(st.booleans()):
        src, dst, ethertype = draw(st.binary(min_size=4, max_size=4)), DST4, 0x0800
        packet: dpkt.Packet = dpkt.ip.IP(src=src, dst=dst, p=protocol, len=20 + len(raw), data=body)
        inner = bytes(packet)
    else:
        src, dst, ethertype = draw(st.binary(min_size=16, max_size=16)), DST6, 0x86DD
        inner = bytes(
            dpkt.ip6.IP6(
                src=src, dst=dst, nxt=protocol, plen=len(raw), data=body, extension_hdrs={}, all_extension_headers=[]
            )
        )
    tags = b"".join(
        pack("!HH", kind, draw(st.integers(0, 4095)))
        for kind in draw(st.lists(st.sampled_from([0x8100, 0x88A8]), max_size=3))
    )
    return MACS + tags + pack("!H", ethertype) + inner, (protocol, src, dst, None if protocol == 1 else ports)


@given(packets(), st.sampled_from([0, 10, 12, 20]))
def test_packets_built_by_dpkt_are_parsed(
    drawn: tuple[bytes, tuple[int, bytes, bytes, tuple[int, int] | None]], start: int
) -> None:
    frame, told = drawn

    found = parse_frame(bytes(start) + frame, start)

    assert isinstance(found, IpHeaders)
    assert (found.protocol, found.src, found.dst, found.ports) == told


@given(st.binary(max_size=200), st.integers(0, 24), st.integers(0, 300))
def test_any_bytes_are_parsed_without_an_error(frame: bytes, start: int, beyond: int) -> None:
    parse_frame(frame, start, len(frame) + beyond)
    has_network_header(frame, start, len(frame) + beyond)


@given(packets(), st.lists(st.tuples(st.integers(0, 100), st.integers(0, 255)), max_size=4), st.integers(0, 120))
def test_broken_packets_are_parsed_without_an_error(
    drawn: tuple[bytes, object], changes: list[tuple[int, int]], kept: int
) -> None:
    frame = bytearray(drawn[0])
    for at, value in changes:
        frame[at % len(frame)] = value

    parse_frame(bytes(frame[:kept]), 0, len(frame))
