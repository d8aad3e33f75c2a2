"""Finds in the flat rows of `metrics_v1.json` the ones that the page speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phasewatch.evaluate.across import own_agent
from phasewatch.evaluate.rows import MetricRow, chosen
from phasewatch.models.registry import BASELINES
from phasewatch.report.evidence import PLACE
from phasewatch.report.figures import Confusion
from phasewatch.train.predictions import NO_FILTER
from phasewatch.vocab import PHASES

CLOCK = "elapsed_time"
# What stands for a group (a host, a profile), best first: the first one that has rows is shown.
GROUP_METRICS = ("macro_f1", "f1", "accuracy", "balanced_accuracy", "recall")
METRIC_WORDS = {
    "macro_f1": "macro-F1 of phase",
    "macro_f1_3": "macro-F1 of 3 states",
    "f1": "F1",
    "accuracy": "share of windows right",
    "recall": "recall",
    "balanced_accuracy": "balanced accuracy",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One line of the leaderboard."""

    model: str
    threat: str
    five: MetricRow | None
    three: MetricRow | None

    @property
    def label(self) -> str:
        """Model and threat model, as the picture spells them."""
        return f"{model_words(self.model)} · {self.threat}" if self.threat != PLACE.threat else model_words(self.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How far a model stands above elapsed time, on the same windows."""

    value: float
    low: float | None
    high: float | None


def base_of(row: MetricRow) -> str:
    """Give the metric's name without the profiles tested: `macro_f1` of `macro_f1@5of6`."""
    return row.metric.partition("@")[0]


def model_words(key: str) -> str:
    """Give a model's name on the page; a baseline says that it is one."""
    return f"{key.replace('_', ' ')} (baseline)" if key in BASELINES else key


def headline_rows(rows: Sequence[MetricRow]) -> tuple[MetricRow, ...]:
    """Keep the rows of the headline's recipe, table and filter that are no gap, no curve and no single fold."""
    return tuple(r for r in rows if _pooled(r) and r.vs is None and r.x is None)


def pick(
    rows: Sequence[MetricRow],
    base: str,
    *,
    model: str,
    threat: str = PLACE.threat,
    phase: str | None = None,
    profile: str | None = None,
    host_id: str | None = None,
) -> MetricRow | None:
    """Find the one row of a number: of the episodes that its mask is scored on, the mean over seeds before one seed."""
    found = [
        r
        for r in rows
        if base_of(r) == base
        and r.model == model
        and r.threat == threat
        and (r.phase, r.profile, r.host_id, r.sample_name) == (phase, profile, host_id, None)
    ]
    preferred = ("on", None, "off") if own_agent(threat) == "on" else ("off", None, "on")
    found.sort(key=lambda r: (preferred.index(r.agent) if r.agent in preferred else 3, r.seed != "mean", str(r.seed)))
    return found[0] if found else None


def headline_model(rows: Sequence[MetricRow], all_rows: Sequence[MetricRow] = ()) -> str | None:
    """Name the model that the page is about: the headline's, else the first that is no baseline, else none."""
    models = sorted({r.model for r in rows if r.model and base_of(r) == "macro_f1" and r.model not in BASELINES})
    wanted = chosen(all_rows).model
    return wanted if wanted in models else next(iter(models), None)


def find(rows: Sequence[MetricRow], base: str, **where: object) -> tuple[MetricRow, ...]:
    """Give the rows of a metric, whatever profiles it tested, that have these values; what is not named may be anything."""
    return tuple(r for r in rows if base_of(r) == base and all(getattr(r, k) == v for k, v in where.items()))


def one(rows: Sequence[MetricRow], base: str, **where: object) -> MetricRow | None:
    """Give the first such row over all phases, profiles, hosts and samples, its seeds averaged if it has some."""
    over_all = {"phase": None, "profile": None, "host_id": None, "sample_name": None}
    found = find(rows, base, **{**over_all, **where})
    return next((r for r in found if not isinstance(r.seed, int)), next(iter(found), None))


def at_headline(rows: Sequence[MetricRow]) -> tuple[MetricRow, ...]:
    """Keep the rows of the headline's recipe, threat model, table, filter and agent, gaps and curves included."""
    return tuple(r for r in rows if _at_headline(r))


def contenders(rows: Sequence[MetricRow], *, n_hosts: int | None = None) -> tuple[Contender, ...]:
    """List all models and threat models with an overall score, best first, those without a number last.

    Args:
        rows: Of one recipe.
        n_hosts: Leave out who was tested on fewer hosts: the mean of other machines is no rival.
    """
    pairs = {
        (r.model, r.threat)
        for r in rows
        if r.model
        and base_of(r) in ("macro_f1", "macro_f1_3")
        and r.phase is r.profile is r.host_id is r.sample_name is None
        and (n_hosts is None or r.n_hosts >= n_hosts)
    }
    found = [
        Contender(
            model=model,
            threat=threat,
            five=pick(rows, "macro_f1", model=model, threat=threat),
            three=pick(rows, "macro_f1_3", model=model, threat=threat),
        )
        for model, threat in sorted(pairs)
    ]
    return tuple(sorted(found, key=lambda c: (-(c.five.value or 0.0) if c.five else 1.0, c.label)))


def group_metric(rows: Sequence[MetricRow], *, model: str, by: Sequence[str]) -> str | None:
    """Name the metric that stands for groups by these keys (`profile`, `host_id`, `phase`), or None without any row."""
    keys = ("phase", "profile", "host_id", "sample_name")
    have = {
        base_of(r)
        for r in rows
        if r.model == model and all((getattr(r, key) is not None) == (key in by) for key in keys)
    }
    return next((m for m in GROUP_METRICS if m in have), None)


def clock_gap(rows: Sequence[MetricRow], model: str) -> Gap | None:
    """Find the paired gap between a model and elapsed time, whichever of the two the row counts from."""
    for r in rows:
        if base_of(r) == "macro_f1_gap" and r.value is not None and _at_headline(r):
            if (r.model, r.vs) == (model, CLOCK):
                return Gap(value=r.value, low=r.low, high=r.high)
            if (r.model, r.vs) == (CLOCK, model):
                turned = (None, None) if r.low is None or r.high is None else (-r.high, -r.low)
                return Gap(value=-r.value, low=turned[0], high=turned[1])
    return None


def confusion(rows: Sequence[MetricRow], *, model: str) -> Confusion | None:
    """Collect the counts of truth × decision over the union of labels; agent off before both."""
    own = [r for r in rows if r.metric == "confusion" and r.model == model and r.threat == PLACE.threat and _pooled(r)]
    agent = next((a for a in (PLACE.agent, None) if any(r.agent == a for r in own)), "on")
    at = {(str(r.phase), int(r.x)): r.value or 0.0 for r in own if r.agent == agent and r.x is not None}
    occur = [p for p in PHASES if any(n and (truth == p or decided == p.code) for (truth, decided), n in at.items())]
    if not occur:
        return None
    counts = tuple(tuple(at.get((str(truth), decided.code), 0.0) for decided in occur) for truth in occur)
    return Confusion(labels=tuple(str(p) for p in occur), counts=counts)


def notes(rows: Sequence[MetricRow]) -> tuple[str, ...]:
    """Give what the evaluation itself has to say of the headline's numbers."""
    return tuple(
        dict.fromkeys(
            r.why
            for r in rows
            if r.metric == "note" and r.why and r.vs is None and (_at_headline(r) or "is not scored" in r.why)
        )
    )


def above_clock(model: MetricRow | None, clock: MetricRow | None, gap: Gap | None) -> bool | None:
    """Say whether the model beats elapsed time: the paired gap decides where there is one, else the two intervals.

    None means that it cannot be said: a number or an interval is missing.
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


def _pooled(row: MetricRow) -> bool:
    return (row.recipe, row.fold, row.table, row.filter) == (PLACE.recipe, "pooled", PLACE.table, NO_FILTER)


def _at_headline(row: MetricRow) -> bool:
    return _pooled(row) and (row.threat, row.agent) == (PLACE.threat, PLACE.agent)
