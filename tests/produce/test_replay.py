"""A replay gives the run's own bins and probabilities, in the order and at the time of a watcher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.produce.small_run import SMALL, playable
from tests.report.fake_run import START_NS, episodes_of

from phasewatch.errors import RunError
from phasewatch.live.events import PhaseSeen, Telemetry
from phasewatch.models.alarm import NEVER, AlarmRule
from phasewatch.produce.replay import Choice, Recording, list_episodes, play, read_recordings, read_rule, with_alarm

FIRST = episodes_of(SMALL)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return playable(tmp_path_factory.mktemp("replay") / "run")


@pytest.fixture
def recording(run: Path) -> Recording:
    return read_recordings(run, [FIRST.episode_id])[0]


def test_every_test_episode_can_be_replayed(run: Path) -> None:
    assert list_episodes(run) == tuple(sorted((e.host_id, e.episode_id) for e in episodes_of(SMALL)))


def test_bins_go_out_as_they_are_when_they_are_complete(recording: Recording) -> None:
    steps = [s for s in play(recording, vm="m", bins_per_event=3) if isinstance(s.data, Telemetry)]
    first = steps[0].data

    assert isinstance(first, Telemetry)
    assert steps[0].at_s == 1.5
    assert (first.vm, first.host, first.origin, first.t0_ns) == ("m", "a-host", "recorded", START_NS)
    assert [row[:3] for row in first.values] == [(None, 0.0, 0.0), (None, 1.0, 1.0), (None, 2.0, 2.0)]
    assert first.masked == (first.channels[0],)
    assert [flag for s in steps for flag in s.data.flags][:5] == [0, 0, 0, 1, 0]  # type: ignore[union-attr]
    assert sum(len(s.data.values) for s in steps) == recording.row.n_bins  # type: ignore[union-attr]


def test_a_window_is_judged_after_its_last_bin_with_the_run_s_own_numbers(recording: Recording) -> None:
    steps = list(play(recording, vm="m"))
    phases = [(i, s) for i, s in enumerate(steps) if isinstance(s.data, PhaseSeen)]

    assert len(phases) == SMALL.n_windows
    for i, step in phases:
        seen = step.data
        assert isinstance(seen, PhaseSeen)
        ended = [s.data.t0_ns + 500_000_000 for s in steps[:i] if isinstance(s.data, Telemetry)]
        assert max(ended) >= seen.t_end_ns
    first = phases[0][1].data
    assert isinstance(first, PhaseSeen)
    assert first.p == tuple(round(float(v), 5) for v in recording.judged.p[0])
    assert (first.t_start_ns, first.t_end_ns) == (START_NS, START_NS + 10**10)
    assert (first.model, first.threat, first.filter, first.alarm) == ("gbt", "realistic", "none", None)


def test_time_never_goes_back(recording: Recording) -> None:
    at = [s.at_s for s in play(recording, vm="m", bins_per_event=4)]

    assert at == sorted(at)


def loud(recording: Recording) -> Recording:
    p = np.zeros((SMALL.n_windows, 5))
    p[:, 0] = 1
    p[1:3] = [0, 0, 0.3, 0.4, 0.3]
    return replace(recording, judged=replace(recording.judged, p=p))


def test_the_alarm_rings_by_the_rule_that_was_fixed_in_training(recording: Recording) -> None:
    ringing = with_alarm(loud(recording), AlarmRule(theta=0.65))

    seen = [s.data for s in play(ringing, vm="m") if isinstance(s.data, PhaseSeen)]

    assert [s.alarm for s in seen] == [
        False,
        False,
        True,
        True,
        True,
        False,
    ]  # two of three raise, three quiet ones end
    assert [s.alarm_since_ns for s in seen] == [None, None, *[seen[2].t_end_ns] * 3, None]
    assert seen[0].threshold == 0.65


def test_a_rule_that_never_rings_says_so(recording: Recording) -> None:
    seen = next(s.data for s in play(with_alarm(loud(recording), AlarmRule(theta=NEVER)), vm="m") if s.is_window)

    assert isinstance(seen, PhaseSeen)
    assert seen.alarm is False
    assert "never rings" in str(seen.caveat)


def test_without_a_checkpoint_no_alarm_is_claimed(recording: Recording, run: Path) -> None:
    assert read_rule(recording, run) is None
    assert next(s.data.alarm for s in play(recording, vm="m") if isinstance(s.data, PhaseSeen)) is None


def test_an_episode_that_is_not_there_is_said_with_those_that_are(run: Path) -> None:
    with pytest.raises(RunError, match=r"no test predictions of episode nothing by gbt \(held_out_host"):
        read_recordings(run, ["nothing"])


def test_a_choice_without_predictions_is_said(run: Path) -> None:
    with pytest.raises(RunError, match="no test predictions by cnn"):
        list_episodes(run, Choice(model="cnn"))


def test_a_run_without_grids_says_what_makes_them(tmp_path: Path) -> None:
    run = playable(tmp_path / "run")
    (run / "grids" / "grids.npy").unlink()

    with pytest.raises(RunError, match="phasewatch validate"):
        read_recordings(run, [FIRST.episode_id])
