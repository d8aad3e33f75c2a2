"""Intervals over sessions: what is drawn, what is drawn again, and that other people's code gives the same numbers."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import norm as normal
from scipy.stats import t as student

from phasewatch.evaluation.bootstrap import (
    SessionClusters,
    adjust_p_values,
    build_clusters,
    compute_interval,
    compute_paired_p_value,
    compute_tail_share,
    count_confusions,
    draw_weights,
    explain_missing_interval,
    resample,
    sum_by_cluster,
)
from phasewatch.evaluation.metric_table import NoteCode
from phasewatch.metrics import macro_f1

K = (0, 1, 2)


def windows(sessions_per_host: tuple[int, ...] = (6, 4), per_session: int = 12, seed: int = 0):  # type: ignore[no-untyped-def]
    """Truth and decisions of which whole sessions go right or wrong together."""
    rng = np.random.default_rng(seed)
    hosts, sessions, truth, decided = [], [], [], []
    for h, n in enumerate(sessions_per_host):
        for s in range(n):
            skill = rng.uniform(0.3, 1.0)
            y = rng.integers(0, 3, per_session)
            hosts += [f"h{h}"] * per_session
            sessions += [f"s{s}"] * per_session
            truth.append(y)
            decided.append(np.where(rng.random(per_session) < skill, y, rng.integers(0, 3, per_session)))
    return build_clusters(hosts, sessions), np.concatenate(truth), np.concatenate(decided)


def test_a_session_is_a_cluster_of_its_host_even_if_another_host_has_one_of_that_name() -> None:
    clusters = build_clusters(["b", "a", "a"], ["s0", "s0", "s0"])

    assert clusters.cluster_index.tolist() == [1, 0, 0]
    assert clusters.host_index.tolist() == [0, 1]


def test_each_resample_takes_as_many_sessions_of_a_host_as_it_has() -> None:
    clusters, truth, _ = windows()
    weights = draw_weights(clusters, truth, classes=K, resamples=50, seed=1)

    assert weights is not None
    assert set(weights.counts[:, clusters.host_index == 0].sum(axis=1).tolist()) == {6}
    assert set(weights.counts[:, clusters.host_index == 1].sum(axis=1).tolist()) == {4}


def test_the_same_seed_draws_the_same_and_another_seed_another() -> None:
    clusters, truth, _ = windows()
    drawn = [draw_weights(clusters, truth, classes=K, resamples=20, seed=s) for s in (1, 1, 2)]
    one, same, other = (w.counts.tobytes() for w in drawn if w is not None)

    assert one == same != other


def test_a_resample_that_loses_a_class_is_drawn_again_and_counted() -> None:
    clusters = SessionClusters(cluster_index=np.arange(6), host_index=np.zeros(6, np.int64))
    truth = np.array([0, 0, 0, 0, 0, 1])  # class 1 lives in one session of six: a third of the draws miss it
    weights = draw_weights(clusters, truth, classes=(0, 1), resamples=300, seed=0)

    assert weights is not None
    assert (weights.counts[:, 5] > 0).all()
    assert weights.redrawn > 100


def test_below_five_clusters_there_is_no_interval() -> None:
    clusters, truth, _ = windows((2, 2))

    assert draw_weights(clusters, truth, classes=K, resamples=10, seed=0) is None


def test_macro_f1_of_each_resample_equals_scikit_learn_on_the_same_resample() -> None:
    from sklearn.metrics import f1_score

    clusters, truth, decided = windows()
    weights = draw_weights(clusters, truth, classes=K, resamples=40, seed=3)
    assert weights is not None

    ours = macro_f1(resample(weights, count_confusions(clusters, truth, decided)).reshape(-1, 5, 5), K)

    theirs = []
    for counts in weights.counts:
        rows = np.repeat(np.arange(len(truth)), counts[clusters.cluster_index])
        theirs.append(f1_score(truth[rows], decided[rows], labels=K, average="macro", zero_division=0))
    assert_allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("sessions", "hosts", "code"),
    [
        pytest.param(4, 1, NoteCode.TOO_FEW_SESSIONS, id="few"),
        pytest.param(1, 1, NoteCode.TOO_FEW_SESSIONS, id="one"),
        pytest.param(6, 6, NoteCode.ONE_SESSION_PER_HOST, id="one each"),
        pytest.param(6, 5, NoteCode.TOO_FEW_SESSIONS_PER_HOST, id="one host has two"),
        pytest.param(5, 1, None, id="five of one host"),
        pytest.param(36, 6, None, id="plenty"),
    ],
)
def test_too_few_sessions_give_a_note_in_place_of_an_interval(sessions: int, hosts: int, code: NoteCode | None) -> None:
    note = explain_missing_interval(sessions, hosts)

    assert (note.code if note is not None else None) == code


def test_the_interval_agrees_with_scipy_on_the_clusters_of_one_host() -> None:
    from scipy.stats import bootstrap as oracle

    clusters, truth, decided = windows((30,))
    per_cluster = count_confusions(clusters, truth, decided)
    weights = draw_weights(clusters, truth, classes=K, resamples=4000, seed=0)
    assert weights is not None

    def statistic(picked: np.ndarray, axis: int = -1) -> np.ndarray:
        return macro_f1(per_cluster[picked.astype(int)].sum(axis=-2).reshape(*picked.shape[:-1], 5, 5), K)

    theirs = oracle(
        (np.arange(30.0),),
        statistic,
        n_resamples=4000,
        method="percentile",
        vectorized=True,
        batch=500,
        rng=np.random.default_rng(9),
    ).confidence_interval
    ours = compute_interval(macro_f1(resample(weights, per_cluster).reshape(-1, 5, 5), K))

    # Two independent draws of 4000: the ends wobble by a few hundredths of the width.
    assert_allclose(ours, theirs, atol=0.06 * (theirs[1] - theirs[0]))


def test_paired_differences_equal_scipys_on_the_very_same_resamples() -> None:
    """One host and no class lost: then our draws are scipy's, and interval and p must be equal, not only alike."""
    from scipy.stats import bootstrap as oracle

    clusters, truth, decided = windows((25,))
    other = np.where(np.arange(len(truth)) % 3 == 0, truth, 0)
    mine, theirs = (count_confusions(clusters, truth, d) for d in (decided, other))
    weights = draw_weights(clusters, truth, classes=K, resamples=1500, seed=4)
    assert weights is not None
    assert weights.redrawn == 0
    each = [macro_f1(resample(weights, counts).reshape(-1, 5, 5), K) for counts in (mine, theirs)]

    def gap(picked: np.ndarray, axis: int = -1) -> np.ndarray:
        one, two = (c[picked.astype(int)].sum(axis=-2).reshape(*picked.shape[:-1], 5, 5) for c in (mine, theirs))
        return macro_f1(one, K) - macro_f1(two, K)

    purpose = int.from_bytes(hashlib.sha256(b"bootstrap").digest()[:8], "big")
    found = oracle(
        (np.arange(25.0),),
        gap,
        n_resamples=1500,
        method="percentile",
        vectorized=True,
        batch=500,
        rng=np.random.default_rng([4, purpose]),
    )

    assert_allclose(each[0] - each[1], found.bootstrap_distribution, rtol=0, atol=1e-12)
    assert_allclose(compute_interval(each[0] - each[1]), tuple(found.confidence_interval), rtol=0, atol=1e-12)
    assert compute_paired_p_value(each[0] - each[1], 25, 1) == compute_paired_p_value(
        found.bootstrap_distribution, 25, 1
    )


@pytest.mark.parametrize("count", [1, 2, 3, 17, 100, 999, 10_000])
@pytest.mark.parametrize("tail", [0.0, 0.0001, 0.025, 0.2, 0.5])
def test_an_interval_is_numpys_percentiles_whatever_the_values_are(count: int, tail: float) -> None:
    rng = np.random.default_rng(count)
    drawn = rng.normal(size=count)
    misleading = np.where(np.arange(count) % 16 == 0, 5.0, drawn)  # each sixteenth tells nothing of the others
    for values in (drawn, np.round(drawn, 1), np.zeros(count), np.sort(drawn), misleading, -misleading):
        assert_allclose(
            compute_interval(values, tail), np.percentile(values, [100 * tail, 100 * (1 - tail)]), rtol=1e-12
        )


def test_an_interval_over_sessions_is_wider_than_one_over_windows() -> None:
    clusters, truth, decided = windows((30,), per_session=30)
    alone = SessionClusters(cluster_index=np.arange(len(truth)), host_index=np.zeros(len(truth), np.int64))
    widths = []
    for units in (clusters, alone):
        weights = draw_weights(units, truth, classes=K, resamples=300, seed=0)
        assert weights is not None
        low, high = compute_interval(
            macro_f1(resample(weights, count_confusions(units, truth, decided)).reshape(-1, 5, 5), K)
        )
        widths.append(high - low)

    assert widths[0] > 1.5 * widths[1]


def test_sums_add_the_windows_of_a_cluster() -> None:
    clusters = SessionClusters(cluster_index=np.array([1, 0, 1]), host_index=np.array([0, 0]))

    assert sum_by_cluster(clusters, np.array([[1.0], [2.0], [3.0]])).tolist() == [[2.0], [4.0]]


@pytest.mark.parametrize(
    ("differences", "share"),
    [
        pytest.param([1.0] * 99, 1 / 100, id="all above: the smallest share that 99 resamples can give"),
        pytest.param([-1.0] * 95 + [1.0] * 4, 5 / 100, id="few above"),
        pytest.param([1.0, -1.0, 1.0], 0.5, id="p is at most 1"),
        pytest.param([0.0] * 9, 0.5, id="no difference"),
    ],
)
@pytest.mark.parametrize(("sessions", "hosts"), [(12, 1), (40, 6), (7, 6)])
def test_p_judges_the_share_on_the_other_side_by_students_t(
    differences: list[float], share: float, sessions: int, hosts: int
) -> None:
    freedom = sessions - hosts
    expected = 2 * student.sf(-normal.ppf(share) * np.sqrt(freedom / sessions), freedom)

    assert compute_paired_p_value(np.array(differences), sessions, hosts) == pytest.approx(expected)


def test_with_many_sessions_p_is_twice_the_share_on_the_other_side() -> None:
    differences = np.r_[np.ones(970), -np.ones(29)]

    assert compute_paired_p_value(differences, 10**6, 1) == pytest.approx(2 * 30 / 1000, rel=1e-3)


@pytest.mark.parametrize(("sessions", "hosts"), [(9, 1), (12, 6), (16, 1), (40, 6), (164, 6)])
def test_p_below_five_percent_never_stands_beside_an_interval_that_holds_zero(sessions: int, hosts: int) -> None:
    drawn = np.random.default_rng(sessions).normal(size=10_000)
    tail = compute_tail_share(sessions, hosts)
    excluded = 0
    for shift in np.linspace(1.0, 5.0, 161):
        low, _ = compute_interval(drawn + shift, tail)
        p = compute_paired_p_value(drawn + shift, sessions, hosts)
        excluded += low > 0

        assert p >= 0.05 or low > 0
        assert low <= 0 or p < 0.06  # one resample of 10,000 may lie between the two
    assert 0 < excluded < 161


def test_holm_steps_down_and_never_falls() -> None:
    assert adjust_p_values([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert adjust_p_values([]) == ()


def test_a_gap_that_is_not_tested_corrects_no_other() -> None:
    assert adjust_p_values([0.01, None, 0.03]) == (pytest.approx(0.02), None, pytest.approx(0.03))


def test_numbers_that_are_not_whole_are_resampled_too() -> None:
    clusters, truth, _ = windows()
    weights = draw_weights(clusters, truth, classes=K, resamples=30, seed=0)
    assert weights is not None
    columns = np.random.default_rng(0).normal(size=(len(clusters), 3))

    assert_allclose(resample(weights, columns), weights.counts.astype(float) @ columns)
