"""Which cells the grids have: the short one is the design's list, the full one is filled in two passes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.factories.split_episodes import PROFILES, corpus
from tests.factories.synthetic_runs import World, write_run

from phasewatch.artifacts import EXPERIMENT_PREDICTIONS_FILE
from phasewatch.dataset import load, write_all_splits
from phasewatch.errors import RunError, UsageError
from phasewatch.models.registry import BASELINE_MODELS
from phasewatch.pipeline import stages
from phasewatch.splits import SPLIT_RECIPES, build_folds
from phasewatch.training.experiment import Experiment
from phasewatch.training.grids import (
    HEADLINE_BASELINES,
    MAIN_MODELS,
    SHORT_GRID_MODELS,
    build_full_grid,
    build_headline_grid,
    build_short_grid,
    build_user_model_grid,
    find_widest_fold,
    list_sensor_channel_sets,
)
from phasewatch.training.predictions import (
    PartPredictions,
    PredictionPart,
    build_predictions_table,
    write_prediction_table,
)
from phasewatch.training.train import find_best_models

FOLDS = {row.name: build_folds(row.name, corpus(), profiles=PROFILES) for row in SPLIT_RECIPES}


def count(cells: tuple, *names: str) -> Counter:  # type: ignore[type-arg]
    found = Counter(tuple(getattr(cell, name) for name in names) for cell in cells)
    return Counter({key[0] if len(names) == 1 else key: n for key, n in found.items()})


def test_the_short_grid_is_the_list_of_the_design() -> None:
    cells = build_short_grid(FOLDS)
    gbt = [c for c in cells if c.model == "gbt" and c.threat == "realistic" and c.recipe != "deploy"]
    few = [c for c in cells if c.model in SHORT_GRID_MODELS and c.fold == "host-0" and c.recipe == "held_out_host"]

    assert count(tuple(gbt), "recipe") == {
        "held_out_host": 4, "held_out_sample": 4, "held_out_both": 16, "in_distribution": 4, "random_windows": 4,
    }  # fmt: skip
    assert count(tuple(few), "threat") == {"realistic": len(SHORT_GRID_MODELS), "oracle": 1}
    assert {(c.model, c.threat) for c in cells if c.recipe == "deploy"} == {("gbt", "portable"), ("gbt", "realistic")}
    rest = [c for c in cells if c not in gbt and c not in few and c.recipe != "deploy"]
    both = dict.fromkeys(HEADLINE_BASELINES, 16)  # on unseen hosts and samples too
    assert count(tuple(rest), "model") == {m: 4 + both.get(m, 0) for m in BASELINE_MODELS}
    assert {(c.table, c.seed) for c in cells} == {("raw", 0)}


def test_the_one_fold_of_the_six_tests_most_profiles_then_comes_first_by_name() -> None:
    fewer = [e for e in corpus() if not (e.host_id == "host-0" and e.profile == "cryptomine")]
    folds = {"held_out_host": build_folds("held_out_host", fewer, profiles=PROFILES)}

    assert [fold.fold for fold in find_widest_fold(folds)] == ["host-1"]


def test_the_full_grid_trains_every_model_on_unseen_hosts_and_the_cheap_ones_on_every_recipe() -> None:
    cells = build_full_grid(FOLDS)
    n_folds = {recipe: len(folds) for recipe, folds in FOLDS.items() if recipe != "deploy"}
    raw = [c for c in cells if (c.table, c.threat) == ("raw", "realistic") and c.recipe != "deploy"]

    assert set(build_short_grid(FOLDS)) <= set(cells)
    for model in MAIN_MODELS:
        mine = count(tuple(c for c in raw if c.model == model), "recipe")
        assert mine == (n_folds if model == "gbt" else {"held_out_host": n_folds["held_out_host"]})
    assert count(tuple(c for c in raw if c.model == "minirocket"), "recipe") == n_folds
    oracle = {(c.model, c.recipe) for c in cells if c.threat == "oracle"}
    assert oracle == {("gbt", "held_out_host"), ("gbt", "held_out_both"), ("minirocket", "held_out_host")}
    assert {(c.model, c.recipe) for c in cells if c.table == "context"} == {
        ("gbt", "held_out_host"),
        ("tcn", "held_out_host"),
        ("gbt", "held_out_both"),
    }
    of_sensors = [c for c in cells if c.threat in list_sensor_channel_sets()]
    assert {(c.model, c.recipe) for c in of_sensors} == {("gbt", "held_out_host")}
    assert count(tuple(of_sensors), "threat") == dict.fromkeys(list_sensor_channel_sets(), len(FOLDS["held_out_host"]))


def test_the_second_pass_trains_the_best_models_on_unseen_samples_and_other_inputs_and_the_best_with_seeds() -> None:
    cells = build_headline_grid(FOLDS, best=["gru", "gbt"])
    host = [c for c in cells if c.recipe == "held_out_host" and c.fold == "host-0"]

    assert count(tuple(host), "model", "threat", "table", "seed") == {
        **{("gru", "realistic", "raw", s): 1 for s in (0, 1, 2)},
        ("gbt", "realistic", "raw", 0): 1,
        **{(m, "portable", "raw", 0): 1 for m in ("gru", "gbt")},
        **{(m, "realistic", "commissioned", 0): 1 for m in ("gru", "gbt")},
    }
    both = {(c.model, c.threat, c.table, c.seed) for c in cells if c.recipe == "held_out_both"}
    assert both == {("gru", "realistic", "raw", s) for s in (0, 1, 2)} | {("gbt", "realistic", "raw", 0)}
    assert {c.recipe for c in cells} == {"held_out_host", "held_out_both", "deploy"}


def test_a_model_without_a_named_table_gets_the_variant_of_its_registry_entry() -> None:
    cells = build_user_model_grid(FOLDS, ("tcn", "gbt"))

    assert {(c.model, c.table) for c in cells} == {("tcn", "context"), ("gbt", "raw")}


def test_a_recipe_that_could_not_be_built_is_absent_and_the_rest_is_there() -> None:
    folds = {recipe: of for recipe, of in FOLDS.items() if recipe not in ("held_out_host", "in_distribution")}

    assert {c.recipe for c in build_short_grid(folds)} == {
        "held_out_sample",
        "held_out_both",
        "held_out_time",  # tests the last episodes where no host can be held out
        "random_windows",
        "deploy",
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_run(tmp_path_factory.mktemp("grid") / "run", World(windows=8, sessions=8))
    write_all_splits(made, ["held_out_host", "deploy"])
    return made


def test_best_models_are_chosen_by_validation_b_on_unseen_hosts(run: Path) -> None:
    """The decisions of the test rows are all wrong for the best model, and are not looked at."""
    windows = load(run, "held_out_host", "host-0").val_b
    right = np.eye(5)[windows.y]
    wrong = np.eye(5)[(windows.y + 2) % 5]
    shares = {"gbt": (right, wrong), "cnn": (0.6 * right + 0.4 * wrong, right), "mlp": (wrong, right)}
    cells = []
    for model, (val_b, test) in shares.items():
        cell = Experiment(recipe="held_out_host", fold="host-0", threat="realistic", model=model)
        parts = [
            PartPredictions(part=part, filter="none", windows=windows.windows, p=p)
            for part, p in ((PredictionPart.VAL_B, val_b), (PredictionPart.TEST, test))
        ]
        cell.folder(run).mkdir(parents=True)
        write_prediction_table(cell.folder(run) / EXPERIMENT_PREDICTIONS_FILE, [build_predictions_table(cell, parts)])
        cells.append(cell)

    assert find_best_models(run, cells) == ("cnn", "gbt")
    assert find_best_models(run, [replace(cells[0], threat="oracle")]) == ()


def test_a_model_with_an_input_that_the_headline_may_not_use_is_not_among_the_best(run: Path) -> None:
    cell = Experiment(recipe="held_out_host", fold="host-0", threat="realistic", model="tcn", table="context")

    assert find_best_models(run, [cell]) == ()


def test_a_grid_is_narrowed_by_models_and_recipes(run: Path) -> None:
    cells = stages.build_experiments(
        stages.RunSettings(store=run, run=run, models=("gbt", "majority"), recipes=("held_out_host",))
    )

    assert {c.model for c in cells} == {"gbt", "majority"}
    assert {c.recipe for c in cells} == {"held_out_host"}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"models": ("gtb",)}, "did you mean gbt"),
        ({"recipes": ("held_out_hosts",)}, "did you mean held_out_host"),
        ({"models": ("cnn",), "recipes": ("held_out_sample",)}, "no experiment of cnn, held_out_sample"),
        ({"grid": "wide"}, "no grid 'wide'"),
    ],
)
def test_unknown_model_recipe_or_grid_is_a_usage_error(
    run: Path, asked: dict[str, tuple[str, ...]], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        stages.build_experiments(stages.RunSettings(store=run, run=run, **asked))  # type: ignore[arg-type]


def test_a_run_without_splits_is_told_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no split; make them with `phasewatch split"):
        stages.build_experiments(stages.RunSettings(store=tmp_path, run=tmp_path))
