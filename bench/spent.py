"""Measure wall and CPU seconds of a command, and the peak memory of its largest process.

A small process starts it, because a child's peak memory begins with that of its parent, and benchmarks are large.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_STARTER = """
import json, os, resource, subprocess, sys, time
start = time.monotonic()
_, status, used = os.wait4(subprocess.Popen(sys.argv[2:]).pid, 0)
wall = time.monotonic() - start
all = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump({"wall_s": wall, "cpu_s": all.ru_utime + all.ru_stime, "peak_mib": used.ru_maxrss / 1024}, file)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Cost of one command, including its children."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def spend(*arguments: str | Path, stdout: IO[Any] | int = subprocess.DEVNULL) -> Spent:
    """Run `phasewatch` with these arguments and return its cost.

    Raises:
        SystemExit: If it fails.
    """
    command = [sys.executable, "-m", "phasewatch", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        cost_path = Path(folder) / "spent.json"
        done = subprocess.run(
            [sys.executable, "-S", "-c", _STARTER, str(cost_path), *command], stdout=stdout, stderr=subprocess.DEVNULL
        )
        if done.returncode != 0:
            raise SystemExit(f"phasewatch {' '.join(map(str, arguments))}: ended with {done.returncode}")
        return Spent(**json.loads(cost_path.read_text()))
