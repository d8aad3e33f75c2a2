"""What a command takes: wall and CPU seconds, and the peak memory of its largest process.

It is started by a small process of its own: a child's peak begins with its parent's at the fork, and benches are large.
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
    """What one command took, its children included."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def spend(*arguments: str | Path, said: IO[Any] | int = subprocess.DEVNULL) -> Spent:
    """Run `phasewatch` with these arguments.

    Raises:
        SystemExit: If it fails.
    """
    command = [sys.executable, "-m", "phasewatch", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "spent.json"
        done = subprocess.run(
            [sys.executable, "-S", "-c", _STARTER, str(told), *command], stdout=said, stderr=subprocess.DEVNULL
        )
        if done.returncode != 0:
            raise SystemExit(f"phasewatch {' '.join(map(str, arguments))}: ended with {done.returncode}")
        return Spent(**json.loads(told.read_text()))
