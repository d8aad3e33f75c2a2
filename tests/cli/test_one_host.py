"""A store of one host: `run` trains, tests on the last episodes, exports, and says what cannot be known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.factories.bundles import T0, S, episode
from tests.factories.stores import ACTIVE, put, write_store
from typer.testing import CliRunner, Result

from phasewatch.audit.checks import CheckOutcome
from phasewatch.cli import app
from phasewatch.evaluation.headline import read_headline
from phasewatch.evaluation.metric_table import NoteCode, read_metrics
from phasewatch.pipeline import runner, stages
from phasewatch.pipeline.stages import RunSettings


def phasewatch(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> runner.PipelineResult:
    folder = tmp_path_factory.mktemp("one-host")
    store = write_store(folder / "store", hosts=1, sessions=6)
    return runner.run_pipeline(RunSettings(store=store, run=folder / "run", workers=1, models=("gbt", "elapsed_time")))


def test_its_headline_is_that_of_its_last_episodes(done: runner.PipelineResult) -> None:
    headline = read_headline(done.run)

    assert (headline.recipe, headline.is_single_host, headline.unseen_host) == ("held_out_time", True, None)
    assert headline.macro_f1.value is not None
    assert done.unbuilt_recipes == ()


def test_it_has_no_number_on_unseen_hosts_and_says_why(done: runner.PipelineResult) -> None:
    headline, metrics = read_headline(done.run), read_metrics(done.run)

    for number in (headline.new_host_macro_f1_3class, headline.mean_of_hosts_macro_f1_3class):
        assert (number.value, number.code) == (None, NoteCode.ONE_HOST)
    assert len(metrics.select("note", code=NoteCode.ONE_HOST)) == 1
    assert not metrics.select("macro_f1", recipe="held_out_host")
    assert "no score on an unseen host" in done.report.read_text()


def test_it_passes_its_audit(done: runner.PipelineResult) -> None:
    report = stages.audit(runner.read_settings(done.run))

    assert report.passes
    assert {c.name for c in report.checks if c.fate is CheckOutcome.KEPT} >= {"disjoint", "trained-on-train-only"}


def test_its_model_is_exported(done: runner.PipelineResult, tmp_path: Path) -> None:
    exported = phasewatch("export", done.run, "--out", tmp_path / "own.zip", "--json")

    assert exported.exit_code == 0, exported.stderr
    assert "realistic" in json.loads(exported.stdout)["result"]["threats"]


def test_one_episode_of_a_new_profile_is_set_aside_by_name(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", hosts=1, sessions=6)
    phases = (("clean", 20.0), ("active", 20.0))
    put(
        store,
        episode(
            phases, number=900, host_id="h0", profile="zzz-evil", session="h0-new", agent=False, rates_of=ACTIVE,
            t0_ns=T0 + 900 * 1000 * S,
        ),
    )  # fmt: skip

    run = phasewatch("run", store, "--out", tmp_path / "run", "--workers", 1, "--models", "gbt", "--json")

    assert run.exit_code == 0, run.stderr
    assert [(a["profile"], a["code"]) for a in json.loads(run.stdout)["result"]["set_aside"]] == [
        ("zzz-evil", "profile-rare")
    ]


def test_with_too_few_sessions_to_test_it_trains_for_deployment_and_exits_1(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", hosts=1, sessions=4)

    run = phasewatch("run", store, "--out", tmp_path / "run", "--workers", 1, "--models", "gbt", "--json")

    assert run.exit_code == 1, run.stderr
    assert json.loads(run.stdout)["result"]["cannot_be_built"].keys() == {"held_out_time"}
    assert phasewatch("export", tmp_path / "run", "--out", tmp_path / "own.zip").exit_code == 0
