"""A small run with trained cells, for tests of what is done with them: export, watch, predict."""

from __future__ import annotations

import json
from pathlib import Path

from tests.factories.synthetic_runs import World, write_run

from phasewatch.channels import BASE_CHANNELS
from phasewatch.dataset import write_splits
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.features.schema import render_schema
from phasewatch.training.experiment import Experiment
from phasewatch.training.train import train_experiments

RECIPE, FOLD = "held_out_host", "host-0"


def write_trained_run(
    run: Path, *, models: tuple[str, ...] = ("gbt",), threats: tuple[str, ...] = ("realistic", "portable", "oracle")
) -> Path:
    """Write a run over the real columns and train some models for some masks on one fold."""
    write_run(run, World(windows=8, hosts=3, sessions=4, soaks=0))
    (run / "feature_schema_v2.json").write_text(
        json.dumps(json.loads(render_schema(behaviour_fingerprint(), behaviour_fingerprint(BASE_CHANNELS))))
    )
    write_splits(run, RECIPE)
    cells = [Experiment(recipe=RECIPE, fold=FOLD, threat=threat, model=m) for m in models for threat in threats]
    train_experiments(run, cells, workers=1)
    return run
