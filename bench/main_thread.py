"""Measure what a watcher costs its VM: CPU of QEMU's main thread, alternately unwatched and watched.

QEMU answers its monitor in the main thread, which also serves the guest's devices, so the queries cost time there.

    python bench/main_thread.py --pid 4711 --seconds 60 --rounds 3
    python bench/main_thread.py --pid 4711 --channels realistic     # with translation counters, while they are fast
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

EDGE = Path(__file__).parents[1] / "corpus" / "lab-v1.edge.zip"


def run_s(pid: int) -> float:
    """Return the CPU seconds that the main thread ran so far."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def cores(pid: int, seconds: float) -> float:
    """Measure the main thread's CPU over some seconds, in cores."""
    before, began = run_s(pid), time.monotonic()
    time.sleep(seconds)
    return (run_s(pid) - before) / (time.monotonic() - began)


def watched_cores(pid: int, seconds: float, arguments: list[str]) -> tuple[float, dict[str, object]]:
    """Measure the main thread while the VM is watched, from the first bin on; return the watcher's result, too."""
    command = [sys.executable, "-m", "phasewatch", "watch", "--pid", str(pid), "--json", "--seconds", str(seconds + 5)]
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        if child.stdout is None or not child.stdout.readline():
            raise SystemExit("the watch ended before its first bin")
        found = cores(pid, seconds)
        last = [line for line in child.stdout if line.startswith('{"result"')]
    return found, json.loads(last[-1])["result"] if last else {}


def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pid", type=int, required=True, help="The QEMU process.")
    parser.add_argument("--seconds", type=float, default=30.0, help="How long each half of a round is measured.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, default=EDGE)
    parser.add_argument("--channels", default="", help="Channel set, as for `phasewatch watch`.")
    given = parser.parse_args()
    arguments = ["--model", str(given.model), *(["--channels", given.channels] if given.channels else [])]
    alone, watched, lost = [], [], {}
    for _ in range(given.rounds):
        alone.append(cores(given.pid, given.seconds))
        found, result = watched_cores(given.pid, given.seconds, arguments)
        watched.append(found)
        lost = result.get("watched", {}).get("lost", {})  # type: ignore[attr-defined]
    print(
        json.dumps(
            {
                "unwatched_cores": [round(x, 4) for x in alone],
                "watched_cores": [round(x, 4) for x in watched],
                "difference_cores": round(median(watched) - median(alone), 4),
                "ratio": round(median(watched) / median(alone), 2) if median(alone) else None,
                "lost": lost,
            }
        )
    )


if __name__ == "__main__":
    main()
