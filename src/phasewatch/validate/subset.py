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
        members.sort(key=lambda place: _draw(seed, names[place]))
    # In drawn order, or a limit below the number of strata would take the first hosts alone.
    queues = [groups[stratum] for stratum in sorted(groups, key=lambda stratum: _draw(seed, stratum))]
    chosen: list[int] = []
    for turn in range(max((len(queue) for queue in queues), default=0)):
        chosen += [queue[turn] for queue in queues if turn < len(queue)]
    return sorted(chosen[:limit])


def _draw(seed: int, name: str) -> bytes:
    return blake2b(f"{seed}:{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
