"""`metrics_v1.json` as the leaderboard and the confusion that the dashboard shows; every number is a row of that file."""

from __future__ import annotations

from collections.abc import Sequence

from phasewatch.evaluate.rows import MetricRow, Metrics, headline
from phasewatch.live.events import Confusion, Data, Inflation, Score, ScoreRow
from phasewatch.models.filter import NONE
from phasewatch.models.registry import BASELINES
from phasewatch.report import scores
from phasewatch.report.evidence import PLACE

# From the most flattering split to the hardest; the headline's own is among them.
METER = ("random_windows", "in_distribution", "held_out_host", "held_out_sample", "held_out_both")
MAX_NOTES, MAX_WORDS = 12, 600


def build_metrics(metrics: Metrics) -> tuple[Data, ...]:
    """Give the score event, and the confusion of the headline's model where it has one."""
    rows = scores.headline_rows(metrics.metrics)
    found: list[Data] = [build_score(metrics, rows)]
    model = scores.headline_model(rows)
    matrix = scores.confusion(metrics.metrics, model=model) if model else None
    if matrix is not None and model is not None:
        of = scores.pick(rows, "macro_f1", model=model)
        found.append(
            Confusion(
                model=model, recipe=PLACE.recipe, threat=PLACE.threat, table=PLACE.table, agent=of.agent if of else None,
                labels=matrix.labels, counts=matrix.counts, n_episodes=of.n_episodes if of else 0,
                n_hosts=of.n_hosts if of else 0,
            )
        )  # fmt: skip
    return tuple(found)


def build_score(metrics: Metrics, rows: Sequence[MetricRow]) -> Score:
    """Give the leaderboard of the headline's recipe, with what easier splits would have claimed."""
    ranked = [c.five for c in scores.contenders(rows) if c.five is not None and c.five.value is not None]
    most = max((r.n_hosts for r in ranked), default=0)
    ranked.sort(key=lambda r: r.n_hosts < most)  # the mean of fewer machines is no rival: it comes after
    lead = next((r for r in ranked if r.threat == PLACE.threat), ranked[0] if ranked else None)
    tested, _, registered = lead.metric.partition("@")[2].partition("of") if lead else ("0", "", "0")
    model = scores.headline_model(rows)
    return Score(
        metric="macro_f1", tested=int(tested or 0), registered=int(registered or 0), recipe=PLACE.recipe,
        rows=tuple(_row(r, lead, metrics.metrics) for r in ranked[:200]),
        inflation=_inflation(metrics.metrics, model) if model else (), inflation_of=model,
        headline=headline(metrics)[:MAX_WORDS],
        notes=tuple(note[:MAX_WORDS] for note in scores.notes(metrics.metrics)[:MAX_NOTES]),
    )  # fmt: skip


def _row(row: MetricRow, lead: MetricRow | None, rows: Sequence[MetricRow]) -> ScoreRow:
    return ScoreRow(
        model=str(row.model), threat=row.threat, table=row.table, agent=row.agent, value=float(row.value or 0.0),
        low=row.low, high=row.high, why=row.why if row.low is None else None,
        is_baseline=row.model in BASELINES, p_holm=_p_of(row, lead, rows), n_episodes=row.n_episodes,
        n_sessions=row.n_sessions, n_hosts=row.n_hosts,
        seeds=max(1, sum(_same_board(r, row) and isinstance(r.seed, int) for r in rows)),
    )  # fmt: skip


def _p_of(row: MetricRow, lead: MetricRow | None, rows: Sequence[MetricRow]) -> float | None:
    """Find the corrected p of the paired gap to the leader, whichever of the two it counts from."""
    if lead is None or row is lead or row.threat != lead.threat:
        return None
    pair = {row.model, lead.model}
    for r in rows:
        if (
            scores.base_of(r) == "macro_f1_gap"
            and r.p_holm is not None
            and {r.model, r.vs} == pair
            and (r.recipe, r.fold, r.threat, r.table, r.filter, r.agent)
            == (row.recipe, row.fold, row.threat, row.table, row.filter, row.agent)
            and r.phase is r.profile is r.host_id is r.sample_name is None
        ):
            return r.p_holm
    return None


def _same_board(row: MetricRow, other: MetricRow) -> bool:
    keys = ("metric", "recipe", "fold", "threat", "model", "table", "filter", "agent", "phase", "profile", "host_id")
    return all(getattr(row, k) == getattr(other, k) for k in (*keys, "sample_name", "vs", "x"))


def _inflation(rows: Sequence[MetricRow], model: str) -> tuple[Inflation, ...]:
    """Give the same model's score under each way of splitting that the run has, agent off before both."""
    found = []
    for recipe in METER:
        own = [
            r
            for r in rows
            if (r.recipe, r.fold, r.threat, r.model, r.table, r.filter)
            == (recipe, "pooled", PLACE.threat, model, PLACE.table, NONE)
            and scores.base_of(r) == "macro_f1"
            and r.seed == "mean"
            and r.agent in (PLACE.agent, None)
            and r.phase is r.profile is r.host_id is r.sample_name is r.vs is None
            and r.value is not None
        ]
        own.sort(key=lambda r: r.agent is None)
        if own and own[0].value is not None:
            found.append(Inflation(recipe=recipe, value=own[0].value, low=own[0].low, high=own[0].high))
    return tuple(found) if len(found) > 1 else ()
