"""The contract of bins, windows and stats once more, in plain Python: slow, obvious, written from the text and not
from the code.

Only ints, floats, lists and loops. Every number that is stored as float32 is given as its 32 bits.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from phasewatch.binning.ranges import channel_range
from phasewatch.bundle.model import Episode
from phasewatch.channels import CHANNELS, LEVEL_CHANNELS, ChannelSpec
from phasewatch.types import ChannelKind, ClockBase, Phase, SourceKind

BIN = 500_000_000
STALE = 2_500_000_000
MINUTE = 60_000_000_000
WINDOW = 10_000_000_000
NAN = float("nan")


@dataclass(frozen=True)
class Reading:
    """One row of a source, as the recorder wrote it."""

    t_wall: int
    t_mono: int
    seq: int
    values: dict[str, int | float | None]


def bits(x: float) -> int:
    """Store a number as float32 and give its bits: one NaN, no negative zero."""
    if math.isnan(x):
        return 0x7FC00000
    stored = ctypes.c_float(x).value
    return struct.unpack("<I", struct.pack("<f", stored if stored != 0 else 0.0))[0]


def number(stored: int) -> float:
    """Read a float32 back."""
    return struct.unpack("<f", struct.pack("<I", stored))[0]


def int64(x: int) -> int:
    """Return the low 64 bits of a whole number, as int64 arithmetic does."""
    return (x + 2**63) % 2**64 - 2**63


def minus(a: int | float, b: int | float) -> float:
    """Subtract, whole numbers in int64."""
    return float(int64(a - b)) if isinstance(a, int) and isinstance(b, int) else float(a) - float(b)


# ---- clocks


def readings_of(episode: Episode) -> tuple[dict[SourceKind, list[Reading]], list[str]]:
    """Return each source's readings with Unix stamps, and the codes of what was found."""
    clocks, found = episode.manifest.clocks, []
    result: dict[SourceKind, list[Reading]] = {}
    for source, rows in episode.rows.items():
        plain = [
            Reading(
                t_wall=int(rows.t_wall_ns[i]),
                t_mono=int(rows.t_mono_ns[i]),
                seq=int(rows.seq[i]),
                values={
                    field: rows.columns[f][i].item() if rows.present[i, f] else None
                    for f, field in enumerate(rows.fields)
                },
            )
            for i in range(len(rows.t_wall_ns))
        ]
        base = clocks.base[source]
        if base != ClockBase.UNIX:
            if base in clocks.pairs:
                result[source] = [in_unix(r, clocks.pairs[base]) for r in plain]
            else:
                found.append(f"clock-base:{source}")
        elif sum(near(r, episode) for r in plain) < len(plain) / 2:
            fitting = []
            for clock in ("monotonic", "boottime", "guest", "unix"):
                if clock not in clocks.pairs:
                    continue
                moved = [in_unix(r, clocks.pairs[ClockBase(clock)]) for r in plain]
                if sum(near(r, episode) for r in moved) * 20 < 19 * len(moved):
                    continue
                if not any(
                    all(abs(a.t_wall - b.t_wall) <= 10**6 for a, b in zip(moved, f, strict=True)) for f in fitting
                ):
                    fitting.append(moved)
            if len(fitting) == 1:
                result[source] = fitting[0]
                found.append(f"clock-base-repaired:{source}")
            else:
                found.append(f"clock-base:{source}")
        else:
            result[source] = plain
    return result, found


def in_unix(r: Reading, pair: tuple[tuple[int, int], tuple[int, int]]) -> Reading:
    """Turn a reading's wall stamp from another clock into Unix time."""
    (c0, u0), (c1, u1) = pair
    wall = u0 + (r.t_wall - c0) * (u1 - u0) // (c1 - c0)
    return Reading(t_wall=max(0, min(wall, 2**63 - 1)), t_mono=r.t_mono, seq=r.seq, values=r.values)


def near(r: Reading, episode: Episode) -> bool:
    """Return whether a reading is within a minute of the labels."""
    return episode.marks[0].t_wall_ns - MINUTE <= r.t_wall <= episode.marks[-1].t_wall_ns + MINUTE


def steps_of(readings: dict[SourceKind, list[Reading]]) -> list[tuple[int, int]]:
    """Find clock steps: neighbours whose wall and monotonic intervals differ by more than 250 ms."""
    steps = []
    for rows in readings.values():
        ordered = sorted(rows, key=lambda r: (r.t_mono, r.seq))
        for a, b in pairwise(ordered):
            if abs((b.t_wall - a.t_wall) - (b.t_mono - a.t_mono)) > 250_000_000:
                steps.append((min(a.t_wall, b.t_wall), max(a.t_wall, b.t_wall)))
    return steps


# ---- bins


@dataclass(frozen=True)
class SlowGrid:
    """Bins and levels as bits, a list per bin; flags of the windows' bins; codes of findings."""

    bins: list[list[int]]
    levels: list[list[int]]
    steps: list[tuple[int, int]]
    codes: list[str]


def grid(episode: Episode) -> SlowGrid:
    """Compute the bins of an episode, channel by channel and bin by bin."""
    readings, codes = readings_of(episode)
    t0, end = episode.marks[0].t_wall_ns, episode.marks[-1].t_wall_ns
    n = (end - t0) // BIN
    bins = columns(CHANNELS, readings, t0, n)
    levels = columns(LEVEL_CHANNELS, readings, t0, n)
    steps = steps_of(readings)
    return SlowGrid(bins=bins, levels=levels, steps=steps, codes=codes + (["clock-step"] if steps else []))


def columns(
    table: Sequence[ChannelSpec], readings: dict[SourceKind, list[Reading]], t0: int, n: int
) -> list[list[int]]:
    """Build all columns of one table, and turn them into rows."""
    made = []
    for channel in table:
        rows = [r for r in readings.get(channel.source, []) if all(r.values.get(f) is not None for f in channel.fields)]
        rows.sort(key=lambda r: (r.t_wall, r.seq))
        made.append(column(channel, rows, t0, n))
    return [[bits(values[i]) for values in made] for i in range(n)]


def column(channel: ChannelSpec, rows: list[Reading], t0: int, n: int) -> list[float]:
    """Compute one channel's bins; the one that ends at t0 comes first and is dropped."""
    ends = [t0 + i * BIN for i in range(n + 1)]
    values: list[float] = []
    for i, end in enumerate(ends):
        last = newest(rows, end)
        before = newest(rows, ends[i - 1]) if i else (None if last in (None, 0) else last - 1)
        if last is None or end - rows[last].t_wall > STALE:
            values.append(NAN)
        elif i and before == last:
            values.append(values[-1])
        else:
            found = value(channel, rows, before, last)
            least, most = channel_range(channel)
            values.append(NAN if found < least or found > most else found)
    return values[1:]


def newest(rows: list[Reading], end: int) -> int | None:
    """Find the last reading stamped at or before a moment."""
    found = None
    for i, r in enumerate(rows):
        if r.t_wall > end:
            break
        found = i
    return found


def value(channel: ChannelSpec, rows: list[Reading], before: int | None, last: int) -> float:
    """Compute one bin's value from the reading of the bin before and the bin's own last one."""
    if channel.kind in (ChannelKind.GAUGE, ChannelKind.COUNT):
        (field,) = channel.fields
        seen = [rows[i].values[field] for i in range(0 if before is None else before + 1, last + 1)]
        if channel.kind is ChannelKind.COUNT:
            return float(max(seen)) * channel.scale  # type: ignore[type-var,arg-type]
        total = float(seen[0])  # type: ignore[arg-type]
        for x in seen[1:]:
            total += float(x)  # type: ignore[arg-type]
        return total / len(seen) * channel.scale
    first = 0 if before is None else before
    if first == last:
        return NAN
    for a, b in zip(rows[first:last], rows[first + 1 : last + 1], strict=True):
        if not 0 < b.t_mono - a.t_mono <= STALE:
            return NAN
        if channel.kind is not ChannelKind.DELTA and any(b.values[f] < a.values[f] for f in channel.fields):  # type: ignore[operator]
            return NAN
    changes = [minus(rows[last].values[f], rows[first].values[f]) for f in channel.fields]  # type: ignore[arg-type]
    if channel.kind is ChannelKind.RATIO:
        return 0.0 if changes[1] == 0 else (changes[0] * channel.scale) / changes[1]
    return (changes[0] * channel.scale) / (float(rows[last].t_mono - rows[first].t_mono) / 1e9)


# ---- windows


def n_windows(n: int) -> int:
    """Count windows by trying where they fit."""
    w = 0
    while 10 * w + 20 <= n:
        w += 1
    return w


def stats(stored: Sequence[int]) -> list[int]:
    """Return mean, std, p50, p95 and slope of bins (as bits), as bits."""
    pairs = [(b, number(x)) for b, x in enumerate(stored) if math.isfinite(number(x))]
    m = len(pairs)
    if m < 10:
        return [bits(NAN)] * 5
    total = 0.0
    for _, x in pairs:
        total += x
    mean = total / m
    squares = 0.0
    for _, x in pairs:
        squares += (x - mean) * (x - mean)
    std = math.sqrt(squares / m)
    ordered = sorted(x for _, x in pairs)
    percentiles = []
    for q in (0.5, 0.95):
        h = (m - 1) * q
        low = math.floor(h)
        high = ordered[low + 1] if low + 1 < m else ordered[low]
        percentiles.append(ordered[low] + (h - low) * (high - ordered[low]))
    ticks = 0.0
    for b, _ in pairs:
        ticks += 0.5 * b
    middle = ticks / m
    above = below = 0.0
    for b, x in pairs:
        above += (0.5 * b - middle) * (x - mean)
        below += (0.5 * b - middle) * (0.5 * b - middle)
    return [bits(x) for x in (mean, std, *percentiles, above / below)]


def label(episode: Episode, j: int) -> tuple[int, int, bool]:
    """Return the j-th window's phase code, purity (as bits) and whether it is mixed, nanosecond by span."""
    start = episode.marks[0].t_wall_ns + j * 5_000_000_000
    held: dict[Phase, int] = {}
    began: dict[Phase, int] = {}
    for mark, after in zip(episode.marks, episode.marks[1:], strict=False):
        inside = min(start + WINDOW, after.t_wall_ns) - max(start, mark.t_wall_ns)
        if inside > 0 and mark.phase is not None:
            held[mark.phase] = held.get(mark.phase, 0) + inside
            began[mark.phase] = mark.t_wall_ns
    winner = max(held, key=lambda phase: (held[phase], began[phase]))
    return winner.code, bits(held[winner] / 10**10), len(held) > 1


def flags(episode: Episode, slow: SlowGrid, j: int) -> int:
    """Return the j-th window's flags: 1 when a clock step touches it, 4 when it is mixed."""
    start = episode.marks[0].t_wall_ns + j * 5_000_000_000
    stepped = any(low < start + WINDOW and high >= start for low, high in slow.steps)
    return (1 if stepped else 0) | (4 if label(episode, j)[2] else 0)
