"""Measure `phasewatch watch --all` on many real QEMU processes, in a PID namespace in which only they exist.

Half of the VMs run: their firmware found nothing to boot and idles. The others are stopped, which does not change the
watcher's work. Meanwhile a tenth is killed and started again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from timing import Figure, Part

QEMU = "qemu-system-x86_64"
LATENESS_MS = 1000.0  # a bin is closed a second after its end, whatever came
_PROPERTY = "guest-stats-polling-interval"
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetCost:
    """What one watch of many VMs cost.

    Attributes:
        vms, running, killed: VMs, those of them that run, and those that were killed and started again.
        seconds: Length of the measured time, after all VMs were found.
        cpu_share: CPU of the watcher and its cleanup process per VM, in cores.
        alone_share: The same of a watch of one VM.
        rss_mib: Largest resident memory of the watcher and its cleanup process together.
        delays_ms: p50, p99 and maximum delay of a decision after its window was closed.
        windows, missed: Decisions, and windows without one.
        found_s: Longest time from the start of a VM to the beginning of its watch.
        left: Objects, intervals and folders that the watcher left.
        is_left_as_found: What the watcher itself reports.
    """

    vms: int
    running: int
    killed: int
    seconds: float
    cpu_share: float
    alone_share: float
    rss_mib: float
    delays_ms: tuple[float, float, float]
    windows: int
    missed: int
    found_s: float
    left: int
    is_left_as_found: bool


@dataclass
class _EventReader:
    """Reads the events of a watch in a thread.

    Attributes:
        ends_ns: VM → ends of its windows, in order.
        delays_ms: (time at which the event came, delay) of each decision.
        watched_s: (time, VM) of each beginning of a watch.
        result: The result of the watch, at its end.
    """

    ends_ns: dict[str, list[int]] = field(default_factory=dict)
    delays_ms: list[tuple[float, float]] = field(default_factory=list)
    watched_s: list[tuple[float, str]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)

    def read(self, lines: IO[bytes]) -> None:
        for line in lines:
            now_s = time.monotonic()
            if b'"type":"phase"' in line:
                data = json.loads(line)["data"]
                self.ends_ns.setdefault(data["vm"], []).append(data["t_end_ns"])
                self.delays_ms.append((now_s, data["latency_ms"] - LATENESS_MS))
            elif b'"vm": {' in line:
                vm = json.loads(line)["vm"]
                if vm["kind"] == "watched":
                    self.watched_s.append((now_s, vm["name"]))
            elif b'"result"' in line[:10]:
                self.result = json.loads(line)["result"]


class _TestVm:
    """One QEMU process with a monitor, a network card, a balloon and a disk."""

    def __init__(self, name: str, folder: Path, *, is_running: bool) -> None:
        self.name, self.door, self._is_running = name, folder / f"{name}.sock", is_running
        self.started_s = 0.0
        self.start()

    def start(self) -> None:
        self.door.unlink(missing_ok=True)
        argv = [QEMU, *([] if self._is_running else ["-S"]), "-name", self.name]
        argv += ["-nodefaults", "-display", "none", "-machine", "pc", "-m", "16", "-accel", "tcg,tb-size=4"]
        argv += ["-qmp", f"unix:{self.door},server=on,wait=off", "-netdev", "user,id=n0,restrict=on"]
        argv += ["-device", "virtio-net-pci,netdev=n0,romfile=", "-device", "virtio-balloon-pci,id=balloon0"]
        argv += ["-blockdev", "driver=null-co,node-name=z0,size=1048576,read-zeroes=on"]
        argv += ["-device", "virtio-blk-pci,drive=z0"]
        self.started_s = time.monotonic()
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(argv, stdin=quiet, stdout=quiet, stderr=quiet)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait_ready(self) -> None:
        while not self.door.exists():
            if self.process.poll() is not None:
                raise SystemExit(f"{QEMU} ended with {self.process.returncode}")
            time.sleep(0.05)


def _list_family(pid: int) -> list[int]:
    """Return a process and its children. Source: ``/proc/PID/task/TID/children``."""
    family = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread ended after it was listed
            family += [int(word) for word in path.read_text("ascii").split()]
    return family


def _read_cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and its children, also of those that ended.

    Source: ``/proc/PID/stat``, utime, stime, cutime and cstime.
    """
    total = 0.0
    for member in _list_family(pid):
        with suppress(OSError):
            fields = Path(f"/proc/{member}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) * _TICK_S
    return total


def _read_rss_mib(pid: int) -> float:
    pages = 0
    for member in _list_family(pid):
        with suppress(OSError):
            pages += int(Path(f"/proc/{member}/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class _Watch:
    """A running `phasewatch watch`."""

    def __init__(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "phasewatch", "watch", *map(str, arguments), "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.events = _EventReader()
        self._thread = threading.Thread(target=self.events.read, args=(self.process.stdout,))
        self._thread.start()

    def wait_windows(self, vms: int) -> None:
        """Wait until every VM has its first decision."""
        while len(self.events.ends_ns) < vms:
            if self.process.poll() is not None:
                raise SystemExit(f"phasewatch watch ended with {self.process.returncode}")
            time.sleep(0.2)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(120)
        self._thread.join()


def _measure_alone(vm: _TestVm, edge: Path, seconds: float) -> float:
    watch = _Watch("--pid", str(vm.process.pid), "--model", edge)
    watch.wait_windows(1)
    before_s, begin_s = _read_cpu_s(watch.process.pid), time.monotonic()
    time.sleep(seconds)
    share = (_read_cpu_s(watch.process.pid) - before_s) / (time.monotonic() - begin_s)
    watch.stop()
    return share


async def _count_left(vms: list[_TestVm]) -> int:
    """Count the filters, bitmaps and polling intervals that are in the VMs, and the folders of watchers."""
    from phasewatch.live.ownership import find_watch_folders
    from phasewatch.telemetry.monitor_sensors import list_bitmaps
    from phasewatch.telemetry.qmp import QmpMonitor

    left = len(find_watch_folders())
    for vm in vms:
        monitor = QmpMonitor(vm.door, timeout_s=30)
        await monitor.connect()
        objects = await monitor.ask("qom-list", path="/objects")
        left += sum(child["type"] == "child<filter-dump>" for child in objects)
        left += await monitor.ask("qom-get", path="/machine/peripheral/balloon0", property=_PROPERTY) != 0
        left += len(await list_bitmaps(monitor.ask))
        await monitor.close()
    return left


def _count_missed(ends_ns: list[int], lives: int) -> int:
    """Count the seconds without a decision, apart from the largest gaps between the lives of one VM."""
    gaps = sorted((b - a) // 10**9 - 1 for a, b in pairwise(ends_ns))
    return sum(gaps[: len(gaps) - (lives - 1)])


def run_inside(edge: Path, *, n: int, running: int, seconds: float, alone_s: float) -> FleetCost:
    """Start the VMs, watch them, and return the cost; only for a PID namespace without other VMs."""
    folder = Path(tempfile.mkdtemp(prefix="pw-"))
    vms: list[_TestVm] = []
    try:
        for i in range(n):
            vms.append(_TestVm(f"vm{i:02}", folder, is_running=i % n < running))
            vms[-1].wait_ready()
        time.sleep(20)  # the firmware looks for something to boot
        alone_share = _measure_alone(vms[-1], edge, alone_s)
        watch = _Watch("--all", "--model", edge)
        watch.wait_windows(n)
        pid = watch.process.pid
        before_s, begin_s, rss_mib = _read_cpu_s(pid), time.monotonic(), 0.0
        killed = [vms[i] for i in range(0, n, 10)] if n >= 10 else []
        due = list(killed)
        while time.monotonic() < begin_s + seconds:
            time.sleep(1)
            if watch.process.poll() is not None:
                raise SystemExit(f"phasewatch watch ended with {watch.process.returncode}")
            rss_mib = max(rss_mib, _read_rss_mib(pid))
            if due and time.monotonic() > begin_s + seconds * (len(killed) - len(due) + 1) / (2 * len(killed)):
                vm = due.pop()
                vm.kill()
                time.sleep(1)
                vm.start()
        end_s = time.monotonic()
        cpu_share = (_read_cpu_s(pid) - before_s) / (end_s - begin_s) / n
        watch.stop()
        events = watch.events
        delays = [ms for at_s, ms in events.delays_ms if begin_s <= at_s <= end_s]
        lives = {vm.name: 1 + (vm in killed) for vm in vms}
        found = {vm.name: vm.started_s for vm in killed}
        return FleetCost(
            vms=n,
            running=running,
            killed=len(killed),
            seconds=end_s - begin_s,
            cpu_share=cpu_share,
            alone_share=alone_share,
            rss_mib=rss_mib,
            delays_ms=(float(np.median(delays)), float(np.percentile(delays, 99)), max(delays)),
            windows=len(events.delays_ms),
            missed=sum(_count_missed(ends, lives[name]) for name, ends in events.ends_ns.items()),
            found_s=max(
                (
                    min((at_s - found[name] for at_s, who in events.watched_s if who == name and at_s > found[name]))
                    for name in found
                ),
                default=0.0,
            ),
            left=asyncio.run(_count_left(vms)),
            is_left_as_found=bool(events.result.get("left_as_found")),
        )
    finally:
        for vm in vms:
            vm.kill()
        shutil.rmtree(folder)


def measure(corpus: Path, *, n: int = 64, running: int = 32, seconds: float = 600.0, alone_s: float = 60.0) -> Part:
    """Measure a watch of many VMs."""
    title = "Watching many VMs"
    if shutil.which(QEMU) is None or os.geteuid() != 0:
        return Part(title=title, about=f"Not measured: it needs {QEMU}, and root for a PID namespace.")
    argv = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--", sys.executable, __file__]
    argv += ["--edge", str(corpus / "lab-v1.edge.zip"), "--vms", str(n), "--running", str(running)]
    argv += ["--seconds", str(seconds), "--alone", str(alone_s)]
    cost = FleetCost(**json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout))
    p50, p99, most = cost.delays_ms
    return Part(
        title=title,
        about=(
            f"`phasewatch watch --all --json` with the bundled model on {cost.vms} QEMU processes, {cost.running} of "
            f"them with a running idle guest, the others stopped, for {cost.seconds:.0f} s; {cost.killed} were killed "
            "and started again meanwhile. CPU and memory include the cleanup process."
        ),
        figures=(
            Figure(
                what="CPU of watching each of many VMs",
                must="≤0.25",
                aim="≤0.1",
                unit="% of a core",
                measured=100 * cost.cpu_share,
                note=f"a watch of one VM: {100 * cost.alone_share:.2g} %",
            ),
            Figure(
                what="memory of the watcher of many VMs", must="≤250", aim="≤150", unit="MiB", measured=cost.rss_mib
            ),
            Figure(
                what="end of window to event with many VMs, 99th percentile",
                must="≤100",
                aim="≤20",
                unit="ms",
                measured=p99,
                note=f"of {cost.windows:,} windows, median {p50:.2g} ms, maximum {most:.3g} ms",
            ),
            Figure(what="missed windows", must="≤0", aim="≤0", unit=f"of {cost.windows:,}", measured=cost.missed),
            Figure(
                what="start of a VM to the beginning of its watch", must="≤5", aim="≤3", unit="s", measured=cost.found_s
            ),
            Figure(
                what="objects, intervals and folders left in the VMs",
                must="≤0",
                aim="≤0",
                unit=f"in {cost.vms} VMs",
                measured=cost.left + (not cost.is_left_as_found),
            ),
        ),
    )


def main() -> None:
    """Measure inside the namespace and print the cost as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--edge", type=Path, required=True, help="edge bundle")
    parser.add_argument("--vms", type=int, default=64)
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--alone", type=float, default=60.0, help="seconds of the watch of one VM")
    given = parser.parse_args()
    cost = run_inside(given.edge, n=given.vms, running=given.running, seconds=given.seconds, alone_s=given.alone)
    print(json.dumps(asdict(cost)))


if __name__ == "__main__":
    main()
