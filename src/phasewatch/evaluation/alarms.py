"""Alarm simulation: when a model's alarms start on recorded episodes, how late, and how often falsely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import BoolArray, FloatArray
from phasewatch.evaluation.metric_table import MetricNote, NoteCode
from phasewatch.evaluation.predictions import ModelPredictions, PredictionGroup
from phasewatch.models.alarm import (
    ALARM_PHASES,
    DECISION_DELAY_NS,
    FALSE_ALARM_BUDGET,
    LOOK_BACK_NS,
    AlarmKind,
    AlarmRule,
    apply_alarm_rule,
    compute_alarm_score,
    compute_detection_delays,
    find_alarm_starts,
    fit_alarm_rules,
)
from phasewatch.models.smoothing import LabelSequence
from phasewatch.types import BIN_NS, Phase

__all__ = [
    "ALARM_BUDGETS",
    "AlarmOutcome",
    "AlarmSimulation",
    "ConcatenatedEpisodes",
    "EpisodeOutcomes",
    "EpisodePredictions",
    "EpisodeTimeline",
    "PhaseSpans",
    "PredictionParts",
    "compute_alarm_outcome",
    "concatenate_episodes",
    "find_onset",
    "mark_quiet_times",
    "simulate_alarms",
    "simulate_trained_rule",
    "sum_rates",
]

ALARM_BUDGETS = (0.25, 0.5, 1.0, 2.0, 3.0, 6.0)  # false alarms per VM-hour that an operator might allow
_QUIET_PHASES = (Phase.CLEAN, Phase.ARMED)

PhaseSpans = Sequence[tuple[Phase, int, int]]  # (phase, start, end), nanoseconds on the wall clock, in order


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConcatenatedEpisodes:
    """The windows of ``E`` episodes one after the other, as one model scored them for one alarm: ``n`` windows.

    Attributes:
        kind: The alarm.
        stride_s: Seconds between two windows.
        score: ``(n,)`` score of the alarm.
        episode_index: ``(n,)`` index of each window's episode, ascending.
        decided_ns: ``(n,)`` decision times on the wall clock.
        quiet: ``(n,)`` whether an alarm that starts then is false.
        onset_ns: ``(E,)`` onset of what the alarm announces; −1 without onset.
        recorded_s: ``(E,)`` seconds that were recorded after the onset; 0 without onset or without a later decision.
    """

    kind: AlarmKind
    stride_s: int
    score: FloatArray
    episode_index: NDArray[np.int64]
    decided_ns: NDArray[np.int64]
    quiet: BoolArray
    onset_ns: NDArray[np.int64]
    recorded_s: FloatArray

    def __len__(self) -> int:
        return len(self.onset_ns)

    def sum_quiet_seconds(self, marked: BoolArray) -> FloatArray:
        """Sum the quiet time of the marked windows ``(n,)`` by episode: ``(E,)`` s, one stride per window."""
        windows = np.bincount(self.episode_index, self.quiet & marked, len(self))
        return np.asarray(windows * float(self.stride_s), np.float64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AlarmOutcome:
    """The alarms of ``E`` episodes under ``T`` rules, ``(T, E)``.

    Attributes:
        false_alarms: Number of alarms that started in quiet time.
        on_s: Seconds of quiet time with the alarm on.
        delay_s: Seconds from onset to alarm (`models.alarm.compute_detection_delays`); inf without alarm or onset.
    """

    false_alarms: NDArray[np.int64]
    on_s: NDArray[np.float64]
    delay_s: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodeTimeline:
    """The ground truth of an episode: its label spans and its rates over time.

    Attributes:
        t0_ns: Start of the first bin on the wall clock.
        rates: ``(n_bins, 4)`` per second, in the order of `IMPACT_METRICS`; NaN where unknown.
        group: Number of the sample group.
    """

    spans: PhaseSpans
    t0_ns: int
    rates: NDArray[np.floating]
    group: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PredictionParts:
    """Predictions of one recipe, channel set and input, one window every `stride_s`, without smoothing."""

    test: PredictionGroup
    val_b: PredictionGroup | None
    soak: PredictionGroup | None
    stride_s: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodePredictions:
    """One model's predictions on one episode of ``n`` windows.

    Attributes:
        t_center_ns: ``(n,)`` window centres on the wall clock, ascending.
        y: ``(n,)`` true phase codes.
        probabilities: ``(n, 5)``.
    """

    id: str
    host_id: str
    session: str
    profile: str
    t_center_ns: NDArray[np.int64]
    y: NDArray[np.int64]
    probabilities: FloatArray
    spans: PhaseSpans


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpisodeOutcomes:
    """The alarms of ``E`` episodes, each under its fold's own rules for ``b`` budgets.

    Attributes:
        onset_ns: ``(E,)`` onset on the wall clock; −1 without onset.
        recorded_s: ``(E,)`` seconds that were recorded after the onset; 0 without.
        exposure_s: ``(E,)`` seconds in which an alarm would be false.
        false_alarms: ``(b, E)`` number of false alarms.
        on_s: ``(b, E)`` seconds of quiet time with the alarm on.
        delay_s: ``(b, E)`` seconds from onset to alarm; inf without.
    """

    episodes: tuple[EpisodePredictions, ...]
    onset_ns: NDArray[np.int64]
    recorded_s: FloatArray
    exposure_s: FloatArray
    false_alarms: NDArray[np.int64]
    on_s: FloatArray
    delay_s: FloatArray

    @property
    def has_onset(self) -> BoolArray:
        """Whether each episode has an onset, ``(E,)``."""
        marked: BoolArray = self.onset_ns >= 0
        return marked

    @property
    def hours(self) -> float:
        """VM-hours in which an alarm would be false."""
        return float(self.exposure_s.sum()) / 3600


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AlarmSimulation:
    """One alarm of one model and seed on all folds.

    Attributes:
        budgets: False alarms per VM-hour, the first axis of both outcomes; `FALSE_ALARM_BUDGET` is one of them.
        rules: The rule of each fold at `FALSE_ALARM_BUDGET`.
    """

    test: EpisodeOutcomes
    soak: EpisodeOutcomes
    budgets: tuple[float, ...]
    rules: tuple[AlarmRule, ...]


def find_onset(spans: PhaseSpans, kind: AlarmKind) -> int | None:
    """Return the start of the first infecting span, for `ACTIVITY` else of the first active one; None without."""
    for phase in ALARM_PHASES[kind]:
        for span_phase, start, _ in spans:
            if span_phase is phase:
                return start
    return None


def mark_quiet_times(spans: PhaseSpans, at_ns: NDArray[np.int64]) -> BoolArray:
    """Mark the times whose whole last minute was clean or armed: an alarm that starts then is false.

    Time before the first label counts as the first label: a machine that starts dormant was infected before.

    Args:
        spans: Label spans of one episode.
        at_ns: ``(n,)`` times on the wall clock.

    Returns:
        ``(n,)`` bool; all False without labels.
    """
    quiet = np.full(len(at_ns), bool(spans))
    for i, (phase, start, end) in enumerate(spans):
        if phase not in _QUIET_PHASES:
            since = np.iinfo(np.int64).min if i == 0 else start
            quiet &= (at_ns < since) | (at_ns - LOOK_BACK_NS >= end)
    return quiet


def concatenate_episodes(
    episodes: Sequence[tuple[PhaseSpans, NDArray[np.int64], NDArray[np.floating]]], *, kind: AlarmKind, stride_s: int
) -> ConcatenatedEpisodes:
    """Concatenate episodes.

    Args:
        episodes: For each episode its label spans, ``(w,)`` window centres in order, ``(w, 5)`` probabilities.
        kind: The alarm, which decides the score and the onset.
        stride_s: Seconds between two windows.
    """
    decided = [t_center_ns + DECISION_DELAY_NS for _, t_center_ns, _ in episodes]
    onsets = [find_onset(spans, kind) for spans, _, _ in episodes]
    quiet = [mark_quiet_times(spans, at_ns) for (spans, _, _), at_ns in zip(episodes, decided, strict=True)]
    recorded = [
        0.0 if onset is None or not (at_ns >= onset).any() else (spans[-1][2] - onset) / 1e9
        for (spans, _, _), at_ns, onset in zip(episodes, decided, onsets, strict=True)
    ]
    return ConcatenatedEpisodes(
        kind=kind,
        stride_s=stride_s,
        score=np.concatenate([np.zeros(0), *(compute_alarm_score(p, kind) for _, _, p in episodes)]),
        episode_index=np.repeat(np.arange(len(episodes)), [len(t) for t in decided]),
        decided_ns=np.concatenate([np.zeros(0, np.int64), *decided]),
        quiet=np.concatenate([np.zeros(0, np.bool_), *quiet]),
        onset_ns=np.array([-1 if onset is None else onset for onset in onsets], np.int64),
        recorded_s=np.array(recorded, np.float64),
    )


def compute_alarm_outcome(episodes: ConcatenatedEpisodes, rules: Sequence[AlarmRule]) -> AlarmOutcome:
    """Count false alarms and their time, and measure detection delays, under each rule."""
    shape = (len(rules), len(episodes))
    false_alarms, on_s, delay_s = np.zeros(shape, np.int64), np.zeros(shape), np.full(shape, np.inf)
    index = episodes.episode_index
    for i, rule in enumerate(rules):
        is_active = apply_alarm_rule(rule, episodes.score, index)
        starts = find_alarm_starts(is_active, index)
        false_alarms[i] = np.bincount(index, starts & episodes.quiet, len(episodes))
        on_s[i] = episodes.sum_quiet_seconds(is_active)
        delay_s[i] = compute_detection_delays(episodes.kind, is_active, index, episodes.decided_ns, episodes.onset_ns)
    return AlarmOutcome(false_alarms=false_alarms, on_s=on_s, delay_s=delay_s)


def sum_rates(rates: NDArray[np.floating], t0_ns: int, begin_ns: int, end_ns: int) -> NDArray[np.float64]:
    """Sum rates over the whole bins between two times; an unknown bin adds nothing.

    Args:
        rates: ``(n_bins, c)`` per second, NaN where unknown.
        t0_ns: Start of the first bin.
        begin_ns: Start of the interval.
        end_ns: End of the interval.

    Returns:
        ``(c,)`` amounts.
    """
    first = max(0, -(-(begin_ns - t0_ns) // BIN_NS))
    last = max(first, (end_ns - t0_ns) // BIN_NS)
    total: NDArray[np.float64] = np.nansum(np.asarray(rates[first:last], np.float64), axis=0) * (BIN_NS / 1e9)
    return total


def simulate_alarms(
    folds: Sequence[ModelPredictions],
    parts: PredictionParts,
    timelines: Mapping[str, EpisodeTimeline],
    *,
    kind: AlarmKind,
    agent: str | None,
    budgets: tuple[float, ...] = ALARM_BUDGETS,
) -> AlarmSimulation | MetricNote:
    """Fit each fold's rules on validation B and foreign soak, then simulate its test and its own soak.

    Args:
        folds: Test predictions of one model and seed, one per fold.
        parts: The groups that they belong to.
        timelines: Episode id → ground truth; an episode without is left out.
        kind: The alarm.
        agent: Test episodes with the agent ``on`` or ``off``; None for both.
        budgets: False alarms per VM-hour; `FALSE_ALARM_BUDGET` is one of them.

    Returns:
        The simulation, or the note that explains why there is none.
    """
    tests, soaks, rules = [], [], []
    for fold in folds:
        held_out = _HeldOut.from_fold(fold, timelines, both=parts.test.recipe == "held_out_both")
        soak = _build_episodes(_find_counterpart(parts.soak, fold), timelines)
        known = _build_episodes(_find_counterpart(parts.val_b, fold), timelines)
        known += [e for e in soak if held_out.is_foreign(e, timelines)]
        if not known:
            text = f"fold {fold.fold} has no validation B and no soak of other hosts to set a threshold by"
            return MetricNote(code=NoteCode.NO_ALARM_METRICS, text=text)
        at_budget = _fit_rules(known, kind, parts.stride_s, budgets)
        rules.append(at_budget[budgets.index(FALSE_ALARM_BUDGET)])
        tests.append(_simulate_episodes(_build_episodes(fold, timelines, agent), at_budget))
        own_soak = [e for e in soak if held_out.is_own(e, timelines)]
        soaks.append(_simulate_episodes(own_soak, at_budget))
    test = _concatenate_outcomes(tests)
    if not test.episodes:
        text = "no test episode has label spans in the bins"
        return MetricNote(code=NoteCode.NO_ALARM_METRICS, text=text)
    return AlarmSimulation(test=test, soak=_concatenate_outcomes(soaks), budgets=budgets, rules=tuple(rules))


def simulate_trained_rule(
    test: ModelPredictions,
    soak: ModelPredictions | None,
    timelines: Mapping[str, EpisodeTimeline],
    rule: AlarmRule,
    *,
    agent: str | None,
) -> AlarmSimulation | MetricNote:
    """Simulate the alarm of a model by the rule that its training fixed, on episodes of another store.

    Args:
        test: Predictions on lab episodes.
        soak: Predictions on soak episodes; None without any.
        timelines: Episode id → ground truth; an episode without is left out.
        rule: The rule.
        agent: Test episodes with the agent ``on`` or ``off``; None for both.
    """
    episodes = _build_episodes(test, timelines, agent)
    if not episodes:
        return MetricNote(code=NoteCode.NO_ALARM_METRICS, text="no test episode has labels")
    return AlarmSimulation(
        test=_simulate_episodes(episodes, [rule]),
        soak=_simulate_episodes(_build_episodes(soak, timelines), [rule]),
        budgets=(FALSE_ALARM_BUDGET,),
        rules=(rule,),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeldOut:
    """What a fold holds out: its hosts, and with `both` also its sample groups."""

    hosts: frozenset[str]
    groups: frozenset[int]
    both: bool

    @classmethod
    def from_fold(cls, fold: ModelPredictions, timelines: Mapping[str, EpisodeTimeline], *, both: bool) -> _HeldOut:
        groups = frozenset(timelines[i].group for i in fold.windows.episode_id if i in timelines)
        return cls(hosts=frozenset(fold.windows.host_id), groups=groups, both=both)

    def is_own(self, episode: EpisodePredictions, timelines: Mapping[str, EpisodeTimeline]) -> bool:
        """Return whether an episode is of a held-out host and, with `both`, of a held-out group."""
        return episode.host_id in self.hosts and (not self.both or timelines[episode.id].group in self.groups)

    def is_foreign(self, episode: EpisodePredictions, timelines: Mapping[str, EpisodeTimeline]) -> bool:
        """Return whether an episode shares neither a held-out host nor, with `both`, a held-out group."""
        return episode.host_id not in self.hosts and not (self.both and timelines[episode.id].group in self.groups)


def _fit_rules(
    episodes: Sequence[EpisodePredictions], kind: AlarmKind, stride_s: int, budgets: Sequence[float]
) -> tuple[AlarmRule, ...]:
    """Fit the rule of each budget as training does."""
    labels = LabelSequence(
        y=np.concatenate([e.y for e in episodes]),
        episode_index=np.repeat(np.arange(len(episodes)), [len(e.y) for e in episodes]),
        t_center_ns=np.concatenate([e.t_center_ns for e in episodes]),
    )
    p = np.concatenate([e.probabilities for e in episodes])
    return fit_alarm_rules(p, labels, kind=kind, stride_s=stride_s, budgets=budgets)


def _find_counterpart(group: PredictionGroup | None, fold: ModelPredictions) -> ModelPredictions | None:
    """Find the predictions of the same model, seed and fold on another part."""
    key = (fold.model, fold.seed, fold.fold)
    return next((s for s in (group.predictions if group else ()) if (s.model, s.seed, s.fold) == key), None)


def _build_episodes(
    predictions: ModelPredictions | None, timelines: Mapping[str, EpisodeTimeline], agent: str | None = None
) -> list[EpisodePredictions]:
    if predictions is None:
        return []
    windows = predictions.windows
    _, first, count = np.unique(windows.episode_id.astype(str), return_index=True, return_counts=True)
    episodes = []
    for start, n in sorted(zip(first.tolist(), count.tolist(), strict=True)):
        timeline = timelines.get(windows.episode_id[start])
        if timeline is None or not timeline.spans or agent not in (None, windows.agent[start]):
            continue
        own = slice(start, start + n)
        episodes.append(
            EpisodePredictions(
                id=windows.episode_id[start],
                host_id=windows.host_id[start],
                session=windows.session[start],
                profile=windows.profile[start],
                t_center_ns=windows.t_center_ns[own],
                y=windows.y_true[own],
                probabilities=predictions.output.probabilities[own],
                spans=timeline.spans,
            )
        )
    return episodes


def _simulate_episodes(episodes: Sequence[EpisodePredictions], rules: Sequence[AlarmRule]) -> EpisodeOutcomes:
    together = concatenate_episodes(
        [(e.spans, e.t_center_ns, e.probabilities) for e in episodes], kind=rules[0].kind, stride_s=rules[0].stride_s
    )
    outcome = compute_alarm_outcome(together, rules)
    return EpisodeOutcomes(
        episodes=tuple(episodes),
        onset_ns=together.onset_ns,
        recorded_s=together.recorded_s,
        exposure_s=together.sum_quiet_seconds(np.ones(len(together.score), np.bool_)),
        false_alarms=outcome.false_alarms,
        on_s=outcome.on_s,
        delay_s=outcome.delay_s,
    )


def _concatenate_outcomes(parts: Sequence[EpisodeOutcomes]) -> EpisodeOutcomes:
    return EpisodeOutcomes(
        episodes=tuple(e for part in parts for e in part.episodes),
        onset_ns=np.concatenate([p.onset_ns for p in parts]),
        recorded_s=np.concatenate([p.recorded_s for p in parts]),
        exposure_s=np.concatenate([p.exposure_s for p in parts]),
        false_alarms=np.concatenate([p.false_alarms for p in parts], axis=1),
        on_s=np.concatenate([p.on_s for p in parts], axis=1),
        delay_s=np.concatenate([p.delay_s for p in parts], axis=1),
    )
