"""Checks of the claims of a fold: a recipe that breaks one is refused before any training."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.factories.split_episodes import PROFILES, corpus

from phasewatch.errors import SplitError
from phasewatch.splits import SplitPart, build_folds
from phasewatch.splits.build import check_fold, check_partition
from phasewatch.splits.recipes import FoldPlan, find_recipe


def test_a_partition_that_tests_an_episode_twice_is_caught() -> None:
    lab = corpus(hosts=2, sessions=2)
    twice = [FoldPlan(fold=name, test=frozenset(e.episode_id for e in lab)) for name in ("a", "b")]

    with pytest.raises(SplitError, match="e000 is tested 2 times, expected once"):
        check_partition(find_recipe("held_out_host"), twice, lab)


def test_a_fold_whose_test_set_was_learnt_from_is_caught_by_every_claim_that_it_breaks() -> None:
    lab = corpus(hosts=2, sessions=2)
    parts = {e.episode_id: list(SplitPart)[n % 4] for n, e in enumerate(lab)}

    with pytest.raises(SplitError, match=r"no host of the test set was learnt from|share no session"):
        check_fold(find_recipe("held_out_host"), lab, parts, "sessions")


def test_where_every_other_episode_is_a_twin_of_the_test_set_nothing_can_validate() -> None:
    twins = [replace(e, proc_sketch=(7,)) for e in corpus(hosts=2)]

    with pytest.raises(SplitError, match="validation needs 2 sessions outside the test set, found 0"):
        build_folds("held_out_host", twins, profiles=PROFILES)


def test_a_host_without_episodes_of_a_group_has_no_fold_for_the_two() -> None:
    lab = [e for e in corpus() if (e.host_id, e.sample_group) != ("host-0", 1)]

    cut = {fold.fold for fold in build_folds("held_out_both", lab, profiles=PROFILES)}

    assert len(cut) == 15
    assert not any(name.startswith("host-0") and name.endswith("1") for name in cut)
