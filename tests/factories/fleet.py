"""A fake host: a /proc folder with any number of QEMU processes, whose vCPUs are as busy as a test sets."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS, build_channel_mask
from phasewatch.inference.edge_bundle import PostprocessingRules, TrainingOrigin
from phasewatch.inference.model_selection import ModelCandidate
from phasewatch.models.alarm import AlarmKind, AlarmRule
from phasewatch.models.base import InputKind, InputSpec, ModelInputs

PROC_CHANNELS = tuple(c.full_name for c, on in zip(CHANNELS, build_channel_mask("proc"), strict=True) if on)
_BUSY = PROC_CHANNELS.index("proc.vcpu_run")
RULES = tuple(
    AlarmRule(kind=kind, stride_s=stride_s, theta=0.5, k=k, n=n)
    for kind in AlarmKind
    for stride_s, k, n in ((1, 3, 4), (5, 2, 3))
)


class FakeHost:
    """A /proc folder with QEMU processes that have a main thread and one vCPU thread."""

    def __init__(self, proc: Path) -> None:
        self.proc = proc
        self._run_ns: dict[int, int] = {}
        self._next_pid = 100

    def start(self, name: str, *, uuid: str = "", qmp: Path | None = None, pid: int | None = None) -> int:
        """Start a VM; return its process id."""
        pid = pid or self._next_pid
        self._next_pid = max(self._next_pid, pid + 10)
        line = ["qemu-system-x86_64", "-accel", "tcg"]
        if name:
            line += ["-name", f"guest={name.replace(',', ',,')},debug-threads=on"]
        if uuid:
            line += ["-uuid", uuid]
        if qmp is not None:
            line += ["-qmp", f"unix:{qmp},server=on,wait=off"]
        self.start_program(pid, *line)
        self._write(pid, f"task/{pid + 1}/comm", "CPU 0/TCG\n")
        return pid

    def start_program(self, pid: int, *line: str) -> None:
        """Start a process, or replace the program of one."""
        self._write(pid, "stat", f"{pid} (qemu) S " + "0 " * 18 + f"{pid * 7} " + "0 " * 10)
        self._write(pid, "status", "VmRSS:\t 300 kB\nRssAnon:\t 200 kB\nThreads:\t2\n")
        self.allow(pid)
        self._run_ns.setdefault(pid, 0)
        for tid in (pid, pid + 1):
            self._write(pid, f"task/{tid}/schedstat", "5 0 3\n")
            self._write(pid, f"task/{tid}/status", "voluntary_ctxt_switches:\t1\nnonvoluntary_ctxt_switches:\t2\n")
        self._write(pid, "cmdline", "\0".join(line) + "\0")

    def stop(self, pid: int) -> None:
        """End a VM."""
        shutil.rmtree(self.proc / str(pid))

    def forbid(self, pid: int) -> None:
        """Keep the counters of a process from being read."""
        (self.proc / str(pid) / "io").unlink()

    def allow(self, pid: int) -> None:
        """Allow the counters of a process to be read."""
        text = "rchar: 77\nwchar: 9\nsyscr: 1\nsyscw: 1\nread_bytes: 1\nwrite_bytes: 4096\n"
        self._write(pid, "io", text)

    def work(self, pid: int, seconds: float) -> None:
        """Run the vCPU for some seconds of CPU time."""
        self._run_ns[pid] += round(seconds * 1e9)
        self._write(pid, f"task/{pid + 1}/schedstat", f"{self._run_ns[pid]} 0 3\n")

    def _write(self, pid: int, name: str, text: str) -> None:
        path = self.proc / str(pid) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@dataclass
class BusyEstimator:
    """An estimator that takes a busy vCPU for an infection, and fails on one that is busier than `fails_above`."""

    fails_above: float = float("inf")

    def predict_proba(self, inputs: ModelInputs) -> NDArray[np.float64]:
        busy = np.nan_to_num(inputs.x[:, _BUSY, -1].astype(np.float64))
        if (busy > self.fails_above).any():
            raise RuntimeError("the model is broken")
        infecting = np.clip(busy, 0.05, 0.95)
        rest = (1.0 - infecting) / 4
        return np.stack([rest, rest, infecting, rest, rest], axis=1)


def build_candidate(estimator: BusyEstimator | None = None, loads: list[str] | None = None) -> ModelCandidate:
    """Build a model of the proc channels; `loads` counts how often it is loaded."""
    spec = InputSpec(
        kind=InputKind.TENSOR, names=PROC_CHANNELS, mask="proc", schema_hash="5", behaviour_fingerprint="b"
    )

    def load() -> BusyEstimator:
        if loads is not None:
            loads.append("proc")
        return estimator or BusyEstimator()

    return ModelCandidate(
        model="fake",
        threat="proc",
        seed=0,
        spec=spec,
        rules=PostprocessingRules(alarms=RULES),
        trained=TrainingOrigin(),
        where="test",
        load=load,
    )
