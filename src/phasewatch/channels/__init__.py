"""The registry of telemetry channels.

`RAW_FIELDS` lists the fields of telemetry rows, `CHANNELS` the 73 values per bin that models see: 46 of the group
``base``, and 27 that joined later. `LEVEL_CHANNELS` has cumulative totals, which reveal the elapsed time; only the
levels-only baseline and the leakage checks use them. Validator, bins, features, schema, documentation and dashboard
derive their tables from here.
"""

from phasewatch.channels.base import LEVEL_CHANNELS
from phasewatch.channels.custom import (
    CUSTOM_CHANNEL_KEYS,
    CUSTOM_CHANNELS,
    CUSTOM_FIELD_KEYS,
    MAX_CHANNELS_FILE_BYTES,
    CustomChannels,
    check_channel_kind,
    get_custom_channels_digest,
    parse_custom_channels,
    read_custom_channels,
)
from phasewatch.channels.registry import (
    BASE_CHANNELS,
    CHANNEL_NAMES,
    CHANNELS,
    RAW_FIELDS,
    SENSOR_SETS,
    build_channel_mask,
    has_extended_channels,
    list_channel_sets,
    list_raw_fields,
    list_source_subsets,
)
from phasewatch.channels.specs import ChannelSpec, RawFieldSpec

__all__ = [
    "BASE_CHANNELS",
    "CHANNELS",
    "CHANNEL_NAMES",
    "CUSTOM_CHANNELS",
    "CUSTOM_CHANNEL_KEYS",
    "CUSTOM_FIELD_KEYS",
    "LEVEL_CHANNELS",
    "MAX_CHANNELS_FILE_BYTES",
    "RAW_FIELDS",
    "SENSOR_SETS",
    "ChannelSpec",
    "CustomChannels",
    "RawFieldSpec",
    "build_channel_mask",
    "check_channel_kind",
    "get_custom_channels_digest",
    "has_extended_channels",
    "list_channel_sets",
    "list_raw_fields",
    "list_source_subsets",
    "parse_custom_channels",
    "read_custom_channels",
]
