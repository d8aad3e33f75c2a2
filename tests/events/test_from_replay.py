"""A replay sends the bins and probabilities of the run in the order and at the times of a watcher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.factories.event_runs import SMALL, playable
from tests.factories.report_runs import START_NS, episodes_of

from phasewatch.errors import RunError
from phasewatch.events.from_replay import (
    ReplayEpisode,
    ReplaySelection,
    add_alarms,
    iter_replay_steps,
    list_episodes,
    read_alarm_rules,
    read_replay_episodes,
)
from phasewatch.events.schema import PhaseEvent, TelemetryEvent
from phasewatch.models.alarm import THETA_NEVER, AlarmKind, AlarmRule

FIRST = episodes_of(SMALL)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return playable(tmp_path_factory.mktemp("replay") / "run")


@pytest.fixture
def recording(run: Path) -> ReplayEpisode:
    return read_replay_episodes(run, [FIRST.episode_id])[0]


def test_every_test_episode_can_be_replayed(run: Path) -> None:
    assert list_episodes(run) == tuple(sorted((e.host_id, e.episode_id) for e in episodes_of(SMALL)))


def test_bins_are_sent_unchanged_when_they_are_complete(recording: ReplayEpisode) -> None:
    steps = [s for s in iter_replay_steps(recording, vm="m", bins_per_event=3) if isinstance(s.data, TelemetryEvent)]
    first = steps[0].data

    assert isinstance(first, TelemetryEvent)
    assert steps[0].at_s == 1.5
    assert (first.vm, first.host, first.origin, first.t0_ns) == ("m", "a-host", "recorded", START_NS)
    assert [row[:3] for row in first.values] == [(None, 0.0, 0.0), (None, 1.0, 1.0), (None, 2.0, 2.0)]
    assert first.masked == (first.channels[0],)
    assert [flag for s in steps for flag in s.data.flags][:5] == [0, 0, 0, 1, 0]  # type: ignore[union-attr]
    assert sum(len(s.data.values) for s in steps) == recording.row.n_bins  # type: ignore[union-attr]


def test_prediction_follows_the_last_bin_of_its_window(recording: ReplayEpisode) -> None:
    steps = list(iter_replay_steps(recording, vm="m"))
    phases = [(i, s) for i, s in enumerate(steps) if isinstance(s.data, PhaseEvent)]

    assert len(phases) == SMALL.n_windows
    for i, step in phases:
        seen = step.data
        assert isinstance(seen, PhaseEvent)
        ended = [s.data.t0_ns + 500_000_000 for s in steps[:i] if isinstance(s.data, TelemetryEvent)]
        assert max(ended) >= seen.t_end_ns
    first = phases[0][1].data
    assert isinstance(first, PhaseEvent)
    assert first.p == tuple(round(float(v), 5) for v in recording.predictions.p[0])
    assert (first.t_start_ns, first.t_end_ns) == (START_NS, START_NS + 10**10)
    assert (first.model, first.threat, first.filter, first.alarm) == ("gbt", "realistic", "none", None)


def test_events_are_in_order_of_time(recording: ReplayEpisode) -> None:
    at = [s.at_s for s in iter_replay_steps(recording, vm="m", bins_per_event=4)]

    assert at == sorted(at)


def with_active_windows(recording: ReplayEpisode) -> ReplayEpisode:
    p = np.zeros((SMALL.n_windows, 5))
    p[:, 0] = 1
    p[1:3] = [0, 0, 0.3, 0.4, 0.3]
    return replace(recording, predictions=replace(recording.predictions, p=p))


def make_rule(kind: AlarmKind, theta: float, *, stride_s: int = 5) -> AlarmRule:
    return AlarmRule(kind=kind, stride_s=stride_s, theta=theta, k=2, n=3)


def test_alarm_follows_the_rule_of_the_model(recording: ReplayEpisode) -> None:
    ringing = add_alarms(with_active_windows(recording), [make_rule(AlarmKind.ACTIVITY, 0.65)])

    seen = [s.data for s in iter_replay_steps(ringing, vm="m") if isinstance(s.data, PhaseEvent)]

    # Two active windows of three raise the alarm, three quiet ones end it.
    assert [s.activity_alarm for s in seen] == [False, False, True, True, True, False]
    assert [s.activity_alarm_since_ns for s in seen] == [None, None, *[seen[2].t_end_ns] * 3, None]
    assert [s.alarm_changes for s in seen] == [(), (), ("activity",), (), (), ("activity",)]
    assert seen[0].activity_threshold == 0.65
    assert {s.alarm for s in seen} == {None}


def test_infection_alarm_follows_the_probability_of_infecting_alone(recording: ReplayEpisode) -> None:
    rules = [make_rule(AlarmKind.INFECTION, 0.3), make_rule(AlarmKind.INFECTION, 0.1, stride_s=1)]
    alarmed = add_alarms(with_active_windows(recording), rules)

    seen = [s.data for s in iter_replay_steps(alarmed, vm="m") if isinstance(s.data, PhaseEvent)]

    assert [s.alarm for s in seen] == [False, False, True, True, True, False]
    assert seen[0].threshold == 0.3


def test_rule_that_never_raises_has_a_caveat(recording: ReplayEpisode) -> None:
    seen = next(
        s.data
        for s in iter_replay_steps(
            add_alarms(with_active_windows(recording), [make_rule(AlarmKind.INFECTION, THETA_NEVER)]), vm="m"
        )
        if s.is_window
    )

    assert isinstance(seen, PhaseEvent)
    assert seen.alarm is False
    assert "never raised" in str(seen.caveat)


def test_alarm_is_unknown_without_a_checkpoint(recording: ReplayEpisode, run: Path) -> None:
    assert read_alarm_rules(recording, run) == ()
    assert next(s.data.alarm for s in iter_replay_steps(recording, vm="m") if isinstance(s.data, PhaseEvent)) is None


def test_window_without_a_label_has_no_true_phase(recording: ReplayEpisode) -> None:
    y_true = np.full(SMALL.n_windows, -1)
    unlabelled = replace(recording, predictions=replace(recording.predictions, y_true=y_true))

    truths = [s.data.truth for s in iter_replay_steps(unlabelled, vm="m") if isinstance(s.data, PhaseEvent)]

    assert truths == [None] * SMALL.n_windows


def test_unknown_episode_is_an_error(run: Path) -> None:
    with pytest.raises(RunError, match=r"no test predictions of episode nothing by gbt \(held_out_host"):
        read_replay_episodes(run, ["nothing"])


def test_selection_without_predictions_is_an_error(run: Path) -> None:
    with pytest.raises(RunError, match="no test predictions by cnn"):
        list_episodes(run, ReplaySelection(model="cnn"))


def test_run_without_bins_is_an_error_with_the_command(tmp_path: Path) -> None:
    run = playable(tmp_path / "run")
    (run / "grids" / "grids.npy").unlink()

    with pytest.raises(RunError, match="phasewatch validate"):
        read_replay_episodes(run, [FIRST.episode_id])
