"""When to ring: heat above a threshold in two of three windows; the threshold bought with a budget of false alarms."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.models.smoothing import LabelSequence
from phasewatch.types import STRIDE_NS, Phase

ALARM_K, ALARM_N = 2, 3
FALSE_ALARM_BUDGET = 1.0  # false alarms per VM-hour
LOOK_BACK_NS = 60 * 10**9  # an alarm is false when nothing hot was true for so long before it
DECISION_DELAY_NS = 6 * 10**9  # from a window's centre to when it is decided: half its width and 1 s for late ticks
THETA_STEP = 0.005
CANDIDATE_THETAS = np.round(np.arange(THETA_STEP, 1.0 + THETA_STEP / 2, THETA_STEP), 3)
THETA_NEVER = 1.005  # above any heat: no threshold met the budget
_ACTIVE_CODES = (Phase.INFECTING.code, Phase.ACTIVE.code)
_INACTIVE_CODES = (Phase.CLEAN.code, Phase.ARMED.code)
_EPISODE_BATCH = 512  # looked at together


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmRule:
    """Rings when at least `k` of the last `n` windows are hot; rings on until `n` in a row are not.

    Attributes:
        theta: A window is hot from this heat on; `THETA_NEVER` if no threshold met the budget.
        budget: False alarms per quiet VM-hour that it was chosen for.
        false_alarms: Those it would have raised in the quiet VM-hours that it was chosen on.

    Raises:
        ValueError: If a number cannot be.
    """

    theta: float
    k: int = ALARM_K
    n: int = ALARM_N
    budget: float = FALSE_ALARM_BUDGET
    false_alarms: int = 0
    vm_hours: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.theta <= THETA_NEVER or not 1 <= self.k <= self.n <= 100:
            raise ValueError(f"theta {self.theta} or {self.k} of {self.n} cannot be")
        if self.false_alarms < 0 or not all(isfinite(v) and v >= 0 for v in (self.vm_hours, self.budget)):
            raise ValueError(f"{self.false_alarms} false alarms in {self.vm_hours} VM-hours cannot be")


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmState:
    """What an alarm remembers: which of the last windows were hot, whether it rings, and whether it began just now."""

    recent: tuple[bool, ...] = ()
    is_active: bool = False
    has_started: bool = False

    def step(self, rule: AlarmRule, heat: float) -> AlarmState:
        """Take one window's heat in."""
        recent = (*self.recent, heat >= rule.theta)[-rule.n :]
        rings = any(recent) if self.is_active else sum(recent) >= rule.k
        return AlarmState(recent=recent, is_active=rings, has_started=rings and not self.is_active)


def compute_activity_score(p: NDArray[np.floating]) -> FloatArray:
    """Give the probability that a window is infecting or active, ``(..., 5)`` → ``(...)``.

    Probabilities count as float32, as predictions store them: who decides from the file decides the same.
    """
    stored = np.asarray(p, np.float32).astype(np.float64)
    heat: FloatArray = stored[..., _ACTIVE_CODES[0]] + stored[..., _ACTIVE_CODES[1]]
    return heat


def apply_alarm_rule(rule: AlarmRule, heat: FloatArray, of: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Say of each window whether the alarm rings after it, ``(n,)``, episodes apart; windows in the order of time."""
    return _simulate_alarms(heat, of, np.array([rule.theta]), k=rule.k, n=rule.n)[:, 0]


def find_alarm_starts(rings: NDArray[np.bool_], of: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Mark the windows at which an alarm was raised, ``(n,)`` or ``(n, m)``."""
    raised = rings.copy()
    same = of[1:] == of[:-1]
    raised[1:] &= ~(rings[:-1] & same.reshape(-1, *([1] * (rings.ndim - 1))))
    return raised


def find_false_alarm_windows(track: LabelSequence) -> NDArray[np.bool_]:
    """Mark the windows at which an alarm would be false, ``(n,)``.

    Every window of its episode that ended in the 60 s before its decision time, its own included, is clean or armed.
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
    """Choose the smallest threshold from which on no threshold breaks the budget.

    An alarm that rings all the time is raised once an episode and would look cheap, so a threshold counts only with
    all that are above it.

    Args:
        p: ``(n, 5)`` probabilities of windows that the model did not learn from, in the order (episode, time).
        track: Their truth, episodes and times.
        budget: False alarms per quiet VM-hour; each quiet window is 5 s of it. Only then can an alarm be false, and
            the rate that an evaluation measures counts the same hours (ADR 0067).
    """
    quiet = find_false_alarm_windows(track)
    hours = int(quiet.sum()) * STRIDE_NS / 3.6e12
    if not quiet.any():
        return AlarmRule(theta=THETA_NEVER, budget=budget)
    heat = compute_activity_score(p)
    false = np.zeros(len(CANDIDATE_THETAS), np.int64)
    numbers = np.cumsum(np.r_[0, track.episode_index[1:] != track.episode_index[:-1]])
    for start in range(0, int(numbers[-1]) + 1, _EPISODE_BATCH):
        mine = (numbers >= start) & (numbers < start + _EPISODE_BATCH)
        rings = _simulate_alarms(heat[mine], numbers[mine], CANDIDATE_THETAS, k=ALARM_K, n=ALARM_N)
        false += (find_alarm_starts(rings, numbers[mine]) & quiet[mine, None]).sum(axis=0)
    over = np.flatnonzero(false > budget * hours)
    at = int(over[-1]) + 1 if len(over) else 0
    if at == len(CANDIDATE_THETAS):
        return AlarmRule(theta=THETA_NEVER, budget=budget, vm_hours=round(hours, 6))
    return AlarmRule(
        theta=float(CANDIDATE_THETAS[at]), budget=budget, false_alarms=int(false[at]), vm_hours=round(hours, 6)
    )


def _simulate_alarms(
    heat: FloatArray, of: NDArray[np.integer], thetas: FloatArray, *, k: int, n: int
) -> NDArray[np.bool_]:
    """Say of each window and threshold whether the alarm rings, ``(n, m)``."""
    out = np.zeros((len(heat), len(thetas)), np.bool_)
    if not len(heat):
        return out
    first = np.flatnonzero(np.r_[True, of[1:] != of[:-1]])
    length = np.diff(np.r_[first, len(of)])
    rings = np.zeros((len(first), len(thetas)), np.bool_)
    recent = np.zeros((n, len(first), len(thetas)), np.bool_)
    for j in range(int(length.max())):
        alive = np.flatnonzero(length > j)
        at = first[alive] + j
        recent[j % n][alive] = heat[at, None] >= thetas
        hot = recent[:, alive].sum(axis=0)
        rings[alive] = np.where(rings[alive], hot > 0, hot >= k)
        out[at] = rings[alive]
    return out
