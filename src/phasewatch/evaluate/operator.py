"""The operator's view as rows: delay, missed episodes, false alarms per VM-hour, damage at the alarm, delay against budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.evaluate import bootstrap
from phasewatch.evaluate.alarms import amount
from phasewatch.evaluate.bootstrap import Floats
from phasewatch.evaluate.rows import Headline, MetricRow
from phasewatch.evaluate.scope import Place, Rules
from phasewatch.evaluate.shift import BUDGETS, Lived, Parts, Recorded, Shift, live_through
from phasewatch.models.alarm import BUDGET, NEVER
from phasewatch.models.filter import NONE

DAMAGE = (
    ("damage_bytes_written", "qmp.blk_wr_bytes", "B"),
    ("damage_bytes_out", "netflow.out_bytes", "B"),
    ("damage_new_flows", "netflow.new_flows", "flows"),
    ("damage_cpu_seconds", "proc.vcpu_run", "s"),
)
LEAST = 3.0  # in H VM-hours nothing below 3/H an hour is claimed: the rule of three
Bools = NDArray[np.bool_]

Draw = Callable[[NDArray[np.uint16]], Floats]  # ``(b, E)`` how often each episode was drawn → ``(b,)`` a measure


def operator_rows(
    parts: Parts, recorded: Mapping[str, Recorded], rules: Rules, *, agent: str | None
) -> Iterator[MetricRow]:
    """Give the operator's rows of every model that answered for all folds.

    Args:
        parts: What was said.
        recorded: Episode → spans and rates; an episode without is left out.
        rules: How intervals are drawn.
        agent: Test episodes with the agent `on`, `off`, or both.
    """
    board = parts.test
    place = Place(
        recipe=board.recipe, fold="pooled", threat=board.threat, table=board.table, filter=board.filter, agent=agent
    )
    home = Headline()
    is_home = (place.recipe, place.threat, place.table, place.filter) == (home.recipe, home.threat, home.table, NONE)
    budgets = BUDGETS if is_home else (BUDGET,)  # a curve where the headline stands, one point elsewhere
    by_model: dict[str, list[Shift]] = {}
    for model, seed in dict.fromkeys((s.model, s.seed) for s in board.said):
        own = [s for s in board.said if (s.model, s.seed) == (model, seed)]
        if [s.fold for s in own] != board.folds:
            continue
        shift = live_through(own, parts, recorded, agent, budgets)
        if isinstance(shift, str):
            yield place.row(metric="note", model=model, why=f"{model} has no operator's view: {shift}")
        else:
            by_model.setdefault(model, []).append(shift)
    for model, shifts in by_model.items():
        yield from _rows(_Teller(place=place, model=model, rules=rules), shifts, recorded)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Teller:
    """Makes one model's rows."""

    place: Place
    model: str
    rules: Rules

    def row(self, metric: str, lived: Lived, keep: Bools, value: float | None, **more: object) -> MetricRow:
        """Make a row that rests on the kept episodes; what is infinite has no number."""
        own = [e for e, kept in zip(lived.episodes, keep, strict=True) if kept]
        return self.place.row(
            metric=metric, model=self.model, seed="mean", value=None if value is None or not np.isfinite(value) else value,
            n_windows=sum(len(e.t_center_ns) for e in own), n_episodes=len(own),
            n_sessions=len({(e.host_id, e.session) for e in own}), n_hosts=len({e.host_id for e in own}), **more,
        )  # fmt: skip

    def span(self, lived: Lived, keep: Bools, measures: Sequence[Draw]) -> dict[str, object]:
        """Give the interval of a measure's mean over seeds, or why there is none."""
        clusters = bootstrap.number_clusters([e.host_id for e in lived.episodes], [e.session for e in lived.episodes])
        sessions = len(np.unique(clusters.of[keep]))
        every = np.zeros(len(clusters.of), np.int64)
        weights = bootstrap.draw_weights(
            clusters, every, classes=(0,), resamples=self.rules.resamples, seed=self.rules.seed
        )
        hosts = len(np.unique(clusters.host[clusters.of[keep]]))
        if why := bootstrap.no_interval(sessions, hosts):
            return {"why": why}
        if weights is None:
            return {"why": "hardly a resample can be drawn"}
        draws = np.mean([measure(weights.counts[:, clusters.of]) for measure in measures], axis=0)
        draws = draws[~np.isnan(draws)]  # a resample that drew none of what is measured says nothing
        if 2 * len(draws) < len(weights):
            return {"why": "most resamples draw no such episode"}
        # Never between a number and infinity: the ends are draws themselves.
        tail = 100 * bootstrap.tail_of(sessions, hosts)
        low, high = (float(end) for end in np.percentile(draws, [tail, 100 - tail], method="inverted_cdf"))
        if not np.isfinite(high):
            return {"why": f"from {low:.0f} up to never: in some resamples more than half are missed"}
        return {"low": low, "high": high}


def _rows(tell: _Teller, shifts: Sequence[Shift], recorded: Mapping[str, Recorded]) -> Iterator[MetricRow]:
    tests, soaks = [s.test for s in shifts], [s.soak for s in shifts]
    first = tests[0]
    everybody = np.ones(len(first.episodes), np.bool_)
    at = shifts[0].budgets.index(BUDGET)
    thresholds = [t for s in shifts for t in s.thresholds]
    never = sum(t >= NEVER for t in thresholds)
    words = f"no threshold meets the budget in {never} of {len(thresholds)} folds" if never else "mean over folds"
    known = [t for t in thresholds if t < NEVER]
    yield tell.row("alarm_threshold", first, everybody, float(np.mean(known)) if known else None, x=BUDGET, why=words)
    yield from _false_alarms(tell, "", tests, at)
    if soaks[0].episodes:
        yield from _false_alarms(tell, "soak_", soaks, at)
    profiles = sorted({e.profile for e, begun in zip(first.episodes, first.begun, strict=True) if begun})
    for profile in (None, *profiles):
        keep = first.begun & np.array([profile in (None, e.profile) for e in first.episodes], np.bool_)
        yield from _detection(tell, tests, keep, profile, at)
        if len(shifts[0].budgets) > 1:
            yield from _curve(tell, tests, keep, profile)
    for name, unit, measured in _damage(tests, recorded, at):
        value = float(np.mean([_one(_median(m), len(m)) for m in measured]))
        ends = tell.span(first, first.begun, [_median(m) for m in measured])
        yield tell.row(name, first, first.begun, value, unit=unit, **ends)


def _false_alarms(tell: _Teller, prefix: str, lived: Sequence[Lived], at: int) -> Iterator[MetricRow]:
    """Compute false alarms per VM-hour with the exact Poisson interval and the session bootstrap's, and quote their union."""
    first, hours = lived[0], lived[0].hours
    every = np.ones(len(first.episodes), np.bool_)
    name = f"{prefix}false_alarms_per_vm_hour"
    yield tell.row(
        f"{prefix}vm_hours", first, every, hours, unit="h", why="calm time watched: 5 s for each decision time"
    )
    if not hours:
        yield tell.row(name, first, every, None, unit="1/h", why="no calm time was watched")
        return
    found = _rate(tell, lived, at)
    yield tell.row(f"{name}_poisson", first, every, found.per_hour, unit="1/h", **found.poisson)
    yield tell.row(f"{name}_sessions", first, every, found.per_hour, unit="1/h", **found.sessions)
    words = f"{found.count:g} in {hours:.2f} VM-hours; nothing below {LEAST / hours:.1f} an hour is claimed"
    yield tell.row(name, first, every, found.per_hour, unit="1/h", **{**found.union, "why": words})


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmRate:
    """False alarms per VM-hour, a mean over seeds, and what is known of their spread."""

    count: float
    per_hour: float
    poisson: Mapping[str, float]
    sessions: Mapping[str, object]

    @property
    def union(self) -> dict[str, float]:
        """The interval from the lower of the two low ends to the higher of the two high ends.

        Neither alone is enough: Poisson's knows no sessions, and the sessions' bootstrap cannot see past what it drew.
        """
        low, high = self.sessions.get("low"), self.sessions.get("high")
        if not isinstance(low, float) or not isinstance(high, float):
            return dict(self.poisson)
        return {"low": min(self.poisson["low"], low), "high": max(self.poisson["high"], high)}


def _rate(tell: _Teller, lived: Sequence[Lived], at: int) -> AlarmRate:
    """Compute the rate of false alarms at one budget, over the calm hours of all episodes."""
    first, hours = lived[0], lived[0].hours
    every = np.ones(len(first.episodes), np.bool_)
    count = float(np.mean([one.false_alarms[at].sum() for one in lived]))
    low, high = poisson_interval(count)
    return AlarmRate(
        count=count, per_hour=count / hours, poisson={"low": low / hours, "high": high / hours},
        sessions=tell.span(first, every, [_ratio(one.false_alarms[at] * 3600.0, one.exposure_s) for one in lived]),
    )  # fmt: skip


def _detection(tell: _Teller, lived: Sequence[Lived], keep: Bools, profile: str | None, at: int) -> Iterator[MetricRow]:
    """Compute the median delay, a missed episode counting as never, and the share of missed ones."""
    if not keep.any():
        yield tell.row(
            "delay_s", lived[0], keep, None, unit="s", why="nothing ran in any test episode", profile=profile
        )
        return
    yield from _delay(tell, lived, keep, at, "", {"profile": profile})


def _delay(
    tell: _Teller, lived: Sequence[Lived], keep: Bools, at: int, suffix: str, where: Mapping[str, object]
) -> Iterator[MetricRow]:
    """Compute delay and misses of the kept episodes at one budget; `suffix` ends the metrics' names."""
    first = lived[0]
    delays = [np.where(keep, one.delay_s[at], np.nan) for one in lived]
    value = float(np.mean([_one(_median(d), len(d)) for d in delays]))
    ends: dict[str, object] = {"why": "more than half are missed, so there is no median"}
    if np.isfinite(value):
        ends = tell.span(first, keep, [_median(d) for d in delays])
    yield tell.row(f"delay_s{suffix}", first, keep, value, unit="s", **where, **ends)
    missed = [_ratio(np.isinf(d).astype(np.float64), keep.astype(np.float64)) for d in delays]
    share = float(np.mean([_one(m, len(keep)) for m in missed]))
    yield tell.row(f"missed_episodes{suffix}", first, keep, share, **where, **tell.span(first, keep, missed))


def _curve(tell: _Teller, lived: Sequence[Lived], keep: Bools, profile: str | None) -> Iterator[MetricRow]:
    """Compute delay, misses and the false alarms that came of each budget, each with its interval."""
    first = lived[0]
    for i, budget in enumerate(BUDGETS):
        if keep.any():
            yield from _delay(tell, lived, keep, i, "_at_budget", {"x": budget, "profile": profile})
        if profile is None and first.hours:
            found = _rate(tell, lived, i)
            every = np.ones(len(first.episodes), np.bool_)
            yield tell.row(
                "false_alarms_per_vm_hour_at_budget", first, every, found.per_hour, unit="1/h", x=budget, **found.union
            )


def _damage(
    tests: Sequence[Lived], recorded: Mapping[str, Recorded], at: int
) -> Iterator[tuple[str, str, list[Floats]]]:
    """Sum what was done from onset to alarm, NaN where nothing ran; of a missed episode all that was recorded."""
    sums = []
    for lived in tests:
        done = np.full((len(lived.episodes), len(DAMAGE)), np.nan)
        for i, (e, onset, delay) in enumerate(zip(lived.episodes, lived.onset_ns, lived.delay_s[at], strict=True)):
            if onset >= 0:
                of = recorded[e.id]
                end = of.spans[-1][2] if np.isinf(delay) else int(onset) + round(delay * 1e9)
                done[i] = amount(of.rates, of.t0_ns, int(onset), end)
        sums.append(done)
    if any(np.isfinite(done).any() for done in sums):
        for k, (name, _, unit) in enumerate(DAMAGE):
            yield name, unit, [done[:, k] for done in sums]


def _median(values: Floats) -> Draw:
    """Measure the lower median of what is not NaN, infinity included, each value as often as it was drawn."""
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]

    def measure(times: NDArray[np.uint16]) -> Floats:
        if not len(order):
            return np.full(len(times), np.nan)
        reached = np.cumsum(times[:, order].astype(np.float64), axis=1)
        total = reached[:, -1]
        first = (reached >= total[:, None] / 2).argmax(axis=1)
        found: Floats = np.where(total > 0, values[order][first], np.nan)
        return found

    return measure


def _ratio(above: Floats, below: Floats) -> Draw:
    def measure(times: NDArray[np.uint16]) -> Floats:
        t = times.astype(np.float64)
        over = t @ below
        found: Floats = np.divide(t @ above, over, out=np.full(len(t), np.nan), where=over > 0)
        return found

    return measure


def _one(measure: Draw, n: int) -> float:
    """Measure the episodes as they are, each of the `n` once."""
    return float(measure(np.ones((1, n), np.uint16))[0])


def poisson_interval(count: float) -> tuple[float, float]:
    """Give the exact 95 % interval of a Poisson mean. Source: Garwood 1936, by the gamma distribution's quantiles."""
    from scipy.special import gammaincinv

    tail = (1 - bootstrap.LEVEL) / 2
    return (float(gammaincinv(count, tail)) if count else 0.0), float(gammaincinv(count + 1, 1 - tail))
