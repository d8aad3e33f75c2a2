"""The phase filter: a causal forward filter of a hidden Markov model over the windows, stepwise or in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.metrics import N_CLASSES, log_loss
from phasewatch.types import STRIDE_NS

__all__ = [
    "KAPPAS",
    "MAX_STRIDES",
    "MIN_TRANSITION",
    "SMOOTHING_NONE",
    "SMOOTHING_PHASE",
    "SMOOTHING_SCHEDULE",
    "LabelSequence",
    "PhaseFilter",
    "PhaseVector",
    "fit_filter",
]

KAPPAS = (0.3, 0.5, 1.0)  # posteriors are not likelihoods, and half-overlapping windows count everything twice
MAX_STRIDES = 60  # after five minutes without a window the transitions have reached their steady state
MIN_TRANSITION = 1e-15  # of a transition probability: a billion windows give more, and no belief becomes 0
_MIN_PROBABILITY = 1e-6  # of an observation: no single window rules a phase out
# The values of the predictions' column `filter`.
SMOOTHING_NONE, SMOOTHING_PHASE, SMOOTHING_SCHEDULE = "none", "phase", "schedule"

PhaseVector = tuple[float, float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseFilter:
    """The probability of each phase given all windows so far (the belief).

    The belief starts uniform. At each window it is multiplied by the transition matrix, then by the likelihood ratio
    ``(p_k / prior_k) ** kappa``, and normalised.

    Attributes:
        transitions: ``[i][k]`` probability that phase k follows phase i one stride later; rows sum to 1.
        prior: Mean calibrated probability over validation B; 0 for a phase that the model never predicts.
        kappa: Weight of the observations; 0 uses the transitions alone.

    Raises:
        ValueError: If a number is out of its range.
    """

    transitions: tuple[PhaseVector, PhaseVector, PhaseVector, PhaseVector, PhaseVector]
    prior: PhaseVector
    kappa: float

    def __post_init__(self) -> None:
        moves, prior = np.array(self.transitions), np.array(self.prior)
        if not (np.isfinite(moves).all() and (moves >= MIN_TRANSITION).all() and np.allclose(moves.sum(axis=1), 1.0)):
            raise ValueError("phase filter: transitions are not positive rows that sum to 1")
        known = prior[prior != 0]
        if not (len(known) and ((known >= 1e-300) & (known <= 1.000001)).all()) or not 0.0 <= self.kappa <= 1.0:
            raise ValueError(f"phase filter: prior {self.prior} or kappa {self.kappa} is out of range")

    def without_observations(self) -> PhaseFilter:
        """Return the filter with kappa 0, a baseline that knows the elapsed time and the transitions alone."""
        return PhaseFilter(transitions=self.transitions, prior=self.prior, kappa=0.0)

    def step(self, belief: FloatArray | None, p: FloatArray, *, strides: int = 1) -> FloatArray:
        """Update the belief with one window.

        Args:
            belief: ``(5,)`` float64 after the previous window; None at the first.
            p: ``(5,)`` float64 calibrated probabilities of this window.
            strides: Strides of 5 s since the previous window; more than 1 if windows are missing.

        Returns:
            ``(5,)`` float64 that sums to 1.
        """
        before = _build_uniform_belief(1) if belief is None else np.asarray(belief, np.float64).reshape(1, N_CLASSES)
        moved = before if belief is None else self._predict_step(before, np.array([strides]))
        updated: FloatArray = self._update_step(moved, np.asarray(p, np.float64).reshape(1, N_CLASSES))[0]
        return updated

    def run(self, p: FloatArray, episode_index: NDArray[np.integer], t_center_ns: NDArray[np.int64]) -> FloatArray:
        """Filter the windows of many episodes, each from its own start; the bits are those of `step`.

        Args:
            p: ``(n, 5)`` float64 calibrated probabilities, in the order (episode, time).
            episode_index: ``(n,)`` integer episode of each window.
            t_center_ns: ``(n,)`` int64 centre of each window.

        Returns:
            ``(n, 5)`` float64 beliefs, each from its own and earlier windows alone.
        """
        out = np.empty((len(p), N_CLASSES))
        if not len(p):
            return out
        p = np.asarray(p, np.float64)
        first, length = _find_episode_runs(episode_index)
        belief = _build_uniform_belief(len(first))
        for j in range(int(length.max())):
            alive = np.flatnonzero(length > j)
            at = first[alive] + j
            if j:
                gone = np.maximum(1, (t_center_ns[at] - t_center_ns[at - 1]) // STRIDE_NS)
                belief[alive] = self._predict_step(belief[alive], gone)
            belief[alive] = self._update_step(belief[alive], p[at])
            out[at] = belief[alive]
        return out

    def _predict_step(self, belief: FloatArray, strides: NDArray[np.integer]) -> FloatArray:
        """Apply the transitions; the sums run over the phases in order, so that one row has the bits of many."""
        moves = np.array(self.transitions)
        left = np.minimum(strides, MAX_STRIDES)
        for done in range(int(left.max())):
            later = belief[:, 0, None] * moves[0]
            for i in range(1, N_CLASSES):
                later = later + belief[:, i, None] * moves[i]
            belief = np.where((left > done)[:, None], later, belief)
        return belief

    def _update_step(self, belief: FloatArray, p: FloatArray) -> FloatArray:
        if self.kappa == 0.0:
            return belief
        prior = np.array(self.prior)
        divisor = np.where(prior > 0, prior, 1.0)
        ratio = np.where(prior > 0, (np.maximum(p, _MIN_PROBABILITY) / divisor) ** self.kappa, 0.0)
        weighed = belief * ratio
        total = weighed[:, 0]
        for i in range(1, N_CLASSES):
            total = total + weighed[:, i]
        out: FloatArray = weighed / total[:, None]
        return out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelSequence:
    """The labels of windows in the order (episode, time).

    Attributes:
        y: ``(n,)`` integer phase codes.
        episode_index: ``(n,)`` integer episode of each window.
        t_center_ns: ``(n,)`` int64 centre of each window.
    """

    y: NDArray[np.integer]
    episode_index: NDArray[np.integer]
    t_center_ns: NDArray[np.int64]

    @classmethod
    def concatenate(cls, parts: Sequence[LabelSequence]) -> LabelSequence:
        """Concatenate sequences of different episodes; the episodes get new numbers."""
        numbered: list[NDArray[np.integer]] = []
        for part in parts:
            above = 1 + max((int(index.max()) for index in numbered if len(index)), default=-1)
            numbered.append(part.episode_index + above)
        return cls(
            y=np.concatenate([part.y for part in parts]),
            episode_index=np.concatenate(numbered),
            t_center_ns=np.concatenate([part.t_center_ns for part in parts]),
        )


def fit_filter(train: LabelSequence, val_b: LabelSequence, p: FloatArray) -> PhaseFilter:
    """Fit the transitions to train and kappa to validation B.

    Args:
        train: Labels whose consecutive pairs are counted, with one added to each count (Laplace smoothing).
        val_b: Labels of validation B, on which kappa has the smallest log loss.
        p: ``(n, 5)`` float64 calibrated probabilities of validation B.
    """
    counts = np.ones((N_CLASSES, N_CLASSES))
    follows = (train.episode_index[1:] == train.episode_index[:-1]) & (np.diff(train.t_center_ns) == STRIDE_NS)
    np.add.at(counts, (train.y[:-1][follows], train.y[1:][follows]), 1.0)
    moves = counts / counts.sum(axis=1, keepdims=True)
    prior = p.mean(axis=0) if len(p) else np.full(N_CLASSES, 1.0 / N_CLASSES)
    filters = [_build_filter(moves, prior, kappa) for kappa in KAPPAS]
    if not len(p):
        return filters[0]
    losses = [log_loss(one.run(p, val_b.episode_index, val_b.t_center_ns), val_b.y) for one in filters]
    return filters[int(np.argmin(losses))]


def _build_filter(moves: FloatArray, prior: FloatArray, kappa: float) -> PhaseFilter:
    a, b, c, d, e = (_to_phase_vector(row) for row in moves)
    return PhaseFilter(transitions=(a, b, c, d, e), prior=_to_phase_vector(prior), kappa=kappa)


def _to_phase_vector(row: FloatArray) -> PhaseVector:
    a, b, c, d, e = row.tolist()
    return a, b, c, d, e


def _build_uniform_belief(rows: int) -> FloatArray:
    return np.full((rows, N_CLASSES), 1.0 / N_CLASSES)


def _find_episode_runs(episode_index: NDArray[np.integer]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first window of each episode, and its number of windows."""
    first = np.flatnonzero(np.r_[True, episode_index[1:] != episode_index[:-1]])
    return first, np.diff(np.r_[first, len(episode_index)])
