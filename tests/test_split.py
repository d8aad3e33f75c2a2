"""Who is in which set, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phasewatch.errors import RunError, SplitError, UsageError
from phasewatch.splits import (
    Fold,
    SetAsideCode,
    SplitEpisode,
    SplitPart,
    build_folds,
    build_split,
    find_near_duplicates,
    parse_fold,
    prepare_split,
    render_fold,
)
from phasewatch.types import PHASES, EpisodeRole, Phase

PROFILES = ("benign", "cryptomine", "exfil-drip")


def episode(
    number: int,
    host: str,
    profile: str = "benign",
    *,
    session: str | None = None,
    role: EpisodeRole = EpisodeRole.LAB,
    plan_seed: int | None = None,
    sketch: tuple[int, ...] | None = None,
    phases: tuple[Phase, ...] = PHASES,
) -> SplitEpisode:
    return SplitEpisode(
        episode_id=f"e{number:03}",
        host_id=host,
        profile=profile,
        sample_name="one",
        sample_group=0,
        session=session or f"s{number:03}",
        role=role,
        agent=False,
        plan_seed=1000 + number if plan_seed is None else plan_seed,
        proc_sketch=tuple(range(100 * number, 100 * number + 8)) if sketch is None else sketch,
        started_wall_ns=number,
        phases=phases,
    )


def corpus(hosts: int = 4, sessions: int = 6) -> list[SplitEpisode]:
    """Each session runs a benign machine beside a malicious one."""
    made: list[SplitEpisode] = []
    for h in range(hosts):
        for s in range(sessions):
            for profile in ("benign", ("cryptomine", "exfil-drip")[s % 2]):
                made.append(episode(len(made), f"host-{h}", profile, session=f"h{h}s{s}"))
    return made


def folds(episodes: list[SplitEpisode]) -> dict[str, Fold]:
    return {f.fold: f for f in build_folds("held_out_host", episodes, profiles=PROFILES)}


def hosts_of(fold: Fold, part: SplitPart, episodes: list[SplitEpisode]) -> set[str]:
    return {e.host_id for e in episodes if fold.episodes.get(e.episode_id) is part}


def test_each_host_is_tested_once_and_never_learnt_from() -> None:
    episodes = corpus()
    cut = folds(episodes)

    assert sorted(cut) == ["host-0", "host-1", "host-2", "host-3"]
    for name, fold in cut.items():
        assert hosts_of(fold, SplitPart.TEST, episodes) == {name}
        assert all(name not in hosts_of(fold, p, episodes) for p in (SplitPart.TRAIN, SplitPart.VAL_A, SplitPart.VAL_B))
    assert sorted(i for f in cut.values() for i in f.ids(SplitPart.TEST)) == sorted(e.episode_id for e in episodes)


def test_the_next_host_in_sorted_order_validates_round_the_end() -> None:
    cut = folds(corpus())

    assert {name: fold.validation for name, fold in cut.items()} == {
        "host-0": "host:host-1",
        "host-1": "host:host-2",
        "host-2": "host:host-3",
        "host-3": "host:host-0",
    }


def test_validation_is_halved_by_session() -> None:
    episodes = corpus()
    fold = folds(episodes)["host-0"]
    a, b = (
        {e.session for e in episodes if fold.episodes[e.episode_id] is p} for p in (SplitPart.VAL_A, SplitPart.VAL_B)
    )

    assert len(a) == len(b) == 3
    assert not a & b


def test_with_two_hosts_a_share_of_the_other_sessions_validates_and_the_file_says_so() -> None:
    episodes = corpus(hosts=2, sessions=8)
    fold = folds(episodes)["host-0"]

    assert fold.validation == "sessions"
    assert len(fold.ids(SplitPart.VAL_A)) == len(fold.ids(SplitPart.VAL_B)) == 2  # one session of two machines each
    assert hosts_of(fold, SplitPart.TRAIN, episodes) == {"host-1"}


def test_with_one_host_it_says_what_is_missing() -> None:
    with pytest.raises(SplitError, match=r"at least 2 hosts, found only 'host-0'"):
        folds(corpus(hosts=1))


def test_commissioning_soak_and_unknown_phase_are_in_no_set() -> None:
    others = [
        episode(900, "host-0", role=EpisodeRole.COMMISSION),
        episode(901, "host-1", role=EpisodeRole.SOAK),
        episode(902, "host-1", phases=()),
    ]
    fold = folds([*corpus(), *others])["host-0"]

    assert not {e.episode_id for e in others} & set(fold.episodes)


def test_what_ran_beside_the_test_set_on_another_host_is_embargoed_if_both_say_so() -> None:
    lab = [replace(e, neighbours=("e900",)) if e.episode_id == "e000" else e for e in corpus()]
    fold = folds([*lab, replace(episode(900, "host-2", session="h0s0"), neighbours=("e000",))])["host-0"]

    assert fold.embargoed == {"e900": "shares session h0s0 with the test set"}
    assert fold.episodes["e900"] is SplitPart.EMBARGOED


@pytest.mark.parametrize("neighbours", [(), ("e000",)], ids=["a name alone", "one side alone"])
def test_a_session_name_of_another_host_takes_nothing_from_that_host(neighbours: tuple[str, ...]) -> None:
    fold = folds([*corpus(), replace(episode(900, "host-2", session="h0s0"), neighbours=neighbours)])["host-0"]

    assert fold.embargoed == {}


@pytest.mark.parametrize(
    ("twin", "is_embargoed"),
    [
        pytest.param({"plan_seed": 1000}, False, id="equal plan seed of another host"),
        pytest.param({"sketch": (0, 1, 2, 3, 9, 9001, 9002, 9003)}, True, id="half of the sketch in common"),
        pytest.param({"sketch": (0, 1, 2, 9000, 9001, 9002, 9003, 9004)}, False, id="less than half"),
        pytest.param({"sketch": (0, 1)}, True, id="the smaller sketch counts"),
        pytest.param({"sketch": ()}, False, id="no sketch, no likeness"),
    ],
)
def test_a_near_duplicate_of_the_test_set_is_embargoed(twin: dict[str, object], is_embargoed: bool) -> None:
    fold = folds([*corpus(), episode(900, "host-2", **twin)])["host-0"]  # type: ignore[arg-type]

    assert ("e900" in fold.embargoed) is is_embargoed


def test_near_duplicates_are_mutual() -> None:
    near = find_near_duplicates([episode(1, "a"), episode(2, "a", plan_seed=1001), episode(3, "a")])

    assert near.find_twins(["e001"], frozenset({"e002", "e003"})) == {"e001": "e002"}
    assert near.find_twins(["e002"], frozenset({"e001", "e003"})) == {"e002": "e001"}
    assert near.find_twins(["e003"], frozenset({"e001", "e002"})) == {}


def test_episodes_without_a_plan_are_no_near_duplicates() -> None:
    near = find_near_duplicates([episode(1, "a", plan_seed=0), episode(2, "a", plan_seed=0)])

    assert near.find_twins(["e001"], frozenset({"e002"})) == {}


def test_a_profile_that_a_fold_could_not_learn_is_set_aside_and_the_folds_are_those_without_it() -> None:
    rare = [episode(900, "host-0", "dropper"), episode(901, "host-2", "dropper")]
    made = build_split("held_out_host", prepare_split([*corpus(), *rare]), profiles=PROFILES)

    assert [(a.episode_id, a.code, a.recipes) for a in made.set_aside] == [
        ("e900", SetAsideCode.NOT_IN_TRAIN, ("held_out_host",)),
        ("e901", SetAsideCode.NOT_IN_TRAIN, ("held_out_host",)),
    ]
    assert made.folds == build_folds("held_out_host", corpus(), profiles=PROFILES)


def test_a_store_of_which_most_hosts_could_not_be_tested_is_refused_by_name() -> None:
    own = [replace(e, profile=e.host_id) if e.profile != "benign" else e for e in corpus()]  # each host its own malware

    with pytest.raises(SplitError, match=r"fold host-\d: each profile needs 2 episodes in train, but host-\d has 0"):
        folds(own)


def test_episode_id_that_occurs_twice_is_refused() -> None:
    episodes = corpus()

    with pytest.raises(SplitError, match="e000 occurs twice"):
        folds([*episodes, replace(episodes[0], host_id="host-3")])


def test_fold_lists_untested_profiles_and_phases() -> None:
    quiet = [e if e.host_id != "host-0" else replace(e, phases=(Phase.CLEAN, Phase.ACTIVE)) for e in corpus()]
    fold = build_folds("held_out_host", quiet, profiles=(*PROFILES, "beacon-c2"))[0]

    assert fold.untested_profiles == ("beacon-c2",)
    assert fold.untested_phases == (Phase.ARMED, Phase.INFECTING, Phase.DORMANT)


def test_coverage_counts_every_episode_once() -> None:
    episodes = corpus()
    fold = folds(episodes)["host-0"]
    row = next(c for c in fold.coverage if (c.host_id, c.profile) == ("host-0", "benign"))

    assert (row.train, row.val_a, row.val_b, row.test, row.embargoed) == (0, 0, 0, 6, 0)
    assert sum(c.train + c.val_a + c.val_b + c.test + c.embargoed for c in fold.coverage) == len(episodes)


def test_the_order_of_episodes_changes_no_byte() -> None:
    episodes = corpus()

    assert [render_fold(f) for f in folds(episodes).values()] == [
        render_fold(f) for f in folds(episodes[::-1]).values()
    ]


def test_fold_file_is_read_as_it_was_written_and_an_edited_one_is_refused() -> None:
    fold = folds(corpus())["host-0"]
    data = render_fold(fold)

    assert parse_fold(data, file="f.json") == fold
    with pytest.raises(RunError, match=r"f\.json: the digest does not match"):
        parse_fold(data.replace(b'"e000": "test"', b'"e000": "train"'), file="f.json")
    with pytest.raises(RunError, match=r"f\.json: not a split"):
        parse_fold(b"{}", file="f.json")
    with pytest.raises(RunError, match=r"f\.json: not a split"):
        parse_fold(data.replace(b"held_out_host", b"held_\xff_host"), file="f.json")


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean held_out_host"):
        build_folds("held_out_hosts", corpus(), profiles=PROFILES)
