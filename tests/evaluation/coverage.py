"""Corpora whose truth is known: how often an interval of 95 % holds it, by sessions and by windows.

A corpus is six hosts with sessions of 28 windows. A session has its own luck (a logit added to the chance that a window
is decided rightly), and within it decisions hang together (a window copies its neighbour's error with probability
`STICKY`): what makes windows no independent witnesses. The truth is the macro-F1 of one corpus of very many sessions of
the same hosts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.evaluation.bootstrap import (
    SessionClusters,
    build_clusters,
    compute_interval,
    compute_tail_share,
    count_confusions,
    draw_weights,
    resample,
)
from phasewatch.evaluation.leaderboard import compute_host_interval
from phasewatch.metrics import macro_f1

HOSTS, WINDOWS, CLASSES = 6, 28, 5
SPREAD, STICKY = 0.9, 0.8  # standard deviation of a session's logit; share of errors that go on
SKILLS = np.linspace(-0.2, 1.2, HOSTS)  # logit of each host
HELD = 5  # windows that a phase lasts, about


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Share of corpora whose interval contains the truth, and the width of the intervals.

    They are drawn by session, by the plain percentiles of the same resamples, and by window.
    """

    episodes: int
    corpora: int
    by_session: float
    plain: float
    by_window: float
    width_by_session: float
    width_by_window: float


def corpus(
    rng: np.random.Generator, per_host: NDArray[np.int64], skills: NDArray[np.float64] = SKILLS
) -> tuple[list[str], list[str], NDArray[np.int64], NDArray[np.int64]]:
    """Draw hosts, sessions, truth and decisions of every window."""
    hosts = np.repeat(np.arange(len(skills)), per_host)
    n = len(hosts)
    changes = rng.random((n, WINDOWS)) < 1 / HELD
    changes[:, 0] = True
    fresh = rng.choice(CLASSES, (n, WINDOWS), p=[0.45, 0.12, 0.08, 0.2, 0.15])
    last = np.maximum.accumulate(np.where(changes, np.arange(WINDOWS), 0), axis=1)
    truth = np.take_along_axis(fresh, last, axis=1)
    skill = 1 / (1 + np.exp(-(skills[hosts] + SPREAD * rng.normal(size=n))))
    own = rng.random((n, WINDOWS)) >= STICKY
    own[:, 0] = True
    source = np.maximum.accumulate(np.where(own, np.arange(WINDOWS), 0), axis=1)
    right = np.take_along_axis(rng.random((n, WINDOWS)) < skill[:, None], source, axis=1)
    wrong = np.take_along_axis(rng.integers(1, CLASSES, (n, WINDOWS)), source, axis=1)
    decided = np.where(right, truth, (truth + wrong) % CLASSES)
    sessions = np.repeat(np.arange(n), WINDOWS)
    return (
        [f"h{h}" for h in np.repeat(hosts, WINDOWS)],
        [f"s{s}" for s in sessions],
        truth.ravel().astype(np.int64),
        decided.ravel().astype(np.int64),
    )


def shares(episodes: int) -> NDArray[np.int64]:
    """Deal episodes over the hosts as evenly as they go."""
    dealt: NDArray[np.int64] = np.full(HOSTS, episodes // HOSTS, np.int64)
    dealt[: episodes % HOSTS] += 1
    return dealt


def true_score(episodes: int) -> float:
    """Return what is to be covered: the score over very many sessions, hosts in the corpus's proportions."""
    _, _, truth, decided = corpus(np.random.default_rng(123), shares(episodes) * (60_000 // episodes))
    clusters = SessionClusters(cluster_index=np.zeros(len(truth), np.int64), host_index=np.zeros(1, np.int64))
    return float(macro_f1(count_confusions(clusters, truth, decided).reshape(5, 5), range(CLASSES)))


def coverage(episodes: int, *, corpora: int, resamples: int, seed: int = 0) -> Held:
    """Simulate corpora and count whose interval holds the truth."""
    goal = true_score(episodes)
    held = np.zeros((corpora, 3))
    widths = np.zeros((corpora, 2))
    rng = np.random.default_rng([seed, episodes])
    for i in range(corpora):
        hosts, sessions, truth, decided = corpus(rng, shares(episodes))
        by_session = build_clusters(hosts, sessions)
        alone = SessionClusters(cluster_index=np.arange(len(truth)), host_index=np.zeros(len(truth), np.int64))
        for k, clusters in enumerate((by_session, alone)):
            present = tuple(int(c) for c in np.unique(truth))
            weights = draw_weights(clusters, truth, classes=present, resamples=resamples, seed=i)
            assert weights is not None
            counts = count_confusions(clusters, truth, decided)
            draws = macro_f1(resample(weights, counts).reshape(-1, 5, 5), present)
            low, high = (
                compute_interval(draws, compute_tail_share(episodes, HOSTS))
                if clusters is by_session
                else compute_interval(draws)
            )
            held[i, k], widths[i, k] = low <= goal <= high, high - low
            if clusters is by_session:
                plain = compute_interval(draws)
                held[i, 2] = plain[0] <= goal <= plain[1]
    return Held(
        episodes=episodes,
        corpora=corpora,
        by_session=held[:, 0].mean(),
        by_window=held[:, 1].mean(),
        plain=held[:, 2].mean(),
        width_by_session=widths[:, 0].mean(),
        width_by_window=widths[:, 1].mean(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCoverage:
    """Share of corpora whose interval holds its target, for the three targets that a headline may have.

    Attributes:
        tau: Standard deviation of the hosts' true scores.
        same_hosts: Session bootstrap, against the true score on the tested hosts.
        same_for_mean, same_for_new: The same interval against the two other targets, which it is not for.
        mean_of_hosts: Student's t over hosts, against the mean over very many hosts.
        new_host: Prediction interval, against the true score of one host more.
    """

    tau: float
    corpora: int
    same_hosts: float
    same_for_mean: float
    same_for_new: float
    mean_of_hosts: float
    new_host: float


_GRID = np.linspace(-2.0, 3.0, 26)  # logits of a host at which its true confusion matrix is computed


def compute_true_confusions() -> NDArray[np.float64]:
    """Return the confusion matrix of very many sessions of one host, for each logit of the grid."""
    rng = np.random.default_rng(321)
    tables = []
    for skill in _GRID:
        _, _, truth, decided = corpus(rng, np.array([4000]), np.array([skill]))
        tables.append(np.bincount(5 * truth + decided, minlength=25) / len(truth))
    return np.array(tables)


def cover_hosts(spread: float, *, corpora: int, resamples: int, per_host: int = 14, seed: int = 0) -> HostCoverage:
    """Simulate corpora whose hosts are drawn, and count whose intervals hold their targets.

    Args:
        spread: Standard deviation of a host's logit.
    """
    tables = compute_true_confusions()
    rng = np.random.default_rng([seed, 77])

    def true_tables(skills: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([np.interp(skills, _GRID, tables[:, k]) for k in range(25)], axis=-1).reshape(-1, 5, 5)

    def scores(skills: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(macro_f1(true_tables(skills), range(CLASSES)))

    every_host = scores(0.5 + spread * rng.normal(size=20_000))
    held = np.zeros((corpora, 5))
    for i in range(corpora):
        skills = 0.5 + spread * rng.normal(size=HOSTS)
        hosts, sessions, truth, decided = corpus(rng, np.full(HOSTS, per_host), skills)
        clusters = build_clusters(hosts, sessions)
        present = tuple(int(c) for c in np.unique(truth))
        weights = draw_weights(clusters, truth, classes=present, resamples=resamples, seed=i)
        assert weights is not None
        counts = count_confusions(clusters, truth, decided)
        draws = macro_f1(resample(weights, counts).reshape(-1, 5, 5), present)
        low, high = compute_interval(draws, compute_tail_share(HOSTS * per_host, HOSTS))
        same = float(macro_f1(true_tables(skills).sum(axis=0), range(CLASSES)))
        new = float(scores(0.5 + spread * rng.normal(size=1))[0])
        targets = (same, float(every_host.mean()), new)
        held[i, :3] = [low <= target <= high for target in targets]
        of_host = counts.reshape(HOSTS, per_host, 5, 5).sum(axis=1)
        values = [float(macro_f1(table, range(CLASSES))) for table in of_host]
        for k, is_new_host in ((3, False), (4, True)):
            ends = compute_host_interval(values, is_new_host=is_new_host)
            held[i, k] = ends["low"] <= targets[1 + is_new_host] <= ends["high"]
    shares_held = [float(share) for share in held.mean(axis=0)]
    return HostCoverage(
        tau=float(every_host.std()),
        corpora=corpora,
        same_hosts=shares_held[0],
        same_for_mean=shares_held[1],
        same_for_new=shares_held[2],
        mean_of_hosts=shares_held[3],
        new_host=shares_held[4],
    )
