"""Queries on metric rows for the report and the dashboard: leaderboard, best score, confusion matrix, gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phasewatch.evaluation.comparisons import choose_agent_state
from phasewatch.evaluation.leaderboard import ELAPSED_TIME
from phasewatch.evaluation.metric_table import (
    DEFAULT_HEADLINE,
    ConfusionMatrix,
    MetricRow,
    NoteCode,
    select_headline,
    select_rows,
)
from phasewatch.models.registry import BASELINE_MODELS
from phasewatch.training.predictions import NO_FILTER
from phasewatch.types import PHASES

__all__ = [
    "METRIC_LABELS",
    "ElapsedTimeGap",
    "LeaderboardEntry",
    "build_confusion_matrix",
    "build_leaderboard",
    "choose_group_metric",
    "collect_notes",
    "find_elapsed_time_gap",
    "find_headline_model",
    "find_overall_row",
    "find_score",
    "is_above_elapsed_time",
    "render_model_name",
    "select_headline_rows",
    "select_recipe_rows",
]

# Metrics of a group (a host, a profile), most preferred first: the first one with rows is shown.
_GROUP_METRICS = ("macro_f1", "f1", "accuracy", "balanced_accuracy", "recall")
METRIC_LABELS = {
    "macro_f1": "macro-F1 of phase",
    "macro_f1_3class": "macro-F1 of 3 states",
    "f1": "F1",
    "accuracy": "share of windows right",
    "recall": "recall",
    "balanced_accuracy": "balanced accuracy",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderboardEntry:
    """One entry of the leaderboard: a model with one channel set."""

    model: str
    threat: str
    five_class: MetricRow | None
    three_class: MetricRow | None

    @property
    def label(self) -> str:
        """Model and channel set, as figures show them; the default channel set is left out."""
        return (
            f"{render_model_name(self.model)} · {self.threat}"
            if self.threat != DEFAULT_HEADLINE.channel_set
            else render_model_name(self.model)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ElapsedTimeGap:
    """Paired gap of macro-F1 between a model and elapsed time on the same windows."""

    value: float
    low: float | None
    high: float | None


def render_model_name(key: str) -> str:
    """Render a model's name; a baseline is marked."""
    return f"{key.replace('_', ' ')} (baseline)" if key in BASELINE_MODELS else key


def select_recipe_rows(rows: Sequence[MetricRow]) -> tuple[MetricRow, ...]:
    """Select the pooled scores of the headline's recipe, input and smoothing, without gaps and curves."""
    return tuple(r for r in rows if _is_recipe_row(r) and r.compared_to is None and r.bin is None)


def find_score(
    rows: Sequence[MetricRow],
    base: str,
    *,
    model: str,
    threat: str = DEFAULT_HEADLINE.channel_set,
    phase: str | None = None,
    profile: str | None = None,
    host_id: str | None = None,
) -> MetricRow | None:
    """Find the row of a score: on the agent state of its channel set, the mean over seeds before a single seed."""
    found = [
        r
        for r in rows
        if r.metric == base
        and r.model == model
        and r.channel_set == threat
        and (r.phase, r.profile, r.host_id, r.sample_name) == (phase, profile, host_id, None)
    ]
    preferred = ("on", None, "off") if choose_agent_state(threat) == "on" else ("off", None, "on")
    found.sort(key=lambda r: (preferred.index(r.agent) if r.agent in preferred else 3, r.seed != "mean", str(r.seed)))
    return found[0] if found else None


def find_headline_model(rows: Sequence[MetricRow], all_rows: Sequence[MetricRow] = ()) -> str | None:
    """Return the headline's model if it was scored, else the first that is not a baseline, else None."""
    models = sorted({r.model for r in rows if r.model and r.metric == "macro_f1" and r.model not in BASELINE_MODELS})
    wanted = select_headline(all_rows).model
    return wanted if wanted in models else next(iter(models), None)


def find_overall_row(rows: Sequence[MetricRow], base: str, **where: object) -> MetricRow | None:
    """Return the first matching row over all phases, profiles, hosts and samples, a mean over seeds first."""
    found = select_rows(rows, base, overall=True, **where)
    return next((r for r in found if not isinstance(r.seed, int)), next(iter(found), None))


def select_headline_rows(rows: Sequence[MetricRow]) -> tuple[MetricRow, ...]:
    """Select the rows of the headline's recipe, channel set, input, smoothing and agent, with gaps and curves."""
    return tuple(r for r in rows if _is_headline_row(r))


def build_leaderboard(rows: Sequence[MetricRow], *, n_hosts: int | None = None) -> tuple[LeaderboardEntry, ...]:
    """Build the leaderboard of all models and channel sets with an overall score, best first, nulls last.

    Args:
        rows: Rows of one recipe.
        n_hosts: Leave out models that were tested on fewer hosts: their mean is not comparable.
    """
    pairs = {
        (r.model, r.channel_set)
        for r in rows
        if r.model
        and r.metric in ("macro_f1", "macro_f1_3class")
        and r.phase is r.profile is r.host_id is r.sample_name is None
        and (n_hosts is None or r.n_hosts >= n_hosts)
    }
    found = [
        LeaderboardEntry(
            model=model,
            threat=threat,
            five_class=find_score(rows, "macro_f1", model=model, threat=threat),
            three_class=find_score(rows, "macro_f1_3class", model=model, threat=threat),
        )
        for model, threat in sorted(pairs)
    ]
    return tuple(sorted(found, key=lambda c: (-(c.five_class.value or 0.0) if c.five_class else 1.0, c.label)))


def choose_group_metric(rows: Sequence[MetricRow], *, model: str, by: Sequence[str]) -> str | None:
    """Return the preferred metric with rows grouped by these columns (`profile`, `host_id`, `phase`), or None."""
    keys = ("phase", "profile", "host_id", "sample_name")
    have = {
        r.metric for r in rows if r.model == model and all((getattr(r, key) is not None) == (key in by) for key in keys)
    }
    return next((m for m in _GROUP_METRICS if m in have), None)


def find_elapsed_time_gap(rows: Sequence[MetricRow], model: str) -> ElapsedTimeGap | None:
    """Find the paired gap between a model and elapsed time, in either direction."""
    for r in rows:
        if r.metric == "macro_f1_gap" and r.value is not None and _is_headline_row(r):
            if (r.model, r.compared_to) == (model, ELAPSED_TIME):
                return ElapsedTimeGap(value=r.value, low=r.low, high=r.high)
            if (r.model, r.compared_to) == (ELAPSED_TIME, model):
                turned = (None, None) if r.low is None or r.high is None else (-r.high, -r.low)
                return ElapsedTimeGap(value=-r.value, low=turned[0], high=turned[1])
    return None


def build_confusion_matrix(rows: Sequence[MetricRow], *, model: str) -> ConfusionMatrix | None:
    """Build the confusion matrix of a model over the union of labels; episodes without agent are preferred."""
    own = [
        r
        for r in rows
        if r.metric == "confusion"
        and r.model == model
        and r.channel_set == DEFAULT_HEADLINE.channel_set
        and _is_recipe_row(r)
    ]
    agent = next((a for a in (DEFAULT_HEADLINE.agent, None) if any(r.agent == a for r in own)), "on")
    at = {(str(r.phase), int(r.bin)): r.value or 0.0 for r in own if r.agent == agent and r.bin is not None}
    occur = [p for p in PHASES if any(n and (truth == p or decided == p.code) for (truth, decided), n in at.items())]
    if not occur:
        return None
    counts = tuple(tuple(at.get((str(truth), decided.code), 0.0) for decided in occur) for truth in occur)
    return ConfusionMatrix(labels=tuple(str(p) for p in occur), counts=counts)


def collect_notes(rows: Sequence[MetricRow]) -> tuple[str, ...]:
    """Return the remarks on the headline's numbers and on predictions that were not scored, without duplicates."""
    return tuple(
        dict.fromkeys(
            r.note
            for r in select_rows(rows, "note", compared_to=None)
            if r.note and (_is_headline_row(r) or r.code is NoteCode.NOT_SCORED)
        )
    )


def is_above_elapsed_time(model: MetricRow | None, clock: MetricRow | None, gap: ElapsedTimeGap | None) -> bool | None:
    """Return whether a model is above elapsed time, by the paired gap if there is one, else by both intervals.

    Returns:
        None if a number or an interval is missing.
    """
    if gap is not None and gap.low is not None:
        return gap.low > 0
    if model is None or clock is None or model.value is None or clock.value is None:
        return None
    if model.value <= clock.value:
        return False
    if model.low is None:
        return None
    return model.low > (clock.high if clock.high is not None else clock.value)


def _is_recipe_row(row: MetricRow) -> bool:
    return (row.recipe, row.fold, row.input, row.smoothing) == (
        DEFAULT_HEADLINE.recipe,
        "pooled",
        DEFAULT_HEADLINE.input,
        NO_FILTER,
    )


def _is_headline_row(row: MetricRow) -> bool:
    return _is_recipe_row(row) and (row.channel_set, row.agent) == (
        DEFAULT_HEADLINE.channel_set,
        DEFAULT_HEADLINE.agent,
    )
