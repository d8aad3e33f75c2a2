"""The dry run of a plan: how well elapsed time alone would tell the phase, before anything is recorded (pure)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from phasewatch.vocab import PHASES, Phase

WINDOW_S, STRIDE_S = 10.0, 5.0
EPISODES = 1500  # to learn from, and as many again to score on
_SMOOTH = 1  # neighbouring windows on either side that are averaged in

Walk = tuple[tuple[Phase, float], ...]


def window_phases(walk: Walk) -> NDArray[np.int64]:
    """Give the phase code of each 10 s window, one every 5 s: the phase with most of it, on a tie the later one."""
    ends = np.cumsum([seconds for _, seconds in walk])
    starts = ends - [seconds for _, seconds in walk]
    count = int((ends[-1] - WINDOW_S) // STRIDE_S) + 1 if ends[-1] >= WINDOW_S else 0
    at = np.arange(count)[:, None] * STRIDE_S
    inside = np.clip(np.minimum(ends, at + WINDOW_S) - np.maximum(starts, at), 0, None)
    codes = np.array([phase.code for phase, _ in walk])
    share = np.stack([inside[:, codes == code].sum(axis=1) for code in range(len(PHASES))], axis=1).round(6)
    last = np.stack(
        [np.where((inside > 0) & (codes == code), starts, -1.0).max(axis=1) for code in range(len(PHASES))], axis=1
    )
    return np.lexsort((last, share), axis=1)[:, -1]


def elapsed_time_f1(draw: Callable[[np.random.Generator], Walk], rng: np.random.Generator) -> float:
    """Score the best classifier that knows nothing but the seconds since the first label.

    Args:
        draw: Draws the walk of one malicious episode.

    Returns:
        Macro-F1 over the five phases on unseen walks, the higher of plain and class-balanced voting.
    """
    learn = [window_phases(draw(rng)) for _ in range(EPISODES)]
    score = [window_phases(draw(rng)) for _ in range(EPISODES)]
    length = max(len(codes) for codes in learn + score)
    votes = np.zeros((length + 2 * _SMOOTH, len(PHASES)))
    for codes in learn:
        votes[_SMOOTH + np.arange(len(codes)), codes] += 1
    smooth = np.stack([votes[shift : shift + length] for shift in range(2 * _SMOOTH + 1)]).sum(axis=0)
    truth = np.concatenate(score)
    window = np.concatenate([np.arange(len(codes)) for codes in score])
    balanced = smooth / np.maximum(smooth.sum(axis=0), 1)
    return max(_macro_f1(truth, table.argmax(axis=1)[window]) for table in (smooth, balanced))


def _macro_f1(truth: NDArray[np.int64], said: NDArray[np.int64]) -> float:
    scores = []
    for code in range(len(PHASES)):
        right = int(((truth == code) & (said == code)).sum())
        named = int((truth == code).sum() + (said == code).sum())
        scores.append(2 * right / named if named else 0.0)
    return float(np.mean(scores))
