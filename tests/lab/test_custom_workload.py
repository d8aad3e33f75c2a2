"""Custom workloads: checks of the profile file, the sessions drawn from it, and the sources of its image."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from phasewatch.errors import PlanError
from phasewatch.lab import guest_image
from phasewatch.lab.custom_workload import (
    CustomWorkload,
    build_custom_sessions,
    build_unscripted_workload,
    parse_workload,
)
from phasewatch.lab.plan import RecordingSession
from phasewatch.lab.plan_checks import check_plan
from phasewatch.naming import make_profile_name
from phasewatch.types import Phase, SampleKind

DOCS = Path(__file__).parents[2] / "docs" / "how-to"
SMALL = """
name = "mine"
[[samples]]
name = "one"
knobs = {duty = [0.1, 0.5]}
phases = {active = "while :; do :; done"}
[[samples]]
name = "two"
[recording]
episodes = 12
benign_share = 0.25
"""


def block_of(page: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def parsed(text: str = SMALL) -> CustomWorkload:
    return parse_workload(text, where="mine.toml")


def slots_of(sessions: tuple[RecordingSession, ...]) -> list[tuple[str, str]]:
    return [(slot.profile, slot.sample_name) for session in sessions for slot in session.slots]


def test_example_of_the_docs_is_valid_and_time_predicts_little() -> None:
    work = parse_workload(block_of("own-profile.md", "toml"), where="own-profile.md")

    assert [sample.name for sample in work.profile.samples] == ["slow", "fast"]
    assert work.scripts["slow", Phase.ARMED].startswith("head -c 200000")
    assert check_plan(work.spec)[0].value < 0.25


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        pytest.param("episodes", "epsiodes", r"unknown field `epsiodes`.*did you mean episodes", id="an unknown key"),
        pytest.param("phases = {", "fases = {", r"`fases`.*did you mean phases", id="an unknown key of a sample"),
        pytest.param("episodes = 12", "xyzzy = 12", r"`xyzzy`.*it is one of .*agent_share", id="nothing near"),
        pytest.param('name = "mine"', "", "missing required field `name`", id="no name"),
        pytest.param('"mine"', '"Mine!"', "a-z, 0-9 and dash", id="a name that cannot be"),
        pytest.param('"mine"', '"benign"', "a profile of phasewatch", id="a name that is taken"),
        pytest.param('"two"', '"one"', "with different names", id="a sample twice"),
        pytest.param("[0.1, 0.5]", "[0.5, 0.1]", "expected 0 < lowest <= highest", id="a range upside down"),
        pytest.param("duty", "PATH", "a-z, 0-9 and underscore", id="a knob that would be a variable of the shell's"),
        pytest.param("duty", "seed", "a variable of that name is set already", id="a knob in the place of the seed"),
        pytest.param("episodes = 12", "episodes = 0", "episodes: 0, expected 1 to 10000", id="no episode"),
        pytest.param("episodes = 12", "episodes = 20000", "episodes: 20000, expected 1 to", id="too many episodes"),
        pytest.param("active =", "sleeping =", "Invalid enum value 'sleeping'", id="an unknown phase"),
        pytest.param("active =", "unknown =", "phases: unknown: only clean, armed", id="a phase that none can play"),
        pytest.param('name = "mine"', 'name = "mine"\nkind = "benign"', "only clean", id="benign that is active"),
        pytest.param("episodes = 12", 'hosts = ["qp"]', "it is one of .*pc", id="an unknown host"),
        pytest.param("benign_share = 0.25", "benign_share = 2", "recording: benign_share", id="more than all"),
        pytest.param("[recording]", "[recording", "not TOML", id="not TOML"),
    ],
)
def test_invalid_profile_file_is_refused_with_its_reason(old: str, new: str, says: str) -> None:
    assert old in SMALL

    with pytest.raises(PlanError, match=rf"^mine\.toml: .*{says}"):
        parsed(SMALL.replace(old, new, 1))


def test_samples_alternate_and_the_benign_share_is_kept() -> None:
    played = slots_of(build_custom_sessions(parsed()))

    assert len(played) == 12
    assert played.count(("benign", "idle")) == 3
    assert abs(played.count(("mine", "one")) - played.count(("mine", "two"))) <= 1


def test_pairs_have_the_same_sample() -> None:
    sessions = build_custom_sessions(parsed())

    assert {len(session.slots) for session in sessions} <= {1, 2}
    assert max(len(session.slots) for session in sessions) == 2
    assert all(len({(slot.profile, slot.sample_name) for slot in session.slots}) == 1 for session in sessions)


def test_no_timeline_repeats_and_draws_are_deterministic() -> None:
    sessions = build_custom_sessions(parsed())
    slots = [slot for session in sessions for slot in session.slots]

    assert sessions == build_custom_sessions(parsed())
    assert len({slot.plan_seed for slot in slots}) == len(slots)
    assert len({slot.phases for slot in slots if slot.profile == "mine"}) == 9
    assert all(0.1 <= dict(slot.knobs)["duty"] <= 0.5 for slot in slots if slot.sample_name == "one")


def test_benign_workload_is_always_clean() -> None:
    work = parsed(SMALL.replace('"mine"', '"build-farm"\nkind = "benign"').replace("active", "clean"))
    slots = [slot for session in build_custom_sessions(work) for slot in session.slots]

    assert {slot.sample_kind for slot in slots} == {SampleKind.BENIGN}
    assert {slot.profile for slot in slots} == {"build-farm"}
    assert {phase for slot in slots for phase, _ in slot.phases} == {Phase.CLEAN}


def test_unscripted_workload_is_one_live_sample_recorded_alone() -> None:
    sessions = build_custom_sessions(
        build_unscripted_workload(make_profile_name("my-bot")), hosts=("my-server",), alone=True
    )

    assert {session.host_id for session in sessions} == {"my-server"}
    assert {len(session.slots) for session in sessions} == {1}
    assert {slot.sample_kind for s in sessions for slot in s.slots if slot.profile == "my-bot"} == {SampleKind.LIVE}
    assert not any(slot.agent for session in sessions for slot in session.slots)


def test_scripts_replace_the_built_in_profiles_in_the_guest_image() -> None:
    assert "malware.c" in guest_image.GUEST_SOURCES
    assert "custom.c" not in guest_image.GUEST_SOURCES
    assert set(guest_image.CUSTOM_GUEST_SOURCES) ^ set(guest_image.GUEST_SOURCES) == {"malware.c", "custom.c"}
