"""Metric rows of detection: delay, miss rate, false alarms per VM-hour, impact before the alarm, budget curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import BoolArray, FloatArray
from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.alarms import (
    ALARM_BUDGETS,
    AlarmSimulation,
    EpisodeOutcomes,
    EpisodeTimeline,
    PredictionParts,
    simulate_alarms,
    sum_rates,
)
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricNote, MetricRow, NoteCode
from phasewatch.evaluation.scoring import EvaluationSettings, IntervalColumns, MetricKey
from phasewatch.models.alarm import FALSE_ALARM_BUDGET, THETA_NEVER
from phasewatch.models.smoothing import SMOOTHING_NONE

__all__ = [
    "IMPACT_METRICS",
    "FalseAlarmRate",
    "build_alarm_rows",
    "compute_poisson_interval",
]

# Metric, the channel whose rate is summed from onset to alarm, unit of the sum.
IMPACT_METRICS = (
    ("impact_bytes_written", "qmp.blk_wr_bytes", "B"),
    ("impact_bytes_out", "netflow.out_bytes", "B"),
    ("impact_new_flows", "netflow.new_flows", "flows"),
    ("impact_cpu_seconds", "proc.vcpu_run", "s"),
)
_RULE_OF_THREE = 3.0  # in H VM-hours no rate below 3/H per hour can be claimed: the rule of three
_QUIET_TIME_NOTE = MetricNote(code=NoteCode.QUIET_TIME, text="quiet time observed: 5 s for each decision time")
_NO_QUIET_TIME_NOTE = MetricNote(code=NoteCode.NO_QUIET_TIME, text="no quiet time was observed")
_NO_ONSET_NOTE = MetricNote(code=NoteCode.NO_ONSET, text="no test episode has an onset")
_MOSTLY_MISSED_NOTE = MetricNote(
    code=NoteCode.MOST_EPISODES_MISSED, text="more than half are missed, so there is no median"
)
_FOLD_MEAN_NOTE = MetricNote(code=NoteCode.MEAN_OVER_FOLDS, text="mean over folds")

# ``(b, E)`` how often each resample drew each episode → ``(b,)`` the measure of each resample.
_ResampleMeasure = Callable[[NDArray[np.uint16]], FloatArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class FalseAlarmRate:
    """False alarms per VM-hour, a mean over seeds, with two intervals.

    Attributes:
        count: Number of false alarms.
        per_hour: False alarms per VM-hour.
        poisson: The exact Poisson interval.
        sessions: The interval of the session bootstrap, or the note that explains why there is none.
    """

    count: float
    per_hour: float
    poisson: IntervalColumns
    sessions: IntervalColumns

    @property
    def union(self) -> IntervalColumns:
        """The interval from the lower of the two low ends to the higher of the two high ends.

        Neither alone is enough: Poisson's ignores sessions, and the session bootstrap cannot see beyond its sample.
        """
        low, high = self.sessions.get("low"), self.sessions.get("high")
        if low is None or high is None:
            return self.poisson
        return {"low": min(self.poisson["low"], low), "high": max(self.poisson["high"], high)}


def compute_poisson_interval(count: float) -> tuple[float, float]:
    """Return the exact 95 % interval of a Poisson mean. Source: Garwood 1936, by the gamma distribution's quantiles."""
    from scipy.special import gammaincinv

    tail = (1 - bootstrap.CONFIDENCE_LEVEL) / 2
    return (float(gammaincinv(count, tail)) if count else 0.0), float(gammaincinv(count + 1, 1 - tail))


def build_alarm_rows(
    parts: PredictionParts, timelines: Mapping[str, EpisodeTimeline], rules: EvaluationSettings, *, agent: str | None
) -> Iterator[MetricRow]:
    """Yield the alarm metrics of every model that predicted all folds.

    Args:
        parts: Predictions on test, validation B and soak.
        timelines: Episode id → ground truth; an episode without is left out.
        rules: How intervals are drawn.
        agent: Test episodes with the agent ``on`` or ``off``; None for both.
    """
    group, home = parts.test, DEFAULT_HEADLINE
    key = group.build_metric_key(agent=agent)
    is_home = group.key == (home.recipe, home.channel_set, home.input, SMOOTHING_NONE)
    budgets = ALARM_BUDGETS if is_home else (FALSE_ALARM_BUDGET,)  # a curve for the headline, one point elsewhere
    by_model: dict[str, list[AlarmSimulation]] = {}
    for model, seed in dict.fromkeys((s.model, s.seed) for s in group.predictions):
        folds = [s for s in group.predictions if (s.model, s.seed) == (model, seed)]
        if [s.fold for s in folds] != group.folds:
            continue
        simulation = simulate_alarms(folds, parts, timelines, agent, budgets)
        if isinstance(simulation, MetricNote):
            text = f"{model} has no delay and no false alarms: {simulation.text}"
            yield key.row(metric="note", model=model, note=MetricNote(code=simulation.code, text=text))
        else:
            by_model.setdefault(model, []).append(simulation)
    for model, simulations in by_model.items():
        yield from _build_model_rows(_AlarmRowBuilder(key=key, model=model, rules=rules), simulations, timelines)


@dataclass(frozen=True, slots=True, kw_only=True)
class _AlarmRowBuilder:
    """Builds the rows of one model; `seeds` below are the outcomes of each of its seeds."""

    key: MetricKey
    model: str
    rules: EvaluationSettings

    def row(
        self,
        metric: str,
        outcomes: EpisodeOutcomes,
        keep: BoolArray,
        value: float | None,
        *,
        note: MetricNote | None = None,
        **columns: object,
    ) -> MetricRow:
        """Build a row over the kept episodes; an infinite value becomes null."""
        own = [e for e, kept in zip(outcomes.episodes, keep, strict=True) if kept]
        return self.key.row(
            metric=metric,
            model=self.model,
            seed="mean",
            value=None if value is None or not np.isfinite(value) else value,
            note=note,
            n_windows=sum(len(e.t_center_ns) for e in own),
            n_episodes=len(own),
            n_sessions=len({(e.host_id, e.session) for e in own}),
            n_hosts=len({e.host_id for e in own}),
            **columns,
        )

    def build_interval(
        self, outcomes: EpisodeOutcomes, keep: BoolArray, measures: Sequence[_ResampleMeasure]
    ) -> IntervalColumns:
        """Return the interval of a measure's mean over seeds, or the note that explains why it has none."""
        episodes = outcomes.episodes
        clusters = bootstrap.build_clusters([e.host_id for e in episodes], [e.session for e in episodes])
        sessions = len(np.unique(clusters.cluster_index[keep]))
        one_class = np.zeros(len(clusters.cluster_index), np.int64)
        weights = bootstrap.draw_weights(
            clusters, one_class, classes=(0,), resamples=self.rules.resamples, seed=self.rules.seed
        )
        hosts = len(np.unique(clusters.host_index[clusters.cluster_index[keep]]))
        if note := bootstrap.explain_missing_interval(sessions, hosts):
            return {"note": note}
        if weights is None:
            text = "almost no resample can be drawn"
            return {"note": MetricNote(code=NoteCode.RESAMPLES_LOSE_EPISODES, text=text)}
        draws = np.mean([measure(weights.counts[:, clusters.cluster_index]) for measure in measures], axis=0)
        draws = draws[~np.isnan(draws)]  # a resample without such an episode has no measure
        if 2 * len(draws) < len(weights):
            text = "most resamples draw no such episode"
            return {"note": MetricNote(code=NoteCode.RESAMPLES_LOSE_EPISODES, text=text)}
        # Never between a number and infinity: the ends are draws themselves.
        tail = 100 * bootstrap.compute_tail_share(sessions, hosts)
        low, high = (float(end) for end in np.percentile(draws, [tail, 100 - tail], method="inverted_cdf"))
        if not np.isfinite(high):
            text = f"from {low:.0f} up to never: in some resamples more than half are missed"
            return {"note": MetricNote(code=NoteCode.UNBOUNDED_INTERVAL, text=text)}
        return {"low": low, "high": high}


def _build_model_rows(
    builder: _AlarmRowBuilder, simulations: Sequence[AlarmSimulation], timelines: Mapping[str, EpisodeTimeline]
) -> Iterator[MetricRow]:
    tests, soaks = [s.test for s in simulations], [s.soak for s in simulations]
    first = tests[0]
    at = simulations[0].budgets.index(FALSE_ALARM_BUDGET)
    yield _build_threshold_row(builder, simulations)
    yield from _build_false_alarm_rows(builder, "", tests, at)
    if soaks[0].episodes:
        yield from _build_false_alarm_rows(builder, "soak_", soaks, at)
    profiles = sorted({e.profile for e, has_onset in zip(first.episodes, first.has_onset, strict=True) if has_onset})
    for profile in (None, *profiles):
        keep = first.has_onset & np.array([profile in (None, e.profile) for e in first.episodes], np.bool_)
        yield from _build_detection_rows(builder, tests, keep, profile, at)
        if len(simulations[0].budgets) > 1:
            yield from _build_budget_rows(builder, tests, keep, profile)
    for name, unit, amounts in _compute_impact(tests, timelines, at):
        measures = [_build_median_measure(a) for a in amounts]
        value = float(np.mean([_measure_once(m, len(a)) for m, a in zip(measures, amounts, strict=True)]))
        ends = builder.build_interval(first, first.has_onset, measures)
        yield builder.row(name, first, first.has_onset, value, unit=unit, **ends)


def _build_threshold_row(builder: _AlarmRowBuilder, simulations: Sequence[AlarmSimulation]) -> MetricRow:
    first = simulations[0].test
    thresholds = [t for s in simulations for t in s.thresholds]
    met = [t for t in thresholds if t < THETA_NEVER]
    note = _FOLD_MEAN_NOTE
    if len(met) < len(thresholds):
        text = f"no threshold meets the budget in {len(thresholds) - len(met)} of {len(thresholds)} folds"
        note = MetricNote(code=NoteCode.BUDGET_NOT_MET, text=text)
    value = float(np.mean(met)) if met else None
    return builder.row("alarm_threshold", first, _mark_all(first), value, bin=FALSE_ALARM_BUDGET, note=note)


def _mark_all(outcomes: EpisodeOutcomes) -> BoolArray:
    return np.ones(len(outcomes.episodes), np.bool_)


def _build_false_alarm_rows(
    builder: _AlarmRowBuilder, prefix: str, seeds: Sequence[EpisodeOutcomes], at: int
) -> Iterator[MetricRow]:
    """Yield false alarms per VM-hour with the Poisson interval, the session bootstrap's, and the union of both."""
    first, hours = seeds[0], seeds[0].hours
    every = _mark_all(first)
    name = f"{prefix}false_alarms_per_vm_hour"
    yield builder.row(f"{prefix}vm_hours", first, every, hours, unit="h", note=_QUIET_TIME_NOTE)
    if not hours:
        yield builder.row(name, first, every, None, unit="1/h", note=_NO_QUIET_TIME_NOTE)
        return
    rate = _compute_false_alarm_rate(builder, seeds, at)
    yield builder.row(f"{name}_poisson", first, every, rate.per_hour, unit="1/h", **rate.poisson)
    yield builder.row(f"{name}_sessions", first, every, rate.per_hour, unit="1/h", **rate.sessions)
    text = f"{rate.count:g} in {hours:.2f} VM-hours; nothing below {_RULE_OF_THREE / hours:.1f} an hour is claimed"
    note = MetricNote(code=NoteCode.FALSE_ALARM_COUNT, text=text)
    ends = rate.union
    yield builder.row(name, first, every, rate.per_hour, unit="1/h", low=ends["low"], high=ends["high"], note=note)


def _compute_false_alarm_rate(builder: _AlarmRowBuilder, seeds: Sequence[EpisodeOutcomes], at: int) -> FalseAlarmRate:
    """Compute the rate of false alarms at one budget over the quiet hours of all episodes."""
    first, hours = seeds[0], seeds[0].hours
    count = float(np.mean([one.false_alarms[at].sum() for one in seeds]))
    low, high = compute_poisson_interval(count)
    measures = [_build_ratio_measure(one.false_alarms[at] * 3600.0, one.exposure_s) for one in seeds]
    return FalseAlarmRate(
        count=count,
        per_hour=count / hours,
        poisson={"low": low / hours, "high": high / hours},
        sessions=builder.build_interval(first, _mark_all(first), measures),
    )


def _build_detection_rows(
    builder: _AlarmRowBuilder, seeds: Sequence[EpisodeOutcomes], keep: BoolArray, profile: str | None, at: int
) -> Iterator[MetricRow]:
    """Yield the median delay, a miss counting as infinite, and the miss rate."""
    if not keep.any():
        yield builder.row("delay_s", seeds[0], keep, None, unit="s", note=_NO_ONSET_NOTE, profile=profile)
        return
    yield from _build_delay_rows(builder, seeds, keep, at, "", {"profile": profile})


def _build_delay_rows(
    builder: _AlarmRowBuilder,
    seeds: Sequence[EpisodeOutcomes],
    keep: BoolArray,
    at: int,
    suffix: str,
    where: Mapping[str, Any],
) -> Iterator[MetricRow]:
    """Yield delay and miss rate of the kept episodes at one budget; `suffix` ends the metric names."""
    first = seeds[0]
    delays = [np.where(keep, one.delay_s[at], np.nan) for one in seeds]
    value = float(np.mean([_measure_once(_build_median_measure(d), len(d)) for d in delays]))
    ends: IntervalColumns = {"note": _MOSTLY_MISSED_NOTE}
    if np.isfinite(value):
        ends = builder.build_interval(first, keep, [_build_median_measure(d) for d in delays])
    yield builder.row(f"delay_s{suffix}", first, keep, value, unit="s", **where, **ends)
    missed = [_build_ratio_measure(np.isinf(d).astype(np.float64), keep.astype(np.float64)) for d in delays]
    share = float(np.mean([_measure_once(m, len(keep)) for m in missed]))
    ends = builder.build_interval(first, keep, missed)
    yield builder.row(f"miss_rate{suffix}", first, keep, share, **where, **ends)


def _build_budget_rows(
    builder: _AlarmRowBuilder, seeds: Sequence[EpisodeOutcomes], keep: BoolArray, profile: str | None
) -> Iterator[MetricRow]:
    """Yield delay, miss rate and measured false alarms of each budget, each with its interval."""
    first = seeds[0]
    for i, budget in enumerate(ALARM_BUDGETS):
        if keep.any():
            yield from _build_delay_rows(builder, seeds, keep, i, "_at_budget", {"bin": budget, "profile": profile})
        if profile is None and first.hours:
            rate = _compute_false_alarm_rate(builder, seeds, i)
            name = "false_alarms_per_vm_hour_at_budget"
            yield builder.row(name, first, _mark_all(first), rate.per_hour, unit="1/h", bin=budget, **rate.union)


def _compute_impact(
    seeds: Sequence[EpisodeOutcomes], timelines: Mapping[str, EpisodeTimeline], at: int
) -> Iterator[tuple[str, str, list[FloatArray]]]:
    """Sum the impact from onset to alarm, ``(E,)`` per seed; to the last label for a miss, NaN without onset."""
    sums = []
    for outcomes in seeds:
        impact = np.full((len(outcomes.episodes), len(IMPACT_METRICS)), np.nan)
        for i, (e, onset, delay) in enumerate(
            zip(outcomes.episodes, outcomes.onset_ns, outcomes.delay_s[at], strict=True)
        ):
            if onset >= 0:
                timeline = timelines[e.id]
                end = timeline.spans[-1][2] if np.isinf(delay) else int(onset) + round(delay * 1e9)
                impact[i] = sum_rates(timeline.rates, timeline.t0_ns, int(onset), end)
        sums.append(impact)
    if any(np.isfinite(impact).any() for impact in sums):
        for k, (name, _, unit) in enumerate(IMPACT_METRICS):
            yield name, unit, [impact[:, k] for impact in sums]


def _build_median_measure(values: FloatArray) -> _ResampleMeasure:
    """Build the lower median of the values ``(E,)``, infinity included, NaN left out, each as often as drawn."""
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]

    def measure(times: NDArray[np.uint16]) -> FloatArray:
        if not len(order):
            return np.full(len(times), np.nan)
        reached = np.cumsum(times[:, order].astype(np.float64), axis=1)
        total = reached[:, -1]
        first = (reached >= total[:, None] / 2).argmax(axis=1)
        medians: FloatArray = np.where(total > 0, values[order][first], np.nan)
        return medians

    return measure


def _build_ratio_measure(above: FloatArray, below: FloatArray) -> _ResampleMeasure:
    """Build the ratio of two sums over episodes, ``(E,)`` each, NaN where the lower sum is 0."""

    def measure(times: NDArray[np.uint16]) -> FloatArray:
        t = times.astype(np.float64)
        over = t @ below
        ratio: FloatArray = np.divide(t @ above, over, out=np.full(len(t), np.nan), where=over > 0)
        return ratio

    return measure


def _measure_once(measure: _ResampleMeasure, n: int) -> float:
    """Measure the `n` episodes as they are, each drawn once."""
    return float(measure(np.ones((1, n), np.uint16))[0])
