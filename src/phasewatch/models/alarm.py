"""The alarm: an activity score above a threshold in two of three windows; the threshold meets a false-alarm budget."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.models.smoothing import LabelSequence
from phasewatch.types import STRIDE_NS, Phase

__all__ = [
    "CANDIDATE_THETAS",
    "DECISION_DELAY_NS",
    "FALSE_ALARM_BUDGET",
    "LOOK_BACK_NS",
    "THETA_NEVER",
    "THETA_STEP",
    "AlarmRule",
    "AlarmState",
    "apply_alarm_rule",
    "compute_activity_score",
    "find_alarm_starts",
    "find_false_alarm_windows",
    "fit_alarm_rule",
]

_ALARM_K, _ALARM_N = 2, 3
FALSE_ALARM_BUDGET = 1.0  # false alarms per VM-hour
LOOK_BACK_NS = 60 * 10**9  # an alarm is false if no infecting or active window ended this long before it
DECISION_DELAY_NS = 6 * 10**9  # from a window's centre to its decision: half its width and 1 s for late ticks
THETA_STEP = 0.005
CANDIDATE_THETAS = np.round(np.arange(THETA_STEP, 1.0 + THETA_STEP / 2, THETA_STEP), 3)
THETA_NEVER = 1.005  # above any activity score: no threshold met the budget
_ACTIVE_CODES = (Phase.INFECTING.code, Phase.ACTIVE.code)
_INACTIVE_CODES = (Phase.CLEAN.code, Phase.ARMED.code)
_EPISODE_BATCH = 512  # episodes simulated together; bounds memory


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmRule:
    """Start an alarm when `k` of the last `n` windows reach the threshold; end it when `n` in a row do not.

    Attributes:
        theta: Threshold on the activity score; `THETA_NEVER` if no threshold met the budget.
        k, n: Windows that must reach the threshold, and windows that are looked at.
        budget: False alarms per quiet VM-hour that `theta` was fitted for.
        false_alarms: False alarms on the windows that `theta` was fitted to.
        vm_hours: Quiet VM-hours that `theta` was fitted to.

    Raises:
        ValueError: If a number is out of its range.
    """

    theta: float
    k: int = _ALARM_K
    n: int = _ALARM_N
    budget: float = FALSE_ALARM_BUDGET
    false_alarms: int = 0
    vm_hours: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.theta <= THETA_NEVER or not 1 <= self.k <= self.n <= 100:
            raise ValueError(f"alarm rule: theta {self.theta} or {self.k} of {self.n} windows is out of range")
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

    def step(self, rule: AlarmRule, activity: float) -> AlarmState:
        """Return the state after one more window with this activity score."""
        recent = (*self.recent, activity >= rule.theta)[-rule.n :]
        is_active = any(recent) if self.is_active else sum(recent) >= rule.k
        return AlarmState(recent=recent, is_active=is_active, has_started=is_active and not self.is_active)


def compute_activity_score(p: NDArray[np.floating]) -> FloatArray:
    """Compute the probability that a window is infecting or active.

    Probabilities are rounded to float32, as predictions are stored, so that a decision from the file is the same.

    Args:
        p: ``(..., 5)`` floating.

    Returns:
        ``(...)`` float64.
    """
    stored = np.asarray(p, np.float32).astype(np.float64)
    activity: FloatArray = stored[..., _ACTIVE_CODES[0]] + stored[..., _ACTIVE_CODES[1]]
    return activity


def apply_alarm_rule(rule: AlarmRule, activity: FloatArray, episode_index: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return whether the alarm is on after each window; each episode starts without an alarm.

    Args:
        rule: The rule.
        activity: ``(n,)`` float64 activity scores, in the order (episode, time).
        episode_index: ``(n,)`` integer episode of each window.

    Returns:
        ``(n,)`` bool.
    """
    return _simulate_alarms(activity, episode_index, np.array([rule.theta]), k=rule.k, n=rule.n)[:, 0]


def find_alarm_starts(is_active: NDArray[np.bool_], episode_index: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Mark the windows at which an alarm starts.

    Args:
        is_active: ``(n,)`` or ``(n, m)`` bool: whether the alarm is on, for `m` thresholds.
        episode_index: ``(n,)`` integer episode of each window.

    Returns:
        Bool of the shape of `is_active`.
    """
    starts = is_active.copy()
    same_episode = episode_index[1:] == episode_index[:-1]
    starts[1:] &= ~(is_active[:-1] & same_episode.reshape(-1, *([1] * (is_active.ndim - 1))))
    return starts


def find_false_alarm_windows(track: LabelSequence) -> NDArray[np.bool_]:
    """Mark the windows at which an alarm would be false, ``(n,)`` bool.

    An alarm is false if every window of its episode that ended in the 60 s before its decision time, itself included,
    is clean or armed.
    """
    hot = ~np.isin(track.y, _INACTIVE_CODES)
    quiet = np.ones(len(track.y), np.bool_)
    back = LOOK_BACK_NS // STRIDE_NS
    reach = LOOK_BACK_NS - DECISION_DELAY_NS + STRIDE_NS  # centre to centre: the earlier one still ended inside
    for ago in range(min(int(back) + 1, len(quiet))):
        earlier = slice(0, len(quiet) - ago)
        near = (track.episode_index[ago:] == track.episode_index[earlier]) & (
            track.t_center_ns[ago:] - track.t_center_ns[earlier] < reach
        )
        quiet[ago:] &= ~(near & hot[earlier])
    return quiet


def fit_alarm_rule(p: NDArray[np.floating], track: LabelSequence, *, budget: float = FALSE_ALARM_BUDGET) -> AlarmRule:
    """Fit the threshold: the smallest one for which it and all larger thresholds meet the budget.

    An alarm that is always on starts once an episode, so a very low threshold would meet the budget alone.

    Args:
        p: ``(n, 5)`` floating, probabilities of windows outside the training set, in the order (episode, time).
        track: Labels, episodes and times of the same windows.
        budget: False alarms per quiet VM-hour; each quiet window is 5 s of it. An evaluation counts the same hours
            (ADR 0067).
    """
    quiet = find_false_alarm_windows(track)
    hours = int(quiet.sum()) * STRIDE_NS / 3.6e12
    if not quiet.any():
        return AlarmRule(theta=THETA_NEVER, budget=budget)
    activity = compute_activity_score(p)
    false = np.zeros(len(CANDIDATE_THETAS), np.int64)
    numbers = np.cumsum(np.r_[0, track.episode_index[1:] != track.episode_index[:-1]])
    for start in range(0, int(numbers[-1]) + 1, _EPISODE_BATCH):
        batch = (numbers >= start) & (numbers < start + _EPISODE_BATCH)
        is_active = _simulate_alarms(activity[batch], numbers[batch], CANDIDATE_THETAS, k=_ALARM_K, n=_ALARM_N)
        false += (find_alarm_starts(is_active, numbers[batch]) & quiet[batch, None]).sum(axis=0)
    over = np.flatnonzero(false > budget * hours)
    at = int(over[-1]) + 1 if len(over) else 0
    if at == len(CANDIDATE_THETAS):
        return AlarmRule(theta=THETA_NEVER, budget=budget, vm_hours=round(hours, 6))
    return AlarmRule(
        theta=float(CANDIDATE_THETAS[at]), budget=budget, false_alarms=int(false[at]), vm_hours=round(hours, 6)
    )


def _simulate_alarms(
    activity: FloatArray, episode_index: NDArray[np.integer], thetas: FloatArray, *, k: int, n: int
) -> NDArray[np.bool_]:
    """Return whether the alarm is on after each window, for each threshold: ``(n, m)`` bool."""
    out = np.zeros((len(activity), len(thetas)), np.bool_)
    if not len(activity):
        return out
    first = np.flatnonzero(np.r_[True, episode_index[1:] != episode_index[:-1]])
    length = np.diff(np.r_[first, len(episode_index)])
    is_active = np.zeros((len(first), len(thetas)), np.bool_)
    recent = np.zeros((n, len(first), len(thetas)), np.bool_)
    for j in range(int(length.max())):
        alive = np.flatnonzero(length > j)
        at = first[alive] + j
        recent[j % n][alive] = activity[at, None] >= thetas
        hot = recent[:, alive].sum(axis=0)
        is_active[alive] = np.where(is_active[alive], hot > 0, hot >= k)
        out[at] = is_active[alive]
    return out
