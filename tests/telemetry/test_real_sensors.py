"""The sensors on a real QEMU: bitmaps of a disk that QEMU itself writes, page sampling, and nothing left behind."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.requirements import need_qemu

from phasewatch.channels import list_raw_fields
from phasewatch.errors import VmError
from phasewatch.telemetry.base import HostClock
from phasewatch.telemetry.monitor_sensors import MonitorSensors, build_bitmap_names, list_bitmaps
from phasewatch.telemetry.qmp import JitUse, QmpMonitor, QmpSource
from phasewatch.types import SourceKind

pytestmark = pytest.mark.vm


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    """A QEMU with an empty disk whose vCPUs never start."""
    need_qemu()
    disk, path = tmp_path / "d.qcow2", tmp_path / "q.sock"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
    command = ["qemu-system-x86_64", "-display", "none", "-nodefaults", "-S", "-m", "64", "-accel", "tcg"]
    command += ["-drive", f"file={disk},if=none,id=d0,format=qcow2", "-device", "virtio-blk-pci,drive=d0,id=blk0"]
    with subprocess.Popen([*command, "-qmp", f"unix:{path},server=on,wait=off"]) as qemu:
        yield path
        qemu.kill()


async def connect(path: Path) -> QmpMonitor:
    monitor = QmpMonitor(path)
    for _ in range(100):
        try:
            await monitor.connect()
        except VmError:
            await asyncio.sleep(0.1)
        else:
            return monitor
    raise AssertionError("QEMU did not open its monitor")


def test_written_and_rewritten_clusters_of_a_real_disk(socket: Path) -> None:
    async def work() -> None:
        monitor = await connect(socket)
        sensors = MonitorSensors(clock=HostClock(), bitmaps=build_bitmap_names("phasewatch-1-2-3"))
        source = QmpSource(
            monitor=monitor, vcpus=1, clock=HostClock(), balloon="", registers=False, jit=JitUse.NEVER, sensors=sensors
        )
        await source.open()

        async def write(where: str) -> dict[str, object]:
            await monitor.ask("human-monitor-command", **{"command-line": f'qemu-io d0 "write {where} 64k"'})
            fields = [spec.field for spec in list_raw_fields(SourceKind.QMP)]
            return dict(zip(fields, await source.read(), strict=True))

        rows = [await write("0"), await write("1M"), await write("0")]
        for _ in range(40):
            if rows[-1]["mem_dirty_rate"] is not None:
                break
            await asyncio.sleep(0.1)
            rows.append(await write("2M"))
        kept = await list_bitmaps(monitor.ask)
        await source.close()
        left = await list_bitmaps(monitor.ask)
        await monitor.close()

        assert [(row["blk_clusters"], row["blk_rewritten"]) for row in rows[:3]] == [(1, 0), (2, 0), (3, 1)]
        assert rows[-1]["mem_dirty_rate"] == 0  # no vCPU runs
        assert rows[-1]["blk_flush_ns"] is not None
        assert {name for _, name in kept} == set(build_bitmap_names("phasewatch-1-2-3"))
        assert left == ()
        assert set(sensors.missing) == {"kvm_exits", "kvm_io_exits", "kvm_halt_exits", "kvm_halt_polls"}

    asyncio.run(work())
