"""Metric rows of one set of test windows: models side by side, by class, profile, host and sample, and gaps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch import metrics
from phasewatch.arrays import FloatArray
from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.metric_table import MetricNote, MetricRow, NoteCode, select_rows
from phasewatch.evaluation.scoring import (
    BootstrapScores,
    EvaluationSettings,
    IntervalColumns,
    MetricKey,
    ModelOutput,
    PredictionSet,
    ResampleSelection,
    ScoringSet,
    ValueColumns,
    build_interval,
    build_scoring_set,
    compute_gap_p_value,
    count_profiles,
    mean_over_seeds,
    resample_counts,
    score_models,
    select_resamples,
)
from phasewatch.models.registry import BASELINE_MODELS
from phasewatch.types import PHASES

__all__ = [
    "ELAPSED_TIME",
    "LOAD_ONLY",
    "build_leaderboard_rows",
    "compute_host_interval",
]

ELAPSED_TIME, LOAD_ONLY = "elapsed_time", "load_only"
_ECE_COLUMNS = slice(0, metrics.ECE_BINS)
_MASS_GAP_COLUMNS = slice(metrics.ECE_BINS, metrics.ECE_BINS + metrics.EQUAL_MASS_BINS)
_MASS_COUNT_COLUMNS = slice(_MASS_GAP_COLUMNS.stop, _MASS_GAP_COLUMNS.stop + metrics.EQUAL_MASS_BINS)
_ECE_NOTE = MetricNote(
    code=NoteCode.BIASED_ESTIMATE,
    text="biased upwards by the number of windows, so it has no interval; see ece_debiased",
)
_DEBIASED_ECE_NOTE = MetricNote(
    code=NoteCode.BIASED_ESTIMATE,
    text="sampling bias is subtracted and the result cut at 0, so it has no interval; see confidence_less_accuracy",
)
_COUNT_NOTE = MetricNote(code=NoteCode.COUNT, text="a count")
_UNTESTED_NOTE = MetricNote(code=NoteCode.NO_TEST_WINDOWS, text="no test window")


def _build_detail_rows(key: MetricKey, scope: ScoringSet) -> Iterator[MetricRow]:
    """Yield support, confusion matrix and calibration errors over all windows of the set."""
    counts, kept = scope.counts(), select_resamples(scope)
    support = np.bincount(scope.windows.y_true, minlength=len(PHASES))
    for code, phase in enumerate(PHASES):
        yield key.row(
            metric="support",
            model=None,
            phase=str(phase),
            value=float(support[code]),
            unit="windows",
            note=_COUNT_NOTE,
            **counts,
        )
    for model, outputs in scope.predictions.group_by_model().items():
        mean = np.mean([metrics.confusion_counts(scope.windows.y_true, a.y_pred) for a in outputs], axis=0)
        for truth, decided in np.ndindex(mean.shape):
            yield key.row(
                metric="confusion",
                model=model,
                seed="mean",
                phase=str(PHASES[truth]),
                bin=float(decided),
                value=float(mean[truth, decided]),
                unit="windows",
                note=_COUNT_NOTE,
                **counts,
            )
        by_cluster = [bootstrap.sum_by_cluster(scope.clusters, _compute_calibration_terms(scope, a)) for a in outputs]
        drawn = resample_counts(scope, kept, by_cluster)
        points = [s.sum(axis=0, keepdims=True) for s in by_cluster]
        plain = float(np.mean([_compute_ece(p) for p in points]))
        yield key.row(metric="ece", model=model, seed="mean", value=plain, note=_ECE_NOTE, **counts)
        debiased: ValueColumns = {"value": None, "note": kept.note}
        if drawn is not None:
            own = [
                metrics.debiased_rms(float(_compute_squared_error(p)[0]), _compute_squared_error(d))
                for p, d in zip(points, drawn, strict=True)
            ]
            debiased = {"value": float(np.mean(own)), "note": _DEBIASED_ECE_NOTE}
        yield key.row(metric="ece_debiased", model=model, seed="mean", **debiased, **counts)
        for metric, measure in (
            ("confidence_less_accuracy", _compute_confidence_less_accuracy),
            ("brier", _compute_brier),
        ):
            value = float(np.mean([measure(p) for p in points]))
            draws = None if drawn is None else mean_over_seeds([measure(d) for d in drawn])
            yield key.row(metric=metric, model=model, seed="mean", value=value, **build_interval(draws, kept), **counts)


def _compute_calibration_terms(scope: ScoringSet, output: ModelOutput) -> FloatArray:
    """Return the columns that calibration errors and Brier score are sums of, ``(n, 37)``.

    Gaps in 15 bins of equal width, gaps and windows in 10 bins of equal mass, squared distance, one.
    """
    y, p = scope.windows.y_true, output.probabilities
    bins = metrics.equal_mass_bin(p)
    gaps = metrics.calibration_gap_terms(p, y, bins, metrics.EQUAL_MASS_BINS)
    windows = np.eye(metrics.EQUAL_MASS_BINS)[bins]
    return np.column_stack([metrics.ece_terms(p, y), gaps, windows, metrics.brier_terms(p, y), np.ones(len(y))])


def _compute_ece(columns: FloatArray) -> FloatArray:
    error: FloatArray = np.abs(columns[:, _ECE_COLUMNS]).sum(axis=1) / columns[:, -1]
    return error


def _compute_squared_error(columns: FloatArray) -> FloatArray:
    """Compute the squared calibration error over bins of equal mass, ``(B, 37)`` → ``(B,)``."""
    gaps, windows = columns[:, _MASS_GAP_COLUMNS], columns[:, _MASS_COUNT_COLUMNS]
    squared: FloatArray = (gaps**2 / np.maximum(windows, 1.0)).sum(axis=1) / columns[:, -1]
    return squared


def _compute_confidence_less_accuracy(columns: FloatArray) -> FloatArray:
    gap: FloatArray = columns[:, _ECE_COLUMNS].sum(axis=1) / columns[:, -1]
    return gap


def _compute_brier(columns: FloatArray) -> FloatArray:
    score: FloatArray = columns[:, -2] / columns[:, -1]
    return score


def _build_note_rows(
    key: MetricKey, scope: ScoringSet, rules: EvaluationSettings, rows: Sequence[MetricRow]
) -> list[MetricRow]:
    """Build remarks: untested profiles and phases, origins, few sessions, models not above elapsed time."""
    counts = scope.counts()

    def build_remark(code: NoteCode, text: str, **columns: object) -> MetricRow:
        note = MetricNote(code=code, text=text)
        return key.row(metric="note", note=note, **{"model": None, **counts, **columns})

    notes = [
        key.row(
            metric="untested_profile", model=None, profile=p, value=0.0, unit="windows", note=_UNTESTED_NOTE, **counts
        )
        for p in rules.profiles
        if p not in set(scope.windows.profile)
    ]
    notes += [
        key.row(
            metric="untested_phase",
            model=None,
            phase=str(p),
            value=0.0,
            unit="windows",
            note=_UNTESTED_NOTE,
            **counts,
        )
        for p in PHASES
        if p.code not in scope.classes
    ]
    for origin in sorted(set(scope.windows.origin)):
        episodes = len(set(scope.windows.episode_id[scope.windows.origin == origin]))
        note = MetricNote(code=NoteCode.from_origin(origin), text=str(origin))
        notes.append(key.row(metric="origin", model=None, value=float(episodes), unit="episodes", note=note, **counts))
    sessions = counts["n_sessions"]
    if sessions < bootstrap.FEW_CLUSTERS:
        text = f"only {sessions} sessions: an interval over fewer than {bootstrap.FEW_CLUSTERS} is a rough one"
        notes.append(build_remark(NoteCode.FEW_SESSIONS, text))
    if scope.weights is not None and scope.weights.redrawn:
        text = f"{scope.weights.redrawn} of {len(scope.weights)} resamples lost a class and were drawn again"
        notes.append(build_remark(NoteCode.RESAMPLES_REDRAWN, text))
    for row in select_rows(rows, "macro_f1_gap"):
        if ELAPSED_TIME in (row.model, row.compared_to):
            gap = _orient_gap(row)
            if gap.model not in BASELINE_MODELS and (gap.low is None or gap.low <= 0):
                text = _render_elapsed_time_note(gap)
                notes.append(
                    build_remark(NoteCode.NOT_ABOVE_ELAPSED_TIME, text, model=gap.model, compared_to=ELAPSED_TIME)
                )
    return notes


def _orient_gap(row: MetricRow) -> MetricRow:
    """Orient a gap from the model's side.

    A user's own model is listed after the baselines, so its row has elapsed time first.
    """
    if row.compared_to == ELAPSED_TIME or row.value is None:
        return row
    low, high = (None, None) if row.low is None or row.high is None else (-row.high, -row.low)
    return msgspec.structs.replace(
        row, model=row.compared_to, compared_to=row.model, value=-row.value, low=low, high=high
    )


def _render_elapsed_time_note(gap: MetricRow) -> str:
    if gap.low is None or gap.high is None:
        words = f"gap {gap.value:+.2f} (no interval, {gap.note})"
        return f"{gap.model} cannot be said to be above elapsed time alone: {words}"
    return f"{gap.model} is not above elapsed time alone: gap {gap.value:+.2f} ([{gap.low:+.2f}, {gap.high:+.2f}])"


_MACRO_METRICS = ("macro_f1", "macro_f1_3class")


def build_leaderboard_rows(
    key: MetricKey,
    predictions: PredictionSet,
    rules: EvaluationSettings,
    *,
    parts: bool,
    details: bool = True,
) -> list[MetricRow]:
    """Build all rows of one set of test windows.

    Args:
        key: Recipe, fold, channel set, input, smoothing and agent of the windows.
        predictions: At least one window.
        rules: Registered profiles, and how intervals are drawn.
        parts: Also build rows by profile, host and sample, and the spread between hosts.
        details: Also build rows of support, confusion and calibration.
    """
    whole = build_scoring_set(predictions, rules)
    rows = list(_build_score_rows(key, whole, rules, {}))
    if details:
        rows += _build_detail_rows(key, whole)
    if parts:
        for name in ("profile", "host_id", "sample_name"):
            rows += _build_group_rows(key, whole, rules, name)
        rows += _build_host_profile_rows(key, whole, rules)
        rows += _build_host_spread_rows(key, whole, rules, rows)
    rows += _build_note_rows(key, whole, rules, rows)
    return rows


def _build_host_spread_rows(
    key: MetricKey, whole: ScoringSet, rules: EvaluationSettings, rows: Sequence[MetricRow]
) -> Iterator[MetricRow]:
    """Yield the mean over hosts, the range for a new host, the worst host and the range of hosts."""
    counts = {**whole.counts(), **count_profiles(whole, rules)}
    for model in whole.predictions.group_by_model():
        for metric in _MACRO_METRICS:
            own = [r for r in select_rows(rows, metric, model=model, profile=None, phase=None) if r.host_id]
            values = [float(r.value or 0.0) for r in own]
            mean = float(np.mean(values))
            for name, is_new_host in (("mean_of_hosts", False), ("new_host", True)):
                ends = compute_host_interval(values, is_new_host=is_new_host)
                yield key.row(metric=f"{metric}_{name}", model=model, seed="mean", value=mean, **ends, **counts)
            if metric != _MACRO_METRICS[0]:
                continue
            worst = own[int(np.argmin(values))]
            yield key.row(
                metric="macro_f1_worst_host",
                model=model,
                seed="mean",
                value=worst.value,
                low=worst.low,
                high=worst.high,
                note=MetricNote(code=NoteCode.HOST_NAME, text=f"on {worst.host_id}"),
                **counts,
            )
            yield key.row(
                metric="macro_f1_range_of_hosts",
                model=model,
                seed="mean",
                value=float(np.ptp(values)),
                note=MetricNote(code=NoteCode.HOST_RANGE, text=f"from {min(values):.2f} to {max(values):.2f}"),
                **counts,
            )


def compute_host_interval(values: Sequence[float], *, is_new_host: bool) -> IntervalColumns:
    """Compute Student's t interval over the scores of hosts, cut to 0 … 1.

    The scores share training data, so both intervals are lower bounds of the doubt (ADR 0080).

    Args:
        values: One score per host.
        is_new_host: Return the prediction interval for the score of one more host, instead of the confidence interval
            of the mean of all hosts.

    Returns:
        The interval, or the note that explains why there is none.

    Source: Geisser 1993, "Predictive Inference", section 2.2.
    """
    from scipy.special import stdtrit

    n = len(values)
    if n < bootstrap.MIN_HOSTS:
        text = f"{n} {'host' if n == 1 else 'hosts'}, an interval between hosts needs {bootstrap.MIN_HOSTS}"
        return {"note": MetricNote(code=NoteCode.TOO_FEW_HOSTS, text=text)}
    spread = float(np.std(values, ddof=1)) * np.sqrt(1.0 / n + is_new_host)
    half, mean = float(stdtrit(n - 1, (1 + bootstrap.CONFIDENCE_LEVEL) / 2)) * spread, float(np.mean(values))
    return {"low": max(0.0, mean - half), "high": min(1.0, mean + half)}


def _build_group_rows(key: MetricKey, whole: ScoringSet, rules: EvaluationSettings, name: str) -> Iterator[MetricRow]:
    labels: NDArray[np.object_] = getattr(whole.windows, name)
    if name == "sample_name":  # sample names are unique within a profile only
        for profile, sample in sorted(set(zip(whole.windows.profile, labels, strict=True))):
            part = whole.select((whole.windows.profile == profile) & (labels == sample))
            yield from _build_score_rows(key, part, rules, {"profile": profile, "sample_name": sample})
        return
    for label in sorted(set(labels)):
        part = whole.select(labels == label)
        yield from _build_score_rows(key, part, rules, {name: label})


def _build_host_profile_rows(key: MetricKey, whole: ScoringSet, rules: EvaluationSettings) -> Iterator[MetricRow]:
    """Yield the scores of each pair of host and profile that was tested."""
    hosts, profiles = whole.windows.host_id, whole.windows.profile
    for host, profile in sorted(set(zip(hosts, profiles, strict=True))):
        part = whole.select((hosts == host) & (profiles == profile))
        yield from _build_score_rows(key, part, rules, {"host_id": host, "profile": profile})


def _build_score_rows(
    key: MetricKey, scope: ScoringSet, rules: EvaluationSettings, where: Mapping[str, str]
) -> list[MetricRow]:
    """Build macro-F1, three-state macro-F1 and F1 by class of each model, per seed and mean; then the gaps."""
    kept = select_resamples(scope)
    scored = score_models(scope, kept)
    counts = scope.counts()
    covered = {**counts, **count_profiles(scope, rules)}
    rows: list[MetricRow] = []
    for model, seeds in scored.items():
        for metric in _MACRO_METRICS:
            points, draws = _collect_scores(seeds, metric)
            if not where:
                rows += [
                    key.row(
                        metric=metric, model=model, seed=s.seed, value=float(v), **build_interval(d, kept), **covered
                    )
                    for s, v, d in zip(seeds, points, draws, strict=True)
                ]
            rows.append(
                key.row(
                    metric=metric,
                    model=model,
                    seed="mean",
                    value=float(np.mean(points)),
                    **build_interval(mean_over_seeds(draws), kept),
                    **where,
                    **covered,
                )
            )
        if len(where) > 1:
            continue  # one class of one host and profile, or of one sample, has only a few windows
        points, draws = _collect_scores(seeds, "f1")
        for c in scope.classes:
            of_class = mean_over_seeds([None if d is None else d[:, c] for d in draws])
            rows.append(
                key.row(
                    metric="f1",
                    model=model,
                    seed="mean",
                    phase=str(PHASES[c]),
                    value=float(np.mean([v[c] for v in points])),
                    **build_interval(of_class, kept),
                    **where,
                    **counts,
                )
            )
    return rows if where else rows + _build_model_gap_rows(key, scored, kept, covered)


def _build_model_gap_rows(
    key: MetricKey,
    scored: Mapping[str, Sequence[BootstrapScores]],
    kept: ResampleSelection,
    counts: Mapping[str, int],
) -> list[MetricRow]:
    """Compute the paired gap of every two models, seeds averaged within each resample.

    Holm's family is the gaps with at least one model that is not a baseline; two baselines keep their own p-value.
    """
    rows: list[MetricRow] = []
    for metric in _MACRO_METRICS:
        means = {model: _average_seed_scores(seeds, metric) for model, seeds in scored.items()}
        pairs = list(combinations(means, 2))
        gaps = [_subtract_draws(means[one][1], means[other][1]) for one, other in pairs]
        p_values = [compute_gap_p_value(d, kept) for d in gaps]
        family = [None if set(pair) <= set(BASELINE_MODELS) else p for pair, p in zip(pairs, p_values, strict=True)]
        for (one, other), d, p, p_holm in zip(pairs, gaps, p_values, bootstrap.adjust_p_values(family), strict=True):
            rows.append(
                key.row(
                    metric=f"{metric}_gap",
                    model=one,
                    compared_to=other,
                    seed="mean",
                    value=means[one][0] - means[other][0],
                    p=p,
                    p_holm=p_holm,
                    **build_interval(d, kept),
                    **counts,
                )
            )
    return rows


def _collect_scores(seeds: Sequence[BootstrapScores], metric: str) -> tuple[list[FloatArray], list[FloatArray | None]]:
    points = [getattr(s.point, metric) for s in seeds]
    return points, [None if s.draws is None else getattr(s.draws, metric) for s in seeds]


def _average_seed_scores(seeds: Sequence[BootstrapScores], metric: str) -> tuple[float, FloatArray | None]:
    points, draws = _collect_scores(seeds, metric)
    return float(np.mean(points)), mean_over_seeds(draws)


def _subtract_draws(one: FloatArray | None, other: FloatArray | None) -> FloatArray | None:
    return None if one is None or other is None else one - other
