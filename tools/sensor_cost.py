"""Measure what the extended sensors of the monitor cost: `python -m tools.sensor_cost STORE`, nine quiet minutes.

It boots one VM, and samples it in intervals that alternate between the monitor's base queries and all of them, while
the guest is idle and while it rewrites its files. The differences of neighbouring intervals are written to
`<store>.sensors.json` beside the store; `tools/recordings.py` adds them to the page.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from phasewatch import atomic
from phasewatch.lab.campaign import QemuFactory, RecordingOptions, default_cache
from phasewatch.lab.qemu_command import find_host_shape
from phasewatch.lab.vm import QemuVm
from phasewatch.profiles import IDLE_SAMPLE
from phasewatch.telemetry.base import AsyncClock, HostClock, RowLog, TelemetrySampler
from tools.recordings import SensorCost, build_sensor_cost_path

HOST, PAIRS, INTERVAL_S, SETTLE_S = "pc", 6, 20.0, 30.0
LOADS = {"idle": IDLE_SAMPLE, "encrypting files": "encrypt-files"}  # title → benign kind


async def measure_interval(machine: QemuVm, pid: int, clock: AsyncClock, *, sensors: bool) -> tuple[float, float]:
    """Sample a VM for one interval; return the CPU time of QEMU and of this process, in cores."""
    sources = machine.sources(sensors=sensors)
    for source in sources:
        await source.open()
    sampling = asyncio.create_task(
        TelemetrySampler([*sources], [RowLog(source.source, clock) for source in sources], clock).run()
    )
    try:
        await asyncio.sleep(1.0)
        before = read_cpu_s(pid), time.process_time(), time.monotonic()
        await asyncio.sleep(INTERVAL_S)
        after = read_cpu_s(pid), time.process_time(), time.monotonic()
    finally:
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
        for source in sources:
            await source.close()
    seconds = after[2] - before[2]
    return (after[0] - before[0]) / seconds, (after[1] - before[1]) / seconds


def read_cpu_s(pid: int) -> float:
    """Return the CPU time that the threads of a process have used so far, in s (proc_pid_schedstat(5), in ns)."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


async def measure_costs(machine: QemuVm, clock: AsyncClock) -> list[SensorCost]:
    """Boot a VM, measure pairs of intervals under each load, and stop it."""
    try:
        pid = (await machine.boot()).qemu_pid
        await machine.send("hello")
        await asyncio.sleep(SETTLE_S)
        found = []
        for title, kind in LOADS.items():
            if kind != IDLE_SAMPLE:
                await machine.send("load", kind, "7")
                await asyncio.sleep(5.0)
            gaps = []
            for number in range(PAIRS):
                order = (False, True) if number % 2 else (True, False)
                cost = {sensors: await measure_interval(machine, pid, clock, sensors=sensors) for sensors in order}
                gaps.append((cost[True][0] - cost[False][0], cost[True][1] - cost[False][1]))
            found.append(
                SensorCost(
                    load=title,
                    group="dirty bitmaps and page sampling",
                    qemu=tuple(round(qemu, 5) for qemu, _ in gaps),
                    sampler=tuple(round(sampler, 5) for _, sampler in gaps),
                )
            )
        return found
    finally:
        await machine.stop()


def main(arguments: Sequence[str]) -> int:
    """Measure the costs and write them beside the store."""
    if len(arguments) != 1:
        print("usage: python -m tools.sensor_cost STORE", file=sys.stderr)
        return 2
    clock, shape = HostClock(), find_host_shape(HOST)
    with tempfile.TemporaryDirectory(prefix="phasewatch-sensors-") as folder:
        factory = QemuFactory(options=RecordingOptions(cache=default_cache()), scratch=Path(folder), clock=clock)
        machine = factory(shape, 0, ())
        assert isinstance(machine, QemuVm)
        costs = asyncio.run(measure_costs(machine, clock))
    path = build_sensor_cost_path(Path(arguments[0]))
    atomic.write_atomic(path, msgspec.json.format(msgspec.json.encode(costs), indent=1) + b"\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
