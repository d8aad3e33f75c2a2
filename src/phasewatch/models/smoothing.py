"""Phases follow one another: a causal forward filter over a window's past, one step at a time or whole, same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.metrics import N_CLASSES, log_loss
from phasewatch.types import STRIDE_NS

KAPPAS = (0.3, 0.5, 1.0)  # posteriors are no likelihoods, and half-overlapping windows see everything twice
MAX_STRIDES = 60  # after five minutes unseen the schedule has forgotten where it was
MIN_TRANSITION = 1e-15  # of a chance that one phase follows another: a billion windows give more, and no belief is lost
MIN_PROBABILITY = 1e-6  # a model that is sure may still be wrong: no window alone rules a phase out
SMOOTHING_NONE, SMOOTHING_PHASE, SMOOTHING_SCHEDULE = (
    "none",
    "phase",
    "schedule",
)  # what stands in `filter` of the predictions

PhaseVector = tuple[float, float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseFilter:
    """Belief in each phase given all windows so far.

    The belief starts uniform. From window to window it moves by `transitions`, then it is weighed by how much likelier
    than usual the model finds each phase: ``(p_k / prior_k) ** kappa``.

    Attributes:
        transitions: ``[i][k]`` chance that phase k follows phase i one stride later; rows sum to 1.
        prior: Mean calibrated probability over validation B; 0 for a phase that the model cannot say.
        kappa: 0 listens to the schedule alone.

    Raises:
        ValueError: If a number cannot be.
    """

    transitions: tuple[PhaseVector, PhaseVector, PhaseVector, PhaseVector, PhaseVector]
    prior: PhaseVector
    kappa: float

    def __post_init__(self) -> None:
        moves, prior = np.array(self.transitions), np.array(self.prior)
        if not (np.isfinite(moves).all() and (moves >= MIN_TRANSITION).all() and np.allclose(moves.sum(axis=1), 1.0)):
            raise ValueError("transitions are no chances: positive rows that sum to 1")
        known = prior[prior != 0]
        if not (len(known) and ((known >= 1e-300) & (known <= 1.000001)).all()) or not 0.0 <= self.kappa <= 1.0:
            raise ValueError(f"prior {self.prior} or kappa {self.kappa} cannot be")

    def without_observations(self) -> PhaseFilter:
        """Give the filter that sees no window at all: what elapsed time and the plan alone would tell."""
        return PhaseFilter(transitions=self.transitions, prior=self.prior, kappa=0.0)

    def step(self, belief: FloatArray | None, p: FloatArray, *, strides: int = 1) -> FloatArray:
        """Take one window in.

        Args:
            belief: ``(5,)`` after the window before; None at the first.
            p: ``(5,)`` calibrated probabilities of this window.
            strides: Of 5 s since the window before; more than 1 where windows are missing.

        Returns:
            ``(5,)`` belief now, summing to 1.
        """
        before = _build_uniform_belief(1) if belief is None else np.asarray(belief, np.float64).reshape(1, N_CLASSES)
        moved = before if belief is None else self._predict_step(before, np.array([strides]))
        now: FloatArray = self._update_step(moved, np.asarray(p, np.float64).reshape(1, N_CLASSES))[0]
        return now

    def run(self, p: FloatArray, of: NDArray[np.integer], t_center_ns: NDArray[np.int64]) -> FloatArray:
        """Filter the windows of many episodes, each from its own start.

        Args:
            p: ``(n, 5)`` calibrated probabilities, in the order (episode, time).
            of: ``(n,)`` whose windows they are.
            t_center_ns: ``(n,)``.

        Returns:
            ``(n, 5)`` beliefs, each from its own and earlier windows alone.
        """
        out = np.empty((len(p), N_CLASSES))
        if not len(p):
            return out
        p = np.asarray(p, np.float64)
        first, length = _find_episode_runs(of)
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
        """Let the schedule pass; sums run over the phases in order, so that one row gives the bits of many."""
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
        usual = np.where(prior > 0, prior, 1.0)
        heard = np.where(prior > 0, (np.maximum(p, MIN_PROBABILITY) / usual) ** self.kappa, 0.0)
        weighed = belief * heard
        total = weighed[:, 0]
        for i in range(1, N_CLASSES):
            total = total + weighed[:, i]
        out: FloatArray = weighed / total[:, None]
        return out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelSequence:
    """Windows in the order (episode, time), and the truth of each.

    Attributes:
        y: ``(n,)`` phase codes.
        episode_index: ``(n,)`` whose windows they are.
        t_center_ns: ``(n,)``.
    """

    y: NDArray[np.integer]
    episode_index: NDArray[np.integer]
    t_center_ns: NDArray[np.int64]

    @classmethod
    def concatenate(cls, parts: Sequence[LabelSequence]) -> LabelSequence:
        """Put tracks of different episodes one after the other, their numbers apart."""
        numbered: list[NDArray[np.integer]] = []
        for part in parts:
            above = 1 + max((int(of.max()) for of in numbered if len(of)), default=-1)
            numbered.append(part.episode_index + above)
        return cls(
            y=np.concatenate([part.y for part in parts]),
            episode_index=np.concatenate(numbered),
            t_center_ns=np.concatenate([part.t_center_ns for part in parts]),
        )


def fit_filter(train: LabelSequence, val_b: LabelSequence, p: FloatArray) -> PhaseFilter:
    """Learn the schedule from train, and how much to trust the model from validation B.

    Args:
        train: Whose consecutive windows are counted, one more of each pair than seen.
        val_b: Where the log loss of each kappa is compared.
        p: ``(n, 5)`` calibrated probabilities of validation B.
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


def _find_episode_runs(of: NDArray[np.integer]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Give where each episode's windows begin, and how many there are."""
    first = np.flatnonzero(np.r_[True, of[1:] != of[:-1]])
    return first, np.diff(np.r_[first, len(of)])
