"""DNS questions and answers: names, their length and entropy, TXT records, missing names."""

from __future__ import annotations

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasewatch.telemetry.dns import DnsCounter, DnsReading, compute_entropy
from phasewatch.telemetry.netflow import FlowCounter

UDP_AT = 34


def question(name: str, kind: int = dpkt.dns.DNS_A, *, edns: bool = False) -> bytes:
    message = bytearray(bytes(dpkt.dns.DNS(qd=[dpkt.dns.DNS.Q(name=name, type=kind)])))
    if edns:
        message[10:12] = b"\0\1"
        message += b"\0\0\x29\x04\xd0\0\0\0\0\0\0"
    return _wrap(bytes(message), 4000, 53)


def answer(code: int = 0) -> bytes:
    return _wrap(bytes(dpkt.dns.DNS(qr=1, rcode=code, qd=[dpkt.dns.DNS.Q(name="a.test")])), 53, 4000)


def _wrap(message: bytes, sport: int, dport: int) -> bytes:
    udp = dpkt.udp.UDP(sport=sport, dport=dport, data=message, ulen=8 + len(message))
    return bytes(dpkt.ethernet.Ethernet(data=dpkt.ip.IP(p=17, data=udp, len=28 + len(message))))


def counted(*frames: tuple[bytes, bool], seen_bytes: int | None = None) -> DnsReading:
    counter = DnsCounter()
    for frame, outgoing in frames:
        counter.add_message(frame[:seen_bytes], UDP_AT, len(frame), outgoing=outgoing)
    return counter.pop_reading()


def test_names_count_once_whatever_their_case() -> None:
    reading = counted((question("www.example.org"), True), (question("WWW.example.org"), True), (question("a.b"), True))

    assert (reading.dns_asked, reading.dns_new_names, reading.dns_name_bytes) == (3, 2, 15 + 15 + 3)


def test_entropy_is_that_of_the_characters_without_dots() -> None:
    assert counted((question("ab.ab"), True)).dns_entropy == 1000
    assert counted((question("aaaa"), True)).dns_entropy == 0
    assert counted((question("abcdefgh"), True)).dns_entropy == 3000


def test_txt_questions_and_missing_names_are_counted() -> None:
    reading = counted(
        (question("a.test", dpkt.dns.DNS_TXT), True), (question("a.test"), True), (answer(3), False), (answer(), False)
    )

    assert (reading.dns_asked, reading.dns_txt, reading.dns_answers, reading.dns_nxdomain) == (2, 1, 2, 1)


def test_what_others_ask_and_what_the_guest_answers_is_not_counted() -> None:
    assert counted((question("a.test"), False), (answer(), True)) == (0,) * 7


@pytest.mark.parametrize("edns", [False, True])
def test_a_name_that_the_capture_cuts_has_its_whole_length(edns: bool) -> None:
    name = ".".join(["x" * 60] * 3)

    reading = counted((question(name, edns=edns), True), seen_bytes=120)

    assert (reading.dns_asked, reading.dns_name_bytes, reading.dns_txt) == (1, len(name), 0)


def test_remembered_names_are_bounded() -> None:
    counter = DnsCounter(max_names=10)
    for number in range(30):
        frame = question(f"n{number}.test")
        counter.add_message(frame, UDP_AT, len(frame), outgoing=True)

    assert len(counter._names) == 10
    assert counter.pop_reading().dns_new_names == 30


def test_names_reach_the_reading_of_the_network_card() -> None:
    counter = FlowCounter()
    counter.count_frame(question("a.test"), True)
    counter.count_frame(answer(3), False)
    reading = counter.pop_reading()

    assert (reading.dns_queries, reading.dns_asked, reading.dns_name_bytes, reading.dns_nxdomain) == (1, 1, 6, 1)


@given(st.binary(max_size=300), st.integers(0, 60), st.booleans(), st.booleans())
def test_any_bytes_are_counted_without_an_error(message: bytes, more: int, outgoing: bool, is_question: bool) -> None:
    frame = bytes(UDP_AT + 8) + (question("abc.test")[UDP_AT + 8 :] if is_question else b"") + message
    reading = counted((frame, outgoing))

    assert all(n >= 0 for n in reading)
    assert reading.dns_name_bytes <= 253 * reading.dns_asked + len(message)
    del more


@given(st.text("abcdef0123456789-", min_size=1, max_size=60))
def test_entropy_lies_between_none_and_that_of_all_different_characters(text: str) -> None:
    assert 0.0 <= compute_entropy(text.encode()) <= len(text).bit_length()
