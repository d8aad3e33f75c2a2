"""Measure a whole simulated corpus: swept and gridded, featured, swept again unchanged; wall time, CPU and peak memory.

    python bench/whole.py [BUNDLES] [--keep FOLDER]

Each step is a `phasewatch` of its own, as a user would start it. With fewer bundles than 76,660 the times are multiplied
up, and the row says so.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import Figure, say

WHOLE = 76_660


def step(*arguments: str | Path) -> tuple[float, float, float]:
    """Run a command; give wall seconds, CPU seconds, and the peak memory (MiB) of its largest process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    pid = subprocess.Popen(
        [sys.executable, "-m", "phasewatch", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ).pid
    _, status, used = os.wait4(pid, 0)
    assert status == 0, arguments
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - start, cpu, used.ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundles", type=int, nargs="?", default=2_000)
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = asked.keep or Path(folder)
        store, run = root / "store", root / "run"
        if not store.exists():
            step(
                "simulate", "--hosts", "10", "--episodes", str(asked.bundles), "--seconds", "180", "180", "--out", store
            )
        asked.bundles = sum(1 for _ in store.glob("*/*.tar.zst"))
        swept, swept_cpu, swept_mib = step("validate", store, "--out", run)
        featured, featured_cpu, featured_mib = step("features", run)
        again, again_cpu, again_mib = step("validate", store, "--out", run)
    times = WHOLE / asked.bundles
    note = "" if asked.bundles == WHOLE else f"(from {asked.bundles:,} bundles)"
    both, cpu = (swept + featured) * times, (swept_cpu + featured_cpu) * times
    say(Figure(what=f"{WHOLE:,} bundles swept, gridded and featured on 2 cores", must="≤360", aim="≤90", measured=both,
               unit="s", note=f"wall, {cpu:.0f} s CPU {note}"))  # fmt: skip
    say(Figure(what="CPU of that, over two cores", must="≤360", aim="≤90", measured=cpu / 2, unit="s", note=note))
    say(Figure(what="peak memory of a process in it", must="≤1024", aim="", unit="MiB",
               measured=max(swept_mib, featured_mib, again_mib),
               note=f"sweep {swept_mib:.0f}, features {featured_mib:.0f}, again {again_mib:.0f} {note}"))  # fmt: skip
    say(Figure(what="unchanged re-sweep of them", must="≤20", aim="≤5", measured=again * times, unit="s",
               note=f"wall, {again_cpu * times:.0f} s CPU {note}"))  # fmt: skip


if __name__ == "__main__":
    main()
