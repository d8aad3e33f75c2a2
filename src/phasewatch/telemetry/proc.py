"""What the QEMU process costs, from /proc: the `proc` source.

`/proc/P/schedstat` is the main thread's alone and `utime` was seen to disagree with schedstat under a nested
hypervisor, so run times come from each thread's own schedstat. Threads come and go, vCPUs too: what each of them ran
between two readings is added to the sum of its kind.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phasewatch.telemetry.base import ReadingValues, build_missing_reading
from phasewatch.telemetry.threads import VcpuFinder, VcpuThreads
from phasewatch.types import SourceKind

_SWITCHES = re.compile(rb"^(voluntary|nonvoluntary)_ctxt_switches:\s+(\d+)", re.MULTILINE)
_STATUS = re.compile(rb"^(RssAnon|VmRSS|Threads):\s+(\d+)", re.MULTILINE)
_IO = re.compile(rb"^(rchar|wchar|syscw|write_bytes): (\d+)", re.MULTILINE)
_KIB = 1024
_KICK_BYTES = 8  # an eventfd kick writes 8 bytes; our own polling causes most of them


@dataclass(frozen=True, slots=True)
class _ThreadReading:
    """What one thread's counters showed: run and wait in ns, switches; those of other threads than vCPUs are 0."""

    run_ns: int
    wait_ns: int = 0
    vcs: int = 0
    ics: int = 0
    is_vcpu: bool = False

    @property
    def counters(self) -> tuple[int, int, int, int]:
        return self.run_ns, self.wait_ns, self.vcs, self.ics


class ProcSource:
    """Reads /proc of one QEMU process; its files stay open, so that a reading is a handful of `pread`s.

    An open file belongs to its process for ever: when the process is gone, and its number is another's, it reads as
    nothing.

    Args:
        pid: The QEMU process, whose main thread has the same number.
        vcpu_tids: Its vCPU threads, from `query-cpus-fast`; several vCPUs may share one.
        proc: Where /proc is; tests hand in a made-up one.
        vcpus: Finds them again when the threads change; the threads never change their work if left out.
    """

    source = SourceKind.PROC

    def __init__(
        self, *, pid: int, vcpu_tids: tuple[int, ...], proc: Path = Path("/proc"), vcpus: VcpuFinder | None = None
    ) -> None:
        self._dir = proc / str(pid)
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
        """Open the process's own files; raises OSError if it is not there."""
        for name in ("stat", "status", "io"):
            self._file(name)

    async def close(self) -> None:
        """Close every file."""
        await self._vcpus.close()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    async def read(self) -> ReadingValues:
        """Take one reading; None-filled when the process is gone."""
        try:
            return self._read()
        except (OSError, ValueError, KeyError, IndexError):
            return build_missing_reading(self.source)

    def pop_notes(self) -> list[str]:
        """Return what people must know since the last call."""
        return self._vcpus.pop_notes()

    def _read(self) -> ReadingValues:
        # The command name may hold spaces and brackets: the fields count from the last bracket on.
        stat = self._bytes("stat").rpartition(b")")[2].split()
        status = {key: int(value) for key, value in _STATUS.findall(self._bytes("status"))}
        with os.scandir(self._dir / "task") as entries:
            tids = [int(entry.name) for entry in entries]
        has_vcpu = self._count_threads(tids)
        self._vcpus.update_threads(tids)
        return (
            int(stat[11]) * self._tick_ns,
            int(stat[12]) * self._tick_ns,
            *(self._vcpu_total if has_vcpu else (None,) * 4),
            *_read_or_none(lambda: (self._schedstat(self._pid)[0], self._switches(self._pid)[0]), 2),
            self._aux_total_ns if has_vcpu or not self._vcpus.current.tids else None,
            *_read_or_none(self._count_io, 3),
            status[b"RssAnon"] * _KIB,
            status[b"VmRSS"] * _KIB,
            status[b"Threads"],
        )

    def _count_threads(self, tids: list[int]) -> bool:
        """Add what each thread did since the last reading to the sum of its kind; return whether a vCPU is among them.

        A thread's counters vanish with it. One that could not be read keeps its last reading while it is listed.
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
            if then is not None:  # one that was not known for a vCPU has shown its run time only
                others = tuple(
                    _compute_growth(b, a) if then.is_vcpu else 0 for b, a in zip(then.counters[1:], others, strict=True)
                )
            grown = zip(self._vcpu_total, (run_ns, *others), strict=True)
            self._vcpu_total = tuple(total + more for total, more in grown)  # type: ignore[assignment]
        for tid in before.keys() - self._threads.keys():
            self._forget(tid)
        return has_vcpu

    def _read_thread(self, tid: int, *, is_vcpu: bool) -> _ThreadReading | None:
        """Read one thread; a file of a former thread of that number is opened anew, None if there is none now."""
        for _ in range(2):
            try:
                run_ns, wait_ns = self._schedstat(tid)
                if not is_vcpu:
                    return _ThreadReading(run_ns)
                return _ThreadReading(run_ns, wait_ns, *self._switches(tid), is_vcpu=True)
            except (OSError, ValueError, KeyError):
                self._forget(tid)
        return None

    def _count_io(self) -> tuple[int, int, int]:
        """Return bytes read, bytes written without event kicks, and bytes sent to the storage layer."""
        io = {key: int(value) for key, value in _IO.findall(self._bytes("io"))}
        wchar, syscw = io[b"wchar"], io[b"syscw"]
        if self._written is not None:
            self._wchar_net += max(0, wchar - self._written[0] - _KICK_BYTES * (syscw - self._written[1]))
        self._written = wchar, syscw
        return io[b"rchar"], self._wchar_net, io[b"write_bytes"]

    def _schedstat(self, tid: int) -> tuple[int, int]:
        run, waited, _ = self._bytes(f"task/{tid}/schedstat").split()
        return int(run), int(waited)

    def _switches(self, tid: int) -> tuple[int, int]:
        found = dict(_SWITCHES.findall(self._bytes(f"task/{tid}/status")))
        return int(found[b"voluntary"]), int(found[b"nonvoluntary"])

    def _bytes(self, name: str) -> bytes:
        return os.pread(self._file(name), 8192, 0)

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
    """Return what one file of the process shows; None for each value if it cannot be read while the others can."""
    try:
        return read()
    except (OSError, ValueError, KeyError):
        return (None,) * width


def _compute_growth(before: int, now: int) -> int:
    """Return how much a thread's counter grew; less than before is another thread with the same number."""
    return now - before if now >= before else now
