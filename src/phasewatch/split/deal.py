"""Windows dealt to sets by their hash, which is what leaks: neighbours that share half of their bins part company."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from phasewatch.split.fold import Deal, Part


def deal_windows(deal: Deal, windows: Iterable[tuple[str, int]]) -> list[Part]:
    """Give the set of each window.

    A window is tested in exactly one fold and validates in the one before it, by halves.

    Args:
        deal: Which fold, of how many.
        windows: Episode id and ``t_center_ns`` of each.
    """
    return [_part_of(deal, episode_id, t_center_ns) for episode_id, t_center_ns in windows]


def _part_of(deal: Deal, episode_id: str, t_center_ns: int) -> Part:
    digest = hashlib.sha256(f"random_windows|{episode_id}|{t_center_ns}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") % deal.of
    if place == deal.number:
        return Part.TEST
    if place == (deal.number + 1) % deal.of:
        return Part.VAL_A if digest[8] % 2 else Part.VAL_B
    return Part.TRAIN
