"""The `proc` source: sums over threads, and threads or processes that end."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest
from tests.factories.proc import PID, SECOND, VCPU, WORKER, FakeProc

from phasewatch.channels import list_raw_fields
from phasewatch.errors import VmError
from phasewatch.telemetry.base import ReadingValues, build_missing_reading
from phasewatch.telemetry.proc import ProcSource
from phasewatch.telemetry.process import owns_threads, translate_threads
from phasewatch.telemetry.vcpu_threads import VcpuFinder, VcpuThreads
from phasewatch.types import SourceKind

FIELDS = [spec.field for spec in list_raw_fields(SourceKind.PROC)]


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


def reading(source: ProcSource) -> dict[str, int | float | None]:
    return named(asyncio.run(source.read()))


def named(values: ReadingValues) -> dict[str, int | float | None]:
    return dict(zip(FIELDS, values, strict=True))


def source_of(proc: FakeProc) -> ProcSource:
    return ProcSource(pid=PID, vcpu_tids=(VCPU,), proc=proc.root)


def test_times_are_in_nanoseconds_and_sizes_in_bytes(proc: FakeProc) -> None:
    found = reading(source_of(proc))

    tick_ns = 10**9 // os.sysconf("SC_CLK_TCK")
    assert (found["cpu_user_ns"], found["cpu_sys_ns"]) == (250 * tick_ns, 50 * tick_ns)
    assert (found["vcpu_run_ns"], found["vcpu_wait_ns"], found["main_run_ns"]) == (1000, 100, 5)
    assert (found["vcpu_vcs"], found["vcpu_ics"], found["main_vcs"]) == (VCPU, 2, PID)
    assert (found["rss_bytes"], found["rss_anon_bytes"], found["threads"]) == (300 * 1024, 200 * 1024, 3)
    assert (found["io_rchar_bytes"], found["io_write_bytes"]) == (77, 4096)


def test_an_ended_thread_stays_in_the_total(proc: FakeProc) -> None:
    source = source_of(proc)
    assert reading(source)["aux_run_ns"] == 40
    proc.thread(WORKER, 70)
    assert reading(source)["aux_run_ns"] == 70
    proc.end_thread(WORKER)

    assert reading(source)["aux_run_ns"] == 70


def test_a_new_thread_with_a_reused_id_starts_from_zero(proc: FakeProc) -> None:
    source = source_of(proc)
    reading(source)
    proc.end_thread(WORKER)
    reading(source)
    proc.thread(WORKER, 9)

    assert reading(source)["aux_run_ns"] == 49


def test_a_thread_that_was_unreadable_once_causes_no_burst(proc: FakeProc) -> None:
    source = source_of(proc)
    reading(source)
    schedstat = proc.dir / f"task/{WORKER}/schedstat"
    schedstat.rename(schedstat.with_name("away"))
    asyncio.run(source.close())
    assert reading(source)["aux_run_ns"] == 40
    proc.thread(WORKER, 45)

    assert reading(source)["aux_run_ns"] == 45


def test_one_thread_that_runs_all_vcpus_is_counted_once(proc: FakeProc) -> None:
    source = ProcSource(pid=PID, vcpu_tids=(VCPU, VCPU, VCPU, VCPU), proc=proc.root)

    found = reading(source)

    assert (found["vcpu_run_ns"], found["vcpu_wait_ns"], found["vcpu_vcs"]) == (1000, 100, VCPU)


def test_unplugging_a_vcpu_does_not_affect_the_others(proc: FakeProc) -> None:
    proc.thread(SECOND, 500)
    source = ProcSource(pid=PID, vcpu_tids=(VCPU, SECOND), proc=proc.root)
    assert reading(source)["vcpu_run_ns"] == 1500
    proc.end_thread(SECOND)
    proc.thread(VCPU, 1100)

    found = reading(source)

    assert found["vcpu_run_ns"] == 1600
    assert None not in found.values()


def test_without_vcpu_threads_only_their_fields_are_unknown(proc: FakeProc) -> None:
    source = source_of(proc)
    reading(source)
    proc.end_thread(VCPU)

    found = reading(source)

    assert [name for name, value in found.items() if value is None] == [
        "vcpu_run_ns",
        "vcpu_wait_ns",
        "vcpu_vcs",
        "vcpu_ics",
        "aux_run_ns",
    ]
    assert found["main_run_ns"] == 5


def test_a_plugged_in_vcpu_is_counted_from_then_on(proc: FakeProc) -> None:
    async def find() -> VcpuThreads:
        return VcpuThreads(tids=frozenset({VCPU, SECOND}), numbers=(0, 1))

    async def main() -> list[dict[str, int | float | None]]:
        finder = VcpuFinder(VcpuThreads(tids=frozenset({VCPU}), numbers=(0,)), find)
        source = ProcSource(pid=PID, vcpu_tids=(), proc=proc.root, vcpus=finder)
        found = [named(await source.read())]
        proc.thread(SECOND, 300)
        found.append(named(await source.read()))  # the thread is seen, and what it is is asked for
        await asyncio.sleep(0)
        proc.thread(SECOND, 350)
        found.append(named(await source.read()))
        assert len(source.pop_notes()) == 1
        await source.close()
        return found

    rows = asyncio.run(main())

    assert [row["vcpu_run_ns"] for row in rows] == [1000, 1000, 1050]
    assert [row["vcpu_vcs"] for row in rows] == [VCPU] * 3
    assert [row["aux_run_ns"] for row in rows] == [40, 340, 340]


@pytest.mark.parametrize("error", [VmError("silent"), OSError(5, "x"), KeyError("thread-id")])
def test_a_failed_vcpu_lookup_is_repeated_but_not_at_every_reading(proc: FakeProc, error: Exception) -> None:
    asked: list[int] = []

    async def find() -> VcpuThreads:
        asked.append(1)
        raise error

    async def main() -> None:
        source = ProcSource(
            pid=PID, vcpu_tids=(), proc=proc.root, vcpus=VcpuFinder(VcpuThreads(tids=frozenset({VCPU})), find)
        )
        await source.read()
        proc.thread(SECOND, 1)
        for _ in range(9):
            assert named(await source.read())["vcpu_run_ns"] == 1000
            await asyncio.sleep(0)
        await source.close()

    asyncio.run(main())

    assert len(asked) == 3


def test_thread_ids_of_another_namespace_are_translated(proc: FakeProc) -> None:
    for tid, inner in ((PID, 1), (VCPU, 7), (WORKER, 101)):
        proc.write(f"task/{tid}/status", f"Name:\tqemu\nNSpid:\t{tid}\t{inner}\n")

    assert translate_threads(PID, (7, 7), proc.root) == (VCPU, VCPU)
    assert translate_threads(PID, (101,), proc.root) == (WORKER,)  # not the thread that has this number here
    assert translate_threads(PID, (4711,), proc.root) == ()


def test_thread_ids_without_namespaces_stay_the_same(proc: FakeProc) -> None:
    assert translate_threads(PID, (VCPU, 4711), proc.root) == (VCPU,)
    assert translate_threads(4711, (VCPU,), proc.root) == ()
    assert owns_threads(PID, (VCPU, WORKER), proc.root)
    assert not owns_threads(PID, (VCPU, 4711), proc.root)


def test_eventfd_notifications_do_not_count_as_written_bytes(proc: FakeProc) -> None:
    source = source_of(proc)
    assert reading(source)["io_wchar_net_bytes"] == 0
    proc.io(wchar=1000 + 8 * 5, syscw=15)
    assert reading(source)["io_wchar_net_bytes"] == 0
    proc.io(wchar=1000 + 8 * 5 + 500, syscw=16)
    assert reading(source)["io_wchar_net_bytes"] == 492
    proc.io(wchar=1000 + 8 * 5 + 504, syscw=20)

    assert reading(source)["io_wchar_net_bytes"] == 492


def test_a_process_that_is_gone_gives_none(proc: FakeProc) -> None:
    source = source_of(proc)
    reading(source)
    proc.end_thread(VCPU)
    proc.write("status", "")

    assert asyncio.run(source.read()) == build_missing_reading(SourceKind.PROC)


def test_an_unreadable_file_costs_only_its_own_fields(proc: FakeProc) -> None:
    source = source_of(proc)
    reading(source)
    proc.write("io", "")

    found = reading(source)

    assert [name for name, value in found.items() if value is None] == [
        "io_rchar_bytes",
        "io_wchar_net_bytes",
        "io_write_bytes",
    ]


def test_opening_a_missing_process_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        asyncio.run(ProcSource(pid=PID, vcpu_tids=(), proc=tmp_path).open())


def test_the_own_process_can_be_read_and_no_file_stays_open() -> None:
    source = ProcSource(pid=os.getpid(), vcpu_tids=(threading.get_native_id(),))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    found = [reading(source) for _ in range(3)]
    asyncio.run(source.close())

    assert all(value is not None for row in found for value in row.values())
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
