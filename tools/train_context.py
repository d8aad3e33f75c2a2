"""Train `gbt` with context on some recipes of a run: `python -m tools.train_context RUN RECIPE...`.

`phasewatch train --grid full` does so too, with every other experiment of the full grid.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from phasewatch import atomic
from phasewatch.dataset import read_folds, read_recipe_results
from phasewatch.models.base import InputVariant
from phasewatch.training.experiment import plan_experiments
from phasewatch.training.train import train_experiments


def main(arguments: Sequence[str]) -> int:
    """Train; return 1 if an experiment failed."""
    run, recipes = Path(arguments[0]), arguments[1:]
    unbuilt = {r.recipe for r in read_recipe_results(run) if r.why}
    folds = [fold for recipe in recipes if recipe not in unbuilt for fold in read_folds(run, recipe)]
    with atomic.lock(run):
        done = train_experiments(run, plan_experiments(folds, models=("gbt",), table=str(InputVariant.CONTEXT)))
    for failure in done.failed:
        print(failure, file=sys.stderr)
    return 1 if done.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
