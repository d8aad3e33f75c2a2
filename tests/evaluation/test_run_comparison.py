"""Two runs are compared on the windows that both tested with the same truth, and nothing else is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import f1_score
from tests.factories.predictions import Shape, write_predictions

from phasewatch.artifacts import PREDICTIONS_FILE
from phasewatch.errors import MismatchError, RunError
from phasewatch.evaluation.evaluate import evaluate_run
from phasewatch.evaluation.run_comparison import compare_runs
from phasewatch.training.predictions import write_prediction_table

WEAK = Shape(skill=(("gbt", 0.4), ("majority", 0.0)))
STRONG = Shape(skill=(("gbt", 0.9), ("majority", 0.0)))


def score(table: pa.Table, *, n_episodes: int | None = None) -> float:
    rows = [r for r in table.to_pylist() if r["model"] == "gbt" and r["agent"] == "off"]
    if n_episodes is not None:
        kept = sorted({r["episode_id"] for r in rows})[:n_episodes]
        rows = [r for r in rows if r["episode_id"] in kept]
    return float(f1_score([r["y_true"] for r in rows], [r["y_pred"] for r in rows], average="macro"))


def test_the_gap_is_the_first_runs_score_less_the_seconds(tmp_path: Path) -> None:
    tables = [write_predictions(tmp_path / name, shape) for name, shape in (("a", STRONG), ("b", WEAK))]

    found = compare_runs(tmp_path / "a", tmp_path / "b", resamples=300)
    five = next(g.gap for g in found.gaps if g.gap.metric == "macro_f1")
    low, high = five.interval["low"], five.interval["high"]

    assert (five.first, five.second) == pytest.approx(tuple(score(table) for table in tables))
    assert low is not None
    assert high is not None
    assert 0 < low < five.first - five.second < high


def test_baselines_enlarge_no_family(tmp_path: Path) -> None:
    for name, shape in (("a", STRONG), ("b", WEAK)):
        write_predictions(tmp_path / name, shape)

    found = compare_runs(tmp_path / "a", tmp_path / "b", resamples=300)

    assert {g.gap.model for g in found.gaps} == {"gbt"}
    assert [g.p_holm for g in found.gaps] == [g.gap.p for g in found.gaps]  # one gap of each metric


def test_a_run_is_no_better_than_itself(tmp_path: Path) -> None:
    write_predictions(tmp_path / "a", WEAK)

    found = compare_runs(tmp_path / "a", tmp_path / "a", resamples=300)

    assert all(g.gap.first == g.gap.second and g.gap.interval["low"] == 0 == g.gap.interval["high"] for g in found.gaps)


def test_windows_of_one_run_alone_are_not_compared(tmp_path: Path) -> None:
    write_predictions(tmp_path / "a", STRONG)
    write_predictions(tmp_path / "b", replace(WEAK, hosts=2), replace(WEAK, recipe="held_out_both"))

    found = compare_runs(tmp_path / "a", tmp_path / "b", resamples=300)
    (windows,) = found.windows

    assert windows.shared == windows.second == windows.first * 2 // 3
    assert found.only_first == ()
    assert found.only_second == (("held_out_both", "realistic", "raw"),)


def test_windows_with_other_labels_are_counted_and_left_out(tmp_path: Path) -> None:
    table = write_predictions(tmp_path / "a", STRONG)
    write_predictions(tmp_path / "b", STRONG)
    truth = np.array(table["y_true"].to_pylist(), dtype=np.int8)
    is_changed = np.array([e == "e00" for e in table["episode_id"].to_pylist()])
    truth[is_changed] = (truth[is_changed] + 1) % 5
    column = table.schema.get_field_index("y_true")
    field = table.schema.field(column)
    changed = table.set_column(column, field, pa.array(truth).cast(field.type))
    write_prediction_table(tmp_path / "b" / PREDICTIONS_FILE, [changed])

    (windows,) = compare_runs(tmp_path / "a", tmp_path / "b", resamples=300).windows

    assert windows.relabelled == is_changed.sum() / 2  # of two models
    assert windows.shared == windows.first - windows.relabelled


def test_runs_without_a_common_window_are_refused(tmp_path: Path) -> None:
    write_predictions(tmp_path / "a", STRONG)
    write_predictions(tmp_path / "b", replace(STRONG, recipe="held_out_both"))

    with pytest.raises(MismatchError, match="no test window in common"):
        compare_runs(tmp_path / "a", tmp_path / "b")


def test_a_run_without_predictions_is_refused(tmp_path: Path) -> None:
    write_predictions(tmp_path / "a", STRONG)
    (tmp_path / "b").mkdir()

    with pytest.raises(RunError, match=PREDICTIONS_FILE):
        compare_runs(tmp_path / "a", tmp_path / "b")


def test_the_headlines_stand_beside_each_other_once_both_runs_are_evaluated(tmp_path: Path) -> None:
    for name, shape in (("a", STRONG), ("b", WEAK)):
        write_predictions(tmp_path / name, shape)
    assert list(compare_runs(tmp_path / "a", tmp_path / "b", resamples=300).list_operator_numbers()) == []
    for name in ("a", "b"):
        evaluate_run(tmp_path / name, resamples=300)

    numbers = {
        n: (a, b) for n, a, b in compare_runs(tmp_path / "a", tmp_path / "b", resamples=300).list_operator_numbers()
    }
    first, second = numbers["macro_f1"]

    assert first.value is not None
    assert second.value is not None
    assert first.value > second.value
