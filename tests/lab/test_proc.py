"""The `proc` source: what is summed, what is unwrapped, and what happens when a thread or the process goes."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from phasewatch.channels import list_raw_fields
from phasewatch.errors import VmError
from phasewatch.telemetry.base import ReadingValues, build_missing_reading
from phasewatch.telemetry.proc import ProcSource
from phasewatch.telemetry.threads import VcpuFinder, VcpuThreads, map_threads
from phasewatch.types import SourceKind

FIELDS = [spec.field for spec in list_raw_fields(SourceKind.PROC)]
PID, VCPU, WORKER, SECOND = 100, 101, 102, 103


class MadeUpProc:
    """A /proc with one process: main thread, one vCPU, one worker."""

    def __init__(self, root: Path) -> None:
        self.root, self.dir = root, root / str(PID)
        stat = f"{PID} (CPU 0) TCG) S " + " ".join(["0"] * 10) + " 250 50 " + " ".join(["0"] * 30)
        self.write("stat", stat)
        self.write("status", "Name:\tqemu\nVmRSS:\t 300 kB\nRssAnon:\t 200 kB\nThreads:\t3\n")
        self.io(wchar=1000, syscw=10)
        for tid, run_ns in ((PID, 5), (VCPU, 1000), (WORKER, 40)):
            self.thread(tid, run_ns)

    def write(self, name: str, text: str) -> None:
        path = self.dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def io(self, *, wchar: int, syscw: int) -> None:
        self.write("io", f"rchar: 77\nwchar: {wchar}\nsyscr: 1\nsyscw: {syscw}\nread_bytes: 1\nwrite_bytes: 4096\n")

    def thread(self, tid: int, run_ns: int) -> None:
        self.write(f"task/{tid}/schedstat", f"{run_ns} {run_ns // 10} 3\n")
        self.write(f"task/{tid}/status", f"voluntary_ctxt_switches:\t{tid}\nnonvoluntary_ctxt_switches:\t2\n")

    def end_thread(self, tid: int) -> None:
        for name in ("schedstat", "status"):
            (self.dir / f"task/{tid}/{name}").unlink()
        (self.dir / f"task/{tid}").rmdir()


@pytest.fixture
def proc(tmp_path: Path) -> MadeUpProc:
    return MadeUpProc(tmp_path)


def reading(source: ProcSource) -> dict[str, int | float | None]:
    return named(asyncio.run(source.read()))


def named(values: ReadingValues) -> dict[str, int | float | None]:
    return dict(zip(FIELDS, values, strict=True))


def source_of(proc: MadeUpProc) -> ProcSource:
    return ProcSource(pid=PID, vcpu_tids=(VCPU,), proc=proc.root)


def test_times_are_in_nanoseconds_and_sizes_in_bytes(proc: MadeUpProc) -> None:
    found = reading(source_of(proc))

    tick_ns = 10**9 // os.sysconf("SC_CLK_TCK")
    assert (found["cpu_user_ns"], found["cpu_sys_ns"]) == (250 * tick_ns, 50 * tick_ns)
    assert (found["vcpu_run_ns"], found["vcpu_wait_ns"], found["main_run_ns"]) == (1000, 100, 5)
    assert (found["vcpu_vcs"], found["vcpu_ics"], found["main_vcs"]) == (VCPU, 2, PID)
    assert (found["rss_bytes"], found["rss_anon_bytes"], found["threads"]) == (300 * 1024, 200 * 1024, 3)
    assert (found["io_rchar_bytes"], found["io_write_bytes"]) == (77, 4096)


def test_a_worker_that_ends_takes_nothing_from_the_total(proc: MadeUpProc) -> None:
    source = source_of(proc)
    assert reading(source)["aux_run_ns"] == 40
    proc.thread(WORKER, 70)
    assert reading(source)["aux_run_ns"] == 70
    proc.end_thread(WORKER)

    assert reading(source)["aux_run_ns"] == 70


def test_a_worker_that_inherits_a_number_starts_from_nothing(proc: MadeUpProc) -> None:
    source = source_of(proc)
    reading(source)
    proc.end_thread(WORKER)
    reading(source)
    proc.thread(WORKER, 9)

    assert reading(source)["aux_run_ns"] == 49


def test_a_worker_that_could_not_be_read_once_brings_no_burst(proc: MadeUpProc) -> None:
    source = source_of(proc)
    reading(source)
    schedstat = proc.dir / f"task/{WORKER}/schedstat"
    schedstat.rename(schedstat.with_name("away"))
    asyncio.run(source.close())
    assert reading(source)["aux_run_ns"] == 40
    proc.thread(WORKER, 45)

    assert reading(source)["aux_run_ns"] == 45


def test_one_thread_that_runs_all_vcpus_is_counted_once(proc: MadeUpProc) -> None:
    source = ProcSource(pid=PID, vcpu_tids=(VCPU, VCPU, VCPU, VCPU), proc=proc.root)

    found = reading(source)

    assert (found["vcpu_run_ns"], found["vcpu_wait_ns"], found["vcpu_vcs"]) == (1000, 100, VCPU)


def test_a_vcpu_that_is_taken_out_costs_the_others_nothing(proc: MadeUpProc) -> None:
    proc.thread(SECOND, 500)
    source = ProcSource(pid=PID, vcpu_tids=(VCPU, SECOND), proc=proc.root)
    assert reading(source)["vcpu_run_ns"] == 1500
    proc.end_thread(SECOND)
    proc.thread(VCPU, 1100)

    found = reading(source)

    assert found["vcpu_run_ns"] == 1600
    assert None not in found.values()


def test_when_no_vcpu_is_left_its_fields_are_unknown_and_the_rest_is_read(proc: MadeUpProc) -> None:
    source = source_of(proc)
    reading(source)
    proc.end_thread(VCPU)

    found = reading(source)

    assert [name for name, value in found.items() if value is None] == [
        "vcpu_run_ns", "vcpu_wait_ns", "vcpu_vcs", "vcpu_ics", "aux_run_ns",
    ]  # fmt: skip
    assert found["main_run_ns"] == 5


def test_a_vcpu_that_is_plugged_in_is_found_and_counted_from_then_on(proc: MadeUpProc) -> None:
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
def test_vcpus_that_cannot_be_asked_for_are_asked_for_again_and_not_at_every_reading(
    proc: MadeUpProc, error: Exception
) -> None:
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


def test_threads_of_another_namespace_are_found_by_the_numbers_that_it_gives_them(proc: MadeUpProc) -> None:
    for tid, inner in ((PID, 1), (VCPU, 7), (WORKER, 101)):
        proc.write(f"task/{tid}/status", f"Name:\tqemu\nNSpid:\t{tid}\t{inner}\n")

    assert map_threads(PID, (7,), proc.root) == {VCPU}
    assert map_threads(PID, (101,), proc.root) == {WORKER}  # not the thread that has this number here
    assert map_threads(PID, (4711,), proc.root) == set()


def test_threads_of_a_kernel_without_namespaces_have_the_numbers_that_they_have(proc: MadeUpProc) -> None:
    assert map_threads(PID, (VCPU, 4711), proc.root) == {VCPU}
    assert map_threads(4711, (VCPU,), proc.root) == set()


def test_event_kicks_are_no_writing(proc: MadeUpProc) -> None:
    source = source_of(proc)
    assert reading(source)["io_wchar_net_bytes"] == 0
    proc.io(wchar=1000 + 8 * 5, syscw=15)
    assert reading(source)["io_wchar_net_bytes"] == 0
    proc.io(wchar=1000 + 8 * 5 + 500, syscw=16)
    assert reading(source)["io_wchar_net_bytes"] == 492
    proc.io(wchar=1000 + 8 * 5 + 504, syscw=20)

    assert reading(source)["io_wchar_net_bytes"] == 492


def test_a_process_that_is_gone_reads_as_nothing(proc: MadeUpProc) -> None:
    source = source_of(proc)
    reading(source)
    proc.end_thread(VCPU)
    proc.write("status", "")

    assert asyncio.run(source.read()) == build_missing_reading(SourceKind.PROC)


def test_one_file_that_cannot_be_read_costs_its_own_fields(proc: MadeUpProc) -> None:
    source = source_of(proc)
    reading(source)
    proc.write("io", "")

    found = reading(source)

    assert [name for name, value in found.items() if value is None] == [
        "io_rchar_bytes", "io_wchar_net_bytes", "io_write_bytes",
    ]  # fmt: skip


def test_opening_a_process_that_is_not_there_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        asyncio.run(ProcSource(pid=PID, vcpu_tids=(), proc=tmp_path).open())


def test_this_very_process_can_be_read_and_leaves_no_file_open() -> None:
    source = ProcSource(pid=os.getpid(), vcpu_tids=(threading.get_native_id(),))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    found = [reading(source) for _ in range(3)]
    asyncio.run(source.close())

    assert all(value is not None for row in found for value in row.values())
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
