"""The operator's rows on the twelve episodes that were computed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy.stats import chi2
from tests.evaluation.test_alarms import TWELVE, C, episode, spans

from phasewatch.evaluation.alarms import EpisodeTimeline, PredictionParts
from phasewatch.evaluation.detection import FalseAlarmRate, build_alarm_rows, compute_poisson_interval
from phasewatch.evaluation.metric_table import MetricRow
from phasewatch.evaluation.predictions import ModelPredictions, PredictionGroup
from phasewatch.evaluation.scoring import EvaluationSettings, EvaluationWindows, ModelOutput

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


def rows_of(tests: Sequence[object], soak: Mapping[str, object] | None = None) -> dict[str, MetricRow]:
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
    )
    found = build_alarm_rows(parts, recorded, RULES, agent="off")
    return {
        f"{r.metric}{'' if r.bin is None else f' {r.bin:g}'}{f' {r.profile}' if r.profile else ''}": r for r in found
    }


@pytest.fixture(scope="module")
def rows() -> dict[str, MetricRow]:
    return rows_of(TWELVE)


def test_delay_is_the_median_in_which_a_missed_episode_never_ends(rows: dict[str, MetricRow]) -> None:
    # Seven episodes begin: 6, 1, missed, 16, 36, missed, 76 s.
    assert rows["delay_s"].value == pytest.approx(36.0)
    assert rows["delay_s"].n_episodes == 7
    assert rows["miss_rate"].value == pytest.approx(2 / 7)


def test_false_alarms_are_per_hour_of_calm_with_the_union_of_two_intervals(rows: dict[str, MetricRow]) -> None:
    hours = 68 * 5 / 3600
    poisson, sessions = (rows[f"false_alarms_per_vm_hour_{kind}"] for kind in ("poisson", "sessions"))
    quoted = rows["false_alarms_per_vm_hour"]

    assert rows["vm_hours"].value == pytest.approx(hours)
    assert quoted.value == pytest.approx(7 / hours)
    assert poisson.low == pytest.approx(chi2.ppf(0.025, 14) / 2 / hours)
    assert poisson.high == pytest.approx(chi2.ppf(0.975, 16) / 2 / hours)
    assert (quoted.low, quoted.high) == (min(poisson.low, sessions.low), max(poisson.high, sessions.high))
    assert quoted.note == "7 in 0.09 VM-hours; nothing below 31.8 an hour is claimed"


def test_damage_is_what_was_done_from_onset_to_alarm(rows: dict[str, MetricRow]) -> None:
    # Two units a second over whole bins: 6, 1, 30 (missed: to the end), 16, 36, 30 (missed), 76 s; the median is 30 s.
    assert rows["impact_bytes_written"].value == pytest.approx(60.0)
    assert rows["impact_cpu_seconds"].unit == "s"


def test_a_profile_has_its_own_delay_and_curve(rows: dict[str, MetricRow]) -> None:
    assert rows["delay_s cryptomine"].value == rows["delay_s"].value
    assert rows["delay_s_at_budget 1 cryptomine"].value == rows["delay_s_at_budget 1"].value == pytest.approx(36.0)
    assert "delay_s benign" not in rows


def test_each_budget_has_intervals_or_says_why_not(rows: dict[str, MetricRow]) -> None:
    own = [r for r in rows.values() if r.metric.endswith("_at_budget")]

    assert {r.metric for r in own} == {f"{m}_at_budget" for m in ("delay_s", "miss_rate", "false_alarms_per_vm_hour")}
    assert all(r.note or (r.low is not None and r.high is not None) for r in own)


def test_at_the_budget_of_the_alarm_the_curve_says_what_the_alarm_says(rows: dict[str, MetricRow]) -> None:
    for name in ("delay_s", "miss_rate", "false_alarms_per_vm_hour"):
        point, curve = rows[name], rows[f"{name}_at_budget 1"]

        assert (point.value, point.low, point.high) == (curve.value, curve.low, curve.high)


def test_the_union_holds_both_intervals_also_where_the_sessions_end_below_poissons(rows: dict[str, MetricRow]) -> None:
    poisson, sessions = {"low": 1.0, "high": 6.9}, {"low": 0.5, "high": 6.8}
    quoted = FalseAlarmRate(count=6.0, per_hour=3.2, poisson=poisson, sessions=sessions).union

    assert quoted == {"low": 0.5, "high": 6.9}
    assert FalseAlarmRate(count=6.0, per_hour=3.2, poisson=poisson, sessions={"note": None}).union == poisson


def test_more_than_half_missed_has_no_median_and_says_so() -> None:
    found = rows_of([TWELVE[4], TWELVE[6], TWELVE[10]])

    assert found["delay_s"].value is None
    assert found["delay_s"].note == "more than half are missed, so there is no median"


def test_the_soak_of_the_tested_host_is_counted_beside_the_test() -> None:
    found = rows_of(TWELVE, {"long": episode(spans((C, 600)), "xx" + "." * 100)})

    assert found["soak_vm_hours"].value == pytest.approx(102 * 5 / 3600)
    assert found["soak_false_alarms_per_vm_hour"].value == pytest.approx(1 / (102 * 5 / 3600))
    assert found["alarm_threshold 1"].value == pytest.approx(0.105)  # its own soak sets no threshold


def test_without_calm_time_to_learn_from_there_is_no_threshold_and_it_is_said() -> None:
    episodes = {f"e{i}": e for i, e in enumerate(TWELVE, 1)}
    recorded = {i: EpisodeTimeline(spans=e[0], t0_ns=0, rates=np.zeros((1, 4)), group=0) for i, e in episodes.items()}
    parts = PredictionParts(test=board(episodes, {}, "h0"), val_b=None, soak=None)

    (row,) = build_alarm_rows(parts, recorded, RULES, agent="off")

    assert row.metric == "note"
    assert "no validation B and no soak of other hosts" in (row.note or "")


def test_a_poisson_interval_of_none_begins_at_zero_and_ends_at_three_and_two_thirds() -> None:
    assert compute_poisson_interval(0) == pytest.approx((0.0, 3.6889), abs=1e-4)
