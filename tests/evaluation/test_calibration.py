"""What probabilities are worth: reliability, flips and abstention, each held against somebody else's arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tests.factories.predictions import Shape, write_predictions

from phasewatch.artifacts import PREDICTIONS_FILE
from phasewatch.evaluation.evaluate import evaluate_run
from phasewatch.evaluation.metric_table import MetricRow, MetricTable
from phasewatch.training.predictions import PROBABILITY_COLUMNS, write_prediction_table

STRIDE_NS = 5 * 10**9


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[MetricTable, pa.Table]:
    run = tmp_path_factory.mktemp("calibrated")
    table = write_predictions(run, Shape(agents=("off",), skill=(("gbt", 0.6),)))
    stamps = pa.array(table["t_center_ns"].to_numpy() * STRIDE_NS)
    table = table.set_column(table.schema.get_field_index("t_center_ns"), "t_center_ns", stamps)
    validation = table.set_column(table.schema.get_field_index("part"), "part", pa.array(["val_b"] * table.num_rows))
    write_prediction_table(run / PREDICTIONS_FILE, [table, validation])
    return evaluate_run(run, resamples=200), table


def rows(metrics: MetricTable, metric: str) -> list[MetricRow]:
    return [r for r in metrics.metrics if r.metric == metric and r.fold == "pooled" and r.agent == "off"]


def test_reliability_is_scikit_learns_curve_over_fifteen_bins(scored: tuple[MetricTable, pa.Table]) -> None:
    from sklearn.calibration import calibration_curve

    metrics, table = scored
    p = np.column_stack([table[n].to_numpy().astype(float) for n in PROBABILITY_COLUMNS]).max(axis=1)
    right = (table["y_true"].to_numpy() == table["y_pred"].to_numpy()).astype(int)

    found = rows(metrics, "reliability")
    share, confidence = calibration_curve(right, p, n_bins=15)

    assert [r.value for r in found] == pytest.approx(share.tolist())
    assert [r.bin for r in found] == pytest.approx(confidence.tolist())
    assert sum(r.n_windows for r in found) == len(p)
    assert all(r.low <= r.value <= r.high for r in found if r.low is not None)


def test_a_bin_that_one_seed_never_uses_has_the_interval_of_the_others(tmp_path: Path) -> None:
    # Seed 0 is never surer than the others' least sure window: alone it would have no number in their bins.
    table = write_predictions(tmp_path, Shape(agents=("off",), skill=(("gbt", 0.9),), seeds=(0, 1)))
    p = np.column_stack([table[n].to_numpy() for n in PROBABILITY_COLUMNS])
    shy = (0.2 + 0.1 * (p - p.mean(axis=1, keepdims=True))).astype(np.float32)
    p = np.where((table["seed"].to_numpy() == 0)[:, None], shy, p)
    for i, name in enumerate(PROBABILITY_COLUMNS):
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(np.ascontiguousarray(p[:, i])))
    write_prediction_table(tmp_path / PREDICTIONS_FILE, [table])

    found = rows(evaluate_run(tmp_path, resamples=200), "reliability")

    sure = [r for r in found if r.bin > 0.8]
    assert sum(r.n_windows for r in sure) > 100
    assert any(r.low is not None and r.low <= r.value <= r.high for r in sure)


def test_the_calibration_error_of_a_calibrated_model_is_near_zero_once_its_bias_is_subtracted(tmp_path: Path) -> None:
    """The plain error of a calibrated model is above 0 by chance alone: here the truth is drawn from its own words."""
    plain, less = [], []
    for seed in range(8):
        metrics = evaluate_run(calibrated(tmp_path / f"{seed}", seed=seed, surer=1.0), resamples=200)
        plain += [r.value for r in rows(metrics, "ece")]
        less += [r.value for r in rows(metrics, "ece_debiased")]

    assert min(plain) > 0.03
    assert np.mean(np.square(less)) < 0.5 * np.mean(np.square(plain))
    assert 0.0 in less  # the estimate of the square is unbiased, so it is cut at 0 about half of the time


def test_a_model_that_is_too_sure_keeps_its_calibration_error_and_the_sign_says_so(tmp_path: Path) -> None:
    metrics = evaluate_run(calibrated(tmp_path / "run", seed=0, surer=3.0), resamples=200)
    (plain,), (less,), (signed,) = (rows(metrics, name) for name in ("ece", "ece_debiased", "confidence_less_accuracy"))

    assert plain.value > 0.1
    assert less.value == pytest.approx(plain.value, rel=0.25)
    assert less.low is plain.low is None
    assert 0 < signed.low < signed.value < signed.high


def calibrated(run: Path, *, seed: int, surer: float) -> Path:
    """Write predictions whose truth was drawn from them, then sharpened to the power of `surer`."""
    rng = np.random.default_rng(seed)
    table = write_predictions(run, Shape(agents=("off",), skill=(("gbt", 0.0),)))
    p = rng.dirichlet(np.ones(5), table.num_rows)
    truth = (p.cumsum(axis=1) > rng.random(table.num_rows)[:, None]).argmax(axis=1)
    said = p**surer / (p**surer).sum(axis=1, keepdims=True)
    columns = {"y_true": truth.astype(np.int8), "y_pred": said.argmax(axis=1).astype(np.int8)}
    columns |= {name: np.ascontiguousarray(said[:, i], np.float32) for i, name in enumerate(PROBABILITY_COLUMNS)}
    for name, values in columns.items():
        i = table.schema.get_field_index(name)
        table = table.set_column(i, name, pa.array(values).cast(table.schema.field(i).type))
    write_prediction_table(run / PREDICTIONS_FILE, [table])
    return run


def test_flips_are_counted_between_neighbours_of_one_episode(scored: tuple[MetricTable, pa.Table]) -> None:
    metrics, table = scored
    flips, pairs = 0, 0
    for episode in pc.unique(table["episode_id"]).to_pylist():
        decided = table.filter(pc.equal(table["episode_id"], episode))["y_pred"].to_numpy()
        flips += int((np.diff(decided) != 0).sum())
        pairs += len(decided) - 1

    (row,) = rows(metrics, "label_changes_per_minute")

    assert row.value == pytest.approx(12 * flips / pairs)
    assert row.low < row.value < row.high
    assert len(rows(metrics, "true_flips_per_minute")) == 1


def test_abstention_keeps_nine_windows_of_ten_by_a_threshold_from_validation(
    scored: tuple[MetricTable, pa.Table],
) -> None:
    metrics, table = scored
    abstention_rate, decided, all_ = (
        rows(metrics, m)[0] for m in ("abstention_rate", "selective_accuracy", "accuracy")
    )
    right = table["y_true"].to_numpy() == table["y_pred"].to_numpy()

    assert abstention_rate.value == pytest.approx(0.1, abs=0.01)  # validation is the test here, so the share is met
    assert all_.value == pytest.approx(right.mean())
    assert decided.value > all_.value


def test_without_validation_nothing_is_said_of_abstention(tmp_path: Path) -> None:
    write_predictions(tmp_path)

    assert not rows(evaluate_run(tmp_path, resamples=50), "abstention_rate")
