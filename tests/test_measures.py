"""Confusion, F1, macro-F1, calibration error, Brier: small numbers by head, large ones against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from phasewatch.metrics import (
    apply_temperature,
    brier_score,
    classes_present,
    compute_pooled_macro_f1,
    confusion_counts,
    ece,
    f1_per_class,
    list_states_of_classes,
    log_loss,
    macro_f1,
    merge_into_three_states,
)

CLEAN, ARMED, INFECTING, ACTIVE, DORMANT = range(5)
labels = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


def test_rows_of_the_confusion_are_truth_and_columns_decision() -> None:
    confusion = confusion_counts(np.array([CLEAN, CLEAN, ACTIVE]), np.array([CLEAN, DORMANT, ACTIVE]))

    assert confusion.tolist() == [[1, 0, 0, 0, 1], [0] * 5, [0] * 5, [0, 0, 0, 1, 0], [0] * 5]


def test_a_window_of_unknown_phase_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        confusion_counts(np.array([-1, 0]), np.array([0, 0]))


def test_a_class_neither_true_nor_decided_has_f1_zero_and_warns_of_nothing() -> None:
    assert f1_per_class(np.diag([3, 0, 0, 0, 0])).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_macro_f1_is_over_the_classes_that_occur_and_a_decision_outside_is_an_error_of_the_true_class() -> None:
    confusion = confusion_counts(np.array([CLEAN, CLEAN, ACTIVE, ACTIVE]), np.array([CLEAN, ARMED, ACTIVE, ACTIVE]))

    assert classes_present(confusion) == (CLEAN, ACTIVE)
    assert float(macro_f1(confusion)) == pytest.approx((2 / 3 + 1) / 2)


def test_macro_f1_of_no_class_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one true window"):
        macro_f1(np.zeros((5, 5)))


def test_pooled_macro_f1_is_that_of_the_joined_folds_and_not_the_mean_over_them() -> None:
    """The second fold lacks three phases; its own macro-F1 would weigh as much as that of the first."""
    rng = np.random.default_rng(3)
    folds = [(rng.integers(0, 5, 200), rng.integers(0, 5, 200)), (np.array([0, 0, 1]), np.array([0, 1, 1]))]
    truth, decided = (np.concatenate([fold[side] for fold in folds]) for side in (0, 1))

    assert compute_pooled_macro_f1(folds) == pytest.approx(float(macro_f1(confusion_counts(truth, decided))))


@settings(max_examples=60, deadline=None)
@given(pairs=labels)
def test_macro_f1_and_f1_equal_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import confusion_matrix, f1_score

    truth, decided = (np.array(side) for side in zip(*pairs, strict=True))
    confusion = confusion_counts(truth, decided)
    present = list(classes_present(confusion))

    assert confusion.tolist() == confusion_matrix(truth, decided, labels=range(5)).tolist()
    assert_allclose(f1_per_class(confusion), f1_score(truth, decided, labels=range(5), average=None, zero_division=0))
    assert_allclose(macro_f1(confusion), f1_score(truth, decided, labels=present, average="macro", zero_division=0))


@settings(max_examples=60, deadline=None)
@given(pairs=labels)
def test_three_states_are_the_mapped_labels(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import f1_score

    truth, decided = (np.array(side) for side in zip(*pairs, strict=True))
    state = np.array([0, 0, 1, 2, 0])
    confusion = confusion_counts(truth, decided)
    present = list_states_of_classes(classes_present(confusion))

    assert_allclose(
        macro_f1(merge_into_three_states(confusion), present),
        f1_score(state[truth], state[decided], labels=list(present), average="macro", zero_division=0),
    )


def test_measures_work_on_a_stack_of_resamples() -> None:
    one = confusion_counts(np.array([0, 1, 2, 3, 4]), np.array([0, 1, 2, 4, 4]))
    stack = np.stack([one, 3 * one])

    assert_allclose(macro_f1(stack, range(5)), [float(macro_f1(one))] * 2)
    assert merge_into_three_states(stack).shape == (2, 3, 3)


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    p = np.array([[0.9, 0.1, 0, 0, 0], [0.9, 0.1, 0, 0, 0], [0.6, 0.4, 0, 0, 0]])

    # Bin of 0.9: two windows, one right: |0.9 − 0.5|·2/3. Bin of 0.6: one right: |0.6 − 1|·1/3.
    assert ece(p, np.array([0, 1, 0])) == pytest.approx(0.4 * 2 / 3 + 0.4 / 3)


def test_brier_equals_scikit_learn() -> None:
    from sklearn.metrics import brier_score_loss

    rng = np.random.default_rng(0)
    p, y = rng.dirichlet(np.ones(5), 200), rng.integers(0, 5, 200)

    assert_allclose(brier_score(p, y), brier_score_loss(y, p, labels=range(5), scale_by_half=False))


def test_log_loss_equals_scikit_learn_and_a_class_of_probability_zero_costs_but_does_not_break() -> None:
    from sklearn.metrics import log_loss as oracle

    rng = np.random.default_rng(1)
    p, y = rng.dirichlet(np.ones(5), 200), rng.integers(0, 5, 200)

    assert_allclose(log_loss(p, y), oracle(y, p, labels=range(5)))
    assert np.isfinite(log_loss(np.array([[1.0, 0, 0, 0, 0]]), np.array([4])))


def test_temperature_keeps_order_zeros_and_the_sum() -> None:
    p = np.array([[0.7, 0.2, 0.1, 0.0, 0.0]])

    soft, sharp = apply_temperature(p, 2.0), apply_temperature(p, 0.5)

    assert soft[0, 0] < 0.7 < sharp[0, 0]
    assert soft[0, 3] == sharp[0, 3] == 0.0
    assert_allclose([soft.sum(), sharp.sum()], [1.0, 1.0])
    assert_allclose(soft[0, :3], np.sqrt(p[0, :3]) / np.sqrt(p[0, :3]).sum())
