"""Plug a disk and a network card into a watched real QEMU, and pull them out again.

USB devices are used, because QEMU removes them at once, without a guest that agrees.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.live.test_real_fleet import Watcher
from tests.live.test_real_vm import ask, filters, wait_for
from tests.requirements import need_program

pytestmark = pytest.mark.vm

READS = "qmp.blk_rd_ops"
FRAMES = "netflow.out_pkts"
BIN_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PluggableVm:
    """A real VM with one disk and one network card, and two monitors: one for the watcher, one for the test."""

    process: subprocess.Popen[bytes]
    watched: Path
    door: Path

    def ask(self, command: str, **arguments: object) -> Any:
        return ask(self.door, command, **arguments)

    def read_disk(self, node: str, times: int) -> None:
        """Read from a disk as its device does, so that QEMU counts it."""
        disks = [disk for disk in self.ask("query-block") if disk.get("inserted", {}).get("node-name") == node]
        for _ in range(times):
            line = f'qemu-io -d {disks[0]["qdev"]} "aio_read 0 4096"'
            answer = self.ask("human-monitor-command", **{"command-line": line})
            assert "rror" not in answer, answer

    def plug(self) -> None:
        self.ask("blockdev-add", driver="null-co", **{"node-name": "z1"}, size=1 << 20)
        self.ask("device_add", driver="usb-storage", id="disk1", drive="z1")
        self.ask("netdev_add", type="user", id="n1", restrict=True)
        self.ask("device_add", driver="usb-net", id="nic1", netdev="n1")

    def unplug(self) -> None:
        for device in ("disk1", "nic1"):
            self.ask("device_del", id=device)
        self.ask("netdev_del", id="n1")


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[PluggableVm]:
    watched, door = tmp_path / "watched.sock", tmp_path / "door.sock"
    argv = [
        *(need_program("qemu-system-x86_64", "qemu-system-x86"), "-name", "plug", "-nodefaults", "-display", "none"),
        *("-machine", "pc", "-accel", "tcg", "-m", "32", "-device", "qemu-xhci"),
        *("-qmp", f"unix:{watched},server=on,wait=off", "-qmp", f"unix:{door},server=on,wait=off"),
        *("-netdev", "user,id=n0,restrict=on", "-device", "virtio-net-pci,netdev=n0,romfile="),
        *("-blockdev", "driver=null-co,node-name=z0,size=1048576,read-zeroes=on"),
        *("-device", "virtio-blk-pci,drive=z0,id=disk0"),
    ]
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_for(lambda: watched.exists() and door.exists())
    yield PluggableVm(process=child, watched=watched, door=door)
    child.kill()
    child.wait()


@dataclass(frozen=True, slots=True)
class ObservedBins:
    """The bins of a running watch."""

    watcher: Watcher

    def values(self, channel: str, since_ns: int = 0) -> list[float | None]:
        """Return a channel's values in bins that begin after a time."""
        found = []
        for line in tuple(self.watcher.lines):
            if line.get("type") == "telemetry":
                data = line["data"]
                at = data["channels"].index(channel)
                rows = [row[at] for i, row in enumerate(data["values"]) if data["t0_ns"] + i * BIN_S * 1e9 > since_ns]
                found += rows
        return found

    def are_known(self, since_ns: int) -> bool:
        """Return whether disks and network have been read since a time."""
        return all(any(v is not None for v in self.values(name, since_ns)) for name in (READS, FRAMES))

    def count_reads(self, since_ns: int = 0) -> float:
        return sum(value * BIN_S for value in self.values(READS, since_ns) if value is not None)


def wait_long(condition: Callable[[], bool]) -> bool:
    return wait_for(condition, 90.0)


def test_a_disk_and_a_card_that_come_and_go_are_counted_and_nothing_stays_unknown(vm: PluggableVm) -> None:
    watcher = Watcher("--qmp", str(vm.watched))
    bins = ObservedBins(watcher)
    try:
        assert wait_long(lambda: bins.are_known(0))
        n_filters = len(filters(vm.door))

        vm.plug()
        assert wait_long(lambda: len(filters(vm.door)) == 2 * n_filters)
        plugged_ns = time.time_ns()
        assert wait_long(lambda: bins.are_known(plugged_ns))
        before = bins.count_reads()
        vm.read_disk("z1", 20)
        assert wait_long(lambda: bins.count_reads() > before)

        vm.unplug()
        assert wait_long(lambda: len(filters(vm.door)) == n_filters)
        unplugged_ns = time.time_ns()
        assert wait_long(lambda: bins.are_known(unplugged_ns))
        before = bins.count_reads(unplugged_ns)
        vm.read_disk("z0", 20)
        assert wait_long(lambda: bins.count_reads(unplugged_ns) > before)
    finally:
        watcher.process.terminate()
        watcher.process.wait(60)
        watcher.kill()

    result = watcher.lines[-1]["result"]
    states = result["watched"]["states"]
    assert states.index("network-card-added") < states.index("network-card-gone")
    assert all(value >= 0 for value in bins.values(READS) + bins.values(FRAMES) if value is not None)
    assert bins.count_reads(plugged_ns) <= 60  # 40 reads, and no burst of a device's whole past; a bin may be repeated
    assert result["left_as_found"] is True
    assert filters(vm.door) == []
