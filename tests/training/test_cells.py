"""Training: files of an experiment, what is trained again, and that no test window reaches a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tests.factories.synthetic_runs import World, edit_features, write_run

from phasewatch.artifacts import EXPERIMENT_PREDICTIONS_FILE, PREDICTIONS_FILE
from phasewatch.binning.storage import open_bins
from phasewatch.dataset import load, read_fold, write_splits
from phasewatch.dataset.live_windows import compute_live_digest, iter_live_windows, list_live_windows
from phasewatch.errors import UsageError
from phasewatch.models import registry
from phasewatch.models.alarm import AlarmKind, find_false_alarm_windows, fit_alarm_rule
from phasewatch.models.base import LabelledExamples
from phasewatch.models.checkpoint import read_header
from phasewatch.models.smoothing import LabelSequence, fit_filter
from phasewatch.splits import SplitPart
from phasewatch.training.experiment import Experiment, plan_experiments
from phasewatch.training.predictions import (
    PROBABILITY_COLUMNS,
    PredictionPart,
    build_predictions_schema,
    read_predictions,
)
from phasewatch.training.train import train_experiments

FOLD = "host-0"
KEYS = ("gbt", "cnn", "majority", "elapsed_time")  # one of each input kind, and both that no telemetry enters
COLUMNS = [
    "recipe",
    "fold",
    "threat",
    "model",
    "table",
    "filter",
    "seed",
    "part",
    "role",
    "agent",
    "episode_id",
    "session",
    "host_id",
    "profile",
    "sample_name",
    "sample_kind",
    "origin",
    "t_center_ns",
    "purity",
    "flags",
    "y_true",
    "y_pred",
    "p_clean",
    "p_armed",
    "p_infecting",
    "p_active",
    "p_dormant",
]


def cells(models: tuple[str, ...] = KEYS, fold: str = FOLD) -> tuple[Experiment, ...]:
    return tuple(Experiment(recipe="held_out_host", fold=fold, threat="realistic", model=m) for m in models)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("train") / "run", World(windows=8))
    write_splits(run, "held_out_host")
    train_experiments(run, cells(), workers=1)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def checkpoint(run: Path, model: str) -> dict[str, bytes]:
    folder = cells((model,))[0].folder(run)
    return {n: d for n, d in contents(folder).items() if n not in ("cell.json", "predictions.parquet")}


def test_the_grid_crosses_folds_models_and_seeds(trained: Path) -> None:
    fold = read_fold(trained, "held_out_host", FOLD)

    assert plan_experiments([fold], models=("gbt", "majority"), seeds=(1, 0)) == (
        Experiment(recipe="held_out_host", fold=FOLD, threat="realistic", model="gbt", seed=0),
        Experiment(recipe="held_out_host", fold=FOLD, threat="realistic", model="gbt", seed=1),
        Experiment(recipe="held_out_host", fold=FOLD, threat="realistic", model="majority", seed=0),
        Experiment(recipe="held_out_host", fold=FOLD, threat="realistic", model="majority", seed=1),
    )


def test_experiment_writes_a_checkpoint_and_predictions(trained: Path) -> None:
    folder = trained / "models/held_out_host/host-0/realistic/gbt/raw-s0"

    assert sorted(p.name for p in folder.iterdir()) == [
        "cell.json",
        "checkpoint.json",
        "predictions.parquet",
        "weights.safetensors",
    ]


def test_predictions_have_the_columns_of_the_format_and_each_window_once(trained: Path) -> None:
    table = pq.read_table(trained / PREDICTIONS_FILE)
    sets = load(trained, "held_out_host", FOLD)
    once = len(sets.val_b) + len(sets.test) + len(sets.soak)
    every_five = table.filter(pc.is_in(table["part"], pa.array(["val_b", "test", "soak"])))
    filters = every_five.group_by(["model", "filter"]).aggregate([([], "count_all")]).to_pylist()

    assert table.column_names == COLUMNS == build_predictions_schema().names
    assert {(row["model"], row["filter"]): row["count_all"] for row in filters} == {
        **{(model, "none"): once for model in KEYS},
        **{(model, "phase"): once for model in ("gbt", "cnn")},
        **{(model, "schedule"): len(sets.test) for model in ("gbt", "cnn")},
    }
    assert (
        pc.count_distinct(
            pc.binary_join_element_wise(
                table["model"],
                table["filter"],
                table["part"],
                table["episode_id"],
                table["t_center_ns"].cast("string"),
                "/",
            )
        ).as_py()
        == table.num_rows
    )
    assert set(table["part"].to_pylist()) == set(PredictionPart) - {PredictionPart.IDLE}  # no baseline was recorded
    assert set(table["agent"].to_pylist()) == {"on", "off"}


def test_the_decision_is_the_likeliest_phase_of_the_same_row(trained: Path) -> None:
    table = pq.read_table(trained / PREDICTIONS_FILE)
    p = np.column_stack([table[n].to_numpy() for n in PROBABILITY_COLUMNS])

    assert p.argmax(axis=1).tolist() == table["y_pred"].to_pylist()


def test_predictions_are_those_of_the_stored_checkpoint(trained: Path) -> None:
    model = registry.load(cells(("gbt",))[0].folder(trained))
    test = load(trained, "held_out_host", FOLD).test
    table = pq.read_table(cells(("gbt",))[0].folder(trained) / "predictions.parquet")
    stored = table.filter(pc.and_(pc.equal(table["part"], "test"), pc.equal(table["filter"], "none")))

    assert model.predict_proba(test.inputs).astype(np.float32)[:, 0].tolist() == stored["p_clean"].to_pylist()


def test_the_temperature_is_that_of_validation_b_and_the_header_says_what_was_learnt_from(trained: Path) -> None:
    header = read_header(cells(("gbt",))[0].folder(trained))
    sets = load(trained, "held_out_host", FOLD)

    assert header.temperature != 1.0
    parts = {"train": sets.train, "val_a": sets.val_a, "val_b": sets.val_b}
    assert header.trained_on.items() >= {name: part.examples.sha256() for name, part in parts.items()}.items()


def test_filtered_rows_and_thresholds_are_those_of_the_checkpoint(trained: Path) -> None:
    header = read_header(cells(("gbt",))[0].folder(trained))
    sets = load(trained, "held_out_host", FOLD)
    table = pq.read_table(cells(("gbt",))[0].folder(trained) / "predictions.parquet")
    stored = table.filter(pc.and_(pc.equal(table["part"], "test"), pc.equal(table["filter"], "phase")))
    plain = registry.load(cells(("gbt",))[0].folder(trained)).predict_proba(sets.test.inputs)
    track = sets.test.label_sequence

    assert header.filter is not None
    assert [(rule.kind, rule.stride_s) for rule in header.alarms] == [(k, s) for s in (5, 1) for k in AlarmKind]
    smoothed = header.filter.run(plain, track.episode_index, track.t_center_ns).astype(np.float32)
    assert np.array_equal(smoothed[:, 0], stored["p_clean"].to_numpy())
    spared = sets.soak.take(sets.calibration_soak)
    quiet = int(
        find_false_alarm_windows(LabelSequence.concatenate([sets.val_b.label_sequence, spared.label_sequence])).sum()
    )
    assert header.alarms[0].vm_hours == pytest.approx(quiet * 5 / 3600, abs=1e-6)
    assert header.trained_on["decide_val"] == sets.val_b.examples.sha256()
    assert header.trained_on["decide_soak"] == spared.examples.sha256()


def test_filter_and_alarm_are_fitted_on_validation_b_and_never_on_what_stopped_the_training(trained: Path) -> None:
    header = read_header(cells(("gbt",))[0].folder(trained))
    model, sets = registry.load(cells(("gbt",))[0].folder(trained)), load(trained, "held_out_host", FOLD)
    spared = sets.soak.take(sets.calibration_soak)
    chosen = registry.create("gbt", settings=header.config).fit(sets.train.examples, sets.val_a.examples)
    selection = chosen.calibrate(sets.val_b.examples)
    said = [selection.predict_proba(sets.val_b.inputs), model.predict_proba(spared.inputs)]

    assert header.filter == fit_filter(sets.train.label_sequence, sets.val_b.label_sequence, said[0])
    assert header.filter != fit_filter(
        sets.train.label_sequence, sets.val_a.label_sequence, selection.predict_proba(sets.val_a.inputs)
    )
    heard = LabelSequence.concatenate([sets.val_b.label_sequence, spared.label_sequence])
    assert header.alarms[:2] == tuple(
        fit_alarm_rule(np.concatenate(said), heard, kind=kind, stride_s=5) for kind in AlarmKind
    )


def test_alarms_of_every_second_are_fitted_to_the_same_episodes(trained: Path) -> None:
    header = read_header(cells(("gbt",))[0].folder(trained))
    model, sets = registry.load(cells(("gbt",))[0].folder(trained)), load(trained, "held_out_host", FOLD)
    spared = sets.soak.take(sets.calibration_soak)
    chosen = registry.create("gbt", settings=header.config).fit(sets.train.examples, sets.val_a.examples)
    selection = chosen.calibrate(sets.val_b.examples)
    parts = [list_live_windows(trained, part.windows.episodes) for part in (sets.val_b, spared)]
    p = [
        asked.predict_proba(one.inputs)
        for asked, part in zip((selection, model), parts, strict=True)
        for one in iter_live_windows(trained, part, sets.train.inputs.spec)
    ]
    labels = LabelSequence.concatenate([part.label_sequence for part in parts])

    assert header.alarms[2:] == tuple(
        fit_alarm_rule(np.concatenate(p), labels, kind=kind, stride_s=1) for kind in AlarmKind
    )
    for name, part in zip(("decide_val_1s", "decide_soak_1s"), parts, strict=True):
        assert header.trained_on[name] == compute_live_digest(trained, part, sets.train.inputs.spec)
        assert header.trained_with[name] == len(part)


def test_predictions_have_the_windows_of_every_second_of_models_with_alarms(trained: Path) -> None:
    table = pq.read_table(trained / PREDICTIONS_FILE)
    live = table.filter(pc.match_substring_regex(table["part"], "_1s$"))
    sets = load(trained, "held_out_host", FOLD)
    parts = {"val_b_1s": sets.val_b, "test_1s": sets.test, "soak_1s": sets.soak}
    counts = live.group_by(["model", "part", "filter"]).aggregate([([], "count_all")]).to_pylist()

    assert {(row["model"], row["part"], row["filter"]): row["count_all"] for row in counts} == {
        (model, part, "none"): len(list_live_windows(trained, windows.windows.episodes))
        for model in ("gbt", "cnn")
        for part, windows in parts.items()
    }


def test_validation_rows_are_the_selection_models_and_test_rows_the_final_models(trained: Path) -> None:
    (cell,) = cells(("gbt",))
    sets, final = load(trained, "held_out_host", FOLD), registry.load(cell.folder(trained))
    chosen = registry.create("gbt").fit(sets.train.examples, sets.val_a.examples).calibrate(sets.val_b.examples)
    table = read_predictions(cell.folder(trained) / EXPERIMENT_PREDICTIONS_FILE)

    for part, model, windows in (("val_b", chosen, sets.val_b), ("test", final, sets.test)):
        rows = table.filter((pc.field("part") == part) & (pc.field("filter") == "none"))
        stored = np.column_stack([rows[name].to_numpy() for name in PROBABILITY_COLUMNS])
        assert np.abs(stored - model.predict_proba(windows.inputs)).max() < 1e-6
    parts = [sets.train.examples, sets.val_a.examples, sets.val_b.examples]
    assert final.trained_on["refit"] == LabelledExamples.concatenate(parts).sha256()


def test_soak_of_the_test_host_is_not_used_for_thresholds(trained: Path) -> None:
    sets = load(trained, "held_out_host", FOLD)
    spared = sets.soak.take(sets.calibration_soak)

    assert FOLD in {e.host_id for e in sets.soak.windows.episodes}
    assert {e.host_id for e in spared.windows.episodes} == {"host-1", "host-2", "host-3"}


def test_finished_experiment_is_kept_until_an_input_changes(run: Path) -> None:
    before = contents(run)
    assert len(train_experiments(run, cells(), workers=1).kept) == len(KEYS)
    assert contents(run) == before

    (cells(("majority",))[0].folder(run) / "model.json").write_text("[]")
    report = train_experiments(run, cells(), workers=1)

    assert [c.model for c in report.trained] == ["majority"]
    assert contents(run) == before


def test_experiment_with_a_damaged_file_is_trained_again(run: Path) -> None:
    before = contents(run)
    done = cells(("majority",))[0].folder(run) / "cell.json"
    done.write_bytes(done.read_bytes().replace(b"majority", b"maj\xffrity"))

    report = train_experiments(run, cells(), workers=1)

    assert [c.model for c in report.trained] == ["majority"]
    assert contents(run) == before


def test_interrupted_experiment_is_trained_again_to_the_same_bytes(run: Path) -> None:
    before = contents(run)
    folder = cells(("gbt",))[0].folder(run)
    (folder / "cell.json").unlink()
    (folder / "predictions.parquet").unlink()
    (folder / ".model.ubj.0123456789ab.tmp").write_bytes(b"half")

    train_experiments(run, cells(), workers=1)

    assert contents(run) == before


def test_two_workers_write_the_same_bytes_as_one(run: Path) -> None:
    before = contents(run)
    shutil.rmtree(run / "models")
    (run / PREDICTIONS_FILE).unlink()

    train_experiments(run, cells(), workers=2)

    assert contents(run) == before


def test_merge_has_finished_experiments_of_earlier_calls_and_no_stale_ones(run: Path) -> None:
    train_experiments(run, cells(("majority",), "host-1"), workers=1)
    assert set(pq.read_table(run / PREDICTIONS_FILE)["fold"].to_pylist()) == {"host-0", "host-1"}

    edit_features(run, lambda t: t.slice(1))
    write_splits(run, "held_out_host")
    report = train_experiments(run, cells(("majority",)), workers=1)

    assert report.merged == 1
    assert set(pq.read_table(run / PREDICTIONS_FILE)["model"].to_pylist()) == {"majority"}


def poison_features(table: pa.Table, rows: np.ndarray) -> pa.Table:
    for i, name in enumerate(table.column_names):
        if name.endswith(".mean"):
            values = table[name].to_numpy().copy()
            values[rows] = 1e9
            table = table.set_column(i, name, pa.array(values))
    return table


def poison_grids(run: Path, tested: set[str]) -> None:
    rows = open_bins(run / "grids").rows
    bins = np.load(run / "grids" / "grids.npy")
    for row in rows:
        if row.episode_id in tested:
            bins[row.offset : row.offset + row.n_bins] = 1e9
    np.save(run / "grids" / "grids.npy", bins)


def poison_labels(table: pa.Table, rows: np.ndarray) -> pa.Table:
    phase = table["phase"].to_numpy().copy()
    phase[rows] = 4 - phase[rows]
    return table.set_column(table.schema.get_field_index("phase"), "phase", pa.array(phase))


@pytest.mark.parametrize(
    "poison", [pytest.param(poison_features, id="features"), pytest.param(poison_labels, id="labels")]
)
def test_poisoning_the_test_set_changes_no_byte_of_a_checkpoint(
    run: Path, poison: Callable[[pa.Table, np.ndarray], pa.Table]
) -> None:
    before = {m: checkpoint(run, m) for m in KEYS}
    tested = set(read_fold(run, "held_out_host", FOLD).ids(SplitPart.TEST))
    edit_features(run, lambda t: poison(t, np.array([e in tested for e in t["episode_id"].to_pylist()])))
    poison_grids(run, tested)
    write_splits(run, "held_out_host")

    report = train_experiments(run, cells(), workers=1)

    assert len(report.trained) == len(KEYS)
    assert {m: checkpoint(run, m) for m in KEYS} == before


def test_changed_train_windows_change_the_checkpoint(run: Path) -> None:
    before = checkpoint(run, "gbt")
    learnt = set(read_fold(run, "held_out_host", FOLD).ids(SplitPart.TRAIN))
    edit_features(run, lambda t: poison_labels(t, np.array([e in learnt for e in t["episode_id"].to_pylist()])))

    train_experiments(run, cells(("gbt",)), workers=1)

    assert checkpoint(run, "gbt") != before


def test_the_order_of_rows_changes_no_byte_of_a_checkpoint_or_prediction(run: Path) -> None:
    before = {m: checkpoint(run, m) for m in KEYS}
    predictions = (run / PREDICTIONS_FILE).read_bytes()
    order = np.random.default_rng(0).permutation(pq.read_metadata(run / "features_window_v2.parquet").num_rows)
    edit_features(run, lambda t: t.take(pa.array(order)))

    assert len(train_experiments(run, cells(), workers=1).trained) == len(KEYS)
    assert {m: checkpoint(run, m) for m in KEYS} == before
    assert (run / PREDICTIONS_FILE).read_bytes() == predictions


def test_unknown_model_is_refused_before_training(run: Path) -> None:
    with pytest.raises(UsageError, match="did you mean gbt"):
        train_experiments(run, cells(("gtb",)), workers=1)
