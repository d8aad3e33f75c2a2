"""Read the CPU, memory and I/O counters of a QEMU process from /proc: the `proc` source.

Kernel counters (see proc(5)):

- ``/proc/PID/stat``: utime and stime (fields 14 and 15, clock ticks) of the whole process.
- ``/proc/PID/task/TID/schedstat``: run time and run-queue wait (ns) of each thread.
- ``/proc/PID/task/TID/status``: voluntary and involuntary context switches of each vCPU and of the main thread.
- ``/proc/PID/status``: RssAnon, VmRSS (KiB), Threads. ``/proc/PID/io``: rchar, wchar, syscw, write_bytes.

``/proc/PID/schedstat`` covers the main thread only, and utime disagreed with schedstat under a nested hypervisor, so
run times come from each thread's own schedstat. Threads come and go, vCPUs as well: the growth of each thread's
counters between two readings is added to the sum of its kind (vCPU or other).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from phasewatch.telemetry.base import ReadingValues, build_missing_reading
from phasewatch.telemetry.process import PROC_ROOT
from phasewatch.telemetry.vcpu_threads import VcpuFinder, VcpuThreads
from phasewatch.types import SourceKind

__all__ = ["ProcSource"]

_KIB = 1024
_KICK_BYTES = 8  # an eventfd notification writes 8 bytes; polling the monitor causes most of them


@dataclass(frozen=True, slots=True)
class _ThreadReading:
    """Counters of one thread: run and wait time (ns), voluntary and involuntary switches; only run time if no vCPU."""

    run_ns: int
    wait_ns: int = 0
    vcs: int = 0
    ics: int = 0
    is_vcpu: bool = False

    @property
    def counters(self) -> tuple[int, int, int, int]:
        return self.run_ns, self.wait_ns, self.vcs, self.ics


class ProcSource:
    """Reads /proc of one QEMU process; files stay open, so that a reading costs a handful of `pread` calls.

    An open /proc file stays bound to its process: reading it fails once the process is gone, even if the pid is reused.

    Args:
        pid: The QEMU process; its main thread has the same id.
        vcpu_tids: Its vCPU threads, from QMP `query-cpus-fast`; several vCPUs may share one thread.
        proc: Path of /proc.
        vcpus: Looks the vCPU threads up again when the threads change; None if they never change.
    """

    source = SourceKind.PROC

    def __init__(
        self, *, pid: int, vcpu_tids: tuple[int, ...], proc: Path = PROC_ROOT, vcpus: VcpuFinder | None = None
    ) -> None:
        self._dir = proc / str(pid)
        self._task_dir = str(self._dir / "task")
        self._pid = pid
        self._vcpus = vcpus or VcpuFinder(VcpuThreads(tids=frozenset(vcpu_tids)))
        self._fds: dict[str, int] = {}
        self._threads: dict[int, _ThreadReading] = {}
        self._vcpu_total = (0, 0, 0, 0)
        self._aux_total_ns = 0
        self._written: tuple[int, int] | None = None
        self._wchar_net = 0
        self._tick_ns = 1_000_000_000 // os.sysconf("SC_CLK_TCK")

    async def open(self) -> None:
        """Open the process's files.

        Raises:
            OSError: If the process does not exist or may not be read.
        """
        for name in ("stat", "status"):
            self._file(name)
        with suppress(PermissionError):  # only QEMU's user and root may read it; its fields are then None
            self._file("io")

    async def close(self) -> None:
        """Close every file."""
        await self._vcpus.close()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    async def read(self) -> ReadingValues:
        """Return one reading; None for every field if the process is gone."""
        try:
            return self._read()
        except (OSError, ValueError, KeyError, IndexError):
            return build_missing_reading(self.source)

    def pop_notes(self) -> list[str]:
        """Return and clear the messages since the last call."""
        return self._vcpus.pop_notes()

    def _read(self) -> ReadingValues:
        # The command name may contain spaces and brackets: fields are counted behind the last bracket.
        stat = self._bytes("stat").rpartition(b")")[2].split()
        status = b"\n" + self._bytes("status")
        n_threads = _find_number(status, b"\nThreads:")
        tids = self._list_threads()
        has_vcpu = self._count_threads(tids)
        self._vcpus.update_threads(tids)
        return (
            int(stat[11]) * self._tick_ns,
            int(stat[12]) * self._tick_ns,
            *(self._vcpu_total if has_vcpu else (None,) * 4),
            *_read_or_none(lambda: (self._schedstat(self._pid)[0], self._switches(self._pid)[0]), 2),
            self._aux_total_ns if has_vcpu or not self._vcpus.current.tids else None,
            *_read_or_none(self._count_io, 3),
            _find_number(status, b"\nRssAnon:") * _KIB,
            _find_number(status, b"\nVmRSS:") * _KIB,
            n_threads,
        )

    def _count_threads(self, tids: list[int]) -> bool:
        """Add the growth of each thread's counters to the sum of its kind; return whether a vCPU is among the threads.

        A thread's counters vanish with it. A listed thread that cannot be read keeps its last reading.
        """
        before, has_vcpu = self._threads, False
        self._threads = {}
        for tid in tids:
            is_vcpu = tid in self._vcpus.current.tids
            if tid == self._pid and not is_vcpu:
                continue
            then, now = before.get(tid), self._read_thread(tid, is_vcpu=is_vcpu)
            if now is None:
                if then is not None:
                    self._threads[tid] = then
                continue
            self._threads[tid] = now
            has_vcpu |= is_vcpu
            run_ns = _compute_growth(then.run_ns if then else 0, now.run_ns)
            if not is_vcpu:
                self._aux_total_ns += run_ns
                continue
            others: tuple[int, ...] = now.counters[1:]
            if then is not None:  # a thread that was not known as a vCPU has shown its run time only
                others = tuple(
                    _compute_growth(b, a) if then.is_vcpu else 0 for b, a in zip(then.counters[1:], others, strict=True)
                )
            grown = zip(self._vcpu_total, (run_ns, *others), strict=True)
            self._vcpu_total = tuple(total + more for total, more in grown)  # type: ignore[assignment]
        for tid in before.keys() - self._threads.keys():
            self._forget(tid)
        return has_vcpu

    def _read_thread(self, tid: int, *, is_vcpu: bool) -> _ThreadReading | None:
        """Return the counters of one thread; None if it is gone. Files of a former thread of that id are reopened."""
        for _ in range(2):
            try:
                run_ns, wait_ns = self._schedstat(tid)
                if not is_vcpu:
                    return _ThreadReading(run_ns)
                return _ThreadReading(run_ns, wait_ns, *self._switches(tid), is_vcpu=True)
            except (OSError, ValueError, KeyError, IndexError):
                self._forget(tid)
        return None

    def _count_io(self) -> tuple[int, int, int]:
        """Return rchar, wchar without event notifications, and write_bytes (bytes sent to the storage layer)."""
        io = b"\n" + self._bytes("io")
        wchar, syscw = _find_number(io, b"\nwchar:"), _find_number(io, b"\nsyscw:")
        if self._written is not None:
            self._wchar_net += max(0, wchar - self._written[0] - _KICK_BYTES * (syscw - self._written[1]))
        self._written = wchar, syscw
        return _find_number(io, b"\nrchar:"), self._wchar_net, _find_number(io, b"\nwrite_bytes:")

    def _schedstat(self, tid: int) -> tuple[int, int]:
        run, waited, _ = self._bytes(f"task/{tid}/schedstat").split()
        return int(run), int(waited)

    def _switches(self, tid: int) -> tuple[int, int]:
        status = b"\n" + self._bytes(f"task/{tid}/status")
        return _find_number(status, b"\nvoluntary_ctxt_switches:"), _find_number(
            status, b"\nnonvoluntary_ctxt_switches:"
        )

    def _list_threads(self) -> list[int]:
        return [int(name) for name in os.listdir(self._task_dir)]  # noqa: PTH208 - a path object for each costs more

    def _bytes(self, name: str) -> bytes:
        fd = self._fds.get(name)
        return os.pread(self._file(name) if fd is None else fd, 8192, 0)

    def _file(self, name: str) -> int:
        if name not in self._fds:
            self._fds[name] = os.open(self._dir / name, os.O_RDONLY | os.O_CLOEXEC)
        return self._fds[name]

    def _forget(self, tid: int) -> None:
        for name in ("schedstat", "status"):
            fd = self._fds.pop(f"task/{tid}/{name}", None)
            if fd is not None:
                os.close(fd)


def _read_or_none(read: Callable[[], tuple[int, ...]], width: int) -> tuple[int | None, ...]:
    """Return the values of one file; None for each of them if this file alone cannot be read."""
    try:
        return read()
    except (OSError, ValueError, KeyError, IndexError):
        return (None,) * width


def _find_number(text: bytes, key: bytes) -> int:
    """Return the number behind a key such as ``\\nVmRSS:``, with or without a unit.

    Raises:
        ValueError, IndexError: If there is none.
    """
    at = text.index(key) + len(key)
    end = text.find(b"\n", at)
    return int(text[at : end if end >= 0 else len(text)].split(maxsplit=1)[0])


def _compute_growth(before: int, now: int) -> int:
    """Return the growth of a thread's counter; a lower value belongs to a new thread with the same id."""
    return now - before if now >= before else now
