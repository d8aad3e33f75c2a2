"""Put every source's wall stamps into Unix time, and find the moments at which that clock stepped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.bundle.model import ClockMetadata, Episode, SourceRows
from phasewatch.bundle.problems import BundleFinding
from phasewatch.types import BundleStatus, ClockBase, SourceKind

LABEL_MARGIN_NS = 60_000_000_000  # a stamp this far outside the labels is taken in another clock
MIN_CLOCK_STEP_NS = 250_000_000  # wall against monotonic clock between two readings: more is a step
SAME_CLOCK_TOLERANCE_NS = 1_000_000  # two clocks that agree this well are one; pairs are read microseconds apart
_INT64_MAX = 2**63 - 1

ClockPair = tuple[tuple[int, int], tuple[int, int]]


def rebase_episode(episode: Episode) -> tuple[Episode, tuple[BundleFinding, ...]]:
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
    rows: dict[SourceKind, SourceRows] = {}
    findings: list[BundleFinding] = []
    is_changed = False
    for source, readings in episode.rows.items():
        base = clocks.base.get(source, ClockBase.UNIX)
        if base is not ClockBase.UNIX:
            is_changed = True
            if base in clocks.pairs:
                rows[source] = _rebase_readings(readings, clocks.pairs[base])
            else:
                findings.append(
                    _build_missing_finding(
                        source, f"the stamps are in {base}, and no pair relates that clock to Unix time"
                    )
                )
            continue
        outside = 2 * _count_near_labels(readings.t_wall_ns, episode) < len(readings)
        if not outside:
            rows[source] = readings
            continue
        is_changed = True
        found = _find_fitting_clocks(readings, clocks, episode)
        if len(found) == 1:
            clock, rows[source] = found[0]
            words = f"the stamps claim Unix time and are in {clock}; re-based"
            findings.append(
                BundleFinding(
                    code=f"clock-base-repaired:{source}",
                    severity=BundleStatus.DEGRADED,
                    place=f"{source}.jsonl",
                    words=words,
                )
            )
        else:
            why = "no clock puts them there" if not found else f"{' and '.join(c for c, _ in found)} would both fit"
            findings.append(
                _build_missing_finding(source, f"most stamps lie more than 60 s outside the labels, and {why}")
            )
    if is_changed:
        unix = ClockMetadata(base=dict.fromkeys(clocks.base, ClockBase.UNIX), pairs=clocks.pairs)
        episode = replace(episode, rows=rows, manifest=msgspec.structs.replace(episode.manifest, clocks=unix))
    return episode, (*findings, *_find_step_findings(episode))


def rebase_stamp(c_ns: int, pair: ClockPair) -> int:
    """Turn one reading of a clock into Unix time, on the line through its two pairs.

    Plain integers on purpose: the product needs about 120 bits.
    """
    (c0, u0), (c1, u1) = pair
    return u0 + (c_ns - c0) * (u1 - u0) // (c1 - c0)


def _rebase_readings(readings: SourceRows, pair: ClockPair) -> SourceRows:
    """Give the readings with their wall stamps turned from a clock into Unix time.

    A stamp that lands outside [0, 2^63) is garbage whatever clock it is in; it is held at the bound, far outside any
    episode, so that int64 differences cannot overflow.
    """
    stamps = [min(max(rebase_stamp(c, pair), 0), _INT64_MAX) for c in readings.t_wall_ns.tolist()]
    return replace(readings, t_wall_ns=np.array(stamps, np.int64))


def find_clock_steps(episode: Episode) -> NDArray[np.int64]:
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
        if not len(offset) or int(offset.max()) - int(offset.min()) <= MIN_CLOCK_STEP_NS:
            continue
        if (mono[1:] < mono[:-1]).any():  # rows arrived out of order; a step is between neighbours in time
            order = np.lexsort((readings.seq, mono))
            wall, mono = wall[order], mono[order]
        # In float64, for garbage stamps would overflow int64; below 104 days it is exact all the same.
        jumps = np.flatnonzero(np.abs(np.diff(wall).astype(np.float64) - np.diff(mono)) > MIN_CLOCK_STEP_NS)
        if len(jumps):
            both = np.stack((wall[jumps], wall[jumps + 1]), axis=1)
            spans.append(np.sort(both, axis=1))
    return np.concatenate(spans) if spans else np.empty((0, 2), np.int64)


def _count_near_labels(t_wall_ns: NDArray[np.int64], episode: Episode) -> int:
    """Count the stamps within a minute of the labels."""
    low, high = episode.t0_ns - LABEL_MARGIN_NS, episode.t_end_ns + LABEL_MARGIN_NS
    return int(np.count_nonzero((t_wall_ns >= low) & (t_wall_ns <= high)))


def _find_fitting_clocks(
    readings: SourceRows, clocks: ClockMetadata, episode: Episode
) -> Sequence[tuple[ClockBase, SourceRows]]:
    """Give each clock that puts at least 95 % of the rows where the labels are, with the rows so stamped.

    Clocks that put every row within a millisecond of each other are one: on a machine that never slept, boot time and
    monotonic time are. The monotonic one then stands for both.
    """
    fitting: list[tuple[ClockBase, SourceRows]] = []
    for clock in sorted(clocks.pairs, reverse=True):
        tried = _rebase_readings(readings, clocks.pairs[clock])
        if 100 * _count_near_labels(tried.t_wall_ns, episode) < 95 * len(readings):
            continue
        if not any(int(np.abs(tried.t_wall_ns - r.t_wall_ns).max()) <= SAME_CLOCK_TOLERANCE_NS for _, r in fitting):
            fitting.append((clock, tried))
    return fitting[::-1]


def _build_missing_finding(source: SourceKind, words: str) -> BundleFinding:
    """Say that a source is lost; without `proc` nothing can be said of the VM at all."""
    severity = BundleStatus.REJECTED if source is SourceKind.PROC else BundleStatus.DEGRADED
    return BundleFinding(code=f"clock-base:{source}", severity=severity, place=f"{source}.jsonl", words=words)


def _find_step_findings(episode: Episode) -> tuple[BundleFinding, ...]:
    """Say once that the clock stepped, however many sources saw it."""
    steps = find_clock_steps(episode)
    if not len(steps):
        return ()
    at_s = (int(steps[:, 0].min()) - episode.t0_ns) / 1e9
    words = f"the wall clock stepped against the monotonic one by more than 250 ms, first at {at_s:.1f} s"
    return (BundleFinding(code="clock-step", severity=BundleStatus.DEGRADED, place="", words=words),)
