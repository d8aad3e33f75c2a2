"""What the flow table counts, once more: slow, obvious, over the whole list of frames, written from ADR 86."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

S = 1_000_000_000
SYN, RST, FIN, ACK = 2, 4, 1, 16


@dataclass(frozen=True)
class Passing:
    """One TCP or UDP frame between the guest and a remote end."""

    t_ns: int
    outgoing: bool
    protocol: int
    far: bytes
    port: int
    near: int
    flags: int
    size: int


def flow_reading(frames: Sequence[Passing], ticks: Sequence[int]) -> tuple[int, ...]:
    """Return the reading at the last of some ticks; a tick reads the frames up to its time."""
    frames = [f for f in frames if f.t_ns <= ticks[-1]]
    ends = _ends(frames)
    talk = [f for f in frames if ends[_end(f)] != "served"]
    begin = frames[0].t_ns if frames else 0
    first = {end: next(f.t_ns for f in frames if _end(f) == end) for end in ends}
    new = {end for end, kind in ends.items() if kind == "contact" and first[end] - begin >= 30 * S}
    top = top_out = 0
    for i, tick in enumerate(ticks):
        inside = [f for f in talk if (ticks[i - 1] if i else -1) < f.t_ns <= tick]
        sums = {}
        for f in inside:  # in order of the first frame in the tick, which decides between equals
            both, out = sums.get(_end(f), (0, 0))
            sums[_end(f)] = both + f.size, out + (f.size if f.outgoing else 0)
        if sums:
            most = max(both for both, _ in sums.values())
            both, out = next(pair for pair in sums.values() if pair[0] == most)
            top, top_out = top + both, top_out + out
    accepted, refused, silent, closed, closed_ns, opened = _connections(frames, ticks)
    return (
        len(new),
        sum(f.size for f in talk),
        sum(f.size for f in talk if _end(f) in new and f.t_ns - first[_end(f)] < 60 * S),
        top,
        top_out,
        accepted,
        refused,
        silent,
        closed,
        closed_ns,
        opened,
        _rhythm(talk, ticks),
    )


def _end(f: Passing) -> tuple[int, bytes, int]:
    return f.protocol, f.far, f.port


def _ends(frames: Sequence[Passing]) -> dict[tuple[int, bytes, int], str]:
    """Return what the first frame with each remote end says about it."""
    ends: dict[tuple[int, bytes, int], str] = {}
    for f in frames:
        if _end(f) in ends:
            continue
        if not f.outgoing or (f.protocol == 6 and f.flags & SYN and f.flags & ACK):
            ends[_end(f)] = "served"
        elif f.protocol == 6 and not f.flags & SYN:
            ends[_end(f)] = "late"
        elif f.protocol == 17 and f.near < 1024 <= f.port:
            ends[_end(f)] = "served"
        else:
            ends[_end(f)] = "contact"
    return ends


def _connections(frames: Sequence[Passing], ticks: Sequence[int]) -> tuple[int, ...]:
    """Follow each connection by itself: attempts of one port pair, one after the other."""
    accepted = refused = silent = closed = closed_ns = still_open = 0
    for pair in {(f.far, f.port, f.near) for f in frames if f.protocol == 6}:
        own = [f for f in frames if f.protocol == 6 and (f.far, f.port, f.near) == pair]
        state, since, seen = "none", 0, 0
        events: list[tuple[int, int, Passing | None]] = [(f.t_ns, 0, f) for f in own] + [(t, 1, None) for t in ticks]
        for t_ns, _, f in sorted(events, key=lambda event: event[:2]):
            if f is None:
                if state == "asked" and t_ns - since >= 3 * S:
                    state, silent = "silent", silent + 1
                if state == "open" and t_ns - seen >= 600 * S:
                    state = "none"
                continue
            seen = t_ns
            opens = f.outgoing and f.flags & SYN and not f.flags & (ACK | RST)
            if opens:
                if state in ("none", "open"):
                    state, since = "asked", t_ns
            elif state == "open":
                if f.flags & (FIN | RST):
                    state, closed, closed_ns = "none", closed + 1, closed_ns + t_ns - since
            elif not f.outgoing and state in ("asked", "silent"):
                if f.flags & RST:
                    refused += state == "asked"
                    state = "none"
                elif f.flags & SYN and f.flags & ACK:
                    accepted += state == "asked"
                    state, since = "open", t_ns
        still_open += state == "open"
    return accepted, refused, silent, closed, closed_ns, still_open


def _rhythm(talk: Sequence[Passing], ticks: Sequence[int]) -> int:
    """Return the largest rhythm at the last tick, 0 to 1000."""
    largest = 0.0
    for end in {_end(f) for f in talk}:
        own = [f for f in talk if _end(f) == end]
        starts: list[int] = []
        last: int | None = None
        score = 0.0
        events: list[tuple[int, int, Passing | None]] = [(f.t_ns, 0, f) for f in own] + [(t, 1, None) for t in ticks]
        for t_ns, _, f in sorted(events, key=lambda event: event[:2]):
            if f is not None:
                if f.outgoing and (last is None or t_ns - last >= S):
                    starts.append(t_ns)
                last = t_ns
                continue
            starts = starts[-13:]
            gaps = [b - a for a, b in itertools.pairwise(starts)]
            score = 0.0
            if len(gaps) >= 3:
                mean = sum(gaps) / len(gaps)
                if t_ns - starts[-1] > 2 * mean + S:
                    starts = []
                else:
                    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
                    score = (1 - spread / mean) * len(gaps) / (len(gaps) + 2)
        largest = max(largest, score)
    return round(1000 * largest)
