"""The `qmp` source: parsed texts, wrapping counters, and failing queries."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from tests.factories.monitors import JIT, RUNS_IN_USER_MODE, FakeMonitor
from tests.factories.vms import FakeClock

from phasewatch.binning.stream import StreamBinner
from phasewatch.channels import CHANNELS, list_raw_fields
from phasewatch.errors import VmError
from phasewatch.telemetry.base import build_missing_reading
from phasewatch.telemetry.qmp import JitUse, QmpMonitor, QmpSource, parse_jit, parse_registers
from phasewatch.types import SourceKind

FIELDS = [spec.field for spec in list_raw_fields(SourceKind.QMP)]
HALTED = "EIP=0040 EFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1"
ALL = {
    "query-blockstats",
    "x-query-virtio",
    "x-query-virtio-queue-status",
    "x-query-jit",
    "qom-get",
    "human-monitor-command",
}
ARM = " PC=ffff800008c0 X00=0000\nPSTATE=60400005 -ZC- EL1h"


def read_twice(
    monitor: FakeMonitor, *, change: Any = None, vcpus: int = 1, gap_s: float = 0.5, registers: bool = True
) -> list[dict[str, Any]]:
    clock = FakeClock()

    async def work() -> list[dict[str, Any]]:
        source = QmpSource(monitor=monitor, vcpus=vcpus, clock=clock, registers=registers)
        await source.open()
        rows = []
        for _ in range(2):
            await clock.sleep_until(clock.now_ns + round(gap_s * 1e9))
            rows.append(dict(zip(FIELDS, await source.read(), strict=True)))
            if change is not None:
                change()
        await source.close()
        return rows

    return clock.run(work())


def test_jit_text_gives_blocks_flushes_and_code_size() -> None:
    assert parse_jit(JIT) == (96_604, 38_335, 53_346_515)


def test_unknown_jit_text_gives_none() -> None:
    assert parse_jit("TB total 3") == (None, None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(RUNS_IN_USER_MODE, (True, True), id="runs in user mode"),
        pytest.param(RUNS_IN_USER_MODE.replace("CPL=3", "CPL=0"), (True, False), id="runs in the kernel"),
        pytest.param(HALTED, (False, False), id="halted"),
        pytest.param(ARM, None, id="aarch64 has no halt flag"),
    ],
)
def test_registers_show_whether_a_vcpu_runs_in_user_mode(text: str, expected: tuple[bool, bool] | None) -> None:
    assert parse_registers(text) == expected


def test_queue_counters_are_unwrapped_and_summed() -> None:
    monitor = FakeMonitor()

    rows = read_twice(monitor, change=lambda: monitor.used.update({0: 13, 1: 4}))

    assert [row["vq_blk"] for row in rows] == [0, 3 + 10]


def test_a_share_needs_three_register_samples() -> None:
    assert [row["vcpu_busy"] for row in read_twice(FakeMonitor(), gap_s=0.25)] == [None, None]


def test_shares_cover_the_samples_since_the_last_reading() -> None:
    monitor = FakeMonitor()
    monitor.registers = [RUNS_IN_USER_MODE, HALTED]

    rows = read_twice(monitor, gap_s=0.41)

    assert [(row["vcpu_busy"], row["vcpu_user"]) for row in rows] == [(0.5, 0.5), (0.5, 0.5)]


def test_register_samples_do_not_grow_with_the_number_of_vcpus() -> None:
    monitor = FakeMonitor()

    read_twice(monitor, vcpus=2)

    assert monitor.asked[1:7] == [0, 1, 0, 1, 0, 1]


def test_registers_of_aarch64_are_not_sampled() -> None:
    monitor = FakeMonitor()
    monitor.registers = [ARM]

    rows = read_twice(monitor)

    assert [row["vcpu_busy"] for row in rows] == [None, None]
    assert len(monitor.asked) == 1


def test_registers_can_be_turned_off() -> None:
    monitor = FakeMonitor()

    rows = read_twice(monitor, registers=False)

    assert [(row["vcpu_busy"], row["vcpu_user"]) for row in rows] == [(None, None), (None, None)]
    assert monitor.asked == []


def test_a_balloon_report_is_used_once() -> None:
    rows = read_twice(FakeMonitor())

    assert [row["bal_free_bytes"] for row in rows] == [8, None]


def test_a_balloon_number_beyond_int64_gives_none() -> None:
    monitor = FakeMonitor()
    monitor.stats["stat-free-memory"] = 2**64 - 1

    assert read_twice(monitor)[0]["bal_free_bytes"] is None


def test_a_failing_query_costs_only_its_own_fields() -> None:
    monitor = FakeMonitor()
    monitor.refused = {"x-query-jit", "qom-set"}

    row = read_twice(monitor)[0]

    assert (row["jit_tb"], row["jit_tlb_partial"], row["bal_free_bytes"]) == (None, None, None)
    assert (row["blk_rd_bytes"], row["blk_wr_ns"], row["wr_highest_bytes"]) == (3, 4, 5)


def test_refused_block_statistics_do_not_affect_other_queries() -> None:
    monitor = FakeMonitor()
    monitor.refused = {"query-blockstats"}

    row = read_twice(monitor)[0]

    assert (row["blk_rd_bytes"], row["wr_highest_bytes"]) == (None, None)
    assert (row["vq_blk"], row["jit_tb"], row["bal_free_bytes"]) == (0, 96_604, 8)


def test_a_silent_monitor_gives_none() -> None:
    monitor = FakeMonitor()

    rows = read_twice(monitor, change=lambda: monitor.refused.update(ALL), gap_s=0.2)

    assert tuple(rows[1].values()) == build_missing_reading(SourceKind.QMP)


def read_times(monitor: FakeMonitor, changes: list[Any], **options: Any) -> list[dict[str, Any]]:
    """Read once after each change, half a second apart."""
    clock = monitor.clock

    async def work() -> list[dict[str, Any]]:
        source = QmpSource(monitor=monitor, vcpus=1, clock=clock, registers=False, **options)
        await source.open()
        rows = []
        for change in changes:
            change()
            await clock.sleep_until(clock.now_ns + 500_000_000)
            rows.append(dict(zip(FIELDS, await source.read(), strict=True)))
        await source.close()
        return rows

    return clock.run(work())


def nothing() -> None:
    """Change nothing."""


def rates_of(values: list[int | None], field: str = "vq_blk") -> list[float | None]:
    """Compute the bins of one channel as the live binner does: one reading each half second, at 0.25 s of its bin."""
    grid = StreamBinner(0)
    at = FIELDS.index(field)
    place = [c.full_name for c in CHANNELS].index(f"qmp.{field}")
    for i, value in enumerate(values):
        t_ns = 250_000_000 + i * 500_000_000
        row = [None] * len(FIELDS)
        row[at] = value  # type: ignore[call-overload]
        grid.add(SourceKind.QMP, (t_ns, t_ns, i, *row))
    bins = list(grid.close_until(len(values) * 500_000_000 + 1_000_000_000))
    return [None if math.isnan(b.values[place]) else float(b.values[place]) for b in bins]


def test_a_reboot_causes_no_burst_of_disk_requests() -> None:
    monitor = FakeMonitor()

    def reboot() -> None:
        monitor.used.update({0: 0, 1: 0})
        monitor.events["RESET"] += 1

    def work() -> None:
        monitor.used.update({queue: used + 4 for queue, used in monitor.used.items()})

    rows = read_times(monitor, [nothing, work, reboot, work])

    assert rates_of([row["vq_blk"] for row in rows]) == [None, 16.0, None, 16.0]


@pytest.mark.parametrize("index", [0, 3, 60_000], ids=["zero", "less", "another driver's ring"])
def test_a_queue_reset_without_an_event_causes_no_burst(index: int) -> None:
    monitor = FakeMonitor()
    monitor.used = {0: 500}

    def set_back() -> None:
        monitor.used[0] = index

    rows = read_times(monitor, [nothing, lambda: monitor.used.update({0: 504}), set_back, nothing])

    assert rates_of([row["vq_blk"] for row in rows]) == [None, 8.0, None, 0.0]


def test_a_wrapped_index_counts_if_block_statistics_agree() -> None:
    monitor = FakeMonitor()
    monitor.used = {0: 60_000}

    def work() -> None:
        monitor.used[0] = (monitor.used[0] + 9000) % 65536
        monitor.operations += 9000

    rows = read_times(monitor, [nothing, work, work])

    assert [row["vq_blk"] for row in rows] == [0, 9000, 18_000]


def test_unplugging_a_disk_costs_one_interval() -> None:
    monitor = FakeMonitor()
    monitor.used = {0: 10, 1: 20}

    def unplug() -> None:
        del monitor.used[1]

    def work() -> None:
        monitor.used[0] += 4

    rows = read_times(monitor, [nothing, work, unplug, work, work])

    assert rates_of([row["vq_blk"] for row in rows]) == [None, 8.0, None, 8.0, 8.0]


def test_a_plugged_in_disk_is_counted_from_then_on() -> None:
    monitor = FakeMonitor()
    monitor.used = {0: 10}

    def plug() -> None:
        monitor.disks.append("blk1")
        monitor.used[1] = 40_000

    def work() -> None:
        monitor.used.update({queue: used + 2 for queue, used in monitor.used.items()})

    rows = read_times(monitor, [nothing, plug, nothing, work])

    assert [row["vq_blk"] for row in rows] == [0, 0, 0, 4]


def test_disks_that_come_or_go_cause_no_burst_of_block_statistics() -> None:
    monitor = FakeMonitor()
    monitor.disks = ["blk0", "blk1"]
    monitor.operations = 1000

    def work() -> None:
        monitor.operations += 5

    rows = read_times(
        monitor, [nothing, work, monitor.disks.pop, work, lambda: monitor.disks.append("blk9"), nothing, work]
    )

    read = [row["blk_rd_ops"] for row in rows]
    assert rates_of(read, "blk_rd_ops") == [None, 20.0, None, 10.0, 0.0, 0.0, 20.0]


def test_no_balloon_rate_spans_a_reboot() -> None:
    monitor = FakeMonitor()

    def report() -> None:
        monitor.update += 1

    def reboot() -> None:
        monitor.events["RESET"] += 1
        monitor.update += 1

    rows = read_times(monitor, [nothing, report, reboot, *[report] * 8])

    given = [row["bal_free_bytes"] for row in rows]
    assert given[:2] == [8, 8]
    gap = given[2:].index(8)
    assert given[2 : 2 + gap] == [None] * gap
    assert (gap + 1) * 0.5 > 2.5  # longer than any rate reaches


def test_translation_counters_can_be_turned_off() -> None:
    monitor = FakeMonitor()

    rows = read_times(monitor, [nothing], jit=JitUse.NEVER)

    assert rows[0]["jit_tb"] is None
    assert "x-query-jit" not in monitor.commands


@pytest.mark.parametrize(("takes_ms", "is_asked"), [(1, True), (9, False)])
def test_translation_counters_are_read_only_while_fast(takes_ms: int, is_asked: bool) -> None:
    monitor = FakeMonitor()
    monitor.jit_takes_ms = takes_ms

    rows = read_times(monitor, [nothing] * 3, jit=JitUse.WHILE_FAST)

    assert [row["jit_tb"] is not None for row in rows] == [is_asked] * 3
    assert (monitor.commands.count("x-query-jit") == 6) == is_asked


def test_registers_are_sampled_from_the_present_vcpus() -> None:
    monitor = FakeMonitor()
    clock = FakeClock()

    async def work() -> None:
        source = QmpSource(monitor=monitor, vcpus=2, clock=clock)
        await source.open()
        source.vcpu_numbers = lambda: (0, 3)
        await clock.sleep_until(clock.now_ns + 1_000_000_000)
        await source.close()

    clock.run(work())

    assert set(monitor.asked[2:]) == {0, 3}


def test_connecting_to_a_missing_monitor_raises_vm_error(tmp_path: Path) -> None:
    with pytest.raises(VmError, match="No such file"):
        asyncio.run(QmpMonitor(tmp_path / "none.sock", timeout_s=0.5).connect())
