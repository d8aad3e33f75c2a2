"""A sweep that is killed with -9 at random moments, again and again, ends with the bytes of one that never was."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.validate.test_sweep import SHORT, products

from phasewatch.simulate import simulate
from phasewatch.validate.parts import PARTS
from phasewatch.validate.sweep import sweep

SWEEP = (
    "import sys\n"
    "from pathlib import Path\n"
    "from phasewatch.validate.sweep import sweep\n"
    "if __name__ == '__main__':\n"
    "    print('begun', flush=True)\n"
    "    sweep(Path(sys.argv[1]), Path(sys.argv[2]), workers=int(sys.argv[3]), part=8)\n"
)


def start(script: Path, store: Path, run: Path, workers: int) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, str(script), str(store), str(run), str(workers)],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert started.stdout is not None
    assert started.stdout.readline() == "begun\n"
    return started


def kill_again_and_again(folder: Path, *, kills: int, seed: int, whole_group: bool) -> int:
    """Kill sweeps of one store; give how many were hit before they had finished."""
    rng = random.Random(seed)
    store = simulate(folder / "store", hosts=2, episodes=60, seed=4, faults=0.3, between_s=SHORT).store
    sweep(store, folder / "whole", workers=1)
    script, run, hits = folder / "sweep.py", folder / "run", 0
    script.write_text(SWEEP)
    for number in range(kills):
        workers = 1 + number % 2
        began = time.monotonic()
        sweeping = start(script, store, run, workers)
        # As long as the first, unhurried sweep would take, give or take: moments are drawn, not the machine's speed.
        wait_s = rng.uniform(0, 1.5)
        while sweeping.poll() is None and time.monotonic() - began < wait_s:
            time.sleep(0.01)
        if sweeping.poll() is None:
            hits += 1
            if whole_group:
                os.killpg(sweeping.pid, signal.SIGKILL)
            else:
                sweeping.kill()  # its workers see the end of their pipes
        sweeping.communicate()
    sweep(store, run, workers=2)

    assert products(run) == products(folder / "whole")
    assert not (run / PARTS).exists()
    assert not [p for p in run.rglob("*") if p.name.endswith(".tmp")]
    return hits


def test_a_sweep_killed_a_few_times_ends_with_the_same_bytes(tmp_path: Path) -> None:
    assert kill_again_and_again(tmp_path, kills=3, seed=1, whole_group=False) > 0


@pytest.mark.soak
@pytest.mark.parametrize("whole_group", [True, False], ids=["workers and all", "the parent alone"])
def test_a_sweep_killed_two_hundred_times_ends_with_the_same_bytes(
    tmp_path: Path, whole_group: bool, soak_row: Callable[..., None]
) -> None:
    hits = kill_again_and_again(tmp_path, kills=200, seed=7, whole_group=whole_group)
    soak_row("Sweeps killed with -9", killed="workers and all" if whole_group else "the parent alone", kills=200,
             hit_before_the_end=hits, other_bytes_at_the_end=0)  # fmt: skip

    assert hits > 100
