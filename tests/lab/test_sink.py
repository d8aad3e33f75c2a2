"""The network sink: answers of each service, complete transfers, and robustness against any bytes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from random import Random

import dpkt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasewatch.errors import VmError
from phasewatch.lab.network.addresses import (
    DNS_NET,
    GUEST_IP,
    SCAN_NET,
    SINK_MAC,
    WEB_IP,
    PortBehaviour,
    find_scan_behaviour,
)
from phasewatch.lab.network.responder import NetworkResponder
from phasewatch.lab.network.services import ResponseStream
from phasewatch.lab.network.sink import NetworkSink
from phasewatch.lab.network.tcp import IDLE_TIMEOUT_NS

GUEST_MAC = bytes.fromhex("525400770002")
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
MS = 1_000_000
SECOND = 1000 * MS


def ether(payload: dpkt.Packet, kind: int = 0x0800, dst: bytes = SINK_MAC) -> bytes:
    return bytes(dpkt.ethernet.Ethernet(src=GUEST_MAC, dst=dst, type=kind, data=payload))


def ip(dst: IPv4Address | str, protocol: int, payload: dpkt.Packet) -> bytes:
    packet = dpkt.ip.IP(src=GUEST_IP.packed, dst=IPv4Address(dst).packed, p=protocol, data=payload)
    packet.len = 20 + len(bytes(payload))
    return ether(packet)


def udp(dst: IPv4Address | str, port: int, data: bytes) -> bytes:
    return ip(dst, 17, dpkt.udp.UDP(sport=4321, dport=port, ulen=8 + len(data), data=data))


def arp_request(target: str, sender: bytes = GUEST_IP.packed) -> bytes:
    request = dpkt.arp.ARP(op=1, sha=GUEST_MAC, spa=sender, tpa=IPv4Address(target).packed)
    return ether(request, 0x0806, b"\xff" * 6)


def opened(frame: bytes) -> dpkt.Packet:
    """Read a reply with dpkt and make sure that its checksums hold."""
    packet = dpkt.ethernet.Ethernet(frame).data
    assert dpkt.in_cksum(bytes(packet)[:20]) == 0
    if packet.p in (6, 17):
        body = bytes(packet.data)
        pseudo = packet.src + packet.dst + bytes((0, packet.p)) + len(body).to_bytes(2, "big")
        assert dpkt.in_cksum(pseudo + body) == 0
    return packet


class Client:
    """A guest's TCP end, small but strict: in-order bytes only, a real window, an ACK a segment."""

    def __init__(
        self, to: NetworkResponder, dst: IPv4Address | str, port: int, *, window: int = 64240, sport: int = 40000
    ) -> None:
        self.to, self.dst, self.port, self.sport, self.window = to, IPv4Address(dst), port, sport, window
        self.seq, self.expected = 1000, 0
        self.data = bytearray()
        self.flags_seen: list[int] = []
        self.in_flight = 0
        self.is_ended = False

    def frame(self, flags: int, data: bytes = b"", seq: int | None = None) -> bytes:
        segment = dpkt.tcp.TCP(
            sport=self.sport,
            dport=self.port,
            seq=self.seq if seq is None else seq,
            ack=self.expected,
            flags=flags,
            win=self.window,
            data=data,
            opts=b"\x02\x04\x05\xb4" if flags & SYN else b"",
        )
        segment.off = 6 if flags & SYN else 5
        return ip(self.dst, 6, segment)

    def send(self, flags: int, data: bytes = b"", now_ns: int = 0) -> None:
        frame = self.frame(flags, data)
        self.seq += len(data) + bool(flags & (SYN | FIN))
        self.take(self.to.handle(frame, now_ns), now_ns)

    def take(self, frames: list[bytes], now_ns: int = 0) -> None:
        queue = list(frames)
        while queue:
            self.in_flight = max(self.in_flight, len(queue))
            segment = opened(queue.pop(0)).data
            self.flags_seen.append(segment.flags)
            if segment.flags & SYN:
                self.expected = segment.seq + 1
                queue += self.to.handle(self.frame(ACK), now_ns)
            elif segment.data or segment.flags & FIN:
                if segment.seq == self.expected % 2**32:
                    self.data += segment.data
                    self.expected = (self.expected + len(segment.data) + bool(segment.flags & FIN)) % 2**32
                    self.is_ended |= bool(segment.flags & FIN)
                queue += self.to.handle(self.frame(ACK), now_ns)

    def connect(self, now_ns: int = 0) -> Client:
        self.send(SYN, now_ns=now_ns)
        return self

    def get(self, path: str, now_ns: int = 0) -> bytes:
        self.connect(now_ns).send(ACK | PSH, f"GET {path} HTTP/1.1\r\nHost: web\r\n\r\n".encode(), now_ns)
        return bytes(self.data)

    def upload(self, head: str, body: bytes) -> bytes:
        self.connect().send(ACK | PSH, head.encode())
        for at in range(0, len(body), 1460):
            self.send(ACK, body[at : at + 1460])
        return bytes(self.data)


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


# ── Link ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sink_answers_arp_for_every_address() -> None:
    (reply,) = NetworkResponder().handle(arp_request("198.51.100.7"), 0)

    answer = dpkt.ethernet.Ethernet(reply)
    assert (answer.dst, answer.src, answer.data.op) == (GUEST_MAC, SINK_MAC, 2)
    assert (answer.data.sha, answer.data.spa) == (SINK_MAC, IPv4Address("198.51.100.7").packed)
    assert (answer.data.tha, answer.data.tpa) == (GUEST_MAC, GUEST_IP.packed)


@pytest.mark.parametrize("sender", [GUEST_IP.packed, bytes(4)], ids=["announcement", "probe"])
def test_sink_does_not_claim_the_guests_address(sender: bytes) -> None:
    assert NetworkResponder().handle(arp_request(str(GUEST_IP), sender), 0) == []


def test_icmp_echo_is_answered() -> None:
    echo = dpkt.icmp.ICMP(type=8, data=dpkt.icmp.ICMP.Echo(id=7, seq=3, data=b"ping"))

    (reply,) = NetworkResponder().handle(ip("10.0.2.2", 1, echo), 0)

    message = opened(reply).data
    assert (message.type, message.data.id, message.data.seq, message.data.data) == (0, 7, 3, b"ping")
    assert dpkt.in_cksum(bytes(message)) == 0


def test_frames_to_other_hardware_addresses_are_counted_and_dropped() -> None:
    sink = NetworkResponder()

    assert sink.handle(ether(b"hello", dst=bytes.fromhex("333300000016")), 0) == []
    assert sink.handle(ether(b"hello", kind=0x86DD), 0) == []
    assert sink.handle(udp("10.0.2.9", 9, b"x"), 0) == []
    assert (sink.ignored.not_for_us, sink.ignored.unknown_protocol, sink.ignored.outside) == (1, 2, 0)


def test_packet_to_a_real_address_is_counted_as_outside() -> None:
    sink = NetworkResponder()

    sink.handle(udp("8.8.8.8", 53, b"x"), 0)

    assert sink.ignored.outside == 1


# ── Datagrams ─────────────────────────────────────────────────────────────────────────────────────────────────────


def ask(name: str, kind: int) -> dpkt.dns.DNS:
    query = dpkt.dns.DNS(id=99, qd=[dpkt.dns.DNS.Q(name=name, type=kind)])
    (reply,) = NetworkResponder().handle(udp("10.0.2.3", 53, bytes(query)), 0)
    answer = dpkt.dns.DNS(opened(reply).data.data)
    assert (answer.id, answer.qr, answer.rcode, answer.qd[0].name) == (99, 1, 0, name)
    return answer


def test_dns_name_always_has_the_same_address() -> None:
    first, again, other = (ask(name, 1).an[0].ip for name in ("updates.example", "UPDATES.example", "other.example"))

    assert first == again != other
    assert IPv4Address(first) in DNS_NET


def test_dns_txt_query_has_a_short_answer() -> None:
    (text,) = ask("c2.example", 16).an[0].text

    assert 0 < len(text) < 64


def test_other_dns_types_have_no_records() -> None:
    assert ask("updates.example", 28).an == []


def test_ntp_answer_has_the_size_of_the_query() -> None:
    (reply,) = NetworkResponder().handle(udp("10.0.2.4", 123, bytes([0x23]) + bytes(39) + b"mystamp!"), 0)

    answer = opened(reply).data.data
    assert len(answer) == 48
    assert answer[24:32] == b"mystamp!"


# ── TCP and HTTP ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, 1460, 100_000, 3_000_001])
def test_download_is_complete(size: int) -> None:
    client = Client(NetworkResponder(), WEB_IP, 80)

    answer = client.get(f"/bytes/{size}")

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert f"Content-Length: {size}".encode() in head
    assert body == ResponseStream(body_bytes=size).read_part(0, size)
    assert client.is_ended


def test_download_keeps_to_the_burst_limit() -> None:
    client = Client(NetworkResponder(), WEB_IP, 80)

    client.get("/bytes/1000000")

    assert client.in_flight <= 10  # what a unix datagram socket queues


def test_download_content_is_incompressible() -> None:
    import zlib

    assert len(zlib.compress(ResponseStream(body_bytes=100_000).read_part(0, 100_000))) > 99_000


def test_download_over_64_mib_is_refused() -> None:
    assert Client(NetworkResponder(), WEB_IP, 80).get(f"/bytes/{64 * 2**20 + 1}").startswith(b"HTTP/1.0 400")


def test_page_is_200_bytes() -> None:
    assert len(body_of(Client(NetworkResponder(), DNS_NET[9], 8080).get("/index.html"))) == 200


def test_long_poll_is_answered_at_its_time() -> None:
    sink = NetworkResponder()
    client = Client(sink, WEB_IP, 80)
    assert client.get("/wait/30", now_ns=0) == b""

    client.take(sink.handle_timers(29 * SECOND), 29 * SECOND)
    assert client.data == b""
    client.take(sink.handle_timers(30 * SECOND), 30 * SECOND)

    assert body_of(bytes(client.data)) == b"idle\n"


def test_upload_is_discarded_and_answered() -> None:
    client = Client(NetworkResponder(), WEB_IP, 80)

    answer = client.upload("POST /drop HTTP/1.1\r\nContent-Length: 200000\r\n\r\n", bytes(200_000))

    assert answer.startswith(b"HTTP/1.0 204")


def test_upload_without_length_is_answered_at_its_end() -> None:
    client = Client(NetworkResponder(), WEB_IP, 80)
    assert client.upload("POST /drop HTTP/1.0\r\n\r\n", bytes(5000)) == b""

    client.send(FIN | ACK)

    assert bytes(client.data).startswith(b"HTTP/1.0 204")


def test_expect_100_continue_is_answered() -> None:
    client = Client(NetworkResponder(), WEB_IP, 80).connect()

    client.send(ACK | PSH, b"PUT /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
    assert client.data == b"HTTP/1.0 100 Continue\r\n\r\n"
    client.send(ACK | PSH, b"abc")

    assert b"204" in client.data


def test_request_may_arrive_in_pieces_with_bare_newlines() -> None:
    client = Client(NetworkResponder(), WEB_IP, 80).connect()

    for piece in (b"GE", b"T /bytes/3 HTTP/1.0\n", b"\n"):
        client.send(ACK | PSH, piece)

    assert len(body_of(bytes(client.data))) == 3


def test_invalid_request_is_answered_with_400() -> None:
    client = Client(NetworkResponder(), WEB_IP, 80).connect()

    client.send(ACK | PSH, b"\x16\x03\x01 hello\r\n\r\n")

    assert client.data.startswith(b"HTTP/1.0 400")


def test_other_ports_refuse() -> None:
    client = Client(NetworkResponder(), WEB_IP, 22).connect()

    assert client.flags_seen == [RST | ACK]


def test_scan_range_accepts_refuses_or_is_silent_by_address_and_port() -> None:
    seen = dict.fromkeys(PortBehaviour, 0)
    for host in range(3000):
        address, port = SCAN_NET[host * 7], 1 + host % 1000
        sink = NetworkResponder()
        replies = sink.handle(Client(sink, address, port).frame(SYN), 0)
        flags = [opened(reply).data.flags for reply in replies]
        verdict = find_scan_behaviour(address, port)
        assert (
            flags
            == {PortBehaviour.DISCARD: [SYN | ACK], PortBehaviour.REFUSE: [RST | ACK], PortBehaviour.SILENT: []}[
                verdict
            ]
        )
        seen[verdict] += 1

    assert [
        round(seen[verdict] / 30) for verdict in (PortBehaviour.DISCARD, PortBehaviour.REFUSE, PortBehaviour.SILENT)
    ] == pytest.approx([12, 44, 44], abs=3)


def an_open_port() -> tuple[IPv4Address, int]:
    return next(
        (SCAN_NET[n], 445) for n in range(1, 500) if find_scan_behaviour(SCAN_NET[n], 445) is PortBehaviour.DISCARD
    )


def test_discard_service_accepts_all_data_and_closes_with_the_guest() -> None:
    sink = NetworkResponder()
    client = Client(sink, *an_open_port()).connect()

    for _ in range(50):
        client.send(ACK | PSH, bytes(1460))
    client.send(FIN | ACK)

    assert (bytes(client.data), client.is_ended, sink.connections) == (b"", True, 0)


def test_bulk_data_is_acknowledged_every_other_segment() -> None:
    client = Client(NetworkResponder(), *an_open_port()).connect()

    for _ in range(40):
        client.send(ACK, bytes(1460))

    assert client.flags_seen == [SYN | ACK] + [ACK] * 20


def test_single_segment_is_acknowledged_after_a_delay() -> None:
    sink = NetworkResponder()
    client = Client(sink, *an_open_port()).connect()
    client.send(ACK, b"x")

    client.take(sink.handle_timers(50 * MS))

    assert client.flags_seen == [SYN | ACK, ACK]


def test_lost_answers_are_retransmitted() -> None:
    sink = NetworkResponder()
    client = Client(sink, WEB_IP, 80).connect()
    request = client.frame(ACK | PSH, b"GET /bytes/200000 HTTP/1.0\r\n\r\n")
    client.seq += 30
    burst = sink.handle(request, 0)

    client.take(burst[:2] + burst[3:])  # the third frame is lost
    for now in range(1, 20):
        client.take(sink.handle_timers(now * SECOND), now * SECOND)

    assert body_of(bytes(client.data)) == ResponseStream(body_bytes=200_000).read_part(0, 200_000)


@given(st.integers(0, 2**32), st.floats(0, 0.3), st.integers(0, 60_000))
def test_download_survives_losses_in_both_directions(seed: int, loss: float, size: int) -> None:
    sink = NetworkResponder()
    client = Client(sink, WEB_IP, 80).connect()
    request = client.frame(ACK | PSH, f"GET /bytes/{size} HTTP/1.0\r\n\r\n".encode())
    client.seq += len(f"GET /bytes/{size} HTTP/1.0\r\n\r\n")
    fate = Random(seed)
    answers, now_ns = sink.handle(request, 0), 0
    for _ in range(100_000):
        if client.is_ended:
            break
        if not answers:
            now_ns = sink.next_due_ns or now_ns
            answers = sink.handle_timers(now_ns)
            assert answers or sink.connections, "given up"
            continue
        segment = opened(answers.pop(0)).data
        if fate.random() < loss:
            continue
        if segment.seq == client.expected % 2**32:
            client.data += segment.data
            client.expected += len(segment.data) + bool(segment.flags & FIN)
            client.is_ended |= bool(segment.flags & FIN)
        if fate.random() >= loss:
            answers += sink.handle(client.frame(ACK), now_ns)

    assert body_of(bytes(client.data)) == ResponseStream(body_bytes=size).read_part(0, size)


def test_lost_syn_ack_is_retransmitted() -> None:
    sink = NetworkResponder()
    client = Client(sink, WEB_IP, 80)
    sink.handle(client.frame(SYN), 0)

    again = sink.handle_timers(SECOND) + sink.handle(client.frame(SYN), SECOND)

    assert [opened(frame).data.flags for frame in again] == [SYN | ACK] * 2
    assert len({opened(frame).data.seq for frame in again}) == 1


def test_closed_window_is_probed_until_it_opens() -> None:
    sink = NetworkResponder()
    client = Client(sink, WEB_IP, 80, window=0)
    client.get("/bytes/5000")
    before = len(client.data)
    for now in range(1, 100):
        client.take(sink.handle_timers(now * SECOND), now * SECOND)
    knocked = len(client.data) - before
    client.window = 64240

    client.take(sink.handle_timers(101 * SECOND), 101 * SECOND)

    assert 0 < knocked < 110
    assert len(body_of(bytes(client.data))) == 5000


def test_data_before_the_handshake_is_ignored() -> None:
    sink = NetworkResponder()
    client = Client(sink, WEB_IP, 80)
    (greeting,) = sink.handle(client.frame(SYN), 0)
    client.expected = opened(greeting).data.seq  # one less than the greeting asks for

    assert sink.handle(client.frame(ACK, b"GET", seq=1001), 0) == []
    again = sink.handle_timers(400 * MS)

    assert [opened(frame).data.flags for frame in again] == [SYN | ACK]
    assert sink.next_due_ns is not None
    assert sink.next_due_ns > 400 * MS


def test_silent_guest_is_reset_after_the_last_retry() -> None:
    sink = NetworkResponder()
    client = Client(sink, WEB_IP, 80)
    sink.handle(client.frame(SYN), 0)

    frames = [frame for now in range(120) for frame in sink.handle_timers(now * SECOND)]

    assert sink.connections == 0
    assert len(frames) < 15
    assert sink.next_due_ns is None or sink.handle_timers(10**18) == []


def test_idle_connection_is_closed() -> None:
    sink = NetworkResponder()
    Client(sink, *an_open_port()).connect()
    assert sink.connections == 1

    sink.handle_timers(IDLE_TIMEOUT_NS + 1)

    assert sink.connections == 0


def test_reset_closes_a_connection_at_once() -> None:
    sink = NetworkResponder()
    client = Client(sink, *an_open_port()).connect()

    client.send(RST | ACK)

    assert sink.connections == 0


def test_segment_without_a_connection_is_reset() -> None:
    client = Client(NetworkResponder(), WEB_IP, 80)

    client.send(ACK, b"hello")

    assert client.flags_seen == [RST]


def test_number_of_open_connections_is_bounded() -> None:
    sink = NetworkResponder(max_connections=10)
    address, port = an_open_port()

    for sport in range(2000, 2050):
        Client(sink, address, port, sport=sport).connect()

    assert sink.connections == 10
    assert sink.ignored.evicted == 40


# ── Noise ─────────────────────────────────────────────────────────────────────────────────────────────────────────

TEMPLATES = [
    Client(NetworkResponder(), WEB_IP, 80).frame(SYN),
    Client(NetworkResponder(), WEB_IP, 80).frame(ACK | PSH, b"GET /bytes/9 HTTP/1.0\r\n\r\n"),
    udp("10.0.2.3", 53, bytes(dpkt.dns.DNS(qd=[dpkt.dns.DNS.Q(name="a.b", type=1)]))),
    udp("10.0.2.4", 123, bytes(48)),
    arp_request("10.0.2.2"),
]


@st.composite
def battered_frames(draw: st.DrawFn) -> bytes:
    frame = bytearray(draw(st.sampled_from(TEMPLATES)))
    for _ in range(draw(st.integers(0, 6))):
        frame[draw(st.integers(12, len(frame) - 1))] = draw(st.integers(0, 255))
    return bytes(frame[: draw(st.integers(0, len(frame)))] + draw(st.binary(max_size=20)))


@given(st.lists(st.one_of(st.binary(max_size=120).map(lambda tail: SINK_MAC + tail), battered_frames()), max_size=12))
def test_any_bytes_are_handled(frames: list[bytes]) -> None:
    sink = NetworkResponder(max_connections=4)

    for at, frame in enumerate(frames):
        for reply in sink.handle(frame, at * SECOND) + sink.handle_timers(at * SECOND):
            assert 34 < len(reply) <= 1514


# ── The process ───────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def a_card(folder: Path) -> Iterator[tuple[NetworkSink, socket.socket]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as card:
        card.bind(str(folder / "q"))
        card.settimeout(20)
        with NetworkSink(folder / "p", folder / "q") as sink:
            card.connect(str(folder / "p"))
            yield sink, card


def test_sink_process_answers_counts_and_logs(tmp_path: Path) -> None:
    with a_card(tmp_path) as (sink, card):
        card.send(arp_request("10.0.2.2"))
        reply = card.recv(2048)
        card.send(udp("8.8.8.8", 53, b"x"))
        first, second = sink.read_counters(), sink.read_counters()
        log = sink.read_log()

    assert dpkt.ethernet.Ethernet(reply).data.op == 2
    assert (first.out_pkts, first.in_pkts, first.dns_queries, first.dst_ips) == (2, 1, 1, 1)
    assert (second.out_pkts, second.dst_ips) == (2, 0)
    assert [(row.outgoing, row.protocol, row.ip, row.port, row.frames) for row in log.rows] == [
        (False, "other", "", 0, 1),
        (True, "other", "", 0, 1),
        (True, "udp", "8.8.8.8", 53, 1),
    ]
    assert (log.ignored.outside, log.lost_frames) == (1, 0)
    assert not (tmp_path / "p").exists()


def test_slow_reader_loses_no_frame(tmp_path: Path) -> None:
    with a_card(tmp_path) as (sink, card):
        for number in range(60):
            card.send(arp_request(f"10.0.2.{100 + number}"))
        time.sleep(0.05)
        targets = [dpkt.ethernet.Ethernet(card.recv(2048)).data.spa[3] for _ in range(60)]
        log = sink.read_log()

    assert targets == list(range(100, 160))
    assert log.lost_frames == 0


def test_frames_to_an_ended_vm_are_counted_as_lost(tmp_path: Path) -> None:
    with a_card(tmp_path) as (sink, card):
        (tmp_path / "q").unlink()
        card.send(arp_request("10.0.2.2"))
        while sink.read_counters().out_pkts == 0:
            pass

        assert sink.read_log().lost_frames == 1


def test_dead_sink_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with a_card(tmp_path) as (sink, _):
        os.kill(sink.pid, signal.SIGKILL)

        with pytest.raises(VmError, match="record it again"):
            sink.read_counters()


def test_late_answer_is_not_used_for_the_next_request(tmp_path: Path) -> None:
    with a_card(tmp_path) as (sink, card):
        sink.read_counters()
        os.kill(sink.pid, signal.SIGSTOP)
        sink.timeout_s = 0.05
        for _ in range(2):
            with pytest.raises(VmError, match="runs, but does not answer"):
                sink.read_counters()
        sink.timeout_s = 20
        os.kill(sink.pid, signal.SIGCONT)
        sink.read_log()
        card.send(udp("10.0.2.9", 9, b"x"))

        assert sink.read_counters().out_pkts == 1


def test_socket_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VmError, match="shorter folder"):
        NetworkSink(tmp_path / ("p" * 100), tmp_path / "q")


def test_sink_process_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from phasewatch.lab.network.sink import NetworkSink\n"
        f"sink = NetworkSink(Path({str(tmp_path / 'p')!r}), Path({str(tmp_path / 'q')!r})); sink.read_counters()\n"
        "print(sink.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()

    for _ in range(500):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.01)
    pytest.fail("the sink outlived its parent")
