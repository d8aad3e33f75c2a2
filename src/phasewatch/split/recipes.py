"""How a split holds out: the table of recipes, and how each cuts the episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from phasewatch.errors import SplitError, UsageError, name_the_nearest
from phasewatch.split.fold import SplitEpisode
from phasewatch.vocab import BENIGN

Episodes = Sequence[SplitEpisode]
TESTED_LAST = 0.2  # of the episodes, by `held_out_time`


class Validation(StrEnum):
    """Who validates: what was not tested, in four ways."""

    HOST = "the next host"
    SESSIONS = "a share of the other sessions"
    FOLD = "the next fold"
    LAST = "the last of what is left"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One fold as its recipe wants it.

    Attributes:
        test: Episodes to be tested.
        excluded: Other episode → why it may not be learnt from, by what the recipe holds out.
        next: Episodes that validate, for `Validation.FOLD`.
        untaught: Profiles that may be absent from train, because the recipe holds them out.
    """

    fold: str
    test: frozenset[str]
    excluded: Mapping[str, str] = field(default_factory=dict)
    next: frozenset[str] = frozenset()
    untaught: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a split holds out.

    Attributes:
        cut: Episodes → its folds; raises SplitError when the episodes cannot be cut so.
        apart: Names of what test and train may not share (see APART).
        partitions: Over the folds each episode is tested exactly once, so that gaps between recipes pair by episode.
        leaky: Windows of one episode are on both sides: only for the inflation meter.
        by_window: Sets are dealt window by window (`split.deal`); `cut` gives names alone.
        tests: Whether it has a test set at all.
    """

    name: str
    about: str
    cut: Callable[[Episodes], tuple[Cut, ...]]
    validation: Validation = Validation.SESSIONS
    apart: tuple[str, ...] = ()
    partitions: bool = False
    leaky: bool = False
    by_window: bool = False
    tests: bool = True


# What a recipe holds out → the key that test and train may not share.
APART: dict[str, Callable[[SplitEpisode], str]] = {
    "host": lambda e: e.host_id,
    "sample group": lambda e: str(e.sample_group),
    "profile": lambda e: e.profile,
}


def order_of(purpose: str, name: str) -> str:
    """Give a place in an order that is random, the same for everybody, and another for each purpose."""
    return hashlib.sha256(f"{purpose}|{name}".encode()).hexdigest()


def order_of_sitting(purpose: str, sitting: tuple[str, str]) -> tuple[str, str]:
    """Return a place in that order for a session of a host; another host's session of the same name stands beside it."""
    session, host = sitting
    return order_of(purpose, session), host


def hosts_of(episodes: Episodes) -> list[str]:
    """Name the hosts, sorted."""
    return sorted({e.host_id for e in episodes})


def _by(episodes: Episodes, key: Callable[[SplitEpisode], str]) -> dict[str, frozenset[str]]:
    """Give the ids of the episodes that share a key, in the order of the keys."""
    found: dict[str, set[str]] = {}
    for e in episodes:
        found.setdefault(key(e), set()).add(e.episode_id)
    return {k: frozenset(found[k]) for k in sorted(found)}


def _one_host_each(episodes: Episodes) -> tuple[Cut, ...]:
    hosts = hosts_of(episodes)
    if len(hosts) < 2:
        found = f"only {hosts[0]!r}" if hosts else "none"
        raise SplitError(
            f"held_out_host: needs lab episodes of known phase from at least 2 hosts, found {found}; "
            "record on another host, or choose a recipe that holds out something else"
        )
    return tuple(Cut(fold=host, test=test) for host, test in _by(episodes, lambda e: e.host_id).items())


def _by_group(episodes: Episodes, recipe: str) -> dict[str, frozenset[str]]:
    groups = _by(episodes, lambda e: f"group-{e.sample_group}")
    if len(groups) < 2:
        raise SplitError(
            f"{recipe}: needs lab episodes of at least 2 sample groups, found {len(groups)}; record other samples"
        )
    return groups


def _one_group_each(episodes: Episodes) -> tuple[Cut, ...]:
    return tuple(Cut(fold=name, test=test) for name, test in _by_group(episodes, "held_out_sample").items())


def _host_and_group(episodes: Episodes) -> tuple[Cut, ...]:
    hosts = _one_host_each(episodes)  # says what is missing
    cuts = []
    for of_host in hosts:
        for group, of_group in _by_group(episodes, "held_out_both").items():
            if test := of_host.test & of_group:
                why = dict.fromkeys(sorted(of_group - test), "is of the tested sample group")
                why |= dict.fromkeys(sorted(of_host.test - test), "is of the tested host")
                cuts.append(Cut(fold=f"{of_host.fold}.{group}", test=test, excluded=why))
    return tuple(cuts)


def _one_cut_in_time(episodes: Episodes) -> tuple[Cut, ...]:
    by_time = sorted(episodes, key=lambda e: (e.started_wall_ns, e.episode_id))
    last = round(TESTED_LAST * len(by_time))
    if not last:
        raise SplitError(f"held_out_time: needs at least 3 lab episodes, found {len(by_time)}; record more")
    cut_ns = by_time[-last].started_wall_ns
    # Of each host its own: one very long episode must not empty the others' training set.
    longest_ns = {
        host: round(max(e.duration_s for e in episodes if e.host_id == host) * 1e9) for host in hosts_of(episodes)
    }
    test = frozenset(e.episode_id for e in episodes if e.started_wall_ns >= cut_ns)
    near = {
        e.episode_id: "began less than the longest episode before the cut"
        for e in episodes
        if cut_ns - longest_ns[e.host_id] < e.started_wall_ns < cut_ns
    }
    return (Cut(fold="last", test=test, excluded=near),)


def _one_profile_each(episodes: Episodes) -> tuple[Cut, ...]:
    malicious = {p: test for p, test in _by(episodes, lambda e: e.profile).items() if p != BENIGN}
    if len(malicious) < 2:
        raise SplitError(
            f"held_out_profile: needs lab episodes of at least 2 malicious profiles, found {len(malicious)}; record others"
        )
    return tuple(Cut(fold=p, test=test, untaught=frozenset({p})) for p, test in malicious.items())


def _count_hosts(episodes: Episodes, recipe: str) -> int:
    count = len(hosts_of(episodes))
    if count < 3:
        raise SplitError(
            f"{recipe}: takes as many folds as there are hosts, of which one tests and one validates, found {count}; "
            "record on 3 hosts or more"
        )
    return count


def _as_many_as_hosts(episodes: Episodes) -> tuple[Cut, ...]:
    count = _count_hosts(episodes, "in_distribution")
    sittings = sorted({e.sitting for e in episodes}, key=lambda s: order_of_sitting("in_distribution", s))
    of = {sitting: i % count for i, sitting in enumerate(sittings)}
    tests = [frozenset(e.episode_id for e in episodes if of[e.sitting] == k) for k in range(count)]
    return tuple(Cut(fold=f"fold-{k}", test=test, next=tests[(k + 1) % count]) for k, test in enumerate(tests))


def _windows(episodes: Episodes) -> tuple[Cut, ...]:
    count = _count_hosts(episodes, "random_windows")
    return tuple(Cut(fold=f"fold-{k}", test=frozenset()) for k in range(count))


def _everything(episodes: Episodes) -> tuple[Cut, ...]:
    return (Cut(fold="all", test=frozenset()),)


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="held_out_host",
        about="Tested on a host that training never saw.",
        cut=_one_host_each,
        validation=Validation.HOST,
        apart=("host",),
        partitions=True,
    ),
    Recipe(
        name="held_out_sample",
        about="Tested on samples that training never saw.",
        cut=_one_group_each,
        apart=("sample group",),
        partitions=True,
    ),
    Recipe(
        name="held_out_both",
        about="Tested on a host and on samples that training never saw.",
        cut=_host_and_group,
        apart=("host", "sample group"),
        partitions=True,
    ),
    Recipe(
        name="held_out_time",
        about="Tested on what was recorded last.",
        cut=_one_cut_in_time,
        validation=Validation.LAST,
    ),
    Recipe(
        name="held_out_profile",
        about="Tested on a malicious profile that training never saw.",
        cut=_one_profile_each,
        apart=("profile",),
    ),
    Recipe(
        name="in_distribution",
        about="Tested on other sessions of hosts and samples that training saw.",
        cut=_as_many_as_hosts,
        validation=Validation.FOLD,
        partitions=True,
    ),
    Recipe(
        name="random_windows",
        about="Tested on windows of episodes that training saw: what leaks, for the inflation meter only.",
        cut=_windows,
        leaky=True,
        by_window=True,
    ),
    Recipe(
        name="deploy",
        about="Trained on everything, for use; never scored.",
        cut=_everything,
        tests=False,
    ),
)


def recipe_of(name: str) -> Recipe:
    """Find a recipe by its name.

    Raises:
        UsageError: If there is none; the message has the nearest names.
    """
    known = {r.name: r for r in RECIPES}
    if name not in known:
        raise UsageError(f"no split recipe {name!r}; {name_the_nearest(name, known)}")
    return known[name]
