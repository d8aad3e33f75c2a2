"""The pipeline: unchanged stages are kept, an interrupted run is resumed, and a kill does not change the products."""

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

import msgspec
import pytest
from tests.factories.stores import write_store
from tests.factories.trained_runs import write_trained_run

from phasewatch.artifacts import AUDIT_FILE, METRICS_FILE
from phasewatch.errors import RunError, StoreError, UsageError
from phasewatch.evaluation.evaluate import evaluate_run
from phasewatch.evaluation.headline import read_headline, render_headline
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


def made(result: runner.PipelineResult) -> list[str]:
    """The stages that were run, not kept."""
    return [stage.name for stage in result.stages if stage.outcome is runner.StageOutcome.MADE]


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
def test_pipeline_writes_a_headline_and_a_report(done: runner.PipelineResult) -> None:
    assert done.headline == render_headline(read_headline(done.run))
    assert done.headline.startswith("infections alarmed within 30 s, unseen host")
    assert done.headline.endswith("[simulated]")
    assert done.report.read_text().startswith("<!DOCTYPE html>")
    assert [stage.name for stage in done.stages] == ["validate", "features", "split", "train", "evaluate", "report"]


@pytest.mark.slow
def test_pipeline_run_again_keeps_every_stage(store: Path, done: runner.PipelineResult) -> None:
    before = products(done.run)

    again = runner.run_pipeline(RunSettings(store=store, run=done.run, models=QUICK, recipes=RECIPES))

    assert again.is_unchanged
    assert again.headline == done.headline
    assert products(done.run) == before


@pytest.mark.slow
def test_only_the_stage_of_a_lost_product_runs_again(store: Path, done: runner.PipelineResult) -> None:
    before = products(done.run)
    (done.run / METRICS_FILE).unlink()

    again = runner.run_pipeline(RunSettings(store=store, run=done.run, models=QUICK, recipes=RECIPES))

    assert made(again) == ["evaluate"]
    assert products(done.run) == before


@pytest.mark.slow
def test_a_killed_and_resumed_run_has_the_same_bytes(store: Path, done: runner.PipelineResult, tmp_path: Path) -> None:
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


def test_a_missing_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no such store"):
        runner.run_pipeline(RunSettings(store=tmp_path / "none", run=tmp_path / "r"))


def test_the_run_of_another_store_is_not_overwritten_but_a_store_may_move(
    store: Path, done: runner.PipelineResult, tmp_path: Path
) -> None:
    run, here, there = tmp_path / "run", tmp_path / "here", tmp_path / "there"
    shutil.copytree(done.run, run)
    shutil.copytree(store, here)
    settings = RunSettings(store=here, run=run, models=QUICK, recipes=RECIPES)

    with pytest.raises(UsageError, match=r"holds a run of .*; name another folder"):
        runner.run_pipeline(settings)
    kept = json.loads((run / "run.json").read_text())["configuration"]["store"]
    (run / "run.json").write_text((run / "run.json").read_text().replace(kept, str(there)))  # which is not there

    assert runner.run_pipeline(settings).is_unchanged


def inputs(run: Path, stage: str, **asked: tuple[str, ...]) -> dict[str, object]:
    """What a stage depends on."""
    settings = RunSettings(store=run, run=run, **asked)  # type: ignore[arg-type]
    return {s.name: s for s in runner.build_stages(settings)}[stage].inputs()


def test_evaluate_depends_on_every_file_that_it_reads(tmp_path: Path) -> None:
    run = write_trained_run(tmp_path / "run", threats=("realistic",))

    read = evaluate_run(run, resamples=50).inputs

    assert {"predictions_v1.parquet", "splits/held_out_host-host-0.json", "grids/index.parquet"} <= read.keys()
    assert read.items() <= inputs(run, "evaluate").items()


def test_training_depends_on_channel_sets_and_on_the_code_of_user_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "my_guess.py"
    code.write_text("from phasewatch.models.baselines import MajorityBaseline as Guess")
    monkeypatch.syspath_prepend(tmp_path)
    models = ("my_guess:Guess",)
    before = inputs(tmp_path, "train", models=models)

    assert inputs(tmp_path, "train", models=models, channel_sets=("proc+tap",)) != before
    code.write_text("from phasewatch.models.baselines import StratifiedBaseline as Guess")
    assert inputs(tmp_path, "train", models=models) != before


def test_the_report_is_written_again_after_an_audit(tmp_path: Path) -> None:
    before = inputs(tmp_path, "report")
    (tmp_path / AUDIT_FILE).write_bytes(b"{}")

    assert inputs(tmp_path, "report") != before


def test_settings_are_read_back_with_their_types(tmp_path: Path) -> None:
    settings = RunSettings(
        store=tmp_path, run=tmp_path, limit=7, include_degraded=False, seed=3, grid="full", models=("gbt",), trials=2
    )
    configuration = msgspec.to_builtins(runner.build_configuration(settings))
    (tmp_path / "run.json").write_text(json.dumps({"stages": {}, "configuration": configuration}))

    read = runner.read_settings(tmp_path)

    assert (configuration["limit"], configuration["include_degraded"], list(configuration["models"])) == (
        7,
        False,
        ["gbt"],
    )
    assert "run" not in configuration
    names = ("store", "limit", "include_degraded", "seed", "grid")
    assert [getattr(read, name) for name in names] == [getattr(settings, name) for name in names]


def test_a_setting_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    configuration = {"store": str(tmp_path), "include_degraded": "False"}
    (tmp_path / "run.json").write_text(json.dumps({"stages": {}, "configuration": configuration}))

    with pytest.raises(RunError, match="include_degraded"):
        runner.read_settings(tmp_path)


def test_a_run_without_settings_has_the_defaults(tmp_path: Path) -> None:
    read = runner.read_settings(tmp_path)

    assert (read.store, read.limit, read.include_degraded, read.grid) == (tmp_path, 0, True, "short")


def test_a_failing_model_stops_no_other_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run_own.py").write_text(
        "from pathlib import Path\n"
        "from phasewatch.models.baselines import MajorityBaseline\n"
        "class Later(MajorityBaseline):\n"
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
    assert made(again) == ["train", "evaluate", "report"]
