"""Capture all cards of a VM by direction; data that is not seen is unknown and reported, never zero."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from struct import pack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.factories.frames import ASK, SYN, ethernet, ipv4, ipv6
from tests.factories.qemu import MAC

from phasewatch.errors import VmError
from phasewatch.telemetry import capture
from phasewatch.telemetry.base import ReadingValues, build_missing_reading
from phasewatch.telemetry.capture import MAX_CARDS, CaptureSource, NetworkNoticeCode, build_filter_ids
from phasewatch.telemetry.netflow import PARSING_WINDOW_READINGS, NetflowReading
from phasewatch.telemetry.qmp import QmpMonitor
from phasewatch.types import SourceKind

HEAD = pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 160, 1)
FRAME = ethernet(0x0800, ipv4(SYN))
OPAQUE = ethernet(0x88E5, bytes(60))
UNKNOWN = build_missing_reading(SourceKind.NETFLOW)
PID = 100


def card(netdev: str, *, name: str = "nic", queues: int = 1, kind: str = "user", rest: str = "") -> str:
    mac = ":".join(f"{b:02x}" for b in MAC)
    first = f"{name}: index=0,type=nic,model=virtio-net-pci,macaddr={mac}\n \\ {netdev}: index=0,type={kind}{rest}\n"
    return first + "".join(
        f"{name}: index={n},type=nic,\n \\ {netdev}: index={n},type={kind}{rest}\n" for n in range(1, queues)
    )


def record(frame: bytes, size: int | None = None) -> bytes:
    return pack("<IIII", 1, 2, len(frame[:160]), len(frame) if size is None else size) + frame[:160]


class Cards(QmpMonitor):
    """A monitor that only knows cards and filters, and writes their files as QEMU does."""

    def __init__(self, *netdevs: str) -> None:
        super().__init__(Path("fake"))
        self.cards = {netdev: card(netdev) for netdev in netdevs}
        self.files: dict[str, Path] = {}
        self.filters: dict[str, tuple[str, str]] = {}
        self.refused: set[str] = set()
        self.buses: list[dict[str, Any]] = []
        self.n_asked = 0

    async def ask(self, command: str, **arguments: Any) -> Any:
        self.n_asked += 1
        if command in self.refused:
            raise VmError(f"{command}: refused")
        match command:
            case "human-monitor-command":
                return "".join(self.cards.values())
            case "qom-list":
                return [{"name": name, "type": "child<filter-dump>"} for name in self.filters]
            case "query-pci":
                return self.buses
            case "object-add":
                if arguments["netdev"] not in self.cards or arguments["id"] in self.filters:
                    raise VmError("object-add: refused")
                self.files[arguments["id"]] = Path(arguments["file"])
                self.files[arguments["id"]].write_bytes(HEAD)
                self.filters[arguments["id"]] = (arguments["netdev"], arguments["queue"])
            case "object-del":
                if arguments["id"] not in self.filters:
                    raise VmError("object-del: no such object")
                del self.files[arguments["id"]], self.filters[arguments["id"]]
        return {}

    def file(self, netdev: str = "n0", queue: str = "rx") -> Path:
        (name,) = (name for name, owner in self.filters.items() if owner == (netdev, queue))
        return self.files[name]

    def pass_frames(self, data: bytes, netdev: str = "n0", queue: str = "rx") -> None:
        with self.file(netdev, queue).open("ab") as file:
            file.write(data)

    def lose_filters(self, netdev: str) -> None:
        for name in [name for name, owner in self.filters.items() if owner[0] == netdev]:
            del self.files[name], self.filters[name]

    def unplug(self, netdev: str) -> None:
        del self.cards[netdev]
        self.lose_filters(netdev)


def play(
    monitor: Cards, folder: Path, then: Callable[[CaptureSource], Awaitable[Any]], *, proc: Path = Path("/nowhere")
) -> Any:
    """Open a source, do something with it, and close it."""

    async def main() -> Any:
        source = CaptureSource(monitor=monitor, folder=folder, ids=build_filter_ids("phasewatch-7"), pid=PID, proc=proc)
        await source.open()
        try:
            return await then(source)
        finally:
            await source.close()

    return asyncio.run(main())


def codes(source: CaptureSource) -> set[NetworkNoticeCode]:
    return {notice.code for notice in source.pop_notices()}


def named(values: ReadingValues) -> dict[str, int | float | None]:
    return dict(zip(NetflowReading._fields, values, strict=True))


def test_filters_and_files_are_added_and_removed(tmp_path: Path) -> None:
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> None:
        assert set(monitor.filters.values()) == {("n0", "rx"), ("n0", "tx")}
        monitor.pass_frames(record(FRAME, 1500))
        assert (await source.read())[:4] == (1, 1500, 0, 0)
        assert (await source.read())[:4] == (1, 1500, 0, 0)
        await source.close()
        assert await source.read() == UNKNOWN

    play(monitor, tmp_path, then)
    assert monitor.filters == {}
    assert list(tmp_path.iterdir()) == []


def test_the_direction_does_not_depend_on_addresses(tmp_path: Path) -> None:
    other = b"\x02\x11\x22\x33\x44\x55"
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> ReadingValues:
        monitor.pass_frames(record(MAC + other + FRAME[12:]), queue="rx")  # a nested machine's, to its own host
        monitor.pass_frames(record(other + MAC + FRAME[12:]), queue="tx")  # somebody else uses the guest's address
        return await source.read()

    values = named(play(monitor, tmp_path, then))

    assert (values["out_pkts"], values["in_pkts"], values["syn_out"], values["dst_ports"]) == (1, 1, 1, 1)


def test_all_cards_are_counted_and_a_shared_destination_once(tmp_path: Path) -> None:
    monitor = Cards("n0", "n1")

    async def then(source: CaptureSource) -> ReadingValues:
        monitor.pass_frames(record(FRAME), "n0")
        monitor.pass_frames(record(FRAME), "n1")
        monitor.pass_frames(record(ethernet(0x86DD, ipv6(ASK, 17))), "n1")
        return await source.read()

    values = named(play(monitor, tmp_path, then))

    assert (values["out_pkts"], values["syn_out"], values["dns_queries"], values["dst_ips"]) == (3, 2, 1, 2)


def test_a_full_dump_is_replaced_without_losing_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "ROTATE_BYTES", 8000)
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> ReadingValues:
        for _ in range(10):
            monitor.pass_frames(record(FRAME) * 100)
            await source.read()
            assert len(list(tmp_path.iterdir())) == 2
        return await source.read()

    assert play(monitor, tmp_path, then)[0] == 1000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="cut"),
        pytest.param(lambda path: path.write_bytes(HEAD + b"\xff" * 400), id="overwritten"),
        pytest.param(lambda path: path.write_bytes(b"\0" * 4000 + record(FRAME)), id="cut, and written on"),
    ],
)
def test_a_corrupt_dump_costs_one_reading_and_is_reported(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> None:
        monitor.pass_frames(record(FRAME))
        await source.read()
        spoil(monitor.file())
        assert await source.read() == UNKNOWN
        monitor.pass_frames(record(FRAME))
        assert (await source.read())[:2] == (2, 2 * len(FRAME))
        assert codes(source) == {NetworkNoticeCode.LOST}

    play(monitor, tmp_path, then)


def test_a_dump_that_ends_in_an_incomplete_frame_is_replaced(tmp_path: Path) -> None:
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> None:
        monitor.pass_frames(record(FRAME) + record(FRAME)[:40])  # memory was full, QEMU dumps no more
        assert (await source.read())[0] == 1
        await source.read()
        assert await source.read() == UNKNOWN
        monitor.pass_frames(record(FRAME))
        assert (await source.read())[0] == 2

    play(monitor, tmp_path, then)


def test_a_dump_that_qemu_closed_is_replaced(tmp_path: Path) -> None:
    monitor = Cards("n0")
    files = tmp_path / "proc" / str(PID) / "fd"
    files.mkdir(parents=True)
    folder = tmp_path / "dumps"
    folder.mkdir()

    async def then(source: CaptureSource) -> None:
        readings = [await source.read() for _ in range(capture.CARD_CHECK_READINGS)]
        assert readings[-1] == UNKNOWN
        assert NetworkNoticeCode.LOST in codes(source)
        for number, path in enumerate(monitor.files.values()):
            (files / str(number)).symlink_to(path)
        assert [await source.read() for _ in range(capture.CARD_CHECK_READINGS)] == [
            (0,) * len(NetflowReading._fields)
        ] * capture.CARD_CHECK_READINGS

    play(monitor, folder, then, proc=tmp_path / "proc")


def test_a_removed_filter_is_not_taken_for_a_quiet_network(tmp_path: Path) -> None:
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> None:
        assert await source.read() == (0,) * len(NetflowReading._fields)
        monitor.lose_filters("n0")
        assert await source.read() == UNKNOWN
        assert codes(source) == {NetworkNoticeCode.LOST}
        assert len(monitor.filters) == 2
        monitor.pass_frames(record(FRAME))
        assert (await source.read())[0] == 1

    play(monitor, tmp_path, then)


def link_files(monitor: Cards, folder: Path) -> None:
    """Show the dumps' files as open in QEMU."""
    for link in folder.iterdir():
        link.unlink()
    for number, path in enumerate(monitor.files.values()):
        (folder / str(number)).symlink_to(path)


def play_with_descriptors(then: Callable[[CaptureSource, Cards, Path], Awaitable[None]], tmp_path: Path) -> None:
    """Open a source on a card whose dumps are open in QEMU, and do something with it after the first check."""
    monitor, files, folder = Cards("n0"), tmp_path / "proc" / str(PID) / "fd", tmp_path / "dumps"
    files.mkdir(parents=True)
    folder.mkdir()

    async def start(source: CaptureSource) -> None:
        link_files(monitor, files)
        for _ in range(capture.CARD_CHECK_READINGS):
            await source.read()
        await then(source, monitor, files)

    play(monitor, folder, start, proc=tmp_path / "proc")


def test_a_quiet_network_costs_no_query_while_qemu_writes_the_dumps(tmp_path: Path) -> None:
    async def then(source: CaptureSource, monitor: Cards, files: Path) -> None:
        monitor.n_asked = 0

        assert [await source.read() for _ in range(3)] == [(0,) * len(NetflowReading._fields)] * 3
        assert monitor.n_asked == 0

    play_with_descriptors(then, tmp_path)


def test_a_filter_that_is_removed_between_two_queries_is_noticed_at_once(tmp_path: Path) -> None:
    async def then(source: CaptureSource, monitor: Cards, files: Path) -> None:
        monitor.lose_filters("n0")
        link_files(monitor, files)

        assert await source.read() == UNKNOWN
        assert codes(source) == {NetworkNoticeCode.LOST}
        assert len(monitor.filters) == 2

    play_with_descriptors(then, tmp_path)


def test_another_file_under_the_descriptor_is_not_taken_for_the_dump(tmp_path: Path) -> None:
    async def then(source: CaptureSource, monitor: Cards, files: Path) -> None:
        monitor.lose_filters("n0")
        (tmp_path / "other").touch()
        for link in list(files.iterdir()):
            link.unlink()
            link.symlink_to(tmp_path / "other")

        assert await source.read() == UNKNOWN

    play_with_descriptors(then, tmp_path)


def test_a_device_that_was_removed_is_looked_for_at_once_although_the_dumps_are_written(tmp_path: Path) -> None:
    async def then(source: CaptureSource, monitor: Cards, files: Path) -> None:
        await source.read()
        monitor.events["DEVICE_DELETED"] += 1
        monitor.n_asked = 0

        await source.read()
        assert monitor.n_asked > 0
        monitor.n_asked = 0
        await source.read()
        assert monitor.n_asked == 0

    play_with_descriptors(then, tmp_path)


def test_the_network_is_unknown_without_a_card(tmp_path: Path) -> None:
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> None:
        monitor.pass_frames(record(FRAME))
        assert (await source.read())[0] == 1
        monitor.unplug("n0")
        assert [await source.read() for _ in range(6)] == [UNKNOWN] * 6
        assert {NetworkNoticeCode.CARD_GONE, NetworkNoticeCode.NO_CARD} <= codes(source)
        assert source.unknown_fields == set(NetflowReading._fields)
        monitor.cards["n9"] = card("n9")
        for _ in range(capture.CARD_CHECK_READINGS):
            values = await source.read()
        assert values[0] in (None, 1)
        monitor.pass_frames(record(FRAME), "n9")
        assert (await source.read())[0] == 2
        assert codes(source) == {NetworkNoticeCode.CARD_ADDED}

    play(monitor, tmp_path, then)


def test_a_card_that_loses_its_backend_is_gone_at_once(tmp_path: Path) -> None:
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> None:
        assert await source.read() == (0,) * len(NetflowReading._fields)
        monitor.cards["n0"] = "n0: index=0,type=user,net=10.0.2.0\n"  # the guest let go of the card, the backend stays
        monitor.events["DEVICE_DELETED"] += 1
        assert await source.read() == UNKNOWN
        assert NetworkNoticeCode.NO_CARD in codes(source)

    play(monitor, tmp_path, then)
    assert monitor.filters == {}


def test_counts_do_not_fall_when_one_of_two_cards_goes(tmp_path: Path) -> None:
    monitor = Cards("n0", "n1")

    async def then(source: CaptureSource) -> list[int | float | None]:
        seen = []
        for tick in range(12):
            monitor.pass_frames(record(FRAME), "n0")
            if tick == 5:
                monitor.unplug("n1")
            elif tick < 5:
                monitor.pass_frames(record(FRAME), "n1")
            seen.append((await source.read())[0])
        assert NetworkNoticeCode.CARD_GONE in codes(source)
        return seen

    known = [n for n in play(monitor, tmp_path, then) if n is not None]
    assert known == sorted(known)
    assert len(known) >= 10
    assert known[-1] == 17


def test_a_plugged_in_card_is_counted_from_then_on(tmp_path: Path) -> None:
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> None:
        await source.read()
        monitor.cards["n1"] = card("n1")
        for _ in range(capture.CARD_CHECK_READINGS):
            await source.read()
        monitor.pass_frames(record(FRAME) * 3, "n1")
        assert (await source.read())[0] == 3
        assert codes(source) == {NetworkNoticeCode.CARD_ADDED}

    play(monitor, tmp_path, then)


@pytest.mark.parametrize("refused", ["qom-list", "human-monitor-command", "object-add"])
def test_a_failing_monitor_gives_none_instead_of_an_error(tmp_path: Path, refused: str) -> None:
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> None:
        monitor.pass_frames(record(FRAME))
        await source.read()
        monitor.file().write_bytes(b"")
        monitor.refused.add(refused)
        assert [await source.read() for _ in range(3)] == [UNKNOWN] * 3
        monitor.refused.clear()
        await source.read()
        monitor.pass_frames(record(FRAME))
        assert (await source.read())[0] == 2

    play(monitor, tmp_path, then)
    assert monitor.filters == {}


def test_a_quiet_network_is_unknown_while_the_monitor_is_silent(tmp_path: Path) -> None:
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> ReadingValues:
        await source.read()
        monitor.refused.add("qom-list")
        return await source.read()

    assert play(monitor, tmp_path, then) == UNKNOWN


def test_a_filter_left_by_a_timed_out_command_is_removed(tmp_path: Path) -> None:
    monitor = Cards("n0")
    stray = build_filter_ids("phasewatch-7")[5]

    async def then(source: CaptureSource) -> None:
        monitor.filters[stray], monitor.files[stray] = ("n0", "rx"), tmp_path / "stray"
        await source.read()
        await source.read()
        assert stray not in monitor.filters

    play(monitor, tmp_path, then)


def test_the_file_of_a_filter_that_may_still_write_is_kept(tmp_path: Path) -> None:
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> None:
        monitor.refused.add("object-del")

    play(monitor, tmp_path, then)
    assert set(tmp_path.iterdir()) == set(monitor.files.values())


def test_a_backlog_of_frames_is_unknown_until_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MAX_READ_BYTES", 1 << 16)
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> None:
        monitor.pass_frames(record(FRAME) * 4000)
        readings = [await source.read() for _ in range(7)]
        assert readings[0] == UNKNOWN
        assert readings[-1][0] == 4000
        assert {row[0] for row in readings} == {None, 4000}
        assert NetworkNoticeCode.BEHIND in codes(source)

    play(monitor, tmp_path, then)


def test_unparsed_frames_make_flows_unknown_and_are_reported(tmp_path: Path) -> None:
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> None:
        monitor.pass_frames(record(OPAQUE) * 10 + record(FRAME))
        values = named(await source.read())
        assert (values["out_pkts"], values["out_bytes"]) == (11, 10 * len(OPAQUE) + len(FRAME))
        assert (
            {name for name, value in values.items() if value is None}
            == source.unknown_fields
            == set(NetflowReading._fields[4:])
        )
        assert codes(source) == {NetworkNoticeCode.UNREADABLE}
        for _ in range(PARSING_WINDOW_READINGS):
            values = named(await source.read())
        assert values["new_flows"] == 1
        assert codes(source) == {NetworkNoticeCode.READABLE}

    play(monitor, tmp_path, then)


def test_frames_with_an_unknown_start_make_the_whole_network_unknown(tmp_path: Path) -> None:
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> ReadingValues:
        monitor.pass_frames(record(b"\xff" * 100) * 10)
        return await source.read()

    assert play(monitor, tmp_path, then) == UNKNOWN


def test_a_passed_through_card_makes_the_network_unknown(tmp_path: Path) -> None:
    monitor = Cards("n0")
    ethernet_class = {"class_info": {"class": 0x0200}}
    bridged = {"class_info": {"class": 0x0604}, "pci_bridge": {"devices": [ethernet_class]}}
    monitor.buses = [{"devices": [ethernet_class, bridged, {"class_info": {"class": 0x0100}}]}]

    async def then(source: CaptureSource) -> None:
        assert source.unknown_fields == set(NetflowReading._fields)
        monitor.pass_frames(record(FRAME))
        assert await source.read() == UNKNOWN

    play(monitor, tmp_path, then)


def make_tap(proc: Path, name: str, counts: tuple[int, int, int, int], fd: int = 9) -> None:
    rx_packets, rx_bytes, tx_packets, tx_bytes = counts
    folder = proc / str(PID)
    (folder / "net").mkdir(parents=True, exist_ok=True)
    (folder / "fdinfo").mkdir(exist_ok=True)
    (folder / "fdinfo" / str(fd)).write_text(f"pos:\t0\niff:\t{name}\n")
    (folder / "net" / "dev").write_text(
        f"{name}: {rx_bytes} {rx_packets} 0 0 0 0 0 0 {tx_bytes} {tx_packets} 0 0 0 0 0 0\n"
    )


def test_a_card_without_filter_uses_the_counters_of_its_tap(tmp_path: Path) -> None:
    proc, folder = tmp_path / "proc", tmp_path / "dumps"
    folder.mkdir()
    make_tap(proc, "vnet5", (5, 500, 7, 900), fd=31)
    monitor = Cards("n0")
    monitor.cards["n1"] = card("n1", queues=2, kind="tap", rest=",fd=31")

    async def then(source: CaptureSource) -> None:
        assert source.unknown_fields == set(NetflowReading._fields[4:])
        monitor.pass_frames(record(FRAME))
        make_tap(proc, "vnet5", (15, 1500, 7, 900), fd=31)
        values = await source.read()
        assert values == (16, 1500 + len(FRAME), 7, 900, *(None,) * (len(NetflowReading._fields) - 4))
        assert len(monitor.filters) == 2

    play(monitor, folder, then, proc=proc)


def test_more_cards_than_the_maximum_make_the_network_unknown(tmp_path: Path) -> None:
    monitor = Cards(*(f"n{n}" for n in range(MAX_CARDS + 1)))

    async def then(source: CaptureSource) -> None:
        assert len(monitor.filters) == 2 * MAX_CARDS
        assert await source.read() == UNKNOWN

    play(monitor, tmp_path, then)


def test_opening_a_vm_without_a_card_or_filters_fails(tmp_path: Path) -> None:
    async def nothing(source: CaptureSource) -> None:
        """Never comes to it."""

    with pytest.raises(VmError):
        play(Cards(), tmp_path, nothing)
    monitor = Cards("n0")
    monitor.refused.add("object-add")
    with pytest.raises(VmError):
        play(monitor, tmp_path, nothing)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.binary(max_size=160), st.integers(0, 2000), st.booleans()), max_size=20),
    st.binary(max_size=60),
)
def test_no_frame_or_byte_sequence_stops_the_capture(
    tmp_path_factory: pytest.TempPathFactory, frames: list[tuple[bytes, int, bool]], rubbish: bytes
) -> None:
    monitor = Cards("n0")

    async def then(source: CaptureSource) -> None:
        for frame, beyond, outgoing in frames:
            monitor.pass_frames(record(frame, len(frame) + beyond), queue="rx" if outgoing else "tx")
        assert len(await source.read()) == len(NetflowReading._fields)
        monitor.pass_frames(rubbish)
        for _ in range(3):
            await source.read()
        monitor.pass_frames(record(FRAME))
        await source.read()

    play(monitor, tmp_path_factory.mktemp("dumps"), then)
