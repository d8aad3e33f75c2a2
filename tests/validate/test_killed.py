"""A sweep that is killed with -9 at random moments, again and again, ends with the bytes of one that never was."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.validate.test_sweep import SHORT, products

from phasewatch.simulate import simulate
from phasewatch.validate.resume import SWEEP_PARTS_DIR
from phasewatch.validate.sweep import sweep

BUNDLES = 60
SWEEP = (
    "import sys\n"
    "from pathlib import Path\n"
    "from phasewatch.validate.sweep import sweep\n"
    "class Printed:\n"
    "    def update(self, task, done, total, detail=''):\n"
    "        print(done, flush=True)\n"
    "if __name__ == '__main__':\n"
    "    sweep(Path(sys.argv[1]), Path(sys.argv[2]), workers=int(sys.argv[3]), part=8, progress=Printed())\n"
)


@dataclass(slots=True)
class Deaths:
    """What became of the sweeps.

    Attributes:
        hit: How many were killed before they had ended.
        late: How many of those had reported every bundle and were writing their results.
        whole: How many times a run was brought to its end by a sweep that nobody killed.
        unlike: How many of those gave other bytes than a sweep that never was killed.
    """

    hit: int = 0
    late: int = 0
    whole: int = 0
    unlike: int = 0


def sweep_until(reported: int, script: Path, store: Path, run: Path, *, workers: int) -> subprocess.Popen[str]:
    """Start a sweep; return when it has reported so many bundles, or ended."""
    sweeping = subprocess.Popen(
        [sys.executable, str(script), str(store), str(run), str(workers)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert sweeping.stdout is not None
    for _ in range(reported):
        if not sweeping.stdout.readline():
            break
    return sweeping


def kill_again_and_again(folder: Path, *, kills: int, seed: int, whole_group: bool) -> Deaths:
    """Kill sweeps of one store after a drawn number of bundles and a drawn moment; let one in ten come to its end."""
    rng = random.Random(seed)
    store = simulate(folder / "store", hosts=2, episodes=BUNDLES, seed=4, faults=0.3, between_s=SHORT).store
    sweep(store, folder / "whole", workers=1)
    script, run, deaths = folder / "sweep.py", folder / "run", Deaths()
    script.write_text(SWEEP)
    for number in range(kills):
        reported = rng.choice((BUNDLES, rng.randrange(BUNDLES)))
        sweeping = sweep_until(reported, script, store, run, workers=1 + number % 2)
        time.sleep(rng.uniform(0, 0.03))
        if sweeping.poll() is None:
            deaths.hit += 1
            deaths.late += reported == BUNDLES
            if whole_group:
                os.killpg(sweeping.pid, signal.SIGKILL)
            else:
                sweeping.kill()  # its workers see the end of their pipes
        sweeping.communicate()
        if number == kills - 1 or rng.random() < 0.1:
            sweep(store, run, workers=2)
            deaths.whole += 1
            deaths.unlike += products(run) != products(folder / "whole")

            assert not (run / SWEEP_PARTS_DIR).exists()
            assert not [p for p in run.rglob("*") if p.name.endswith(".tmp")]

            shutil.rmtree(run)
    return deaths


def test_a_sweep_killed_a_few_times_ends_with_the_same_bytes(tmp_path: Path) -> None:
    deaths = kill_again_and_again(tmp_path, kills=3, seed=1, whole_group=False)

    assert deaths.hit > 0
    assert deaths.unlike == 0


@pytest.mark.soak
@pytest.mark.parametrize("whole_group", [True, False], ids=["workers and all", "the parent alone"])
def test_a_sweep_killed_two_hundred_times_ends_with_the_same_bytes(
    tmp_path: Path, whole_group: bool, soak_row: Callable[..., None]
) -> None:
    deaths = kill_again_and_again(tmp_path, kills=200, seed=7, whole_group=whole_group)
    soak_row(
        "Sweeps killed with -9",
        killed="workers and all" if whole_group else "the parent alone",
        kills=deaths.hit,
        while_the_products_were_written=deaths.late,
        runs_brought_to_their_end=deaths.whole,
        of_other_bytes=deaths.unlike,
    )

    assert deaths.unlike == 0
    assert deaths.hit > 100
    assert deaths.late > 10
