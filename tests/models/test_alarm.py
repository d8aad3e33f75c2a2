"""The two alarms: when they start and end, which starts are false, and how threshold, k and n are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phasewatch.evaluation.alarms import mark_quiet_times
from phasewatch.models.alarm import (
    CANDIDATE_THETAS,
    DECISION_DELAY_NS,
    RULE_CANDIDATES,
    THETA_NEVER,
    AlarmKind,
    AlarmRule,
    AlarmState,
    apply_alarm_rule,
    compute_alarm_score,
    compute_detection_delays,
    find_alarm_rule,
    find_alarm_starts,
    find_false_alarm_windows,
    fit_alarm_rule,
    fit_alarm_rules,
)
from phasewatch.models.smoothing import LabelSequence
from phasewatch.types import PHASES

CLEAN, ARMED, INFECTING, ACTIVE, DORMANT = range(5)
S = 10**9
STRIDES = sorted(RULE_CANDIDATES)


def make_rule(theta: float = 0.5, *, k: int = 2, n: int = 3, **changes: object) -> AlarmRule:
    fields = {"kind": AlarmKind.ACTIVITY, "stride_s": 5, "theta": theta, "k": k, "n": n, **changes}
    return AlarmRule(**fields)  # type: ignore[arg-type]


def track(*episodes: Sequence[int], stride_s: int = 5) -> LabelSequence:
    """Labels of windows whose first centre is 5 s after the start of their episode."""
    return LabelSequence(
        y=np.concatenate([np.asarray(e, int) for e in episodes]),
        episode_index=np.repeat(np.arange(len(episodes)), [len(e) for e in episodes]),
        t_center_ns=np.concatenate([S * (5 + stride_s * np.arange(len(e))) for e in episodes]),
    )


def alarms(*scores: float) -> list[int]:
    return apply_alarm_rule(make_rule(), np.array(scores), np.zeros(len(scores), int)).astype(int).tolist()


def active(values: Sequence[float], phase: int = ACTIVE) -> np.ndarray:
    """Probabilities with these values for one phase, the rest for clean."""
    p = np.zeros((len(values), 5))
    p[:, phase], p[:, CLEAN] = values, 1 - np.array(values)
    return p


def fit_activity(p: np.ndarray, labels: LabelSequence, budget: float) -> AlarmRule:
    return fit_alarm_rule(p, labels, kind=AlarmKind.ACTIVITY, stride_s=5, budget=budget)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        pytest.param((0, 1, 0, 0), [0, 0, 0, 0], id="one window is not enough"),
        pytest.param((1, 1, 0), [0, 1, 1], id="two in a row are"),
        pytest.param((1, 0, 1), [0, 0, 1], id="two of three are"),
        pytest.param((1, 0, 0, 1), [0, 0, 0, 0], id="two of four are not"),
        pytest.param((1, 1, 0, 0, 0, 0), [0, 1, 1, 1, 0, 0], id="three below it end it"),
        pytest.param((1, 1, 0, 0, 1, 0, 0, 0), [0, 1, 1, 1, 1, 1, 1, 0], id="one above in between goes on"),
        pytest.param((1, 1, 0, 0, 0, 1), [0, 1, 1, 1, 0, 0], id="then it begins anew"),
    ],
)
def test_two_of_three_windows_start_an_alarm_and_three_others_end_it(
    scores: tuple[float, ...], expected: list[int]
) -> None:
    assert alarms(*scores) == expected


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=40), min_size=1, max_size=5),
    st.sampled_from(CANDIDATE_THETAS.tolist()),
    st.sampled_from([pair for pairs in RULE_CANDIDATES.values() for pair in pairs]),
)
def test_stepwise_alarm_equals_the_batch_alarm(
    episodes: list[list[float]], theta: float, candidate: tuple[int, int]
) -> None:
    rule = make_rule(theta, k=candidate[0], n=candidate[1])
    of = np.repeat(np.arange(len(episodes)), [len(e) for e in episodes])
    whole = apply_alarm_rule(rule, np.concatenate(episodes), of)
    stepwise, began = [], []
    for episode in episodes:
        state = AlarmState()
        for score in episode:
            state = state.step(rule, score)
            stepwise.append(state.is_active)
            began.append(state.has_started)

    assert stepwise == whole.tolist()
    assert began == find_alarm_starts(whole, of).tolist()


def test_infection_is_scored_by_infecting_and_activity_by_infecting_and_active() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(5), 50)

    assert compute_alarm_score(p, AlarmKind.INFECTION) == pytest.approx(p[:, INFECTING], abs=1e-6)
    assert compute_alarm_score(p, AlarmKind.ACTIVITY) == pytest.approx(p[:, INFECTING] + p[:, ACTIVE], abs=1e-6)
    for kind in AlarmKind:
        assert compute_alarm_score(p, kind).tolist() == compute_alarm_score(p.astype(np.float32), kind).tolist()


def test_alarm_is_false_after_sixty_seconds_without_malicious_activity() -> None:
    false = find_false_alarm_windows(track([ACTIVE] + [CLEAN] * 14, [ARMED] * 3, [DORMANT, CLEAN]))

    # Centres are 5 s apart and a decision falls 6 s after its centre: the active window, which ended 5 s after its own
    # centre, is inside the last 60 s for the eleven windows after it.
    assert false[:15].astype(int).tolist() == [0] * 12 + [1] * 3
    assert false[15:18].all()
    assert not false[18:].any()


def test_one_second_windows_look_back_over_the_same_sixty_seconds() -> None:
    false = find_false_alarm_windows(track([DORMANT] + [CLEAN] * 70, stride_s=1))

    assert false.astype(int).tolist() == [0] * 59 + [1] * 12


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(-1, 4), min_size=1, max_size=60), min_size=1, max_size=3),
    st.sampled_from(STRIDES),
    st.integers(0, 2**32 - 1),
)
def test_false_alarm_windows_equal_their_definition(episodes: list[list[int]], stride_s: int, seed: int) -> None:
    whole = track(*episodes, stride_s=stride_s)
    kept = np.random.default_rng(seed).random(len(whole.y)) < 0.8  # windows without a decision leave gaps
    labels = LabelSequence(
        y=whole.y[kept], episode_index=whole.episode_index[kept], t_center_ns=whole.t_center_ns[kept]
    )

    expected = []
    for i in range(len(labels.y)):
        decided_ns = labels.t_center_ns[i] + 6 * S
        recent = [
            labels.y[j]
            for j in range(i + 1)
            if labels.episode_index[j] == labels.episode_index[i]
            and labels.t_center_ns[j] + 5 * S > decided_ns - 60 * S
        ]
        expected.append(all(y in (CLEAN, ARMED) for y in recent))
    assert find_false_alarm_windows(labels).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(20, 150)), min_size=1, max_size=5), st.sampled_from(STRIDES))
def test_windows_and_label_spans_agree_on_quiet_time(phases: list[tuple[int, int]], stride_s: int) -> None:
    """Up to the ten seconds in which a window's label and the label at its decision time may differ."""
    ends = np.cumsum([seconds for _, seconds in phases])
    spans = [
        (PHASES[code], int(end - seconds) * S, int(end) * S) for (code, seconds), end in zip(phases, ends, strict=True)
    ]
    centers = np.arange(5, int(ends[-1]) - 4, stride_s)
    y = np.array([phases[int(np.searchsorted(ends, c, side="right"))][0] for c in centers])
    labels = LabelSequence(y=y, episode_index=np.zeros(len(y), int), t_center_ns=centers * S)

    by_windows = find_false_alarm_windows(labels)
    by_spans = mark_quiet_times(spans, centers * S + DECISION_DELAY_NS)
    for differs, at in groupby(range(len(y)), key=lambda i: by_windows[i] != by_spans[i]):
        assert not differs or len(list(at)) * stride_s <= 10


def test_threshold_is_the_smallest_that_meets_the_budget() -> None:
    quiet = [CLEAN] * 240  # 20 minutes
    score = [0.1] * 240
    for at, peak in ((20, 0.9), (60, 0.7), (100, 0.6), (140, 0.4)):
        score[at : at + 3] = [peak] * 3
    rule = fit_activity(active(score * 3), track(*[quiet] * 3), 6.0)  # an hour with each peak three times

    assert rule.theta == 0.605  # the peaks of 0.9 and 0.7 are alarms, three times each
    assert (rule.false_alarms, rule.vm_hours) == (6, 1.0)


@pytest.mark.parametrize(("stride_s", "hours"), [(5, 1.0), (1, 0.2)])
def test_each_window_is_as_much_exposure_as_its_stride(stride_s: int, hours: float) -> None:
    rule = fit_alarm_rule(
        active([0.1] * 720), track([CLEAN] * 720, stride_s=stride_s), kind=AlarmKind.INFECTION, stride_s=stride_s
    )

    assert rule.vm_hours == hours


def test_threshold_is_in_the_middle_of_those_that_meet_the_budget_and_miss_no_onset() -> None:
    """Clean windows reach 0.2 and infecting ones 0.8; float32 holds a little more than each."""
    y, score = [CLEAN] * 200 + [INFECTING] * 10, [0.2] * 200 + [0.8] * 10
    rule = fit_alarm_rule(active(score, INFECTING), track(y), kind=AlarmKind.INFECTION, stride_s=5)

    assert rule.theta == 0.505  # between 0.205 and 0.8


def test_threshold_of_an_alarm_that_is_always_on_does_not_meet_the_budget() -> None:
    """It starts once an episode, which meets the budget; a little above, it starts all the time."""
    score = ([0.3, 0.3, 0.1, 0.1, 0.1] * 144)[:720]
    of = np.zeros(720, int)
    always = apply_alarm_rule(make_rule(0.05), compute_alarm_score(active(score), AlarmKind.ACTIVITY), of)

    assert find_alarm_starts(always, of).sum() == 1
    assert fit_activity(active(score), track([CLEAN] * 720), 2.0).theta > 0.3


def test_alarm_during_an_infection_is_not_a_false_alarm() -> None:
    rule = fit_activity(active([0.0] * 20 + [0.99] * 100), track([CLEAN] * 20 + [ACTIVE] * 100), 0.0)

    assert rule.false_alarms == 0
    assert rule.theta < 0.99


def test_infection_alarm_in_dormant_or_active_time_is_neither_false_nor_a_detection() -> None:
    y = [DORMANT] * 20 + [ACTIVE] * 20 + [INFECTING] * 4 + [ACTIVE] * 20
    labels = track(y, [CLEAN] * 20)
    p = active([0.99] * 30 + [0.0] * 54, INFECTING)
    rule = fit_alarm_rule(p, labels, kind=AlarmKind.INFECTION, stride_s=5, budget=0.0)
    is_active = apply_alarm_rule(rule, compute_alarm_score(p, rule.kind), labels.episode_index)
    onset_ns = np.array([205 * S, -1])
    decided_ns = labels.t_center_ns + DECISION_DELAY_NS
    delays = compute_detection_delays(rule.kind, is_active, labels.episode_index, decided_ns, onset_ns)

    assert rule.theta < 0.99
    assert rule.false_alarms == 0
    assert is_active[5:30].all()
    assert delays[0] == np.inf


def test_infection_alarm_counts_when_it_starts_and_activity_alarm_while_it_is_on() -> None:
    decided = S * np.arange(0, 60, 5)
    is_active = np.isin(np.arange(12), [2, 3, 4, 8])
    of, onset = np.zeros(12, int), np.array([17 * S])

    assert compute_detection_delays(AlarmKind.ACTIVITY, is_active, of, decided, onset).tolist() == [3.0]
    assert compute_detection_delays(AlarmKind.INFECTION, is_active, of, decided, onset).tolist() == [23.0]


def test_episode_without_onset_or_alarm_has_an_infinite_delay() -> None:
    of, decided = np.array([0, 0, 1, 1]), S * np.arange(4)
    is_active = np.array([True, True, False, False])

    delays = compute_detection_delays(AlarmKind.ACTIVITY, is_active, of, decided, np.array([-1, 0]))

    assert delays.tolist() == [np.inf, np.inf]


def test_budget_counts_quiet_hours_alone() -> None:
    """The budget is spent and measured over the same hours: those in which an alarm would be false."""
    score = [0.1] * 720
    score[20:23] = [0.9] * 3
    quiet, infected = track([CLEAN] * 720), track([CLEAN] * 720 + [ACTIVE] * 7200)

    alone = fit_activity(active(score), quiet, 0.5)
    beside = fit_activity(active(score + [0.99] * 7200), infected, 0.5)

    assert alone.vm_hours == beside.vm_hours == 1.0
    assert alone.theta == 0.9
    assert beside.theta >= 0.9


def test_more_hours_allow_more_false_alarms() -> None:
    """0.25 alarms an hour are none in one hour, and one in four."""
    score = [0.1] * 720
    score[20:23] = [0.9] * 3
    one_hour = fit_activity(active(score), track([CLEAN] * 720), 0.25)
    four_hours = fit_activity(active(score + [0.1] * 2160), track([CLEAN] * 720, [CLEAN] * 2160), 0.25)

    assert (one_hour.theta, one_hour.false_alarms) == (0.9, 0)  # 0.9 is a little less in float32
    assert (four_hours.theta, four_hours.false_alarms) == (0.105, 1)


@pytest.mark.parametrize("kind", AlarmKind)
@pytest.mark.parametrize("stride_s", STRIDES)
def test_alarm_never_starts_without_quiet_windows_to_fit_on(kind: AlarmKind, stride_s: int) -> None:
    for p, labels in (
        (active([0.99] * 100), track([ACTIVE] * 100, stride_s=stride_s)),
        (np.zeros((0, 5)), track([], stride_s=stride_s)),
    ):
        rule = fit_alarm_rule(p, labels, kind=kind, stride_s=stride_s, budget=6.0)
        assert (rule.theta, rule.vm_hours) == (THETA_NEVER, 0.0)


def test_alarm_never_starts_if_no_threshold_meets_the_budget() -> None:
    p = active([1.0] * 100)
    rule = fit_activity(p, track([CLEAN] * 100), 1.0)

    assert rule.theta == THETA_NEVER
    assert not apply_alarm_rule(rule, compute_alarm_score(p, rule.kind), np.zeros(100, int)).any()


def count_by_hand(hot: np.ndarray, labels: LabelSequence, k: int, n: int, kind: AlarmKind) -> tuple[int, list[float]]:
    """Return the false alarms, and the delay of each onset with 30 s after it, window by window."""
    quiet = find_false_alarm_windows(labels)
    false, delays = 0, []
    for episode in np.unique(labels.episode_index):
        at = np.flatnonzero(labels.episode_index == episode)
        begins = [np.flatnonzero(labels.y[at] == INFECTING)]
        begins += [np.flatnonzero(labels.y[at] == ACTIVE)] if kind is AlarmKind.ACTIVITY else []
        begin = next((int(found[0]) for found in begins if len(found)), None)
        onset = None if begin is None else labels.t_center_ns[at[begin]] - (0 if begin else 5 * S)
        if onset is not None and labels.t_center_ns[at[-1]] + 6 * S - onset < 30 * S:
            onset = None
        is_on, delay = False, np.inf
        for j, i in enumerate(at):
            recent = [bool(hot[m]) for m in at[max(0, j - n + 1) : j + 1]]
            was_on, is_on = is_on, (any(recent) if is_on else sum(recent) >= k)
            has_started = is_on and not was_on
            false += has_started and bool(quiet[i])
            late = labels.t_center_ns[i] + 6 * S - onset if onset is not None else -1
            if late >= 0 and (has_started if kind is AlarmKind.INFECTION else is_on):
                delay = min(delay, late / S)
        if onset is not None:
            delays.append(float(delay))
    return false, delays


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(list(AlarmKind)),
    st.sampled_from(STRIDES),
    st.sampled_from([0.0, 10.0, 60.0, 200.0]),
)
def test_fitted_rule_equals_a_search_by_hand(seed: int, kind: AlarmKind, stride_s: int, budget: float) -> None:
    rng = np.random.default_rng(seed)
    episodes = [
        np.repeat(rng.choice([CLEAN, CLEAN, ARMED, INFECTING, ACTIVE, DORMANT], 4), rng.integers(1, 25, 4))
        for _ in range(4)
    ]
    labels = track(*episodes, stride_s=stride_s)
    p = rng.dirichlet(np.ones(5) * 0.3, len(labels.y)) * 0.6
    p[np.arange(len(p)), labels.y] += 0.4
    p = np.round(p, 1)  # so that few thresholds differ
    scores = compute_alarm_score(p, kind)
    hours = find_false_alarm_windows(labels).sum() * stride_s / 3600

    ranked = []
    for k, n in RULE_CANDIDATES[stride_s]:
        known: dict[bytes, tuple[int, list[float]]] = {}

        def count(candidate: float, k: int = k, n: int = n, known: dict = known) -> tuple[int, list[float]]:  # type: ignore[type-arg]
            hot = scores >= candidate
            if hot.tobytes() not in known:
                known[hot.tobytes()] = count_by_hand(hot, labels, k, n, kind)
            return known[hot.tobytes()]

        def missed(candidate: float, count: Callable[..., tuple[int, list[float]]] = count) -> int:
            return sum(delay > 30 for delay in count(candidate)[1])

        thetas = CANDIDATE_THETAS.tolist()
        lower = len(thetas)
        while hours and lower and count(thetas[lower - 1])[0] <= budget * hours:  # down from the largest
            lower -= 1
        theta = THETA_NEVER
        if lower < len(thetas):
            upper = max(i for i in range(len(thetas)) if missed(thetas[i]) <= missed(thetas[lower]))
            theta = thetas[lower + round(0.5 * (upper - lower))] if count(thetas[lower])[1] else thetas[lower]
        false, delays = count(theta)
        median = sorted(delays)[(len(delays) - 1) // 2] if delays else 0.0
        ranked.append((sum(delay > 30 for delay in delays), median, -n, theta, k, false))
    _, _, minus_n, theta, k, false = min(ranked)
    rule = fit_alarm_rule(p, labels, kind=kind, stride_s=stride_s, budget=budget)

    assert (rule.k, rule.n, rule.theta, rule.false_alarms) == (k, -minus_n, theta, false)
    assert rule.vm_hours == round(hours, 6)


def test_rule_with_the_fewest_missed_onsets_is_chosen() -> None:
    """One loud clean window costs 1 of 1 its threshold; two of three keep theirs and announce the weak onset."""
    y = [CLEAN] * 200 + [INFECTING] * 10
    score = [0.0] * 100 + [0.95] + [0.0] * 99 + [0.5] * 10
    rule = fit_alarm_rule(active(score, INFECTING), track(y), kind=AlarmKind.INFECTION, stride_s=5)

    assert (rule.k, rule.n) == (2, 3)
    assert rule.theta < 0.5


def test_faster_rule_is_chosen_among_those_that_miss_the_same() -> None:
    y = [CLEAN] * 200 + [INFECTING] * 10
    rule = fit_alarm_rule(active([0.0] * 200 + [0.9] * 10, INFECTING), track(y), kind=AlarmKind.INFECTION, stride_s=5)

    assert (rule.k, rule.n) == (1, 1)


def test_rule_that_looks_at_more_windows_is_chosen_if_nothing_else_decides() -> None:
    for stride_s, candidates in RULE_CANDIDATES.items():
        rule = fit_alarm_rule(
            active([0.0] * 200), track([CLEAN] * 200, stride_s=stride_s), kind=AlarmKind.INFECTION, stride_s=stride_s
        )

        assert (rule.k, rule.n) == candidates[-1]


def test_rules_of_several_budgets_are_those_of_each_budget() -> None:
    rng = np.random.default_rng(1)
    labels = track(*[[CLEAN] * 60 + [INFECTING] * 8 + [ACTIVE] * 20] * 6, stride_s=1)
    p = rng.dirichlet(np.ones(5), len(labels.y))
    budgets = (0.25, 6.0, 60.0)

    together = fit_alarm_rules(p, labels, kind=AlarmKind.INFECTION, stride_s=1, budgets=budgets)

    alone = [fit_alarm_rule(p, labels, kind=AlarmKind.INFECTION, stride_s=1, budget=b) for b in budgets]
    assert list(together) == alone
    assert [rule.budget for rule in together] == list(budgets)


def test_rule_is_found_by_kind_and_stride() -> None:
    rules = [make_rule(kind=kind, stride_s=stride_s) for kind in AlarmKind for stride_s in STRIDES]

    assert find_alarm_rule(rules, AlarmKind.ACTIVITY, 1) == make_rule(kind=AlarmKind.ACTIVITY, stride_s=1)
    assert find_alarm_rule(rules[:1], AlarmKind.ACTIVITY, 5) is None


@pytest.mark.parametrize(
    "wrong",
    [{"theta": 0.0}, {"theta": float("nan")}, {"k": 4}, {"vm_hours": float("inf")}, {"stride_s": 2}, {"budget": -1.0}],
)
def test_impossible_numbers_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="alarm rule: "):
        make_rule(**wrong)  # type: ignore[arg-type]
