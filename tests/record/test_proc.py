"""The `proc` source: what is summed, what is unwrapped, and what happens when a thread or the process goes."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from phasewatch.channels import raw_fields
from phasewatch.record.base import Values, nothing_of
from phasewatch.record.proc import ProcSource
from phasewatch.vocab import Source

FIELDS = [spec.field for spec in raw_fields(Source.PROC)]
PID, VCPU, WORKER = 100, 101, 102


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


def named(values: Values) -> dict[str, int | float | None]:
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

    assert asyncio.run(source.read()) == nothing_of(Source.PROC)


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
