"""The page of lab-v2: hosts, other laboratory, sensors, twins and curves, each from rows, with reasons in codes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tests.factories.predictions import Shape, make_tables
from tools import results_v2, twins
from tools.learning_curve import choose_folds, list_parts

from phasewatch.artifacts import PREDICTIONS_FILE, RunEpisode
from phasewatch.evaluation.evaluate import compute_metrics
from phasewatch.evaluation.metric_table import MetricTable, NoteCode
from phasewatch.profiles import find_sample
from phasewatch.training.predictions import write_prediction_table
from phasewatch.types import BENIGN_PROFILE, EpisodeOrigin, EpisodeRole, Phase, SampleKind

SKILLS = {"realistic": 0.6, "extended": 0.9, "extended-dns": 0.7}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions on three channel sets, of which `extended` is the best."""
    folder = tmp_path_factory.mktemp("v2") / "run"
    folder.mkdir()
    tables = []
    for threat, skill in SKILLS.items():
        tables += make_tables(Shape(threat=threat, skill=(("gbt", skill),), agents=("off",)))
    write_prediction_table(folder / PREDICTIONS_FILE, tables)
    return folder


@pytest.fixture(scope="module")
def metrics(run: Path) -> MetricTable:
    return compute_metrics(run, resamples=300)


def test_a_sensor_that_helps_has_a_negative_gap_when_it_is_taken_away(metrics: MetricTable) -> None:
    rows = metrics.select("macro_f1_without_gap", overall=True, compared_to="extended", channel_set="extended-dns")
    page = results_v2.render_sensors(metrics, "gbt")

    assert len(rows) == 1
    assert rows[0].value is not None
    assert rows[0].value < 0
    assert f"{rows[0].value:+.2f}" in page
    assert "| `extended` − `flows` | `not_tested` |" in page


def test_hosts_have_three_intervals(metrics: MetricTable) -> None:
    page = results_v2.render_hosts(metrics, "gbt")

    row = next(line for line in page.splitlines() if "| extended |" in line)
    assert row.count("[") == 6


def test_what_was_not_trained_has_a_code(metrics: MetricTable) -> None:
    page = results_v2.render_missing((), metrics, "gbt")

    assert "| `held_out_sample` |" in page
    assert "`not_tested`" in page
    assert "`libvirt`" in page


def test_recipes_that_cannot_be_built_are_listed_with_their_reason(metrics: MetricTable) -> None:
    from phasewatch.dataset.split_files import RecipeResult

    page = results_v2.render_missing((RecipeResult(recipe="held_out_sample", why="too few"),), metrics, "gbt")

    assert "| `held_out_sample` | all | `cannot_be_built` | too few |" in page


def test_other_laboratory_names_training_and_test(metrics: MetricTable) -> None:
    import msgspec

    rows = tuple(msgspec.structs.replace(row, recipe="other_store") for row in metrics.metrics)
    page = results_v2.render_other_lab([("lab-v1 → lab-v2", MetricTable(inputs={}, metrics=rows))])

    assert page.count("| lab-v1 → lab-v2 |") == len(SKILLS)


def write_twin_run(folder: Path) -> dict[str, twins.LoadSpans]:
    """Write predictions in which a miner's activity score is above that of its twin in three of four pairs."""
    folder.mkdir()
    tables = []
    spans: dict[str, twins.LoadSpans] = {}
    for table in make_tables(Shape(hosts=2, sessions=6, per_session=12, skill=(("gbt", 0.0),), agents=("off",))):
        rows = table.to_pylist()
        for i, row in enumerate(rows):
            is_miner = row["profile"] == "cryptomine"
            row["sample_name"] = "full" if is_miner else "idle"
            row["y_true"] = Phase.ACTIVE.code if is_miner else Phase.CLEAN.code
            high = 0.6 if is_miner and i % 2 else 0.2 if is_miner else 0.4 if i % 2 else 0.1
            row |= {"p_clean": 1 - high, "p_armed": 0.0, "p_infecting": 0.0, "p_active": high, "p_dormant": 0.0}
            row["y_pred"] = Phase.ACTIVE.code if high > 0.5 else Phase.CLEAN.code
            if row["profile"] == BENIGN_PROFILE:
                spans[row["episode_id"]] = ((find_sample("cryptomine", "full").twin, -1, 10**9),)
        tables.append(type(table).from_pylist(rows, schema=table.schema))
    write_prediction_table(folder / PREDICTIONS_FILE, tables)
    return spans


def test_a_sample_is_ranked_against_the_windows_of_its_twin(tmp_path: Path) -> None:
    loads = write_twin_run(tmp_path / "run")

    report = twins.compare_twins(tmp_path / "run", loads, recipe="held_out_host", model="gbt")

    assert report is not None
    (pair,) = report.pairs
    assert (pair.sample, pair.twin) == ("cryptomine/full", "render")
    assert pair.areas == {"realistic": pytest.approx(0.75, abs=0.01)}
    assert (pair.called_sample, pair.called_twin) == (pytest.approx(0.5), 0.0)
    assert set(report.scores) == {"all samples", "samples with a twin", "samples without a twin"}
    assert "cryptomine/full" in results_v2.render_twins(report)


def test_a_pair_without_windows_of_the_twin_has_a_code(tmp_path: Path) -> None:
    write_twin_run(tmp_path / "run")

    report = twins.compare_twins(tmp_path / "run", {}, recipe="held_out_host", model="gbt")

    assert report is not None
    assert report.pairs[0].code is NoteCode.TOO_FEW_WINDOWS
    assert "`too_few_windows`" in results_v2.render_twins(report)


EPISODE = RunEpisode(
    episode_id="e",
    host_id="h",
    profile=BENIGN_PROFILE,
    sample_name="idle",
    sample_kind=SampleKind.BENIGN,
    origin=EpisodeOrigin.RECORDED,
    role=EpisodeRole.LAB,
    session="s",
    agent=False,
    plan_seed=1,
    proc_sketch=(),
    started_wall_ns=0,
    duration_s=60.0,
)


@pytest.mark.parametrize("unit", ["episodes", "hosts", "benign kinds", "samples"])
def test_parts_of_a_curve_are_nested_and_controls_are_as_large(unit: str) -> None:
    rng = np.random.default_rng(0)
    episodes = [
        replace(
            EPISODE,
            episode_id=f"e{i}",
            host_id=f"h{rng.integers(6)}",
            profile=(BENIGN_PROFILE, "cryptomine")[i % 2],
            sample_name=f"s{rng.integers(8)}",
        )
        for i in range(80)
    ]
    found = [list_parts(episodes, unit, share) for share in (0.125, 0.25, 0.5, 1.0)]

    for (part, control), (larger, larger_control) in pairwise(found):
        assert part < larger
        assert control < larger_control
        assert len(part) == len(control)
    assert found[-1][0] == {e.episode_id for e in episodes}


def test_more_folds_contain_fewer() -> None:
    names = [f"h{i}" for i in range(16)]

    assert set(choose_folds(names, 4)) < set(choose_folds(names, 8))
