"""What probabilities are worth: reliability, flips and abstention, each held against somebody else's arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tests.evaluate.made import Shape, write_predictions

from phasewatch.evaluate.rows import MetricRow, Metrics
from phasewatch.evaluate.score import score
from phasewatch.train.predictions import PREDICTIONS, PROBABILITIES, write_table

STRIDE_NS = 5 * 10**9


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Metrics, pa.Table]:
    run = tmp_path_factory.mktemp("calibrated")
    table = write_predictions(run, Shape(agents=("off",), skill=(("gbt", 0.6),)))
    stamps = pa.array(table["t_center_ns"].to_numpy() * STRIDE_NS)
    table = table.set_column(table.schema.get_field_index("t_center_ns"), "t_center_ns", stamps)
    validation = table.set_column(table.schema.get_field_index("part"), "part", pa.array(["val_b"] * table.num_rows))
    write_table(run / PREDICTIONS, [table, validation])
    return score(run, resamples=200), table


def rows(metrics: Metrics, metric: str) -> list[MetricRow]:
    return [r for r in metrics.metrics if r.metric == metric and r.fold == "pooled" and r.agent == "off"]


def test_reliability_is_scikit_learns_curve_over_fifteen_bins(scored: tuple[Metrics, pa.Table]) -> None:
    from sklearn.calibration import calibration_curve

    metrics, table = scored
    p = np.column_stack([table[n].to_numpy().astype(float) for n in PROBABILITIES]).max(axis=1)
    right = (table["y_true"].to_numpy() == table["y_pred"].to_numpy()).astype(int)

    found = rows(metrics, "reliability")
    share, confidence = calibration_curve(right, p, n_bins=15)

    assert [r.value for r in found] == pytest.approx(share.tolist())
    assert [r.x for r in found] == pytest.approx(confidence.tolist())
    assert sum(r.n_windows for r in found) == len(p)
    assert all(r.low <= r.value <= r.high for r in found if r.low is not None)


def test_a_bin_that_most_resamples_miss_has_no_interval_and_says_why(tmp_path: Path) -> None:
    write_predictions(tmp_path, Shape(agents=("off",), skill=(("gbt", 0.0),), seeds=(0, 1, 2)))
    found = rows(score(tmp_path, resamples=200), "reliability")

    without = [r for r in found if r.low is None]

    assert without
    assert {r.why for r in without} == {"in most resamples a seed has no window of this confidence"}


def test_flips_are_counted_between_neighbours_of_one_episode(scored: tuple[Metrics, pa.Table]) -> None:
    metrics, table = scored
    flips, pairs = 0, 0
    for episode in pc.unique(table["episode_id"]).to_pylist():
        decided = table.filter(pc.equal(table["episode_id"], episode))["y_pred"].to_numpy()
        flips += int((np.diff(decided) != 0).sum())
        pairs += len(decided) - 1

    (row,) = rows(metrics, "flips_per_minute")

    assert row.value == pytest.approx(12 * flips / pairs)
    assert row.low < row.value < row.high
    assert len(rows(metrics, "true_flips_per_minute")) == 1


def test_abstention_keeps_nine_windows_of_ten_by_a_threshold_from_validation(scored: tuple[Metrics, pa.Table]) -> None:
    metrics, table = scored
    abstained, decided, all_ = (rows(metrics, m)[0] for m in ("abstained", "accuracy_decided", "accuracy"))
    right = table["y_true"].to_numpy() == table["y_pred"].to_numpy()

    assert abstained.value == pytest.approx(0.1, abs=0.01)  # validation is the test here, so the share is met
    assert all_.value == pytest.approx(right.mean())
    assert decided.value > all_.value


def test_without_validation_nothing_is_said_of_abstention(tmp_path: Path) -> None:
    write_predictions(tmp_path)

    assert not rows(score(tmp_path, resamples=50), "abstained")
