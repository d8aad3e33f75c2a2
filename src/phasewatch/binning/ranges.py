"""Ranges of raw readings and bins; a value outside its range is a broken or forged reading and is left out."""

from __future__ import annotations

from functools import cache

import numpy as np

from phasewatch.channels import CUSTOM_CHANNEL_KEYS, CUSTOM_FIELD_KEYS, ChannelSpec, RawFieldSpec, list_raw_fields
from phasewatch.types import ChannelKind, SourceKind

__all__ = ["ValueRange", "channel_range", "raw_range", "raw_ranges"]

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_MAX_INTEGER = 2.0**63  # no 64-bit reading is larger

ValueRange = tuple[float, float]  # minimum and maximum

# By unit of a channel of kind rate or delta: far above any machine, far below what a forged counter reaches.
_MAX_PER_UNIT = {"cores": 2.0**16, "B/s": 1e15, "1/s": 1e12}
_MAX_RATIO = {"1": 1e3, "s": 3_600.0, "B": 1e7, "bit": 64.0}
_SHARE_RANGE: ValueRange = (0.0, 1.0)

# By unit: 1 PiB, 1 PiB in a second, more threads than a kernel has ids, and the whole of a share.
_MAX_RAW_GAUGE = {"B": 2.0**50, "B/s": 2.0**50, "1": 2.0**24, "1/1000": 1000.0}
_MAX_RAW_TICK = 2.0**32  # distinct ports or addresses per tick; IPv4 has no more addresses


def channel_range(channel: ChannelSpec) -> ValueRange:
    """Return the minimum and maximum of a channel's bins, in the channel's unit.

    A user's own channel has the range of float32, because its unit may be anything.
    """
    if (channel.source, channel.name) in CUSTOM_CHANNEL_KEYS:
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
    """Return the minimum and maximum of a raw field's readings, in the field's unit.

    A counter has no upper limit here; its channel limits the increase in a bin. A user's own field has the range of
    float32.
    """
    if (spec.source, spec.field) in CUSTOM_FIELD_KEYS:
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
    """Return the range of each raw field of a source, in the order of its rows."""
    return tuple(raw_range(spec) for spec in list_raw_fields(source))


def _is_share(source: SourceKind, field: str) -> bool:
    spec = next(spec for spec in list_raw_fields(source) if spec.field == field)
    return (spec.type == "float" and spec.unit == "1") or spec.unit == "1/1000"
