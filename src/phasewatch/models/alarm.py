"""Two alarms on unsmoothed probabilities, infection and activity; each threshold meets a false-alarm budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.models.smoothing import LabelSequence
from phasewatch.types import BIN_NS, LIVE_STRIDE_BINS, STRIDE_BINS, WINDOW_BINS, Phase

__all__ = [
    "ALARM_PHASES",
    "CANDIDATE_THETAS",
    "DECISION_DELAY_NS",
    "FALSE_ALARM_BUDGET",
    "LIVE_STRIDE_S",
    "LOOK_BACK_NS",
    "RULE_CANDIDATES",
    "RULE_STRIDE_S",
    "THETA_NEVER",
    "THETA_STEP",
    "AlarmKind",
    "AlarmRule",
    "AlarmState",
    "apply_alarm_rule",
    "compute_alarm_score",
    "compute_detection_delays",
    "find_alarm_rule",
    "find_alarm_starts",
    "find_false_alarm_windows",
    "fit_alarm_rule",
    "fit_alarm_rules",
    "list_announced_onsets",
    "raise_threshold",
]

FALSE_ALARM_BUDGET = 0.25  # false alarms per VM-hour, of each alarm
LOOK_BACK_NS = 60 * 10**9  # an alarm is false if no infecting, active or dormant window ended this long before it
_HALF_WINDOW_NS = WINDOW_BINS * BIN_NS // 2
DECISION_DELAY_NS = (
    _HALF_WINDOW_NS + 10**9
)  # from a window's centre to its decision: half its width, 1 s for late ticks
THETA_STEP = 0.005
CANDIDATE_THETAS = np.round(np.arange(THETA_STEP, 1.0 + THETA_STEP / 2, THETA_STEP), 3)
THETA_NEVER = 1.005  # above any score: no threshold met the budget
RULE_STRIDE_S = STRIDE_BINS * BIN_NS // 10**9  # of the windows that a model is trained on
LIVE_STRIDE_S = LIVE_STRIDE_BINS * BIN_NS // 10**9  # of the windows that a watcher decides on
RULE_CANDIDATES = {  # stride in seconds -> (k, n) to choose from
    RULE_STRIDE_S: ((1, 1), (2, 2), (2, 3)),
    LIVE_STRIDE_S: ((3, 4), (4, 6), (8, 12)),
}
_IN_TIME_NS = 30 * 10**9  # (k, n) is chosen by the onsets that are announced within this time
_INACTIVE_CODES = (Phase.CLEAN.code, Phase.ARMED.code)
_MAX_CELLS = 2**22  # windows x thresholds simulated together; bounds memory
_BATCH_THETAS = 20  # thresholds simulated together


class AlarmKind(StrEnum):
    """What an alarm announces, and the score that raises it."""

    INFECTION = "infection"  # p(infecting): pages an operator
    ACTIVITY = "activity"  # p(infecting) + p(active): informs


ALARM_PHASES = {  # phases whose probabilities add up to the score
    AlarmKind.INFECTION: (Phase.INFECTING,),
    AlarmKind.ACTIVITY: (Phase.INFECTING, Phase.ACTIVE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmRule:
    """Start an alarm when `k` of the last `n` windows reach the threshold; end it when `n` in a row do not.

    Attributes:
        kind: What the alarm announces.
        stride_s: Seconds between two windows: 5 or 1.
        theta: Threshold on the score of `compute_alarm_score`; `THETA_NEVER` if no threshold met the budget.
        k, n: Windows that must reach the threshold, and windows that are looked at.
        budget: False alarms per quiet VM-hour that `theta` was fitted for.
        false_alarms: False alarms on the windows that `theta` was fitted to.
        vm_hours: Quiet VM-hours that `theta` was fitted to.

    Raises:
        ValueError: If a number is out of its range.
    """

    kind: AlarmKind
    stride_s: int
    theta: float
    k: int
    n: int
    budget: float = FALSE_ALARM_BUDGET
    false_alarms: int = 0
    vm_hours: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.theta <= THETA_NEVER or not 1 <= self.k <= self.n <= 100:
            raise ValueError(f"alarm rule: theta {self.theta} or {self.k} of {self.n} windows is out of range")
        if self.stride_s not in RULE_CANDIDATES:
            allowed = " or ".join(map(str, sorted(RULE_CANDIDATES)))
            raise ValueError(f"alarm rule: a stride of {self.stride_s} s, expected {allowed}")
        if self.false_alarms < 0 or not all(isfinite(v) and v >= 0 for v in (self.vm_hours, self.budget)):
            raise ValueError(f"alarm rule: {self.false_alarms} false alarms in {self.vm_hours} VM-hours is invalid")


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmState:
    """The state of an alarm after a window.

    Attributes:
        recent: Whether each of the last windows reached the threshold, oldest first.
        is_active: Whether the alarm is on.
        has_started: Whether it started at this window.
    """

    recent: tuple[bool, ...] = ()
    is_active: bool = False
    has_started: bool = False

    def step(self, rule: AlarmRule, score: float) -> AlarmState:
        """Return the state after one more window with this score."""
        recent = (*self.recent, score >= rule.theta)[-rule.n :]
        is_active = any(recent) if self.is_active else sum(recent) >= rule.k
        return AlarmState(recent=recent, is_active=is_active, has_started=is_active and not self.is_active)


def find_alarm_rule(rules: Sequence[AlarmRule], kind: AlarmKind, stride_s: int) -> AlarmRule | None:
    """Return the rule of a kind at a stride; None if none was fitted."""
    return next((rule for rule in rules if (rule.kind, rule.stride_s) == (kind, stride_s)), None)


def compute_alarm_score(p: NDArray[np.floating], kind: AlarmKind) -> FloatArray:
    """Compute the score that an alarm compares with its threshold.

    Probabilities are rounded to float32, as predictions are stored, so that a decision from the file is the same.

    Args:
        p: ``(..., 5)`` floating, unsmoothed probabilities.
        kind: The alarm: p(infecting) for `INFECTION`, p(infecting) + p(active) for `ACTIVITY`.

    Returns:
        ``(...)`` float64.
    """
    stored = np.asarray(p, np.float32).astype(np.float64)
    first, *others = ALARM_PHASES[kind]
    score: FloatArray = stored[..., first.code]
    for phase in others:
        score = score + stored[..., phase.code]
    return score


def apply_alarm_rule(rule: AlarmRule, score: FloatArray, episode_index: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return whether the alarm is on after each window; each episode starts without an alarm.

    Args:
        rule: The rule.
        score: ``(n,)`` float64 from `compute_alarm_score`, in the order (episode, time).
        episode_index: ``(n,)`` integer episode of each window.

    Returns:
        ``(n,)`` bool.
    """
    first = _find_first_windows(episode_index)
    is_active: NDArray[np.bool_] = _simulate_alarms(score, first, np.array([rule.theta]), k=rule.k, n=rule.n)[0]
    return is_active


def find_alarm_starts(is_active: NDArray[np.bool_], episode_index: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Mark the windows at which an alarm starts.

    Args:
        is_active: ``(n,)`` bool: whether the alarm is on after each window.
        episode_index: ``(n,)`` integer episode of each window.

    Returns:
        ``(n,)`` bool.
    """
    starts = is_active.copy()
    starts[1:] &= ~(is_active[:-1] & (episode_index[1:] == episode_index[:-1]))
    return starts


def find_false_alarm_windows(track: LabelSequence) -> NDArray[np.bool_]:
    """Mark the windows at which a start of either alarm would be false, ``(n,)`` bool, at any stride.

    A start is false if every window of its episode that ended in the 60 s before its decision time, itself included,
    is clean or armed. An infection alarm that starts while the malware is active or dormant is therefore not false;
    `compute_detection_delays` does not count it as a detection either, unless it starts after the onset.

    Args:
        track: Labels in the order (episode, time); an unknown phase (−1) is not quiet.
    """
    at = np.arange(len(track.y))
    is_quiet = np.isin(track.y, _INACTIVE_CODES)
    newest = (
        np.maximum.accumulate(np.where(is_quiet, -1, at)) if len(at) else at
    )  # the nearest window that is not quiet
    reach = LOOK_BACK_NS - DECISION_DELAY_NS + _HALF_WINDOW_NS  # centre to centre: the earlier one still ended inside
    is_own = newest >= _find_first_windows(track.episode_index)
    near = is_own & (track.t_center_ns - track.t_center_ns[newest] < reach)
    return np.asarray(~near, np.bool_)


def compute_detection_delays(
    kind: AlarmKind,
    is_active: NDArray[np.bool_],
    episode_index: NDArray[np.integer],
    decided_ns: NDArray[np.int64],
    onset_ns: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Compute the time from each episode's onset to its alarm.

    The activity alarm is a state: the first decision at or after the onset with the alarm on counts. The infection
    alarm pages when it starts: only a start at or after the onset counts, so an alarm that was on before, because of
    other activity or by mistake, announces nothing.

    Args:
        kind: The alarm.
        is_active: ``(n,)`` bool: whether the alarm is on after each window, in the order (episode, time).
        episode_index: ``(n,)`` integer index of each window's episode in `onset_ns`.
        decided_ns: ``(n,)`` int64 decision times.
        onset_ns: ``(E,)`` int64 onset of each episode; −1 without onset.

    Returns:
        ``(E,)`` float64 seconds; inf without an alarm or an onset.
    """
    counts = find_alarm_starts(is_active, episode_index) if kind is AlarmKind.INFECTION else is_active
    onset = onset_ns[episode_index]
    counts = counts & (onset >= 0) & (decided_ns >= onset)
    delays = np.full(len(onset_ns), np.inf)
    np.minimum.at(delays, episode_index[counts], (decided_ns - onset)[counts] / 1e9)
    return delays


def fit_alarm_rule(
    p: NDArray[np.floating],
    labels: LabelSequence,
    *,
    kind: AlarmKind,
    stride_s: int,
    budget: float = FALSE_ALARM_BUDGET,
) -> AlarmRule:
    """Fit the rule for one budget; see `fit_alarm_rules`."""
    return fit_alarm_rules(p, labels, kind=kind, stride_s=stride_s, budgets=(budget,))[0]


def fit_alarm_rules(
    p: NDArray[np.floating], labels: LabelSequence, *, kind: AlarmKind, stride_s: int, budgets: Sequence[float]
) -> tuple[AlarmRule, ...]:
    """Fit threshold, k and n for each budget.

    For each (k, n) of `RULE_CANDIDATES`, the lower end is the smallest threshold for which it and all larger ones meet
    the budget: an alarm that is always on starts once an episode, so a very low threshold would meet it alone. The
    upper end is the largest threshold that misses no more onsets within 30 s than the lower end does. The threshold is
    the middle of both, because scores on other machines differ; without onsets it is the lower end. Among the (k, n) at
    their thresholds, the rule that misses the fewest onsets within 30 s is chosen; then that with the smaller median
    delay, then that with the larger n.

    An onset is the centre of an episode's first window with a phase of `ALARM_PHASES`, and is counted if at least 30 s
    were recorded after it; the infection alarm has an onset only where the episode has an infecting window.

    Args:
        p: ``(w, 5)`` floating, unsmoothed probabilities of windows outside the training set, in the order (episode,
            time).
        labels: Labels, episodes and times of the same windows.
        kind: The alarm.
        stride_s: Seconds between two windows. Each quiet window is so much exposure, and an evaluation counts the same
            hours (ADR 0067).
        budgets: False alarms per quiet VM-hour.

    Raises:
        ValueError: If the stride has no candidates.
    """
    if stride_s not in RULE_CANDIDATES:
        raise ValueError(f"alarm rule: a stride of {stride_s} s has no candidates")
    data = _FitData.from_labels(compute_alarm_score(p, kind), labels, kind)
    n_quiet = int(data.quiet.sum())
    hours = n_quiet * stride_s / 3600
    found: list[list[tuple[tuple[int, float, int], AlarmRule]]] = [[] for _ in budgets]
    for k, n in RULE_CANDIDATES[stride_s]:
        false = data.count_false_alarms(k, n, enough=max(budgets) * hours)
        missed = data.count_missed_onsets(k, n)
        for at, budget in enumerate(budgets):
            over = np.flatnonzero(false > budget * hours)
            lower = int(over[-1]) + 1 if len(over) else 0
            is_never = not n_quiet or lower == len(CANDIDATE_THETAS)
            chosen = lower if is_never else _choose_threshold(lower, missed, has_onsets=data.has_onsets)
            rule = AlarmRule(
                kind=kind,
                stride_s=stride_s,
                theta=THETA_NEVER if is_never else float(CANDIDATE_THETAS[chosen]),
                k=k,
                n=n,
                budget=budget,
                false_alarms=0 if is_never else int(false[chosen]),
                vm_hours=round(hours, 6),
            )
            delays = data.compute_delays(rule)
            late = int((delays * 1e9 > _IN_TIME_NS).sum())
            found[at].append(((late, _compute_median(delays), -n), rule))
    return tuple(min(candidates, key=lambda one: one[0])[1] for candidates in found)


def raise_threshold(rule: AlarmRule, p: NDArray[np.floating], labels: LabelSequence) -> AlarmRule:
    """Raise the threshold of a fitted rule until it meets its budget on further quiet windows too; k and n stay.

    Args:
        rule: A fitted rule.
        p: ``(w, 5)`` floating, unsmoothed probabilities of the further windows, in the order (episode, time).
        labels: Labels, episodes and times of the same windows, at the stride of the rule.

    Returns:
        The rule with the larger threshold, never a smaller one, and with the false alarms and hours of the further
        windows added to its own.
    """
    data = _FitData.from_labels(compute_alarm_score(p, rule.kind), labels, rule.kind)
    hours = int(data.quiet.sum()) * rule.stride_s / 3600
    false = data.count_false_alarms(rule.k, rule.n, enough=rule.budget * hours)
    over = np.flatnonzero(false > rule.budget * hours)
    lower = int(over[-1]) + 1 if len(over) else 0
    is_never = lower == len(CANDIDATE_THETAS) or rule.theta == THETA_NEVER
    chosen = max(lower, int(np.searchsorted(CANDIDATE_THETAS, rule.theta)))
    return replace(
        rule,
        theta=THETA_NEVER if is_never else max(rule.theta, float(CANDIDATE_THETAS[chosen])),
        false_alarms=rule.false_alarms + (0 if is_never else int(false[chosen])),
        vm_hours=round(rule.vm_hours + hours, 6),
    )


def list_announced_onsets(
    rule: AlarmRule, p: NDArray[np.floating], labels: LabelSequence
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the episodes with an onset after which 30 s were recorded, and whether a rule announces it within 30 s.

    Args:
        rule: The rule.
        p: ``(w, 5)`` floating, unsmoothed probabilities, in the order (episode, time).
        labels: Labels, episodes and times of the same windows, at the stride of the rule.

    Returns:
        ``(m,)`` intp values of `labels.episode_index`, and ``(m,)`` bool.
    """
    data = _FitData.from_labels(compute_alarm_score(p, rule.kind), labels, rule.kind)
    first = np.flatnonzero(np.diff(data.episode, prepend=-1))
    episodes = np.asarray(labels.episode_index, np.intp)[first][data.onset_ns >= 0]
    return episodes, data.compute_delays(rule) * 1e9 <= _IN_TIME_NS


def _choose_threshold(lower: int, missed: NDArray[np.int64], *, has_onsets: bool) -> int:
    """Return the index of the threshold between the smallest that meets the budget and the largest that misses no more.

    Args:
        lower: Index of the smallest threshold that meets the budget.
        missed: ``(m,)`` onsets missed at each threshold.
        has_onsets: Whether there is any onset.
    """
    if not has_onsets:
        return lower
    upper = int(np.flatnonzero(missed <= missed[lower])[-1])
    return lower + round(0.5 * (upper - lower))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _FitData:
    """What a rule is fitted to: ``w`` windows of ``E`` episodes.

    Attributes:
        score: ``(w,)`` scores.
        first: ``(w,)`` position of the first window of each window's episode.
        quiet: ``(w,)`` whether a start of the alarm would be false.
        episode: ``(w,)`` number of each window's episode.
        onset_ns: ``(E,)`` onset of each episode that counts; −1 for the others.
        decided_ns: ``(w,)`` decision times.
    """

    kind: AlarmKind
    score: FloatArray
    first: NDArray[np.intp]
    quiet: NDArray[np.bool_]
    episode: NDArray[np.intp]
    onset_ns: NDArray[np.int64]
    decided_ns: NDArray[np.int64]

    @classmethod
    def from_labels(cls, score: FloatArray, labels: LabelSequence, kind: AlarmKind) -> _FitData:
        episode, onset_ns = _find_onsets(labels, kind)
        return cls(
            kind=kind,
            score=score,
            first=_find_first_windows(labels.episode_index),
            quiet=find_false_alarm_windows(labels),
            episode=episode,
            onset_ns=onset_ns,
            decided_ns=labels.t_center_ns + DECISION_DELAY_NS,
        )

    @property
    def has_onsets(self) -> bool:
        return bool((self.onset_ns >= 0).any())

    def count_false_alarms(self, k: int, n: int, *, enough: float) -> NDArray[np.int64]:
        """Count the false alarms at each of `CANDIDATE_THETAS`, ``(m,)``; 0 well below one with more than `enough`."""
        false = np.zeros(len(CANDIDATE_THETAS), np.int64)
        width = min(_BATCH_THETAS, max(1, _MAX_CELLS // max(1, len(self.score))))
        for stop in range(len(CANDIDATE_THETAS), 0, -width):  # from the largest: only larger ones than needed decide
            part = slice(max(0, stop - width), stop)
            is_active = _simulate_alarms(self.score, self.first, CANDIDATE_THETAS[part], k=k, n=n)
            false[part] = np.count_nonzero(_mark_starts(is_active, self.first) & self.quiet, axis=1)
            if (false[part] > enough).any():
                break
        return false

    def count_missed_onsets(self, k: int, n: int) -> NDArray[np.int64]:
        """Count the onsets that are not announced within 30 s at each of `CANDIDATE_THETAS`, ``(m,)``."""
        own = np.flatnonzero(self.onset_ns[self.episode] >= 0)  # whole episodes, in order
        late_ns = self.decided_ns[own] - self.onset_ns[self.episode[own]]
        in_time = np.flatnonzero((late_ns >= 0) & (late_ns <= _IN_TIME_NS))
        missed = np.full(len(CANDIDATE_THETAS), int((self.onset_ns >= 0).sum()), np.int64)
        if not len(in_time):
            return missed
        first = _find_first_windows(self.episode[own])
        groups = np.flatnonzero(np.diff(self.episode[own][in_time], prepend=-1))
        width = max(1, _MAX_CELLS // len(own))
        for start in range(0, len(CANDIDATE_THETAS), width):
            part = slice(start, start + width)
            is_active = _simulate_alarms(self.score[own], first, CANDIDATE_THETAS[part], k=k, n=n)
            counts = _mark_starts(is_active, first) if self.kind is AlarmKind.INFECTION else is_active
            missed[part] -= np.logical_or.reduceat(counts[:, in_time], groups, axis=1).sum(axis=1)
        return missed

    def compute_delays(self, rule: AlarmRule) -> NDArray[np.float64]:
        """Compute the delay of each onset with a rule, seconds; inf if it is missed."""
        is_active = _simulate_alarms(self.score, self.first, np.array([rule.theta]), k=rule.k, n=rule.n)[0]
        delays = compute_detection_delays(self.kind, is_active, self.episode, self.decided_ns, self.onset_ns)
        return delays[self.onset_ns >= 0]


def _compute_median(delays: NDArray[np.float64]) -> float:
    """Return the lower median; inf if most are, 0 without delays, so that larger n decide."""
    return float(np.sort(delays)[(len(delays) - 1) // 2]) if len(delays) else 0.0


def _find_first_windows(episode_index: NDArray[np.integer]) -> NDArray[np.intp]:
    """Return the position of the first window of each window's episode, ``(n,)``."""
    at = np.arange(len(episode_index))
    if not len(at):
        return at
    starts = np.r_[True, episode_index[1:] != episode_index[:-1]]
    first: NDArray[np.intp] = np.maximum.accumulate(np.where(starts, at, 0))
    return first


def _find_onsets(labels: LabelSequence, kind: AlarmKind) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Return the number of each window's episode, ``(n,)``, and each episode's onset, ``(E,)`` ns, −1 without one."""
    first = _find_first_windows(labels.episode_index)
    firsts, episode = np.unique(first, return_inverse=True)
    onset_ns = np.full(len(firsts), -1, np.int64)
    for phase in ALARM_PHASES[kind]:
        at = np.flatnonzero(labels.y == phase.code)
        own, where = np.unique(episode[at], return_index=True)
        begins = at[where]  # the first window of that phase in each episode
        # An episode that begins in the phase entered it no later than its first window did.
        times = labels.t_center_ns[begins] - np.where(begins == first[begins], _HALF_WINDOW_NS, 0)
        is_new = onset_ns[own] < 0
        onset_ns[own[is_new]] = times[is_new]
    if len(firsts):
        last = np.r_[firsts[1:], len(first)] - 1
        recorded = labels.t_center_ns[last] + DECISION_DELAY_NS - onset_ns
        onset_ns = np.where(recorded >= _IN_TIME_NS, onset_ns, -1)
    return episode.ravel(), onset_ns


def _mark_starts(is_active: NDArray[np.bool_], first: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Mark the windows at which an alarm starts, for each threshold: ``(m, w)`` → ``(m, w)``."""
    starts = is_active.copy()
    starts[:, 1:] &= ~is_active[:, :-1] | (first[1:] == np.arange(1, len(first)))
    return starts


def _simulate_alarms(
    score: FloatArray, first: NDArray[np.intp], thetas: FloatArray, *, k: int, n: int
) -> NDArray[np.bool_]:
    """Return whether the alarm is on after each window, for each threshold: ``(m, w)`` bool.

    Args:
        score: ``(w,)`` float64.
        first: ``(w,)`` position of the first window of each window's episode.
        thetas: ``(m,)`` thresholds.
        k, n: As in `AlarmRule`.
    """
    w = len(score)
    total = np.zeros((len(thetas), w + 1), np.int32)
    np.cumsum(score >= thetas[:, None], axis=1, out=total[:, 1:])
    at = np.arange(w)
    hot = total[:, 1:] - total[:, np.maximum(at - (n - 1), first)]  # of the last n windows of the episode
    is_set = hot >= k
    # A window neither sets nor resets the alarm if some, but fewer than k of the last n are hot: the state stays that
    # of the newest window that did. Its number and its state share one integer, so that one pass finds both.
    decides = is_set | (hot == 0) | (at == first)
    newest = np.where(decides, 2 * at.astype(np.int32) + is_set, 0)
    out: NDArray[np.bool_] = (np.maximum.accumulate(newest, axis=1) & 1).astype(np.bool_)
    return out
