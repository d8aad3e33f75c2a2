"""How well each profile is told on each host, and which were not tested at all, from `metrics_v1.json` and the registry."""

from __future__ import annotations

from phasewatch import profiles
from phasewatch.evaluate.rows import MetricRow, Metrics
from phasewatch.live.events import ProfileCell, ProfileTable
from phasewatch.report import scores
from phasewatch.report.evidence import PLACE


def build_profiles(metrics: Metrics) -> ProfileTable | None:
    """Give the table of the headline's model, or None where there is no such row.

    All registered profiles stand in it, tested or not: what is missing is to be seen.
    """
    rows = scores.headline_rows(metrics.metrics)
    model = scores.headline_model(rows)
    metric = scores.group_metric(rows, model=model, by=("profile", "host_id")) if model else None
    if model is None or metric is None:
        return None
    own = [r for r in rows if r.model == model and r.threat == PLACE.threat]
    registered = [p.name for p in profiles.PROFILES]
    seen = {r.profile for r in own if r.profile is not None and r.n_windows}
    names = (*registered, *sorted(seen - set(registered)))
    hosts = tuple(sorted({r.host_id for r in own if r.host_id is not None}))

    def cell(profile: str, host: str) -> ProfileCell | None:
        found = scores.pick(own, metric, model=model, profile=profile, host_id=host)
        return None if found is None or not found.n_windows else _cell(found)

    return ProfileTable(
        metric=metric,
        recipe=PLACE.recipe,
        threat=PLACE.threat,
        model=model,
        profiles=names,
        hosts=hosts,
        cells=tuple(tuple(cell(p, h) for h in hosts) for p in names),
        untested_profiles=tuple(p for p in registered if p not in seen),
    )


def _cell(row: MetricRow) -> ProfileCell:
    return ProfileCell(
        value=row.value,
        low=row.low,
        high=row.high,
        why=row.why,
        n_windows=row.n_windows,
        n_episodes=row.n_episodes,
    )
