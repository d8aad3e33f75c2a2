"""Digests by which copies are found: of all telemetry, and of what changes from row to row of proc for near-copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import raw_fields
from phasewatch.episode.model import Episode
from phasewatch.vocab import Source

SKETCH_ROWS = 64
MIN_DISTINCT = 0.5  # of a field's increments; one that repeats itself more tells no machine from another

Words = NDArray[np.uint64]
Column = NDArray[np.int64] | NDArray[np.float64]

_FIELDS = [spec.field for spec in raw_fields(Source.PROC)]
_FINE = np.array([_FIELDS.index(f) for f in ("vcpu_run_ns", "vcpu_wait_ns", "main_run_ns", "aux_run_ns")])
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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
    """Return the 64 smallest digests of two successive increments of a CPU time of proc.

    Two episodes that share half of the smaller sketch are near-duplicates (a bottom-k sketch of Jaccard similarity;
    Broder 1997). Counters are totals since QEMU started: their rows differ altogether when a constant is added, their
    increments do not. Each CPU time is digested by itself, so that noise on one does not hide a copy. They are counted
    in nanoseconds, so that two machines hardly ever agree twice in a row; where they were not read, or are too regular,
    the increments of all fields together stand in.

    The digest mixes 64-bit words (splitmix64's finaliser), fast and not against an adversary.
    """
    readings = episode.rows.get(Source.PROC)
    if readings is None or len(readings) < 3:
        return ()
    columns, present = readings.columns, readings.present
    mono = readings.t_mono_ns
    if (mono[1:] < mono[:-1]).any():  # rows in another order are the same rows
        order = np.lexsort((readings.seq, mono))
        columns, present = tuple(column[order] for column in columns), present[order]
    digests = []
    for fields in _together(present[:, _FINE]):
        places = _FINE[fields]
        read = present[:, places[0]]
        values = np.array([columns[place] for place in places])
        steps = np.diff(values if read.all() else values[:, read])
        ranked = np.sort(steps)
        distinct = 1 + np.count_nonzero(ranked[:, 1:] != ranked[:, :-1], axis=1)
        varied = (distinct >= MIN_DISTINCT * steps.shape[1]) & (steps.shape[1] > 1)
        digests.append(_pairs(steps[varied].view(np.uint64), steps[varied] != 0, fields[varied] + 1))
    if not any(map(len, digests)):
        digests = [_whole_rows(columns, present)]
    found: list[int] = np.unique(np.concatenate(digests))[:SKETCH_ROWS].tolist()
    return tuple(found)


def _together(present: NDArray[np.bool_]) -> Iterator[NDArray[np.intp]]:
    """Group the columns of ``(n, k)`` that are present in the same rows; mostly that is one group."""
    groups: dict[bytes, list[int]] = {}
    for i, read in enumerate(present.T):
        groups.setdefault(read.tobytes(), []).append(i)
    yield from (np.array(members) for members in groups.values())


def _whole_rows(columns: Sequence[Column], present: NDArray[np.bool_]) -> Words:
    """Digest the increments of all fields that move, row by row, two at a time."""
    read = present.any(axis=1)
    kept = [column[read] for column in columns]
    moving = [column.view(np.uint64) for column in kept if len(column) > 2 and bool((column != column[0]).any())]
    if not moving:
        return np.empty(0, np.uint64)
    steps = np.array([np.diff(column) for column in moving])
    mixed: Words = np.zeros(steps.shape[1], np.uint64)
    for row in steps:
        mixed = _mix(mixed ^ row) + _GOLDEN
    return _pairs(mixed[None, :], (steps != 0).any(axis=0)[None, :], np.zeros(1, np.intp))


def _pairs(steps: Words, moved: NDArray[np.bool_], salts: NDArray[np.intp]) -> Words:
    """Digest each step with the next one of its row, where both moved.

    Args:
        steps: ``(k, m)``.
        moved: ``(k, m)``.
        salts: ``(k,)``, one for each row.
    """
    first = _mix(steps[:, :-1] ^ salts[:, None].astype(np.uint64)) + _GOLDEN
    found: Words = _mix(first ^ steps[:, 1:])[moved[:, 1:] & moved[:, :-1]]
    return found


def _mix(x: Words) -> Words:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
