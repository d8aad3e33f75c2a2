"""The operator's rows on the twelve episodes that were computed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy.stats import beta, chi2
from tests.evaluation.test_alarms import TWELVE, C, N, X, episode, spans

from phasewatch.evaluation.alarm_measures import (
    FalseAlarmRate,
    compute_binomial_interval,
    compute_chance_recall,
    compute_poisson_interval,
    compute_precision,
)
from phasewatch.evaluation.alarms import EpisodeTimeline, PredictionParts
from phasewatch.evaluation.detection import build_alarm_rows
from phasewatch.evaluation.metric_table import MetricRow, NoteCode
from phasewatch.evaluation.predictions import ModelPredictions, PredictionGroup
from phasewatch.evaluation.scoring import EvaluationSettings, EvaluationWindows, ModelOutput
from phasewatch.models.alarm import AlarmKind

RULES = EvaluationSettings(malicious=("cryptomine",), profiles=("benign", "cryptomine"), resamples=400)
QUIET = episode(spans((C, 60)), "...........")


def board(
    episodes: Mapping[str, tuple[object, np.ndarray, np.ndarray]], hosts: Mapping[str, str], fold: str
) -> PredictionGroup:
    ids = [i for i, (_, t, _) in episodes.items() for _ in t]
    texts = {
        "episode_id": ids,
        "session": ids,
        "host_id": [hosts.get(i, fold) for i in ids],
        "sample_name": ["x"] * len(ids),
        "profile": ["benign" if i in ("e1", "e2", "e3") else "cryptomine" for i in ids],
        "origin": ["recorded"] * len(ids),
        "agent": ["off"] * len(ids),
    }
    p = np.concatenate([p for _, _, p in episodes.values()])
    said = ModelPredictions(
        model="gbt",
        seed=0,
        fold=fold,
        windows=EvaluationWindows(
            **{name: np.array(values, dtype=object) for name, values in texts.items()},
            t_center_ns=np.concatenate([t for _, t, _ in episodes.values()]),
            y_true=np.zeros(len(p), np.int64),
        ),
        output=ModelOutput(model="gbt", seed=0, probabilities=p, y_pred=p.argmax(axis=1)),
    )
    return PredictionGroup(
        recipe="held_out_host", threat="realistic", table="raw", filter="none", predictions=(said,), refused=()
    )


def rows_of(
    tests: Sequence[object], soak: Mapping[str, object] | None = None, *, stride_s: int = 1
) -> dict[str, MetricRow]:
    """Build the rows by "metric bin profile class"; the windows count as one every `stride_s`."""
    episodes = {f"e{i}": e for i, e in enumerate(tests, 1)}
    calm = {"quiet": QUIET}
    everything = {**episodes, **calm, **(soak or {})}
    recorded = {
        i: EpisodeTimeline(spans=e[0], t0_ns=0, rates=np.full((240, 4), 2.0), group=0)  # type: ignore[index]
        for i, e in everything.items()
    }
    parts = PredictionParts(
        test=board(episodes, {}, "h0"),
        val_b=board(calm, {"quiet": "h1"}, "h0"),  # type: ignore[arg-type]
        soak=board(soak, {}, "h0") if soak else None,  # type: ignore[arg-type]
        stride_s=stride_s,
    )
    found = build_alarm_rows([parts], recorded, RULES, agent="off")
    return {
        " ".join(
            [r.metric, *([] if r.bin is None else [f"{r.bin:g}"]), *filter(None, (r.profile, r.phase and str(r.phase)))]
        ): r
        for r in found
    }


@pytest.fixture(scope="module")
def rows() -> dict[str, MetricRow]:
    return rows_of(TWELVE, stride_s=5)


def test_recall_counts_the_onsets_with_so_much_recorded_after_them(rows: dict[str, MetricRow]) -> None:
    # Six infections and activities begin, with 30, 30, 30, 60, 40, 30 and 110 s to come. By 1 of 1 at 5 s the alarm is
    # on after 1 s (5), 1 s (6), never, 11 s, 31 s, never, 71 s.
    recall = {t: rows[f"activity_recall_{t}s_at_5s"] for t in (15, 30, 60)}

    assert {t: r.n_episodes for t, r in recall.items()} == {15: 7, 30: 7, 60: 2}
    assert [rows[f"activity_n_cut_short_{t}s_at_5s"].value for t in (15, 30, 60)] == [0, 0, 5]
    assert all(r.low is not None and r.low <= r.value <= r.high for r in recall.values() if r.value is not None)


def test_missed_and_delay_are_of_onsets_with_sixteen_seconds_recorded(rows: dict[str, MetricRow]) -> None:
    missed, delay = rows["activity_miss_rate_at_5s"], rows["activity_delay_s_at_5s"]

    assert missed.n_episodes == delay.n_episodes == 7
    assert missed.value == pytest.approx(3 / 7)  # 7 and 11 never, 12 after more than a minute
    short = rows_of([episode(spans((C, 50), (N, 10)), "..........."), TWELVE[4]], stride_s=5)
    assert short["infection_miss_rate_at_5s"].n_episodes == 1
    assert short["infection_n_cut_short_15s_at_5s"].value == 1


def test_infections_and_activities_are_counted_apart(rows: dict[str, MetricRow]) -> None:
    assert rows["infection_miss_rate_at_5s"].n_episodes == 4
    assert rows["activity_miss_rate_at_5s"].n_episodes == 7


def test_false_alarms_are_per_hour_of_calm_with_the_union_of_two_intervals(rows: dict[str, MetricRow]) -> None:
    hours = 68 * 5 / 3600
    name = "activity_false_alarms_per_vm_hour"
    poisson, sessions = (rows[f"{name}_{kind}_at_5s"] for kind in ("poisson", "sessions"))
    quoted = rows[f"{name}_at_5s"]
    count = round(quoted.value * hours)

    assert rows["activity_vm_hours_at_5s"].value == pytest.approx(hours)
    assert quoted.value == pytest.approx(count / hours)
    assert poisson.low == pytest.approx(chi2.ppf(0.025, 2 * count) / 2 / hours)
    assert poisson.high == pytest.approx(chi2.ppf(0.975, 2 * count + 2) / 2 / hours)
    assert (quoted.low, quoted.high) == (min(poisson.low, sessions.low), max(poisson.high, sessions.high))
    assert quoted.code is NoteCode.FALSE_ALARM_COUNT


def test_quiet_time_in_alarm_is_a_share_of_the_same_hours(rows: dict[str, MetricRow]) -> None:
    share = rows["activity_time_in_alarm_at_5s"]

    assert 0 < share.value < 1
    assert share.value == pytest.approx(round(share.value * 68) / 68)


def test_chance_line_has_the_alarms_own_rate_and_time(rows: dict[str, MetricRow]) -> None:
    rate, on = rows["activity_false_alarms_per_vm_hour_at_5s"], rows["activity_time_in_alarm_at_5s"]

    assert rows["activity_chance_30s_at_5s"].value == pytest.approx(
        1 - (1 - on.value) * np.exp(-rate.value * 30 / 3600)
    )
    assert rows["infection_chance_30s_at_5s"].value == pytest.approx(
        1 - np.exp(-rows["infection_false_alarms_per_vm_hour_at_5s"].value * 30 / 3600)
    )


def test_chance_line_is_what_a_blind_alarm_announces_in_a_simulation() -> None:
    rng = np.random.default_rng(0)
    per_hour, on_s, within_s = 40.0, 20.0, 30.0
    starts = np.cumsum(rng.exponential(3600 / per_hour, 200_000) + on_s)  # an alarm that is on cannot start
    hours = (starts[-1] - len(starts) * on_s) / 3600
    onsets = rng.uniform(0, starts[-1], 100_000)
    following = np.searchsorted(starts, onsets)
    starts_in_time = starts[np.minimum(following, len(starts) - 1)] - onsets <= within_s
    is_on = (following > 0) & (onsets < starts[following - 1] + on_s)
    share = len(starts) * on_s / starts[-1]

    assert (is_on | starts_in_time).mean() == pytest.approx(
        compute_chance_recall(AlarmKind.ACTIVITY, within_s, len(starts) / hours, share), abs=0.02
    )


def test_precision_follows_from_base_rate_recall_and_false_alarms() -> None:
    # One infection per VM and day, half announced, 0.25 false alarms per hour: 0.5 true among 6.5 alarms a day.
    assert compute_precision(0.5, 0.25, days=1) == pytest.approx(0.5 / 6.5)
    assert compute_precision(0.0, 0.0, days=30) == 0.0


def test_precision_rows_combine_the_ends_of_recall_and_false_alarms() -> None:
    found = rows_of(TWELVE, {"long": episode(spans((C, 600)), "xx" + "." * 100)}, stride_s=5)
    recall, rate = found["infection_recall_30s_at_5s"], found["infection_soak_false_alarms_per_vm_hour_at_5s"]

    for days in (30, 1):
        row = found[f"infection_precision_at_base_rate_at_5s {days}"]
        assert row.value == pytest.approx(compute_precision(recall.value, rate.value, days=days))
        assert row.low == pytest.approx(compute_precision(recall.low, rate.high, days=days), abs=1e-9)
        assert row.code is NoteCode.BASE_RATE


def test_damage_is_what_was_done_from_onset_to_alarm(rows: dict[str, MetricRow]) -> None:
    assert rows["infection_impact_cpu_seconds_at_5s"].unit == "s"
    assert rows["infection_impact_bytes_written_at_5s"].n_episodes == 4


def test_profiles_and_starting_states_have_their_own_rows(rows: dict[str, MetricRow]) -> None:
    whole = rows["activity_miss_rate_at_5s"]

    assert rows["activity_miss_rate_at_5s cryptomine"].value == whole.value
    assert "activity_miss_rate_at_5s benign" not in rows
    by_state = {s: rows[f"activity_miss_rate_at_5s {s}"].n_episodes for s in ("clean", "active", "dormant")}
    assert by_state == {"clean": 4, "active": 2, "dormant": 1}


def test_every_row_has_an_interval_or_a_coded_note(rows: dict[str, MetricRow]) -> None:
    assert [r.metric for r in rows.values() if (r.low is None or r.high is None) and r.code is None] == []


def test_at_the_budget_of_the_alarm_the_curve_says_what_the_alarm_says(rows: dict[str, MetricRow]) -> None:
    for kind in AlarmKind:
        for name in ("recall_30s", "delay_s", "miss_rate", "false_alarms_per_vm_hour", "time_in_alarm"):
            point, curve = rows[f"{kind}_{name}_at_5s"], rows[f"{kind}_{name}_at_budget_at_5s 0.25"]

            assert (point.value, point.low, point.high) == (curve.value, curve.low, curve.high)


def test_the_union_holds_both_intervals_also_where_the_sessions_end_below_poissons() -> None:
    poisson, sessions = {"low": 1.0, "high": 6.9}, {"low": 0.5, "high": 6.8}
    quoted = FalseAlarmRate(count=6.0, per_hour=3.2, poisson=poisson, sessions=sessions).union

    assert quoted == {"low": 0.5, "high": 6.9}
    assert FalseAlarmRate(count=6.0, per_hour=3.2, poisson=poisson, sessions={"note": None}).union == poisson


def test_more_than_half_missed_has_no_median_and_says_so() -> None:
    found = rows_of([TWELVE[4], TWELVE[6], TWELVE[6]], stride_s=5)

    assert found["infection_delay_s_at_5s"].value is None
    assert found["infection_delay_s_at_5s"].code is NoteCode.MOST_EPISODES_MISSED


def test_the_soak_of_the_tested_host_is_counted_beside_the_test() -> None:
    found = rows_of(TWELVE, {"long": episode(spans((C, 600)), "xx" + "." * 100)}, stride_s=5)

    assert found["infection_soak_vm_hours_at_5s"].value == pytest.approx(102 * 5 / 3600)
    assert found["infection_soak_false_alarms_per_vm_hour_at_5s"].value == pytest.approx(1 / (102 * 5 / 3600))
    assert found["infection_threshold_at_5s 0.25"].value == pytest.approx(0.105)  # its own soak sets no threshold


def test_names_without_a_stride_are_those_of_a_live_watcher() -> None:
    held = [episode(spans((C, 30), (N, 30)), "." * 25 + "x" * 15 + "." * 10, stride_s=1)]
    found = rows_of(held, stride_s=1)

    assert found["infection_miss_rate"].value == 0
    assert not any(name.endswith("_at_5s") for name in found)


def test_a_model_without_predictions_every_second_has_a_coded_note() -> None:
    codes = {r.code for r in rows_of(TWELVE, stride_s=5).values() if r.metric == "note"}

    assert codes == {NoteCode.NO_LIVE_PREDICTIONS}


def test_without_calm_time_to_learn_from_there_is_no_threshold_and_it_is_said() -> None:
    episodes = {f"e{i}": e for i, e in enumerate(TWELVE, 1)}
    recorded = {i: EpisodeTimeline(spans=e[0], t0_ns=0, rates=np.zeros((1, 4)), group=0) for i, e in episodes.items()}
    parts = PredictionParts(test=board(episodes, {}, "h0"), val_b=None, soak=None, stride_s=1)

    found = list(build_alarm_rows([parts], recorded, RULES, agent="off"))

    assert {r.metric for r in found} == {"note"}
    assert {r.code for r in found} == {NoteCode.NO_ALARM_METRICS}


def test_without_an_infection_there_is_no_recall_and_a_note_says_so() -> None:
    found = rows_of([episode(spans((C, 30), (X, 30)), "....xx.....")], stride_s=5)

    assert found["infection_recall_30s_at_5s"].value is None
    assert found["infection_recall_30s_at_5s"].code is NoteCode.NO_ONSET


def test_a_poisson_interval_of_none_begins_at_zero_and_ends_at_three_and_two_thirds() -> None:
    assert compute_poisson_interval(0) == pytest.approx((0.0, 3.6889), abs=1e-4)


@pytest.mark.parametrize(("count", "n"), [(0, 76), (4, 81), (81, 81)])
def test_binomial_interval_is_clopper_and_pearsons(count: int, n: int) -> None:
    low = beta.ppf(0.025, count, n - count + 1) if count else 0.0
    high = beta.ppf(0.975, count + 1, n - count) if count < n else 1.0

    assert compute_binomial_interval(count, n) == pytest.approx((low, high))
