"""When to ring: heat above a threshold in two of three windows; the threshold bought with a budget of false alarms."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from phasewatch.models.filter import STRIDE_NS, Floats, Track
from phasewatch.vocab import Phase

K, N = 2, 3
BUDGET = 1.0  # false alarms per VM-hour
LOOK_BACK_NS = 60 * 10**9  # an alarm is false when nothing hot was true for so long before it
DECISION_NS = 6 * 10**9  # from a window's centre to when it is decided: half its width and 1 s for late ticks
THETA_STEP = 0.005
THETAS = np.round(np.arange(THETA_STEP, 1.0 + THETA_STEP / 2, THETA_STEP), 3)
NEVER = 1.005  # above any heat: no threshold met the budget
_HOT = (Phase.INFECTING.code, Phase.ACTIVE.code)
_COLD = (Phase.CLEAN.code, Phase.ARMED.code)
_EPISODES = 512  # looked at together


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmRule:
    """Rings when at least `k` of the last `n` windows are hot; rings on until `n` in a row are not.

    Attributes:
        theta: A window is hot from this heat on; `NEVER` if no threshold met the budget.
        budget: False alarms per quiet VM-hour that it was chosen for.
        false_alarms: Those it would have raised in the quiet VM-hours that it was chosen on.

    Raises:
        ValueError: If a number cannot be.
    """

    theta: float
    k: int = K
    n: int = N
    budget: float = BUDGET
    false_alarms: int = 0
    vm_hours: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.theta <= NEVER or not 1 <= self.k <= self.n <= 100:
            raise ValueError(f"theta {self.theta} or {self.k} of {self.n} cannot be")
        if self.false_alarms < 0 or not all(isfinite(v) and v >= 0 for v in (self.vm_hours, self.budget)):
            raise ValueError(f"{self.false_alarms} false alarms in {self.vm_hours} VM-hours cannot be")


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmState:
    """What an alarm remembers: which of the last windows were hot, whether it rings, and whether it began just now."""

    recent: tuple[bool, ...] = ()
    rings: bool = False
    began: bool = False

    def step(self, rule: AlarmRule, heat: float) -> AlarmState:
        """Take one window's heat in."""
        recent = (*self.recent, heat >= rule.theta)[-rule.n :]
        rings = any(recent) if self.rings else sum(recent) >= rule.k
        return AlarmState(recent=recent, rings=rings, began=rings and not self.rings)


def heat_of(p: NDArray[np.floating]) -> Floats:
    """Give the probability that a window is infecting or active, ``(..., 5)`` → ``(...)``.

    Probabilities count as float32, as predictions store them: who decides from the file decides the same.
    """
    stored = np.asarray(p, np.float32).astype(np.float64)
    heat: Floats = stored[..., _HOT[0]] + stored[..., _HOT[1]]
    return heat


def run_alarm(rule: AlarmRule, heat: Floats, of: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Say of each window whether the alarm rings after it, ``(n,)``, episodes apart; windows in the order of time."""
    return _ring(heat, of, np.array([rule.theta]), k=rule.k, n=rule.n)[:, 0]


def begins(rings: NDArray[np.bool_], of: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Mark the windows at which an alarm was raised, ``(n,)`` or ``(n, m)``."""
    raised = rings.copy()
    same = of[1:] == of[:-1]
    raised[1:] &= ~(rings[:-1] & same.reshape(-1, *([1] * (rings.ndim - 1))))
    return raised


def is_quiet(track: Track) -> NDArray[np.bool_]:
    """Mark the windows at which an alarm would be false, ``(n,)``.

    Every window of its episode that ended in the 60 s before its decision time, its own included, is clean or armed.
    """
    hot = ~np.isin(track.y, _COLD)
    quiet = np.ones(len(track.y), np.bool_)
    back = LOOK_BACK_NS // STRIDE_NS
    reach = LOOK_BACK_NS - DECISION_NS + STRIDE_NS  # centre to centre: the earlier one still ended inside
    for ago in range(min(int(back) + 1, len(quiet))):
        earlier = slice(0, len(quiet) - ago)
        near = (track.of[ago:] == track.of[earlier]) & (track.t_center_ns[ago:] - track.t_center_ns[earlier] < reach)
        quiet[ago:] &= ~(near & hot[earlier])
    return quiet


def choose_alarm(p: NDArray[np.floating], track: Track, *, budget: float = BUDGET) -> AlarmRule:
    """Choose the smallest threshold from which on no threshold breaks the budget.

    An alarm that rings all the time is raised once an episode and would look cheap, so a threshold counts only with
    all that are above it.

    Args:
        p: ``(n, 5)`` probabilities of windows that the model did not learn from, in the order (episode, time).
        track: Their truth, episodes and times.
        budget: False alarms per quiet VM-hour; each quiet window is 5 s of it. Only then can an alarm be false, and
            the rate that an evaluation measures counts the same hours (ADR 0067).
    """
    quiet = is_quiet(track)
    hours = int(quiet.sum()) * STRIDE_NS / 3.6e12
    if not quiet.any():
        return AlarmRule(theta=NEVER, budget=budget)
    heat = heat_of(p)
    false = np.zeros(len(THETAS), np.int64)
    numbers = np.cumsum(np.r_[0, track.of[1:] != track.of[:-1]])
    for start in range(0, int(numbers[-1]) + 1, _EPISODES):
        mine = (numbers >= start) & (numbers < start + _EPISODES)
        rings = _ring(heat[mine], numbers[mine], THETAS, k=K, n=N)
        false += (begins(rings, numbers[mine]) & quiet[mine, None]).sum(axis=0)
    over = np.flatnonzero(false > budget * hours)
    at = int(over[-1]) + 1 if len(over) else 0
    if at == len(THETAS):
        return AlarmRule(theta=NEVER, budget=budget, vm_hours=round(hours, 6))
    return AlarmRule(theta=float(THETAS[at]), budget=budget, false_alarms=int(false[at]), vm_hours=round(hours, 6))


def _ring(heat: Floats, of: NDArray[np.integer], thetas: Floats, *, k: int, n: int) -> NDArray[np.bool_]:
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
