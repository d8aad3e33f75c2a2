"""Episode ids that several hosts claim: choose the host that keeps each id.

The choice counts episodes. Names and times do not count, because the sender of a bundle chooses both.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

__all__ = ["MAX_CONTESTED_SHARE", "find_contested_ids", "pick_owner"]

MAX_CONTESTED_SHARE = 0.1  # of a host's episodes; a host with a larger share of contested episodes keeps none of them


def find_contested_ids(pairs: Iterable[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    """Return the (host_id, episode_id) pairs to leave out, so that every episode id is unique.

    Files of a run name an episode by its id alone. Of the hosts that claim an id, its owner keeps it (`pick_owner`);
    without an owner, all of them are left out.

    Args:
        pairs: (host_id, episode_id) of every usable bundle.
    """
    holders: dict[str, set[str]] = defaultdict(set)
    for host, episode in pairs:
        holders[episode].add(host)
    own: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    for hosts in holders.values():
        (own if len(hosts) == 1 else shared).update(hosts)
    contested: set[tuple[str, str]] = set()
    for episode, hosts in holders.items():
        if len(hosts) > 1:
            owner = pick_owner(hosts, own=own, shared=shared)
            contested.update((host, episode) for host in hosts if host != owner)
    return frozenset(contested)


def pick_owner(hosts: Iterable[str], *, own: Counter[str], shared: Counter[str], margin: int = 1) -> str | None:
    """Return the host that keeps a contested episode, or None.

    It is the host with the most episodes that no other host claims. A host of which more than `MAX_CONTESTED_SHARE` is
    contested (one episode is always allowed) keeps nothing: a host that copied many episodes of another could
    otherwise win by sending a few more.

    Args:
        hosts: The hosts that claim the episode.
        own: Number of episodes of each host that no other host claims.
        shared: Number of episodes of each host that other hosts claim too.
        margin: The owner needs this many times as many own episodes as the next host.
    """
    ranked = sorted(hosts, key=lambda host: -own[host])
    first = ranked[0]
    if len(ranked) > 1 and (own[first] == own[ranked[1]] or own[first] < margin * own[ranked[1]]):
        return None
    return first if shared[first] <= max(1, MAX_CONTESTED_SHARE * (own[first] + shared[first])) else None
