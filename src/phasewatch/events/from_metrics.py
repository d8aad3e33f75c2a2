"""Convert the metrics of a run to the score, confusion and profile events of the dashboard."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch import profiles
from phasewatch.evaluation import query
from phasewatch.evaluation.headline import HeadlineVerdict, build_headline, render_headline
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricRow, MetricTable, select_rows
from phasewatch.events.schema import (
    ConfusionEvent,
    EventData,
    ProfileCell,
    ProfileTableEvent,
    ScoreEvent,
    ScoreRow,
    SplitProtocolScore,
)
from phasewatch.models.registry import BASELINE_MODELS
from phasewatch.models.smoothing import SMOOTHING_NONE

__all__ = ["build_metric_events", "build_profile_event"]

# From the easiest split to the hardest, including the headline's.
_SPLIT_PROTOCOLS = ("random_windows", "in_distribution", "held_out_host", "held_out_sample", "held_out_both")
_MAX_NOTES, _MAX_NOTE_CHARS = 12, 600


def build_metric_events(metrics: MetricTable, verdict: HeadlineVerdict | None = None) -> tuple[EventData, ...]:
    """Build the score event, and the confusion event of the headline's model if it has a confusion matrix.

    Args:
        metrics: The run's metrics.
        verdict: The audit's verdict, which may withdraw numbers of the headline; None if the run was not audited.
    """
    rows = query.select_recipe_rows(metrics.metrics)
    found: list[EventData] = [_build_score_event(metrics, rows, verdict)]
    model = query.find_headline_model(rows)
    matrix = query.build_confusion_matrix(metrics.metrics, model=model) if model else None
    if matrix is not None and model is not None:
        of = query.find_score(rows, "macro_f1", model=model)
        found.append(
            ConfusionEvent(
                model=model,
                recipe=DEFAULT_HEADLINE.recipe,
                threat=DEFAULT_HEADLINE.channel_set,
                table=DEFAULT_HEADLINE.input,
                agent=of.agent if of else None,
                labels=matrix.labels,
                counts=matrix.counts,
                n_episodes=of.n_episodes if of else 0,
                n_hosts=of.n_hosts if of else 0,
            )
        )
    return tuple(found)


def _build_score_event(metrics: MetricTable, rows: Sequence[MetricRow], verdict: HeadlineVerdict | None) -> ScoreEvent:
    """Build the leaderboard of the headline's split, with the scores under other split protocols."""
    ranked = [
        c.five_class
        for c in query.build_leaderboard(rows)
        if c.five_class is not None and c.five_class.value is not None
    ]
    most = max((r.n_hosts for r in ranked), default=0)
    ranked.sort(key=lambda r: r.n_hosts < most)  # scores on fewer hosts are not comparable and come last
    lead = next((r for r in ranked if r.channel_set == DEFAULT_HEADLINE.channel_set), ranked[0] if ranked else None)
    model = query.find_headline_model(rows)
    return ScoreEvent(
        metric="macro_f1",
        tested=(lead.n_profiles_tested or 0) if lead else 0,
        registered=(lead.n_profiles or 0) if lead else 0,
        recipe=DEFAULT_HEADLINE.recipe,
        rows=tuple(_build_score_row(r, lead, metrics.metrics) for r in ranked[:200]),
        inflation=_build_split_scores(metrics.metrics, model) if model else (),
        inflation_of=model,
        headline=render_headline(build_headline(metrics), verdict)[:_MAX_NOTE_CHARS],
        notes=tuple(note[:_MAX_NOTE_CHARS] for note in query.collect_notes(metrics.metrics)[:_MAX_NOTES]),
    )


def _build_score_row(row: MetricRow, lead: MetricRow | None, rows: Sequence[MetricRow]) -> ScoreRow:
    return ScoreRow(
        model=str(row.model),
        threat=row.channel_set,
        table=row.input,
        agent=row.agent,
        value=float(row.value or 0.0),
        low=row.low,
        high=row.high,
        why=row.note if row.low is None else None,
        is_baseline=row.model in BASELINE_MODELS,
        p_holm=_find_p_value(row, lead, rows),
        n_episodes=row.n_episodes,
        n_sessions=row.n_sessions,
        n_hosts=row.n_hosts,
        seeds=max(1, sum(_is_same_series(r, row) and isinstance(r.seed, int) for r in rows)),
    )


def _find_p_value(row: MetricRow, lead: MetricRow | None, rows: Sequence[MetricRow]) -> float | None:
    """Return the corrected p value of the paired difference to the first model, or None without one."""
    if lead is None or row is lead or row.channel_set != lead.channel_set:
        return None
    pair = {row.model, lead.model}
    gaps = select_rows(
        rows,
        "macro_f1_gap",
        overall=True,
        recipe=row.recipe,
        fold=row.fold,
        channel_set=row.channel_set,
        input=row.input,
        smoothing=row.smoothing,
        agent=row.agent,
    )
    return next((r.p_holm for r in gaps if r.p_holm is not None and {r.model, r.compared_to} == pair), None)


def _is_same_series(row: MetricRow, other: MetricRow) -> bool:
    keys = (
        "metric",
        "recipe",
        "fold",
        "channel_set",
        "model",
        "input",
        "smoothing",
        "agent",
        "phase",
        "profile",
        "host_id",
        "sample_name",
        "compared_to",
        "bin",
    )
    return all(getattr(row, k) == getattr(other, k) for k in keys)


def _build_split_scores(rows: Sequence[MetricRow], model: str) -> tuple[SplitProtocolScore, ...]:
    """Return the score of a model under each split protocol of the run; episodes without the agent are preferred."""
    found: list[SplitProtocolScore] = []
    for recipe in _SPLIT_PROTOCOLS:
        own = select_rows(
            rows,
            "macro_f1",
            overall=True,
            recipe=recipe,
            fold="pooled",
            channel_set=DEFAULT_HEADLINE.channel_set,
            model=model,
            input=DEFAULT_HEADLINE.input,
            smoothing=SMOOTHING_NONE,
            seed="mean",
            agent={DEFAULT_HEADLINE.agent, None},
            compared_to=None,
        )
        scored = [
            SplitProtocolScore(recipe=recipe, value=r.value, low=r.low, high=r.high)
            for r in sorted(own, key=lambda r: r.agent is None)
            if r.value is not None
        ]
        found += scored[:1]
    return tuple(found) if len(found) > 1 else ()


def build_profile_event(metrics: MetricTable) -> ProfileTableEvent | None:
    """Build the scores of the headline's model by profile and host, or return None without such scores.

    The table has all registered profiles, so that untested ones are visible.
    """
    rows = query.select_recipe_rows(metrics.metrics)
    model = query.find_headline_model(rows)
    metric = query.choose_group_metric(rows, model=model, by=("profile", "host_id")) if model else None
    if model is None or metric is None:
        return None
    own = [r for r in rows if r.model == model and r.channel_set == DEFAULT_HEADLINE.channel_set]
    registered = [p.name for p in profiles.PROFILES]
    seen = {r.profile for r in own if r.profile is not None and r.n_windows}
    names = (*registered, *sorted(seen - set(registered)))
    hosts = tuple(sorted({r.host_id for r in own if r.host_id is not None}))

    def cell(profile: str, host: str) -> ProfileCell | None:
        found = query.find_score(own, metric, model=model, profile=profile, host_id=host)
        return None if found is None or not found.n_windows else _build_profile_cell(found)

    return ProfileTableEvent(
        metric=metric,
        recipe=DEFAULT_HEADLINE.recipe,
        threat=DEFAULT_HEADLINE.channel_set,
        model=model,
        profiles=names,
        hosts=hosts,
        cells=tuple(tuple(cell(p, h) for h in hosts) for p in names),
        untested_profiles=tuple(p for p in registered if p not in seen),
    )


def _build_profile_cell(row: MetricRow) -> ProfileCell:
    return ProfileCell(
        value=row.value,
        low=row.low,
        high=row.high,
        why=row.note,
        n_windows=row.n_windows,
        n_episodes=row.n_episodes,
    )
