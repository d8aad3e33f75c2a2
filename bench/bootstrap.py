"""Measure 10,000 paired resamples of 12 models against scikit-learn in a loop, scipy and confidenceinterval.

The loops are timed on few resamples and extrapolated; scikit-learn must give the same values on these resamples.
"""

from __future__ import annotations

import warnings
from itertools import combinations

import numpy as np
from threadpoolctl import threadpool_limits
from timing import Figure, Part, Row, in_turns

from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.scoring import F1Scores, compute_score_terms
from phasewatch.metrics import N_CLASSES

HOSTS, SESSIONS, WINDOWS = 6, 180, 28
K = tuple(range(N_CLASSES))
ALL, ONE = "phasewatch, 12 models, all pairs and classes", "phasewatch, one model"
LOOP, SCIPY, ROWS = (
    "loop over scikit-learn's f1_score, 12 models",
    "scipy.stats.bootstrap, one model",
    "confidenceinterval, one model",
)


def corpus(models: int) -> tuple[bootstrap.SessionClusters, np.ndarray, list[np.ndarray]]:
    """Draw sessions, truth, and what models of rising skill say."""
    rng = np.random.default_rng(0)
    hosts = [f"h{s % HOSTS}" for s in range(SESSIONS) for _ in range(WINDOWS)]
    sessions = [f"s{s}" for s in range(SESSIONS) for _ in range(WINDOWS)]
    truth = rng.integers(0, N_CLASSES, len(hosts))
    predicted = [
        np.where(rng.random(len(truth)) < 0.4 + 0.04 * m, truth, rng.integers(0, 5, len(truth))) for m in range(models)
    ]
    return bootstrap.build_clusters(hosts, sessions), truth, predicted


def ours(
    clusters: bootstrap.SessionClusters,
    truth: np.ndarray,
    predicted: list[np.ndarray],
    weights: bootstrap.ResampleWeights,
) -> tuple[list[F1Scores], int]:
    """Compute all scores of every resample, with intervals, p-values of all pairs and Holm, as a leaderboard does."""
    shape = (-1, N_CLASSES, N_CLASSES)
    counts = [compute_score_terms(bootstrap.count_confusions(clusters, truth, y).reshape(shape)) for y in predicted]
    drawn = np.split(bootstrap.resample(weights, np.concatenate(counts, axis=1)), len(predicted), axis=1)
    values = [F1Scores.from_terms(d, K) for d in drawn]
    for v in values:
        bootstrap.compute_interval(v.macro_f1)
        for c in K:
            bootstrap.compute_interval(v.f1[:, c])
    gaps = [a.macro_f1 - b.macro_f1 for a, b in combinations(values, 2)]
    for gap in gaps:
        bootstrap.compute_interval(gap)
    p_values = [bootstrap.compute_paired_p_value(gap, SESSIONS, HOSTS) for gap in gaps]
    return values, len(bootstrap.adjust_p_values(p_values))


def measure(*, resamples: int = 10_000, models: int = 12, looped: int = 20, repeats: int = 3) -> Part:
    """Time one model, all models and the peers, and compare the values."""
    with threadpool_limits(1):
        return _measure(resamples, models, looped, repeats)


def _measure(resamples: int, models: int, looped: int, repeats: int) -> Part:
    from confidenceinterval.bootstrap import bootstrap_ci
    from scipy import stats
    from sklearn.metrics import f1_score

    clusters, truth, predicted = corpus(models)

    def draw() -> bootstrap.ResampleWeights:
        bootstrap._draw_weights_cached.cache_clear()
        found = bootstrap.draw_weights(clusters, truth, classes=K, resamples=resamples, seed=0)
        assert found is not None
        return found

    weights = draw()
    values, pairs = ours(clusters, truth, predicted, weights)

    def loop() -> list[list[np.ndarray]]:
        return [
            [f1_score(truth[rows], y[rows], labels=K, average=None, zero_division=0) for y in predicted]
            for counts in weights.counts[:looped]
            for rows in [np.repeat(np.arange(len(truth)), counts[clusters.cluster_index])]
        ]

    matrices = (
        bootstrap.count_confusions(clusters, truth, predicted[0]).reshape(-1, N_CLASSES, N_CLASSES).astype(np.float64)
    )

    def of_matrices(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        """Return macro-F1 for ``(…, sessions)`` indices into the sessions' confusion matrices."""
        total = matrices[drawn.astype(np.int64)].sum(axis=-3)
        return (2 * np.diagonal(total, axis1=-2, axis2=-1) / (total.sum(-1) + total.sum(-2))).mean(axis=-1)

    def by_scipy() -> object:
        return stats.bootstrap(
            (np.arange(SESSIONS),),
            of_matrices,
            n_resamples=resamples,
            batch=1000,
            method="percentile",
            vectorized=True,
            rng=0,
        )

    def by_rows() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bootstrap_ci(
                truth,
                predicted[0],
                lambda t, y: f1_score(t, y, average="macro"),
                n_resamples=looped,
                method="bootstrap_percentile",
            )

    theirs = loop()
    worst = max(float(np.abs(values[m].f1[i] - theirs[i][m]).max()) for i in range(looped) for m in range(models))
    if worst > 0:
        raise SystemExit(f"scikit-learn gives other values on the same resamples, by up to {worst:.2g}")
    times = in_turns(
        {
            ALL: lambda: ours(clusters, truth, predicted, draw()),
            ONE: lambda: ours(clusters, truth, predicted[:1], draw()),
            LOOP: loop,
            SCIPY: by_scipy,
            ROWS: by_rows,
        },
        repeats=repeats,
    )
    up = {LOOP: resamples / looped, ROWS: resamples / looped}
    notes = {
        LOOP: f"timed on {looped} resamples, extrapolated",
        SCIPY: "over sessions, not stratified by host",
        ROWS: f"over windows, so its interval is too narrow; timed on {looped} resamples, extrapolated",
    }
    rows = tuple(
        Row(
            what=name,
            min_s=low * up.get(name, 1),
            median_s=mid * up.get(name, 1),
            repeats=repeats,
            per=f"{resamples:,} resamples",
            is_ours=name.startswith("phasewatch"),
            note=notes.get(name, ""),
        )
        for name, (low, mid) in times.items()
    )
    least = {row.what: row.min_s for row in rows}
    return Part(
        title="Bootstrap",
        about=(
            f"{SESSIONS} sessions of {WINDOWS} windows on {HOSTS} hosts, {models} models, {pairs} pairs. On "
            "shared resamples the scores of each class equal scikit-learn's to the bit."
        ),
        rows=rows,
        figures=(
            Figure(
                what=f"{resamples:,} paired resamples of {models} models, all pairs and classes, against one model",
                must="≤3",
                aim="",
                measured=least[ALL] / least[ONE],
            ),
            Figure(what="the same, CPU", must="", aim="≤0.3", measured=least[ALL], unit="s"),
            Figure(
                what="the same, against a loop over scikit-learn",
                must="≥100",
                aim="",
                measured=least[LOOP] / least[ALL],
            ),
            Figure(
                what="one model, against scipy.stats.bootstrap, vectorised over sessions",
                must="",
                aim="",
                measured=least[SCIPY] / least[ONE],
            ),
        ),
    )
