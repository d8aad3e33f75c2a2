"""Odd episodes of one host cost no recipe, and no other host's fold a byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.factories.split_episodes import GAP_NS, PROFILES, corpus, episode

from phasewatch.identity import find_contested_ids
from phasewatch.splits import SPLIT_RECIPES, Fold, SetAsideCode, SplitEpisode, SplitPart, build_split, prepare_split

ALL = [row.name for row in SPLIT_RECIPES]
BY_HOST = ("held_out_host", "held_out_both")


def cut(recipe: str, episodes: list[SplitEpisode]) -> tuple[Fold, ...]:
    return build_split(recipe, prepare_split(episodes), profiles=PROFILES).folds


def codes(episodes: list[SplitEpisode]) -> dict[str, SetAsideCode]:
    return {a.episode_id: a.code for a in prepare_split(episodes).set_aside}


def named(e: SplitEpisode, *, profile: str = "", sample: str = "") -> SplitEpisode:
    return replace(e, profile=profile or e.profile, sample_name=sample or e.sample_name)


ODD = {
    "one episode of a new profile": ([episode(900, "evil", "zzz-evil")], SetAsideCode.RARE),
    "one episode of it on a known host": ([episode(900, "host-1", "zzz-evil")], SetAsideCode.RARE),
    "a profile like a path": ([episode(n, "evil", "a/b") for n in (900, 901, 902)], SetAsideCode.NAME),
    "a profile that climbs": ([episode(n, "evil", "..") for n in (900, 901)], SetAsideCode.NAME),
    "a huge profile name": ([episode(n, "evil", "x" * 200) for n in (900, 901)], SetAsideCode.NAME),
    "a hidden profile": ([episode(n, "evil", ".git") for n in (900, 901)], SetAsideCode.NAME),
    "an option for a name": ([episode(n, "evil", "--out") for n in (900, 901)], SetAsideCode.NAME),
    "a device for a name": ([episode(n, "evil", "con") for n in (900, 901)], SetAsideCode.NAME),
    "a sample like a path": ([named(episode(900, "evil"), sample="../x")], SetAsideCode.NAME),
    "a registered profile in other letters": (
        [episode(n, "evil", "Benign") for n in (900, 901)],
        SetAsideCode.LOOK_ALIKE,
    ),
    "a registered profile with a space": (
        [episode(n, "evil", "crypto mine") for n in (900, 901)],
        SetAsideCode.LOOK_ALIKE,
    ),
    "a copy of another host's rows": ([episode(900, "evil", sketch=tuple(range(8)))], SetAsideCode.COPY),
    "half a copy": ([episode(900, "evil", sketch=(0, 1, 2, 3, 9000, 9001, 9002, 9003))], SetAsideCode.COPY),
}


@pytest.mark.parametrize("recipe", ALL)
@pytest.mark.parametrize("odd", ODD)
def test_unusable_episode_is_set_aside_and_changes_no_fold(odd: str, recipe: str) -> None:
    poison, code = ODD[odd]
    episodes = [*corpus(), *poison]

    assert codes(episodes) == {e.episode_id: code for e in poison}
    assert cut(recipe, episodes) == cut(recipe, corpus())


def test_one_host_that_keeps_a_new_profile_to_itself_loses_it_where_the_host_is_held_out() -> None:
    own = [episode(900 + n, "host-1", "zzz", group=n % 4, session=f"own-{n}") for n in range(12)]

    for recipe in BY_HOST:
        made = build_split(recipe, prepare_split([*corpus(), *own]), profiles=PROFILES)

        assert {a.episode_id: a.code for a in made.set_aside} == {e.episode_id: SetAsideCode.NOT_IN_TRAIN for e in own}
        assert made.folds == cut(recipe, corpus())


@pytest.mark.parametrize("recipe", [name for name in ALL if name != "random_windows"])
@pytest.mark.parametrize(
    "poison",
    [
        pytest.param({"plan_seed": 1000}, id="the plan seed of another host"),
        pytest.param({"session": "h0s0"}, id="the session of another host"),
        pytest.param({"session": "h0s0", "plan_seed": 1000}, id="both"),
    ],
)
def test_what_another_host_claims_embargoes_nothing(poison: dict[str, object], recipe: str) -> None:
    claimed = episode(900, "host-3", group=3, started_ns=GAP_NS, **poison)  # type: ignore[arg-type]
    for fold in cut(recipe, [*corpus(), claimed]):
        sessions = {e.session_key for e in corpus() if fold.episodes[e.episode_id] is SplitPart.TEST}

        for episode_id, why in fold.embargoed.items():
            whole = next((e for e in corpus() if e.episode_id == episode_id), claimed)
            assert whole.session_key in sessions or whole is claimed, why


def test_a_host_of_one_episode_spares_no_host_from_validating() -> None:
    alone = episode(900, "host-0-evil")  # in sorted order the next after host-0
    folds = {fold.fold: fold for fold in cut("held_out_host", [*corpus(), alone])}

    assert folds["host-0"].validation == "host:host-1"
    assert folds["host-0-evil"].ids(SplitPart.TEST) == ("e900",)
    for name in ("host-0", "host-1", "host-2", "host-3"):
        before = next(f for f in cut("held_out_host", corpus()) if f.fold == name)
        assert {i: p for i, p in folds[name].episodes.items() if i != "e900"} == before.episodes


def test_one_very_long_episode_empties_no_other_hosts_training_set_before_the_cut_in_time() -> None:
    long = replace(episode(900, "host-3", started_ns=0), duration_s=100 * 100.0)
    (fold,) = cut("held_out_time", [*corpus(), long])
    (before,) = cut("held_out_time", corpus())

    assert {i for i in fold.excluded if i != "e900"} - {e.episode_id for e in corpus() if e.host_id == "host-3"} == set(
        before.excluded
    )


def test_where_two_hosts_are_copies_of_each_other_nobody_is_named_and_the_embargo_holds() -> None:
    copies = [
        replace(e, host_id="zz", episode_id=f"z{e.episode_id}", session=f"z{e.session}")
        for e in corpus()
        if e.host_id == "host-0"
    ]
    episodes = [*corpus(), *copies]
    folds = {fold.fold: fold for fold in cut("held_out_host", episodes)}

    assert codes(episodes) == {}
    assert set(folds["host-0"].embargoed) == {e.episode_id for e in copies}


def test_a_copier_with_many_episodes_of_its_own_does_not_push_a_host_out() -> None:
    copies = [
        replace(e, host_id="zz", episode_id=f"z{e.episode_id}", session=f"z{e.session}")
        for e in corpus()
        if e.host_id == "host-0"
    ]
    own = [episode(900 + n, "zz", session=f"own{n}") for n in range(60)]

    assert not {i for i in codes([*corpus(), *copies, *own]) if not i.startswith("z")}


@pytest.mark.parametrize(
    ("pairs", "taken"),
    [
        pytest.param([("a", "1"), ("a", "2"), ("b", "3")], set(), id="nobody claims twice"),
        pytest.param([*(("a", str(n)) for n in range(20)), ("b", "3")], {("b", "3")}, id="the host with more keeps it"),
        pytest.param([("a", "1"), ("b", "1")], {("a", "1"), ("b", "1")}, id="of two equal hosts neither"),
        pytest.param(
            [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2"), *(("b", f"own-{n}") for n in range(9))],
            {("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")},
            id="nor a host that claims much of what others hold",
        ),
    ],
)
def test_an_episode_id_of_two_hosts_is_left_once_at_most(
    pairs: list[tuple[str, str]], taken: set[tuple[str, str]]
) -> None:
    assert find_contested_ids(pairs) == taken
    assert find_contested_ids(reversed(pairs)) == taken
