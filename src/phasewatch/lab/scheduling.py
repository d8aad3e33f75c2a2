"""Deals profiles and sample groups over hosts and time, so that any beginning of a campaign is balanced (pure)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import ceil
from typing import NamedTuple

from phasewatch.profiles import N_SAMPLE_GROUPS
from phasewatch.types import BENIGN_PROFILE

_DUPLICATE_PENALTY = 2.0  # two of one profile side by side: only when nothing else is left


class ProfileGroup(NamedTuple):
    """What one episode shows, up to the choice among the samples of a group."""

    profile: str
    group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostDemand:
    """What one host is to record: `episodes` in all, a share of them benign, the rest dealt over `profiles`."""

    host_id: str
    episodes: int
    profiles: tuple[str, ...]
    is_alone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledSession:
    """One session: what runs side by side on a host, always of one sample group."""

    host_id: str
    profile_groups: tuple[ProfileGroup, ...]


def _choose_profile_groups(need: HostDemand, *, benign_share: float, turn: int) -> Counter[ProfileGroup]:
    """Choose a host's cells: profiles in equal parts, each over all groups in turn, benign where pairs need it.

    Args:
        turn: The host's place among the hosts; shifts the groups so that hosts differ.
    """
    benign = min(need.episodes, ceil(round(need.episodes * benign_share, 6))) if need.profiles else need.episodes
    chosen: Counter[ProfileGroup] = Counter()
    for at in range(need.episodes - benign):
        lap, place = divmod(at, len(need.profiles))
        chosen[ProfileGroup(need.profiles[place], (lap + place + turn) % N_SAMPLE_GROUPS)] += 1
    sizes = [sum(n for cell, n in chosen.items() if cell.group == group) for group in range(N_SAMPLE_GROUPS)]
    while benign:
        # An odd group leaves one episode without a neighbour; after that two at a time where there are fewest.
        group = min(range(N_SAMPLE_GROUPS), key=lambda g: (sizes[g] % 2 == 0, sizes[g], (g + turn) % N_SAMPLE_GROUPS))
        step = 1 if sizes[group] % 2 or need.is_alone else min(2, benign)
        chosen[ProfileGroup(BENIGN_PROFILE, group)] += step
        sizes[group] += step
        benign -= step
    return chosen


def build_schedule(needs: Sequence[HostDemand], *, benign_share: float) -> tuple[ScheduledSession, ...]:
    """Put all hosts' episodes into sessions and these into an order.

    The next session is always of the host that is furthest behind; of what that host has left the one is taken whose
    profile, group and sample were recorded least so far, here and on all hosts.
    """
    left = {
        need.host_id: _choose_profile_groups(need, benign_share=benign_share, turn=turn)
        for turn, need in enumerate(needs)
    }
    total = _count_margins((need.host_id, cell, n) for need in needs for cell, n in left[need.host_id].items())
    done: Counter[tuple[object, ...]] = Counter()
    order = []
    while any(left.values()):
        need = min(
            (need for need in needs if left[need.host_id]),
            key=lambda need: done[("host", need.host_id)] / total[("host", need.host_id)],
        )
        host_id, have = need.host_id, left[need.host_id]
        cells = min(
            _list_candidates(have, need.is_alone), key=lambda some: _compute_imbalance(host_id, some, done, total)
        )
        have -= Counter(cells)
        left[host_id] = +have
        done += _count_margins((host_id, cell, 1) for cell in cells)
        order.append(ScheduledSession(host_id=host_id, profile_groups=cells))
    return tuple(order)


def _list_candidates(have: Counter[ProfileGroup], is_alone: bool) -> Iterator[tuple[ProfileGroup, ...]]:
    """Give what may run next: pairs of one group, single episodes where no pair is left."""
    cells = sorted(have)
    pairs = [
        (one, other)
        for one, other in combinations_with_replacement(cells, 2)
        if one.group == other.group and (one != other or have[one] > 1)
    ]
    if is_alone or not pairs:
        yield from ((cell,) for cell in cells)
    else:
        yield from pairs


def _count_margins(counts: Iterator[tuple[str, ProfileGroup, int]]) -> Counter[tuple[object, ...]]:
    """Add up along every margin that is to be balanced."""
    sums: Counter[tuple[object, ...]] = Counter()
    for host_id, cell, n in counts:
        for key, _ in _list_margin_keys(host_id, cell):
            sums[key] += n
        sums[("host", host_id)] += n
    return sums


def _list_margin_keys(host_id: str, cell: ProfileGroup) -> tuple[tuple[tuple[object, ...], int], ...]:
    """Name the margins that an episode counts in, with their weights: host × profile before all."""
    return (
        (("host × profile", host_id, cell.profile), 8),
        (("profile", cell.profile), 2),
        (("group", cell.group), 2),
        (("sample", cell), 2),
        (("host × group", host_id, cell.group), 1),
    )


def _compute_imbalance(
    host_id: str, cells: tuple[ProfileGroup, ...], done: Counter[tuple[object, ...]], total: Counter[tuple[object, ...]]
) -> float:
    """Say how far ahead of the rest these cells would be, were they taken now: mean of their margins' shares done."""
    after, cost = done.copy(), 0.0 if len(set(cells)) == len(cells) else _DUPLICATE_PENALTY
    for cell in cells:
        for key, weight in _list_margin_keys(host_id, cell):
            after[key] += 1
            # The middle of its step, or a margin of many episodes would be served before one of few.
            cost += weight * (after[key] - 0.5) / total[key]
    return round(cost / len(cells), 9)
