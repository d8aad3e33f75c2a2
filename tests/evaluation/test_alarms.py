"""Alarms by hand: twelve episodes whose delays, misses, false alarms, time in alarm and damage were worked out."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from phasewatch.evaluation.alarms import (
    PhaseSpans,
    compute_alarm_outcome,
    concatenate_episodes,
    find_onset,
    mark_quiet_times,
    sum_rates,
)
from phasewatch.models.alarm import AlarmKind, AlarmRule
from phasewatch.types import Phase

S = 10**9
INFECTION, ACTIVITY = AlarmKind.INFECTION, AlarmKind.ACTIVITY
C, A, N, X, D = Phase.CLEAN, Phase.ARMED, Phase.INFECTING, Phase.ACTIVE, Phase.DORMANT


def spans(*parts: tuple[Phase, int]) -> PhaseSpans:
    """Label spans from (phase, seconds), beginning at 0."""
    found, at = [], 0
    for phase, seconds in parts:
        found.append((phase, at * S, (at + seconds) * S))
        at += seconds
    return found


def episode(labels: PhaseSpans, hits: str, *, stride_s: int = 5):  # type: ignore[no-untyped-def]
    """One window per stride; `x` is a window at 0.9 for both alarms, `.` one at 0.1. The first is decided at 11 s."""
    p = np.zeros((len(hits), 5))
    p[:, 2] = [0.9 if h == "x" else 0.1 for h in hits]
    return labels, (stride_s * np.arange(len(hits)) + 5) * S, p


def rule(kind: AlarmKind, *, stride_s: int = 5) -> AlarmRule:
    return AlarmRule(kind=kind, stride_s=stride_s, theta=0.5, k=2, n=3)


@pytest.mark.parametrize(
    ("labels", "infection", "activity"),
    [
        pytest.param(spans((C, 30), (N, 20), (X, 30)), 30, 30, id="the first infecting"),
        pytest.param(spans((X, 20), (C, 30), (N, 20)), 50, 50, id="infecting counts before an earlier active"),
        pytest.param(spans((D, 20), (X, 30)), None, 20, id="the first active is an onset of activity only"),
        pytest.param(spans((A, 20), (D, 30)), None, None, id="armed and dormant alone are no onset"),
    ],
)
def test_onset_is_what_the_alarm_announces(labels: PhaseSpans, infection: int | None, activity: int | None) -> None:
    for kind, begins in ((INFECTION, infection), (ACTIVITY, activity)):
        assert find_onset(labels, kind) == (None if begins is None else begins * S)


def test_calm_is_sixty_seconds_of_clean_or_armed_and_the_time_before_the_first_label_is_as_it_says() -> None:
    at = np.array([11, 40, 61, 95, 109, 110, 111]) * S

    assert mark_quiet_times(spans((C, 40), (N, 10), (A, 100)), at).tolist() == [
        True,
        False,
        False,
        False,
        False,
        True,
        True,
    ]
    assert mark_quiet_times(spans((D, 20), (C, 200)), at).tolist() == [False, False, False, True, True, True, True]


TWELVE = [
    episode(spans((C, 60)), "............"[:11]),  # 1: calm throughout, nothing raised: 11 calm decision times
    episode(spans((C, 60)), "xx........."),  # 2: one false alarm, on at 16, 21 and 26 s
    episode(spans((C, 60)), "xx...xx...."),  # 3: two
    episode(spans((A, 60)), ".....xx...."),  # 4: armed is calm too: one false alarm
    episode(spans((C, 30), (N, 30)), "....xx....."),  # 5: onset 30, stands from window 5 (36 s): 6 s
    episode(spans((C, 30), (N, 30)), "xx.x.x....."),  # 6: raised at 16 s, false, and still up at 31 s: 1 s after onset
    episode(spans((C, 30), (N, 30)), "..........."),  # 7: missed
    episode(spans((X, 60)), "xx........."),  # 8: onset 0, stands from window 1 (16 s): 16 s
    episode(spans((D, 20), (X, 40)), "........xx."),  # 9: onset 20, stands from window 9 (56 s): 36 s
    episode(spans((D, 60)), "xx........."),  # 10: dormant: neither calm nor an onset
    episode(spans((C, 30), (N, 30)), "xx........."),  # 11: raised at 16 s, false, over at 31 s: 3 below; then nothing
    episode(spans((X, 10), (C, 100)), "............xx......"),  # 12: raised at 76 s, 66 s after the end: false
]


def test_twelve_episodes_by_hand() -> None:
    watched = concatenate_episodes(TWELVE, kind=ACTIVITY, stride_s=5)
    found = compute_alarm_outcome(watched, [rule(ACTIVITY)])

    assert found.false_alarms[0].tolist() == [0, 1, 2, 1, 0, 1, 0, 0, 0, 0, 1, 1]
    assert found.delay_s[0].tolist() == pytest.approx(
        [np.inf, np.inf, np.inf, np.inf, 6.0, 1.0, np.inf, 16.0, 36.0, np.inf, np.inf, 76.0]
    )
    assert (watched.onset_ns // S).tolist() == [-1, -1, -1, -1, 30, 30, 30, 0, 20, -1, 30, 0]
    # Recorded after the onset: to the end of the labels.
    assert watched.recorded_s.tolist() == [0, 0, 0, 0, 30, 30, 30, 60, 40, 0, 30, 110]
    # Episodes 1 to 4: 11 decision times each. 5, 6, 7, 11: those before 30 s, at 11, 16, 21, 26.
    # 12: from 70 s on, at 71 … 106 s: 8.
    quiet_s = watched.sum_quiet_seconds(np.ones(len(watched.score), np.bool_))
    assert (quiet_s / 5).tolist() == [11, 11, 11, 11, 4, 4, 4, 0, 0, 0, 4, 8]
    # On from the second hit to the third window below: 3, 3 + 3, 3 windows; 6 and 11: at 16, 21, 26 s; 12: 76, 81, 86.
    assert (found.on_s[0] / 5).tolist() == [0, 3, 6, 3, 0, 3, 0, 0, 0, 0, 3, 3]


def test_infection_alarm_announces_by_starting_after_the_onset() -> None:
    watched = concatenate_episodes(TWELVE, kind=INFECTION, stride_s=5)
    found = compute_alarm_outcome(watched, [rule(INFECTION)])

    # 6 was up before the onset and never starts again; 8, 9 and 12 have no infection.
    assert found.delay_s[0].tolist() == pytest.approx([np.inf] * 4 + [6.0] + [np.inf] * 7)
    assert (watched.onset_ns // S).tolist() == [-1, -1, -1, -1, 30, 30, 30, -1, -1, -1, 30, -1]


def test_a_window_every_second_is_a_second_of_exposure() -> None:
    watched = concatenate_episodes([episode(spans((C, 60)), "xx" + "." * 48, stride_s=1)], kind=INFECTION, stride_s=1)
    found = compute_alarm_outcome(watched, [rule(INFECTION, stride_s=1)])

    assert watched.sum_quiet_seconds(np.ones(50, np.bool_)).tolist() == [50.0]
    assert (found.false_alarms[0, 0], found.on_s[0, 0]) == (1, 3.0)


def test_an_onset_without_a_later_decision_has_nothing_recorded_after_it() -> None:
    watched = concatenate_episodes([episode(spans((C, 40), (N, 30)), "...")], kind=INFECTION, stride_s=5)

    assert watched.recorded_s.tolist() == [0.0]


def test_damage_is_what_whole_bins_between_onset_and_alarm_add_up_to() -> None:
    rates = np.array([[10.0, 1.0], [20.0, np.nan], [40.0, 1.0], [80.0, 1.0]])

    assert_allclose(sum_rates(rates, 0, S // 2, 3 * S // 2), [30.0, 0.5])
    assert_allclose(sum_rates(rates, 0, 1, S), [10.0, 0.0])  # the first bin had begun before
    assert_allclose(sum_rates(rates, 0, S, S), [0.0, 0.0])
