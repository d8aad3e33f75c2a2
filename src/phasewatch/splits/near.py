"""Near-duplicates among episodes, found in linear time and bounded memory, whatever one host sends."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from phasewatch.identity import pick_owner
from phasewatch.splits.fold import SplitEpisode

MAX_SKETCH_HOLDERS = 16  # different sketches that hold a digest; one that more hold says nothing about two of them
OWNER_MARGIN = 10  # times as many episodes of its own as a copier has
NO_SEED = 0  # of an episode that no plan made, such as one that `watch --save` kept

ProcSketch = frozenset[int]
K = TypeVar("K")


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicates:
    """Which episodes are one run under two names.

    Two episodes are near-duplicates if they are of one host and of one `plan_seed`, or if they share half of the
    smaller `proc_sketch`. Episodes of equal sketch form one class, so that ten thousand equal ones cost one.

    Attributes:
        classes: Episode → number of its class; absent without a sketch.
        edges: Class → the classes that share half of the smaller sketch with it, itself left out.
        seeds: Episode → (host_id, plan_seed); absent without a seed.
    """

    classes: Mapping[str, int]
    edges: Mapping[int, frozenset[int]]
    seeds: Mapping[str, tuple[str, int]]

    def find_twins(self, of: Sequence[str], among: frozenset[str]) -> dict[str, str]:
        """Return each episode of `of` that has a near-duplicate among others, with the first of them by id."""
        by_class, by_seed = _index_first(self.classes, among), _index_first(self.seeds, among)
        found: dict[str, str] = {}
        for episode in of:
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

    A digest that more than MAX_HOLDERS different sketches hold is left out of all of them: many runs share it, so it
    tells nothing, and one host could make the search as long as it likes with it.
    """
    numbers: dict[ProcSketch, int] = {}
    classes = {
        e.episode_id: numbers.setdefault(frozenset(e.proc_sketch), len(numbers)) for e in episodes if e.proc_sketch
    }
    return NearDuplicates(
        classes=classes,
        edges=_find_edges(list(numbers)),
        seeds={e.episode_id: (e.host_id, e.plan_seed) for e in episodes if e.plan_seed != NO_SEED},
    )


def _find_edges(sketches: Sequence[ProcSketch]) -> dict[int, frozenset[int]]:
    """Return which sketches share half of the smaller one, both ways."""
    holders: dict[int, list[int]] = defaultdict(list)
    for number, sketch in enumerate(sketches):
        for digest in sketch:
            if len(holders[digest]) <= MAX_SKETCH_HOLDERS:
                holders[digest].append(number)
    telling = [sum(len(holders[digest]) <= MAX_SKETCH_HOLDERS for digest in sketch) for sketch in sketches]
    edges: dict[int, set[int]] = defaultdict(set)
    for number, sketch in enumerate(sketches):
        shared: Counter[int] = Counter()
        for digest in sketch:
            of = holders[digest]
            if 1 < len(of) <= MAX_SKETCH_HOLDERS:
                shared.update(of)
        for other, n in shared.items():
            if other < number and 2 * n >= min(telling[number], telling[other]):
                edges[number].add(other)
                edges[other].add(number)
    return {number: frozenset(others) for number, others in edges.items()}


def find_copied_episodes(episodes: Sequence[SplitEpisode]) -> dict[str, str]:
    """Return the episodes whose proc rows are another host's, with that host.

    Counters of two machines are never equal, so half of a sketch on another host is a copy. The rows do not tell which
    of the two it is: a host with ten times as many episodes of its own keeps it (`identity.pick_owner`). Where there is
    none, nobody is named, and the embargo keeps the two apart.
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
        # A digest that many hosts hold says nothing: nobody copies that many machines into one episode.
        told = [hosts for digest in sketch if 1 < len(hosts := hosts_of[digest]) <= MAX_SKETCH_HOLDERS]
        elsewhere = Counter(host for hosts in told for host in hosts if host != e.host_id)
        rivals[e.episode_id] = [host for host, n in elsewhere.items() if 2 * n >= len(sketch)]
        (shared if rivals[e.episode_id] else own)[e.host_id] += 1
    found: dict[str, str] = {}
    for e in episodes:
        for rival in sorted(rivals[e.episode_id]):
            if pick_owner([e.host_id, rival], own=own, shared=shared, margin=OWNER_MARGIN) == rival:
                found[e.episode_id] = rival
    return found
