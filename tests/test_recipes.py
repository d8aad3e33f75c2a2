"""What each recipe holds out, and what it says when it cannot be built."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from tests.factories.split_episodes import GAP_NS, LASTS_S, PROFILES, corpus, episode

from phasewatch.audit.splits import find_fold_faults, find_partition_faults
from phasewatch.errors import SplitError
from phasewatch.splits import (
    SPLIT_RECIPES,
    Fold,
    SplitEpisode,
    SplitPart,
    assign_random_windows,
    build_folds,
    parse_fold,
    render_fold,
)
from phasewatch.types import Phase

LEARNT = (SplitPart.TRAIN, SplitPart.VAL_A, SplitPart.VAL_B)
BY_EPISODE = [row.name for row in SPLIT_RECIPES if not row.by_window and row.tests]
PARTITIONS = [row.name for row in SPLIT_RECIPES if row.partitions]


def folds(recipe: str, episodes: list[SplitEpisode]) -> tuple[Fold, ...]:
    return build_folds(recipe, episodes, profiles=PROFILES)


def members(fold: Fold, episodes: list[SplitEpisode], *parts: SplitPart) -> list[SplitEpisode]:
    return [e for e in episodes if fold.episodes[e.episode_id] in parts]


@pytest.mark.parametrize("recipe", PARTITIONS)
def test_a_partition_tests_each_episode_exactly_once(recipe: str) -> None:
    episodes = corpus()
    tested = Counter(i for fold in folds(recipe, episodes) for i in fold.ids(SplitPart.TEST))

    assert tested == Counter(e.episode_id for e in episodes)


@pytest.mark.parametrize("recipe", BY_EPISODE)
@pytest.mark.parametrize("seed", range(3))
def test_the_audit_finds_no_fault_even_among_near_duplicates(recipe: str, seed: int) -> None:
    episodes = corpus()
    for i in range(4):  # a run under another name, on another host, with another sample, half of its rows copied
        one = episodes[(7 * seed + 11 * i) % len(episodes)]
        twin = episode(
            900 + i,
            one.host_id if i % 2 else f"host-{(i + seed) % 4}",
            one.profile,
            group=(one.sample_group + 1) % 4,
            started_ns=one.started_wall_ns + (i % 2) * 40 * GAP_NS,
        )
        episodes.append(
            replace(twin, plan_seed=one.plan_seed) if i % 2 else replace(twin, proc_sketch=one.proc_sketch[:4])
        )
    known = {e.episode_id: e for e in episodes}
    cut = folds(recipe, episodes)

    assert [fault for fold in cut for fault in find_fold_faults(fold, known)] == []
    assert find_partition_faults(cut, known) == []
    if recipe != "held_out_profile":  # a twin is of the same profile, and tested with it
        assert any("near-duplicate" in why for fold in cut for why in fold.embargoed.values())


@pytest.mark.parametrize("recipe", [row.name for row in SPLIT_RECIPES])
def test_the_order_of_episodes_changes_no_byte(recipe: str) -> None:
    episodes = corpus()
    cut = folds(recipe, episodes)

    assert [render_fold(f) for f in cut] == [render_fold(f) for f in folds(recipe, episodes[::-1])]
    assert [parse_fold(render_fold(f), file="f.json") for f in cut] == list(cut)


@pytest.mark.parametrize("recipe", [row.name for row in SPLIT_RECIPES])
def test_coverage_counts_every_episode_once(recipe: str) -> None:
    episodes = corpus()
    for fold in folds(recipe, episodes):
        counts = Counter(fold.episodes.values())

        for part in SplitPart:
            assert sum(getattr(row, part) for row in fold.coverage) == counts[part]
        assert sum(counts.values()) == len(episodes)


def test_a_sample_group_is_tested_and_never_learnt_from() -> None:
    episodes = corpus()
    cut = folds("held_out_sample", episodes)

    assert [f.fold for f in cut] == ["group-0", "group-1", "group-2", "group-3"]
    for number, fold in enumerate(cut):
        assert {e.sample_group for e in members(fold, episodes, SplitPart.TEST)} == {number}
        assert number not in {e.sample_group for e in members(fold, episodes, *LEARNT)}


def test_both_holds_out_the_host_and_the_group_and_says_of_each_episode_why() -> None:
    episodes = corpus()
    fold = next(f for f in folds("held_out_both", episodes) if f.fold == "host-1.group-2")

    assert {(e.host_id, e.sample_group) for e in members(fold, episodes, SplitPart.TEST)} == {("host-1", 2)}
    learnt = members(fold, episodes, *LEARNT)
    assert not {e.host_id for e in learnt} & {"host-1"}
    assert not {e.sample_group for e in learnt} & {2}
    assert Counter(fold.excluded.values()) == {"is of the tested host": 20, "is of the tested sample group": 12}
    assert set(fold.excluded) == set(fold.ids(SplitPart.EXCLUDED))


def test_in_time_all_that_was_learnt_from_ended_before_the_first_test_episode_began() -> None:
    episodes = corpus()
    (fold,) = folds("held_out_time", episodes)
    tested = members(fold, episodes, SplitPart.TEST)
    first_ns = min(e.started_wall_ns for e in tested)

    assert len(tested) == pytest.approx(0.2 * len(episodes), abs=2)
    assert all(e.started_wall_ns + LASTS_S * 1e9 <= first_ns for e in members(fold, episodes, *LEARNT))
    last = max(e.started_wall_ns for e in members(fold, episodes, SplitPart.TRAIN))
    assert all(e.started_wall_ns > last for e in members(fold, episodes, SplitPart.VAL_A, SplitPart.VAL_B))


def test_an_episode_that_ran_into_the_cut_is_not_learnt_from() -> None:
    episodes = corpus()
    (before,) = folds("held_out_time", episodes)
    first_ns = min(e.started_wall_ns for e in members(before, episodes, SplitPart.TEST))
    late = episode(900, "host-0", started_ns=first_ns - 10**9)
    (fold,) = folds("held_out_time", [*episodes, late])

    assert fold.excluded == {"e900": "began less than the longest episode before the cut"}


def test_a_store_of_a_few_hours_says_that_no_drift_can_be_seen() -> None:
    long = [replace(e, started_wall_ns=e.started_wall_ns * 20) for e in corpus()]

    assert folds("held_out_time", corpus())[0].notes == ("the store spans 0.5 days: no drift can be seen",)
    assert folds("held_out_time", long)[0].notes == ()


def test_a_held_out_profile_is_learnt_from_nowhere_and_the_others_are() -> None:
    episodes = corpus()
    cut = {f.fold: f for f in folds("held_out_profile", episodes)}

    assert sorted(cut) == ["cryptomine", "exfil-drip"]
    assert {e.profile for e in members(cut["cryptomine"], episodes, SplitPart.TEST)} == {"cryptomine"}
    assert {e.profile for e in members(cut["cryptomine"], episodes, *LEARNT)} == {"benign", "exfil-drip"}
    assert cut["cryptomine"].untested_profiles == ("benign", "exfil-drip")


def test_in_distribution_cuts_sessions_into_as_many_folds_as_hosts_and_the_next_validates() -> None:
    episodes = corpus()
    cut = folds("in_distribution", episodes)

    assert [f.fold for f in cut] == ["fold-0", "fold-1", "fold-2", "fold-3"]
    for i, fold in enumerate(cut):
        following = cut[(i + 1) % 4]
        assert set(fold.ids(SplitPart.VAL_A)) | set(fold.ids(SplitPart.VAL_B)) == set(following.ids(SplitPart.TEST))
        assert len(fold.ids(SplitPart.TEST)) == len(episodes) // 4


def test_windows_are_dealt_by_hash_and_each_is_tested_in_one_fold() -> None:
    cut = folds("random_windows", corpus())
    windows = [(f"e{i:03}", t) for i in range(20) for t in range(50)]
    dealt = [assign_random_windows(f.deal, windows) for f in cut if f.deal]

    assert all(f.leaky and f.validation == "windows" for f in cut)
    assert all(sum(parts[i] is SplitPart.TEST for parts in dealt) == 1 for i in range(len(windows)))
    shares = Counter(dealt[0])
    assert shares[SplitPart.TRAIN] == pytest.approx(500, abs=60)
    assert shares[SplitPart.TEST] == pytest.approx(250, abs=50)
    assert shares[SplitPart.VAL_A] == pytest.approx(125, abs=40)


def test_deploy_learns_from_all_and_tests_nothing() -> None:
    episodes = corpus()
    (fold,) = folds("deploy", episodes)

    assert set(fold.episodes.values()) == set(LEARNT)
    assert fold.untested_profiles == PROFILES
    assert "nothing is tested" in fold.asserted


@pytest.mark.parametrize(
    ("recipe", "episodes", "words"),
    [
        pytest.param("held_out_host", corpus(hosts=1), "at least 2 hosts, found only 'host-0'", id="one host"),
        pytest.param("held_out_both", corpus(hosts=1), "at least 2 hosts", id="one host, both"),
        pytest.param("in_distribution", corpus(hosts=2), "needs 3 hosts and found 2", id="two hosts, sessions"),
        pytest.param("random_windows", corpus(hosts=2), "needs 3 hosts and found 2", id="two hosts, windows"),
        pytest.param(
            "held_out_sample",
            [replace(e, sample_group=1) for e in corpus()],
            "at least 2 sample groups, found 1",
            id="one sample group",
        ),
        pytest.param(
            "held_out_time", corpus(hosts=1, sessions=1), "at least 3 lab episodes, found 2", id="two episodes"
        ),
        pytest.param(
            "held_out_profile",
            [e for e in corpus() if e.profile != "exfil-drip"],
            "2 malicious profiles, found 1",
            id="one malicious profile",
        ),
        pytest.param(
            "held_out_profile",
            [replace(e, profile=e.profile.replace("-", "/")) for e in corpus()],
            "2 malicious profiles, found 1",
            id="a profile that is a path",
        ),
        pytest.param("deploy", [], "no lab episode with a known phase", id="nothing at all"),
        pytest.param(
            "deploy", corpus(hosts=1, sessions=2), "each profile needs 2 episodes in train", id="two sessions"
        ),
    ],
)
def test_a_recipe_that_cannot_be_built_says_what_is_missing(
    recipe: str, episodes: list[SplitEpisode], words: str
) -> None:
    with pytest.raises(SplitError, match=words):
        folds(recipe, episodes)


def test_a_profile_of_one_host_cannot_be_tested_there_and_can_elsewhere() -> None:
    """Held out with its host it is taught by nobody; held out by sample it is taught by its other samples."""
    alone = [episode(900 + i, "host-2", "beacon-c2", group=i % 4) for i in range(12)]
    episodes = [*corpus(), *alone]

    assert folds("held_out_host", episodes) == folds("held_out_host", corpus())
    assert {e.episode_id for e in alone} <= set(folds("held_out_sample", episodes)[0].episodes)


def test_phases_without_a_test_episode_are_listed_as_untested() -> None:
    quiet = [replace(e, phases=(Phase.CLEAN, Phase.ACTIVE)) for e in corpus()]

    for recipe in BY_EPISODE:
        assert folds(recipe, quiet)[0].untested_phases == (Phase.ARMED, Phase.INFECTING, Phase.DORMANT)
