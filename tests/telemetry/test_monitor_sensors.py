"""Dirty bitmaps, page sampling and KVM's statistics, against a scripted monitor."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.factories.vms import FakeClock

from phasewatch.errors import VmError
from phasewatch.telemetry.monitor_queries import QueryRound
from phasewatch.telemetry.monitor_sensors import (
    MAX_DISK_BYTES,
    MAX_SAMPLED_MEMORY_BYTES,
    SENSOR_FIELDS,
    MonitorSensors,
    build_bitmap_names,
    list_bitmaps,
)

CLUSTER = 1 << 16
WRITTEN, READING = build_bitmap_names("pw")


class Script:
    """A monitor with disks whose clusters are written by `write`."""

    def __init__(self) -> None:
        self.disks = {"d0": 1 << 30}
        self.marks: dict[str, dict[str, set[int]]] = {}
        self.memory, self.status, self.rate = 1 << 28, "unstarted", 0
        self.vcpus: list[dict[str, Any]] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.refused: set[str] = set()

    def write(self, *clusters: int, disk: str = "d0") -> None:
        for marked in self.marks.get(disk, {}).values():
            marked.update(clusters)

    async def ask(self, command: str, **arguments: Any) -> Any:
        self.asked.append((command, arguments))
        if command in self.refused:
            raise VmError(f"{command}: refused")
        match command:
            case "query-block":
                return [
                    {"qdev": f"/{name}", "inserted": {"node-name": name, "ro": False, "image": {"virtual-size": size}}}
                    for name, size in self.disks.items()
                ] + [{"qdev": "/cd"}, {"qdev": "/rom", "inserted": {"node-name": "rom", "ro": True}}]
            case "query-named-block-nodes":
                return [
                    {
                        "node-name": name,
                        "dirty-bitmaps": [
                            {"name": n, "count": CLUSTER * len(m)} for n, m in self.marks.get(name, {}).items()
                        ],
                    }
                    for name in self.disks
                ]
            case "block-dirty-bitmap-add":
                assert arguments["granularity"] == CLUSTER
                assert arguments["persistent"] is False
                self.marks.setdefault(arguments["node"], {})[arguments["name"]] = set()
            case "block-dirty-bitmap-clear":
                self.marks[arguments["node"]][arguments["name"]].clear()
            case "block-dirty-bitmap-remove":
                del self.marks[arguments["node"]][arguments["name"]]
            case "query-memory-size-summary":
                return {"base-memory": self.memory}
            case "query-dirty-rate":
                return {"status": self.status, "dirty-rate": self.rate}
            case "calc-dirty-rate":
                self.status = "measuring"
            case "query-stats":
                return self.vcpus
            case _:
                raise VmError(f"{command}: unknown")
        return {}


class Watch:
    """Sensors on a scripted monitor, read round by round."""

    def __init__(self, script: Script) -> None:
        self.script, self.clock = script, FakeClock()
        self.sensors = MonitorSensors(clock=self.clock, bitmaps=(WRITTEN, READING))

    async def open(self) -> None:
        await self.sensors.open(self.script.ask)
        self.round = QueryRound(self.sensors.queries, self.clock)

    async def read(self) -> dict[str, int | None]:
        self.clock.now_ns += 500_000_000
        await self.round.ask()
        return dict(zip(SENSOR_FIELDS, self.sensors.pop_values(), strict=True))


def clusters(row: dict[str, int | None]) -> tuple[int | None, int | None]:
    return row["blk_clusters"], row["blk_rewritten"]


def test_fresh_and_rewritten_clusters_are_told_apart() -> None:
    script = Script()
    watch = Watch(script)

    async def work() -> None:
        await watch.open()
        script.write(1, 2, 3)
        assert clusters(await watch.read()) == (3, 0)
        script.write(2, 3, 4)
        assert clusters(await watch.read()) == (6, 2)
        assert clusters(await watch.read()) == (6, 2)

    asyncio.run(work())


def test_a_bitmap_that_could_not_be_cleared_counts_once() -> None:
    script = Script()
    watch = Watch(script)

    async def work() -> None:
        await watch.open()
        script.write(1, 2)
        script.refused.add("block-dirty-bitmap-clear")
        await watch.read()
        script.refused.clear()
        script.write(3)
        assert clusters(await watch.read()) == (3, 0)

    asyncio.run(work())


def test_a_plugged_in_disk_gets_bitmaps_and_one_that_goes_keeps_the_sum() -> None:
    script = Script()
    watch = Watch(script)

    async def work() -> None:
        await watch.open()
        script.write(1)
        await watch.read()
        script.disks = {"d1": 1 << 30}
        script.marks.clear()
        assert clusters(await watch.read()) == (None, None)
        await watch.read()
        script.write(7, disk="d1")
        assert clusters(await watch.read()) == (2, 0)

    asyncio.run(work())


def test_closing_removes_the_own_bitmaps_alone() -> None:
    script = Script()
    watch = Watch(script)

    async def work() -> None:
        await watch.open()
        script.marks["d0"]["backup"] = {1}
        await watch.sensors.close()
        assert await list_bitmaps(script.ask) == (("d0", "backup"),)

    asyncio.run(work())


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"disks": {"d0": MAX_DISK_BYTES + 1}}, "blk_clusters", "4 TiB"),
        ({"disks": {}}, "blk_rewritten", "no writable disk"),
        ({"memory": MAX_SAMPLED_MEMORY_BYTES + 1}, "mem_dirty_rate", "64 GiB"),
        ({"refused": {"query-dirty-rate"}}, "mem_dirty_rate", "refused"),
        ({}, "kvm_exits", "only KVM"),
    ],
)
def test_what_a_vm_does_not_have_is_missing_with_a_reason(change: dict[str, Any], field: str, reason: str) -> None:
    script = Script()
    for name, value in change.items():
        setattr(script, name, value)
    watch = Watch(script)

    asyncio.run(watch.open())

    assert reason in watch.sensors.missing[field]


def test_a_sampling_takes_its_time_and_its_result_is_repeated() -> None:
    script = Script()
    watch = Watch(script)
    rates: list[int | None] = []

    async def work() -> None:
        await watch.open()
        for status in ("unstarted", "measuring", "measured", "measuring", "measuring", "measuring", "measuring"):
            script.status, script.rate = status, 5
            rates.append((await watch.read())["mem_dirty_rate"])
        rates.append((await watch.read())["mem_dirty_rate"])

    asyncio.run(work())

    assert rates == [None, None, *[5 << 20] * 6]
    sampled = [arguments for command, arguments in script.asked if command == "calc-dirty-rate"]
    assert sampled == [{"calc-time": 1, "mode": "page-sampling", "sample-pages": 4096}] * 2


def test_a_failed_sampling_is_no_rate_and_the_next_one_is_read() -> None:
    script = Script()
    watch = Watch(script)
    rates: list[int | None] = []

    async def work() -> None:
        await watch.open()
        for rate in (0, -1, 7):  # QEMU reports -1 as measured if it could not sample the memory
            script.status, script.rate = "measured", rate
            rates.append((await watch.read())["mem_dirty_rate"])

    asyncio.run(work())

    assert rates == [None, None, 7 << 20]


def test_a_sampling_of_another_client_is_not_read() -> None:
    script = Script()
    script.status, script.rate = "measured", 9
    watch = Watch(script)

    async def work() -> None:
        await watch.open()
        assert (await watch.read())["mem_dirty_rate"] is None

    asyncio.run(work())


@pytest.mark.parametrize(("gib", "pages"), [(1, 1024), (4, 256), (32, 128)])
def test_large_guests_are_sampled_more_thinly(gib: int, pages: int) -> None:
    script = Script()
    script.memory = gib << 30
    watch = Watch(script)

    async def work() -> None:
        await watch.open()
        await watch.read()

    asyncio.run(work())

    assert script.asked[-1][1]["sample-pages"] == pages


def test_kvm_statistics_are_summed_over_vcpus_and_start_again_without_one() -> None:
    script = Script()
    watch = Watch(script)

    def vcpu(name: str, exits: int) -> dict[str, Any]:
        stats = [{"name": "exits", "value": exits}, {"name": "mmio_exits", "value": 1}, {"name": "x", "value": [1, 2]}]
        return {"provider": "kvm", "qom-path": name, "stats": stats}

    async def work() -> None:
        script.vcpus = [vcpu("/0", 10), vcpu("/1", 20)]
        await watch.open()
        first = await watch.read()
        script.vcpus = [vcpu("/0", 15), vcpu("/1", 20)]
        second = await watch.read()
        script.vcpus = [vcpu("/0", 16)]
        third = await watch.read()
        assert [row["kvm_exits"] for row in (first, second, third)] == [30, 35, 0]
        assert (first["kvm_io_exits"], first["kvm_halt_polls"]) == (2, None)

    asyncio.run(work())
