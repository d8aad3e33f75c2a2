"""The registry of telemetry channels: `RAW_FIELDS`, `CHANNELS`, their groups and the named channel sets."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import combinations

from phasewatch.channels.base import BASE_FIELDS, BASE_TABLE, LEVEL_CHANNELS
from phasewatch.channels.custom import CUSTOM_CHANNELS, check_channel_kind
from phasewatch.channels.extended import EXTENDED_FIELDS, EXTENDED_TABLE
from phasewatch.channels.specs import ChannelSpec, RawFieldSpec
from phasewatch.errors import UsageError, suggest_names
from phasewatch.types import ChannelGroup, ChannelKind, ChannelTrust, SourceKind

__all__ = [
    "BASE_CHANNELS",
    "CHANNELS",
    "CHANNEL_NAMES",
    "RAW_FIELDS",
    "SENSOR_SETS",
    "build_channel_mask",
    "has_extended_channels",
    "list_channel_sets",
    "list_raw_fields",
    "list_source_subsets",
]

# Base fields and channels come first, so that bins of both versions agree in their first columns.
RAW_FIELDS: tuple[RawFieldSpec, ...] = (
    *BASE_FIELDS,
    *EXTENDED_FIELDS,
    *(RawFieldSpec(**row) for row in CUSTOM_CHANNELS.raw),
)
CHANNELS: tuple[ChannelSpec, ...] = (
    *BASE_TABLE,
    *EXTENDED_TABLE,
    *(ChannelSpec(**row) for row in CUSTOM_CHANNELS.channels),
)
CHANNEL_NAMES = tuple(c.full_name for c in CHANNELS)
BASE_CHANNELS = tuple(c for c in CHANNELS if c.group is ChannelGroup.BASE)  # with a user's own channels
_EXTENDED_NAMES = frozenset(c.full_name for c in CHANNELS if c.group is ChannelGroup.EXTENDED)


def list_raw_fields(source: SourceKind) -> tuple[RawFieldSpec, ...]:
    """Return the raw fields of one source, in the order of its rows."""
    return tuple(spec for spec in RAW_FIELDS if spec.source is source)


def _name_channels(channels: Iterable[ChannelSpec]) -> frozenset[str]:
    return frozenset(c.full_name for c in channels)


_HOST_CHANNELS = tuple(c for c in BASE_CHANNELS if c.in_deployment)
_NETWORK_CHANNELS = tuple(c for c in CHANNELS if c.source is SourceKind.NETFLOW)
_SENSOR_CHANNELS = tuple(c for c in CHANNELS if c.group is ChannelGroup.EXTENDED and c.accel != "kvm")
_TAP_NAMES = frozenset(
    f"{SourceKind.NETFLOW}.{n}" for n in ("out_pkts", "out_bytes", "in_pkts", "in_bytes", "mean_out_size")
)
# What a plain libvirt domain shows: /proc, the block statistics of `virsh domstats`, and the counters of its tap. Only
# root and QEMU's own user and group may read /proc/PID/io.
_PROCESS_CHANNELS = tuple(c for c in _HOST_CHANNELS if c.source is SourceKind.PROC)
_IO_NAMES = frozenset(c.full_name for c in _PROCESS_CHANNELS if c.name.startswith("io_"))
_LIBVIRT_BLOCK_NAMES = frozenset(
    f"{SourceKind.QMP}.{n}"
    for n in ("blk_rd_bytes", "blk_wr_bytes", "blk_rd_ops", "blk_wr_ops", "blk_flush_ops", "blk_wr_lat")
)


_CHANNEL_SETS: dict[str, frozenset[str]] = {
    "realistic": _name_channels(_HOST_CHANNELS),
    "oracle": _name_channels(BASE_CHANNELS),
    "portable": _name_channels(c for c in _HOST_CHANNELS if c.accel == "any"),
    "balloon": _name_channels(c for c in BASE_CHANNELS if c.source is SourceKind.QMP and c.trust is ChannelTrust.GUEST),
    "guest": _name_channels(c for c in BASE_CHANNELS if c.source is SourceKind.GUEST),
    "tap": _TAP_NAMES,  # the counters of a tap device, without a look into frames
    **{
        str(source): _name_channels(c for c in _HOST_CHANNELS if c.source is source)
        for source in (SourceKind.PROC, SourceKind.QMP, SourceKind.NETFLOW)
    },
    # All that the host measures without KVM's help, which no VM under software emulation has.
    "extended": _name_channels(c for c in CHANNELS if c.in_deployment and c.accel != "kvm"),
    "kvm": _name_channels(c for c in CHANNELS if c.accel == "kvm"),
    "device": _name_channels((*_NETWORK_CHANNELS, *(c for c in BASE_CHANNELS if c.source is SourceKind.GUEST))),
    "libvirt": _name_channels(_PROCESS_CHANNELS) | _LIBVIRT_BLOCK_NAMES | _TAP_NAMES,
    "libvirt-user": (_name_channels(_PROCESS_CHANNELS) - _IO_NAMES) | _LIBVIRT_BLOCK_NAMES | _TAP_NAMES,
    # The sensors that `extended` adds to `realistic`, one by one.
    "dns": _name_channels(c for c in _SENSOR_CHANNELS if c.name.startswith("dns_")),
    "flows": _name_channels(
        c for c in _SENSOR_CHANNELS if c.source is SourceKind.NETFLOW and not c.name.startswith("dns_")
    ),
    "blocks": _name_channels(c for c in _SENSOR_CHANNELS if c.name.startswith("blk_")),
    "dirty": _name_channels(c for c in _SENSOR_CHANNELS if c.name.startswith("mem_")),
    # What a log of disk accesses can give, for recordings of others that have nothing else.
    "disk": frozenset(
        f"{SourceKind.QMP}.{n}" for n in ("blk_rd_bytes", "blk_wr_bytes", "blk_clusters", "blk_rewritten")
    ),
}
# The longest name first, because a name may hold a hyphen.
_NAMES_PATTERN = "|".join(re.escape(name) for name in sorted(_CHANNEL_SETS, key=len, reverse=True))
_SIGNED_PART = re.compile(rf"([+-])((?:{_NAMES_PATTERN})(?=[+-]|$)|[^+-]*)")
SENSOR_SETS = ("flows", "dns", "blocks", "dirty")  # together with `realistic` they are `extended`


def has_extended_channels(names: Iterable[str]) -> bool:
    """Return whether any of some channels belongs to the group ``extended``."""
    return not _EXTENDED_NAMES.isdisjoint(names)


def build_channel_mask(name: str) -> tuple[bool, ...]:
    """Return which of `CHANNELS` a channel set holds, in their order.

    Args:
        name: One of `list_channel_sets`, or several joined with ``+`` (``realistic+balloon``, ``proc+netflow``) or
            taken away with ``-`` (``extended-dns``), from left to right.

    Raises:
        UsageError: If a part of the name is unknown, or no channel is left.
    """
    chosen: frozenset[str] = frozenset()
    for sign, part in _SIGNED_PART.findall(f"+{name}"):
        if part not in _CHANNEL_SETS:
            raise UsageError(f"no channel set {part!r}; {suggest_names(part, _CHANNEL_SETS)}")
        chosen = chosen - _CHANNEL_SETS[part] if sign == "-" else chosen | _CHANNEL_SETS[part]
    if not chosen:
        raise UsageError(f"channel set {name!r} has no channel left; take away less")
    return tuple(c.full_name in chosen for c in CHANNELS)


def list_channel_sets() -> tuple[str, ...]:
    """Return the names that `build_channel_mask` accepts."""
    return tuple(_CHANNEL_SETS)


def list_source_subsets() -> tuple[str, ...]:
    """Return the 15 channel sets of one, two, three or all sources, smallest first.

    >>> list_source_subsets()[4], list_source_subsets()[-1]
    ('proc+qmp', 'proc+qmp+netflow+guest')
    """
    sources = tuple(map(str, SourceKind))
    return tuple("+".join(chosen) for n in range(1, len(sources) + 1) for chosen in combinations(sources, n))


def _check_tables() -> None:
    """Raise at import if a table contradicts itself; a wrong row would spoil every file that is made with it.

    Raises:
        UsageError: If a name or field is listed twice, or a channel does not match its fields.
    """
    raw = {(spec.source, spec.field): spec for spec in RAW_FIELDS}
    if len(raw) != len(RAW_FIELDS):
        raise UsageError("channels: a raw field is listed twice")
    for table in (CHANNELS, LEVEL_CHANNELS):
        if len({c.full_name for c in table}) != len(table):
            raise UsageError("channels: a channel is listed twice")
        for channel in table:
            if len(channel.fields) != (2 if channel.kind is ChannelKind.RATIO else 1):
                raise UsageError(f"channels: {channel.full_name} has {len(channel.fields)} fields")
            for field in channel.fields:
                if (channel.source, field) not in raw:
                    raise UsageError(f"channels: {channel.full_name} reads {field}, which is no raw field")
                if table is CHANNELS:
                    check_channel_kind(channel.kind, raw[channel.source, field].nature, channel=channel.full_name)


_check_tables()
