"""Watch a real QEMU that was not prepared for it: one that is paused, and one with an unknown workload."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.factories.vms import shape_of
from tests.requirements import need_program, need_qemu

from phasewatch.errors import VmError
from phasewatch.lab.campaign import default_cache
from phasewatch.lab.guest_driver import GuestDriver
from phasewatch.lab.guest_image import build_guest_image
from phasewatch.lab.qemu_command import VmPaths, build_qemu_command
from phasewatch.telemetry.base import HostClock
from phasewatch.telemetry.qmp import BALLOON_POLLING_PROPERTY, QmpMonitor

pytestmark = pytest.mark.vm

EDGE = Path(__file__).parents[2] / "corpus" / "lab-v1.edge.zip"
BALLOON = "/machine/peripheral/balloon0"
# Neither a miner nor a walk nor a scan: bursts of sorting, a file that is rewritten in place, datagrams of odd sizes.
ODD = """
n=0
while [ $n -lt 40 ]; do
  n=$((n+1))
  dd if=/dev/urandom bs=1k count=200 2>/dev/null | od -x | sort > /tmp/odd
  dd if=/tmp/odd of=/tmp/odd2 bs=4k conv=notrunc 2>/dev/null
  i=0; while [ $i -lt 20 ]; do i=$((i+1)); echo "$n $i" | nc -u -w 1 10.0.2.2 4000$((i%7)) & done
  sleep 1; kill $(jobs -p) 2>/dev/null
done
"""


def ask(door: Path, command: str, **arguments: object) -> Any:
    async def main() -> Any:
        monitor = QmpMonitor(door)
        await monitor.connect()
        try:
            return await monitor.ask(command, **arguments)
        finally:
            await monitor.close()

    return asyncio.run(main())


def filters(door: Path) -> list[str]:
    return [o["name"] for o in ask(door, "qom-list", path="/objects") if o["type"] == "child<filter-dump>"]


def interval(door: Path) -> int:
    return int(ask(door, "qom-get", path=BALLOON, property=BALLOON_POLLING_PROPERTY))


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if condition():
                return True
        except VmError:
            pass
        time.sleep(0.2)
    return False


def command(pid: int, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "phasewatch", "watch", "--pid", str(pid), "--model", str(EDGE), *arguments]


@pytest.fixture
def still(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A real QEMU whose guest never runs; another program polls its balloon every 3 s."""
    qemu = need_program("qemu-system-x86_64", "qemu-system-x86")
    door = tmp_path / "q.sock"
    argv = [
        qemu,
        "-S",
        "-name",
        "still",
        "-nodefaults",
        "-display",
        "none",
        "-machine",
        "pc",
        "-accel",
        "tcg",
        "-m",
        "32",
        "-qmp",
        f"unix:{door},server=on,wait=off",
        "-netdev",
        "user,id=n0,restrict=on",
        "-device",
        "virtio-net-pci,netdev=n0,romfile=",
        "-device",
        "virtio-balloon-pci,id=balloon0",
        "-blockdev",
        "driver=null-co,node-name=z0,size=1048576,read-zeroes=on",
        "-device",
        "virtio-blk-pci,drive=z0",
    ]
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_for(door.exists)
    ask(door, "qom-set", path=BALLOON, property=BALLOON_POLLING_PROPERTY, value=3)
    yield child, door
    child.kill()
    child.wait()


def test_a_paused_vm_is_watched_and_left_unchanged(still: tuple[subprocess.Popen[bytes], Path]) -> None:
    child, door = still
    done = subprocess.run(
        command(child.pid, "--seconds", "13.5", "--json"), capture_output=True, text=True, timeout=300
    )

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    result = lines[-1]["result"]
    assert (result["threat"], result["left_as_found"]) == ("portable", True)
    assert result["watched"]["states"] == ["prelaunch"]
    assert {line["type"] for line in lines[:-1]} >= {"telemetry", "phase"}
    assert filters(door) == []
    assert interval(door) == 3
    assert child.poll() is None


def test_a_watcher_killed_by_sigkill_leaves_the_real_vm_unchanged(still: tuple[subprocess.Popen[bytes], Path]) -> None:
    child, door = still
    watcher = subprocess.Popen(command(child.pid, "--json"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert watcher.stdout is not None
    first = json.loads(watcher.stdout.readline())
    folders = {path for path in Path("/dev/shm").glob("phasewatch-*") if any(path.glob(f"phasewatch-{watcher.pid}-*"))}
    watcher.send_signal(signal.SIGKILL)
    watcher.communicate()

    assert first["type"] == "telemetry"
    assert len(folders) == 1
    assert wait_for(lambda: filters(door) == [] and interval(door) == 3)
    assert wait_for(lambda: not any(folder.exists() for folder in folders))
    assert child.poll() is None


def test_the_next_watch_removes_what_a_killed_watcher_and_cleanup_process_left(
    still: tuple[subprocess.Popen[bytes], Path],
) -> None:
    child, door = still
    watcher = subprocess.Popen(command(child.pid, "--json"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert watcher.stdout is not None
    watcher.stdout.readline()
    for guard in children_of(watcher.pid):
        os.kill(guard, signal.SIGKILL)
    watcher.send_signal(signal.SIGKILL)
    watcher.communicate()
    assert filters(door) != []
    assert interval(door) == 1

    done = subprocess.run(command(child.pid, "--seconds", "1", "--json"), capture_output=True, text=True, timeout=300)

    assert json.loads(done.stdout.splitlines()[-1])["result"]["left_as_found"] is True
    assert filters(door) == []
    assert interval(door) == 3
    assert not list(Path("/dev/shm").glob(f"phasewatch-{watcher.pid}-*"))


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_watch_ends_with_the_vm(still: tuple[subprocess.Popen[bytes], Path]) -> None:
    child, _ = still
    watcher = subprocess.Popen(command(child.pid, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert watcher.stdout is not None
    watcher.stdout.readline()
    child.kill()
    child.wait()
    out, err = watcher.communicate(timeout=120)

    assert watcher.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["result"]["watched"]["why"] == "the VM is gone"


def test_an_unknown_workload_is_watched_and_visible_from_outside(tmp_path: Path) -> None:
    need_qemu()
    image = build_guest_image(default_cache(), "x86_64", scripts={"odd/mix/active": ODD})
    assert image.kernel is not None
    assert image.initrd is not None
    sockets = VmPaths(folder=tmp_path)
    overlay = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        str(image.base_disk),
        "-F",
        "qcow2",
        str(sockets.overlay),
    ]
    subprocess.run(overlay, check=True)
    argv = build_qemu_command(
        shape_of(machine="pc"),
        accel="tcg",
        kernel=image.kernel,
        initrd=image.initrd,
        sockets=sockets,
        mac="52:54:00:77:00:09",
        tsc_khz=None,
    )
    argv[argv.index("-netdev") + 1] = "user,id=n0,restrict=on"  # no packet leaves the machine
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        lines, sent = asyncio.run(_play(child.pid, sockets.ctl))
    finally:
        child.kill()
        child.wait()

    result = lines[-1]["result"]
    telemetry = [line["data"] for line in lines[:-1] if line["type"] == "telemetry"]
    phases = [line["data"] for line in lines[:-1] if line["type"] == "phase"]
    at = telemetry[0]["channels"].index("proc.vcpu_run")
    before = [v[at] for t in telemetry for v in t["values"] if v[at] is not None and t["t0_ns"] < sent]
    after = [v[at] for t in telemetry for v in t["values"] if v[at] is not None and t["t0_ns"] > sent + 2e9]
    assert result["threat"] == "portable"
    assert result["left_as_found"] is True
    assert len(phases) >= 8
    assert all(abs(sum(data["p"]) - 1) < 1e-3 for data in phases)
    assert sum(after) / len(after) > 3 * (sum(before) / len(before)), "the workload is seen from outside"


async def _play(pid: int, ctl: Path) -> tuple[list[Any], int]:
    """Wait for the guest, watch it, and let the workload begin after 20 s."""
    driver = GuestDriver(clock=HostClock(), name="odd")
    for _ in range(300):
        try:
            await driver.open(ctl)
            break
        except OSError:
            await asyncio.sleep(0.1)
    await asyncio.wait_for(driver.wait_ready(), 120)
    await driver.send("hello")
    watcher = await asyncio.create_subprocess_exec(
        *command(pid, "--seconds", "60", "--json"), stdout=asyncio.subprocess.PIPE, env={**os.environ}, limit=1 << 20
    )
    await asyncio.sleep(20)
    ack = await driver.send("phase", "active", "odd", "mix", "1")
    out, _ = await asyncio.wait_for(watcher.communicate(), 200)
    await driver.close()
    return [json.loads(line) for line in out.splitlines()], ack.t_wall_ns
