"""The whole way: a run resumes stage by stage, does nothing twice, and a kill leaves no trace in its products."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from tests.factories.stores import write_store
from tests.factories.trained_runs import write_trained_run

from phasewatch.artifacts import AUDIT_FILE
from phasewatch.errors import StoreError, UsageError
from phasewatch.evaluation.evaluate import evaluate_run
from phasewatch.pipeline import runner
from phasewatch.pipeline.stages import RunSettings
from phasewatch.simulate import simulate

QUICK = ("gbt", "majority", "elapsed_time")
RECIPES = ("held_out_host",)
NOT_PRODUCTS = {"run.json", ".sweep.json", ".lock"}


def products(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in NOT_PRODUCTS
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "store"
    simulate(path, hosts=3, episodes=150, seed=2, between_s=(60, 70))
    return path


@pytest.fixture(scope="module")
def done(store: Path, tmp_path_factory: pytest.TempPathFactory) -> runner.PipelineResult:
    return runner.run_pipeline(
        RunSettings(store=store, run=tmp_path_factory.mktemp("runs") / "a", models=QUICK, recipes=RECIPES)
    )


@pytest.mark.slow
def test_a_store_becomes_a_headline_and_a_page(done: runner.PipelineResult) -> None:
    assert done.headline.startswith("macro-F1 of phase, unseen host, realistic, gbt: 0.")
    assert done.headline.endswith("[simulated]")
    assert done.report.read_text().startswith("<!DOCTYPE html>")
    assert [name for name, _, _ in done.stages] == ["validate", "features", "split", "train", "evaluate", "report"]


@pytest.mark.slow
def test_run_again_it_does_nothing(store: Path, done: runner.PipelineResult) -> None:
    before = products(done.run)

    again = runner.run_pipeline(RunSettings(store=store, run=done.run, models=QUICK, recipes=RECIPES))

    assert again.is_unchanged
    assert again.headline == done.headline
    assert products(done.run) == before


@pytest.mark.slow
def test_a_lost_product_is_made_again_and_only_it(store: Path, done: runner.PipelineResult) -> None:
    before = products(done.run)
    (done.run / "metrics_v1.json").unlink()

    again = runner.run_pipeline(RunSettings(store=store, run=done.run, models=QUICK, recipes=RECIPES))

    made = [name for name, fate, _ in again.stages if fate == "made"]
    assert made == ["evaluate"]
    assert products(done.run) == before


@pytest.mark.slow
def test_killed_anywhere_and_run_again_the_products_are_the_same_bytes(
    store: Path, done: runner.PipelineResult, tmp_path: Path
) -> None:
    run = tmp_path / "b"
    command = [sys.executable, "-m", "phasewatch", "run", str(store), "--out", str(run), "--workers", "1"]
    command += ["--models", ",".join(QUICK), "--recipes", ",".join(RECIPES)]
    for patience_s in (0.7, 1.6, 2.6, 3.8):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(patience_s)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    runner.run_pipeline(RunSettings(store=store, run=run, workers=1, models=QUICK, recipes=RECIPES))

    assert products(run) == products(done.run)


def test_a_store_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no such store"):
        runner.run_pipeline(RunSettings(store=tmp_path / "none", run=tmp_path / "r"))


def test_another_stores_run_is_not_overwritten_but_a_store_may_move(
    store: Path, done: runner.PipelineResult, tmp_path: Path
) -> None:
    run, here, there = tmp_path / "run", tmp_path / "here", tmp_path / "there"
    shutil.copytree(done.run, run)
    shutil.copytree(store, here)
    settings = RunSettings(store=here, run=run, models=QUICK, recipes=RECIPES)

    with pytest.raises(UsageError, match=r"holds a run of .*; give this one a folder of its own"):
        runner.run_pipeline(settings)
    kept = json.loads((run / "run.json").read_text())["configuration"]["store"]
    (run / "run.json").write_text((run / "run.json").read_text().replace(kept, str(there)))  # which is not there

    assert runner.run_pipeline(settings).is_unchanged


def inputs(run: Path, stage: str, **asked: tuple[str, ...]) -> dict[str, str]:
    """What a stage says that it depends on."""
    settings = RunSettings(store=run, run=run, **asked)  # type: ignore[arg-type]
    return {s.name: s for s in runner.build_stages(settings, lambda *_: None)}[stage].inputs()


def test_scores_depend_on_every_file_that_they_were_computed_from(tmp_path: Path) -> None:
    run = write_trained_run(tmp_path / "run", threats=("realistic",))

    read = evaluate_run(run, resamples=50).inputs

    assert {"predictions_v1.parquet", "splits/held_out_host-host-0.json", "grids/index.parquet"} <= read.keys()
    assert read.items() <= inputs(run, "evaluate").items()


def test_training_depends_on_the_masks_and_on_the_code_of_a_model_that_is_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "my_guess.py"
    code.write_text("from phasewatch.models.baselines import Majority as Guess")
    monkeypatch.syspath_prepend(tmp_path)
    models = ("my_guess:Guess",)
    before = inputs(tmp_path, "train", models=models)

    assert inputs(tmp_path, "train", models=models, threats=("proc+tap",)) != before
    code.write_text("from phasewatch.models.baselines import Stratified as Guess")
    assert inputs(tmp_path, "train", models=models) != before


def test_a_page_is_written_anew_after_an_audit(tmp_path: Path) -> None:
    before = inputs(tmp_path, "report")
    (tmp_path / AUDIT_FILE).write_bytes(b"{}")

    assert inputs(tmp_path, "report") != before


def test_what_a_run_was_asked_for_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    asked = RunSettings(
        store=tmp_path, run=tmp_path, limit=7, include_degraded=False, seed=3, grid="full", models=("gbt",), trials=2
    )
    told = runner.build_configuration(asked)
    (tmp_path / "run.json").write_text(json.dumps({"stages": {}, "configuration": told}))

    found = runner.read_settings(tmp_path)

    assert {key: type(value) for key, value in told.items() if key in ("limit", "include_degraded", "models")} == {
        "limit": int, "include_degraded": bool, "models": tuple,
    }  # fmt: skip
    assert "run" not in told
    names = ("store", "limit", "include_degraded", "seed", "grid")
    assert [getattr(found, name) for name in names] == [getattr(asked, name) for name in names]


def test_settings_that_an_older_version_wrote_as_text_are_read(tmp_path: Path) -> None:
    told = {"store": str(tmp_path), "limit": "7", "include_degraded": "False", "seed": "3"}
    (tmp_path / "run.json").write_text(json.dumps({"stages": {}, "configuration": told}))

    found = runner.read_settings(tmp_path)

    assert (found.limit, found.include_degraded, found.seed) == (7, False, 3)


def test_a_model_that_fails_costs_a_run_no_other_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run_own.py").write_text(
        "from pathlib import Path\n"
        "from phasewatch.models.baselines import Majority\n"
        "class Later(Majority):\n"
        "    key = 'later'\n"
        "    def _fit(self, train, val):\n"
        "        if not Path(__file__).with_name('ready').exists():\n"
        "            raise RuntimeError('not yet')\n"
        "        super()._fit(train, val)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = RunSettings(
        store=write_store(tmp_path / "store"), run=tmp_path / "run", workers=1, models=("majority", "run_own:Later"),
        recipes=RECIPES,
    )  # fmt: skip

    first = runner.run_pipeline(settings)
    log = json.loads((tmp_path / "run" / "run.json").read_bytes())
    (tmp_path / "ready").touch()
    again = runner.run_pipeline(settings)

    assert {failed.cell.model for failed in first.failed} == {"run_own:Later"}
    assert first.report.is_file()
    assert "name" not in log["host"]
    assert again.failed == ()
    assert [name for name, fate, _ in again.stages if fate == "made"] == ["train", "evaluate", "report"]
