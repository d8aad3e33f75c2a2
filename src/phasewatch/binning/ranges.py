"""What a reading and a bin can be at most: a number outside its range is no measurement, and is left out."""

from __future__ import annotations

from functools import cache

import numpy as np

from phasewatch.channels import CUSTOM_CHANNELS, ChannelSpec, RawFieldSpec, list_raw_fields
from phasewatch.types import ChannelKind, SourceKind

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_MAX_INTEGER = 2.0**63  # no 64-bit reading is larger

ValueRange = tuple[float, float]  # least and greatest value that can be

# Per unit of a channel that counts or changes per second: far above any machine, far below what a forged counter gives.
_MAX_PER_UNIT = {"cores": 2.0**16, "B/s": 1e15, "1/s": 1e12}
_MAX_RATIO = {"1": 1e3, "s": 3_600.0, "B": 1e7}
_SHARE_RANGE: ValueRange = (0.0, 1.0)

_MAX_RAW_GAUGE = {"B": 2.0**50, "1": 2.0**24}  # of a level: 1 PiB, and more threads than a kernel has ids for
_MAX_RAW_TICK = 2.0**32  # distinct ports or addresses of one tick: there are no more addresses

_CUSTOM_FIELDS = frozenset((row["source"], row["field"]) for row in CUSTOM_CHANNELS.raw)
_CUSTOM_CHANNELS = frozenset((row["source"], row["name"]) for row in CUSTOM_CHANNELS.channels)


def channel_range(channel: ChannelSpec) -> ValueRange:
    """Return the least and greatest value that a bin of a channel can have, in the channel's unit.

    A user's own channel has the range of float32: its unit may be anything.
    """
    if (channel.source, channel.name) in _CUSTOM_CHANNELS:
        return -_FLOAT32_MAX, _FLOAT32_MAX
    if channel.kind is ChannelKind.RATE:
        return 0.0, _MAX_PER_UNIT.get(channel.unit, _FLOAT32_MAX)
    if channel.kind is ChannelKind.DELTA:
        most = _MAX_PER_UNIT.get(channel.unit, _FLOAT32_MAX)
        return -most, most
    if channel.kind is ChannelKind.RATIO:
        return 0.0, _MAX_RATIO.get(channel.unit, _FLOAT32_MAX)
    if channel.kind is ChannelKind.GAUGE and _is_share(channel.source, channel.fields[0]):
        return _SHARE_RANGE
    return 0.0, _MAX_INTEGER


def raw_range(spec: RawFieldSpec) -> ValueRange:
    """Return the least and greatest value that a raw field can read, in the field's unit.

    A counter may reach anything from 0 on: what it adds in a bin is bounded by its channel. A user's own field may read
    anything.
    """
    if (spec.source, spec.field) in _CUSTOM_FIELDS:
        return -_FLOAT32_MAX, _FLOAT32_MAX
    if spec.nature == "counter":
        return 0.0, _MAX_INTEGER
    if spec.nature == "tick":
        return 0.0, _MAX_RAW_TICK
    if spec.type == "float" and spec.unit == "1":
        return _SHARE_RANGE
    return 0.0, _MAX_RAW_GAUGE.get(spec.unit, _MAX_INTEGER)


@cache
def raw_ranges(source: SourceKind) -> tuple[ValueRange, ...]:
    """Return the range of each raw field of a source, in their order."""
    return tuple(raw_range(spec) for spec in list_raw_fields(source))


def _is_share(source: SourceKind, field: str) -> bool:
    spec = next(spec for spec in list_raw_fields(source) if spec.field == field)
    return spec.type == "float" and spec.unit == "1"
