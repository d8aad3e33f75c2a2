"""Small tuning: validation A alone judges, the trials are counted, more of them change no earlier one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.factories.synthetic_runs import World, write_run

from phasewatch.dataset import FoldData, load, write_splits
from phasewatch.errors import UsageError
from phasewatch.models import registry
from phasewatch.models.base import ModelInputs
from phasewatch.models.checkpoint import read_header
from phasewatch.training.experiment import Experiment, parse_experiment
from phasewatch.training.train import train_experiments
from phasewatch.training.tuning import TUNING_SPACES, draw_settings, tune

CELL = Experiment(recipe="held_out_host", fold="host-0", threat="realistic", model="gbt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_run(tmp_path_factory.mktemp("tune") / "run", World(windows=8, signal=0.3))
    write_splits(made, "held_out_host")
    return made


def sets_of(run: Path) -> FoldData:
    sets = load(run, "held_out_host", "host-0")
    few = [n for n in range(len(sets.train.names)) if n % 40 == 0]  # quick: some columns tell enough

    def narrow(part):  # type: ignore[no-untyped-def]
        spec = replace(part.inputs.spec, names=tuple(part.names[n] for n in few))
        return replace(part, inputs=ModelInputs(x=np.ascontiguousarray(part.x[:, few]), spec=spec))

    return replace(sets, train=narrow(sets.train), val_a=narrow(sets.val_a))


def test_first_trial_uses_the_defaults_and_the_best_on_validation_a_wins(run: Path) -> None:
    sets = sets_of(run)
    scores = [tune(sets, "gbt", trials=n, seed=0, purpose="x").val_a_macro_f1 for n in (1, 3, 5)]

    assert tune(sets, "gbt", trials=1, seed=0, purpose="x").settings == {}
    assert scores == sorted(scores)
    best = tune(sets, "gbt", trials=5, seed=0, purpose="x")
    assert best == tune(sets, "gbt", trials=5, seed=0, purpose="x")
    assert best.trials == 5


def test_tuned_experiment_records_its_trials_and_differs_from_an_untuned_one(run: Path) -> None:
    def shallow(trials: int) -> int:
        return len(train_experiments(run, [CELL], workers=1, trials=trials).trained)

    assert shallow(0) == 1
    plain = read_header(CELL.folder(run))
    assert shallow(2) == 1
    assert shallow(2) == 0
    tuned, done = (
        read_header(CELL.folder(run)),
        parse_experiment((CELL.folder(run) / "cell.json").read_bytes(), file=""),
    )

    assert done.trials == 2
    assert tuned.val_a_macro_f1 >= plain.val_a_macro_f1
    assert shallow(0) == 1


@pytest.mark.parametrize("model", TUNING_SPACES)
def test_drawn_settings_are_valid_settings_of_the_model(model: str) -> None:
    for settings in draw_settings(model, n=3, seed=0, purpose="x"):
        registry.create(model, settings=settings)

        for row in TUNING_SPACES[model]:
            value = settings[row.name]
            assert value in row.choices if row.choices else row.low <= value <= row.high


def test_more_draws_keep_the_earlier_ones_and_each_experiment_has_its_own() -> None:
    three = draw_settings("gbt", n=3, seed=0, purpose="x")

    assert draw_settings("gbt", n=5, seed=0, purpose="x")[:3] == three
    assert draw_settings("gbt", n=3, seed=0, purpose="y") != three
    assert draw_settings("gbt", n=3, seed=1, purpose="x") != three
    assert len({str(settings) for settings in three}) == 3


def test_model_without_settings_to_tune_is_refused_before_training(run: Path) -> None:
    with pytest.raises(UsageError, match="'majority' has no settings to tune"):
        train_experiments(run, [replace(CELL, model="majority")], workers=1, trials=3)
