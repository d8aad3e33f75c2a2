"""Session bootstrap: one integer weight matrix, resampled within hosts, shared by all models, classes and pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.evaluation.metric_table import MetricNote, NoteCode
from phasewatch.metrics import N_CLASSES

__all__ = [
    "CONFIDENCE_LEVEL",
    "FEW_CLUSTERS",
    "MIN_HOSTS",
    "N_RESAMPLES",
    "ResampleWeights",
    "SessionClusters",
    "adjust_p_values",
    "build_clusters",
    "compute_interval",
    "compute_paired_p_value",
    "compute_tail_share",
    "count_confusions",
    "draw_weights",
    "explain_missing_interval",
    "resample",
    "sum_by_cluster",
]

N_RESAMPLES = 10_000
CONFIDENCE_LEVEL = 0.95
FEW_CLUSTERS = 40  # with fewer sessions an interval is shown with a warning
_MIN_CLUSTERS = 5  # with fewer sessions there is no interval
MIN_HOSTS = 3  # with fewer hosts the spread between hosts has no interval
_CHUNK_SIZE = 500  # resamples drawn and multiplied at once: bounds memory, and fixes the order of draws
_MAX_ROUNDS = 100
_SAMPLE_STEP = 16  # of the values that are ranked, every such one bounds where a tail begins


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SessionClusters:
    """The units of the bootstrap: ``C`` sessions, each of one host.

    Attributes:
        cluster_index: ``(n,)`` cluster of each window.
        host_index: ``(C,)`` number of each cluster's host.
    """

    cluster_index: NDArray[np.int64]
    host_index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.host_index)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResampleWeights:
    """The weights of ``B`` resamples of ``C`` clusters.

    Attributes:
        counts: ``(B, C)`` how often each resample drew each cluster.
        redrawn: Number of draws that lost a class and were drawn again.
    """

    counts: NDArray[np.uint16]
    redrawn: int

    def __len__(self) -> int:
        return len(self.counts)


def build_clusters(hosts: Sequence[str], sessions: Sequence[str]) -> SessionClusters:
    """Number the sessions of each host, in sorted order, so that the order of windows changes nothing."""
    pairs = sorted(set(zip(hosts, sessions, strict=True)))
    at = {pair: i for i, pair in enumerate(pairs)}
    host_at = {h: i for i, h in enumerate(sorted({h for h, _ in pairs}))}
    return SessionClusters(
        cluster_index=np.fromiter((at[pair] for pair in zip(hosts, sessions, strict=True)), np.int64, len(hosts)),
        host_index=np.fromiter((host_at[h] for h, _ in pairs), np.int64, len(pairs)),
    )


def count_confusions(clusters: SessionClusters, y_true: NDArray[np.integer], y_pred: NDArray[np.integer]) -> FloatArray:
    """Count the confusion matrix of each cluster, ``(C, 25)``, truth-major, from ``(n,)`` truth and decisions."""
    cells = N_CLASSES * N_CLASSES
    flat = clusters.cluster_index * cells + np.asarray(y_true, np.int64) * N_CLASSES + np.asarray(y_pred, np.int64)
    return np.bincount(flat, minlength=len(clusters) * cells).reshape(len(clusters), cells).astype(np.float64)


def sum_by_cluster(clusters: SessionClusters, columns: FloatArray) -> FloatArray:
    """Sum columns of windows by cluster, ``(n, m)`` → ``(C, m)``."""
    size = len(clusters)
    return np.column_stack(
        [np.bincount(clusters.cluster_index, weights=column, minlength=size) for column in columns.T]
    )


def draw_weights(
    clusters: SessionClusters, y_true: NDArray[np.integer], *, classes: Sequence[int], resamples: int, seed: int
) -> ResampleWeights | None:
    """Draw the weight matrix that all scores over these windows share.

    Args:
        clusters: Sessions, resampled with replacement within each host.
        y_true: ``(n,)`` truth; a resample that lacks a class of K is drawn again and counted.
        classes: K.
        resamples: B.
        seed: Seed of the draws.

    Returns:
        The weights, or None with fewer than `_MIN_CLUSTERS` clusters or if almost no resample keeps all of K.
    """
    if len(clusters) < _MIN_CLUSTERS:
        return None
    y = np.ascontiguousarray(y_true, np.int64)
    return _draw_weights_cached(
        clusters.cluster_index.tobytes(), clusters.host_index.tobytes(), y.tobytes(), tuple(classes), resamples, seed
    )


@lru_cache(maxsize=8)  # a run has few distinct sets of windows; each set's matrix is drawn once
def _draw_weights_cached(
    cluster_bytes: bytes, host_bytes: bytes, y_bytes: bytes, classes: tuple[int, ...], resamples: int, seed: int
) -> ResampleWeights | None:
    clusters = SessionClusters(
        cluster_index=np.frombuffer(cluster_bytes, np.int64), host_index=np.frombuffer(host_bytes, np.int64)
    )
    y_true = np.frombuffer(y_bytes, np.int64)
    has = np.zeros((len(clusters), len(classes)), np.float32)
    for i, c in enumerate(classes):
        has[np.unique(clusters.cluster_index[y_true == c]), i] = 1.0
    purpose = int.from_bytes(hashlib.sha256(b"bootstrap").digest()[:8], "big")
    rng = np.random.default_rng([seed, purpose])
    counts = np.empty((resamples, len(clusters)), np.uint16)
    redrawn = 0
    for start in range(0, resamples, _CHUNK_SIZE):
        block = counts[start : start + _CHUNK_SIZE]
        open_rows = np.arange(len(block))
        for _ in range(_MAX_ROUNDS):
            block[open_rows] = _draw_cluster_counts(rng, clusters.host_index, len(open_rows))
            lost = (block[open_rows].astype(np.float32) @ has == 0).any(axis=1)
            open_rows = open_rows[lost]
            redrawn += len(open_rows)
            if not len(open_rows):
                break
        else:
            return None
    counts.flags.writeable = False
    return ResampleWeights(counts=counts, redrawn=redrawn)


def resample(weights: ResampleWeights, counts: FloatArray) -> FloatArray:
    """Sum the cluster counts of every resample, ``(C, m)`` → ``(B, m)``; one call with many columns is cheapest.

    Whole numbers whose sums stay below 2^24 are multiplied in float32, which is then exact and twice as fast.
    """
    used = np.flatnonzero(counts.any(axis=1))  # a profile or sample has few of the clusters
    kept = counts[used]
    out = np.empty((counts.shape[1], len(weights)))  # a column's resamples side by side: what follows works on columns
    most = int(weights.counts.max(initial=0)) * kept.sum(axis=0).max(initial=0.0)
    exact = most < 2**24 and bool((kept >= 0).all() and (kept == np.floor(kept)).all())
    number: type[np.floating[Any]] = np.float32 if exact else np.float64
    kept = kept.astype(number)
    for start in range(0, len(weights), _CHUNK_SIZE):
        block = weights.counts[start : start + _CHUNK_SIZE]
        taken = block if len(used) == block.shape[1] else block[:, used]
        out[:, start : start + _CHUNK_SIZE] = np.matmul(taken.astype(number), kept).T
    return out.T


def compute_interval(values: FloatArray, tail: float = (1 - CONFIDENCE_LEVEL) / 2) -> tuple[float, float]:
    """Compute the percentile interval of ``(B,)`` resampled values, leaving out the share `tail` on either side.

    Equals numpy's `percentile`, which takes eight times as long for two ends.
    """
    last, sample = len(values) - 1, np.sort(values[::_SAMPLE_STEP])
    ends = []
    for h in (last * tail, last * (1 - tail)):
        floor = min(int(h), max(last - 1, 0))
        below, above = _find_adjacent_ranks(values, sample, floor)
        ends.append(below + (above - below) * (h - floor))
    return ends[0], ends[1]


def _find_adjacent_ranks(values: FloatArray, sample: FloatArray, rank: int) -> tuple[float, float]:
    """Return the sorted values at a rank and at the next one.

    A sorted subsample bounds the tail that holds them, so only the tail is ranked: a quarter of the time.
    """
    last = len(values) - 1
    is_low = 2 * rank < last
    share = ((rank + 2) if is_low else (last - rank + 1)) / len(values)
    spare = round(share * len(sample) + 4 * np.sqrt(share * len(sample))) + 1  # too few only once in a million times
    tail = values
    if spare < len(sample):
        tail = values[values <= sample[spare]] if is_low else values[values >= sample[-1 - spare]]
    place = rank if is_low else rank - (len(values) - len(tail))
    if place < 0 or place + 1 >= len(tail):
        tail, place = values, rank
    following = min(place + 1, len(tail) - 1)
    ranked = np.partition(tail, sorted({place, following}))
    return float(ranked[place]), float(ranked[following])


@lru_cache(maxsize=1024)
def compute_tail_share(sessions: int, hosts: int) -> float:
    """Return the share to leave out on either side so that few sessions do not narrow an interval (ADR 0016).

    Resampling n sessions of a host has (n − 1)/n of the variance of drawing new ones, and few sessions estimate their
    own spread badly. Source: Hesterberg 2015, "expanded percentile interval", with sessions − hosts degrees
    of freedom.
    """
    from scipy.special import ndtr, stdtrit

    freedom = max(sessions - hosts, 1)
    return float(ndtr(-np.sqrt(sessions / freedom) * stdtrit(freedom, (1 + CONFIDENCE_LEVEL) / 2)))


def explain_missing_interval(sessions: int, hosts: int) -> MetricNote | None:
    """Return why so few sessions of so many hosts have no interval (ADR 46), or None where they have one.

    A host's only session is in every resample, so only sessions beyond one per host count.
    """
    if sessions < _MIN_CLUSTERS:
        text = f"{sessions} session{'s' * (sessions != 1)}, an interval needs {_MIN_CLUSTERS}"
        return MetricNote(code=NoteCode.TOO_FEW_SESSIONS, text=text)
    if sessions == hosts:
        text = f"one session per host ({hosts}), nothing to resample within hosts"
        return MetricNote(code=NoteCode.ONE_SESSION_PER_HOST, text=text)
    if sessions - hosts < _MIN_CLUSTERS - 1:
        text = f"{sessions} sessions of {hosts} hosts, an interval needs {_MIN_CLUSTERS - 1} more sessions than hosts"
        return MetricNote(code=NoteCode.TOO_FEW_SESSIONS_PER_HOST, text=text)
    return None


def compute_paired_p_value(differences: FloatArray, sessions: int, hosts: int) -> float:
    """Compute the two-sided p-value of "no difference" from resampled differences.

    The share of resamples on the far side of 0 is turned into a normal quantile, which is then judged by Student's t
    with sessions − hosts degrees of freedom. This is the inverse of `compute_tail_share`: p is never below 0.05 for an
    interval that contains 0.

    Args:
        differences: ``(B,)`` differences of one measure, a resample each.
        sessions: Number of sessions that were resampled.
        hosts: Number of hosts that they belong to.

    Returns:
        A number in (0, 1]; the fewer sessions beyond one a host, the further from 0.

    Source: Hesterberg 2015, "What teachers should know about the bootstrap", expanded percentile interval.
    """
    from scipy.special import ndtri, stdtr

    fewer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    share = min(0.5, (1 + fewer) / (len(differences) + 1))
    freedom = max(sessions - hosts, 1)
    return min(1.0, 2.0 * float(stdtr(freedom, ndtri(share) * np.sqrt(freedom / sessions))))


def adjust_p_values(p_values: Sequence[float | None]) -> tuple[float | None, ...]:
    """Correct the p-values of one family; None marks a comparison outside the family.

    Source: Holm 1979, step-down.
    """
    tested = [(p, i) for i, p in enumerate(p_values) if p is not None]
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(sorted(tested)):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[i] = highest
    return tuple(corrected)


def _draw_cluster_counts(rng: np.random.Generator, host: NDArray[np.int64], rows: int) -> NDArray[np.uint16]:
    """Draw as many clusters of each host as it has, ``(rows, C)`` counts."""
    counts = np.zeros((rows, len(host)), np.uint16)
    for h in np.unique(host):
        own = np.flatnonzero(host == h)
        picks = rng.integers(0, len(own), size=(rows, len(own)))
        flat = np.arange(rows)[:, None] * len(own) + picks
        counts[:, own] = np.bincount(flat.ravel(), minlength=rows * len(own)).reshape(rows, len(own))
    return counts
