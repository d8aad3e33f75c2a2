"""A fake /proc folder of one QEMU process."""

from __future__ import annotations

from pathlib import Path

PID, VCPU, WORKER, SECOND = 100, 101, 102, 103


class FakeProc:
    """A /proc folder with one QEMU process: main thread, one vCPU thread, one worker thread."""

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
