"""Window-level ranking by a score: AUROC, average precision, recall at fixed false-positive rates, precision curve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import BoolArray, FloatArray
from phasewatch.evaluation.metric_table import MetricNote, MetricRow, NoteCode
from phasewatch.evaluation.scoring import (
    MetricKey,
    ModelOutput,
    ResampleSelection,
    ScoringSet,
    build_interval,
    mean_over_seeds,
    select_resamples,
)
from phasewatch.models.alarm import ALARM_PHASES, AlarmKind, compute_alarm_score

__all__ = [
    "FALSE_POSITIVE_RATES",
    "MAX_CURVE_POINTS",
    "RANKINGS",
    "RankingMeasures",
    "build_ranking_rows",
    "compute_precision_curve",
    "compute_ranking",
]

# Prefix of the metrics → the alarm whose score ranks the windows; its phases are the positive windows.
RANKINGS = {"infecting": AlarmKind.INFECTION, "hot": AlarmKind.ACTIVITY}
FALSE_POSITIVE_RATES = {"1pct": 0.01, "0.1pct": 0.001}
MAX_CURVE_POINTS = 50
_MAX_RESAMPLES = 1_000  # each ranks every window again; more change no printed digit
_CHUNK_SIZE = 200
_CURVE_NOTE = MetricNote(code=NoteCode.CURVE_POINT, text="a point of a curve; average precision has the interval")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankingMeasures:
    """Measures of one ranking, or of each of ``B`` resamples; NaN where a class has no window.

    Attributes:
        auroc: ``(B,)`` probability that a positive window scores above a negative one; a tie counts half.
        average_precision: ``(B,)`` mean precision over recall steps.
        recall: ``(B, r)`` share of positive windows above the threshold at each of `FALSE_POSITIVE_RATES`.
    """

    auroc: FloatArray
    average_precision: FloatArray
    recall: FloatArray


def compute_ranking(score: FloatArray, positive: BoolArray, weights: NDArray[np.floating]) -> RankingMeasures:
    """Compute the measures of weighted windows.

    Windows of equal score are one step of the ranking. Recall at a false-positive rate is that of the lowest threshold
    at which the rate is not exceeded. Without ties, AUROC and average precision equal scikit-learn's; with ties too.

    Args:
        score: ``(n,)`` higher is more suspicious.
        positive: ``(n,)`` whether a window is positive.
        weights: ``(B, n)`` how often each resample holds each window.
    """
    order = np.argsort(-score, kind="stable")
    is_last = np.r_[np.diff(score[order]) != 0, True] if len(order) else np.zeros(0, np.bool_)
    ends = np.flatnonzero(is_last)
    w = np.asarray(weights, np.float64)[:, order]
    hits = np.cumsum(w * positive[order], axis=1)[:, ends]
    false = np.cumsum(w * ~positive[order], axis=1)[:, ends]
    n_positive, n_negative = (total[:, -1:] if len(ends) else np.zeros((len(w), 1)) for total in (hits, false))
    with np.errstate(invalid="ignore", divide="ignore"):
        tpr, fpr = hits / n_positive, false / n_negative
        precision = hits / (hits + false)
    step_tpr, step_fpr = np.diff(tpr, axis=1, prepend=0.0), np.diff(fpr, axis=1, prepend=0.0)
    auroc = (step_fpr * (tpr - step_tpr / 2)).sum(axis=1)
    average_precision = (step_tpr * np.where(hits + false > 0, precision, 0.0)).sum(axis=1)
    recall = np.stack(
        [np.where(fpr <= rate, tpr, 0.0).max(axis=1, initial=0.0) for rate in FALSE_POSITIVE_RATES.values()], axis=1
    )
    undefined = ((n_positive == 0) | (n_negative == 0))[:, 0]
    recall[undefined] = np.nan
    return RankingMeasures(
        auroc=np.where(undefined, np.nan, auroc),
        average_precision=np.where(undefined, np.nan, average_precision),
        recall=recall,
    )


def compute_precision_curve(score: FloatArray, positive: BoolArray) -> NDArray[np.float64]:
    """Compute precision over recall, ``(m, 2)`` (recall, precision) with recall ascending and m ≤ `MAX_CURVE_POINTS`.

    Args:
        score: ``(n,)``.
        positive: ``(n,)``; at least one is True.
    """
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.r_[np.diff(score[order]) != 0, True])
    hits = np.cumsum(positive[order])[ends]
    curve = np.column_stack([hits / hits[-1], hits / (ends + 1.0)])
    curve = curve[np.r_[True, np.diff(hits) > 0] & (hits > 0)]  # one point per recall: its highest precision
    picks = np.unique(np.linspace(0, len(curve) - 1, min(len(curve), MAX_CURVE_POINTS)).round().astype(int))
    chosen: NDArray[np.float64] = curve[picks]
    return chosen


def build_ranking_rows(key: MetricKey, scope: ScoringSet) -> Iterator[MetricRow]:
    """Yield the ranking measures of every model: windows in infecting, and windows in infecting or active.

    Args:
        key: Recipe, channel set, input and agent of the windows.
        scope: The windows, without smoothing.
    """
    kept, counts = select_resamples(scope), scope.counts()
    weights = _select_weights(scope, kept)
    for name, kind in RANKINGS.items():
        codes = [phase.code for phase in ALARM_PHASES[kind]]
        positive = np.asarray(np.isin(scope.windows.y_true, codes), np.bool_)
        if not positive.any() or positive.all():
            text = f"every test window, or none, is {' or '.join(ALARM_PHASES[kind])}"
            note = MetricNote(code=NoteCode.TOO_FEW_WINDOWS, text=text)
            yield key.row(metric=f"{name}_auroc", model=None, note=note, **counts)
            continue
        for model, outputs in scope.predictions.group_by_model().items():
            yield from _build_model_rows(key, scope, kept, weights, (name, kind, positive), model, outputs)


def _build_model_rows(
    key: MetricKey,
    scope: ScoringSet,
    kept: ResampleSelection,
    weights: NDArray[np.float32] | None,
    ranking: tuple[str, AlarmKind, BoolArray],
    model: str,
    outputs: list[ModelOutput],
) -> Iterator[MetricRow]:
    name, kind, positive = ranking
    counts = scope.counts()
    scores = [compute_alarm_score(output.probabilities, kind) for output in outputs]
    ones = np.ones((1, len(positive)))
    points = [compute_ranking(score, positive, ones) for score in scores]
    draws = None if weights is None else [_resample_ranking(score, positive, weights, scope) for score in scores]
    columns = [("auroc", "auroc", None), ("average_precision", "average_precision", None)]
    columns += [(f"tpr_at_fpr_{rate}", "recall", i) for i, rate in enumerate(FALSE_POSITIVE_RATES)]  # type: ignore[misc]
    for metric, field, at in columns:

        def pick(measures: RankingMeasures, field: str = field, at: int | None = at) -> FloatArray:
            values: FloatArray = getattr(measures, field)
            return values if at is None else values[:, at]

        value = float(np.mean([pick(point)[0] for point in points]))
        drawn = None if draws is None else mean_over_seeds([pick(d) for d in draws])
        drawn = drawn if drawn is None else drawn[~np.isnan(drawn)]
        ends = build_interval(drawn if drawn is None or len(drawn) else None, kept)
        yield key.row(metric=f"{name}_{metric}", model=model, seed="mean", value=value, **ends, **counts)
    for recall, precision in compute_precision_curve(scores[0], positive):
        yield key.row(
            metric=f"{name}_precision_curve",
            model=model,
            seed=outputs[0].seed,
            bin=float(recall),
            value=float(precision),
            note=_CURVE_NOTE,
            **counts,
        )


def _select_weights(scope: ScoringSet, kept: ResampleSelection) -> NDArray[np.float32] | None:
    """Return how often each used resample drew each cluster, ``(B, C)``; None without intervals."""
    if kept.mask is None or scope.weights is None:
        return None
    return scope.weights.counts[kept.mask][:_MAX_RESAMPLES].astype(np.float32)


def _resample_ranking(
    score: FloatArray, positive: BoolArray, weights: NDArray[np.float32], scope: ScoringSet
) -> RankingMeasures:
    """Compute the measures of each resample, in chunks that bound memory."""
    parts = [
        compute_ranking(score, positive, weights[start : start + _CHUNK_SIZE][:, scope.clusters.cluster_index])
        for start in range(0, len(weights), _CHUNK_SIZE)
    ]
    return RankingMeasures(
        auroc=np.concatenate([p.auroc for p in parts]),
        average_precision=np.concatenate([p.average_precision for p in parts]),
        recall=np.concatenate([p.recall for p in parts]),
    )
