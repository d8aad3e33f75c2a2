"""Ranking of windows against scikit-learn, and by hand at fixed false-positive rates."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from phasewatch.evaluation.ranking import (
    FALSE_POSITIVE_RATES,
    MAX_CURVE_POINTS,
    compute_precision_curve,
    compute_ranking,
)


def draw(seed: int, *, ties: bool, n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.2
    score = rng.normal(size=n) + positive
    return (np.round(score, 1) if ties else score), positive, rng.integers(0, 4, n).astype(float)


@pytest.mark.parametrize("ties", [False, True], ids=["all scores differ", "many scores are equal"])
def test_measures_equal_scikit_learns_with_weights(ties: bool) -> None:
    score, positive, weights = draw(1, ties=ties)

    found = compute_ranking(score, positive, weights[None])

    assert found.auroc[0] == pytest.approx(roc_auc_score(positive, score, sample_weight=weights))
    assert found.average_precision[0] == pytest.approx(average_precision_score(positive, score, sample_weight=weights))
    fpr, tpr, _ = roc_curve(positive, score, sample_weight=weights, drop_intermediate=False)
    for i, rate in enumerate(FALSE_POSITIVE_RATES.values()):
        assert found.recall[0, i] == pytest.approx(tpr[fpr <= rate].max())


def test_each_resample_is_measured_by_its_own_weights() -> None:
    score, positive, _ = draw(2, ties=False, n=60)
    weights = np.stack([np.ones(60), np.arange(60) % 3 == 0]).astype(float)

    both = compute_ranking(score, positive, weights)

    for i, own in enumerate(weights):
        assert both.auroc[i] == pytest.approx(compute_ranking(score, positive, own[None]).auroc[0])


def test_a_resample_without_a_positive_window_has_no_measure() -> None:
    found = compute_ranking(np.array([0.9, 0.1]), np.array([True, False]), np.array([[0.0, 2.0], [1.0, 1.0]]))

    assert np.isnan(found.auroc[0])
    assert np.isnan(found.recall[0]).all()
    assert found.auroc[1] == 1.0


def test_recall_at_a_false_positive_rate_by_hand() -> None:
    # 200 negatives: the two highest are 1 %. Two of four positives are above the third of them.
    score = np.r_[0.99, 0.97, 0.5, 0.4, 0.98, 0.96, 0.95, np.zeros(197)]
    positive = np.r_[np.ones(4), np.zeros(200)].astype(bool)

    found = compute_ranking(score, positive, np.ones((1, 204)))

    assert found.recall[0].tolist() == [0.5, 0.25]


def test_precision_curve_is_scikit_learns_at_few_points() -> None:
    score, positive, _ = draw(3, ties=False, n=2_000)
    precision, recall, _ = precision_recall_curve(positive, score)
    best = {round(r, 9): max(precision[np.isclose(recall, r)]) for r in recall}

    curve = compute_precision_curve(score, positive)

    assert len(curve) == MAX_CURVE_POINTS
    assert (np.diff(curve[:, 0]) > 0).all()
    assert curve[-1, 0] == 1.0
    for r, p in curve:
        assert p == pytest.approx(best[round(r, 9)])
