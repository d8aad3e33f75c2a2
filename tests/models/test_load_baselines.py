"""The baselines that know only whether a load runs, or for how long it has run."""

from __future__ import annotations

import numpy as np
import pytest

from phasewatch.errors import RunError
from phasewatch.models.base import InputKind, InputSpec, LabelledExamples, ModelInputs
from phasewatch.models.baselines import BASELINE_FILE, DurationBaseline, LoadBaseline, _compute_otsu_threshold
from phasewatch.types import Phase

C, X = Phase.CLEAN.code, Phase.ACTIVE.code


def inputs(kind: InputKind, x: list[list[float]]) -> ModelInputs:
    values = np.array(x, np.float32)
    names = tuple(f"c{i}" for i in range(values.shape[1]))
    spec = InputSpec(kind=kind, names=names, mask="realistic", schema_hash="5" * 64, behaviour_fingerprint="b" * 64)
    return ModelInputs(x=values, spec=spec)


def fit(model, kind: InputKind, x: list[list[float]], y: list[int]):  # type: ignore[no-untyped-def]
    examples = LabelledExamples(inputs=inputs(kind, x), y=np.array(y))
    return model.fit(examples, examples)


def test_load_baseline_predicts_the_smoothed_frequencies_of_its_category() -> None:
    model = fit(LoadBaseline(seed=0), InputKind.LOAD, [[0.0]] * 95 + [[1.0]] * 5, [C] * 95 + [X] * 5)

    p = model.predict_proba(inputs(InputKind.LOAD, [[0.0], [1.0], [2.0], [np.nan]]))

    # Five windows with all windows' frequencies (0.95 clean, 0.05 active) join each category.
    assert p[0, C] == pytest.approx((95 + 4.75) / 100)
    assert p[1, X] == pytest.approx((5 + 0.25) / 10)
    assert p[2].tolist() == p[3].tolist() == pytest.approx([0.95, 0, 0, 0.05, 0])  # nothing known of such episodes


def test_duration_baseline_knows_for_how_long_the_present_state_has_lasted() -> None:
    idle, busy, unknown = 0.1, 0.9, np.nan
    short, long = [busy, idle, idle, idle], [busy, busy, busy, unknown]
    x = [short] * 50 + [long] * 50 + [[idle] * 4] * 100
    model = fit(DurationBaseline(seed=0), InputKind.DURATION, x, [X] * 50 + [C] * 150)

    p = model.predict_proba(inputs(InputKind.DURATION, [short, long, [unknown] * 4, [idle, unknown, idle, idle]]))

    assert (p[0].argmax(), p[1].argmax()) == (X, C)
    # A window whose CPU use is unknown, and a duration that train did not have, get all windows' frequencies.
    assert p[2, X] == p[3, X] == pytest.approx(0.25)


def test_threshold_splits_two_groups_in_the_middle_and_ignores_unknown_values() -> None:
    values = np.array([0.1, 0.12, np.nan, 0.9, 0.88, 0.11], np.float32)

    assert _compute_otsu_threshold(values) == pytest.approx((0.12 + 0.88) / 2)
    assert _compute_otsu_threshold(np.array([np.nan, 0.5], np.float32)) == 0.0


@pytest.mark.parametrize(
    ("model", "data"),
    [
        pytest.param(LoadBaseline(seed=0), b"[[0.2,0.2,0.2,0.2,0.2]]", id="too few rows"),
        pytest.param(LoadBaseline(seed=0), b"[[2,0,0,0,0],[1,0,0,0,0],[1,0,0,0,0]]", id="not probabilities"),
        pytest.param(DurationBaseline(seed=0), b"[[[1,0,0,0,0]],0.5]", id="too few durations"),
        pytest.param(DurationBaseline(seed=0), b"[[],1e999]", id="no finite threshold"),
        pytest.param(DurationBaseline(seed=0), b"{", id="not JSON"),
    ],
)
def test_a_strangers_table_is_refused(model, data: bytes) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RunError, match=BASELINE_FILE):
        model._restore({BASELINE_FILE: data})
