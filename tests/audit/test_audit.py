"""The audit: clean runs are not accused, and each way of cheating that we could think of is caught."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tests.factories.stores import write_store
from tests.factories.tampered_runs import edit_predictions, refit, seal

from phasewatch.artifacts import EXPERIMENT_PREDICTIONS_FILE, PREDICTIONS_FILE
from phasewatch.audit.checks import AuditCheck, AuditReport, CheckOutcome
from phasewatch.audit.models import check_permuted_labels, check_predictions, check_retrained, choose_experiments
from phasewatch.audit.run import check_disjoint, check_metrics, read_audit
from phasewatch.audit.splits import find_fold_faults
from phasewatch.dataset import FoldData, read_fold
from phasewatch.dataset.split_files import read_split_episodes
from phasewatch.evaluation.alarms import AlarmSimulation, PredictionParts, simulate_alarms
from phasewatch.evaluation.evaluate import compute_metrics, read_timelines
from phasewatch.evaluation.headline import HeadlineVerdict, read_headline, render_headline
from phasewatch.evaluation.predictions import parse_prediction_groups
from phasewatch.models import checkpoint, registry
from phasewatch.models.alarm import AlarmKind, find_alarm_rule
from phasewatch.models.base import LabelledExamples, ModelInputs, PhaseModel
from phasewatch.pipeline import runner, stages
from phasewatch.splits import Fold, SplitEpisode, SplitPart
from phasewatch.splits.fold import compute_fold_digest, parse_fold, render_fold
from phasewatch.training.experiment import Experiment
from phasewatch.training.predictions import read_predictions
from phasewatch.training.train import FittedModel, fit_model, train_experiments

MODELS = ("gbt", "cnn", "majority", "elapsed_time")
RECIPES = ("held_out_host", "deploy")
CELL = Experiment(recipe="held_out_host", fold="h0", threat="realistic", model="gbt")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("audited") / "store", hosts=3, sessions=6)


@pytest.fixture(scope="module")
def clean(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runner.run_pipeline(
        stages.RunSettings(store=store, run=tmp_path_factory.mktemp("runs") / "clean", models=MODELS, recipes=RECIPES)
    ).run


@pytest.fixture
def run(clean: Path, tmp_path: Path) -> Path:
    return shutil.copytree(clean, tmp_path / "run")


def fate_of(audit: AuditReport, name: str) -> CheckOutcome:
    return next(check.fate for check in audit.checks if check.name == name)


def test_a_clean_run_keeps_every_promise_and_the_file_says_so(run: Path, store: Path) -> None:
    audit = stages.audit(runner.read_settings(run))

    # Of a store without idle machines and of one length, some questions for leaks and shortcuts cannot be asked.
    may_be_untested = ("leak-", "splices", "load", "idle")
    asked = [
        check
        for check in audit.checks
        if not (check.name.startswith(may_be_untested) and check.fate is CheckOutcome.UNTESTED)
    ]
    assert [check for check in asked if check.fate is not CheckOutcome.KEPT] == []
    assert {check.name for check in asked} > {"leak-phase-from-elapsed-time", "leak-host-from-one-feature"}
    assert read_audit(run) == audit
    assert read_headline(run).audit == HeadlineVerdict(passes=True)


def test_bundles_that_came_later_accuse_nobody(run: Path, store: Path, tmp_path: Path) -> None:
    later = shutil.copytree(store, tmp_path / "later")
    bundle = next((later / "h0").glob("*.zst"))
    shutil.copy(bundle, later / "h0" / "00000000-0000-7000-8000-000000000000.tar.zst")

    audit = stages.audit(runner.read_settings(run, store=later))

    assert fate_of(audit, "remade-from-bundles") is CheckOutcome.KEPT


def test_without_its_store_an_audit_says_what_it_could_not_test(run: Path, tmp_path: Path) -> None:
    audit = stages.audit(runner.read_settings(run, store=tmp_path / "gone"))

    assert fate_of(audit, "remade-from-bundles") is CheckOutcome.UNTESTED
    assert audit.passes
    untested = [check for check in audit.checks if check.fate is CheckOutcome.UNTESTED]
    assert audit.summary == f"the run keeps its promises, but for {len(untested)} that could not be tested"


def test_an_audit_of_other_predictions_no_longer_counts(run: Path) -> None:
    stages.audit(runner.read_settings(run))
    edit_predictions(run, CELL, lambda table: table.slice(0, table.num_rows - 1))

    assert read_audit(run) is None


def test_edited_features_are_caught(run: Path) -> None:
    path = run / "features_window_v2.parquet"
    table = pq.read_table(path)
    leaked = pa.array(table["phase"].to_numpy().astype(np.float32))
    column = table.schema.get_field_index("proc.cpu_user.mean")
    pq.write_table(table.set_column(column, "proc.cpu_user.mean", leaked), path)

    assert fate_of(stages.audit(runner.read_settings(run)), "remade-from-bundles") is CheckOutcome.BROKEN


def test_labels_made_from_elapsed_time_are_caught(run: Path) -> None:
    path = run / "features_window_v2.parquet"
    table = pq.read_table(path)
    late = pc.cast(pc.greater(table["t_center_s"], 20.0), pa.int8())
    pq.write_table(table.set_column(table.schema.get_field_index("phase"), "phase", late), path)

    assert fate_of(stages.audit(runner.read_settings(run)), "remade-from-bundles") is CheckOutcome.BROKEN


@pytest.mark.parametrize("column", ["proc.cpu_user.mean", "phase"])
def test_a_feature_or_a_label_of_the_next_window_breaks_the_audit(run: Path, column: str) -> None:
    path = run / "features_window_v2.parquet"
    table = pq.read_table(path)
    values = table[column].to_numpy()
    ahead = pa.array(np.append(values[1:], values[-1:]), type=table.schema.field(column).type)
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, ahead), path)

    assert fate_of(stages.audit(runner.read_settings(run)), "remade-from-bundles") is CheckOutcome.BROKEN


@pytest.mark.parametrize("model", ["elapsed_time", "majority"])
def test_predictions_of_another_model_break_the_audit(run: Path, model: str) -> None:
    other = pq.read_table(replace(CELL, model=model).folder(run) / EXPERIMENT_PREDICTIONS_FILE)

    def swap(table: pa.Table) -> pa.Table:
        both = pc.is_in(table["part"], other["part"].unique())
        rest = table.filter(pc.invert(both))
        named = other.set_column(other.schema.get_field_index("model"), "model", pa.array(["gbt"] * len(other)))
        return pa.concat_tables([named.select(table.schema.names).cast(table.schema), rest])

    edit_predictions(run, CELL, swap)

    assert check_predictions(run).fate is CheckOutcome.BROKEN


def test_a_changed_bundle_is_caught(run: Path, store: Path, tmp_path: Path) -> None:
    other = shutil.copytree(store, tmp_path / "other")
    bundle = next((other / "h0").glob("*.zst"))
    bundle.write_bytes(bundle.read_bytes()[:-1])

    audit = stages.audit(runner.read_settings(run, store=other))

    assert fate_of(audit, "remade-from-bundles") is CheckOutcome.BROKEN


def edit_fold(run: Path, change: Callable[[Fold], Fold]) -> None:
    path = run / "splits" / "held_out_host-h0.json"
    fold = change(parse_fold(path.read_bytes(), file=""))
    path.write_bytes(render_fold(replace(fold, sha256=compute_fold_digest(fold))))


def test_an_episode_of_the_test_host_in_train_is_caught(run: Path) -> None:
    tested = read_fold(run, "held_out_host", "h0").ids(SplitPart.TEST)[0]
    edit_fold(run, lambda fold: replace(fold, episodes={**fold.episodes, tested: SplitPart.TRAIN}))

    assert check_disjoint(run, run).fate is CheckOutcome.BROKEN


def episode(number: int, **more: object) -> SplitEpisode:
    settings: dict[str, object] = {
        "episode_id": f"e{number}", "host_id": f"h{number}", "profile": "benign", "sample_name": "idle",
        "sample_group": number % 4, "session": f"s{number}", "role": "lab", "agent": False, "plan_seed": number,
        "proc_sketch": (number * 10, number * 10 + 1), "started_wall_ns": number, "phases": (),
    }  # fmt: skip
    return SplitEpisode(**{**settings, **more})  # type: ignore[arg-type]


CUT = {"e1": SplitPart.TRAIN, "e2": SplitPart.VAL_A, "e3": SplitPart.TEST}


@pytest.mark.parametrize(
    ("recipe", "third", "words"),
    [
        ("held_out_host", episode(3, host_id="h1"), "host h1"),
        ("held_out_sample", episode(3, sample_group=1), "sample group 1"),
        ("held_out_both", episode(3, sample_group=1), "sample group 1"),
        ("held_out_time", episode(3, started_wall_ns=1), "had not ended"),
        ("held_out_profile", episode(3), "profile benign"),
        ("held_out_sample", episode(3, host_id="h1", plan_seed=1), "plan seed h1/1"),
        ("held_out_host", episode(3, proc_sketch=(10, 99, 98)), "near-duplicate e1"),
        ("held_out_sample", episode(3, host_id="h1", session="s1"), "session h1/s1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_recipe_holds_out_and_was_learnt_from_is_named(recipe: str, third: SplitEpisode, words: str) -> None:
    fold = Fold(
        version=1, recipe=recipe, fold="x", leaky=False, validation="sessions", episodes=CUT, embargoed={}, coverage=(),
        untested_profiles=(), untested_phases=(), asserted=(), sha256="",
    )  # fmt: skip
    episodes = {e.episode_id: e for e in (episode(1), episode(2), third)}

    assert any(words in fault for fault in find_fold_faults(fold, episodes))


def test_a_session_in_train_and_validation_is_caught() -> None:
    fold = Fold(
        version=1, recipe="held_out_host", fold="x", leaky=False, validation="sessions", episodes=CUT, embargoed={},
        coverage=(), untested_profiles=(), untested_phases=(), asserted=(), sha256="",
    )  # fmt: skip
    episodes = {e.episode_id: e for e in (episode(1), episode(2, host_id="h1", session="s1"), episode(3))}

    assert find_fold_faults(fold, episodes) == ["held_out_host-x: session h1/s1 is in train and in val_a"]


def test_a_duplicate_under_a_new_id_is_caught(run: Path) -> None:
    fold = read_fold(run, "held_out_host", "h0")
    episodes = {e.episode_id: e for e in read_split_episodes(run)}
    tested, learnt = fold.ids(SplitPart.TEST)[0], fold.ids(SplitPart.TRAIN)[0]
    episodes[learnt] = replace(episodes[learnt], proc_sketch=episodes[tested].proc_sketch)

    assert any("near-duplicate" in fault for fault in find_fold_faults(fold, episodes))


def repeated(run: Path) -> AuditCheck:
    return check_retrained(run, [cell for cell in choose_experiments(run) if cell.model == CELL.model])


def test_training_on_the_test_set_is_caught(run: Path) -> None:
    refit(run, CELL, lambda model, sets: fit_model(model, replace(sets, extra=sets.test.examples)))

    assert repeated(run).fate is CheckOutcome.BROKEN


def test_choosing_by_the_test_set_is_caught(run: Path) -> None:
    refit(run, CELL, lambda model, sets: fit_model(model, replace(sets, val_a=sets.test)))

    assert repeated(run).fate is CheckOutcome.BROKEN


def test_calibrating_on_the_test_set_is_caught(run: Path) -> None:
    def cheat(model: PhaseModel, sets: FoldData) -> FittedModel:
        fitted = fit_model(model, replace(sets, val_b=sets.test))
        fitted.model.temperature *= 1.5
        return fitted

    refit(run, CELL, cheat)

    assert repeated(run).fate is CheckOutcome.BROKEN


def test_scaling_with_the_test_set_is_caught(run: Path) -> None:
    def cheat(model: PhaseModel, sets: FoldData) -> FittedModel:
        shifted = ModelInputs(x=sets.train.x - np.nanmean(sets.test.x, axis=0), spec=sets.train.inputs.spec)
        return fit_model(model, replace(sets, train=replace(sets.train, inputs=shifted)))

    refit(run, CELL, cheat)

    assert repeated(run).fate is CheckOutcome.BROKEN


def test_other_windows_than_the_folds_are_caught(run: Path) -> None:
    folder = CELL.folder(run)
    header, files = checkpoint.read_checkpoint(folder)
    other = {**header.trained_on, "train": sha256(b"other").hexdigest()}
    checkpoint.write_checkpoint(folder, msgspec.structs.replace(header, trained_on=other), files)
    seal(run, CELL)

    assert repeated(run).fate is CheckOutcome.BROKEN


@pytest.mark.parametrize("part", ["decide_val", "decide_soak", "decide_val_1s", "decide_soak_1s"])
def test_thresholds_set_on_other_windows_are_caught(run: Path, part: str) -> None:
    folder = CELL.folder(run)
    header, files = checkpoint.read_checkpoint(folder)
    other = {**header.trained_on, part: sha256(b"other").hexdigest()}
    checkpoint.write_checkpoint(folder, msgspec.structs.replace(header, trained_on=other), files)
    seal(run, CELL)

    assert repeated(run).fate is CheckOutcome.BROKEN


def test_edited_probabilities_are_caught(run: Path) -> None:
    def truth_told(table: pa.Table) -> pa.Table:
        sure = np.eye(5, dtype=np.float32)[table["y_true"].to_numpy()]
        for i, name in enumerate(n for n in table.schema.names if n.startswith("p_")):
            table = table.set_column(
                table.schema.get_field_index(name), name, pa.array(np.ascontiguousarray(sure[:, i]))
            )
        return table.set_column(table.schema.get_field_index("y_pred"), "y_pred", table["y_true"])

    edit_predictions(run, CELL, truth_told)

    assert check_predictions(run).fate is CheckOutcome.BROKEN


def test_edited_decisions_are_caught(run: Path) -> None:
    edit_predictions(run, CELL, lambda t: t.set_column(t.schema.get_field_index("y_pred"), "y_pred", t["y_true"]))

    assert check_predictions(run).fate is CheckOutcome.BROKEN


def test_edited_rows_of_the_filter_are_caught(run: Path) -> None:
    def calm(table: pa.Table) -> pa.Table:
        edited = pc.and_(pc.equal(table["filter"], "phase"), pc.equal(table["part"], "test"))
        for name in ("p_active", "p_infecting"):
            p = pc.if_else(edited, pc.multiply(table[name], pa.scalar(0.5, pa.float32())), table[name])
            table = table.set_column(table.schema.get_field_index(name), name, p)
        return table

    edit_predictions(run, CELL, calm)

    assert "filter phase" in check_predictions(run).words


def test_left_out_windows_are_caught(run: Path) -> None:
    edit_predictions(run, CELL, lambda table: table.filter(pc.equal(table["y_true"], table["y_pred"])))

    assert check_predictions(run).fate is CheckOutcome.BROKEN


def test_windows_of_trained_episodes_among_the_tested_ones_are_caught(run: Path) -> None:
    """What a split by windows would do."""
    learnt = read_fold(run, "held_out_host", "h0").ids(SplitPart.TRAIN)[0]

    def mix(table: pa.Table) -> pa.Table:
        ids = [learnt if i % 2 else e for i, e in enumerate(table["episode_id"].to_pylist())]
        return table.set_column(table.schema.get_field_index("episode_id"), "episode_id", pa.array(ids))

    edit_predictions(run, CELL, mix)

    assert check_predictions(run).fate is CheckOutcome.BROKEN


def test_edited_numbers_are_caught(run: Path) -> None:
    path = run / "metrics_v3.json"
    metrics = json.loads(path.read_bytes())
    metrics["metrics"][0]["value"] += 0.1
    path.write_text(json.dumps(metrics))

    assert check_metrics(run).fate is CheckOutcome.BROKEN


def test_predictions_without_a_checkpoint_are_caught(run: Path) -> None:
    table = pq.read_table(run / PREDICTIONS_FILE)
    renamed = pa.array(["cnn"] * table.num_rows)
    other = table.set_column(table.schema.get_field_index("model"), "model", renamed)
    pq.write_table(pa.concat_tables([table, other]), run / PREDICTIONS_FILE)

    assert check_predictions(run).fate is CheckOutcome.BROKEN


OWN = """
from sklearn.tree import DecisionTreeClassifier
from phasewatch.models.adapters import TableAdapter
from phasewatch.models.registry import load_model_class

class Tree(TableAdapter):
    '''Keeps no weights.'''
    key = "tree"
    def make(self, seed):
        return DecisionTreeClassifier(max_depth=2, random_state=seed)

class Prior(load_model_class("majority")):
    '''Keeps its weights, which no checkpoint's text may bring back.'''
    key = "prior"
"""


def train_own(run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train models that are given as module:Class, as `train --model` does."""
    folder.mkdir()
    (folder / "brought_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(folder)
    train_experiments(run, [replace(CELL, model=f"brought_own:{name}") for name in ("Tree", "Prior")], workers=1)


def test_a_model_that_is_given_as_module_and_class_is_not_accused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_own(run, tmp_path / "own", monkeypatch)
    own = [cell for cell in choose_experiments(run) if ":" in cell.model]

    repeated, said = check_retrained(run, own), check_predictions(run)

    assert (repeated.fate, repeated.words) == (
        CheckOutcome.KEPT,
        "0 cells trained again, of 2 without weights the windows compared",
    )
    assert said.fate is CheckOutcome.KEPT
    assert said.words.endswith(", of 2 without weights the windows compared")


def test_a_model_whose_code_is_not_here_is_scored_and_its_predictions_are_untested(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_own(run, tmp_path / "own", monkeypatch)
    shutil.rmtree(tmp_path / "own")
    monkeypatch.delitem(sys.modules, "brought_own")
    importlib.invalidate_caches()

    said, scored = check_predictions(run), compute_metrics(run, resamples=20)

    assert said.fate is CheckOutcome.UNTESTED
    assert "model 'brought_own:Tree' cannot be imported" in said.words
    assert "put its folder on PYTHONPATH" in said.words
    assert {r.model for r in scored.metrics} >= {"brought_own:Tree", "gbt"}


def test_labels_that_were_shuffled_teach_nothing(run: Path) -> None:
    assert check_permuted_labels(run).fate is CheckOutcome.KEPT


class Peeks:
    """Sees the truth whatever it was taught: what a leak in the pipeline would make of any model."""

    def fit(self, train: LabelledExamples, val: LabelledExamples) -> Peeks:
        return self

    def predict(self, inputs: ModelInputs) -> np.ndarray:
        return inputs.x[:, inputs.spec.names.index("proc.cpu_user.mean")].astype(np.int64)


def test_who_scores_in_spite_of_shuffled_labels_has_the_truth_from_elsewhere(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run / "features_window_v2.parquet"
    table = pq.read_table(path)
    leaked = pa.array(table["phase"].to_numpy().astype(np.float32))
    pq.write_table(
        table.set_column(table.schema.get_field_index("proc.cpu_user.mean"), "proc.cpu_user.mean", leaked), path
    )
    monkeypatch.setattr(registry, "create", lambda *_, **__: Peeks())

    check = check_permuted_labels(run)

    assert check.fate is CheckOutcome.BROKEN
    assert "something other than the labels tells the phase" in check.words


def test_an_alarm_that_was_set_by_the_test_set_is_caught(run: Path) -> None:
    def cheat(model: PhaseModel, sets: FoldData) -> FittedModel:
        fitted = fit_model(model, sets)
        rule, *others = fitted.model.alarms
        theta = 0.25 if rule.theta > 0.5 else 0.75  # as another set of windows would have it
        fitted.model.alarms = (replace(rule, theta=theta), *others)
        return fitted

    refit(run, CELL, cheat)

    assert repeated(run).fate is CheckOutcome.BROKEN


@pytest.mark.parametrize(("stride_s", "ending"), [(5, ""), (1, "_1s")])
@pytest.mark.parametrize("kind", AlarmKind)
def test_the_operators_view_rings_by_the_rules_of_the_checkpoints(
    run: Path, kind: AlarmKind, stride_s: int, ending: str
) -> None:
    """Evaluation chooses them again from predictions alone, soak of other hosts included."""
    table = read_predictions(run / PREDICTIONS_FILE)
    recorded = read_timelines(run)
    of_part = {
        part: {b.key: b for b in parse_prediction_groups(table, {}, part=f"{part}{ending}")}
        for part in ("test", "val_b", "soak")
    }
    key = (CELL.recipe, CELL.threat, CELL.table, "none")
    test, val_b, soak = (of_part[part].get(key) for part in ("test", "val_b", "soak"))
    assert test is not None
    own = [s for s in test.predictions if s.model == CELL.model]
    parts = PredictionParts(test=test, val_b=val_b, soak=soak, stride_s=stride_s)

    lived = simulate_alarms(own, parts, recorded, kind=kind, agent=None)

    assert isinstance(lived, AlarmSimulation)
    cells = [replace(CELL, fold=s.fold) for s in own]
    headers = [checkpoint.read_checkpoint(c.folder(run))[0] for c in cells]
    assert list(lived.rules) == [find_alarm_rule(header.alarms, kind, stride_s) for header in headers]


def test_a_run_that_fails_its_audit_has_no_headline_on_its_page(run: Path) -> None:
    edit_predictions(run, CELL, lambda t: t.set_column(t.schema.get_field_index("y_pred"), "y_pred", t["y_true"]))
    stages.evaluate(runner.read_settings(run))
    stages.audit(runner.read_settings(run))

    headline = read_headline(run)
    assert headline.audit is not None
    assert not headline.audit.passes
    assert "predictions" in headline.audit.failed
    assert render_headline(headline).startswith("no headline: ")
    page = stages.build_report(runner.read_settings(run)).read_text()

    assert "failed its audit" in page or "audit" in page.partition("</h1>")[0]
    assert '<dl class="tiles">' not in page


@pytest.mark.soak
def test_each_leak_is_caught_on_one_run_and_they_are_counted(
    clean: Path, store: Path, tmp_path: Path, soak_row: Callable[..., None]
) -> None:
    caught = 0
    for name, leak in globals().items():
        if name.startswith("test_") and name.endswith("_caught"):
            given = {"run": tmp_path / name, "store": store, "tmp_path": tmp_path / f"{name}-beside"}
            if not inspect.signature(leak).parameters.keys() <= given.keys():
                continue  # has cases, which make test runs
            given["tmp_path"].mkdir()
            shutil.copytree(clean, given["run"])
            leak(**{k: given[k] for k in inspect.signature(leak).parameters})
            caught += 1
    soak_row("AuditReport", what="leaks injected", runs=caught, accused=caught)
    assert caught >= 12


@pytest.mark.soak
@pytest.mark.parametrize("first", range(0, 50, 10))
def test_fifty_clean_runs_are_not_accused(first: int, tmp_path: Path, soak_row: Callable[..., None]) -> None:
    from phasewatch.simulate import simulate

    accused = {}
    for seed in range(first, first + 10):
        store = tmp_path / f"store-{seed}"
        simulate(store, hosts=3, episodes=180, seed=seed, between_s=(60, 70))
        done = runner.run_pipeline(
            stages.RunSettings(store=store, run=tmp_path / f"run-{seed}", models=MODELS, recipes=RECIPES)
        )
        audit = stages.audit(runner.read_settings(done.run))
        if not audit.passes:
            accused[seed] = audit.failed_checks
        shutil.rmtree(store)
        shutil.rmtree(done.run)
    soak_row("AuditReport", what=f"clean runs, seeds {first} to {first + 9}", runs=10, accused=len(accused))
    assert accused == {}
