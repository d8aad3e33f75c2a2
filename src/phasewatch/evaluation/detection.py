"""Metric rows of the two alarms: detection within 15, 30 and 60 s, misses, delay, false alarms, precision, impact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phasewatch.arrays import BoolArray
from phasewatch.evaluation.alarm_measures import (
    EpisodeBootstrap,
    FalseAlarmRate,
    build_median_measure,
    build_ratio_measure,
    compute_binomial_interval,
    compute_chance_recall,
    compute_poisson_interval,
    compute_precision,
    measure_once,
    unite_intervals,
)
from phasewatch.evaluation.alarms import (
    ALARM_BUDGETS,
    AlarmSimulation,
    EpisodeOutcomes,
    EpisodeTimeline,
    PredictionParts,
    simulate_alarms,
    simulate_trained_rule,
    sum_rates,
)
from phasewatch.evaluation.metric_table import DEFAULT_HEADLINE, MetricNote, MetricRow, NoteCode
from phasewatch.evaluation.predictions import ModelPredictions, PredictionGroup
from phasewatch.evaluation.scoring import EvaluationSettings, IntervalColumns, MetricKey
from phasewatch.models.alarm import FALSE_ALARM_BUDGET, LIVE_STRIDE_S, RULE_STRIDE_S, THETA_NEVER, AlarmKind, AlarmRule
from phasewatch.models.registry import BASELINE_MODELS
from phasewatch.types import PHASES

__all__ = [
    "BASE_RATE_DAYS",
    "DETECTION_TIMES_S",
    "HEADLINE_TIME_S",
    "IMPACT_METRICS",
    "MIN_RECORDED_S",
    "STRIDE_SUFFIXES",
    "build_alarm_rows",
    "build_trained_alarm_rows",
]

# Metric, the channel whose rate is summed from onset to alarm, unit of the sum.
IMPACT_METRICS = (
    ("impact_bytes_written", "qmp.blk_wr_bytes", "B"),
    ("impact_bytes_out", "netflow.out_bytes", "B"),
    ("impact_new_flows", "netflow.new_flows", "flows"),
    ("impact_cpu_seconds", "proc.vcpu_run", "s"),
)
STRIDE_SUFFIXES = {LIVE_STRIDE_S: "", RULE_STRIDE_S: f"_at_{RULE_STRIDE_S}s"}  # stride in seconds → end of the names
DETECTION_TIMES_S = (15, 30, 60)
HEADLINE_TIME_S = 30  # the one of `DETECTION_TIMES_S` that the headline and the precision are about
MIN_RECORDED_S = 16.0  # after the onset, for miss rate and delay: the slowest perfect alarm takes 16 s
_MISSED_AFTER_S = float(DETECTION_TIMES_S[-1])  # an onset without an alarm for so long is missed
BASE_RATE_DAYS = (30, 1)  # one infection per VM in so many days
_RULE_OF_THREE = 3.0  # in H VM-hours no rate below 3/H per hour can be claimed: the rule of three
_NO_QUIET_TIME_NOTE = MetricNote(code=NoteCode.NO_QUIET_TIME, text="no quiet time was observed")
_NO_ONSET_NOTE = MetricNote(code=NoteCode.NO_ONSET, text="no test episode has an onset with so much recorded after it")
_COUNT_NOTE = MetricNote(code=NoteCode.COUNT, text="a count")
_MOSTLY_MISSED_NOTE = MetricNote(
    code=NoteCode.MOST_EPISODES_MISSED, text="more than half are missed, so there is no median"
)
_NO_SPREAD_NOTE = MetricNote(code=NoteCode.NO_SPREAD, text="0 in every episode, so resampling episodes shows no spread")


def build_alarm_rows(
    strides: Sequence[PredictionParts],
    timelines: Mapping[str, EpisodeTimeline],
    rules: EvaluationSettings,
    *,
    agent: str | None,
) -> Iterator[MetricRow]:
    """Yield the alarm metrics of every model that predicted all folds, for both alarms.

    Args:
        strides: Predictions of one recipe, channel set and input on test, validation B and soak, at each stride.
        timelines: Episode id → ground truth; an episode without is left out.
        rules: How intervals are drawn.
        agent: Test episodes with the agent ``on`` or ``off``; None for both.
    """
    complete = {parts.stride_s: _find_complete_models(parts) for parts in strides}
    for parts in strides:
        key = parts.test.build_metric_key(agent=agent)
        is_home = (parts.test.threat, parts.test.table) == (DEFAULT_HEADLINE.channel_set, DEFAULT_HEADLINE.input)
        for model in complete[parts.stride_s]:
            is_detailed = is_home and model not in BASELINE_MODELS
            budgets = ALARM_BUDGETS if is_detailed else (FALSE_ALARM_BUDGET,)  # a curve, or one point
            for kind in AlarmKind:
                builder = _AlarmRowBuilder(
                    key=key, model=model, rules=rules, kind=kind, suffix=STRIDE_SUFFIXES[parts.stride_s]
                )
                simulations: list[AlarmSimulation] = []
                for folds in complete[parts.stride_s][model]:
                    found = simulate_alarms(folds, parts, timelines, kind=kind, agent=agent, budgets=budgets)
                    if isinstance(found, AlarmSimulation):
                        simulations.append(found)
                    else:
                        text = f"{model} has no {kind} alarm at {parts.stride_s} s: {found.text}"
                        yield key.row(metric="note", model=model, note=MetricNote(code=found.code, text=text))
                if simulations:
                    yield from _build_model_rows(builder, simulations, timelines, is_detailed=is_detailed)
    yield from _note_missing_live_models(strides, complete, agent)


def build_trained_alarm_rows(
    test: PredictionGroup,
    soak: PredictionGroup | None,
    timelines: Mapping[str, EpisodeTimeline],
    rules: EvaluationSettings,
    alarms: Sequence[AlarmRule],
    *,
    agent: str | None,
) -> Iterator[MetricRow]:
    """Yield the alarm metrics of a model on another store, by the rules that its training fixed.

    Args:
        test: Predictions on lab episodes, of one model and seed.
        soak: Predictions of the same model on soak episodes; None without any.
        timelines: Episode id → ground truth.
        rules: How intervals are drawn.
        alarms: The model's rules at the stride of the predictions, at most one of each kind.
        agent: Test episodes with the agent ``on`` or ``off``; None for both.
    """
    key = test.build_metric_key(agent=agent)
    soaks = {(s.model, s.seed): s for s in (soak.predictions if soak is not None else ())}
    for predictions in test.predictions:
        for rule in alarms:
            builder = _AlarmRowBuilder(
                key=key, model=predictions.model, rules=rules, kind=rule.kind, suffix=STRIDE_SUFFIXES[rule.stride_s]
            )
            own_soak = soaks.get((predictions.model, predictions.seed))
            found = simulate_trained_rule(predictions, own_soak, timelines, rule, agent=agent)
            if isinstance(found, AlarmSimulation):
                yield from _build_model_rows(builder, [found], timelines, is_detailed=False)
            else:
                yield key.row(metric="note", model=predictions.model, note=found)


def _find_complete_models(parts: PredictionParts) -> dict[str, list[list[ModelPredictions]]]:
    """Return the models that predicted all folds, each with the predictions of every seed."""
    group = parts.test
    models: dict[str, list[list[ModelPredictions]]] = {}
    for model, seed in dict.fromkeys((s.model, s.seed) for s in group.predictions):
        folds = [s for s in group.predictions if (s.model, s.seed) == (model, seed)]
        if [s.fold for s in folds] == group.folds:
            models.setdefault(model, []).append(folds)
    return models


def _note_missing_live_models(
    strides: Sequence[PredictionParts], complete: Mapping[int, Mapping[str, object]], agent: str | None
) -> Iterator[MetricRow]:
    """Yield a note for each model whose alarm could not be simulated at the stride of a live watcher."""
    for parts in strides:
        if parts.stride_s == LIVE_STRIDE_S or parts.test.threat != DEFAULT_HEADLINE.channel_set:
            continue
        for model in complete[parts.stride_s]:
            if model in BASELINE_MODELS or model in complete.get(LIVE_STRIDE_S, {}):
                continue
            text = (
                f"{model} has no alarm at the live stride of {LIVE_STRIDE_S} s: the run has no predictions at that "
                f"stride; train it again. Its alarms at {parts.stride_s} s are shown"
            )
            note = MetricNote(code=NoteCode.NO_LIVE_PREDICTIONS, text=text)
            yield parts.test.build_metric_key(agent=agent).row(metric="note", model=model, note=note)


@dataclass(frozen=True, slots=True, kw_only=True)
class _AlarmRowBuilder:
    """Builds the rows of one alarm of one model; `seeds` below are the outcomes of each of its seeds."""

    key: MetricKey
    model: str
    rules: EvaluationSettings
    kind: AlarmKind
    suffix: str

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
            metric=f"{self.kind}_{metric}{self.suffix}",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _EpisodeSet:
    """The outcomes of each seed on the same episodes, with their resamples."""

    builder: _AlarmRowBuilder
    seeds: Sequence[EpisodeOutcomes]
    resamples: EpisodeBootstrap

    @classmethod
    def build(cls, builder: _AlarmRowBuilder, seeds: Sequence[EpisodeOutcomes]) -> _EpisodeSet:
        resamples = EpisodeBootstrap(outcomes=seeds[0], rules=builder.rules)
        return cls(builder=builder, seeds=seeds, resamples=resamples)

    @property
    def first(self) -> EpisodeOutcomes:
        return self.seeds[0]

    @property
    def every(self) -> BoolArray:
        return np.ones(len(self.first.episodes), np.bool_)

    def build_share_row(self, metric: str, keep: BoolArray, hits: Sequence[BoolArray], **columns: object) -> MetricRow:
        """Build the share of the kept episodes that are hit, a mean over seeds.

        Its interval is the union of Clopper and Pearson's and the session bootstrap's: a bootstrap of a share of 0 or
        1 has no width.
        """
        n = int(keep.sum())
        if not n:
            return self.builder.row(metric, self.first, keep, None, note=_NO_ONSET_NOTE, **columns)
        counts = [float((hit & keep).sum()) for hit in hits]
        low, high = compute_binomial_interval(float(np.mean(counts)), n)
        measures = [build_ratio_measure((hit & keep).astype(np.float64), keep.astype(np.float64)) for hit in hits]
        sessions = self.resamples.build_interval(keep, measures)
        ends = unite_intervals({"low": low, "high": high}, sessions)
        value = float(np.mean(counts)) / n
        return self.builder.row(
            metric, self.first, keep, value, low=ends["low"], high=ends["high"], note=sessions.get("note"), **columns
        )

    def compute_false_alarm_rate(self, at: int) -> FalseAlarmRate:
        """Compute the rate of false alarms at one budget over the quiet hours of all episodes."""
        hours = self.first.hours
        count = float(np.mean([one.false_alarms[at].sum() for one in self.seeds]))
        low, high = compute_poisson_interval(count)
        measures = [build_ratio_measure(one.false_alarms[at] * 3600.0, one.exposure_s) for one in self.seeds]
        return FalseAlarmRate(
            count=count,
            per_hour=count / hours,
            poisson={"low": low / hours, "high": high / hours},
            sessions=self.resamples.build_interval(self.every, measures),
        )

    def build_time_in_alarm_row(self, metric: str, at: int, **columns: object) -> MetricRow:
        """Build the share of quiet time with the alarm on, a mean over seeds."""
        measures = [build_ratio_measure(one.on_s[at], one.exposure_s) for one in self.seeds]
        value = float(np.mean([measure_once(m, len(self.every)) for m in measures]))
        ends: IntervalColumns = {"note": _NO_SPREAD_NOTE}
        if value > 0:
            ends = self.resamples.build_interval(self.every, measures)
        return self.builder.row(metric, self.first, self.every, value, **ends, **columns)


def _build_model_rows(
    builder: _AlarmRowBuilder,
    simulations: Sequence[AlarmSimulation],
    timelines: Mapping[str, EpisodeTimeline],
    *,
    is_detailed: bool,
) -> Iterator[MetricRow]:
    test = _EpisodeSet.build(builder, [s.test for s in simulations])
    soak = _EpisodeSet.build(builder, [s.soak for s in simulations])
    at = simulations[0].budgets.index(FALSE_ALARM_BUDGET)
    yield _build_threshold_row(test, simulations)
    yield from _build_false_alarm_rows(test, "", at)
    if soak.first.episodes:
        yield from _build_false_alarm_rows(soak, "soak_", at)
    yield from _build_recall_rows(test, at)
    yield from _build_delay_rows(test, test.first.has_onset, at)
    yield from _build_precision_rows(test, soak, at)
    if is_detailed:
        yield from _build_group_rows(test, at)
        yield from _build_budget_rows(test, soak, simulations[0].budgets)
    if is_detailed and builder.kind is AlarmKind.INFECTION:
        yield from _build_impact_rows(test, timelines, at)


def _build_threshold_row(test: _EpisodeSet, simulations: Sequence[AlarmSimulation]) -> MetricRow:
    """Build the mean threshold over folds, with the rules that were chosen."""
    rules = [rule for s in simulations for rule in s.rules]
    met = [rule.theta for rule in rules if rule.theta < THETA_NEVER]
    counts = {f"{r.k} of {r.n}": sum((o.k, o.n) == (r.k, r.n) for o in rules) for r in rules}
    chosen = ", ".join(f"{rule} in {n}" for rule, n in sorted(counts.items()))
    note = MetricNote(code=NoteCode.MEAN_OVER_FOLDS, text=f"mean over folds; windows: {chosen} of {len(rules)} folds")
    if len(met) < len(rules):
        text = f"no threshold meets the budget in {len(rules) - len(met)} of {len(rules)} folds"
        note = MetricNote(code=NoteCode.BUDGET_NOT_MET, text=text)
    value = float(np.mean(met)) if met else None
    return test.builder.row("threshold", test.first, test.every, value, bin=FALSE_ALARM_BUDGET, note=note)


def _build_false_alarm_rows(own: _EpisodeSet, prefix: str, at: int) -> Iterator[MetricRow]:
    """Yield quiet hours, false alarms per VM-hour with three intervals, and the share of time in alarm."""
    builder, hours, name = own.builder, own.first.hours, f"{prefix}false_alarms_per_vm_hour"
    text = f"quiet time observed: {_find_stride_s(builder)} s for each decision time"
    note = MetricNote(code=NoteCode.QUIET_TIME, text=text)
    yield builder.row(f"{prefix}vm_hours", own.first, own.every, hours, unit="h", note=note)
    if not hours:
        yield builder.row(name, own.first, own.every, None, unit="1/h", note=_NO_QUIET_TIME_NOTE)
        return
    rate = own.compute_false_alarm_rate(at)
    for kind, ends in (("_poisson", rate.poisson), ("_sessions", rate.sessions)):
        yield builder.row(f"{name}{kind}", own.first, own.every, rate.per_hour, unit="1/h", **ends)
    text = f"{rate.count:g} in {hours:.2f} VM-hours; nothing below {_RULE_OF_THREE / hours:.1f} an hour is claimed"
    note = MetricNote(code=NoteCode.FALSE_ALARM_COUNT, text=text)
    ends = rate.union
    yield builder.row(
        name, own.first, own.every, rate.per_hour, unit="1/h", low=ends["low"], high=ends["high"], note=note
    )
    yield own.build_time_in_alarm_row(f"{prefix}time_in_alarm", at)


def _find_stride_s(builder: _AlarmRowBuilder) -> int:
    return next(stride_s for stride_s, suffix in STRIDE_SUFFIXES.items() if suffix == builder.suffix)


def _mark_recorded(outcomes: EpisodeOutcomes, seconds: float) -> BoolArray:
    """Mark the episodes with an onset after which so many seconds were recorded, ``(E,)``."""
    return np.asarray(outcomes.has_onset & (outcomes.recorded_s >= seconds), np.bool_)


def _build_recall_rows(test: _EpisodeSet, at: int) -> Iterator[MetricRow]:
    """Yield the share of onsets announced in time, the share by chance, and the onsets that were cut short."""
    builder, first = test.builder, test.first
    rate = test.compute_false_alarm_rate(at) if first.hours else None
    on = test.build_time_in_alarm_row("time_in_alarm", at) if first.hours else None
    for within_s in DETECTION_TIMES_S:
        keep = _mark_recorded(first, within_s)
        yield _build_recall_row(test, keep, at, within_s)
        cut = first.has_onset & ~keep
        count = float(cut.sum())
        yield builder.row(f"n_cut_short_{within_s}s", first, cut, count, unit="episodes", note=_COUNT_NOTE)
        if rate is None or on is None or on.value is None:
            yield builder.row(f"chance_{within_s}s", first, keep, None, note=_NO_QUIET_TIME_NOTE)
            continue
        low, high = rate.union["low"], rate.union["high"]
        shares = (on.value, on.value if on.low is None else on.low, on.value if on.high is None else on.high)
        value, low, high = (
            compute_chance_recall(builder.kind, within_s, per_hour, share)
            for per_hour, share in zip((rate.per_hour, low, high), shares, strict=True)
        )
        yield builder.row(f"chance_{within_s}s", first, keep, value, low=low, high=high)


def _build_recall_row(
    test: _EpisodeSet, keep: BoolArray, at: int, within_s: float, name: str = "", **columns: object
) -> MetricRow:
    hits = [np.asarray(one.delay_s[at] <= within_s, np.bool_) for one in test.seeds]
    return test.build_share_row(name or f"recall_{within_s}s", keep, hits, **columns)


def _build_delay_rows(
    test: _EpisodeSet, chosen: BoolArray, at: int, ending: str = "", **columns: object
) -> Iterator[MetricRow]:
    """Yield miss rate and median delay, a miss counting as infinite, of the chosen episodes with an onset.

    Only onsets after which `MIN_RECORDED_S` were recorded count. One without an alarm within 60 s is missed.
    """
    keep = chosen & _mark_recorded(test.first, MIN_RECORDED_S)
    missed = [np.asarray(one.delay_s[at] > _MISSED_AFTER_S, np.bool_) for one in test.seeds]
    yield test.build_share_row(f"miss_rate{ending}", keep, missed, **columns)
    if not keep.any():
        return
    delays = [
        np.where(keep, np.where(m, np.inf, one.delay_s[at]), np.nan) for one, m in zip(test.seeds, missed, strict=True)
    ]
    value = float(np.mean([measure_once(build_median_measure(d), len(d)) for d in delays]))
    ends: IntervalColumns = {"note": _MOSTLY_MISSED_NOTE}
    if np.isfinite(value):
        ends = test.resamples.build_interval(keep, [build_median_measure(d) for d in delays])
    yield test.builder.row(f"delay_s{ending}", test.first, keep, value, unit="s", **ends, **columns)


def _build_precision_rows(test: _EpisodeSet, soak: _EpisodeSet, at: int) -> Iterator[MetricRow]:
    """Yield the precision at each base rate; its ends combine the ends of recall and of false alarms."""
    quiet, where = (soak, "soak") if soak.first.hours else (test, "test")
    recall = _build_recall_row(test, _mark_recorded(test.first, HEADLINE_TIME_S), at, HEADLINE_TIME_S)
    if not quiet.first.hours or recall.value is None or recall.low is None or recall.high is None:
        return
    rate = quiet.compute_false_alarm_rate(at)
    for days in BASE_RATE_DAYS:
        text = (
            f"one infection per VM in {days} {'day' if days == 1 else 'days'}, announced within {HEADLINE_TIME_S} s, "
            f"and the false alarms per VM-hour on {where}"
        )
        yield test.builder.row(
            "precision_at_base_rate",
            test.first,
            _mark_recorded(test.first, HEADLINE_TIME_S),
            compute_precision(recall.value, rate.per_hour, days=days),
            low=compute_precision(recall.low, rate.union["high"], days=days),
            high=compute_precision(recall.high, rate.union["low"], days=days),
            bin=float(days),
            note=MetricNote(code=NoteCode.BASE_RATE, text=text),
        )


def _build_group_rows(test: _EpisodeSet, at: int) -> Iterator[MetricRow]:
    """Yield recall, miss rate and delay by profile, and by the phase at the first label (column `class`)."""
    first = test.first
    profiles = sorted({e.profile for e, has in zip(first.episodes, first.has_onset, strict=True) if has})
    starts = {e.spans[0][0] for e, has in zip(first.episodes, first.has_onset, strict=True) if has}
    groups: list[tuple[dict[str, Any], BoolArray]] = [
        ({"profile": name}, np.array([e.profile == name for e in first.episodes], np.bool_)) for name in profiles
    ]
    groups += [
        ({"phase": str(phase)}, np.array([e.spans[0][0] is phase for e in first.episodes], np.bool_))
        for phase in PHASES
        if phase in starts
    ]
    for columns, chosen in groups:
        keep = chosen & _mark_recorded(first, HEADLINE_TIME_S)
        yield _build_recall_row(test, keep, at, HEADLINE_TIME_S, **columns)
        yield from _build_delay_rows(test, chosen & first.has_onset, at, **columns)


def _build_budget_rows(test: _EpisodeSet, soak: _EpisodeSet, budgets: Sequence[float]) -> Iterator[MetricRow]:
    """Yield recall, miss rate, delay, false alarms and time in alarm of each budget, each with its interval."""
    first = test.first
    keep = _mark_recorded(first, HEADLINE_TIME_S)
    for i, budget in enumerate(budgets):
        yield _build_recall_row(test, keep, i, HEADLINE_TIME_S, f"recall_{HEADLINE_TIME_S}s_at_budget", bin=budget)
        yield from _build_delay_rows(test, first.has_onset, i, "_at_budget", bin=budget)
        for own, prefix in ((test, ""), (soak, "soak_")):
            if own.first.hours:
                rate = own.compute_false_alarm_rate(i)
                name = f"{prefix}false_alarms_per_vm_hour_at_budget"
                yield own.builder.row(name, own.first, own.every, rate.per_hour, unit="1/h", bin=budget, **rate.union)
                yield own.build_time_in_alarm_row(f"{prefix}time_in_alarm_at_budget", i, bin=budget)


def _build_impact_rows(test: _EpisodeSet, timelines: Mapping[str, EpisodeTimeline], at: int) -> Iterator[MetricRow]:
    """Yield the median impact from onset to alarm; to the last label for a miss."""
    sums = []
    for outcomes in test.seeds:
        impact = np.full((len(outcomes.episodes), len(IMPACT_METRICS)), np.nan)
        for i, (e, onset, delay) in enumerate(
            zip(outcomes.episodes, outcomes.onset_ns, outcomes.delay_s[at], strict=True)
        ):
            if onset >= 0:
                timeline = timelines[e.id]
                end = timeline.spans[-1][2] if np.isinf(delay) else int(onset) + round(delay * 1e9)
                impact[i] = sum_rates(timeline.rates, timeline.t0_ns, int(onset), end)
        sums.append(impact)
    if not any(np.isfinite(impact).any() for impact in sums):
        return
    for k, (name, _, unit) in enumerate(IMPACT_METRICS):
        measures = [build_median_measure(impact[:, k]) for impact in sums]
        value = float(np.mean([measure_once(m, len(test.every)) for m in measures]))
        ends = test.resamples.build_interval(test.first.has_onset, measures)
        yield test.builder.row(name, test.first, test.first.has_onset, value, unit=unit, **ends)
