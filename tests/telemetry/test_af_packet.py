"""Capture all cards of a VM at their taps; data that is not seen is unknown and reported, never zero."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.factories.frame_batches import Passed, make_batch
from tests.factories.frames import SYN, ethernet, ipv4
from tests.factories.qemu import MAC

from phasewatch.errors import VmError
from phasewatch.telemetry import af_packet
from phasewatch.telemetry.af_packet import PacketSource, match_taps
from phasewatch.telemetry.base import build_missing_reading
from phasewatch.telemetry.capture import CARD_CHECK_READINGS, MAX_CARDS, NetworkNoticeCode, NetworkSource
from phasewatch.telemetry.frame_batch import FrameBatch
from phasewatch.telemetry.netflow import FLOW_FIELDS, PARSING_WINDOW_READINGS, NetflowReading
from phasewatch.telemetry.network_cards import Nic
from phasewatch.telemetry.packet_socket import MAX_RING_BYTES, MIN_RING_BYTES
from phasewatch.telemetry.qmp import QmpMonitor
from phasewatch.telemetry.tap import TapDevice
from phasewatch.types import SourceKind

PID = 100
FRAME = ethernet(0x0800, ipv4(SYN))
OPAQUE = ethernet(0x88E5, bytes(60))
UNKNOWN = build_missing_reading(SourceKind.NETFLOW)


class Socket:
    """A packet socket whose frames the test passes."""

    def __init__(self, device: TapDevice, ring_bytes: int) -> None:
        self.device, self.ring_bytes = device, ring_bytes
        self.waiting: list[Passed] = []
        self.drops, self.exists, self.is_closed = 0, True, False

    def is_present(self) -> bool:
        return self.exists

    def has_frames(self) -> bool:
        return bool(self.waiting)

    def take(self, limit: int) -> FrameBatch | None:
        taken, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return make_batch(taken) if taken else None

    def pop_drops(self) -> int:
        drops, self.drops = self.drops, 0
        return drops

    def close(self) -> None:
        self.is_closed = True


class Host:
    """The /proc of a VM with taps, and the sockets that were opened on them."""

    def __init__(self, proc: Path, *taps: str) -> None:
        self.proc = proc
        self.sockets: list[Socket] = []
        self.refused: OSError | None = None
        (proc / str(PID) / "fdinfo").mkdir(parents=True)
        (proc / str(PID) / "cmdline").write_bytes(b"qemu-system-x86_64\0-netdev\0tap,id=n0\0")
        (proc / "net").write_text("")
        (proc / "self" / "ns").mkdir(parents=True)
        (proc / str(PID) / "ns").mkdir()
        (proc / "self" / "ns" / "net").hardlink_to(proc / "net")
        (proc / str(PID) / "ns" / "net").hardlink_to(proc / "net")
        for name in taps:
            self.add(name)

    def _fd(self, name: str) -> Path:
        return self.proc / str(PID) / "fdinfo" / str(20 + int(name[-1]))

    def add(self, name: str) -> None:
        self._fd(name).write_text(f"pos:\t0\niff:\t{name}\n")

    def remove(self, name: str) -> None:
        self._fd(name).unlink()
        self.open(name).exists = False

    def replace(self, name: str) -> None:
        self.open(name).exists = False

    def open_socket(self, device: TapDevice, ring_bytes: int) -> Socket:
        if self.refused is not None:
            raise self.refused
        socket = Socket(device, ring_bytes)
        self.sockets.append(socket)
        return socket

    def open(self, name: str = "tap0") -> Socket:
        (socket,) = (s for s in self.sockets if s.device.name == name and not s.is_closed)
        return socket

    def pass_frame(self, name: str = "tap0", *, outgoing: bool = True, frame: bytes = FRAME) -> None:
        self.open(name).waiting.append((frame, outgoing, 0))


class Cards(QmpMonitor):
    """A monitor that only knows cards."""

    def __init__(self, *backends: str) -> None:
        super().__init__(Path("fake"))
        self.backends = list(backends)
        self.buses: list[dict[str, Any]] = []
        self.is_silent = False

    async def ask(self, command: str, **arguments: Any) -> Any:
        if self.is_silent:
            raise VmError(f"{command}: no answer")
        mac = ":".join(f"{byte:02x}" for byte in MAC)
        cards = [
            f"nic{n}: index=0,type=nic,model=virtio-net-pci,macaddr={mac}\n \\ n{n}: index=0,type={backend}\n"
            for n, backend in enumerate(self.backends)
        ]
        return "".join(cards) if command == "human-monitor-command" else self.buses


def play(host: Host, then: Callable[[PacketSource], Awaitable[Any]], monitor: QmpMonitor | None = None) -> Any:
    """Open a source, do something with it, and close it."""

    async def main() -> Any:
        source = PacketSource(pid=PID, monitor=monitor, proc=host.proc, open_socket=host.open_socket)
        await source.open()
        try:
            return await then(source)
        finally:
            await source.close()

    return asyncio.run(main())


def codes(source: PacketSource) -> list[NetworkNoticeCode]:
    return [notice.code for notice in source.pop_notices()]


async def read_to_the_next_check(source: PacketSource) -> list[Any]:
    return [(await source.read())[:4] for _ in range(CARD_CHECK_READINGS)]


def test_frames_of_all_taps_are_counted_by_direction(tmp_path: Path) -> None:
    host = Host(tmp_path, "tap0", "tap1")

    async def then(source: PacketSource) -> None:
        assert isinstance(source, NetworkSource)
        host.pass_frame("tap0")
        host.pass_frame("tap1")
        host.pass_frame("tap1", outgoing=False)
        assert (await source.read())[:4] == (2, 2 * len(FRAME), 1, len(FRAME))
        assert (await source.read())[:4] == (2, 2 * len(FRAME), 1, len(FRAME))
        assert source.unknown_fields == frozenset()
        assert codes(source) == []

    play(host, then)
    assert all(socket.is_closed for socket in host.sockets)


def test_a_closed_source_reads_nothing(tmp_path: Path) -> None:
    async def then(source: PacketSource) -> None:
        await source.close()
        assert await source.read() == UNKNOWN

    play(Host(tmp_path, "tap0"), then)


def test_dropped_frames_cost_one_reading_and_give_a_larger_ring(tmp_path: Path) -> None:
    host = Host(tmp_path, "tap0")

    async def then(source: PacketSource) -> list[int]:
        sizes = []
        for _ in range(6):
            host.open().drops = 5
            assert await source.read() == UNKNOWN
            host.pass_frame()
            assert (await source.read())[0] is not None
            sizes.append(host.open().ring_bytes)
        assert codes(source) == [NetworkNoticeCode.LOST]  # once, not at every tick of a flood
        return sizes

    sizes = play(host, then)
    assert sizes == sorted(sizes)
    assert sizes[0] > MIN_RING_BYTES
    assert sizes[-1] == MAX_RING_BYTES
    assert sum(not socket.is_closed for socket in host.sockets) == 0


def test_without_memory_for_a_larger_ring_the_present_one_stays(tmp_path: Path) -> None:
    host = Host(tmp_path, "tap0")

    async def then(source: PacketSource) -> None:
        host.refused = OSError(12, "no memory")
        host.open().drops = 1
        assert await source.read() == UNKNOWN
        host.pass_frame()
        assert (await source.read())[0] == 1

    play(host, then)


def test_more_frames_than_can_be_read_are_unknown_until_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(af_packet, "MAX_READ_CPU_NS", 1)  # one batch a reading
    monkeypatch.setattr(af_packet, "_BATCH_FRAMES", 10)
    host = Host(tmp_path, "tap0")

    async def then(source: PacketSource) -> None:
        host.open().waiting = [(FRAME, True, 0)] * 55
        seen = []
        while True:
            seen.append((await source.read())[0])
            if seen[-1] is not None:
                break
        assert seen[-1] == 55
        assert len(seen) > CARD_CHECK_READINGS
        assert codes(source) == [NetworkNoticeCode.BEHIND]

    play(host, then)


def test_unparsed_frames_make_flows_unknown_and_are_reported(tmp_path: Path) -> None:
    host = Host(tmp_path, "tap0")

    async def then(source: PacketSource) -> None:
        for _ in range(10):
            host.pass_frame(frame=OPAQUE)
        reading = NetflowReading(*await source.read())
        assert reading.out_pkts == 10
        assert {getattr(reading, name) for name in FLOW_FIELDS} == {None}
        assert source.unknown_fields == FLOW_FIELDS
        for _ in range(PARSING_WINDOW_READINGS):
            await source.read()
        assert codes(source) == [NetworkNoticeCode.UNREADABLE, NetworkNoticeCode.READABLE]

    play(host, then)


def test_a_replaced_tap_costs_one_reading_and_is_followed(tmp_path: Path) -> None:
    host = Host(tmp_path, "tap0")

    async def then(source: PacketSource) -> None:
        host.pass_frame()
        host.replace("tap0")
        assert await source.read() == UNKNOWN
        host.pass_frame()
        assert (await source.read())[0] == 2
        assert codes(source) == [NetworkNoticeCode.LOST]

    play(host, then)


def test_a_plugged_in_card_is_counted_from_then_on(tmp_path: Path) -> None:
    host = Host(tmp_path, "tap0")

    async def then(source: PacketSource) -> None:
        host.add("tap1")
        assert (await read_to_the_next_check(source))[-1] == (None,) * 4
        host.pass_frame("tap1")
        assert (await source.read())[0] == 1
        assert codes(source) == [NetworkNoticeCode.CARD_ADDED]

    play(host, then)


def test_counts_do_not_fall_when_one_of_two_cards_goes(tmp_path: Path) -> None:
    host = Host(tmp_path, "tap0", "tap1")

    async def then(source: PacketSource) -> None:
        host.pass_frame("tap0")
        host.pass_frame("tap1")
        assert (await source.read())[0] == 2
        host.remove("tap1")
        assert await source.read() == UNKNOWN
        host.pass_frame("tap0")
        assert (await source.read())[0] == 3
        assert codes(source) == [NetworkNoticeCode.CARD_GONE]

    play(host, then)


def test_without_a_tap_the_network_is_unknown_until_one_returns(tmp_path: Path) -> None:
    host = Host(tmp_path, "tap0")

    async def then(source: PacketSource) -> None:
        host.remove("tap0")
        assert await source.read() == UNKNOWN
        assert source.unknown_fields == frozenset(NetflowReading._fields)
        host.add("tap0")
        await read_to_the_next_check(source)
        host.pass_frame("tap0")
        assert (await source.read())[0] == 1
        assert codes(source) == [
            NetworkNoticeCode.CARD_GONE,
            NetworkNoticeCode.NO_CARD,
            NetworkNoticeCode.CARD_ADDED,
        ]

    play(host, then)


def test_a_card_that_joins_without_a_tap_makes_the_network_unknown(tmp_path: Path) -> None:
    host, monitor = Host(tmp_path, "tap0"), Cards("tap,ifname=tap0")

    async def then(source: PacketSource) -> None:
        monitor.backends.append("user")
        monitor.events["DEVICE_DELETED"] += 1
        await source.read()
        host.pass_frame()
        assert await source.read() == UNKNOWN
        assert source.unknown_fields == frozenset(NetflowReading._fields)
        assert codes(source) == [NetworkNoticeCode.UNWATCHED]
        monitor.backends.pop()
        await read_to_the_next_check(source)
        assert (await source.read())[0] == 1

    play(host, then, monitor)


def test_a_silent_monitor_hides_no_frame(tmp_path: Path) -> None:
    host, monitor = Host(tmp_path, "tap0"), Cards("tap,ifname=tap0")

    async def then(source: PacketSource) -> None:
        monitor.is_silent = True
        for n in range(1, 3 * CARD_CHECK_READINGS):
            host.pass_frame()
            assert (await source.read())[0] == n

    play(host, then, monitor)


@pytest.mark.parametrize(
    ("backends", "buses", "taps"),
    [
        pytest.param([], [], ["tap0"], id="no card"),
        pytest.param(["user"], [], [], id="user network"),
        pytest.param(["tap,ifname=tap0", "vhost-user"], [], ["tap0"], id="one of two without a tap"),
        pytest.param(["hubport"], [], ["tap0"], id="hub"),
        pytest.param(["tap,fd=30"], [], ["tap0", "tap1"], id="unknown which"),
        pytest.param(
            ["tap,ifname=tap0"],
            [{"devices": [{"class_info": {"class": 0x0200}}] * 2}],
            ["tap0"],
            id="passed through",
        ),
    ],
)
def test_a_vm_with_a_card_that_has_no_tap_is_refused(
    tmp_path: Path, backends: list[str], buses: list[dict[str, Any]], taps: list[str]
) -> None:
    host, monitor = Host(tmp_path, *taps), Cards(*backends)
    monitor.buses = buses

    with pytest.raises(VmError):
        play(host, lambda source: source.read(), monitor)

    assert all(socket.is_closed for socket in host.sockets)


@pytest.mark.parametrize("words", [b"-netdev\0user,id=n1", b"-nic\0vde"])
def test_without_a_monitor_the_command_line_shows_cards_without_a_tap(tmp_path: Path, words: bytes) -> None:
    host = Host(tmp_path, "tap0")
    (tmp_path / str(PID) / "cmdline").write_bytes(b"qemu-system-x86_64\0-netdev\0tap,id=n0\0" + words + b"\0")

    with pytest.raises(VmError):
        play(host, lambda source: source.read())


def test_more_cards_than_the_maximum_are_refused(tmp_path: Path) -> None:
    host = Host(tmp_path, *(f"tap{n}" for n in range(MAX_CARDS + 1)))

    with pytest.raises(VmError):
        play(host, lambda source: source.read())


def test_a_tap_in_another_network_namespace_is_refused(tmp_path: Path) -> None:
    host = Host(tmp_path, "tap0")
    (tmp_path / "self" / "ns" / "net").unlink()
    (tmp_path / "self" / "ns" / "net").write_text("another")

    with pytest.raises(VmError):
        play(host, lambda source: source.read())

    assert host.sockets == []


@pytest.mark.parametrize("error", [PermissionError(1, "not permitted"), OSError(19, "no such device")])
def test_a_socket_that_cannot_be_opened_is_an_error_of_the_vm(tmp_path: Path, error: OSError) -> None:
    host = Host(tmp_path, "tap0")
    host.refused = error

    with pytest.raises(VmError, match="tap0"):
        play(host, lambda source: source.read())


def nic(netdev: str, *, ifname: str = "", fd: int = -1, kind: str = "tap") -> Nic:
    return Nic(netdev=netdev, kind=kind, model="virtio-net-pci", mac=MAC, ifname=ifname, fd=fd)


def test_cards_find_their_taps_by_name_by_file_and_by_what_is_left() -> None:
    devices = (
        TapDevice(name="a", fds=frozenset({20})),
        TapDevice(name="b", fds=frozenset({21, 22})),
        TapDevice(name="c", is_macvtap=True, fds=frozenset({23})),
        TapDevice(name="d", fds=frozenset({24})),
    )
    cards = [nic("n0", ifname="a"), nic("n1", fd=21), nic("n2", fd=23), nic("n3")]

    assert {device.name for device in match_taps(cards, devices)} == {"a", "b", "c", "d"}
    assert [device.name for device in match_taps(cards[:2], devices)] == ["a", "b"]
    with pytest.raises(VmError):
        match_taps([cards[0], cards[3]], devices)
