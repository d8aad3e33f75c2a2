"""Digests by which copies are found: of all telemetry, and of the rows of proc for near-copies."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from phasewatch.episode.model import Episode
from phasewatch.vocab import Source

SKETCH_ROWS = 64


def telemetry_sha256(episode: Episode) -> str:
    """Digest all rows of all sources without stamps and numbers: equal for a copy under another id."""
    digest = sha256()
    for source in Source:
        readings = episode.rows.get(source)
        if readings is None:
            continue
        digest.update(f"{source}:{len(readings)}:{','.join(readings.fields)};".encode())
        for column in readings.columns:
            digest.update(np.ascontiguousarray(column).tobytes())
        digest.update(np.ascontiguousarray(readings.present).tobytes())
    return digest.hexdigest()


def proc_sketch(episode: Episode) -> tuple[int, ...]:
    """Give the 64 smallest digests of the distinct rows of proc, over the fields that change in the episode.

    Two episodes that share half of the smaller sketch are near-duplicates (a bottom-k sketch of Jaccard similarity;
    Broder 1997). The digest mixes 64-bit words (splitmix64's finaliser), fast and not against an adversary.
    """
    readings = episode.rows.get(Source.PROC)
    if readings is None or len(readings) == 0:
        return ()
    moving = [c.view(np.uint64) for c in readings.columns if bool((c != c[0]).any())]
    if not moving:
        return ()
    mixed: NDArray[np.uint64] = np.zeros(len(readings), np.uint64)
    for column in moving:
        mixed = _mix(mixed ^ np.ascontiguousarray(column)) + np.uint64(0x9E3779B97F4A7C15)
    return tuple(int(x) for x in np.unique(mixed)[:SKETCH_ROWS])


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
