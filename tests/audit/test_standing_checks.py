"""Standing checks of a corpus: states, intervals, and routines that a held-out sample group holds out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.factories.split_episodes import episode
from tools import standing_checks
from tools.recordings import RecordedEpisode, read_episodes
from tools.results import table
from tools.standing_checks import CheckState

from phasewatch.dataset.split_files import compute_sample_group
from phasewatch.lab.plan import build_sessions
from phasewatch.lab.plans import read_plan
from phasewatch.profiles.malicious import ROUTINES
from phasewatch.simulate import simulate
from phasewatch.splits import TRAINING_PARTS, SplitPart, build_folds
from phasewatch.types import EpisodeRole
from phasewatch.validate.sweep import sweep
from phasewatch.validate.verdict import BundleVerdict


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[BundleVerdict, ...], tuple[RecordedEpisode, ...]]:
    folder = tmp_path_factory.mktemp("checks")
    store, run = folder / "store", folder / "run"
    simulate(store, episodes=16, hosts=2, seed=3, between_s=(60, 70))
    verdicts = sweep(store, run, workers=1).verdicts
    return verdicts, read_episodes(store, run, verdicts)


def test_counts_below_their_limit_are_in_part(
    made: tuple[tuple[BundleVerdict, ...], tuple[RecordedEpisode, ...]],
) -> None:
    checks = {c.about: c for c in standing_checks.check_counts(*made)}

    assert checks["accepted lab episodes"].state is CheckState.PART
    assert checks["size of all bundles"].state is CheckState.MET
    assert checks["accepted lab episodes"].limit == "at least 240"


def test_every_check_has_a_limit_and_a_state(
    made: tuple[tuple[BundleVerdict, ...], tuple[RecordedEpisode, ...]],
) -> None:
    counts, shortcuts = standing_checks.check_counts(*made), standing_checks.check_shortcuts(made[1], ())
    page = standing_checks.render_checks(counts, shortcuts, table)

    assert shortcuts[0].state is CheckState.NOT_ASKED
    assert all(c.limit and str(c.state) in page for c in (*counts, *shortcuts))


@pytest.mark.parametrize(
    ("value", "drawn", "state"),
    [
        (0.52, [0.4, 0.6], CheckState.MET),
        (0.60, [0.45, 0.75], CheckState.OPEN),
        (0.90, [0.85, 0.95], CheckState.NOT_MET),
        (None, [], CheckState.NOT_ASKED),
    ],
)
def test_an_area_far_from_chance_fails_only_if_its_interval_does(
    value: float | None, drawn: list[float], state: CheckState
) -> None:
    assert standing_checks._check_area("x", value, drawn, 0.05).state is state


@pytest.mark.parametrize("recipe", ["held_out_sample", "held_out_both"])
def test_a_sample_group_that_is_held_out_holds_out_its_infection_routines(recipe: str) -> None:
    slots = [
        (slot, session.session)
        for session in build_sessions(read_plan("lab-v2"))
        for slot in session.slots
        if slot.role is EpisodeRole.LAB
    ]
    episodes = [
        replace(
            episode(i, slot.host_id, slot.profile, group=compute_sample_group(slot.profile, slot.sample_name)),
            session=session,
        )
        for i, (slot, session) in enumerate(slots)
    ]
    routines = {e.episode_id: slot.routine for e, (slot, _) in zip(episodes, slots, strict=True)}

    folds = build_folds(recipe, episodes, profiles=("benign",))

    assert {r for r in routines.values() if r} == {row.name for row in ROUTINES}
    for fold in folds:
        tested = {routines[i] for i in fold.ids(SplitPart.TEST)} - {""}
        learnt = {routines[i] for part in TRAINING_PARTS for i in fold.ids(part)} - {""}
        assert not tested & learnt
