"""Measure `phasewatch watch` on a real QEMU with a stopped guest, as its own process.

A stopped guest does not change the watcher's work: twice a second it reads /proc, the monitor and the filter.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from spent import Spent, spend
from timing import Figure, Part

QEMU = "qemu-system-x86_64"
LATENESS_MS = 1000.0  # a bin is closed a second after its end, whatever came


def watch(pid: int, edge: Path, seconds: float) -> tuple[Spent, list[dict[str, object]]]:
    """Watch for some seconds; return the cost and the events."""
    with tempfile.TemporaryFile() as events:
        took = spend("watch", "--pid", str(pid), "--model", edge, "--seconds", str(seconds), "--json", stdout=events)
        events.seek(0)
        return took, [json.loads(line) for line in events]


def measure(corpus: Path, *, seconds: float = 120.0) -> Part:
    """Measure three starts, and one longer watch."""
    title = "Watching one VM"
    if shutil.which(QEMU) is None:
        return Part(title=title, about=f"Not measured: {QEMU} is not installed here.")
    edge = corpus / "lab-v1.edge.zip"
    with tempfile.TemporaryDirectory(prefix="pw-") as folder:
        door = Path(folder) / "q.sock"
        argv = [
            QEMU,
            "-S",
            "-name",
            "still",
            "-nodefaults",
            "-display",
            "none",
            "-machine",
            "pc",
            "-accel",
            "tcg",
            "-m",
            "32",
            "-qmp",
            f"unix:{door},server=on,wait=off",
            "-netdev",
            "user,id=n0,restrict=on",
            "-device",
            "virtio-net-pci,netdev=n0,romfile=",
            "-device",
            "virtio-balloon-pci,id=balloon0",
            "-blockdev",
            "driver=null-co,node-name=z0,size=1048576,read-zeroes=on",
            "-device",
            "virtio-blk-pci,drive=z0",
        ]
        machine = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not door.exists():
                if machine.poll() is not None:
                    raise SystemExit(f"{QEMU} ended with {machine.returncode}")
                time.sleep(0.1)
            started = min((watch(machine.pid, edge, 0.1)[0] for _ in range(3)), key=lambda took: took.wall_s)
            took, events = watch(machine.pid, edge, seconds)
        finally:
            machine.kill()
            machine.wait()
    late = [e["data"]["latency_ms"] - LATENESS_MS for e in events if e.get("type") == "phase"]  # type: ignore[index]
    of = f"{len(late)} windows"
    return Part(
        title=title,
        about=(
            f"`phasewatch watch` with the bundled model on a QEMU with a stopped guest, {took.wall_s:.0f} s; "
            "start is the whole process without its 0.1 s of watching, CPU excludes the start."
        ),
        figures=(
            Figure(
                what="end of window to event, 99th percentile",
                must="≤50",
                aim="≤10",
                unit="ms",
                measured=float(np.percentile(late, 99)),
                note=f"of {of}, median {np.median(late):.2g} ms",
            ),
            Figure(what="start, attach and detach", must="≤1", aim="≤0.3", unit="s", measured=started.wall_s - 0.1),
            Figure(what="memory of the watcher", must="≤150", aim="≤80", unit="MiB", measured=took.peak_mib),
            Figure(
                what="CPU of watching one VM",
                must="≤3",
                aim="≤1",
                unit="% of a core",
                measured=100 * (took.cpu_s - started.cpu_s) / seconds,
            ),
        ),
    )
