"""The `qmp` source: parsing of the monitor's texts, counters that wrap, and questions that fail."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.record.fakes import FakeClock

from phasewatch.channels import raw_fields
from phasewatch.errors import VmError
from phasewatch.record.base import nothing_of
from phasewatch.record.qmp import Monitor, QmpSource, parse_jit, parse_registers
from phasewatch.vocab import Source

FIELDS = [spec.field for spec in raw_fields(Source.QMP)]
JIT = """Translation buffer state:
gen code size       53346515/1073740800
TB count            96604
TB avg target size  17 max=1926 bytes
Statistics:
TB flush count      0
TB invalidate count 9061
TLB full flushes    0
TLB partial flushes 38335
TLB elided flushes  9100
"""
RUNS_IN_USER_MODE = "EIP=0040 EFL=00000246 [---Z-P-] CPL=3 II=0 A20=1 SMM=0 HLT=0"
HALTED = "EIP=0040 EFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1"
ARM = " PC=ffff800008c0 X00=0000\nPSTATE=60400005 -ZC- EL1h"


class FakeMonitor(Monitor):
    """Answers from a script; a command that is not in it is refused."""

    def __init__(self) -> None:
        super().__init__(Path("fake"))
        self.used = {0: 10, 1: 65_530}
        self.registers = [RUNS_IN_USER_MODE]
        self.asked: list[int] = []
        self.update = 1
        self.stats = {"stat-minor-faults": 7, "stat-free-memory": 8, "stat-disk-caches": 9}
        self.refused: set[str] = set()

    async def ask(self, command: str, **arguments: object) -> Any:
        if command in self.refused:
            raise VmError(f"{command}: refused")
        match command:
            case "query-blockstats":
                stats = dict.fromkeys(("rd_bytes", "wr_bytes", "rd_operations", "wr_operations", "flush_operations"), 3)
                disk = {"qdev": "blk0", "stats": stats | {"wr_total_time_ns": 4, "wr_highest_offset": 5}}
                return [disk, {"qdev": "", "device": "", "stats": {}}]
            case "x-query-virtio":
                return [{"name": "virtio-net", "path": "/n"}, {"name": "virtio-blk", "path": "/b"}]
            case "x-query-virtio-queue-status":
                number = arguments["queue"]
                if number not in self.used:
                    raise VmError("invalid queue")
                return {"used-idx": self.used[number]}  # type: ignore[index]
            case "x-query-jit":
                return {"human-readable-text": JIT}
            case "qom-set":
                return {}
            case "qom-get":
                return {"last-update": self.update, "stats": self.stats}
            case "human-monitor-command":
                self.asked.append(arguments["cpu-index"])  # type: ignore[arg-type]
                return self.registers[len(self.asked) % len(self.registers)]
        raise VmError(f"{command}: unknown")


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


def test_jit_text_of_another_version_gives_nothing_rather_than_something_wrong() -> None:
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
def test_registers_say_whether_a_vcpu_runs_and_where(text: str, expected: tuple[bool, bool] | None) -> None:
    assert parse_registers(text) == expected


def test_queue_counters_are_unwrapped_and_summed() -> None:
    monitor = FakeMonitor()

    rows = read_twice(monitor, change=lambda: monitor.used.update({0: 13, 1: 4}))

    assert [row["vq_blk"] for row in rows] == [0, 3 + 10]


def test_a_share_needs_three_register_samples() -> None:
    assert [row["vcpu_busy"] for row in read_twice(FakeMonitor(), gap_s=0.25)] == [None, None]


def test_shares_are_those_of_the_samples_since_the_last_reading() -> None:
    monitor = FakeMonitor()
    monitor.registers = [RUNS_IN_USER_MODE, HALTED]

    rows = read_twice(monitor, gap_s=0.41)

    assert [(row["vcpu_busy"], row["vcpu_user"]) for row in rows] == [(0.5, 0.5), (0.5, 0.5)]


def test_vcpus_take_turns_so_that_our_polling_does_not_grow_with_them() -> None:
    monitor = FakeMonitor()

    read_twice(monitor, vcpus=2)

    assert monitor.asked[1:7] == [0, 1, 0, 1, 0, 1]


def test_aarch64_is_not_sampled_at_all() -> None:
    monitor = FakeMonitor()
    monitor.registers = [ARM]

    rows = read_twice(monitor)

    assert [row["vcpu_busy"] for row in rows] == [None, None]
    assert len(monitor.asked) == 1


def test_where_registers_tell_nothing_they_are_not_read_at_all() -> None:
    monitor = FakeMonitor()

    rows = read_twice(monitor, registers=False)

    assert [(row["vcpu_busy"], row["vcpu_user"]) for row in rows] == [(None, None), (None, None)]
    assert monitor.asked == []


def test_a_balloon_report_counts_once() -> None:
    rows = read_twice(FakeMonitor())

    assert [row["bal_free_bytes"] for row in rows] == [8, None]


def test_a_number_that_the_guest_made_up_beyond_64_bits_is_no_reading() -> None:
    monitor = FakeMonitor()
    monitor.stats["stat-free-memory"] = 2**64 - 1

    assert read_twice(monitor)[0]["bal_free_bytes"] is None


def test_a_question_that_fails_costs_its_own_fields_only() -> None:
    monitor = FakeMonitor()
    monitor.refused = {"x-query-jit", "qom-set"}

    row = read_twice(monitor)[0]

    assert (row["jit_tb"], row["jit_tlb_partial"], row["bal_free_bytes"]) == (None, None, None)
    assert (row["blk_rd_bytes"], row["blk_wr_ns"], row["wr_highest_bytes"]) == (3, 4, 5)


def test_a_silent_monitor_reads_as_nothing() -> None:
    monitor = FakeMonitor()
    monitor.refused = {"query-blockstats"}

    assert tuple(read_twice(monitor)[0].values()) == nothing_of(Source.QMP)


def test_a_monitor_that_nobody_serves_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(VmError, match="one QMP socket serves one client"):
        asyncio.run(Monitor(tmp_path / "none.sock", timeout_s=0.5).connect())
