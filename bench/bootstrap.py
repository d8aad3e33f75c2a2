"""Measure what 10,000 paired resamples of 12 models cost: against one model's, and against a loop over scikit-learn.

    python bench/bootstrap.py

Ratios of CPU time in one process on one thread; the loop is timed on few resamples and multiplied up, and its values
must equal ours on those very resamples.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import combinations

import numpy as np
from threadpoolctl import threadpool_limits

from phasewatch.evaluate import bootstrap
from phasewatch.evaluate.scope import Values, terms_of
from phasewatch.measures import N_CLASSES

HOSTS, SESSIONS, WINDOWS = 6, 180, 28
K = tuple(range(N_CLASSES))


def corpus(models: int) -> tuple[bootstrap.Clusters, np.ndarray, list[np.ndarray]]:
    """Draw sessions, truth, and what models of rising skill say."""
    rng = np.random.default_rng(0)
    hosts = [f"h{s % HOSTS}" for s in range(SESSIONS) for _ in range(WINDOWS)]
    sessions = [f"s{s}" for s in range(SESSIONS) for _ in range(WINDOWS)]
    truth = rng.integers(0, N_CLASSES, len(hosts))
    said = [
        np.where(rng.random(len(truth)) < 0.4 + 0.04 * m, truth, rng.integers(0, 5, len(truth))) for m in range(models)
    ]
    return bootstrap.number_clusters(hosts, sessions), truth, said


def ours(
    clusters: bootstrap.Clusters, truth: np.ndarray, said: list[np.ndarray], weights: bootstrap.Weights
) -> tuple[list[Values], int]:
    """Give all scores of every resample, with intervals, p of all pairs and Holm: what a board computes."""
    shape = (-1, N_CLASSES, N_CLASSES)
    counts = [terms_of(bootstrap.confusions(clusters, truth, y).reshape(shape)) for y in said]
    drawn = np.split(bootstrap.resample(weights, np.concatenate(counts, axis=1)), len(said), axis=1)
    values = [Values.of_terms(d, K) for d in drawn]
    for v in values:
        bootstrap.interval(v.macro_f1)
        for c in K:
            bootstrap.interval(v.f1[:, c])
    gaps = [a.macro_f1 - b.macro_f1 for a, b in combinations(values, 2)]
    for gap in gaps:
        bootstrap.interval(gap)
    return values, len(bootstrap.holm([bootstrap.paired_p(gap) for gap in gaps]))


def cpu_s(work: Callable[[], object]) -> float:
    """Give the CPU seconds that some work takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(resamples: int, models: int, looped: int) -> dict[str, float]:
    """Time one model, all models and the loop, and compare their values."""
    from sklearn.metrics import f1_score

    clusters, truth, said = corpus(models)

    def draw() -> bootstrap.Weights:
        bootstrap._drawn.cache_clear()
        found = bootstrap.draw_weights(clusters, truth, classes=K, resamples=resamples, seed=0)
        assert found is not None
        return found

    draw()
    drawing = min(cpu_s(draw) for _ in range(3))
    weights = draw()
    all_s = drawing + min(cpu_s(lambda: ours(clusters, truth, said, weights)) for _ in range(3))
    one_s = drawing + min(cpu_s(lambda: ours(clusters, truth, said[:1], weights)) for _ in range(3))
    values, pairs = ours(clusters, truth, said, weights)

    def loop() -> list[list[np.ndarray]]:
        return [
            [np.append(f1_score(truth[rows], y[rows], labels=K, average=None, zero_division=0), 0.0) for y in said]
            for counts in weights.counts[:looped]
            for rows in [np.repeat(np.arange(len(truth)), counts[clusters.of])]
        ]

    start = time.process_time()
    theirs = loop()
    loop_s = (time.process_time() - start) / looped * resamples
    worst = max(float(np.abs(values[m].f1[i] - theirs[i][m][:-1]).max()) for i in range(looped) for m in range(models))
    return {
        "models": models, "pairs": pairs, "resamples": resamples, "one model, CPU s": one_s, "all models, CPU s": all_s,
        "ratio to one model": all_s / one_s, "scikit-learn loop, CPU s": loop_s, "faster than the loop": loop_s / all_s,
        "largest difference": worst,
    }  # fmt: skip


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--resamples", type=int, default=10_000)
    parser.add_argument("--models", type=int, default=12)
    parser.add_argument("--looped", type=int, default=20, help="resamples that scikit-learn is timed on")
    told = parser.parse_args()
    with threadpool_limits(1):
        found = measure(told.resamples, told.models, told.looped)
    for name, value in found.items():
        print(f"{name:<26} {value:,.3g}" if value < 1 else f"{name:<26} {value:,.4g}")


if __name__ == "__main__":
    main()
