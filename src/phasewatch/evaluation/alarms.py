"""The operator's view as rows: delay, missed episodes, false alarms per VM-hour, damage at the alarm, delay against budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import BoolArray, FloatArray
from phasewatch.evaluation import bootstrap
from phasewatch.evaluation.metric_table import HeadlineKey, MetricNote, MetricRow, NoteCode
from phasewatch.evaluation.predictions import ModelPredictions, PredictionGroup
from phasewatch.evaluation.scoring import EvaluationSettings, IntervalColumns, MetricKey
from phasewatch.models.alarm import (
    DECISION_DELAY_NS,
    FALSE_ALARM_BUDGET,
    LOOK_BACK_NS,
    THETA_NEVER,
    AlarmRule,
    apply_alarm_rule,
    compute_activity_score,
    find_alarm_starts,
    fit_alarm_rule,
)
from phasewatch.models.smoothing import SMOOTHING_NONE, LabelSequence
from phasewatch.types import BIN_NS, STRIDE_BINS, Phase

EXPOSURE_PER_WINDOW_S = BIN_NS * STRIDE_BINS / 1e9  # of one decision time
ALARM_PHASES = (Phase.INFECTING, Phase.ACTIVE)
CALM_PHASES = (Phase.CLEAN, Phase.ARMED)

PhaseSpans = Sequence[tuple[Phase, int, int]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConcatenatedEpisodes:
    """Episodes one after the other, as one model saw them: ``n`` windows of ``E`` episodes.

    Attributes:
        activity_score: ``(n,)`` p(infecting) + p(active).
        episode_index: ``(n,)`` index of each window's episode, rising.
        decided_ns: ``(n,)`` decision times on the wall clock.
        calm: ``(n,)`` whether an alarm raised then would be false.
        onset_ns: ``(E,)`` start of the first infecting, else of the first active; −1 where neither is.
    """

    activity_score: NDArray[np.float64]
    episode_index: NDArray[np.int64]
    decided_ns: NDArray[np.int64]
    calm: BoolArray
    onset_ns: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.onset_ns)

    @property
    def exposure_s(self) -> NDArray[np.float64]:
        """``(E,)`` seconds in which a false alarm could have been raised."""
        windows = np.bincount(self.episode_index, self.calm, len(self))
        return np.asarray(windows * EXPOSURE_PER_WINDOW_S, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AlarmOutcome:
    """What became of each episode at each threshold, ``(T, E)``.

    Attributes:
        false_alarms: Alarms raised in calm.
        delay_s: From onset to the first decision time at which an alarm rings; inf where none does or there is no onset.
    """

    false_alarms: NDArray[np.int64]
    delay_s: NDArray[np.float64]


def find_onset(spans: PhaseSpans) -> int | None:
    """Give when it began: the first infecting, else the first active; None where nothing ran."""
    for phase in ALARM_PHASES:
        for found, start, _ in spans:
            if found is phase:
                return start
    return None


def mark_calm_times(spans: PhaseSpans, at_ns: NDArray[np.int64]) -> BoolArray:
    """Say at which times the truth had been clean or armed for the whole minute before.

    What was before the first label was as the first label says: a machine that starts dormant was infected unseen.
    """
    calm = np.full(len(at_ns), bool(spans))
    for i, (phase, start, end) in enumerate(spans):
        if phase not in CALM_PHASES:
            since = np.iinfo(np.int64).min if i == 0 else start
            calm &= (at_ns < since) | (at_ns - LOOK_BACK_NS >= end)
    return calm


def concatenate_episodes(
    episodes: Sequence[tuple[PhaseSpans, NDArray[np.int64], NDArray[np.floating]]],
) -> ConcatenatedEpisodes:
    """Set episodes one after the other.

    Args:
        episodes: For each its label spans, ``(w,)`` window centres in order, and ``(w, 5)`` probabilities.
    """
    decided = [t_center_ns + DECISION_DELAY_NS for _, t_center_ns, _ in episodes]
    onsets = [find_onset(spans) for spans, _, _ in episodes]
    return ConcatenatedEpisodes(
        activity_score=np.concatenate([np.zeros(0), *(compute_activity_score(p) for _, _, p in episodes)]),
        episode_index=np.repeat(np.arange(len(episodes)), [len(t) for t in decided]),
        decided_ns=np.concatenate([np.zeros(0, np.int64), *decided]),
        calm=np.concatenate([np.zeros(0, np.bool_), *(mark_calm_times(e[0], t) for e, t in zip(episodes, decided, strict=True))]),
        onset_ns=np.array([-1 if onset is None else onset for onset in onsets], np.int64),
    )  # fmt: skip


def compute_alarm_outcome(watched: ConcatenatedEpisodes, thresholds: Sequence[float]) -> AlarmOutcome:
    """Count false alarms and measure delays at each threshold."""
    false_alarms = np.zeros((len(thresholds), len(watched)), np.int64)
    delay_s = np.full((len(thresholds), len(watched)), np.inf)
    began = watched.onset_ns[watched.episode_index]
    for i, theta in enumerate(thresholds):
        rings = apply_alarm_rule(AlarmRule(theta=theta), watched.activity_score, watched.episode_index)
        raised = find_alarm_starts(rings, watched.episode_index)
        false_alarms[i] = np.bincount(watched.episode_index, raised & watched.calm, len(watched))
        counts = rings & (began >= 0) & (watched.decided_ns >= began)
        np.minimum.at(delay_s[i], watched.episode_index[counts], (watched.decided_ns - began)[counts] / 1e9)
    return AlarmOutcome(false_alarms=false_alarms, delay_s=delay_s)


def sum_rates(rates: NDArray[np.floating], t0_ns: int, begin_ns: int, end_ns: int) -> NDArray[np.float64]:
    """Sum rates over the whole bins between two times, ``(n_bins, c)`` → ``(c,)``; a bin of which nothing is known adds nothing."""
    first = max(0, -(-(begin_ns - t0_ns) // BIN_NS))
    last = max(first, (end_ns - t0_ns) // BIN_NS)
    total: NDArray[np.float64] = np.nansum(np.asarray(rates[first:last], np.float64), axis=0) * (BIN_NS / 1e9)
    return total


ALARM_BUDGETS = (0.25, 0.5, 1.0, 2.0, 3.0, 6.0)  # false alarms per VM-hour that an operator might allow
ALARM_RECIPES = ("held_out_host", "held_out_both")  # in the second the benign kind is new too


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodeTimeline:
    """What a bundle says of an episode beyond its windows: label spans, and the rates of `DAMAGE`, ``(n_bins, 4)``."""

    spans: PhaseSpans
    t0_ns: int
    rates: NDArray[np.floating]
    group: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PredictionParts:
    """What was said under one recipe, threat model, table and filter: of the test sets, of validation B, of the soak."""

    test: PredictionGroup
    val_b: PredictionGroup | None
    soak: PredictionGroup | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodePredictions:
    """One episode as one model saw it."""

    id: str
    host_id: str
    session: str
    profile: str
    t_center_ns: NDArray[np.int64]
    y: NDArray[np.int64]
    probabilities: FloatArray
    spans: PhaseSpans

    @property
    def alarm_input(self) -> tuple[PhaseSpans, NDArray[np.int64], FloatArray]:
        """What `alarms.watch` takes."""
        return self.spans, self.t_center_ns, self.probabilities


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodeOutcomes:
    """What became of episodes, each at its fold's own thresholds: ``(E,)``, and ``(budgets, E)``."""

    episodes: tuple[EpisodePredictions, ...]
    onset_ns: NDArray[np.int64]
    exposure_s: FloatArray
    false_alarms: NDArray[np.int64]
    delay_s: FloatArray

    @property
    def has_onset(self) -> NDArray[np.bool_]:
        """Whether anything ran in each, ``(E,)``."""
        marked: NDArray[np.bool_] = self.onset_ns >= 0
        return marked

    @property
    def hours(self) -> float:
        """VM-hours in which a false alarm could have been raised."""
        return float(self.exposure_s.sum()) / 3600


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AlarmSimulation:
    """What one model with one seed would have been for an operator.

    Attributes:
        budgets: Those of the first axis of both; `FALSE_ALARM_BUDGET` is one of them.
        thresholds: Each fold's at `FALSE_ALARM_BUDGET`.
    """

    test: EpisodeOutcomes
    soak: EpisodeOutcomes
    budgets: tuple[float, ...]
    thresholds: tuple[float, ...]


def simulate_alarms(
    own: Sequence[ModelPredictions],
    parts: PredictionParts,
    recorded: Mapping[str, EpisodeTimeline],
    agent: str | None,
    budgets: tuple[float, ...] = ALARM_BUDGETS,
) -> AlarmSimulation | str:
    """Set each fold's threshold by what it may see, then live through its test and its soak; or say why not."""
    tests, soaks, thresholds = [], [], []
    for said in own:
        hosts = set(said.windows.host_id)
        groups = {recorded[i].group for i in said.windows.episode_id if i in recorded}
        is_both = parts.test.recipe == "held_out_both"

        def is_near(
            e: EpisodePredictions, hosts: set[str] = hosts, groups: set[int] = groups, both: bool = is_both
        ) -> bool:
            return e.host_id in hosts and (not both or recorded[e.id].group in groups)

        def is_far(
            e: EpisodePredictions, hosts: set[str] = hosts, groups: set[int] = groups, both: bool = is_both
        ) -> bool:
            return e.host_id not in hosts and not (both and recorded[e.id].group in groups)

        soak = _build_episodes(_find_counterpart(parts.soak, said), recorded)
        heard = [*_build_episodes(_find_counterpart(parts.val_b, said), recorded), *filter(is_far, soak)]
        if not heard:
            return f"fold {said.fold} has no validation B and no soak of other hosts to set a threshold by"
        at = _choose_thresholds(heard, budgets)
        thresholds.append(at[budgets.index(FALSE_ALARM_BUDGET)])
        tests.append(_simulate_episodes(_build_episodes(said, recorded, agent), at))
        soaks.append(_simulate_episodes(list(filter(is_near, soak)), at))
    test = _concatenate_outcomes(tests)
    if not test.episodes:
        return "no test episode has label spans in the grids"
    return AlarmSimulation(test=test, soak=_concatenate_outcomes(soaks), budgets=budgets, thresholds=tuple(thresholds))


def _choose_thresholds(heard: Sequence[EpisodePredictions], budgets: Sequence[float]) -> tuple[float, ...]:
    """Choose the threshold of each budget as training does, from what a fold may hear."""
    track = LabelSequence(
        y=np.concatenate([e.y for e in heard]),
        episode_index=np.repeat(np.arange(len(heard)), [len(e.y) for e in heard]),
        t_center_ns=np.concatenate([e.t_center_ns for e in heard]),
    )
    p = np.concatenate([e.probabilities for e in heard])
    return tuple(fit_alarm_rule(p, track, budget=budget).theta for budget in budgets)


def _find_counterpart(board: PredictionGroup | None, said: ModelPredictions) -> ModelPredictions | None:
    """Find what the same cell said of another part."""
    key = (said.model, said.seed, said.fold)
    return next((s for s in (board.predictions if board else ()) if (s.model, s.seed, s.fold) == key), None)


def _build_episodes(
    said: ModelPredictions | None, recorded: Mapping[str, EpisodeTimeline], agent: str | None = None
) -> list[EpisodePredictions]:
    if said is None:
        return []
    s = said.windows
    _, first, count = np.unique(s.episode_id.astype(str), return_index=True, return_counts=True)
    found = []
    for at, n in sorted(zip(first.tolist(), count.tolist(), strict=True)):
        known = recorded.get(s.episode_id[at])
        if known is None or not known.spans or agent not in (None, s.agent[at]):
            continue
        found.append(
            EpisodePredictions(
                id=s.episode_id[at], host_id=s.host_id[at], session=s.session[at], profile=s.profile[at],
                t_center_ns=s.t_center_ns[at : at + n], y=s.y_true[at : at + n], probabilities=said.output.probabilities[at : at + n],
                spans=known.spans,
            )
        )  # fmt: skip
    return found


def _simulate_episodes(episodes: Sequence[EpisodePredictions], thresholds: Sequence[float]) -> EpisodeOutcomes:
    watched = concatenate_episodes([e.alarm_input for e in episodes])
    found = compute_alarm_outcome(watched, thresholds)
    return EpisodeOutcomes(
        episodes=tuple(episodes), onset_ns=watched.onset_ns, exposure_s=watched.exposure_s,
        false_alarms=found.false_alarms, delay_s=found.delay_s,
    )  # fmt: skip


def _concatenate_outcomes(parts: Sequence[EpisodeOutcomes]) -> EpisodeOutcomes:
    return EpisodeOutcomes(
        episodes=tuple(e for part in parts for e in part.episodes),
        onset_ns=np.concatenate([p.onset_ns for p in parts]),
        exposure_s=np.concatenate([p.exposure_s for p in parts]),
        false_alarms=np.concatenate([p.false_alarms for p in parts], axis=1),
        delay_s=np.concatenate([p.delay_s for p in parts], axis=1),
    )


IMPACT_METRICS = (
    ("impact_bytes_written", "qmp.blk_wr_bytes", "B"),
    ("impact_bytes_out", "netflow.out_bytes", "B"),
    ("impact_new_flows", "netflow.new_flows", "flows"),
    ("impact_cpu_seconds", "proc.vcpu_run", "s"),
)
_QUIET_TIME_NOTE = MetricNote(code=NoteCode.QUIET_TIME, text="quiet time observed: 5 s for each decision time")
_NO_QUIET_TIME_NOTE = MetricNote(code=NoteCode.NO_QUIET_TIME, text="no quiet time was observed")
_NO_ONSET_NOTE = MetricNote(code=NoteCode.NO_ONSET, text="no test episode has an onset")
_MOSTLY_MISSED_NOTE = MetricNote(
    code=NoteCode.MOST_EPISODES_MISSED, text="more than half are missed, so there is no median"
)
RULE_OF_THREE = 3.0  # in H VM-hours nothing below 3/H an hour is claimed: the rule of three

ResampleMeasure = Callable[
    [NDArray[np.uint16]], FloatArray
]  # ``(b, E)`` how often each episode was drawn → ``(b,)`` a measure


def build_alarm_rows(
    parts: PredictionParts, recorded: Mapping[str, EpisodeTimeline], rules: EvaluationSettings, *, agent: str | None
) -> Iterator[MetricRow]:
    """Give the operator's rows of every model that answered for all folds.

    Args:
        parts: What was said.
        recorded: Episode → spans and rates; an episode without is left out.
        rules: How intervals are drawn.
        agent: Test episodes with the agent `on`, `off`, or both.
    """
    board = parts.test
    place = MetricKey(
        recipe=board.recipe,
        fold="pooled",
        channel_set=board.threat,
        input=board.table,
        smoothing=board.filter,
        agent=agent,
    )
    home = HeadlineKey()
    is_home = (place.recipe, place.channel_set, place.input, place.smoothing) == (
        home.recipe,
        home.channel_set,
        home.input,
        SMOOTHING_NONE,
    )
    budgets = (
        ALARM_BUDGETS if is_home else (FALSE_ALARM_BUDGET,)
    )  # a curve where the headline stands, one point elsewhere
    by_model: dict[str, list[AlarmSimulation]] = {}
    for model, seed in dict.fromkeys((s.model, s.seed) for s in board.predictions):
        own = [s for s in board.predictions if (s.model, s.seed) == (model, seed)]
        if [s.fold for s in own] != board.folds:
            continue
        shift = simulate_alarms(own, parts, recorded, agent, budgets)
        if isinstance(shift, str):
            note = MetricNote(code=NoteCode.NO_ALARM_METRICS, text=f"{model} has no delay and no false alarms: {shift}")
            yield place.row(metric="note", model=model, note=note)
        else:
            by_model.setdefault(model, []).append(shift)
    for model, shifts in by_model.items():
        yield from _build_model_rows(_AlarmRowBuilder(place=place, model=model, rules=rules), shifts, recorded)


@dataclass(frozen=True, slots=True, kw_only=True)
class _AlarmRowBuilder:
    """Makes one model's rows."""

    place: MetricKey
    model: str
    rules: EvaluationSettings

    def row(
        self,
        metric: str,
        lived: EpisodeOutcomes,
        keep: BoolArray,
        value: float | None,
        *,
        note: MetricNote | None = None,
        **columns: object,
    ) -> MetricRow:
        """Build a row over the kept episodes; an infinite value becomes null."""
        own = [e for e, kept in zip(lived.episodes, keep, strict=True) if kept]
        return self.place.row(
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
        self, lived: EpisodeOutcomes, keep: BoolArray, measures: Sequence[ResampleMeasure]
    ) -> IntervalColumns:
        """Return the interval of a measure's mean over seeds, or the note that explains why it has none."""
        clusters = bootstrap.build_clusters([e.host_id for e in lived.episodes], [e.session for e in lived.episodes])
        sessions = len(np.unique(clusters.cluster_index[keep]))
        every = np.zeros(len(clusters.cluster_index), np.int64)
        weights = bootstrap.draw_weights(
            clusters, every, classes=(0,), resamples=self.rules.resamples, seed=self.rules.seed
        )
        hosts = len(np.unique(clusters.host_index[clusters.cluster_index[keep]]))
        if note := bootstrap.explain_missing_interval(sessions, hosts):
            return {"note": note}
        if weights is None:
            text = "almost no resample can be drawn"
            return {"note": MetricNote(code=NoteCode.RESAMPLES_LOSE_EPISODES, text=text)}
        draws = np.mean([measure(weights.counts[:, clusters.cluster_index]) for measure in measures], axis=0)
        draws = draws[~np.isnan(draws)]  # a resample that drew none of what is measured says nothing
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
    tell: _AlarmRowBuilder, shifts: Sequence[AlarmSimulation], recorded: Mapping[str, EpisodeTimeline]
) -> Iterator[MetricRow]:
    tests, soaks = [s.test for s in shifts], [s.soak for s in shifts]
    first = tests[0]
    everybody = np.ones(len(first.episodes), np.bool_)
    at = shifts[0].budgets.index(FALSE_ALARM_BUDGET)
    thresholds = [t for s in shifts for t in s.thresholds]
    never = sum(t >= THETA_NEVER for t in thresholds)
    note = MetricNote(code=NoteCode.MEAN_OVER_FOLDS, text="mean over folds")
    if never:
        text = f"no threshold meets the budget in {never} of {len(thresholds)} folds"
        note = MetricNote(code=NoteCode.BUDGET_NOT_MET, text=text)
    known = [t for t in thresholds if t < THETA_NEVER]
    yield tell.row(
        "alarm_threshold",
        first,
        everybody,
        float(np.mean(known)) if known else None,
        bin=FALSE_ALARM_BUDGET,
        note=note,
    )
    yield from _build_false_alarm_rows(tell, "", tests, at)
    if soaks[0].episodes:
        yield from _build_false_alarm_rows(tell, "soak_", soaks, at)
    profiles = sorted({e.profile for e, begun in zip(first.episodes, first.has_onset, strict=True) if begun})
    for profile in (None, *profiles):
        keep = first.has_onset & np.array([profile in (None, e.profile) for e in first.episodes], np.bool_)
        yield from _build_detection_rows(tell, tests, keep, profile, at)
        if len(shifts[0].budgets) > 1:
            yield from _build_budget_rows(tell, tests, keep, profile)
    for name, unit, measured in _compute_impact(tests, recorded, at):
        value = float(np.mean([_measure_once(_build_median_measure(m), len(m)) for m in measured]))
        ends = tell.build_interval(first, first.has_onset, [_build_median_measure(m) for m in measured])
        yield tell.row(name, first, first.has_onset, value, unit=unit, **ends)


def _build_false_alarm_rows(
    tell: _AlarmRowBuilder, prefix: str, lived: Sequence[EpisodeOutcomes], at: int
) -> Iterator[MetricRow]:
    """Compute false alarms per VM-hour with the exact Poisson interval and the session bootstrap's, and quote their union."""
    first, hours = lived[0], lived[0].hours
    every = np.ones(len(first.episodes), np.bool_)
    name = f"{prefix}false_alarms_per_vm_hour"
    yield tell.row(f"{prefix}vm_hours", first, every, hours, unit="h", note=_QUIET_TIME_NOTE)
    if not hours:
        yield tell.row(name, first, every, None, unit="1/h", note=_NO_QUIET_TIME_NOTE)
        return
    found = _compute_false_alarm_rate(tell, lived, at)
    yield tell.row(f"{name}_poisson", first, every, found.per_hour, unit="1/h", **found.poisson)
    yield tell.row(f"{name}_sessions", first, every, found.per_hour, unit="1/h", **found.sessions)
    text = f"{found.count:g} in {hours:.2f} VM-hours; nothing below {RULE_OF_THREE / hours:.1f} an hour is claimed"
    note = MetricNote(code=NoteCode.FALSE_ALARM_COUNT, text=text)
    yield tell.row(
        name, first, every, found.per_hour, unit="1/h", low=found.union["low"], high=found.union["high"], note=note
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FalseAlarmRate:
    """False alarms per VM-hour, a mean over seeds, and what is known of their spread."""

    count: float
    per_hour: float
    poisson: IntervalColumns
    sessions: IntervalColumns

    @property
    def union(self) -> IntervalColumns:
        """The interval from the lower of the two low ends to the higher of the two high ends.

        Neither alone is enough: Poisson's knows no sessions, and the sessions' bootstrap cannot see past what it drew.
        """
        low, high = self.sessions.get("low"), self.sessions.get("high")
        if low is None or high is None:
            return self.poisson
        return {"low": min(self.poisson["low"], low), "high": max(self.poisson["high"], high)}


def _compute_false_alarm_rate(tell: _AlarmRowBuilder, lived: Sequence[EpisodeOutcomes], at: int) -> FalseAlarmRate:
    """Compute the rate of false alarms at one budget, over the calm hours of all episodes."""
    first, hours = lived[0], lived[0].hours
    every = np.ones(len(first.episodes), np.bool_)
    count = float(np.mean([one.false_alarms[at].sum() for one in lived]))
    low, high = compute_poisson_interval(count)
    return FalseAlarmRate(
        count=count, per_hour=count / hours, poisson={"low": low / hours, "high": high / hours},
        sessions=tell.build_interval(first, every, [_build_ratio_measure(one.false_alarms[at] * 3600.0, one.exposure_s) for one in lived]),
    )  # fmt: skip


def _build_detection_rows(
    tell: _AlarmRowBuilder, lived: Sequence[EpisodeOutcomes], keep: BoolArray, profile: str | None, at: int
) -> Iterator[MetricRow]:
    """Compute the median delay, a missed episode counting as never, and the share of missed ones."""
    if not keep.any():
        yield tell.row("delay_s", lived[0], keep, None, unit="s", note=_NO_ONSET_NOTE, profile=profile)
        return
    yield from _build_delay_rows(tell, lived, keep, at, "", {"profile": profile})


def _build_delay_rows(
    tell: _AlarmRowBuilder,
    lived: Sequence[EpisodeOutcomes],
    keep: BoolArray,
    at: int,
    suffix: str,
    where: Mapping[str, Any],
) -> Iterator[MetricRow]:
    """Compute delay and misses of the kept episodes at one budget; `suffix` ends the metrics' names."""
    first = lived[0]
    delays = [np.where(keep, one.delay_s[at], np.nan) for one in lived]
    value = float(np.mean([_measure_once(_build_median_measure(d), len(d)) for d in delays]))
    ends: IntervalColumns = {"note": _MOSTLY_MISSED_NOTE}
    if np.isfinite(value):
        ends = tell.build_interval(first, keep, [_build_median_measure(d) for d in delays])
    yield tell.row(f"delay_s{suffix}", first, keep, value, unit="s", **where, **ends)
    missed = [_build_ratio_measure(np.isinf(d).astype(np.float64), keep.astype(np.float64)) for d in delays]
    share = float(np.mean([_measure_once(m, len(keep)) for m in missed]))
    yield tell.row(f"miss_rate{suffix}", first, keep, share, **where, **tell.build_interval(first, keep, missed))


def _build_budget_rows(
    tell: _AlarmRowBuilder, lived: Sequence[EpisodeOutcomes], keep: BoolArray, profile: str | None
) -> Iterator[MetricRow]:
    """Compute delay, misses and the false alarms that came of each budget, each with its interval."""
    first = lived[0]
    for i, budget in enumerate(ALARM_BUDGETS):
        if keep.any():
            yield from _build_delay_rows(tell, lived, keep, i, "_at_budget", {"bin": budget, "profile": profile})
        if profile is None and first.hours:
            found = _compute_false_alarm_rate(tell, lived, i)
            every = np.ones(len(first.episodes), np.bool_)
            yield tell.row(
                "false_alarms_per_vm_hour_at_budget",
                first,
                every,
                found.per_hour,
                unit="1/h",
                bin=budget,
                **found.union,
            )


def _compute_impact(
    tests: Sequence[EpisodeOutcomes], recorded: Mapping[str, EpisodeTimeline], at: int
) -> Iterator[tuple[str, str, list[FloatArray]]]:
    """Sum what was done from onset to alarm, NaN where nothing ran; of a missed episode all that was recorded."""
    sums = []
    for lived in tests:
        done = np.full((len(lived.episodes), len(IMPACT_METRICS)), np.nan)
        for i, (e, onset, delay) in enumerate(zip(lived.episodes, lived.onset_ns, lived.delay_s[at], strict=True)):
            if onset >= 0:
                of = recorded[e.id]
                end = of.spans[-1][2] if np.isinf(delay) else int(onset) + round(delay * 1e9)
                done[i] = sum_rates(of.rates, of.t0_ns, int(onset), end)
        sums.append(done)
    if any(np.isfinite(done).any() for done in sums):
        for k, (name, _, unit) in enumerate(IMPACT_METRICS):
            yield name, unit, [done[:, k] for done in sums]


def _build_median_measure(values: FloatArray) -> ResampleMeasure:
    """Measure the lower median of what is not NaN, infinity included, each value as often as it was drawn."""
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]

    def measure(times: NDArray[np.uint16]) -> FloatArray:
        if not len(order):
            return np.full(len(times), np.nan)
        reached = np.cumsum(times[:, order].astype(np.float64), axis=1)
        total = reached[:, -1]
        first = (reached >= total[:, None] / 2).argmax(axis=1)
        found: FloatArray = np.where(total > 0, values[order][first], np.nan)
        return found

    return measure


def _build_ratio_measure(above: FloatArray, below: FloatArray) -> ResampleMeasure:
    def measure(times: NDArray[np.uint16]) -> FloatArray:
        t = times.astype(np.float64)
        over = t @ below
        found: FloatArray = np.divide(t @ above, over, out=np.full(len(t), np.nan), where=over > 0)
        return found

    return measure


def _measure_once(measure: ResampleMeasure, n: int) -> float:
    """Measure the episodes as they are, each of the `n` once."""
    return float(measure(np.ones((1, n), np.uint16))[0])


def compute_poisson_interval(count: float) -> tuple[float, float]:
    """Give the exact 95 % interval of a Poisson mean. Source: Garwood 1936, by the gamma distribution's quantiles."""
    from scipy.special import gammaincinv

    tail = (1 - bootstrap.CONFIDENCE_LEVEL) / 2
    return (float(gammaincinv(count, tail)) if count else 0.0), float(gammaincinv(count + 1, 1 - tail))
