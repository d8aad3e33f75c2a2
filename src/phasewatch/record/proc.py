"""What the QEMU process costs, from /proc: the `proc` source.

`/proc/P/schedstat` is the main thread's alone and `utime` was seen to disagree with schedstat under a nested
hypervisor, so run times come from each thread's own schedstat.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from phasewatch.record.base import Values, nothing_of
from phasewatch.vocab import Source

_SWITCHES = re.compile(rb"^(voluntary|nonvoluntary)_ctxt_switches:\s+(\d+)", re.MULTILINE)
_STATUS = re.compile(rb"^(RssAnon|VmRSS|Threads):\s+(\d+)", re.MULTILINE)
_IO = re.compile(rb"^(rchar|wchar|syscw|write_bytes): (\d+)", re.MULTILINE)
_KIB = 1024
_KICK_BYTES = 8  # an eventfd kick writes 8 bytes; our own polling causes most of them


class ProcSource:
    """Reads /proc of one QEMU process; its files stay open, so that a reading is a handful of `pread`s.

    Args:
        pid: The QEMU process, whose main thread has the same number.
        vcpu_tids: Its vCPU threads, from `query-cpus-fast`.
        proc: Where /proc is; tests hand in a made-up one.
    """

    source = Source.PROC

    def __init__(self, *, pid: int, vcpu_tids: tuple[int, ...], proc: Path = Path("/proc")) -> None:
        self._dir = proc / str(pid)
        self._pid, self._vcpus = pid, vcpu_tids
        self._fds: dict[str, int] = {}
        self._aux_seen_ns: dict[int, int] = {}
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
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    async def read(self) -> Values:
        """Take one reading; None-filled when the process is gone."""
        try:
            return self._read()
        except (OSError, ValueError, KeyError, IndexError):
            return nothing_of(self.source)

    def _read(self) -> Values:
        # The command name may hold spaces and brackets: the fields count from the last bracket on.
        stat = self._bytes("stat").rpartition(b")")[2].split()
        status = {key: int(value) for key, value in _STATUS.findall(self._bytes("status"))}
        with os.scandir(self._dir / "task") as entries:
            tids = [int(entry.name) for entry in entries]
        run_ns = wait_ns = vcs = ics = 0
        for tid in self._vcpus:
            run, waited = self._schedstat(tid)
            run_ns, wait_ns = run_ns + run, wait_ns + waited
            voluntary, involuntary = self._switches(tid)
            vcs, ics = vcs + voluntary, ics + involuntary
        self._count_aux(tids)
        rchar, write_bytes = self._count_io()
        return (
            int(stat[11]) * self._tick_ns,
            int(stat[12]) * self._tick_ns,
            run_ns,
            wait_ns,
            vcs,
            ics,
            self._schedstat(self._pid)[0],
            self._switches(self._pid)[0],
            self._aux_total_ns,
            rchar,
            self._wchar_net,
            write_bytes,
            status[b"RssAnon"] * _KIB,
            status[b"VmRSS"] * _KIB,
            status[b"Threads"],
        )

    def _count_aux(self, tids: list[int]) -> None:
        """Sum what the other threads ran since the last reading; a thread's counter vanishes with it."""
        seen: dict[int, int] = {}
        for tid in tids:
            if tid == self._pid or tid in self._vcpus:
                continue
            try:
                seen[tid] = self._schedstat(tid)[0]
            except OSError:
                continue  # it ended between the listing and the reading
            before = self._aux_seen_ns.get(tid, 0)
            # Less than before: another thread got the number.
            self._aux_total_ns += seen[tid] - before if seen[tid] >= before else seen[tid]
        for tid in self._aux_seen_ns.keys() - seen.keys():
            self._forget(tid)
        self._aux_seen_ns = seen

    def _count_io(self) -> tuple[int, int]:
        io = {key: int(value) for key, value in _IO.findall(self._bytes("io"))}
        wchar, syscw = io[b"wchar"], io[b"syscw"]
        if self._written is not None:
            self._wchar_net += max(0, wchar - self._written[0] - _KICK_BYTES * (syscw - self._written[1]))
        self._written = wchar, syscw
        return io[b"rchar"], io[b"write_bytes"]

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
        fd = self._fds.pop(f"task/{tid}/schedstat", None)
        if fd is not None:
            os.close(fd)
