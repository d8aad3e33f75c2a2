"""Episode ids that two hosts claim: which of the two bundles is used, decided by numbers that a name cannot change."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

MAX_CONTESTED_SHARE = 0.1  # of a host's episodes that others claim too; with more, nothing tells who copied whom


def find_contested_ids(pairs: Iterable[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    """Return the (host_id, episode_id) pairs to leave out so that each episode id is left once at most.

    Files of a run name an episode by its id alone. Of the hosts that hold one id, the one that vouches for it keeps it
    (see `pick_owner`); without one nobody does.

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
    taken: set[tuple[str, str]] = set()
    for episode, hosts in holders.items():
        if len(hosts) > 1:
            owner = pick_owner(hosts, own=own, shared=shared)
            taken.update((host, episode) for host in hosts if host != owner)
    return frozenset(taken)


def pick_owner(hosts: Iterable[str], *, own: Counter[str], shared: Counter[str], margin: int = 1) -> str | None:
    """Return the host that keeps what several claim: most episodes of its own, and hardly one that others claim.

    Names and times decide nothing, because whoever writes a bundle chooses both. A host of which others claim more than
    MAX_SHARED (one episode may always be) keeps nothing: whoever copies many episodes of a host would otherwise win by sending some more.

    Args:
        hosts: Who claims it.
        own: Episodes of each host that no other host claims.
        shared: Episodes of each host that another one claims, too.
        margin: How many times as many episodes of its own as any other it needs.
    """
    most = sorted(hosts, key=lambda host: -own[host])
    if len(most) > 1 and (own[most[0]] == own[most[1]] or own[most[0]] < margin * own[most[1]]):
        return None
    return most[0] if shared[most[0]] <= max(1, MAX_CONTESTED_SHARE * (own[most[0]] + shared[most[0]])) else None
