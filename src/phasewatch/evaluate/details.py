"""What stands beside the scores of a board: support, confusion, calibration, and in words what a reader must know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from phasewatch import measures
from phasewatch.evaluate import bootstrap
from phasewatch.evaluate.bootstrap import Floats
from phasewatch.evaluate.rows import MetricRow
from phasewatch.evaluate.scope import (
    Answer,
    Place,
    Rules,
    Scope,
    draw,
    keep_resamples,
    mean_over_seeds,
    models_of,
    span,
)
from phasewatch.models.registry import BASELINES
from phasewatch.vocab import PHASES

TIME = "elapsed_time"
_ECE = slice(0, measures.ECE_BINS)
_MASS = slice(measures.ECE_BINS, measures.ECE_BINS + measures.MASS_BINS)
_MASS_WINDOWS = slice(_MASS.stop, _MASS.stop + measures.MASS_BINS)
_BIASED = "biased upwards by the number of windows, so it has no interval; see ece_debiased"
_AT_LEAST_0 = "sampling bias is subtracted and the result cut at 0, so it has no interval; see confidence_less_accuracy"


def detail_rows(place: Place, scope: Scope) -> Iterator[MetricRow]:
    """Give support, confusion and calibration over all windows of the board."""
    counts, kept = scope.counts(), keep_resamples(scope)
    support = np.bincount(scope.shown.y_true, minlength=len(PHASES))
    for code, phase in enumerate(PHASES):
        yield place.row(
            metric="support",
            model=None,
            phase=str(phase),
            value=float(support[code]),
            unit="windows",
            why="a count",
            **counts,
        )
    for model, answers in models_of(scope).items():
        mean = np.mean([measures.confusion_counts(scope.shown.y_true, a.y_pred) for a in answers], axis=0)
        for truth, decided in np.ndindex(mean.shape):
            yield place.row(
                metric="confusion", model=model, seed="mean", phase=str(PHASES[truth]), x=float(decided),
                value=float(mean[truth, decided]), unit="windows", why="a count", **counts,
            )  # fmt: skip
        by_cluster = [bootstrap.sums(scope.clusters, _terms(scope, a)) for a in answers]
        drawn = draw(scope, kept, by_cluster)
        points = [s.sum(axis=0, keepdims=True) for s in by_cluster]
        plain = float(np.mean([_ece(p) for p in points]))
        yield place.row(metric="ece", model=model, seed="mean", value=plain, why=_BIASED, **counts)
        less: dict[str, object] = {"value": None, "why": kept.why}
        if drawn is not None:
            own = [
                measures.debiased_rms(float(_squared(p)[0]), _squared(d)) for p, d in zip(points, drawn, strict=True)
            ]
            less = {"value": float(np.mean(own)), "why": _AT_LEAST_0}
        yield place.row(metric="ece_debiased", model=model, seed="mean", **less, **counts)
        for metric, measure in (("confidence_less_accuracy", _confidence_less_accuracy), ("brier", _brier)):
            value = float(np.mean([measure(p) for p in points]))
            draws = None if drawn is None else mean_over_seeds([measure(d) for d in drawn])
            yield place.row(metric=metric, model=model, seed="mean", value=value, **span(draws, kept), **counts)


def _terms(scope: Scope, answer: Answer) -> Floats:
    """Return the columns that calibration errors and Brier score are sums of, ``(n, 37)``.

    Gaps in 15 bins of equal width, gaps and windows in 10 bins of equal mass, squared distance, one.
    """
    y, p = scope.shown.y_true, answer.probabilities
    bins = measures.mass_bin(p)
    gaps = measures.gap_terms(p, y, bins, measures.MASS_BINS)
    windows = np.eye(measures.MASS_BINS)[bins]
    return np.column_stack([measures.ece_terms(p, y), gaps, windows, measures.brier_terms(p, y), np.ones(len(y))])


def _ece(columns: Floats) -> Floats:
    error: Floats = np.abs(columns[:, _ECE]).sum(axis=1) / columns[:, -1]
    return error


def _squared(columns: Floats) -> Floats:
    """Compute the squared calibration error over bins of equal mass, ``(B, 37)`` → ``(B,)``."""
    gaps, windows = columns[:, _MASS], columns[:, _MASS_WINDOWS]
    squared: Floats = (gaps**2 / np.maximum(windows, 1.0)).sum(axis=1) / columns[:, -1]
    return squared


def _confidence_less_accuracy(columns: Floats) -> Floats:
    gap: Floats = columns[:, _ECE].sum(axis=1) / columns[:, -1]
    return gap


def _brier(columns: Floats) -> Floats:
    score: Floats = columns[:, -2] / columns[:, -1]
    return score


def note_rows(place: Place, scope: Scope, rules: Rules, rows: Sequence[MetricRow]) -> list[MetricRow]:
    """Say in words what a reader of the numbers must know: too few sessions, nothing above the clock, what is untested."""
    counts = scope.counts()

    def note(words: str, **more: object) -> MetricRow:
        return place.row(metric="note", why=words, **{"model": None, **counts, **more})

    notes = [
        place.row(
            metric="untested_profile", model=None, profile=p, value=0.0, unit="windows", why="no test window", **counts
        )
        for p in rules.profiles
        if p not in set(scope.shown.profile)
    ]
    notes += [
        place.row(
            metric="untested_phase", model=None, phase=str(p), value=0.0, unit="windows", why="no test window", **counts
        )
        for p in PHASES
        if p.code not in scope.classes
    ]
    for origin in sorted(set(scope.shown.origin)):
        episodes = len(set(scope.shown.episode_id[scope.shown.origin == origin]))
        notes.append(
            place.row(metric="origin", model=None, value=float(episodes), unit="episodes", why=str(origin), **counts)
        )
    sessions = counts["n_sessions"]
    if sessions < bootstrap.FEW_CLUSTERS:
        notes.append(
            note(f"only {sessions} sessions: an interval over fewer than {bootstrap.FEW_CLUSTERS} is a rough one")
        )
    if scope.weights is not None and scope.weights.redrawn:
        notes.append(
            note(f"{scope.weights.redrawn} of {len(scope.weights)} resamples lost a class and were drawn again")
        )
    for row in rows:
        if row.metric.startswith("macro_f1_gap@") and TIME in (row.model, row.vs):
            gap = _from_the_model(row)
            if gap.model not in BASELINES and (gap.low is None or gap.low <= 0):
                notes.append(note(_below_the_clock(gap), model=gap.model, vs=TIME))
    return notes


def _from_the_model(row: MetricRow) -> MetricRow:
    """Count a gap from the model's side: one of the user's own stands behind the baselines, so its row counts from the clock."""
    if row.vs == TIME or row.value is None:
        return row
    low, high = (None, None) if row.low is None or row.high is None else (-row.high, -row.low)
    return msgspec.structs.replace(row, model=row.vs, vs=row.model, value=-row.value, low=low, high=high)


def _below_the_clock(gap: MetricRow) -> str:
    if gap.low is None or gap.high is None:
        words = f"gap {gap.value:+.2f} (no interval, {gap.why})"
        return f"{gap.model} cannot be said to be above elapsed time alone: {words}"
    return f"{gap.model} is not above elapsed time alone: gap {gap.value:+.2f} ([{gap.low:+.2f}, {gap.high:+.2f}])"
