"""What an adaptation may claim: exact bounds on false alarms, and a refusal where unseen hosts are detected worse."""

from __future__ import annotations

import numpy as np
import pytest

from phasewatch.adaptation.claims import bound_false_alarms, compare_unseen_hosts
from phasewatch.adaptation.fit import FoldComparison


@pytest.mark.parametrize(
    ("count", "hours", "upper", "more"),
    [
        pytest.param(0, 4.0, 3.689 / 4, 14.76 - 4, id="no alarm in four hours claims less than one per hour"),
        pytest.param(0, 15.0, 3.689 / 15, 0.0, id="fifteen quiet hours claim the budget"),
        pytest.param(1, 4.0, 5.572 / 4, 22.29 - 4, id="one alarm costs seven more hours"),
    ],
)
def test_false_alarm_rate_is_bounded_by_the_exact_poisson_interval(
    count: int, hours: float, upper: float, more: float
) -> None:
    claim = bound_false_alarms(count, hours)

    assert claim.upper == pytest.approx(upper, rel=1e-3)
    assert claim.more_hours == pytest.approx(more, abs=0.01)


def fold(*, right_before: float, right_after: float, announced_after: bool = True) -> FoldComparison:
    """One fold of 3 hosts with 6 sessions each; clean, infecting and active windows in turn."""
    rng = np.random.default_rng(0)
    n = 3 * 6 * 60
    y = np.tile([0, 2, 3], n // 3)
    before, after = (np.where(rng.random(n) < right, y, (y + 2) % 5) for right in (right_before, right_after))
    session = np.repeat(np.arange(18), 60)
    onset = np.arange(18)
    return FoldComparison(
        host=(session // 6).astype(str),
        session=session.astype(str),
        y=y,
        before=before,
        after=after,
        onset_host=(onset // 6).astype(str),
        onset_session=onset.astype(str),
        announced_before=np.ones(18, np.bool_),
        announced_after=np.full(18, announced_after),
        false_before=1,
        false_after=0,
        quiet_hours=2.0,
    )


def test_a_model_that_decides_alike_is_not_worse() -> None:
    change = compare_unseen_hosts([fold(right_before=0.8, right_after=0.8)])

    assert not change.is_worse
    assert change.macro_f1_3class.difference_low is not None
    assert (change.n_hosts, change.n_onsets, change.quiet_hours) == (3, 18, 2.0)


def test_a_lower_score_beyond_its_interval_is_worse() -> None:
    change = compare_unseen_hosts([fold(right_before=0.8, right_after=0.6)])

    assert change.macro_f1_3class.is_worse
    assert change.is_worse


def test_infections_that_are_missed_are_worse_even_at_the_same_score() -> None:
    change = compare_unseen_hosts([fold(right_before=0.8, right_after=0.8, announced_after=False)])

    assert not change.macro_f1_3class.is_worse
    assert change.is_worse


def test_folds_are_pooled() -> None:
    one = fold(right_before=0.8, right_after=0.8)

    change = compare_unseen_hosts([one, one])

    assert (change.n_windows, change.false_before, change.quiet_hours) == (2 * len(one.y), 2, 4.0)
