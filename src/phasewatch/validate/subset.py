"""A seeded, stratified subset: every stratum is drawn from in turn, so that few still stand for all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b


def pick(strata: Sequence[str], names: Sequence[str], limit: int, *, seed: int = 0) -> list[int]:
    """Choose at most `limit` places, round robin over the strata.

    Args:
        strata: The stratum of each item, such as ``host/profile``.
        names: What identifies each item; its hash with the seed orders a stratum, so that the items' order does not matter.
        limit: How many.

    Returns:
        The chosen places, ascending.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for place, stratum in enumerate(strata):
        groups[stratum].append(place)
    for members in groups.values():
        members.sort(key=lambda place: blake2b(f"{seed}:{names[place]}".encode(), digest_size=8).digest())
    queues = [groups[stratum] for stratum in sorted(groups)]
    chosen: list[int] = []
    for turn in range(max((len(queue) for queue in queues), default=0)):
        chosen += [queue[turn] for queue in queues if turn < len(queue)]
    return sorted(chosen[:limit])
