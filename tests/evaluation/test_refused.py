"""What cannot be scored is said, and the rest is scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scipy.stats import t as student
from tests.factories.predictions import Shape, write_predictions

from phasewatch.artifacts import PREDICTIONS_FILE
from phasewatch.evaluation.evaluate import evaluate_run
from phasewatch.evaluation.headline import build_headline, render_headline
from phasewatch.evaluation.metric_table import MetricRow, MetricTable, NoteCode
from phasewatch.splits import Fold, SplitPart, render_fold
from phasewatch.splits.fold import compute_fold_digest
from phasewatch.training.predictions import write_prediction_table


def rejections(metrics: MetricTable) -> list[str]:
    return [r.note or "" for r in metrics.select("note", code=NoteCode.NOT_SCORED)]


def scores(metrics: MetricTable, model: str) -> list[MetricRow]:
    return [r for r in metrics.metrics if r.model == model and r.metric == "macro_f1" and r.fold == "pooled"]


def change(run: Path, table: pa.Table, column: str, rows: pa.ChunkedArray, value: object) -> None:
    values = pc.if_else(rows, pa.scalar(value, table.schema.field(column).type), table[column])
    write_prediction_table(
        run / PREDICTIONS_FILE, [table.set_column(table.schema.get_field_index(column), column, values)]
    )


def test_a_model_whose_probabilities_are_no_numbers_is_not_scored_and_the_others_are(tmp_path: Path) -> None:
    table = write_predictions(tmp_path)
    rows = pc.and_(pc.equal(table["model"], "gbt"), pc.equal(table["episode_id"], "e00"))
    change(tmp_path, table, "p_clean", rows, float("nan"))

    metrics = evaluate_run(tmp_path, resamples=50)

    (reason,) = rejections(metrics)
    assert reason.startswith("gbt (seed 0, fold host-0) is not scored: 15 of 90 windows")
    assert not scores(metrics, "gbt")
    assert scores(metrics, "elapsed_time")
    assert "untested" in render_headline(build_headline(metrics))


@pytest.mark.parametrize(
    ("column", "code"),
    [
        pytest.param("y_pred", -1, id="a decision for nothing"),
        pytest.param("y_pred", 7, id="a decision for a sixth phase"),
        pytest.param("y_true", -1, id="a truth that nobody knows"),
    ],
)
def test_a_model_with_labels_that_are_no_phases_is_not_scored_and_the_others_are(
    tmp_path: Path, column: str, code: int
) -> None:
    table = write_predictions(tmp_path)
    change(
        tmp_path, table, column, pc.and_(pc.equal(table["model"], "gbt"), pc.equal(table["episode_id"], "e10")), code
    )

    metrics = evaluate_run(tmp_path, resamples=50)

    (reason,) = rejections(metrics)
    assert "15 of 90 windows" in reason
    assert not scores(metrics, "gbt")
    assert scores(metrics, "elapsed_time")


def test_a_window_counts_once_or_its_model_is_not_scored(tmp_path: Path) -> None:
    table = write_predictions(tmp_path)
    again = table.filter(pc.and_(pc.equal(table["model"], "gbt"), pc.equal(table["episode_id"], "e10")))
    write_prediction_table(tmp_path / PREDICTIONS_FILE, [table, again])

    metrics = evaluate_run(tmp_path, resamples=50)

    (reason,) = rejections(metrics)
    assert "15 of 105 windows" in reason
    assert not scores(metrics, "gbt")
    assert scores(metrics, "elapsed_time")


def write_fold(run: Path, episodes: dict[str, SplitPart]) -> None:
    fold = Fold(
        version=1,
        recipe="held_out_host",
        fold="host-0",
        leaky=False,
        validation="sessions",
        episodes=episodes,
        embargoed={},
        coverage=(),
        untested_profiles=(),
        untested_phases=(),
        asserted=(),
        sha256="",
    )
    (run / "splits").mkdir()
    whole = {name: getattr(fold, name) for name in fold.__dataclass_fields__} | {"sha256": compute_fold_digest(fold)}
    (run / "splits" / "held_out_host-host-0.json").write_bytes(render_fold(Fold(**whole)))


@pytest.mark.parametrize(
    ("tested", "reason"),
    [
        pytest.param(range(6), "", id="its own split"),
        pytest.param(range(5), "episode e05", id="an episode too many"),
        pytest.param(range(7), "1 of 7 test episodes", id="an episode too few"),
    ],
)
def test_predictions_of_another_split_are_not_scored(tmp_path: Path, tested: range, reason: str) -> None:
    write_predictions(tmp_path)
    write_fold(tmp_path, {f"e0{i}": SplitPart.TEST for i in tested})

    metrics = evaluate_run(tmp_path, resamples=50)

    assert [reason in text for text in rejections(metrics)] == [True] * (3 if reason else 0)
    assert {r.n_hosts for r in scores(metrics, "gbt") if r.host_id is None} >= ({2} if reason else {3})


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        pytest.param(Shape(hosts=1, sessions=1, agents=("off",)), "[no interval: 1 session,", id="one episode"),
        pytest.param(Shape(hosts=1, sessions=8, agents=("off",)), "8 episodes, 1 host", id="one host"),
        pytest.param(Shape(phases=2), "3 classes 0.", id="classes never seen"),
    ],
)
def test_a_poor_run_is_scored_as_far_as_it_goes(tmp_path: Path, shape: Shape, says: str) -> None:
    write_predictions(tmp_path, shape)

    assert says in render_headline(build_headline(evaluate_run(tmp_path, resamples=50)))


def test_without_benign_episodes_their_profile_is_untested_by_name(tmp_path: Path) -> None:
    table = write_predictions(tmp_path)
    write_prediction_table(tmp_path / PREDICTIONS_FILE, [table.filter(pc.not_equal(table["profile"], "benign"))])

    metrics = evaluate_run(tmp_path, resamples=50)

    assert "benign" in {r.profile for r in metrics.metrics if r.metric == "untested_profile"}


def test_how_hosts_differ_is_told_by_points_the_worst_and_a_range_for_a_new_one(tmp_path: Path) -> None:
    write_predictions(tmp_path, Shape(agents=("off",)))

    metrics = evaluate_run(tmp_path, resamples=50)
    found = {r.metric: r for r in metrics.metrics if "host" in r.metric and (r.model, r.agent) == ("gbt", "off")}
    each = [r.value for r in scores(metrics, "gbt") if r.host_id and r.agent == "off" and r.profile is None]

    assert found["macro_f1_mean_of_hosts"].value == pytest.approx(np.mean(each))
    mean, new = found["macro_f1_mean_of_hosts"], found["macro_f1_new_host"]
    ends = student.interval(0.95, 2, np.mean(each), np.std(each, ddof=1) * np.sqrt(1 + 1 / 3))
    assert (new.value, new.low, new.high) == pytest.approx((np.mean(each), max(0.0, ends[0]), min(1.0, ends[1])))
    assert new.low <= mean.low <= mean.value <= mean.high <= new.high
    assert found["macro_f1_worst_host"].value == pytest.approx(min(each))
    assert found["macro_f1_range_of_hosts"].value == pytest.approx(max(each) - min(each))


def test_two_hosts_have_no_interval_between_hosts(tmp_path: Path) -> None:
    write_predictions(tmp_path, Shape(hosts=2, sessions=6, agents=("off",)))

    metrics = evaluate_run(tmp_path, resamples=100)
    names = {"macro_f1_mean_of_hosts", "macro_f1_new_host"}
    codes = {r.code for r in metrics.metrics if r.metric in names and (r.model, r.agent) == ("gbt", "off")}

    assert codes == {NoteCode.TOO_FEW_HOSTS}
