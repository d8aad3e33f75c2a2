"""Predictions of the windows of every second, which the alarms of a watcher are fitted to and evaluated on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from phasewatch.arrays import Float32Array, FloatArray
from phasewatch.artifacts import RunEpisode
from phasewatch.dataset import EpisodeWindows, FoldData, WindowSet
from phasewatch.dataset.live_windows import compute_live_digest, iter_live_windows, list_live_windows
from phasewatch.metrics import N_CLASSES
from phasewatch.models.base import ModelInputs, PhaseModel, ScoredWindows
from phasewatch.splits import ALARM_RECIPES
from phasewatch.training.grids import DEPLOY_RECIPE, MAIN_CHANNEL_SETS

__all__ = [
    "LiveScores",
    "has_live_alarms",
    "has_live_parts",
    "predict_live_windows",
    "score_live_windows",
    "score_windows",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LiveScores:
    """Predictions of the windows of every second of some episodes.

    Attributes:
        windows: The windows of known phase.
        p: ``(n, 5)`` float64 calibrated probabilities.
    """

    windows: EpisodeWindows
    p: FloatArray

    def select_episodes(self, ids: Collection[str]) -> LiveScores:
        """Return the windows of the episodes with these ids."""
        rows = self.windows.mark_episodes(lambda e: e.episode_id in ids)
        return LiveScores(windows=self.windows.take(rows), p=self.p[rows])


_BATCH_BYTES = 32 * 2**20  # of inputs that a model predicts at once; bounds memory


def has_live_alarms(sets: FoldData) -> bool:
    """Return whether models of a fold get alarms for the windows of every second.

    They do where alarms are evaluated, and where the model is deployed; elsewhere nothing would use them.
    """
    return sets.run is not None and sets.fold.recipe in (*ALARM_RECIPES, DEPLOY_RECIPE)


def has_live_parts(sets: FoldData) -> bool:
    """Return whether the predictions table of a run has the windows of every second of a fold.

    It has those of the main channel set; others would only make it larger.
    """
    return has_live_alarms(sets) and sets.train.inputs.spec.mask == MAIN_CHANNEL_SETS[0]


def predict_live_windows(model: PhaseModel, sets: FoldData, episodes: Sequence[RunEpisode]) -> LiveScores | None:
    """Predict the windows of every second of some episodes; return None if the fold has no alarms for them.

    Args:
        model: A fitted model that was not trained on them.
        sets: The fold.
        episodes: Episodes of one of its sets, in their order.
    """
    if sets.run is None or not has_live_alarms(sets):
        return None
    windows = list_live_windows(sets.run, episodes)
    spec = sets.train.inputs.spec
    parts = iter_live_windows(sets.run, windows, spec)
    p = [model.predict_proba(ModelInputs(x=x, spec=spec)) for x in _join_batches(part.x for part in parts)]
    return LiveScores(windows=windows, p=np.concatenate([np.zeros((0, N_CLASSES)), *p]))


def _join_batches(parts: Iterable[Float32Array]) -> Iterator[Float32Array]:
    """Join consecutive arrays of windows into batches: a call of a model costs as much as hundreds of windows."""
    held: list[Float32Array] = []
    for x in parts:
        if held and sum(one.nbytes for one in held) + x.nbytes > _BATCH_BYTES:
            yield np.concatenate(held)
            held = []
        held.append(x)
    if held:
        yield np.concatenate(held)


def score_windows(part: WindowSet, p: FloatArray) -> ScoredWindows:
    """Combine the windows of a set with their probabilities, ``(n, 5)``, for the fit of the alarms."""
    return ScoredWindows(labels=part.label_sequence, p=p, sha256=part.examples.sha256())


def score_live_windows(
    sets: FoldData, scores: LiveScores | None, *, only: Sequence[RunEpisode] | None = None
) -> ScoredWindows | None:
    """Return predictions of the windows of every second for the fit of the alarms; None if the fold has none.

    Args:
        sets: The fold.
        scores: The predictions.
        only: Episodes that the alarms may be fitted to; None for all.
    """
    if sets.run is None or scores is None:
        return None
    if only is not None:
        scores = scores.select_episodes({e.episode_id for e in only})
    digest = compute_live_digest(sets.run, scores.windows, sets.train.inputs.spec)
    return ScoredWindows(labels=scores.windows.label_sequence, p=scores.p, sha256=digest)
