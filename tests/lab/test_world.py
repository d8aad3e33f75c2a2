"""The world of an episode: who lives where, how its servers behave, and that a flood stays bounded."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import dpkt
import numpy as np
import pytest
from tests.lab.test_sink import ACK, PSH, RST, SECOND, SYN, Client, a_card, ask, body_of, opened, udp

from phasewatch.lab.network.addresses import LOCAL_NET, is_lab_address
from phasewatch.lab.network.responder import NetworkResponder
from phasewatch.lab.network.world import (
    MALICIOUS_ROLES,
    WORLD_ROLES,
    EpisodeWorld,
    ServerBehaviour,
    WorldServer,
    draw_world,
    render_world_knobs,
)

WORLDS = [draw_world(np.random.default_rng(seed)) for seed in range(400)]


def server(behaviour: ServerBehaviour = ServerBehaviour.ACCEPT, *, role: str = "c2", port: int = 8080) -> WorldServer:
    return WorldServer(role=role, address="198.51.100.7", port=port, name="abc.example", behaviour=behaviour)


def sink_of(*servers: WorldServer) -> NetworkResponder:
    sink = NetworkResponder()
    sink.set_world(EpisodeWorld(servers=servers))
    return sink


# ── Drawing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_role_has_an_address_of_the_simulated_network() -> None:
    for world in WORLDS:
        assert tuple(each.role for each in world.servers) == WORLD_ROLES
        assert all(is_lab_address(IPv4Address(each.address)) for each in world.servers)


def test_a_third_of_malicious_addresses_belong_to_a_benign_role_too() -> None:
    shared = [
        each.address in {other.address for other in world.servers if other.role not in MALICIOUS_ROLES}
        for world in WORLDS
        for each in world.servers
        if each.role in MALICIOUS_ROLES
    ]

    assert np.mean(shared) == pytest.approx(1 / 3, abs=0.05)


def test_shared_address_has_the_port_name_and_behaviour_of_its_benign_role() -> None:
    for world in WORLDS:
        for each in world.servers:
            others = [other for other in world.servers if other.address == each.address]
            assert all(replace(other, role="") == replace(each, role="") for other in others)


def test_good_and_bad_servers_fail_equally_often() -> None:
    def share(role: str) -> float:
        behaviours = [world.find(role).behaviour for world in WORLDS]  # type: ignore[union-attr]
        return float(np.mean([each in ("refuse", "silent", "nxdomain") for each in behaviours]))

    assert share("c2") == pytest.approx(share("monitoring"), abs=0.08)
    assert share("exfil") == 0.0


def test_all_behaviours_occur() -> None:
    assert {each.behaviour for world in WORLDS for each in world.servers} == set(ServerBehaviour)


def test_knobs_name_every_server_and_fit_into_one_command() -> None:
    for world in WORLDS:
        knobs = render_world_knobs(world)
        assert {knob.partition("=")[0] for knob in knobs} >= {f"at.{role}" for role in WORLD_ROLES}
        assert len(" ".join(knobs)) < 600
        assert max(len(knob.partition("=")[2]) for knob in knobs) < 32
        assert len(knobs) <= 16


# ── Behaving ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_server_answers_http() -> None:
    answer = Client(sink_of(server()), "198.51.100.7", 8080).get("/bytes/3000")

    assert len(body_of(answer)) == 3000


def test_server_answers_each_line_of_a_chat_with_as_many_bytes_as_asked() -> None:
    client = Client(sink_of(server()), "198.51.100.7", 8080).connect()

    client.send(ACK | PSH, b"ROWS 500\n")
    client.send(ACK | PSH, b"PUT 20\n" + bytes(20) + b"SHARE 100\n")

    assert len(client.data) == 600
    assert not client.is_ended


def test_refusing_server_resets_and_silent_server_says_nothing() -> None:
    refused = Client(sink_of(server(ServerBehaviour.REFUSE)), "198.51.100.7", 8080).connect()
    silent = Client(sink_of(server(ServerBehaviour.SILENT)), "198.51.100.7", 8080).connect()

    assert refused.flags_seen == [RST | ACK]
    assert silent.flags_seen == []


def test_slow_server_answers_seconds_later() -> None:
    sink = sink_of(server(ServerBehaviour.SLOW))
    client = Client(sink, "198.51.100.7", 8080)

    assert client.get("/bytes/100") == b""
    client.take(sink.handle_timers(SECOND // 4), SECOND // 4)
    assert client.data == b""
    client.take(sink.handle_timers(7 * SECOND), 7 * SECOND)
    assert len(body_of(bytes(client.data))) == 100


def test_name_of_a_server_resolves_to_its_address_and_a_gone_name_to_nothing() -> None:
    def look_up(sink: NetworkResponder, name: str) -> dpkt.dns.DNS:
        query = dpkt.dns.DNS(id=7, qd=[dpkt.dns.DNS.Q(name=name, type=1)])
        return dpkt.dns.DNS(opened(sink.handle(udp("10.0.2.3", 53, bytes(query)), 0)[0]).data.data)

    there, gone = sink_of(server()), sink_of(server(ServerBehaviour.NXDOMAIN))

    assert IPv4Address(look_up(there, "abc.example").an[0].rdata) == IPv4Address("198.51.100.7")
    assert (look_up(gone, "abc.example").rcode, look_up(gone, "abc.example").an) == (3, [])
    assert look_up(there, "x17.gone.example").rcode == 3


def test_name_server_of_the_world_answers_beside_the_usual_one() -> None:
    sink = sink_of(server(role="dns", port=53))
    query = bytes(dpkt.dns.DNS(id=7, qd=[dpkt.dns.DNS.Q(name="a.example", type=1)]))

    assert len(sink.handle(udp("198.51.100.7", 53, query), 0)) == 1
    assert len(sink.handle(udp("10.0.2.3", 53, query), 0)) == 1
    assert ask("a.example", 1).rcode == 0


def record(kind: int, body: bytes) -> bytes:
    return bytes((kind, 3, 3)) + len(body).to_bytes(2, "big") + body


def test_tls_looking_server_greets_with_records_and_answers_inside_records() -> None:
    client = Client(sink_of(server(ServerBehaviour.TLS, port=443)), "198.51.100.7", 443).connect()

    client.send(ACK | PSH, record(22, bytes(300)))
    greeting = bytes(client.data)
    client.send(ACK | PSH, record(23, bytes(b ^ 0x5A for b in b"GET /bytes/50 HTTP/1.0\r\n\r\n")))
    answer = bytes(client.data)[len(greeting) :]

    assert (greeting[:3], len(greeting)) == (b"\x16\x03\x03", 3205)
    assert answer[:3] == b"\x17\x03\x03"
    assert bytes(b ^ 0x5A for b in answer[5:]).startswith(b"HTTP/1.0 200 OK")
    assert client.is_ended


def test_bytes_that_are_not_records_end_a_tls_looking_connection() -> None:
    client = Client(sink_of(server(ServerBehaviour.TLS, port=443)), "198.51.100.7", 443).connect()

    client.send(ACK | PSH, b"GET / HTTP/1.0\r\n\r\n")

    assert client.is_ended


def test_other_machines_of_the_own_network_accept_refuse_or_are_silent() -> None:
    sink = sink_of(server())
    seen = set()
    for number in range(100, 160):
        client = Client(sink, LOCAL_NET[number], 445, sport=2000 + number).connect()
        seen.add(tuple(client.flags_seen))

    assert seen == {(), (RST | ACK,), (SYN | ACK,)}


def test_long_chat_keeps_no_bytes() -> None:
    sink = sink_of(server())
    client = Client(sink, "198.51.100.7", 8080).connect()
    for _ in range(300):
        client.send(ACK | PSH, b"ROWS 8000\n")
    (connection,) = sink._open.values()

    assert len(client.data) == 300 * 8000
    assert len(connection._service.answer.head) == 0


# ── A flood ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_flood_of_connections_is_bounded_and_counted() -> None:
    sink = NetworkResponder(max_connections=64)
    sink.set_world(EpisodeWorld(servers=(server(),)))

    for sport in range(1024, 6024):
        Client(sink, "198.51.100.7", 8080, sport=sport).to.handle(
            Client(sink, "198.51.100.7", 8080, sport=sport).frame(SYN), sport
        )

    assert sink.connections == 64
    assert sink.ignored.evicted == 5000 - 64
    assert len(sink._timers) <= 64 + 4 * 64 + 1


def test_sink_process_takes_a_world_and_goes_on_counting(tmp_path: Path) -> None:
    with a_card(tmp_path) as (sink, card):
        sink.set_world(EpisodeWorld(servers=(server(role="dns", port=53),)))
        card.send(udp("198.51.100.7", 53, bytes(dpkt.dns.DNS(qd=[dpkt.dns.DNS.Q(name="a.b", type=1)]))))
        assert opened(card.recv(2000)).data.sport == 53

        assert sink.read_log().ignored.unknown_protocol == 0
