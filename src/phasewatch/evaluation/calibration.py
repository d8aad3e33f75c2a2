"""Metric rows of calibration: reliability by confidence bin, label changes per minute, abstention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from phasewatch import metrics
from phasewatch.arrays import FloatArray
from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.metric_table import MetricNote, MetricRow, NoteCode
from phasewatch.evaluation.predictions import ModelPredictions, PredictionGroup
from phasewatch.evaluation.scoring import (
    IntervalColumns,
    MetricKey,
    ModelOutput,
    PredictionSet,
    ResampleSelection,
    ScoringSet,
    build_interval,
    mean_over_seeds,
    resample_counts,
    select_resamples,
)
from phasewatch.types import STRIDE_NS

__all__ = [
    "DECIDED_SHARE",
    "build_abstention_rows",
    "build_calibration_rows",
    "compute_confidence_thresholds",
]

DECIDED_SHARE = 0.9  # share of validation B's windows that the abstention threshold decides
_STRIDES_PER_MINUTE = 60e9 / STRIDE_NS
_NO_CONSECUTIVE_NOTE = MetricNote(code=NoteCode.NO_CONSECUTIVE_WINDOWS, text="no two consecutive windows")
_NO_DECISION_NOTE = MetricNote(code=NoteCode.NO_DECIDED_WINDOWS, text="no window is decided")


def build_calibration_rows(key: MetricKey, scope: ScoringSet) -> Iterator[MetricRow]:
    """Yield reliability by confidence bin and label changes per minute, of each model and of the truth."""
    counts, kept = scope.counts(), select_resamples(scope)
    pairs = _mark_consecutive_windows(scope)
    yield _build_label_change_row(key, scope, kept, [scope.windows.y_true], pairs, None)
    for model, outputs in scope.predictions.group_by_model().items():
        yield _build_label_change_row(key, scope, kept, [a.y_pred for a in outputs], pairs, model)
        by_cluster = [bootstrap.sum_by_cluster(scope.clusters, _build_reliability_columns(scope, a)) for a in outputs]
        drawn = resample_counts(scope, kept, by_cluster)
        n = metrics.ECE_BINS
        total = np.mean([s.sum(axis=0) for s in by_cluster], axis=0)
        for b in np.flatnonzero(total[2 * n :] > 0):
            # Pooled over seeds, as the value is: a resample in which one seed has no such window still counts.
            pooled = None if drawn is None else np.sum(drawn, axis=0)
            draws = None if pooled is None else _divide_or_nan(pooled[:, n + b], pooled[:, 2 * n + b])
            ends = _build_defined_interval(draws, kept, "most resamples have no window of this confidence")
            yield key.row(
                metric="reliability",
                model=model,
                seed="mean",
                bin=round(float(total[b] / total[2 * n + b]), 10),
                value=float(total[n + b] / total[2 * n + b]),
                **ends,
                **{**counts, "n_windows": round(float(total[2 * n + b]))},
            )


def _build_reliability_columns(scope: ScoringSet, output: ModelOutput) -> FloatArray:
    """Build each window's confidence, correctness and 1, in the columns of its bin, ``(n, 45)``."""
    p, n = output.probabilities, metrics.ECE_BINS
    columns = np.zeros((len(p), 3 * n))
    rows, bins = np.arange(len(p)), metrics.ece_bin(p)
    columns[rows, bins] = p.max(axis=1)
    columns[rows, n + bins] = output.y_pred == scope.windows.y_true
    columns[rows, 2 * n + bins] = 1.0
    return columns


def _mark_consecutive_windows(scope: ScoringSet) -> NDArray[np.bool_]:
    """Mark the windows one stride after their predecessor in the same episode, ``(n,)``."""
    windows = scope.windows
    follows = np.zeros(len(windows), np.bool_)
    same = windows.episode_id[1:] == windows.episode_id[:-1]
    follows[1:] = same.astype(np.bool_) & (np.diff(windows.t_center_ns) == STRIDE_NS)
    return follows


def _build_label_change_row(
    key: MetricKey,
    scope: ScoringSet,
    kept: ResampleSelection,
    decisions: Sequence[NDArray[np.int64]],
    pairs: NDArray[np.bool_],
    model: str | None,
) -> MetricRow:
    columns = []
    for decided in decisions:
        changed = np.zeros(len(decided))
        changed[1:] = decided[1:] != decided[:-1]
        columns.append(
            bootstrap.sum_by_cluster(scope.clusters, np.column_stack([changed * pairs, pairs.astype(np.float64)]))
        )
    drawn = resample_counts(scope, kept, columns)
    draws = (
        None
        if drawn is None
        else mean_over_seeds([_STRIDES_PER_MINUTE * _divide_or_nan(d[:, 0], d[:, 1]) for d in drawn])
    )
    values = [_divide_or_nan(c[:, 0].sum(keepdims=True), c[:, 1].sum(keepdims=True))[0] for c in columns]
    value = float(_STRIDES_PER_MINUTE * np.mean(values))
    metric = "label_changes_per_minute" if model else "true_flips_per_minute"
    if np.isnan(value):
        return key.row(
            metric=metric, model=model, value=None, note=_NO_CONSECUTIVE_NOTE, unit="1/min", **scope.counts()
        )
    return key.row(
        metric=metric,
        model=model,
        seed="mean" if model else None,
        value=value,
        unit="1/min",
        **_build_defined_interval(draws, kept, "most resamples have no two consecutive windows"),
        **scope.counts(),
    )


def build_abstention_rows(
    key: MetricKey, scope: ScoringSet, thresholds: Mapping[tuple[str, int], FloatArray]
) -> Iterator[MetricRow]:
    """Yield the abstention rate of each model, and its accuracy with and without abstention.

    Args:
        key: Key of the rows.
        scope: The test windows.
        thresholds: (model, seed) → ``(n,)`` lowest confidence at which the fold's model decides a window.
    """
    counts, kept = scope.counts(), select_resamples(scope)
    for model, outputs in scope.predictions.group_by_model().items():
        own = [a for a in outputs if (a.model, a.seed) in thresholds]
        if not own:
            continue
        columns = []
        for a in own:
            right = (a.y_pred == scope.windows.y_true).astype(np.float64)
            decided = (a.probabilities.max(axis=1) >= thresholds[a.model, a.seed]).astype(np.float64)
            columns.append(np.column_stack([1 - decided, right * decided, right, decided, np.ones(len(right))]))
        by_cluster = [bootstrap.sum_by_cluster(scope.clusters, c) for c in columns]
        drawn = resample_counts(scope, kept, by_cluster)
        for metric, above, below in (("abstention_rate", 0, 4), ("selective_accuracy", 1, 3), ("accuracy", 2, 4)):
            values = [
                _divide_or_nan(c[:, above].sum(keepdims=True), c[:, below].sum(keepdims=True))[0] for c in by_cluster
            ]
            draws = (
                None if drawn is None else mean_over_seeds([_divide_or_nan(d[:, above], d[:, below]) for d in drawn])
            )
            value = float(np.mean(values))
            if np.isnan(value):
                yield key.row(metric=metric, model=model, seed="mean", value=None, note=_NO_DECISION_NOTE, **counts)
                continue
            ends = _build_defined_interval(draws, kept, "in most resamples one seed decides no window")
            yield key.row(metric=metric, model=model, seed="mean", value=value, **ends, **counts)


def compute_confidence_thresholds(
    joined: PredictionSet, group: PredictionGroup, val_b: PredictionGroup | None
) -> dict[tuple[str, int], FloatArray]:
    """Compute the confidence below which the model of each window's fold abstains.

    Args:
        joined: Pooled test windows.
        group: The group that they were pooled from.
        val_b: The predictions of validation B; models without are left out.

    Returns:
        (model, seed) → ``(n,)`` thresholds.
    """
    firsts = {s.fold: s for s in reversed(group.predictions)}
    fold_of = {key: fold for fold, s in firsts.items() for key in s.windows.window_ids()}
    folds = [fold_of[key] for key in joined.windows.window_ids()]
    found: dict[tuple[str, int], FloatArray] = {}
    for a in joined.outputs:
        own: dict[str, ModelPredictions] = {
            s.fold: s for s in (val_b.predictions if val_b else ()) if (s.model, s.seed) == (a.model, a.seed)
        }
        if set(folds) <= set(own):
            at = {f: float(np.quantile(own[f].output.probabilities.max(axis=1), 1 - DECIDED_SHARE)) for f in set(folds)}
            found[a.model, a.seed] = np.array([at[f] for f in folds])
    return found


def _build_defined_interval(draws: FloatArray | None, kept: ResampleSelection, text: str) -> IntervalColumns:
    """Return the interval over the resamples with a value, or a note with `text` where most have none."""
    known = None if draws is None else draws[~np.isnan(draws)]
    if draws is not None and known is not None and 2 * len(known) < len(draws):
        return {"note": MetricNote(code=NoteCode.RESAMPLES_LOSE_WINDOWS, text=text)}
    return build_interval(known, kept)


def _divide_or_nan(above: FloatArray, below: FloatArray) -> FloatArray:
    found: FloatArray = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
    return found
