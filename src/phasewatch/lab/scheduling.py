"""Schedule profiles and sample groups over hosts and time.

The order is balanced: after any number of sessions, hosts, profiles and sample groups have been recorded about equally.
Nothing here does input or output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from math import ceil
from typing import NamedTuple

from phasewatch.profiles import N_SAMPLE_GROUPS
from phasewatch.types import BENIGN_PROFILE

__all__ = ["HostDemand", "ProfileGroup", "ScheduledSession", "build_schedule"]

_DUPLICATE_PENALTY = 2.0  # two episodes of one profile at the same time: only when nothing else is left


class ProfileGroup(NamedTuple):
    """Profile and sample group of one episode; its sample is chosen later."""

    profile: str
    group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostDemand:
    """The episodes that one host records: a share of them benign, the rest distributed over `profiles`.

    Attributes:
        vms: Largest number of its VMs that may run at the same time.
    """

    host_id: str
    episodes: int
    profiles: tuple[str, ...]
    vms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledSession:
    """One session: episodes that run at the same time on a host, all of one sample group."""

    host_id: str
    profile_groups: tuple[ProfileGroup, ...]


def _choose_profile_groups(demand: HostDemand, *, benign_share: float, turn: int) -> Counter[ProfileGroup]:
    """Choose the profile groups of a host.

    Profiles get equal numbers of episodes, each over all groups in turn. Benign episodes fill up pairs.

    Args:
        demand: The demand of the host.
        benign_share: Smallest benign share.
        turn: Position of the host in the plan; it shifts the groups, so that hosts differ.
    """
    benign = (
        min(demand.episodes, ceil(round(demand.episodes * benign_share, 6))) if demand.profiles else demand.episodes
    )
    chosen: Counter[ProfileGroup] = Counter()
    for number in range(demand.episodes - benign):
        lap, place = divmod(number, len(demand.profiles))
        chosen[ProfileGroup(demand.profiles[place], (lap + place + turn) % N_SAMPLE_GROUPS)] += 1
    sizes = [sum(n for each, n in chosen.items() if each.group == group) for group in range(N_SAMPLE_GROUPS)]
    while benign and demand.vms > 2:
        group = min(range(N_SAMPLE_GROUPS), key=lambda g: (sizes[g], (g + turn) % N_SAMPLE_GROUPS))
        chosen[ProfileGroup(BENIGN_PROFILE, group)] += 1
        sizes[group] += 1
        benign -= 1
    while benign:
        # A group with an odd number leaves one episode alone. After that, two at a time in the smallest group.
        group = min(range(N_SAMPLE_GROUPS), key=lambda g: (sizes[g] % 2 == 0, sizes[g], (g + turn) % N_SAMPLE_GROUPS))
        step = 1 if sizes[group] % 2 or demand.vms == 1 else min(2, benign)
        chosen[ProfileGroup(BENIGN_PROFILE, group)] += step
        sizes[group] += step
        benign -= step
    return chosen


def build_schedule(demands: Sequence[HostDemand], *, benign_share: float) -> tuple[ScheduledSession, ...]:
    """Combine the episodes of all hosts into sessions, and order these.

    The next session is of the host with the smallest share of finished episodes. Among its remaining episodes, those
    are chosen whose profile, group and sample were recorded least so far, on this host and on all.
    """
    left = {
        demand.host_id: _choose_profile_groups(demand, benign_share=benign_share, turn=turn)
        for turn, demand in enumerate(demands)
    }
    total = _count_margins((demand.host_id, each, n) for demand in demands for each, n in left[demand.host_id].items())
    done: Counter[tuple[object, ...]] = Counter()
    order = []
    while any(left.values()):
        demand = min(
            (demand for demand in demands if left[demand.host_id]),
            key=lambda demand: done[("host", demand.host_id)] / total[("host", demand.host_id)],
        )
        host_id, have = demand.host_id, left[demand.host_id]

        rate = partial(_compute_imbalance, host_id, done=done, total=total)
        candidates = (
            _list_candidates(have, demand.vms == 1) if demand.vms <= 2 else _grow_candidates(have, demand.vms, rate)
        )
        groups = min(candidates, key=rate)
        have -= Counter(groups)
        left[host_id] = +have
        done += _count_margins((host_id, each, 1) for each in groups)
        order.append(ScheduledSession(host_id=host_id, profile_groups=groups))
    return tuple(order)


def _list_candidates(have: Counter[ProfileGroup], is_alone: bool) -> Iterator[tuple[ProfileGroup, ...]]:
    """Yield the possible next sessions: pairs of one group, or single episodes if no pair is left."""
    groups = sorted(have)
    pairs = [
        (one, other)
        for one, other in combinations_with_replacement(groups, 2)
        if one.group == other.group and (one != other or have[one] > 1)
    ]
    if is_alone or not pairs:
        yield from ((each,) for each in groups)
    else:
        yield from pairs


def _grow_candidates(
    have: Counter[ProfileGroup], vms: int, rate: Callable[[tuple[ProfileGroup, ...]], float]
) -> Iterator[tuple[ProfileGroup, ...]]:
    """Yield one possible next session for each sample group, grown by the episode that keeps the balance best.

    All combinations of six would be too many. The episodes of a group are spread evenly over its sessions.
    """
    for group in sorted({each.group for each in have}):
        left = Counter({each: n for each, n in have.items() if each.group == group and n > 0})
        n_left = left.total()
        if not n_left:
            continue
        size = ceil(n_left / ceil(n_left / vms))
        grown: tuple[ProfileGroup, ...] = ()
        for _ in range(size):
            grown = min(((*grown, each) for each in sorted(+left)), key=rate)
            left[grown[-1]] -= 1
        yield grown


def _count_margins(counts: Iterator[tuple[str, ProfileGroup, int]]) -> Counter[tuple[object, ...]]:
    """Sum the counts along each margin that is balanced."""
    sums: Counter[tuple[object, ...]] = Counter()
    for host_id, episode, n in counts:
        for key, _ in _list_margin_keys(host_id, episode):
            sums[key] += n
        sums[("host", host_id)] += n
    return sums


def _list_margin_keys(host_id: str, episode: ProfileGroup) -> tuple[tuple[tuple[object, ...], int], ...]:
    """Return the margins that an episode counts in, with their weights; host × profile weighs most."""
    return (
        (("host × profile", host_id, episode.profile), 8),
        (("profile", episode.profile), 2),
        (("group", episode.group), 2),
        (("sample", episode), 2),
        (("host × group", host_id, episode.group), 1),
    )


def _compute_imbalance(
    host_id: str,
    groups: tuple[ProfileGroup, ...],
    done: Counter[tuple[object, ...]],
    total: Counter[tuple[object, ...]],
) -> float:
    """Return the weighted mean share done of the margins of these episodes, if they were recorded next."""
    after, cost = done.copy(), _DUPLICATE_PENALTY * (len(groups) - len(set(groups)))
    for episode in groups:
        for key, weight in _list_margin_keys(host_id, episode):
            after[key] += 1
            # The middle of the step; otherwise a margin with many episodes would come before one with few.
            cost += weight * (after[key] - 0.5) / total[key]
    return round(cost / len(groups), 9)
