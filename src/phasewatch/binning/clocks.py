"""Convert every source's wall stamps to Unix time, and find the steps of that clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.bundle.model import ClockMetadata, Episode, SourceRows
from phasewatch.bundle.problems import BundleFinding
from phasewatch.types import BundleStatus, ClockBase, SourceKind

__all__ = [
    "LABEL_MARGIN_NS",
    "MIN_CLOCK_STEP_NS",
    "ClockPair",
    "find_clock_steps",
    "rebase_episode",
    "rebase_stamp",
]

LABEL_MARGIN_NS = 60_000_000_000  # stamps farther outside the labels are in another clock
MIN_CLOCK_STEP_NS = 250_000_000  # smallest change of wall minus monotonic time that counts as a step
SAME_CLOCK_TOLERANCE_NS = 1_000_000  # clocks that agree within it count as one; pairs are read µs apart
_INT64_MAX = 2**63 - 1

ClockPair = tuple[tuple[int, int], tuple[int, int]]


def rebase_episode(episode: Episode) -> tuple[Episode, tuple[BundleFinding, ...]]:
    """Convert the wall stamps of an episode to Unix time.

    A source that declares another clock is rebased by that clock's pair, without a finding. A source that claims
    ``unix``, but has most stamps more than a minute outside the labels, is rebased by the only clock that fits
    (`_find_fitting_clocks`). A source that cannot be rebased is left out.

    Returns:
        The episode, in which every base is ``unix``, and the findings ``clock-base-repaired:<source>``,
        ``clock-base:<source>`` and ``clock-step``.

    Source: docs/formats/run.md.
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
                        source, f"the stamps are in {base}, but no pair relates that clock to Unix time"
                    )
                )
            continue
        outside = 2 * _count_near_labels(readings.t_wall_ns, episode) < len(readings)
        if not outside:
            rows[source] = readings
            continue
        is_changed = True
        fitting = _find_fitting_clocks(readings, clocks, episode)
        if len(fitting) == 1:
            clock, rows[source] = fitting[0]
            words = f"the stamps claim Unix time but are in {clock}; rebased"
            findings.append(
                BundleFinding(
                    code=f"clock-base-repaired:{source}",
                    severity=BundleStatus.DEGRADED,
                    place=f"{source}.jsonl",
                    words=words,
                )
            )
        else:
            why = "no clock fits" if not fitting else f"{' and '.join(c for c, _ in fitting)} both fit"
            findings.append(
                _build_missing_finding(source, f"most stamps lie more than 60 s outside the labels, and {why}")
            )
    if is_changed:
        unix = ClockMetadata(base=dict.fromkeys(clocks.base, ClockBase.UNIX), pairs=clocks.pairs)
        episode = replace(episode, rows=rows, manifest=msgspec.structs.replace(episode.manifest, clocks=unix))
    return episode, (*findings, *_find_step_findings(episode))


def rebase_stamp(c_ns: int, pair: ClockPair) -> int:
    """Convert one reading of a clock to Unix time in ns, on the line through its two pairs.

    It computes with Python integers, because the product needs about 120 bits.
    """
    (c0, u0), (c1, u1) = pair
    return u0 + (c_ns - c0) * (u1 - u0) // (c1 - c0)


def _rebase_readings(readings: SourceRows, pair: ClockPair) -> SourceRows:
    """Return the readings with wall stamps converted from a clock to Unix time.

    Stamps are clipped to [0, 2^63), so that int64 differences cannot overflow; valid stamps are far inside.
    """
    stamps = [min(max(rebase_stamp(c, pair), 0), _INT64_MAX) for c in readings.t_wall_ns.tolist()]
    return replace(readings, t_wall_ns=np.array(stamps, np.int64))


def find_clock_steps(episode: Episode) -> NDArray[np.int64]:
    """Find steps of the wall clock against the monotonic one of more than 250 ms between two readings of a source.

    Args:
        episode: The rebased episode.

    Returns:
        ``(k, 2)`` int64: first and last wall stamp of each step in ns. For a step back, the span
        is the time that occurs twice.
    """
    spans: list[NDArray[np.int64]] = []
    for readings in episode.rows.values():
        wall, mono = readings.t_wall_ns, readings.t_mono_ns
        offset = wall - mono
        if not len(offset) or int(offset.max()) - int(offset.min()) <= MIN_CLOCK_STEP_NS:
            continue
        if (mono[1:] < mono[:-1]).any():  # rows are out of order; steps are between neighbours in time
            order = np.lexsort((readings.seq, mono))
            wall, mono = wall[order], mono[order]
        # float64, because invalid stamps would overflow int64; it is exact below 104 days.
        jumps = np.flatnonzero(np.abs(np.diff(wall).astype(np.float64) - np.diff(mono)) > MIN_CLOCK_STEP_NS)
        if len(jumps):
            both = np.stack((wall[jumps], wall[jumps + 1]), axis=1)
            spans.append(np.sort(both, axis=1))
    return np.concatenate(spans) if spans else np.empty((0, 2), np.int64)


def _count_near_labels(t_wall_ns: NDArray[np.int64], episode: Episode) -> int:
    """Return the number of stamps within a minute of the labels.

    Args:
        t_wall_ns: ``(n,)`` int64.
        episode: The episode with the labels.
    """
    low, high = episode.t0_ns - LABEL_MARGIN_NS, episode.t_end_ns + LABEL_MARGIN_NS
    return int(np.count_nonzero((t_wall_ns >= low) & (t_wall_ns <= high)))


def _find_fitting_clocks(
    readings: SourceRows, clocks: ClockMetadata, episode: Episode
) -> Sequence[tuple[ClockBase, SourceRows]]:
    """Return each clock that places at least 95 % of the rows near the labels, with the rebased rows.

    Clocks that place every row within 1 ms of each other count as one, as boot time and monotonic time do on a machine
    that never slept; the monotonic clock is returned for both.
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
    """Return the finding on a source that cannot be rebased; without proc the bundle is rejected."""
    severity = BundleStatus.REJECTED if source is SourceKind.PROC else BundleStatus.DEGRADED
    return BundleFinding(code=f"clock-base:{source}", severity=severity, place=f"{source}.jsonl", words=words)


def _find_step_findings(episode: Episode) -> tuple[BundleFinding, ...]:
    """Return one finding if the clock stepped, however many sources show it."""
    steps = find_clock_steps(episode)
    if not len(steps):
        return ()
    at_s = (int(steps[:, 0].min()) - episode.t0_ns) / 1e9
    words = f"the wall clock stepped against the monotonic one by more than 250 ms, first at {at_s:.1f} s"
    return (BundleFinding(code="clock-step", severity=BundleStatus.DEGRADED, place="", words=words),)
