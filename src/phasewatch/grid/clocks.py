"""Put every source's wall stamps into Unix time, and find the moments at which that clock stepped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.episode.findings import Finding
from phasewatch.episode.model import Clocks, Episode, SourceRows
from phasewatch.vocab import ClockBase, Source, Status

SLACK_NS = 60_000_000_000  # a stamp this far outside the labels is taken in another clock
STEP_NS = 250_000_000  # wall against monotonic clock between two readings: more is a step
SAME_CLOCK_NS = 1_000_000  # two clocks that agree this well are one; pairs are read microseconds apart
_INT64_MAX = 2**63 - 1

Pair = tuple[tuple[int, int], tuple[int, int]]


def rebase(episode: Episode) -> tuple[Episode, tuple[Finding, ...]]:
    """Give the episode with every wall stamp in Unix time, and what had to be said about its clocks.

    A source whose declared base is another clock is re-based by that clock's pair, without a word. One that says
    ``unix`` and is not (fewer than half of its rows within a minute of the labels) is re-based by the only clock that
    puts 95 % of them there (clocks that agree to a millisecond are one). A source for which neither can be done is missing from the result. In the result every
    base is ``unix``.

    Returns:
        The episode, and findings ``clock-base-repaired:<source>``, ``clock-base:<source>`` and ``clock-step``.

    Source: DESIGN.md, section 4, "Re-basing".
    """
    clocks = episode.manifest.clocks
    rows: dict[Source, SourceRows] = {}
    findings: list[Finding] = []
    is_changed = False
    for source, readings in episode.rows.items():
        base = clocks.base.get(source, ClockBase.UNIX)
        if base is not ClockBase.UNIX:
            is_changed = True
            if base in clocks.pairs:
                rows[source] = restamp(readings, clocks.pairs[base])
            else:
                findings.append(
                    _missing(source, f"the stamps are in {base}, and no pair relates that clock to Unix time")
                )
            continue
        outside = 2 * _inside(readings.t_wall_ns, episode) < len(readings)
        if not outside:
            rows[source] = readings
            continue
        is_changed = True
        found = _repairs(readings, clocks, episode)
        if len(found) == 1:
            clock, rows[source] = found[0]
            words = f"the stamps claim Unix time and are in {clock}; re-based"
            findings.append(
                Finding(
                    code=f"clock-base-repaired:{source}", severity=Status.DEGRADED, place=f"{source}.jsonl", words=words
                )
            )
        else:
            why = "no clock puts them there" if not found else f"{' and '.join(c for c, _ in found)} would both fit"
            findings.append(_missing(source, f"most stamps lie more than 60 s outside the labels, and {why}"))
    if is_changed:
        unix = Clocks(base=dict.fromkeys(clocks.base, ClockBase.UNIX), pairs=clocks.pairs)
        episode = replace(episode, rows=rows, manifest=msgspec.structs.replace(episode.manifest, clocks=unix))
    return episode, (*findings, *_step_findings(episode))


def rebase_stamp(c_ns: int, pair: Pair) -> int:
    """Turn one reading of a clock into Unix time, on the line through its two pairs.

    Plain integers on purpose: the product needs about 120 bits.
    """
    (c0, u0), (c1, u1) = pair
    return u0 + (c_ns - c0) * (u1 - u0) // (c1 - c0)


def restamp(readings: SourceRows, pair: Pair) -> SourceRows:
    """Give the readings with their wall stamps turned from a clock into Unix time.

    A stamp that lands outside [0, 2^63) is garbage whatever clock it is in; it is held at the bound, far outside any
    episode, so that int64 differences cannot overflow.
    """
    stamps = [min(max(rebase_stamp(c, pair), 0), _INT64_MAX) for c in readings.t_wall_ns.tolist()]
    return replace(readings, t_wall_ns=np.array(stamps, np.int64))


def clock_steps(episode: Episode) -> NDArray[np.int64]:
    """Find where the wall clock stepped against the monotonic one by more than 250 ms between two readings of a source.

    Args:
        episode: Re-based.

    Returns:
        ``(k, 2)`` int64: first and last wall stamp (ns) that each step touches. A step back touches the time that
        passes twice.
    """
    spans: list[NDArray[np.int64]] = []
    for readings in episode.rows.values():
        wall, mono = readings.t_wall_ns, readings.t_mono_ns
        offset = wall - mono
        if not len(offset) or int(offset.max()) - int(offset.min()) <= STEP_NS:
            continue
        if (mono[1:] < mono[:-1]).any():  # rows arrived out of order; a step is between neighbours in time
            order = np.lexsort((readings.seq, mono))
            wall, mono = wall[order], mono[order]
        # In float64, for garbage stamps would overflow int64; below 104 days it is exact all the same.
        jumps = np.flatnonzero(np.abs(np.diff(wall).astype(np.float64) - np.diff(mono)) > STEP_NS)
        if len(jumps):
            both = np.stack((wall[jumps], wall[jumps + 1]), axis=1)
            spans.append(np.sort(both, axis=1))
    return np.concatenate(spans) if spans else np.empty((0, 2), np.int64)


def _inside(t_wall_ns: NDArray[np.int64], episode: Episode) -> int:
    """Count the stamps within a minute of the labels."""
    low, high = episode.t0_ns - SLACK_NS, episode.t_end_ns + SLACK_NS
    return int(np.count_nonzero((t_wall_ns >= low) & (t_wall_ns <= high)))


def _repairs(readings: SourceRows, clocks: Clocks, episode: Episode) -> Sequence[tuple[ClockBase, SourceRows]]:
    """Give each clock that puts at least 95 % of the rows where the labels are, with the rows so stamped.

    Clocks that put every row within a millisecond of each other are one: on a machine that never slept, boot time and
    monotonic time are. The monotonic one then stands for both.
    """
    fitting: list[tuple[ClockBase, SourceRows]] = []
    for clock in sorted(clocks.pairs, reverse=True):
        tried = restamp(readings, clocks.pairs[clock])
        if 100 * _inside(tried.t_wall_ns, episode) < 95 * len(readings):
            continue
        if not any(int(np.abs(tried.t_wall_ns - r.t_wall_ns).max()) <= SAME_CLOCK_NS for _, r in fitting):
            fitting.append((clock, tried))
    return fitting[::-1]


def _missing(source: Source, words: str) -> Finding:
    """Say that a source is lost; without `proc` nothing can be said of the VM at all."""
    severity = Status.REJECTED if source is Source.PROC else Status.DEGRADED
    return Finding(code=f"clock-base:{source}", severity=severity, place=f"{source}.jsonl", words=words)


def _step_findings(episode: Episode) -> tuple[Finding, ...]:
    """Say once that the clock stepped, however many sources saw it."""
    steps = clock_steps(episode)
    if not len(steps):
        return ()
    at_s = (int(steps[:, 0].min()) - episode.t0_ns) / 1e9
    words = f"the wall clock stepped against the monotonic one by more than 250 ms, first at {at_s:.1f} s"
    return (Finding(code="clock-step", severity=Status.DEGRADED, place="", words=words),)
