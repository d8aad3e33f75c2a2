"""The columns of the feature tables: names in order, units, and the hash that a model and its table must share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from phasewatch.bundle.model import BUNDLE_FORMAT
from phasewatch.channels import CHANNELS, ChannelSpec
from phasewatch.features.stats import STATS
from phasewatch.types import BIN_NS, MIN_FINITE_BINS, PHASES, STALE_NS, STRIDE_BINS, WINDOW_BINS

FEATURE_SCHEMA_VERSION = 1


def feature_names(channels: Sequence[ChannelSpec] = CHANNELS) -> tuple[str, ...]:
    """Give the feature columns in order: channel by channel, five stats each (``proc.cpu_user.mean`` …)."""
    return tuple(f"{channel.full_name}.{stat}" for channel in channels for stat in STATS)


def feature_units(channels: Sequence[ChannelSpec] = CHANNELS) -> tuple[str, ...]:
    """Give each column's unit; a slope is in the channel's unit per second."""
    return tuple(f"{channel.unit}/s" if stat == "slope" else channel.unit for channel in channels for stat in STATS)


def deployment_mask(channels: Sequence[ChannelSpec] = CHANNELS) -> tuple[bool, ...]:
    """Say of each column whether a defender has it without the guest's word."""
    return tuple(channel.in_deployment for channel in channels for _ in STATS)


def schema_hash(channels: Sequence[ChannelSpec] = CHANNELS) -> str:
    """Give the sha256 of everything that the meaning of the columns depends on.

    Source: DESIGN.md, section 4, "Schema hash".
    """
    return _compute_standard_hash() if channels is CHANNELS else _compute_hash(channels)


@cache
def _compute_standard_hash() -> str:
    return _compute_hash(CHANNELS)


def _compute_hash(channels: Sequence[ChannelSpec]) -> str:
    meaning = {
        "format": BUNDLE_FORMAT,
        "phases": [str(phase) for phase in PHASES],
        "bin_ns": BIN_NS,
        "window_bins": WINDOW_BINS,
        "stride_bins": STRIDE_BINS,
        "stale_ns": STALE_NS,
        "min_finite": MIN_FINITE_BINS,
        "stats": list(STATS),
        "channels": [
            {
                "name": c.name, "source": str(c.source), "kind": str(c.kind), "fields": list(c.fields), "unit": c.unit,
                "scale": c.scale, "trust": str(c.trust), "semantics": c.semantics,
            }
            for c in channels
        ],
    }  # fmt: skip
    return hashlib.sha256(_render_canonical_json(meaning).encode()).hexdigest()


def _render_canonical_json(value: Any) -> str:
    """Spell JSON in its one form: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def render_schema(behaviour_fingerprint: str, channels: Sequence[ChannelSpec] = CHANNELS) -> str:
    """Write `feature_schema_v1.json` (DESIGN section 5)."""
    content = {
        "version": FEATURE_SCHEMA_VERSION,
        "phases": [str(phase) for phase in PHASES],
        "feature_names": list(feature_names(channels)),
        "units": list(feature_units(channels)),
        "in_deployment_mask": list(deployment_mask(channels)),
        "channels": [
            {
                "name": c.name, "source": str(c.source), "kind": str(c.kind), "unit": c.unit, "trust": str(c.trust),
                "in_deployment": c.in_deployment,
            }
            for c in channels
        ],
        "stat_suffixes": list(STATS),
        "window_seconds": WINDOW_BINS * BIN_NS / 1e9,
        "stride_seconds": STRIDE_BINS * BIN_NS / 1e9,
        "bin_seconds": BIN_NS / 1e9,
        "schema_hash": schema_hash(channels),
        "behaviour_fingerprint": behaviour_fingerprint,
    }  # fmt: skip
    return json.dumps(content, indent=1) + "\n"
