"""From readings to decisions: when windows are decided, live equals offline, and clock steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.binning.test_stream import readings_of
from tests.factories.bundles import MONO0, T0, S, episode
from tests.factories.stores import ACTIVE

from phasewatch.binning.align import FLAG_LATE, bin_episode
from phasewatch.binning.stream import LATENESS_NS
from phasewatch.channels import CHANNELS, build_channel_mask, list_raw_fields
from phasewatch.features.inputs import list_table_columns
from phasewatch.features.normalise import build_scaling, measure_baseline
from phasewatch.features.schema import feature_names
from phasewatch.features.windows import combine_window_flags
from phasewatch.inference.edge_bundle import TrainingOrigin
from phasewatch.inference.predictor import PhaseDecision, PhasePostprocessor, PhasePredictor
from phasewatch.live.tracker import TrackerStep, VmTracker
from phasewatch.models.alarm import AlarmKind, AlarmRule, apply_alarm_rule, compute_alarm_score
from phasewatch.models.base import InputKind, InputSpec, InputVariant, ModelInputs
from phasewatch.models.smoothing import PhaseFilter
from phasewatch.types import BIN_NS, LIVE_STRIDE_BINS, STRIDE_BINS, Phase, SourceKind

FIVE = tuple(c.full_name for c, on in zip(CHANNELS, build_channel_mask("tap"), strict=True) if on)
RULES = tuple(
    AlarmRule(kind=kind, stride_s=stride_s, theta=theta, k=k, n=n)
    for kind, theta in ((AlarmKind.INFECTION, 0.25), (AlarmKind.ACTIVITY, 0.55))
    for stride_s, k, n in ((1, 3, 4), (5, 2, 3))
)
MOVES = tuple(tuple(0.8 if i == k else 0.05 for k in range(5)) for i in range(5))


@dataclass
class FakeEstimator:
    """An estimator whose p(infecting) and p(active) grow with the bytes sent; it records its inputs.

    Both reach the thresholds of `RULES` when it puts a half on them.
    """

    spec: InputSpec
    asked: list[NDArray[np.float32]] = field(default_factory=list)

    def predict_proba(self, inputs: ModelInputs) -> NDArray[np.float64]:
        assert inputs.spec == self.spec
        self.asked.append(inputs.x)
        sent = inputs.x[:, 1] if inputs.x.ndim == 2 else inputs.x[:, 1].mean(axis=1)
        loud = np.nan_to_num(np.clip(sent / 1e5, 0.02, 0.96).astype(np.float64), nan=0.02)
        quiet = 1.0 - loud
        return np.stack([0.7 * quiet, 0.1 * quiet, 0.1 * quiet + 0.4 * loud, 0.6 * loud, 0.1 * quiet], axis=1)


def scorer(kind: InputKind = InputKind.TENSOR, *, rules: bool = True, **changes: object) -> PhasePredictor:
    names = FIVE if kind is InputKind.TENSOR else tuple(f"{name}.mean" for name in FIVE)
    spec = InputSpec(kind=kind, names=names, mask="tap", schema_hash="5", behaviour_fingerprint="b")
    fields: dict[str, object] = {
        "model": "fake",
        "threat": "tap",
        "seed": 0,
        "spec": spec,
        "estimator": FakeEstimator(spec),
        "filter": PhaseFilter(transitions=MOVES, prior=(0.2,) * 5, kappa=0.5) if rules else None,  # type: ignore[arg-type]
        "alarms": RULES if rules else (),
        "trained": TrainingOrigin(),
        "where": "test",
    }
    return PhasePredictor(**{**fields, **changes})  # type: ignore[arg-type]


WHOLE = episode(
    [("clean", 30), ("active", 30), ("clean", 40)], agent=False, rates_of={**ACTIVE, "active": {"out_bytes": 1.2e5}}
)


def run(tracker: VmTracker, *, portions: int = 1, seed: int = 0, worst_ns: int = 0) -> list[TrackerStep]:
    """Feed the episode to a tracker, with readings up to `worst_ns` late, and advance it after every few of them."""
    rng = np.random.default_rng(seed)
    readings = [r for r in readings_of(WHOLE) if r[0] < WHOLE.t_end_ns]
    due = [r[0] + int(late) for r, late in zip(readings, rng.integers(0, worst_ns + 1, len(readings)), strict=True)]
    steps: list[TrackerStep] = []
    tracker.begin_at(WHOLE.t0_ns)
    for turn, i in enumerate(np.argsort(due, kind="stable")):
        _, source, row = readings[i]
        tracker.add(source, row)
        if turn % portions == 0:
            steps += tracker.advance(due[i], due[i] - WHOLE.t0_ns + MONO0)
    end_ns = WHOLE.t0_ns + WHOLE.n_bins * BIN_NS + LATENESS_NS
    return steps + tracker.advance(end_ns, end_ns - WHOLE.t0_ns + MONO0)


def decisions(steps: list[TrackerStep]) -> list[PhaseDecision]:
    return [step.decision for step in steps if step.decision is not None]


@pytest.mark.parametrize("stride_bins", [LIVE_STRIDE_BINS, STRIDE_BINS])
def test_a_window_of_ten_seconds_is_decided_when_its_last_bin_closes(stride_bins: int) -> None:
    steps = run(VmTracker(scorer(), stride_bins=stride_bins))

    assert [b.bin.number for b in steps] == list(range(200))
    assert [s.bin.number for s in steps if s.decision] == list(range(19, 200, stride_bins))
    assert [d.number for d in decisions(steps)] == list(range(180 // stride_bins + 1))
    first = decisions(steps)[0]
    assert (first.t_start_ns, first.t_end_ns) == (WHOLE.t0_ns, WHOLE.t0_ns + 10 * S)
    assert first.known == pytest.approx(1.0)


def test_the_alarm_lasts_while_the_network_is_busy_and_has_a_start_time() -> None:
    said = decisions(run(VmTracker(scorer())))
    rang = [d.number for d in said if d.alarm]
    raised = [d for d in said if d.raised]

    assert [d.phase for d in said][:4] == [Phase.CLEAN] * 4
    assert Phase.ACTIVE in {d.phase for d in said}
    assert len(raised) == 1
    assert raised[0].t_end_ns > WHOLE.t0_ns + 30 * S
    assert {d.since_ns for d in said if d.alarm} == {raised[0].t_end_ns}
    assert rang == list(range(rang[0], rang[-1] + 1))
    assert said[-1].alarm is False
    assert said[-1].since_ns is None


def test_both_alarms_have_a_state_of_their_own() -> None:
    rules = tuple(replace(rule, k=1, n=1) if rule.kind is AlarmKind.ACTIVITY else rule for rule in RULES)
    said = decisions(run(VmTracker(scorer(alarms=rules))))
    infection = [d.number for d in said if d.raised]
    activity = [d.number for d in said if d.activity_raised]

    assert infection == [activity[0] + 2]  # three of four windows are two seconds later than one of one
    assert {d.activity_since_ns for d in said if d.activity_alarm} == {said[activity[0]].t_end_ns}
    assert said[-1].activity_alarm is False


def test_without_rules_there_is_no_alarm_and_no_smoothing() -> None:
    said = decisions(run(VmTracker(scorer(rules=False))))

    assert {d.alarm for d in said} == {d.activity_alarm for d in said} == {None}
    assert all(d.belief == d.p for d in said)


@pytest.mark.parametrize("kind", [InputKind.TENSOR, InputKind.TABLE])
@pytest.mark.parametrize("stride_bins", [LIVE_STRIDE_BINS, STRIDE_BINS])
@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(0, 2**32 - 1), st.sampled_from([0, 300_000_000, LATENESS_NS - 1]))
def test_live_decisions_equal_offline_decisions(
    kind: InputKind, stride_bins: int, portions: int, seed: int, worst_ns: int
) -> None:
    model = scorer(kind)
    offline = model.predict_windows(bin_episode(WHOLE).bins, stride_bins)

    tracker = VmTracker(scorer(kind), stride_bins=stride_bins)
    said = decisions(run(tracker, portions=1 if worst_ns else portions, seed=seed, worst_ns=worst_ns))

    assert tracker.late == 0
    assert np.array_equal(np.array([d.p for d in said]), offline)
    step = STRIDE_BINS // stride_bins  # windows that are 5 s apart share a chain of beliefs
    for first in range(step):
        p = offline[first::step]
        of, at = np.zeros(len(p), int), WHOLE.t0_ns + 5 * S * (1 + np.arange(len(p)))
        assert model.filter is not None
        assert np.array_equal(np.array([d.belief for d in said[first::step]]), model.filter.run(p, of, at))
    for alarm, on in (
        (AlarmKind.INFECTION, [d.alarm for d in said]),
        (AlarmKind.ACTIVITY, [d.activity_alarm for d in said]),
    ):
        rule = model.find_rule(alarm, stride_bins)
        assert rule is not None
        assert on == apply_alarm_rule(rule, compute_alarm_score(offline, alarm), np.zeros(len(on), int)).tolist()


def feed_with_gaps(trackers: list[VmTracker], seed: int) -> list[list[TrackerStep]]:
    """Feed the same 90 s to some trackers: network readings come and go, and the clock may jump by a minute."""
    rng = np.random.default_rng(seed)
    jump_at, jump_s = int(rng.integers(0, 240)), float(rng.choice([-60.0, 60.0]))  # after 180 it does not jump
    is_silent = np.repeat(rng.random(18) < 0.3, 10)
    sent = np.cumsum(rng.integers(0, 10**5, 180))
    steps: list[list[TrackerStep]] = [[] for _ in trackers]
    for i in range(180):
        mono_s = 0.25 + i / 2
        wall_ns = T0 + round((mono_s + (jump_s if i >= jump_at else 0.0)) * S)
        mono_ns = MONO0 + round(mono_s * S)
        for tracker, seen in zip(trackers, steps, strict=True):
            for source in (SourceKind.PROC, SourceKind.NETFLOW):
                if source is SourceKind.PROC or not is_silent[i]:
                    values = (int(sent[i]),) * len(list_raw_fields(source))
                    tracker.add(source, (wall_ns, mono_ns, i, *values))
            seen += tracker.advance(wall_ns, mono_ns)
    return steps


@pytest.mark.parametrize("kind", [InputKind.TENSOR, InputKind.TABLE])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_live_equals_offline_with_gaps_and_clock_jumps_at_both_strides(kind: InputKind, seed: int) -> None:
    strides = (LIVE_STRIDE_BINS, STRIDE_BINS)
    steps = feed_with_gaps([VmTracker(scorer(kind), stride_bins=stride_bins) for stride_bins in strides], seed)

    for stride_bins, seen in zip(strides, steps, strict=True):
        model = scorer(kind)
        postprocessor, expected = PhasePostprocessor(model, stride_bins=stride_bins), []
        begins = [i for i, step in enumerate(seen) if step.began]
        for begin, end in zip(begins, [*begins[1:], len(seen)], strict=True):
            bins = np.array([step.bin.values for step in seen[begin:end]])
            p, known = model.predict_windows(bins, stride_bins), model.compute_known_share(bins, stride_bins)
            flags = combine_window_flags(
                np.array([step.bin_flags for step in seen[begin:end]], np.uint8), np.zeros(len(p), bool), stride_bins
            )
            t0_ns = seen[begin].bin.end_ns - BIN_NS
            expected += [
                postprocessor.postprocess(
                    j, t0_ns + j * stride_bins * BIN_NS, p[j], known=float(known[j]), flags=int(flags[j])
                )
                for j in range(len(p))
                if known[j] > 0
            ]
        assert decisions(seen) == expected
    live, every_five = (decisions(seen) for seen in steps)
    fields = ("t_start_ns", "t_end_ns", "p", "belief", "phase", "known", "flags")
    assert [[getattr(d, name) for name in fields] for d in live if d.number % 5 == 0] == [
        [getattr(d, name) for name in fields] for d in every_five
    ]


def tick(tracker: VmTracker, at_s: float, wall_s: float | None = None) -> list[TrackerStep]:
    """Add one proc and one network reading, and advance the tracker right after it."""
    wall_ns = T0 + round((at_s if wall_s is None else wall_s) * S)
    mono_ns = MONO0 + round(at_s * S)
    for source in (SourceKind.PROC, SourceKind.NETFLOW):
        n = round(at_s * 2)
        tracker.add(source, (wall_ns, mono_ns, n, *(n for _ in list_raw_fields(source))))
    return tracker.advance(wall_ns, mono_ns)


def test_bins_begin_at_the_first_proc_reading_rounded_up_to_half_a_second() -> None:
    tracker = VmTracker(None)
    tracker.add(SourceKind.QMP, (T0 + 1, 1, 0, *(None for _ in list_raw_fields(SourceKind.QMP))))
    assert tracker.next_close_ns is None

    tick(tracker, 0.25)

    assert tracker.binner is not None
    assert tracker.binner.t0_ns == T0 + S // 2
    assert tracker.next_close_ns == T0 + 2 * S


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0], ids=["forward", "back"])
def test_a_clock_jump_of_an_hour_restarts_the_bins_without_a_flood(jump_s: float) -> None:
    tracker = VmTracker(scorer(), stride_bins=STRIDE_BINS)
    steps: list[TrackerStep] = []
    for i in range(200):
        at_s = 0.25 + i / 2
        steps += tick(tracker, at_s, at_s + (jump_s if i >= 100 else 0.0))

    assert tracker.restarts == 1
    assert len(steps) < 200
    assert [s.bin.number for s in steps if s.began] == [0, 0]
    assert len(decisions(steps)) == 2 * 8
    assert decisions(steps)[-1].known == pytest.approx(1.0)


def test_a_suspended_host_restarts_the_bins() -> None:
    tracker = VmTracker(scorer())
    for i in range(100):
        tick(tracker, 0.25 + i / 2, 0.25 + i / 2 + (28_800.0 if i >= 50 else 0.0))

    assert tracker.restarts == 1


def test_a_small_clock_step_is_flagged_without_a_restart() -> None:
    tracker = VmTracker(scorer(), stride_bins=STRIDE_BINS)
    said: list[PhaseDecision] = []
    for i in range(120):
        at_s = 0.25 + i / 2
        said += decisions(tick(tracker, at_s, at_s + (0.3 if i >= 60 else 0.0)))

    assert tracker.restarts == 0
    assert [d.number for d in said if d.flags & 1] == [4, 5, 6]  # it touches the bins from 29.25 to 30.25 s
    assert said[-1].flags == 0


def test_a_late_reading_is_counted_and_flags_the_windows_it_affects() -> None:
    tracker = VmTracker(scorer(), stride_bins=STRIDE_BINS)
    said: list[PhaseDecision] = []
    for i in range(80):
        said += decisions(tick(tracker, 0.25 + i / 2))
        if i == 35:
            row = (T0 + 15 * S, MONO0 + 15 * S, 999, *(0 for _ in list_raw_fields(SourceKind.QMP)))
            tracker.add(SourceKind.QMP, row)

    assert tracker.late == 1
    assert [d.number for d in said if d.flags & FLAG_LATE] == [2, 3]


def test_a_window_without_known_readings_gets_no_decision() -> None:
    tracker = VmTracker(scorer(), stride_bins=STRIDE_BINS)
    said: list[PhaseDecision] = []
    for i in range(200):
        at_s = 0.25 + i / 2
        wall_ns, mono_ns = T0 + round(at_s * S), MONO0 + round(at_s * S)
        values = (i,) * len(list_raw_fields(SourceKind.PROC))
        tracker.add(SourceKind.PROC, (wall_ns, mono_ns, i, *values))
        if not 60 <= i < 140:
            tracker.add(SourceKind.NETFLOW, (wall_ns, mono_ns, i, *(i for _ in list_raw_fields(SourceKind.NETFLOW))))
        said += decisions(tracker.advance(wall_ns, mono_ns))

    # Silent from 30 to 70 s: a reading is good for 2.5 s more, and a rate needs two.
    assert set(range(18)) - {d.number for d in said} == set(range(7, 13))


def test_conditions_unseen_in_training_are_a_caveat() -> None:
    seen = scorer(trained=TrainingOrigin(accels=("tcg",), archs=("x86_64",)))

    assert seen.caveat("tcg", "x86_64") == ""
    assert "never saw a VM under kvm (only tcg)" in seen.caveat("kvm", "x86_64")
    assert "never saw a VM under an unknown accelerator (only tcg)" in seen.caveat("", "x86_64")
    assert "never saw aarch64" in seen.caveat("tcg", "aarch64")
    assert scorer().caveat("kvm", "riscv64") == ""
    assert "simulated" in scorer(trained=replace_origin("simulated")).caveat("tcg", "x86_64")


def replace_origin(origin: str) -> TrainingOrigin:
    return TrainingOrigin(origins=(origin,))


def test_later_readings_never_change_a_decision() -> None:
    model = scorer()
    run(VmTracker(model))
    asked = model.estimator.asked  # type: ignore[attr-defined]
    whole = replace(WHOLE)

    assert np.array_equal(asked[0][0], bin_episode(whole).bins[:20, [c.full_name in FIVE for c in CHANNELS]].T)


@pytest.mark.parametrize("kind", [InputKind.TENSOR, InputKind.TABLE])
def test_a_model_with_context_sees_the_same_past_live_and_offline(kind: InputKind) -> None:
    spec = InputSpec(
        kind=kind,
        names=FIVE if kind is InputKind.TENSOR else list_table_columns(feature_names(), FIVE, InputVariant.CONTEXT),
        mask="tap",
        schema_hash="5",
        behaviour_fingerprint="b",
        table=InputVariant.CONTEXT,
    )
    live, offline = (scorer(spec=spec, estimator=FakeEstimator(spec)) for _ in range(2))
    expected = offline.predict_windows(bin_episode(WHOLE).bins)

    said = decisions(run(VmTracker(live, stride_bins=STRIDE_BINS)))

    asked = np.stack([x[-1] for x in live.estimator.asked])  # type: ignore[attr-defined]
    whole = offline.estimator.asked[0]  # type: ignore[attr-defined]
    assert len(whole) == 19
    assert np.array_equal(asked, whole, equal_nan=True)
    assert np.array_equal(np.array([d.p for d in said]), expected)


@pytest.mark.parametrize("kind", [InputKind.TENSOR, InputKind.TABLE])
def test_a_model_of_baseline_relative_features_gets_the_baseline_live(kind: InputKind) -> None:
    bins = bin_episode(WHOLE).bins
    places = [i for i, c in enumerate(CHANNELS) if c.full_name in FIVE]
    day = measure_baseline("h", FIVE, bins[:40, places])
    every = list_table_columns(feature_names(), FIVE, InputVariant.COMMISSIONED)
    own = replace(scorer(kind).spec, names=FIVE if kind is InputKind.TENSOR else every)
    plain = scorer(kind, spec=own, estimator=FakeEstimator(own))
    spec = replace(own, table=InputVariant.COMMISSIONED, floors=tuple((name, 0.5) for name in FIVE))
    model = scorer(kind, spec=spec, estimator=FakeEstimator(spec), baseline=day)
    to = build_scaling(day, np.full(len(FIVE), 0.5))

    run(VmTracker(model, stride_bins=STRIDE_BINS))
    plain.predict_windows(bins)

    asked = np.concatenate(model.estimator.asked)  # type: ignore[attr-defined]
    raw = plain.estimator.asked[0]  # type: ignore[attr-defined]
    assert np.array_equal(
        asked, to.scale_bins(raw) if kind is InputKind.TENSOR else to.scale_stats(raw), equal_nan=True
    )
