"""Each leak that an audit of single cells once missed, in the fold that is not the first by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tests.factories.synthetic_runs import World, edit_features, write_run
from tests.factories.tampered_runs import edit_predictions, put_model, refit

from phasewatch.audit.checks import CheckOutcome
from phasewatch.audit.models import (
    MergedPredictions,
    check_predictions,
    check_retrained,
    choose_experiments,
    read_headline_key,
)
from phasewatch.audit.omissions import check_answered, check_store_remainder, check_twins, compute_twin_share
from phasewatch.dataset import FoldData, load, read_folds, write_all_splits
from phasewatch.models import checkpoint, registry
from phasewatch.models.base import PhaseModel, PostprocessingData
from phasewatch.training.experiment import Experiment, plan_experiments
from phasewatch.training.live_scores import predict_live_windows, score_live_windows, score_windows
from phasewatch.training.predictions import build_predictions_table
from phasewatch.training.train import (
    FittedModel,
    compute_run_digests,
    fit_model,
    merge_predictions,
    predict_parts,
    train_experiments,
)

RECIPES = ("held_out_host", "held_out_both")
SECOND = Experiment(recipe="held_out_host", fold="host-1", threat="realistic", model="gbt")
BOTH = Experiment(recipe="held_out_both", fold="host-1.group-1", threat="realistic", model="gbt")
CELLS = pytest.mark.parametrize("cell", [SECOND, BOTH], ids=lambda cell: cell.recipe)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of three hosts and two samples a profile: three folds of one recipe and six of the other."""
    run = write_run(
        tmp_path_factory.mktemp("folds") / "run", World(hosts=3, sessions=8, windows=8, samples=2, soaks=1, signal=0.2)
    )
    write_all_splits(run, (*RECIPES, "deploy"))
    folds = [fold for recipe in (*RECIPES, "deploy") for fold in read_folds(run, recipe)]
    train_experiments(run, plan_experiments(folds, models=("gbt",)), workers=1)
    return run


@pytest.fixture
def run(clean: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clean, tmp_path / "run")


def retrained(run: Path, cell: Experiment) -> CheckOutcome:
    """Return the outcome of training one fold again, of those that the audit chooses."""
    assert cell in choose_experiments(run)
    return check_retrained(run, [cell]).fate


def answered(run: Path) -> CheckOutcome:
    return check_answered(run, MergedPredictions.read(run).list_answered(), read_headline_key(run)).fate


def test_a_clean_run_is_kept(run: Path) -> None:
    assert check_retrained(run, choose_experiments(run)).fate is CheckOutcome.KEPT
    assert check_predictions(run).fate is CheckOutcome.KEPT
    assert check_twins(run).fate is CheckOutcome.KEPT
    assert answered(run) is CheckOutcome.KEPT


def test_faults_are_the_same_and_in_the_same_order_in_several_processes(run: Path) -> None:
    for cell in choose_experiments(run)[:2]:
        refit(run, cell, lambda model, sets: fit_model(model, replace(sets, extra=sets.test.examples)))

    chosen = choose_experiments(run)[:3]
    alone = check_retrained(run, chosen)

    assert alone.fate is CheckOutcome.BROKEN
    assert check_retrained(run, chosen, workers=2) == alone
    assert check_predictions(run, workers=2) == check_predictions(run)


def test_every_fold_of_the_headlines_model_is_trained_again(run: Path) -> None:
    chosen = choose_experiments(run)

    assert {(cell.recipe, cell.fold) for cell in chosen} == {
        (fold.recipe, fold.fold) for recipe in RECIPES for fold in read_folds(run, recipe)
    }
    assert len(chosen) == 9


@CELLS
def test_training_on_train_and_test_is_caught_in_every_fold(run: Path, cell: Experiment) -> None:
    refit(run, cell, lambda model, sets: fit_model(model, replace(sets, extra=sets.test.examples)))

    assert check_predictions(run).fate is CheckOutcome.KEPT
    assert retrained(run, cell) is CheckOutcome.BROKEN


@CELLS
def test_stopping_calibration_and_alarm_on_the_test_host_are_caught(run: Path, cell: Experiment) -> None:
    refit(run, cell, lambda model, sets: fit_model(model, replace(sets, val_a=sets.test, val_b=sets.test)))

    assert check_predictions(run).fate is CheckOutcome.KEPT
    assert retrained(run, cell) is CheckOutcome.BROKEN


@CELLS
def test_the_checkpoint_of_deploy_in_a_fold_is_caught_without_training(run: Path, cell: Experiment) -> None:
    deploy = registry.load(replace(cell, recipe="deploy", fold="all").folder(run))
    sets = load(run, cell.recipe, cell.fold)
    live = [predict_live_windows(deploy, sets, part.windows.episodes) for part in (sets.val_b, sets.soak)]
    val_b = deploy.predict_proba(sets.val_b.inputs)
    put_model(run, cell, FittedModel(model=deploy, val_b=val_b, val_b_live=live[0], soak_live=live[1]), sets)

    check = check_predictions(run)

    assert check.fate is CheckOutcome.BROKEN
    assert "train windows are not those of its fold" in check.words


@CELLS
def test_an_alarm_that_the_soak_of_the_test_host_set_is_caught(run: Path, cell: Experiment) -> None:
    """Nothing but the soak differs: train, validation and probabilities are honest."""

    def cheat(model: PhaseModel, sets: FoldData) -> FittedModel:
        fitted = fit_model(model, sets)
        tested = {e.host_id for e in sets.test.windows.episodes}
        own = sets.soak.take(sets.soak.windows.mark_episodes(lambda e: e.host_id in tested))
        assert len(own)
        val_b = score_windows(sets.val_b, fitted.val_b)
        live = predict_live_windows(fitted.model, sets, own.windows.episodes)
        fitted.model.fit_postprocessing(
            PostprocessingData(
                train=sets.train.label_sequence,
                val_b=val_b,
                soak=score_windows(own, fitted.model.predict_proba(own.inputs)),
                val_b_live=score_live_windows(sets, fitted.val_b_live),
                soak_live=score_live_windows(sets, live, only=own.windows.episodes),
            )
        )
        return fitted

    refit(run, cell, cheat)

    assert retrained(run, cell) is CheckOutcome.BROKEN


@CELLS
def test_predictions_of_a_model_of_another_seed_are_caught(run: Path, cell: Experiment) -> None:
    """The checkpoint stays; only what it is said to have answered comes from elsewhere."""
    sets = load(run, cell.recipe, cell.fold)
    other = fit_model(registry.create(cell.model, seed=7, settings={"learning_rate": 0.3}), sets)
    table = build_predictions_table(cell, predict_parts(other, sets))

    edit_predictions(run, cell, lambda _: table)

    assert check_predictions(run).fate is CheckOutcome.BROKEN


def halve_infecting(part: str) -> Callable[[pa.Table], pa.Table]:
    """Return a hand that lowers p(infecting) of one part, which sets an alarm's threshold."""

    def change(table: pa.Table) -> pa.Table:
        edited = pc.equal(table["part"], part)
        p = pc.if_else(edited, pc.multiply(table["p_infecting"], pa.scalar(0.5, pa.float32())), table["p_infecting"])
        return table.set_column(table.schema.get_field_index("p_infecting"), "p_infecting", p)

    return change


@CELLS
def test_edited_predictions_of_soak_are_caught(run: Path, cell: Experiment) -> None:
    edit_predictions(run, cell, halve_infecting("soak"))

    assert check_predictions(run).fate is CheckOutcome.BROKEN


@CELLS
def test_edited_predictions_of_validation_are_caught(run: Path, cell: Experiment) -> None:
    edit_predictions(run, cell, halve_infecting("val_b"))

    assert retrained(run, cell) is CheckOutcome.BROKEN


@CELLS
def test_a_fold_that_was_cut_and_not_answered_is_caught(run: Path, cell: Experiment) -> None:
    shutil.rmtree(cell.folder(run))
    merge_predictions(run, compute_run_digests(run))

    check = check_answered(run, MergedPredictions.read(run).list_answered(), read_headline_key(run))

    assert check.fate is CheckOutcome.BROKEN
    assert f"{cell.recipe}-{cell.fold} was cut and has no predictions" in check.words


def test_a_model_that_answers_the_widest_fold_alone_leaves_nothing_out(run: Path) -> None:
    for fold in ("host-1", "host-2"):
        shutil.rmtree(replace(SECOND, fold=fold).folder(run))
    merge_predictions(run, compute_run_digests(run))

    assert answered(run) is CheckOutcome.KEPT


@CELLS
def test_settings_that_were_chosen_on_the_test_set_are_caught_without_training(run: Path, cell: Experiment) -> None:
    """The header's own settings are what the model is trained again with, so only their origin can accuse."""
    sets = load(run, cell.recipe, cell.fold)
    best = registry.create(cell.model, settings={"learning_rate": 0.4})
    put_model(run, cell, fit_model(best, sets), sets)

    check = check_predictions(run)

    assert check.fate is CheckOutcome.BROKEN
    assert "learning_rate" in check.words


def test_a_host_that_is_another_one_by_a_new_name_is_caught(run: Path) -> None:
    """Its totals are one higher, so its readings differ; its rates are the same to the last bit."""

    def copy(table: pa.Table) -> pa.Table:
        host = np.array(table["host_id"].to_pylist())
        source, place = np.flatnonzero(host == "host-0"), np.flatnonzero(host == "host-1")
        of = np.arange(len(host))
        of[place] = source[: len(place)]
        for name in table.schema.names:
            if "." in name:
                table = table.set_column(table.schema.get_field_index(name), name, table[name].take(pa.array(of)))
        return table

    edit_features(run, copy)

    check = check_twins(run)

    assert check.fate is CheckOutcome.BROKEN
    assert "held_out_host-host-1: 100.0%" in check.words


def test_a_window_without_a_known_value_has_no_twin() -> None:
    tested, learnt = np.array([0, 0, 5, 7], np.uint64), np.array([0, 5], np.uint64)

    assert compute_twin_share(tested, learnt) == 0.5


def test_bundles_of_the_store_that_the_run_lacks_are_counted_and_named() -> None:
    names = [f"h0/{number}.tar.zst" for number in range(20)]

    check = check_store_remainder(names)

    assert check.fate is CheckOutcome.UNTESTED
    assert check.words.startswith("20 bundles of the store are not in this run: h0/0.tar.zst")
    assert check_store_remainder([]).fate is CheckOutcome.KEPT
    assert check_store_remainder(None).fate is CheckOutcome.UNTESTED


@CELLS
def test_a_model_that_ranks_a_window_among_the_others_is_caught(
    run: Path, cell: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank-normalising over the test batch: trained again it says the same, yet no window alone gets that answer."""
    model_class = registry.load_model_class("gbt")
    honest = model_class._predict_proba

    def ranked(self: PhaseModel, x: np.ndarray) -> np.ndarray:
        order = np.argsort(np.argsort(np.nan_to_num(x), axis=0), axis=0) / max(1, len(x))
        return honest(self, np.ascontiguousarray(order, np.float32))

    monkeypatch.setattr(model_class, "_predict_proba", ranked)
    sets = load(run, cell.recipe, cell.fold)
    put_model(run, cell, fit_model(registry.create("gbt"), sets), sets)

    assert "asked in halves" in check_predictions(run).words


def test_what_a_checkpoint_says_of_its_fold_is_compared_for_every_experiment(run: Path) -> None:
    folder = SECOND.folder(run)
    header, files = checkpoint.read_checkpoint(folder)
    checkpoint.write_checkpoint(
        folder, msgspec.structs.replace(header, trained_on={**header.trained_on, "test": "0" * 64}), files
    )
    edit_predictions(run, SECOND, lambda table: table)

    check = check_predictions(run)

    assert check.fate is CheckOutcome.BROKEN
    assert "it learnt from test windows" in check.words


def test_a_part_that_its_fold_does_not_have_is_caught(run: Path) -> None:
    def add(table: pa.Table) -> pa.Table:
        other = pa.array(["train"] * table.num_rows)
        return pa.concat_tables([table, table.set_column(table.schema.get_field_index("part"), "part", other)])

    edit_predictions(run, SECOND, add)

    assert "has predictions of train" in check_predictions(run).words
