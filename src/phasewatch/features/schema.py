"""The columns of the feature tables: names, units, and the schema hash that a model and its table must share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import Any

from phasewatch.channels import BASE_CHANNELS, CHANNELS, ChannelSpec
from phasewatch.features.derived import DERIVED_FEATURES, DerivedFeature
from phasewatch.features.stats import STATS
from phasewatch.types import BIN_NS, MIN_FINITE_BINS, PHASES, STALE_NS, STRIDE_BINS, WINDOW_BINS

__all__ = [
    "FEATURE_SCHEMA_VERSION",
    "deployment_mask",
    "feature_names",
    "feature_units",
    "list_channel_columns",
    "list_column_channels",
    "render_schema",
    "schema_hash",
    "stat_names",
]

FEATURE_SCHEMA_VERSION = 2
# The bundle format that defined the readings. Format version 2 changed the manifest only, so columns mean the same.
_READINGS_FORMAT = "phasewatch-episode/1"
_DERIVED_CHANNELS = {feature.name: feature.channels for feature in DERIVED_FEATURES}


def stat_names(channels: Sequence[ChannelSpec] = CHANNELS) -> tuple[str, ...]:
    """Return the statistics in order, five for each channel: ``proc.cpu_user.mean`` …"""
    return tuple(f"{channel.full_name}.{stat}" for channel in channels for stat in STATS)


def feature_names(channels: Sequence[ChannelSpec] = CHANNELS) -> tuple[str, ...]:
    """Return the feature columns of a window in order: the statistics, then the derived columns."""
    return (*stat_names(channels), *(feature.name for feature in _list_derived(channels)))


def feature_units(channels: Sequence[ChannelSpec] = CHANNELS) -> tuple[str, ...]:
    """Return the unit of each column; a slope is in the channel's unit per second."""
    stats = (f"{channel.unit}/s" if stat == "slope" else channel.unit for channel in channels for stat in STATS)
    return (*stats, *(feature.unit for feature in _list_derived(channels)))


def deployment_mask(channels: Sequence[ChannelSpec] = CHANNELS) -> tuple[bool, ...]:
    """Return whether each column is available to a defender without the guest's cooperation."""
    deployed = {channel.full_name for channel in channels if channel.in_deployment}
    return tuple(set(list_column_channels(name)) <= deployed for name in feature_names(channels))


def list_column_channels(column: str) -> tuple[str, ...]:
    """Return the full names of the channels that a column needs.

    Args:
        column: A statistic (``proc.cpu_user.mean``), a derived column (``ratio.net_out_size``), or a context column
            (either of them with ``@`` and a time).
    """
    name = column.partition("@")[0]
    return _DERIVED_CHANNELS.get(name) or (name.rpartition(".")[0],)


def list_channel_columns(columns: Iterable[str], channels: Collection[str]) -> tuple[str, ...]:
    """Return the columns that a set of channels has: those whose channels are all in it."""
    return tuple(column for column in columns if set(list_column_channels(column)) <= set(channels))


def _list_derived(channels: Sequence[ChannelSpec]) -> tuple[DerivedFeature, ...]:
    """Return the derived columns that need no other channels."""
    names = {channel.full_name for channel in channels}
    return tuple(feature for feature in DERIVED_FEATURES if set(feature.channels) <= names)


def schema_hash(channels: Sequence[ChannelSpec] = CHANNELS) -> str:
    """Return the sha256 of everything that determines the meaning of the columns.

    Source: docs/formats/run.md.
    """
    if channels is CHANNELS or channels is BASE_CHANNELS:
        return _compute_standard_hash(channels is BASE_CHANNELS)
    return _compute_hash(channels)


@cache
def _compute_standard_hash(is_base: bool) -> str:
    return _compute_hash(BASE_CHANNELS if is_base else CHANNELS)


def _compute_hash(channels: Sequence[ChannelSpec]) -> str:
    meaning = {
        "format": _READINGS_FORMAT,
        "phases": [str(phase) for phase in PHASES],
        "bin_ns": BIN_NS,
        "window_bins": WINDOW_BINS,
        "stride_bins": STRIDE_BINS,
        "stale_ns": STALE_NS,
        "min_finite": MIN_FINITE_BINS,
        "stats": list(STATS),
        "channels": [
            {
                "name": c.name,
                "source": str(c.source),
                "kind": str(c.kind),
                "fields": list(c.fields),
                "unit": c.unit,
                "scale": c.scale,
                "trust": str(c.trust),
                "semantics": c.semantics,
            }
            for c in channels
        ],
        "derived": _render_derived(channels),
    }
    return hashlib.sha256(_render_canonical_json(meaning).encode()).hexdigest()


def _render_derived(channels: Sequence[ChannelSpec]) -> list[dict[str, Any]]:
    return [
        {"name": f.name, "unit": f.unit, "formula": f.formula, "channels": list(f.channels)}
        for f in _list_derived(channels)
    ]


def _render_canonical_json(value: Any) -> str:
    """Render JSON in canonical form: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def render_schema(behaviour_fingerprint: str, base_fingerprint: str, channels: Sequence[ChannelSpec] = CHANNELS) -> str:
    """Render `feature_schema_v2.json`.

    Args:
        behaviour_fingerprint: Digest of what the code computes of all channels.
        base_fingerprint: The same of the base channels alone.
        channels: The channels of the tables.
    """
    content = {
        "version": FEATURE_SCHEMA_VERSION,
        "phases": [str(phase) for phase in PHASES],
        "feature_names": list(feature_names(channels)),
        "units": list(feature_units(channels)),
        "in_deployment_mask": list(deployment_mask(channels)),
        "channels": [
            {
                "name": c.name,
                "source": str(c.source),
                "kind": str(c.kind),
                "unit": c.unit,
                "trust": str(c.trust),
                "in_deployment": c.in_deployment,
                "group": str(c.group),
            }
            for c in channels
        ],
        "stat_suffixes": list(STATS),
        "derived": _render_derived(channels),
        "window_seconds": WINDOW_BINS * BIN_NS / 1e9,
        "stride_seconds": STRIDE_BINS * BIN_NS / 1e9,
        "bin_seconds": BIN_NS / 1e9,
        "schema_hash": schema_hash(channels),
        "behaviour_fingerprint": behaviour_fingerprint,
        "base": {
            "schema_hash": schema_hash(BASE_CHANNELS),
            "behaviour_fingerprint": base_fingerprint,
        },
    }
    return json.dumps(content, indent=1) + "\n"
