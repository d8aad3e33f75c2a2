"""The alarm: when it rings, when it stops, which alarms are false, and how its threshold is bought."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewatch.models.alarm import (
    CANDIDATE_THETAS,
    THETA_NEVER,
    AlarmRule,
    AlarmState,
    apply_alarm_rule,
    compute_activity_score,
    find_alarm_starts,
    find_false_alarm_windows,
    fit_alarm_rule,
)
from phasewatch.models.smoothing import LabelSequence
from phasewatch.types import STRIDE_NS

CLEAN, ARMED, INFECTING, ACTIVE, DORMANT = range(5)
RULE = AlarmRule(theta=0.5)


def track(*episodes: list[int]) -> LabelSequence:
    return LabelSequence(
        y=np.concatenate(episodes),
        episode_index=np.repeat(np.arange(len(episodes)), [len(e) for e in episodes]),
        t_center_ns=np.concatenate([STRIDE_NS * (1 + np.arange(len(e))) for e in episodes]),
    )


def rings(*heat: float) -> list[int]:
    return apply_alarm_rule(RULE, np.array(heat), np.zeros(len(heat), int)).astype(int).tolist()


def hot(values: list[float]) -> np.ndarray:
    """Probabilities whose heat is this."""
    p = np.zeros((len(values), 5))
    p[:, ACTIVE], p[:, CLEAN] = values, 1 - np.array(values)
    return p


@pytest.mark.parametrize(
    ("heat", "expected"),
    [
        pytest.param((0, 1, 0, 0), [0, 0, 0, 0], id="one hot window is not enough"),
        pytest.param((1, 1, 0), [0, 1, 1], id="two in a row are"),
        pytest.param((1, 0, 1), [0, 0, 1], id="two of three are"),
        pytest.param((1, 0, 0, 1), [0, 0, 0, 0], id="two of four are not"),
        pytest.param((1, 1, 0, 0, 0, 0), [0, 1, 1, 1, 0, 0], id="three cool ones end it"),
        pytest.param((1, 1, 0, 0, 1, 0, 0, 0), [0, 1, 1, 1, 1, 1, 1, 0], id="a hot one in between goes on"),
        pytest.param((1, 1, 0, 0, 0, 1), [0, 1, 1, 1, 0, 0], id="then it begins anew"),
    ],
)
def test_alarm_starts_at_two_of_three_hot_windows_and_ends_after_three_others(
    heat: tuple[float, ...], expected: list[int]
) -> None:
    assert rings(*heat) == expected


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=30), min_size=1, max_size=5),
    st.sampled_from(CANDIDATE_THETAS.tolist()),
)
def test_stepwise_alarm_equals_the_batch_alarm(episodes: list[list[float]], theta: float) -> None:
    rule = AlarmRule(theta=theta)
    of = np.repeat(np.arange(len(episodes)), [len(e) for e in episodes])
    whole = apply_alarm_rule(rule, np.concatenate(episodes), of)
    told, began = [], []
    for episode in episodes:
        state = AlarmState()
        for heat in episode:
            state = state.step(rule, heat)
            told.append(state.is_active)
            began.append(state.has_started)

    assert told == whole.tolist()
    assert began == find_alarm_starts(whole, of).tolist()


def test_activity_score_is_computed_from_float32_probabilities() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(5), 50)

    assert compute_activity_score(p).tolist() == compute_activity_score(p.astype(np.float32)).tolist()
    assert compute_activity_score(p) == pytest.approx(p[:, INFECTING] + p[:, ACTIVE], abs=1e-6)


def test_alarm_is_false_after_sixty_seconds_without_malicious_activity() -> None:
    told = find_false_alarm_windows(track([ACTIVE] + [CLEAN] * 14, [ARMED] * 3, [DORMANT, CLEAN]))

    # Centres are 5 s apart and a decision falls 6 s after its centre: the active window, which ended 5 s after its own
    # centre, is inside the last 60 s for the eleven windows after it.
    assert told[:15].astype(int).tolist() == [0] * 12 + [1] * 3
    assert told[15:18].all()
    assert not told[18:].any()


def test_threshold_is_the_smallest_that_meets_the_budget() -> None:
    quiet = [CLEAN] * 240  # 20 minutes
    heat = [0.1] * 240
    for at, peak in ((20, 0.9), (60, 0.7), (100, 0.6), (140, 0.4)):
        heat[at] = heat[at + 1] = peak
    two = track(*[quiet] * 3)  # an hour, in which each peak comes three times
    rule = fit_alarm_rule(hot(heat * 3), two, budget=6.0)

    assert rule.theta == 0.605  # 0.9 and 0.7 ring, three times each
    assert (rule.false_alarms, rule.vm_hours) == (6, 1.0)


def test_threshold_of_an_alarm_that_is_always_on_does_not_meet_the_budget() -> None:
    """Raised once an episode it would keep the budget; a little above, it is raised all the time."""
    heat = ([0.3, 0.3, 0.1, 0.1, 0.1] * 144)[:720]
    rule = fit_alarm_rule(hot(heat), track([CLEAN] * 720), budget=2.0)

    assert (
        find_alarm_starts(
            apply_alarm_rule(AlarmRule(theta=0.05), compute_activity_score(hot(heat)), np.zeros(720, int)),
            np.zeros(720, int),
        ).sum()
        == 1
    )
    assert rule.theta > 0.3


def test_alarm_during_an_infection_is_not_a_false_alarm() -> None:
    rule = fit_alarm_rule(hot([0.0] * 20 + [0.99] * 100), track([CLEAN] * 20 + [ACTIVE] * 100), budget=0.0)

    assert rule.theta == CANDIDATE_THETAS[0]


def test_budget_counts_quiet_hours_alone() -> None:
    """The budget is spent and measured over the same hours: those in which an alarm would be false."""
    heat = [0.1] * 720
    heat[20] = heat[21] = 0.9
    calm, infected = track([CLEAN] * 720), track([CLEAN] * 720 + [ACTIVE] * 7200)

    alone = fit_alarm_rule(hot(heat), calm, budget=0.5)
    beside = fit_alarm_rule(hot(heat + [0.99] * 7200), infected, budget=0.5)

    assert (beside.theta, beside.vm_hours) == (alone.theta, alone.vm_hours) == (0.9, 1.0)


def test_alarm_never_starts_without_quiet_windows_to_fit_on() -> None:
    assert fit_alarm_rule(hot([0.99] * 100), track([ACTIVE] * 100), budget=6.0).theta == THETA_NEVER


def test_alarm_never_starts_if_no_threshold_meets_the_budget() -> None:
    rule = fit_alarm_rule(hot([1.0] * 100), track([CLEAN] * 100), budget=1.0)

    assert rule.theta == THETA_NEVER
    assert not apply_alarm_rule(rule, compute_activity_score(hot([1.0] * 100)), np.zeros(100, int)).any()


def test_alarm_never_starts_without_windows_to_fit_on() -> None:
    assert fit_alarm_rule(np.zeros((0, 5)), track([])).theta == THETA_NEVER


@pytest.mark.parametrize(
    "wrong", [{"theta": 0.0}, {"theta": float("nan")}, {"theta": 0.5, "k": 4}, {"theta": 0.5, "vm_hours": float("inf")}]
)
def test_numbers_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="alarm rule: "):
        AlarmRule(**wrong)  # type: ignore[arg-type]
