"""Idle clean machines that are called clean, and scores with and without a benign load in the episode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from phasewatch.arrays import BoolArray, FloatArray
from phasewatch.artifacts import RunEpisode
from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.metric_table import MetricNote, MetricRow, NoteCode
from phasewatch.evaluation.predictions import ModelPredictions, PredictionGroup
from phasewatch.evaluation.scoring import (
    EvaluationSettings,
    EvaluationWindows,
    F1Scores,
    IntervalColumns,
    MetricKey,
    ScoringSet,
    build_interval,
    mean_over_seeds,
    score_models,
    select_resamples,
)
from phasewatch.metrics import STATE_BY_PHASE
from phasewatch.types import Phase

__all__ = ["LOAD_STRATA", "build_idle_rows", "build_load_rows"]

LOAD_STRATA = {"with_load": True, "without_load": False}  # end of the metric's name → whether a load runs
_QUIET_CODES = tuple(code for code, state in enumerate(STATE_BY_PHASE) if state == 0)
_MEASURES = {"idle_called_clean": (Phase.CLEAN.code,), "idle_called_quiet": _QUIET_CODES}  # decisions that count
_SCORES = ("macro_f1", "macro_f1_3class")


def build_load_rows(key: MetricKey, scope: ScoringSet, episodes: Mapping[str, RunEpisode]) -> Iterator[MetricRow]:
    """Yield both macro-F1 scores of every model on the test windows with, and on those without a benign load.

    A score is the mean over the phases of its own windows.

    Args:
        key: Recipe, channel set, input and agent of the windows.
        scope: The windows, without smoothing.
        episodes: Episode id → metadata.
    """
    loads = [episodes[i].has_load if i in episodes else None for i in scope.windows.episode_id]
    for ending, wanted in LOAD_STRATA.items():
        chosen = np.array([load is wanted for load in loads], np.bool_)
        if not chosen.any():
            text = f"no test window of an episode {ending.replace('_', ' ')}, as far as the index of bundles tells"
            note = MetricNote(code=NoteCode.UNKNOWN_LOAD, text=text)
            yield key.row(metric=f"macro_f1_{ending}", model=None, note=note)
            continue
        part = scope.select(chosen)
        kept, counts = select_resamples(part), part.counts()
        for model, seeds in score_models(part, kept).items():
            for metric in _SCORES:
                draws = mean_over_seeds([_get_score(s.draws, metric) for s in seeds])
                value = float(np.mean([getattr(s.point, metric) for s in seeds]))
                ends = build_interval(draws, kept)
                name = f"{metric}_{ending}"
                yield key.row(metric=name, model=model, seed="mean", value=value, **ends, **counts)


def _get_score(scores: F1Scores | None, metric: str) -> FloatArray | None:
    return None if scores is None else getattr(scores, metric)


def build_idle_rows(
    group: PredictionGroup,
    parts: Sequence[PredictionGroup],
    episodes: Mapping[str, RunEpisode],
    rules: EvaluationSettings,
    *,
    agent: str | None,
) -> Iterator[MetricRow]:
    """Yield the share of windows of idle clean machines that each model calls clean, and quiet.

    Each fold is asked about machines of the hosts that it holds out: idle test episodes, idle soak and baseline
    episodes. A window may be asked of several folds.

    Args:
        group: Test predictions of a recipe that holds out hosts.
        parts: The same experiments' predictions of the parts soak and idle.
        episodes: Episode id → metadata.
        rules: How intervals are drawn.
        agent: Episodes with the agent ``on`` or ``off``; None for both.
    """
    key = group.build_metric_key(agent=agent)
    models: dict[str, list[list[ModelPredictions]]] = {}
    for model, seed in dict.fromkeys((s.model, s.seed) for s in group.predictions):
        folds = [s for s in group.predictions if (s.model, s.seed) == (model, seed)]
        if [s.fold for s in folds] == group.folds:
            models.setdefault(model, []).append(folds)
    for model, seeds in models.items():
        chosen = [_select_idle(folds, parts, episodes, agent) for folds in seeds]
        if not len(chosen[0][0]):
            note = MetricNote(
                code=NoteCode.NO_IDLE_WINDOWS, text="no window of an idle clean machine of an unseen host"
            )
            yield key.row(metric="idle_called_clean", model=model, seed="mean", note=note)
            continue
        yield from _build_share_rows(key, model, chosen, rules)


def _select_idle(
    folds: Sequence[ModelPredictions],
    parts: Sequence[PredictionGroup],
    episodes: Mapping[str, RunEpisode],
    agent: str | None,
) -> tuple[EvaluationWindows, np.ndarray]:
    """Return the idle windows of all folds' held-out hosts, and their decided phases ``(n,)``."""
    windows, decided = [], []
    for fold in folds:
        hosts = set(fold.windows.host_id)
        own = (fold.model, fold.seed, fold.fold)
        others = [p for part in parts for p in part.predictions if (p.model, p.seed, p.fold) == own]
        for predictions in (fold, *others):
            keep = _mark_idle(predictions.windows, hosts, episodes, agent)
            windows.append(predictions.windows.select(keep))
            decided.append(predictions.output.y_pred[keep])
    return EvaluationWindows.concatenate(windows), np.concatenate(decided)


def _mark_idle(
    windows: EvaluationWindows, hosts: set[str], episodes: Mapping[str, RunEpisode], agent: str | None
) -> BoolArray:
    known = {i: episodes[i] for i in set(windows.episode_id) if i in episodes}
    ids = {i for i, episode in known.items() if episode.is_idle_clean and episode.host_id in hosts}
    marks = [i in ids and agent in (None, state) for i, state in zip(windows.episode_id, windows.agent, strict=True)]
    return np.array(marks, np.bool_)


def _build_share_rows(
    key: MetricKey, model: str, seeds: Sequence[tuple[EvaluationWindows, np.ndarray]], rules: EvaluationSettings
) -> Iterator[MetricRow]:
    windows = seeds[0][0]
    clusters = bootstrap.build_clusters(windows.host_id.tolist(), windows.session.tolist())
    weights = bootstrap.draw_weights(
        clusters, np.zeros(len(windows), np.int64), classes=(0,), resamples=rules.resamples, seed=rules.seed
    )
    sessions, hosts = len(clusters), len(set(windows.host_id))
    for metric, codes in _MEASURES.items():
        hits = [np.isin(decided, codes).astype(np.float64) for _, decided in seeds]
        value = float(np.mean([h.mean() for h in hits]))
        note = bootstrap.explain_missing_interval(sessions, hosts)
        if note is None and 0 in (value, 1 - value):
            text = "the same in every episode, so resampling episodes shows no spread"
            note = MetricNote(code=NoteCode.NO_SPREAD, text=text)
        ends: IntervalColumns = {"note": note}
        if note is None and weights is not None:
            columns = np.column_stack([*hits, np.ones(len(windows))])
            drawn = bootstrap.resample(weights, bootstrap.sum_by_cluster(clusters, columns))
            shares = (drawn[:, :-1] / drawn[:, -1:]).mean(axis=1)
            low, high = bootstrap.compute_interval(shares, bootstrap.compute_tail_share(sessions, hosts))
            ends = {"low": low, "high": high}
        yield key.row(
            metric=metric,
            model=model,
            seed="mean",
            value=value,
            **ends,
            n_windows=len(windows),
            n_episodes=len(set(windows.episode_id)),
            n_sessions=sessions,
            n_hosts=hosts,
        )
