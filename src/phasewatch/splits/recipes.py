"""Split recipes: what each holds out, and how it divides episodes into folds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from phasewatch.errors import SplitError, UsageError, suggest_names
from phasewatch.splits.fold import SplitEpisode, SplitEpisodes
from phasewatch.types import BENIGN_PROFILE

__all__ = [
    "ALARM_RECIPES",
    "HELD_OUT_KEYS",
    "SINGLE_HOST_RECIPE",
    "SPLIT_RECIPES",
    "TIME_TEST_SHARE",
    "FoldPlan",
    "Recipe",
    "ValidationScheme",
    "compute_session_order",
    "find_recipe",
]

SINGLE_HOST_RECIPE = "held_out_time"  # what a store of one host is tested by, since no host can be held out
TIME_TEST_SHARE = 0.2  # of the episodes, in `held_out_time`
ALARM_RECIPES = ("held_out_host", "held_out_both")  # that alarms are evaluated on; both hold out a host


class ValidationScheme(StrEnum):
    """The source of the validation sets among the episodes that are not tested."""

    HOST = "the next host"
    SESSIONS = "a share of the other sessions"
    FOLD = "the next fold"
    LAST = "the last of what is left"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldPlan:
    """The test set of a fold, before validation sets are chosen and near episodes are embargoed.

    Attributes:
        fold: Name of the fold.
        test: Episodes of the test set.
        excluded: Other episode → why it is not used for training, by what the recipe holds out.
        validation_ids: Episodes of the validation sets, for `ValidationScheme.FOLD`.
        held_out_profiles: Profiles that may be absent from train because the recipe holds them out.
    """

    fold: str
    test: frozenset[str]
    excluded: Mapping[str, str] = field(default_factory=dict)
    validation_ids: frozenset[str] = frozenset()
    held_out_profiles: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A split protocol.

    Attributes:
        about: One sentence for a list of recipes.
        cut: Episodes → the plans of its folds; raises SplitError if it cannot be built.
        validation: Source of the validation sets.
        held_out: What test and train do not share (keys of `HELD_OUT_KEYS`).
        partitions: Each episode is tested in exactly one fold, so that differences between recipes pair by episode.
        leaky: Windows of one episode are in both train and test; for the comparison of split protocols only.
        by_window: Windows are assigned to sets at random; `cut` returns the names of the folds alone.
        tests: Whether it has a test set.
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
    """Return a sort key for a pseudo-random order that is the same on every machine and differs for each purpose."""
    return hashlib.sha256(f"{purpose}|{name}".encode()).hexdigest()


def compute_session_order(purpose: str, session_key: tuple[str, str]) -> tuple[str, str]:
    """Return a sort key for sessions in a pseudo-random order; equal names of several hosts are adjacent."""
    session, host = session_key
    return _compute_order(purpose, session), host


def _list_hosts(episodes: SplitEpisodes) -> list[str]:
    return sorted({e.host_id for e in episodes})


def _group_ids(episodes: SplitEpisodes, key: Callable[[SplitEpisode], str]) -> dict[str, frozenset[str]]:
    """Return key → ids of the episodes with that key, in the order of the keys."""
    groups: dict[str, set[str]] = {}
    for e in episodes:
        groups.setdefault(key(e), set()).add(e.episode_id)
    return {k: frozenset(groups[k]) for k in sorted(groups)}


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
    hosts = _cut_by_host(episodes)  # raises if a host is missing
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
    # For each host: one very long episode must not empty the training set of the others.
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
            "held_out_profile: needs lab episodes of at least 2 malicious profiles, "
            f"found {len(malicious)}; record others"
        )
    return tuple(FoldPlan(fold=p, test=test, held_out_profiles=frozenset({p})) for p, test in malicious.items())


def _count_hosts(episodes: SplitEpisodes, recipe: str) -> int:
    count = len(_list_hosts(episodes))
    if count < 3:
        raise SplitError(
            f"{recipe}: makes one fold for each host, with one fold for the test set and one for validation, so it "
            f"needs 3 hosts and found {count}; record on 3 hosts or more"
        )
    return count


def _cut_by_session(episodes: SplitEpisodes) -> tuple[FoldPlan, ...]:
    count = _count_hosts(episodes, "in_distribution")
    sessions = sorted({e.session_key for e in episodes}, key=lambda s: compute_session_order("in_distribution", s))
    fold_of_session = {session: i % count for i, session in enumerate(sessions)}
    tests = [frozenset(e.episode_id for e in episodes if fold_of_session[e.session_key] == k) for k in range(count)]
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
        about="Tested on the episodes that were recorded last.",
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
        about="Tested on random windows of the episodes in training (leaky; for comparison only).",
        cut=_cut_by_window,
        leaky=True,
        by_window=True,
    ),
    Recipe(
        name="deploy",
        about="Trained on all episodes, for deployment; never scored.",
        cut=_cut_nothing,
        tests=False,
    ),
)


def find_recipe(name: str) -> Recipe:
    """Find a recipe by its name.

    Raises:
        UsageError: If there is none; the message suggests the nearest names.
    """
    known = {r.name: r for r in SPLIT_RECIPES}
    if name not in known:
        raise UsageError(f"no split recipe {name!r}; {suggest_names(name, known)}")
    return known[name]
