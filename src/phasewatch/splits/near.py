"""Find near-duplicate episodes in linear time and bounded memory, whatever one host uploads."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from phasewatch.identity import pick_owner
from phasewatch.splits.fold import SplitEpisode

__all__ = [
    "MAX_SKETCH_HOLDERS",
    "NO_SEED",
    "NearDuplicates",
    "find_copied_episodes",
    "find_near_duplicates",
]

MAX_SKETCH_HOLDERS = 16  # sketches that share a digest; a digest of more sketches identifies no run
_OWNER_MARGIN = 10  # the original's host has this many times as many own episodes as the copy's host
NO_SEED = 0  # plan seed of an episode without a plan, such as one saved by `watch --save`

_ProcSketch = frozenset[int]
K = TypeVar("K")


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicates:
    """Episodes that are the same run under different ids.

    Two episodes are near-duplicates if they are of one host and of one `plan_seed`, or if they share half of the
    smaller `proc_sketch`. Episodes of equal sketch form one class, so that ten thousand equal ones cost one.

    Attributes:
        classes: Episode → number of its class; absent without a sketch.
        edges: Class → the other classes that share half of the smaller sketch with it.
        seeds: Episode → (host_id, plan_seed); absent without a seed.
    """

    classes: Mapping[str, int]
    edges: Mapping[int, frozenset[int]]
    seeds: Mapping[str, tuple[str, int]]

    def find_twins(self, episodes: Sequence[str], among: frozenset[str]) -> dict[str, str]:
        """Return each episode that has a near-duplicate `among` others → the first of these by id."""
        by_class, by_seed = _index_first(self.classes, among), _index_first(self.seeds, among)
        found: dict[str, str] = {}
        for episode in episodes:
            its_class = self.classes.get(episode)
            twins = [by_seed.get(self.seeds[episode])] if episode in self.seeds else []
            if its_class is not None:
                twins += [by_class.get(c) for c in (its_class, *self.edges.get(its_class, ()))]
            if known := [twin for twin in twins if twin is not None]:
                found[episode] = min(known)
        return found


def _index_first(key_of: Mapping[str, K], among: frozenset[str]) -> dict[K, str]:
    first: dict[K, str] = {}
    for episode in sorted(among, reverse=True):
        if (key := key_of.get(episode)) is not None:
            first[key] = episode
    return first


def find_near_duplicates(episodes: Sequence[SplitEpisode]) -> NearDuplicates:
    """Find the near-duplicates among episodes.

    A digest in more than `MAX_SKETCH_HOLDERS` different sketches is ignored: it identifies no run, and one host could
    use it to make the search arbitrarily long.
    """
    numbers: dict[_ProcSketch, int] = {}
    classes = {
        e.episode_id: numbers.setdefault(frozenset(e.proc_sketch), len(numbers)) for e in episodes if e.proc_sketch
    }
    return NearDuplicates(
        classes=classes,
        edges=_find_edges(list(numbers)),
        seeds={e.episode_id: (e.host_id, e.plan_seed) for e in episodes if e.plan_seed != NO_SEED},
    )


def _find_edges(sketches: Sequence[_ProcSketch]) -> dict[int, frozenset[int]]:
    """Return sketch → the sketches with which it shares half of the smaller one, in both directions."""
    holders: dict[int, list[int]] = defaultdict(list)
    for number, sketch in enumerate(sketches):
        for digest in sketch:
            if len(holders[digest]) <= MAX_SKETCH_HOLDERS:
                holders[digest].append(number)
    used_sizes = [sum(len(holders[digest]) <= MAX_SKETCH_HOLDERS for digest in sketch) for sketch in sketches]
    edges: dict[int, set[int]] = defaultdict(set)
    for number, sketch in enumerate(sketches):
        shared: Counter[int] = Counter()
        for digest in sketch:
            if 1 < len(holders[digest]) <= MAX_SKETCH_HOLDERS:
                shared.update(holders[digest])
        for other, n in shared.items():
            if other < number and 2 * n >= min(used_sizes[number], used_sizes[other]):
                edges[number].add(other)
                edges[other].add(number)
    return {number: frozenset(others) for number, others in edges.items()}


def find_copied_episodes(episodes: Sequence[SplitEpisode]) -> dict[str, str]:
    """Return the episodes whose proc rows were copied from another host → that host.

    Counters of two machines are never equal, so half of a sketch on another host is a copy. The rows do not show which
    of the two is the original: it is the host with ten times as many own episodes (`identity.pick_owner`). Without
    such a host no copy is named, and the embargo keeps both episodes on one side of the split.
    """
    hosts_of: dict[int, set[str]] = defaultdict(set)
    for e in episodes:
        for digest in e.proc_sketch:
            hosts_of[digest].add(e.host_id)
    rivals: dict[str, list[str]] = {}
    own: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    for e in episodes:
        sketch = set(e.proc_sketch)
        # A digest on many hosts identifies none of them.
        holders = [hosts for digest in sketch if 1 < len(hosts := hosts_of[digest]) <= MAX_SKETCH_HOLDERS]
        elsewhere = Counter(host for hosts in holders for host in hosts if host != e.host_id)
        rivals[e.episode_id] = [host for host, n in elsewhere.items() if 2 * n >= len(sketch)]
        (shared if rivals[e.episode_id] else own)[e.host_id] += 1
    found: dict[str, str] = {}
    for e in episodes:
        for rival in sorted(rivals[e.episode_id]):
            if pick_owner([e.host_id, rival], own=own, shared=shared, margin=_OWNER_MARGIN) == rival:
                found[e.episode_id] = rival
    return found
