"""Who has a place on a server: newcomers always get in, strangers briefly, and those with a valid token stay."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from phasewatch.http_server.connections import (
    ConnectionEntry,
    ConnectionLimits,
    ConnectionStage,
    ConnectionTable,
    find_address_group,
)

LIMITS = ConnectionLimits(connections=16, reserved=4, per_address=6, per_owner=3)


@dataclass(eq=False)
class Peer:
    """A connection that is in whatever stage the test says."""

    stage: ConnectionStage = ConnectionStage.HEAD
    is_cut: bool = False

    def find_stage(self) -> ConnectionStage:
        return self.stage

    def abort(self) -> None:
        self.is_cut = True


@dataclass
class Server:
    """A table, and a clock that is moved by hand."""

    limits: ConnectionLimits = LIMITS
    now_s: float = 0.0
    peers: list[Peer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = ConnectionTable(self.limits)

    def connect(
        self, address: str = "192.0.2.1", *, owner: str = "", stage: ConnectionStage = ConnectionStage.HEAD
    ) -> ConnectionEntry:
        self.now_s += 0.001
        peer = Peer(stage)
        self.peers.append(peer)
        entry = self.table.open(peer, address, ConnectionStage.HEAD, now_s=self.now_s)
        assert entry is not None
        entry.stage = stage
        if owner:
            self.table.set_owner(entry, owner)
        return entry

    def cut(self) -> list[int]:
        return [number for number, peer in enumerate(self.peers) if peer.is_cut]

    def wait(self, seconds: float) -> list[ConnectionEntry]:
        self.now_s += seconds
        return self.table.find_overdue(now_s=self.now_s)


def test_an_address_that_has_all_its_places_gives_up_its_own_oldest() -> None:
    server = Server()
    server.connect("198.51.100.7")

    for _ in range(8):
        server.connect()

    assert server.cut() == [1, 2]
    assert len(server.table) == 7


def test_strangers_of_many_addresses_leave_the_reserved_places_free() -> None:
    server = Server()

    for number in range(40):
        server.connect(f"192.0.2.{number}")

    assert len(server.table) == LIMITS.connections - LIMITS.reserved


def test_a_full_server_gives_up_the_address_with_the_most_connections() -> None:
    server = Server()
    server.connect("198.51.100.1")
    for n in range(11):
        server.connect("192.0.2.1" if n % 2 else "192.0.2.2")

    server.connect("198.51.100.2")

    (victim,) = server.cut()
    assert victim > 0
    assert not server.peers[-1].is_cut


def test_a_stranger_that_asks_without_pause_does_not_outlive_a_newcomer() -> None:
    server = Server(replace(LIMITS, per_address=2))
    old, newcomer = server.connect(), server.connect()
    old.since_s = server.now_s + 1.0  # it was just answered

    server.connect()

    assert server.cut() == [0]
    assert not server.peers[1].is_cut
    assert newcomer.opened_s < server.now_s


def test_an_answer_that_is_under_way_is_given_up_last() -> None:
    server = Server(replace(LIMITS, per_address=2))
    server.connect(stage=ConnectionStage.ANSWER)
    server.connect()

    server.connect()

    assert server.cut() == [1]


def test_those_with_a_token_are_never_given_up_for_strangers() -> None:
    server = Server()
    for _ in range(3):
        server.connect(owner="pc-a")

    for _ in range(50):
        server.connect()

    assert not {0, 1, 2} & set(server.cut())


def test_one_owner_has_its_share_and_the_rest_of_its_connections_stay_strangers() -> None:
    server = Server()

    entries = [server.connect(owner="pc-a") for _ in range(5)]

    assert [entry.owner for entry in entries] == ["pc-a"] * 3 + ["", ""]


def test_owners_together_leave_a_place_for_newcomers() -> None:
    server = Server()
    for number in range(40):
        server.connect(f"192.0.2.{number}", owner=f"host-{number}")

    newcomer = server.connect()

    assert len(server.table) <= LIMITS.connections
    assert not newcomer.peer.is_cut  # type: ignore[attr-defined]


def test_a_table_without_any_stranger_refuses() -> None:
    table = ConnectionTable(replace(LIMITS, connections=8, reserved=0))
    for number in range(8):
        entry = table.open(Peer(), "192.0.2.1", ConnectionStage.HEAD, now_s=0.0)
        assert entry is not None
        entry.owner = f"host-{number}"

    assert table.open(Peer(), "192.0.2.1", ConnectionStage.HEAD, now_s=0.0) is None


@pytest.mark.parametrize(
    ("stage", "patience_s"),
    [
        (ConnectionStage.HANDSHAKE, LIMITS.handshake_s),
        (ConnectionStage.HEAD, LIMITS.head_s),
        (ConnectionStage.IDLE, LIMITS.idle_s),
        (ConnectionStage.DRAIN, LIMITS.drain_s),
        (ConnectionStage.CLOSING, LIMITS.drain_s),
    ],
)
def test_a_stranger_has_little_time_in_each_stage(stage: ConnectionStage, patience_s: float) -> None:
    server = Server()
    entry = server.connect()
    entry.peer.stage = stage  # type: ignore[attr-defined]
    server.wait(0.001)

    assert server.wait(patience_s - 0.5) == []
    assert server.wait(1.0) == [entry]


def test_a_valid_token_lengthens_the_pause_between_requests_and_nothing_else() -> None:
    server = Server()
    idle, silent = server.connect(owner="pc-a", stage=ConnectionStage.IDLE), server.connect(owner="pc-b")
    idle.peer.stage = ConnectionStage.IDLE  # type: ignore[attr-defined]

    assert server.wait(LIMITS.head_s) == [silent]
    assert idle in server.wait(LIMITS.owner_idle_s)


def test_a_stranger_has_so_many_requests_and_so_much_time_in_all() -> None:
    server = Server()
    busy, old = server.connect(), server.connect()
    busy.requests = LIMITS.stranger_requests
    busy.peer.stage = old.peer.stage = ConnectionStage.IDLE  # type: ignore[attr-defined]

    assert server.wait(1.0) == [busy]
    for _ in range(10):
        old.since_s = server.now_s  # it asks again and again
        server.wait(2.9)
    assert old in server.wait(1.0)


def test_an_answer_under_way_is_not_cut_but_one_that_nobody_takes_is() -> None:
    server = Server()
    entry = server.connect(stage=ConnectionStage.ANSWER)
    entry.peer.stage = ConnectionStage.ANSWER  # type: ignore[attr-defined]

    assert server.wait(1000.0) == []
    entry.blocked_since_s = server.now_s
    assert server.wait(LIMITS.stall_s) == [entry]


def test_the_addresses_of_one_client_are_one_group() -> None:
    assert {find_address_group(a) for a in ("127.0.0.1", "127.255.3.9", "::1", "::ffff:127.0.0.9")} == {"loopback"}
    assert find_address_group("2001:db8:0:1::5") == find_address_group("2001:db8:0:1:ffff::")
    assert find_address_group("fe80::1%eth0") == find_address_group("fe80::2")
    assert find_address_group("::ffff:192.0.2.1") == find_address_group("192.0.2.1")
    assert len({find_address_group(a) for a in ("192.0.2.1", "192.0.2.2", "2001:db8:0:1::", "2001:db8:0:2::", "")}) == 5
