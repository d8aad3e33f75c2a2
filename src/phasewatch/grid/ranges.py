"""What a reading and a bin can be at most: a number outside its range is no measurement, and is left out."""

from __future__ import annotations

from functools import cache

import numpy as np

from phasewatch.channels import EXTRAS, ChannelSpec, RawSpec, raw_fields
from phasewatch.vocab import Kind, Source

FLOAT32_MAX = float(np.finfo(np.float32).max)
_WHOLE = 2.0**63  # no 64-bit reading is larger

Range = tuple[float, float]  # least and greatest value that can be

# Per unit of a channel that counts or changes per second: far above any machine, far below what a forged counter gives.
_MOST_PER_UNIT = {"cores": 2.0**16, "B/s": 1e15, "1/s": 1e12}
_MOST_RATIO = {"1": 1e3, "s": 3_600.0, "B": 1e7}
_SHARE: Range = (0.0, 1.0)

_RAW_GAUGE = {"B": 2.0**50, "1": 2.0**24}  # of a level: 1 PiB, and more threads than a kernel has ids for
_RAW_TICK = 2.0**32  # distinct ports or addresses of one tick: there are no more addresses

_OWN_FIELDS = frozenset((row["source"], row["field"]) for row in EXTRAS.raw)
_OWN_CHANNELS = frozenset((row["source"], row["name"]) for row in EXTRAS.channels)


def channel_range(channel: ChannelSpec) -> Range:
    """Return the least and greatest value that a bin of a channel can have, in the channel's unit.

    A user's own channel has the range of float32: its unit may be anything.
    """
    if (channel.source, channel.name) in _OWN_CHANNELS:
        return -FLOAT32_MAX, FLOAT32_MAX
    if channel.kind is Kind.RATE:
        return 0.0, _MOST_PER_UNIT.get(channel.unit, FLOAT32_MAX)
    if channel.kind is Kind.DELTA:
        most = _MOST_PER_UNIT.get(channel.unit, FLOAT32_MAX)
        return -most, most
    if channel.kind is Kind.RATIO:
        return 0.0, _MOST_RATIO.get(channel.unit, FLOAT32_MAX)
    if channel.kind is Kind.GAUGE and _is_share(channel.source, channel.fields[0]):
        return _SHARE
    return 0.0, _WHOLE


def raw_range(spec: RawSpec) -> Range:
    """Return the least and greatest value that a raw field can read, in the field's unit.

    A counter may reach anything from 0 on: what it adds in a bin is bounded by its channel. A user's own field may read
    anything.
    """
    if (spec.source, spec.field) in _OWN_FIELDS:
        return -FLOAT32_MAX, FLOAT32_MAX
    if spec.nature == "counter":
        return 0.0, _WHOLE
    if spec.nature == "tick":
        return 0.0, _RAW_TICK
    if spec.type == "float" and spec.unit == "1":
        return _SHARE
    return 0.0, _RAW_GAUGE.get(spec.unit, _WHOLE)


@cache
def raw_ranges(source: Source) -> tuple[Range, ...]:
    """Return the range of each raw field of a source, in their order."""
    return tuple(raw_range(spec) for spec in raw_fields(source))


def _is_share(source: Source, field: str) -> bool:
    spec = next(spec for spec in raw_fields(source) if spec.field == field)
    return spec.type == "float" and spec.unit == "1"
