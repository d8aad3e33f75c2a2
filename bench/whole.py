"""Whole simulated corpora: swept and gridded, featured, swept again unchanged; wall time, CPU and peak memory, by size and workers.

Each step is a `phasewatch` of its own, as a user would start it.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from timing import Figure, Part, Point

WHOLE = 76_660
WORKERS = (1, 2)
SWEEP, FEATURES, AGAIN = "validate", "features", "validate again, nothing changed"


def step(*arguments: str | Path) -> tuple[float, float, float]:
    """Run a command; give wall seconds, CPU seconds, and the peak memory (MiB) of its largest process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    pid = subprocess.Popen(
        [sys.executable, "-m", "phasewatch", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ).pid
    _, status, used = os.wait4(pid, 0)
    wall = time.monotonic() - start
    if status != 0:
        raise SystemExit(f"{' '.join(map(str, arguments))}: ended with {os.waitstatus_to_exitcode(status)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, used.ru_maxrss / 1024


def measure(*, sizes: Sequence[int], workers: Sequence[int] = WORKERS) -> Part:
    """Make a store of each size once, and take it the way once for each number of workers."""
    points = []
    for bundles in sizes:
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            step("simulate", "--hosts", "10", "--episodes", str(bundles), "--seconds", "180", "180", "--out", store)
            for n in workers:
                run = Path(folder) / f"run-{n}"
                for name, arguments in (
                    (SWEEP, ("validate", store, "--out", run, "--workers", str(n))),
                    (FEATURES, ("features", run, "--workers", str(n))),
                    (AGAIN, ("validate", store, "--out", run, "--workers", str(n))),
                ):
                    wall, cpu, peak = step(*arguments)
                    points.append(
                        Point(step=name, bundles=bundles, workers=n, wall_s=wall, cpu_s=cpu, peak_mib=peak)
                    )
    return Part(
        title="Whole corpora",
        about="Simulated stores of 180 s episodes on ten hosts, page cache warm, each step a process of its own; memory is of the largest process in it.",
        points=tuple(points),
        figures=figures(points),
    )


def figures(points: Sequence[Point]) -> tuple[Figure, ...]:
    """Give the figures from the largest size; from fewer bundles than the whole corpus times are multiplied up, and say so."""
    most = max(p.bundles for p in points)
    at = {p.step: p for p in points if p.bundles == most and p.workers == max(WORKERS)}
    note = "" if most == WHOLE else f"from {most:,} bundles"
    up = WHOLE / most
    return (
        Figure(what=f"{WHOLE:,} bundles swept, gridded and featured on 2 cores, wall", must="≤360", aim="≤90", unit="s", note=note,
               measured=(at[SWEEP].wall_s + at[FEATURES].wall_s) * up),
        Figure(what="CPU of that, over two cores", must="≤360", aim="≤90", unit="s", note=note,
               measured=(at[SWEEP].cpu_s + at[FEATURES].cpu_s) * up / 2),
        Figure(what="unchanged re-sweep of them, wall", must="≤20", aim="≤5", unit="s", note=note, measured=at[AGAIN].wall_s * up),
        Figure(what="peak memory of a process in all sizes", must="≤1024", aim="", unit="MiB",
               measured=max(p.peak_mib for p in points)),
    )  # fmt: skip
