"""Tap counters: of all taps, from the process's own network namespace, without jumps."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.factories.proc import PID

from phasewatch.telemetry.base import ReadingValues, build_missing_reading
from phasewatch.telemetry.tap import TapFinder, TapSource, find_cards_without_tap, find_tap_devices
from phasewatch.types import SourceKind

UNKNOWN = build_missing_reading(SourceKind.NETFLOW)


class Taps:
    """A /proc with one process that holds some taps."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / str(PID)
        (self.folder / "net").mkdir(parents=True)
        (self.folder / "fdinfo").mkdir()
        self.counts: dict[str, int] = {}

    def set(self, **counts: int) -> None:
        """Set the taps: each received the given number of frames of 100 bytes, and sent twice as many."""
        for path in (self.folder / "fdinfo").iterdir():
            path.unlink()
        for number, name in enumerate(counts):
            (self.folder / "fdinfo" / str(number)).write_text(f"pos:\t0\niff:\t{name}\n")
        lines = [f"{name}: {100 * n} {n} 0 0 0 0 0 0 {200 * n} {2 * n} 0 0 0 0 0 0\n" for name, n in counts.items()]
        (self.folder / "net" / "dev").write_text("Inter-|   Receive\n face |bytes\n" + "".join(lines))


async def read_to_the_next_look(source: TapSource) -> ReadingValues:
    for _ in range(4):
        values = await source.read()
    return values


def test_taps_are_summed_without_falls_or_jumps(tmp_path: Path) -> None:
    taps = Taps(tmp_path)
    taps.set(a=5, b=7)

    async def main() -> None:
        source = TapSource(pid=PID, proc=tmp_path)
        await source.open()
        assert await source.read() == (12, 1200, 24, 2400, *(None,) * 25)
        taps.set(a=6, b=8, c=1000)  # c was somebody else's until now
        await read_to_the_next_look(source)
        assert (await source.read())[0] == 14
        taps.set(a=6, c=1003)
        assert UNKNOWN in [await source.read() for _ in range(4)]
        assert (await source.read())[0] == 17
        taps.set(a=6, c=2)  # made anew under its old name
        assert await source.read() == UNKNOWN
        taps.set(a=7, c=2)
        assert (await source.read())[0] == 18

    asyncio.run(main())


def test_readings_are_unknown_until_a_tap_appears(tmp_path: Path) -> None:
    taps = Taps(tmp_path)
    taps.set(a=5)

    async def main() -> None:
        source = TapSource(pid=PID, proc=tmp_path)
        await source.open()
        taps.set()
        assert [await source.read() for _ in range(6)] == [UNKNOWN] * 6
        taps.set(a=900)
        await read_to_the_next_look(source)
        taps.set(a=901)
        assert (await source.read())[0] == 6

    asyncio.run(main())


def test_opening_a_vm_without_taps_fails(tmp_path: Path) -> None:
    Taps(tmp_path).set()

    with pytest.raises(OSError, match="tap"):
        asyncio.run(TapSource(pid=PID, proc=tmp_path).open())


def test_a_device_of_another_network_namespace_is_ignored(tmp_path: Path) -> None:
    taps = Taps(tmp_path)
    taps.set(lo_like_ours=1)
    (taps.folder / "net" / "dev").write_text("Inter-|\n face |\n")

    with pytest.raises(OSError, match="lo_like_ours"):
        asyncio.run(TapSource(pid=PID, proc=tmp_path).open())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param("-netdev tap,id=n0,fd=3 -device virtio-net-pci,netdev=n0", [], id="tap"),
        pytest.param('-netdev {"type":"tap","fd":"31","id":"hostnet0"}', [], id="libvirt"),
        pytest.param("-netdev tap,id=n0 -netdev user,id=n1", ["-netdev user"], id="one of two"),
        pytest.param("-nic user,model=e1000", ["-nic user"], id="short"),
        pytest.param("-nic none", [], id="none"),
    ],
)
def test_cards_without_a_tap_are_listed(tmp_path: Path, line: str, expected: list[str]) -> None:
    taps = Taps(tmp_path)
    (taps.folder / "cmdline").write_text("\0".join(["qemu-system-x86_64", *line.split(" ")]) + "\0")

    assert find_cards_without_tap(PID, tmp_path) == expected


def open_files(proc: Path, files: dict[int, tuple[str, str]]) -> None:
    """Make open files: descriptor → what it links to, and the tap device in it."""
    for folder in ("fd", "fdinfo"):
        (proc / str(PID) / folder).mkdir(parents=True, exist_ok=True)
    for fd, (link, tap) in files.items():
        (proc / str(PID) / "fd" / str(fd)).symlink_to(link)
        (proc / str(PID) / "fdinfo" / str(fd)).write_text(f"pos:\t0\niff:\t{tap}\n" if tap else "pos:\t0\n")


def test_the_queues_of_a_tap_are_one_device(tmp_path: Path) -> None:
    tun = "/dev/net/tun"
    open_files(
        tmp_path, {3: ("socket:[7]", ""), 9: (tun, "vnet0"), 10: (tun, "vnet0"), 11: (tun, "vnet1"), 12: (tun, "")}
    )

    devices = find_tap_devices(PID, tmp_path)

    assert [(device.name, device.fds) for device in devices] == [("vnet0", {9, 10}), ("vnet1", {11})]


def test_a_file_that_only_looks_like_a_macvtap_is_none(tmp_path: Path) -> None:
    open_files(tmp_path, {9: ("/dev/tap1", ""), 10: ("/dev/tap999999999", "")})  # 1 is the loopback interface

    assert find_tap_devices(PID, tmp_path) == ()


def test_changes_of_a_processs_taps_are_noticed(tmp_path: Path) -> None:
    open_files(tmp_path, {3: ("socket:[7]", ""), 9: ("/dev/net/tun", "vnet0")})
    finder = TapFinder(PID, tmp_path)
    assert [device.name for device in finder.find()] == ["vnet0"]
    assert finder.is_unchanged()

    (tmp_path / str(PID) / "fdinfo" / "9").write_text("iff:\tvnet7\n")
    assert not finder.is_unchanged()
    assert [device.name for device in finder.find()] == ["vnet7"]

    open_files(tmp_path, {10: ("/dev/net/tun", "vnet8")})
    assert not finder.is_unchanged()


def test_a_process_that_ended_has_no_taps(tmp_path: Path) -> None:
    finder = TapFinder(PID, tmp_path)

    assert finder.find() == ()
