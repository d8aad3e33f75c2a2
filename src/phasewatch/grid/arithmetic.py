"""The arithmetic of one bin: from the readings that it spans to its number; the whole-episode and the live binner share it.

A bin's span runs from reading ``first`` to reading ``last`` of one channel (rates, changes, ratios), or covers the
readings after ``first`` up to ``last`` (means, maxima). Everything here works on many bins at once, a column each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phasewatch.vocab import STALE_NS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Values = Ints | Floats
Bools = NDArray[np.bool_]

CANONICAL_NAN = np.uint32(0x7FC00000)


def time_breaks(t_mono_ns: Ints) -> Ints | None:
    """Count, up to each reading, the steps that no rate may cross: longer than 2.5 s, or not forward in time.

    Returns:
        ``(m,)`` running count, so that a span is whole when its two ends have the same; None when there is no break.
    """
    delta = t_mono_ns[1:] - t_mono_ns[:-1]
    broken = (delta <= 0) | (delta > STALE_NS)
    return _running(broken) if broken.any() else None


def resets(values: Values) -> Ints | None:
    """Count, up to each reading, the falls of each counter.

    Args:
        values: ``(k, m)``, a counter a row.

    Returns:
        ``(k, m)`` running counts; None when no counter ever fell.
    """
    fell = values[:, 1:] < values[:, :-1]
    return _running(fell) if fell.any() else None


def _running(steps: Bools) -> Ints:
    """Turn flags of steps into running counts at readings; the first reading has none behind it."""
    counts = np.zeros((*steps.shape[:-1], steps.shape[-1] + 1), np.int64)
    np.cumsum(steps, axis=-1, out=counts[..., 1:])
    return counts


def crossed(counts: Ints, first: Ints, last: Ints) -> Bools:
    """Say of each span whether a counted step lies inside it."""
    found: Bools = counts[..., last] != counts[..., first]
    return found


def rates(values: Values, scales: Floats, seconds: Floats, first: Ints, last: Ints) -> Floats:
    """Change per second over each span.

    Args:
        values: ``(k, m)`` a counter or level a row.
        scales: ``(k, 1)`` from raw to the channel's unit.
        seconds: ``(b,)`` monotonic time of each span; 0 where there is no span (the caller makes that NaN).
        first, last: ``(b,)`` indices of readings.
    """
    # Integers are subtracted before they become float64: a counter may need more than its 53 bits.
    change = np.subtract(values.take(last, axis=1), values.take(first, axis=1)).astype(np.float64)
    change *= scales
    change /= seconds
    return change


def ratios(above: Values, below: Values, scales: Floats, first: Ints, last: Ints) -> Floats:
    """One counter's change over another's; 0 where the second stood still."""
    top = np.subtract(above.take(last, axis=1), above.take(first, axis=1)).astype(np.float64)
    bottom = np.subtract(below.take(last, axis=1), below.take(first, axis=1)).astype(np.float64)
    top *= scales
    still = bottom == 0.0
    bottom[still] = 1.0
    top /= bottom
    top[still] = 0.0
    return top


def means(values: Values, scales: Floats, first: Ints, last: Ints) -> Floats:
    """Mean of the readings after ``first`` up to ``last``, summed from left to right."""
    count = last - first
    total = values.take(np.minimum(first + 1, last), axis=1).astype(np.float64)
    most = int(count.max(initial=1))
    for step in range(2, most + 1):
        more = np.flatnonzero(count >= step)
        total[:, more] += values[:, first[more] + step]
    if most > 1:
        total /= np.maximum(count, 1)
    total *= scales
    return total


def maxima(values: Values, scales: Floats, first: Ints, last: Ints) -> Floats:
    """Largest of the readings after ``first`` up to ``last``."""
    count = last - first
    top = values.take(np.minimum(first + 1, last), axis=1)
    for step in range(2, int(count.max(initial=1)) + 1):
        more = np.flatnonzero(count >= step)
        top[:, more] = np.maximum(top[:, more], values[:, first[more] + step])
    scaled: Floats = top.astype(np.float64) * scales
    return scaled


def to_float32(values: Floats) -> NDArray[np.float32]:
    """Store as float32 in one spelling: no negative zero, and one NaN (0x7fc00000)."""
    with np.errstate(over="ignore"):  # what is out of range was blanked before; a warning would help nobody
        stored = values.astype(np.float32, order="C")
    stored += np.float32(0.0)
    unknown = np.isnan(stored)
    stored.view(np.uint32)[unknown] = CANONICAL_NAN
    return stored
