"""All numbers over one set of test windows: the models side by side, by class, profile, host and sample, and their gaps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from phasewatch.evaluate import bootstrap
from phasewatch.evaluate.bootstrap import Floats
from phasewatch.evaluate.details import detail_rows, note_rows
from phasewatch.evaluate.rows import MetricRow
from phasewatch.evaluate.scope import (
    Answer,
    Kept,
    Place,
    Rules,
    Scope,
    Scored,
    Shown,
    keep_resamples,
    mean_over_seeds,
    models_of,
    p_of_gap,
    score_answers,
    span,
    tested,
)
from phasewatch.models.registry import BASELINES
from phasewatch.vocab import PHASES

MACRO = ("macro_f1", "macro_f1_3")


def build_rows(
    place: Place, shown: Shown, answers: Sequence[Answer], rules: Rules, *, parts: bool, details: bool = True
) -> list[MetricRow]:
    """Give all rows of one board.

    Args:
        place: Which recipe, fold, threat model, table and agent the windows are of.
        shown: The windows, at least one.
        answers: One for each model and seed, over exactly these windows.
        rules: What is registered, and how often to resample.
        parts: Also by profile, host and sample, and how hosts differ.
        details: Also support, confusion and calibration.
    """
    whole = scope_of(shown, answers, rules)
    rows = list(_scores(place, whole, rules, {}))
    if details:
        rows += detail_rows(place, whole)
    if parts:
        for name in ("profile", "host_id", "sample_name"):
            rows += _by(place, whole, rules, name)
        rows += _by_cell(place, whole, rules)
        rows += _between_hosts(place, whole, rules, rows)
    rows += note_rows(place, whole, rules, rows)
    return rows


def scope_of(shown: Shown, answers: Sequence[Answer], rules: Rules) -> Scope:
    """Number the sessions of some windows and draw the weights that everything over them shares."""
    clusters = bootstrap.number_clusters(shown.host_id.tolist(), shown.session.tolist())
    classes = tuple(int(c) for c in np.unique(shown.y_true))
    weights = bootstrap.draw_weights(
        clusters, shown.y_true, classes=classes, resamples=rules.resamples, seed=rules.seed
    )
    return Scope(shown=shown, answers=answers, clusters=clusters, weights=weights, classes=classes)


def _between_hosts(place: Place, whole: Scope, rules: Rules, rows: Sequence[MetricRow]) -> Iterator[MetricRow]:
    """Give the mean over hosts, the worst one and how far they are apart; an interval only from `MIN_HOSTS` hosts on."""
    of = tested(whole, rules)
    counts = whole.counts()
    for model in models_of(whole):
        own = [
            r for r in rows
            if r.model == model and r.metric.startswith("macro_f1@") and r.host_id and r.profile is r.phase is None
        ]  # fmt: skip
        values = np.array([r.value for r in own])
        few = f"{len(own)} hosts, an interval between hosts needs {bootstrap.MIN_HOSTS}"
        ends: dict[str, object] = {"why": few}
        if len(own) >= bootstrap.MIN_HOSTS:
            rng = np.random.default_rng([rules.seed, len(own)])
            low, high = bootstrap.interval(rng.choice(values, (rules.resamples, len(own))).mean(axis=1))
            ends = {"low": low, "high": high}
        worst = own[int(values.argmin())]
        yield place.row(
            metric=f"macro_f1_mean_of_hosts@{of}",
            model=model,
            seed="mean",
            value=float(values.mean()),
            **ends,
            **counts,
        )
        yield place.row(
            metric=f"macro_f1_worst_host@{of}", model=model, seed="mean", value=worst.value, low=worst.low, high=worst.high,
            why=f"on {worst.host_id}", **counts,
        )  # fmt: skip
        yield place.row(
            metric=f"macro_f1_range_of_hosts@{of}", model=model, seed="mean", value=float(np.ptp(values)),
            why=f"from {values.min():.2f} to {values.max():.2f}", **counts,
        )  # fmt: skip


def _by(place: Place, whole: Scope, rules: Rules, name: str) -> Iterator[MetricRow]:
    labels: NDArray[np.object_] = getattr(whole.shown, name)
    if name == "sample_name":  # sample names are unique within a profile only
        for profile, sample in sorted(set(zip(whole.shown.profile, labels, strict=True))):
            part = whole.take((whole.shown.profile == profile) & (labels == sample))
            yield from _scores(place, part, rules, {"profile": profile, "sample_name": sample})
        return
    for label in sorted(set(labels)):
        part = whole.take(labels == label)
        yield from _scores(place, part, rules, {name: label})


def _by_cell(place: Place, whole: Scope, rules: Rules) -> Iterator[MetricRow]:
    """Give the scores of each host and profile together, where both were tested."""
    hosts, profiles = whole.shown.host_id, whole.shown.profile
    for host, profile in sorted(set(zip(hosts, profiles, strict=True))):
        part = whole.take((hosts == host) & (profiles == profile))
        yield from _scores(place, part, rules, {"host_id": host, "profile": profile})


def _scores(place: Place, scope: Scope, rules: Rules, where: Mapping[str, str]) -> list[MetricRow]:
    """Give macro-F1, three-state macro-F1 and F1 by class of each model, for its seeds and their mean; then the gaps."""
    kept = keep_resamples(scope)
    scored = score_answers(scope, kept)
    of, counts = tested(scope, rules), scope.counts()
    rows: list[MetricRow] = []
    for model, seeds in scored.items():
        for metric in MACRO:
            points, draws = _of(seeds, metric)
            if not where:
                rows += [
                    place.row(
                        metric=f"{metric}@{of}", model=model, seed=s.seed, value=float(v), **span(d, kept), **counts,
                    )
                    for s, v, d in zip(seeds, points, draws, strict=True)
                ]  # fmt: skip
            rows.append(
                place.row(
                    metric=f"{metric}@{of}", model=model, seed="mean", value=float(np.mean(points)),
                    **span(mean_over_seeds(draws), kept), **where, **counts,
                )
            )  # fmt: skip
        if len(where) > 1:
            continue  # a class of one host's one profile, or of one sample, is a handful of windows
        points, draws = _of(seeds, "f1")
        for c in scope.classes:
            of_class = mean_over_seeds([None if d is None else d[:, c] for d in draws])
            rows.append(
                place.row(
                    metric="f1", model=model, seed="mean", phase=str(PHASES[c]),
                    value=float(np.mean([v[c] for v in points])), **span(of_class, kept), **where, **counts,
                )
            )  # fmt: skip
    return rows if where else rows + _gaps(place, scored, kept, of, counts)


def _gaps(
    place: Place, scored: Mapping[str, Sequence[Scored]], kept: Kept, of: str, counts: Mapping[str, int]
) -> list[MetricRow]:
    """Compute the paired gap of each two models, seeds averaged inside each resample.

    Holm's family holds the gaps of a model: two baselines have a p-value of their own, and correct nobody else's.
    """
    rows: list[MetricRow] = []
    for metric in MACRO:
        means = {model: _mean_of(seeds, metric) for model, seeds in scored.items()}
        pairs = list(combinations(means, 2))
        gaps = [_difference(means[one][1], means[other][1]) for one, other in pairs]
        p_values = [p_of_gap(d, kept) for d in gaps]
        family = [None if set(pair) <= set(BASELINES) else p for pair, p in zip(pairs, p_values, strict=True)]
        for (one, other), d, p, p_holm in zip(pairs, gaps, p_values, bootstrap.holm(family), strict=True):
            rows.append(
                place.row(
                    metric=f"{metric}_gap@{of}", model=one, vs=other, seed="mean",
                    value=means[one][0] - means[other][0], p=p, p_holm=p_holm, **span(d, kept), **counts,
                )
            )  # fmt: skip
    return rows


def _of(seeds: Sequence[Scored], metric: str) -> tuple[list[Floats], list[Floats | None]]:
    points = [getattr(s.point, metric) for s in seeds]
    return points, [None if s.draws is None else getattr(s.draws, metric) for s in seeds]


def _mean_of(seeds: Sequence[Scored], metric: str) -> tuple[float, Floats | None]:
    points, draws = _of(seeds, metric)
    return float(np.mean(points)), mean_over_seeds(draws)


def _difference(one: Floats | None, other: Floats | None) -> Floats | None:
    return None if one is None or other is None else one - other
