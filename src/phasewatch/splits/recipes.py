"""How a split holds out: the table of recipes, and how each cuts the episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from phasewatch.errors import SplitError, UsageError, suggest_names
from phasewatch.splits.fold import SplitEpisode
from phasewatch.types import BENIGN_PROFILE

SplitEpisodes = Sequence[SplitEpisode]
TIME_TEST_SHARE = 0.2  # of the episodes, by `held_out_time`


class ValidationScheme(StrEnum):
    """Who validates: what was not tested, in four ways."""

    HOST = "the next host"
    SESSIONS = "a share of the other sessions"
    FOLD = "the next fold"
    LAST = "the last of what is left"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldPlan:
    """One fold as its recipe wants it.

    Attributes:
        test: Episodes to be tested.
        excluded: Other episode → why it may not be learnt from, by what the recipe holds out.
        validation_ids: Episodes that validate, for `ValidationScheme.FOLD`.
        held_out_profiles: Profiles that may be absent from train, because the recipe holds them out.
    """

    fold: str
    test: frozenset[str]
    excluded: Mapping[str, str] = field(default_factory=dict)
    validation_ids: frozenset[str] = frozenset()
    held_out_profiles: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a split holds out.

    Attributes:
        cut: Episodes → its folds; raises SplitError when the episodes cannot be cut so.
        held_out: Names of what test and train may not share (see APART).
        partitions: Over the folds each episode is tested exactly once, so that gaps between recipes pair by episode.
        leaky: Windows of one episode are on both sides: only for the inflation meter.
        by_window: Sets are dealt window by window (`splits.build`); `cut` gives names alone.
        tests: Whether it has a test set at all.
    """

    name: str
    about: str
    cut: Callable[[SplitEpisodes], tuple[FoldPlan, ...]]
    validation: ValidationScheme = ValidationScheme.SESSIONS
    held_out: tuple[str, ...] = ()
    partitions: bool = False
    leaky: bool = False
    by_window: bool = False
    tests: bool = True


# What a recipe holds out → the key that test and train may not share.
HELD_OUT_KEYS: dict[str, Callable[[SplitEpisode], str]] = {
    "host": lambda e: e.host_id,
    "sample group": lambda e: str(e.sample_group),
    "profile": lambda e: e.profile,
}


def _compute_order(purpose: str, name: str) -> str:
    """Give a place in an order that is random, the same for everybody, and another for each purpose."""
    return hashlib.sha256(f"{purpose}|{name}".encode()).hexdigest()


def compute_session_order(purpose: str, sitting: tuple[str, str]) -> tuple[str, str]:
    """Return a place in that order for a session of a host; another host's session of the same name stands beside it."""
    session, host = sitting
    return _compute_order(purpose, session), host


def _list_hosts(episodes: SplitEpisodes) -> list[str]:
    """Name the hosts, sorted."""
    return sorted({e.host_id for e in episodes})


def _group_ids(episodes: SplitEpisodes, key: Callable[[SplitEpisode], str]) -> dict[str, frozenset[str]]:
    """Give the ids of the episodes that share a key, in the order of the keys."""
    found: dict[str, set[str]] = {}
    for e in episodes:
        found.setdefault(key(e), set()).add(e.episode_id)
    return {k: frozenset(found[k]) for k in sorted(found)}


def _cut_by_host(episodes: SplitEpisodes) -> tuple[FoldPlan, ...]:
    hosts = _list_hosts(episodes)
    if len(hosts) < 2:
        found = f"only {hosts[0]!r}" if hosts else "none"
        raise SplitError(
            f"held_out_host: needs lab episodes of known phase from at least 2 hosts, found {found}; "
            "record on another host, or choose a recipe that holds out something else"
        )
    return tuple(FoldPlan(fold=host, test=test) for host, test in _group_ids(episodes, lambda e: e.host_id).items())


def _group_by_sample(episodes: SplitEpisodes, recipe: str) -> dict[str, frozenset[str]]:
    groups = _group_ids(episodes, lambda e: f"group-{e.sample_group}")
    if len(groups) < 2:
        raise SplitError(
            f"{recipe}: needs lab episodes of at least 2 sample groups, found {len(groups)}; record other samples"
        )
    return groups


def _cut_by_sample_group(episodes: SplitEpisodes) -> tuple[FoldPlan, ...]:
    return tuple(FoldPlan(fold=name, test=test) for name, test in _group_by_sample(episodes, "held_out_sample").items())


def _cut_by_host_and_group(episodes: SplitEpisodes) -> tuple[FoldPlan, ...]:
    hosts = _cut_by_host(episodes)  # says what is missing
    cuts = []
    for of_host in hosts:
        for group, of_group in _group_by_sample(episodes, "held_out_both").items():
            if test := of_host.test & of_group:
                why = dict.fromkeys(sorted(of_group - test), "is of the tested sample group")
                why |= dict.fromkeys(sorted(of_host.test - test), "is of the tested host")
                cuts.append(FoldPlan(fold=f"{of_host.fold}.{group}", test=test, excluded=why))
    return tuple(cuts)


def _cut_by_time(episodes: SplitEpisodes) -> tuple[FoldPlan, ...]:
    by_time = sorted(episodes, key=lambda e: (e.started_wall_ns, e.episode_id))
    last = round(TIME_TEST_SHARE * len(by_time))
    if not last:
        raise SplitError(f"held_out_time: needs at least 3 lab episodes, found {len(by_time)}; record more")
    cut_ns = by_time[-last].started_wall_ns
    # Of each host its own: one very long episode must not empty the others' training set.
    longest_ns = {
        host: round(max(e.duration_s for e in episodes if e.host_id == host) * 1e9) for host in _list_hosts(episodes)
    }
    test = frozenset(e.episode_id for e in episodes if e.started_wall_ns >= cut_ns)
    near = {
        e.episode_id: "began less than the longest episode before the cut"
        for e in episodes
        if cut_ns - longest_ns[e.host_id] < e.started_wall_ns < cut_ns
    }
    return (FoldPlan(fold="last", test=test, excluded=near),)


def _cut_by_profile(episodes: SplitEpisodes) -> tuple[FoldPlan, ...]:
    malicious = {p: test for p, test in _group_ids(episodes, lambda e: e.profile).items() if p != BENIGN_PROFILE}
    if len(malicious) < 2:
        raise SplitError(
            f"held_out_profile: needs lab episodes of at least 2 malicious profiles, found {len(malicious)}; record others"
        )
    return tuple(FoldPlan(fold=p, test=test, held_out_profiles=frozenset({p})) for p, test in malicious.items())


def _count_hosts(episodes: SplitEpisodes, recipe: str) -> int:
    count = len(_list_hosts(episodes))
    if count < 3:
        raise SplitError(
            f"{recipe}: takes as many folds as there are hosts, of which one tests and one validates, found {count}; "
            "record on 3 hosts or more"
        )
    return count


def _cut_by_session(episodes: SplitEpisodes) -> tuple[FoldPlan, ...]:
    count = _count_hosts(episodes, "in_distribution")
    sittings = sorted({e.session_key for e in episodes}, key=lambda s: compute_session_order("in_distribution", s))
    of = {sitting: i % count for i, sitting in enumerate(sittings)}
    tests = [frozenset(e.episode_id for e in episodes if of[e.session_key] == k) for k in range(count)]
    return tuple(
        FoldPlan(fold=f"fold-{k}", test=test, validation_ids=tests[(k + 1) % count]) for k, test in enumerate(tests)
    )


def _cut_by_window(episodes: SplitEpisodes) -> tuple[FoldPlan, ...]:
    count = _count_hosts(episodes, "random_windows")
    return tuple(FoldPlan(fold=f"fold-{k}", test=frozenset()) for k in range(count))


def _cut_nothing(episodes: SplitEpisodes) -> tuple[FoldPlan, ...]:
    return (FoldPlan(fold="all", test=frozenset()),)


SPLIT_RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="held_out_host",
        about="Tested on a host that training never saw.",
        cut=_cut_by_host,
        validation=ValidationScheme.HOST,
        held_out=("host",),
        partitions=True,
    ),
    Recipe(
        name="held_out_sample",
        about="Tested on samples that training never saw.",
        cut=_cut_by_sample_group,
        held_out=("sample group",),
        partitions=True,
    ),
    Recipe(
        name="held_out_both",
        about="Tested on a host and on samples that training never saw.",
        cut=_cut_by_host_and_group,
        held_out=("host", "sample group"),
        partitions=True,
    ),
    Recipe(
        name="held_out_time",
        about="Tested on what was recorded last.",
        cut=_cut_by_time,
        validation=ValidationScheme.LAST,
    ),
    Recipe(
        name="held_out_profile",
        about="Tested on a malicious profile that training never saw.",
        cut=_cut_by_profile,
        held_out=("profile",),
    ),
    Recipe(
        name="in_distribution",
        about="Tested on other sessions of hosts and samples that training saw.",
        cut=_cut_by_session,
        validation=ValidationScheme.FOLD,
        partitions=True,
    ),
    Recipe(
        name="random_windows",
        about="Tested on windows of episodes that training saw: what leaks, for the inflation meter only.",
        cut=_cut_by_window,
        leaky=True,
        by_window=True,
    ),
    Recipe(
        name="deploy",
        about="Trained on everything, for use; never scored.",
        cut=_cut_nothing,
        tests=False,
    ),
)


def find_recipe(name: str) -> Recipe:
    """Find a recipe by its name.

    Raises:
        UsageError: If there is none; the message has the nearest names.
    """
    known = {r.name: r for r in SPLIT_RECIPES}
    if name not in known:
        raise UsageError(f"no split recipe {name!r}; {suggest_names(name, known)}")
    return known[name]
