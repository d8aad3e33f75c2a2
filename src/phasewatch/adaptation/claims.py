"""What an adaptation may claim: the change on unseen hosts, and the false-alarm rate that the held-back hours bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phasewatch.adaptation.fit import FoldComparison
from phasewatch.arrays import FloatArray
from phasewatch.evaluation.alarm_measures import compute_poisson_interval
from phasewatch.evaluation.bootstrap import (
    build_clusters,
    compute_interval,
    compute_tail_share,
    count_confusions,
    draw_weights,
    explain_missing_interval,
    resample,
)
from phasewatch.metrics import (
    N_CLASSES,
    STATE_BY_PHASE,
    STATES,
    compute_f1_from_terms,
    f1_terms,
    merge_into_three_states,
)
from phasewatch.models.alarm import FALSE_ALARM_BUDGET

__all__ = ["FalseAlarmClaim", "MeasuredChange", "UnseenHostChange", "bound_false_alarms", "compare_unseen_hosts"]

_RESAMPLES = 2_000
_N_STATES = len(STATES)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredChange:
    """A score without and with the site's hours, and their paired difference; 95 % intervals, None without one."""

    before: float
    before_low: float | None
    before_high: float | None
    after: float
    difference: float
    difference_low: float | None
    difference_high: float | None

    @property
    def is_worse(self) -> bool:
        """Whether the score fell below its interval, or the whole interval of the difference is below 0.

        Without intervals, whether it fell at all.
        """
        if self.before_low is None or self.difference_high is None:
            return self.difference < 0.0
        return self.after < self.before_low or self.difference_high < 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UnseenHostChange:
    """What the site's hours change on hosts of the corpus that training never saw.

    Attributes:
        macro_f1_3class: Over the test windows.
        recall_30s: Share of the infections that are alarmed within 30 s; None without any.
        n_onsets: Infections after which 30 s were recorded.
        false_before, false_after: False infection alarms in `quiet_hours` VM-hours.
    """

    macro_f1_3class: MeasuredChange
    recall_30s: MeasuredChange | None
    n_hosts: int
    n_windows: int
    n_onsets: int
    false_before: int
    false_after: int
    quiet_hours: float

    @property
    def is_worse(self) -> bool:
        """Whether the detection of unseen hosts got worse beyond its interval."""
        return self.macro_f1_3class.is_worse or (self.recall_30s is not None and self.recall_30s.is_worse)


@dataclass(frozen=True, slots=True, kw_only=True)
class FalseAlarmClaim:
    """What a count of false alarms in held-back hours can claim.

    Attributes:
        count: False alarms.
        hours: VM-hours that nothing was fitted to.
        per_hour, upper: The rate, and the upper end of its exact 95 % interval, per VM-hour.
        more_hours: Further VM-hours without an alarm after which the upper end is at the budget; 0 if it is.
    """

    count: int
    hours: float
    per_hour: float
    upper: float
    more_hours: float


def bound_false_alarms(count: int, hours: float, *, budget: float = FALSE_ALARM_BUDGET) -> FalseAlarmClaim:
    """Bound the false-alarm rate by the exact Poisson interval of a count.

    Args:
        count: False alarms.
        hours: VM-hours, above 0.
        budget: Rate to claim, false alarms per VM-hour.
    """
    upper = compute_poisson_interval(count)[1]
    return FalseAlarmClaim(
        count=count,
        hours=hours,
        per_hour=count / hours,
        upper=upper / hours,
        more_hours=max(0.0, upper / budget - hours),
    )


def compare_unseen_hosts(folds: Sequence[FoldComparison]) -> UnseenHostChange:
    """Pool the test windows of all folds, and compare both models with a paired session bootstrap within hosts."""

    def join(name: str) -> np.ndarray:
        return np.concatenate([getattr(fold, name) for fold in folds])

    hosts, sessions = join("host").tolist(), join("session").tolist()
    clusters = build_clusters(hosts, sessions)
    y = join("y")
    terms = []
    for name in ("before", "after"):
        confusions = count_confusions(clusters, y, join(name)).reshape(-1, N_CLASSES, N_CLASSES)
        terms.append(f1_terms(merge_into_three_states(confusions)))
    states = np.asarray(STATE_BY_PHASE)[y]
    classes = [int(c) for c in np.unique(states)]
    at = {pair: i for i, pair in enumerate(sorted(set(zip(hosts, sessions, strict=True))))}
    onsets = np.zeros((len(clusters), 3))  # announced before, announced after, all
    for host, session, before, after in zip(
        *(join(f"onset_{name}").tolist() for name in ("host", "session")),
        *(join(f"announced_{name}").tolist() for name in ("before", "after")),
        strict=True,
    ):
        onsets[at[host, session]] += (before, after, 1)
    n_hosts = len(set(hosts))
    counts = np.concatenate([*terms, onsets], axis=1)
    weights = None
    if explain_missing_interval(len(clusters), n_hosts) is None:
        weights = draw_weights(clusters, states, classes=classes, resamples=_RESAMPLES, seed=0)
    drawn = None if weights is None else resample(weights, counts)
    tail = compute_tail_share(len(clusters), n_hosts)
    total = counts.sum(axis=0)[None]
    n_onsets = int(onsets[:, 2].sum())

    def f1(rows: FloatArray, first: int) -> FloatArray:
        hits = rows[:, first : first + _N_STATES]
        either = rows[:, first + _N_STATES : first + 2 * _N_STATES]
        scores: FloatArray = compute_f1_from_terms(hits, either)[:, classes].mean(axis=1)
        return scores

    def recall(rows: FloatArray, column: int) -> FloatArray:
        shares: FloatArray = rows[:, 4 * _N_STATES + column] / np.maximum(rows[:, 4 * _N_STATES + 2], 1.0)
        return shares

    def measure(
        before: tuple[FloatArray, FloatArray | None], after: tuple[FloatArray, FloatArray | None]
    ) -> MeasuredChange:
        low = high = difference_low = difference_high = None
        if before[1] is not None and after[1] is not None:
            low, high = compute_interval(before[1], tail)
            difference_low, difference_high = compute_interval(after[1] - before[1], tail)
        return MeasuredChange(
            before=float(before[0][0]),
            before_low=low,
            before_high=high,
            after=float(after[0][0]),
            difference=float(after[0][0] - before[0][0]),
            difference_low=difference_low,
            difference_high=difference_high,
        )

    scored = [(f1(total, i * 2 * _N_STATES), None if drawn is None else f1(drawn, i * 2 * _N_STATES)) for i in (0, 1)]
    found = [(recall(total, i), None if drawn is None else recall(drawn, i)) for i in (0, 1)]
    return UnseenHostChange(
        macro_f1_3class=measure(*scored),
        recall_30s=measure(*found) if n_onsets else None,
        n_hosts=n_hosts,
        n_windows=len(y),
        n_onsets=n_onsets,
        false_before=sum(fold.false_before for fold in folds),
        false_after=sum(fold.false_after for fold in folds),
        quiet_hours=sum(fold.quiet_hours for fold in folds),
    )
