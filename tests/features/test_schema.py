"""What the feature columns are called, what they are measured in, and what the schema hash covers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from phasewatch.channels import CHANNELS
from phasewatch.features.derived import DERIVED_FEATURES
from phasewatch.features.schema import (
    deployment_mask,
    feature_names,
    feature_units,
    list_channel_columns,
    list_column_channels,
    render_schema,
    schema_hash,
    stat_names,
)
from phasewatch.types import ChannelKind, ChannelTrust, SourceKind


def test_columns_go_channel_by_channel_five_stats_each_then_the_derived_columns() -> None:
    names = feature_names()

    assert len(names) == len(set(names)) == 5 * len(CHANNELS) + len(DERIVED_FEATURES)
    assert names[: 5 * len(CHANNELS)] == stat_names()
    assert names[5 * len(CHANNELS) :] == tuple(feature.name for feature in DERIVED_FEATURES)
    assert names[:6] == (
        "proc.cpu_user.mean",
        "proc.cpu_user.std",
        "proc.cpu_user.p50",
        "proc.cpu_user.p95",
        "proc.cpu_user.slope",
        "proc.cpu_sys.mean",
    )
    assert stat_names()[-1] == "netflow.dns_nxdomain_share.slope"


def test_units_stand_beside_names_and_a_slope_is_per_second() -> None:
    units = dict(zip(feature_names(), feature_units(), strict=True))

    assert units["proc.cpu_user.p95"] == "cores"
    assert units["proc.cpu_user.slope"] == "cores/s"
    assert units["netflow.out_bytes.slope"] == "B/s/s"
    assert units["ratio.disk_write_size"] == "B"


def test_column_is_in_deployment_if_the_host_measures_it() -> None:
    mask = dict(zip(feature_names(), deployment_mask(), strict=True))

    assert sum(mask[name] for name in stat_names()) == 5 * sum(c.in_deployment for c in CHANNELS)
    assert all(mask[feature.name] for feature in DERIVED_FEATURES)
    assert mask["qmp.jit_tb.mean"]
    assert not mask["qmp.bal_free_delta.mean"]
    assert not mask["guest.ctxt.mean"]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"source": SourceKind.QMP},
        {"kind": ChannelKind.DELTA},
        {"fields": ("other",)},
        {"unit": "s"},
        {"scale": 1e-6},
        {"trust": ChannelTrust.GUEST},
        {"semantics": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_a_columns_meaning_changes_the_hash(change: dict[str, object]) -> None:
    changed = (replace(CHANNELS[0], **change), *CHANNELS[1:])  # type: ignore[arg-type]

    assert schema_hash(changed) != schema_hash()


def test_description_of_a_channel_does_not_change_the_schema_hash() -> None:
    assert schema_hash((replace(CHANNELS[0], about="other", reads="other"), *CHANNELS[1:])) == schema_hash()


def test_the_order_of_channels_is_part_of_the_hash() -> None:
    assert schema_hash((CHANNELS[1], CHANNELS[0], *CHANNELS[2:])) != schema_hash()


@pytest.mark.parametrize(
    ("column", "channels"),
    [
        ("proc.cpu_user.slope", ("proc.cpu_user",)),
        ("ratio.disk_write_size", ("qmp.blk_wr_bytes", "qmp.blk_wr_ops")),
        ("burst.cpu_and_sending", ("proc.vcpu_run", "netflow.out_pkts")),
        ("burst.cpu_share@60s", ("proc.vcpu_run",)),
        ("proc.vcpu_run.max@-2", ("proc.vcpu_run",)),
        ("netflow.in_bytes.std@120s", ("netflow.in_bytes",)),
    ],
)
def test_every_column_names_the_channels_that_it_needs(column: str, channels: tuple[str, ...]) -> None:
    assert list_column_channels(column) == channels


def test_a_channel_set_has_the_columns_whose_channels_it_has_all() -> None:
    columns = ("qmp.blk_wr_ops.mean", "ratio.disk_write_size", "qmp.blk_wr_bytes.max@30s", "burst.disk_write_starts")

    assert list_channel_columns(columns, ("qmp.blk_wr_bytes",)) == columns[2:]
    assert list_channel_columns(columns, ("qmp.blk_wr_ops", "qmp.blk_wr_bytes")) == columns


def test_channels_without_those_of_a_derived_column_do_not_have_it() -> None:
    only = tuple(c for c in CHANNELS if c.source is SourceKind.PROC)

    assert "burst.cpu_share" in feature_names(only)
    assert "ratio.cpu_switches" in feature_names(only)
    assert "ratio.disk_write_per_cpu" not in feature_names(only)
    assert len(feature_names(only)) == len(feature_units(only)) == len(deployment_mask(only))


def test_the_schema_file_says_what_the_tables_hold() -> None:
    schema = json.loads(render_schema("f" * 64, "b" * 64))

    assert list(schema) == [
        "version",
        "phases",
        "feature_names",
        "units",
        "in_deployment_mask",
        "channels",
        "stat_suffixes",
        "derived",
        "window_seconds",
        "stride_seconds",
        "bin_seconds",
        "schema_hash",
        "behaviour_fingerprint",
        "base",
    ]
    assert schema["phases"] == ["clean", "armed", "infecting", "active", "dormant"]
    assert (schema["window_seconds"], schema["stride_seconds"], schema["bin_seconds"]) == (10.0, 5.0, 0.5)
    assert len(schema["feature_names"]) == len(schema["units"]) == len(schema["in_deployment_mask"]) == 5 * 73 + 83
    assert schema["version"] == 2
    assert [row["name"] for row in schema["derived"]] == schema["feature_names"][5 * len(CHANNELS) :]
    assert schema["derived"][0] == {
        "name": "ratio.disk_write_size",
        "unit": "B",
        "formula": "mean(qmp.blk_wr_bytes) / (mean(qmp.blk_wr_ops) + 0.05)",
        "channels": ["qmp.blk_wr_bytes", "qmp.blk_wr_ops"],
    }
    assert schema["channels"][0] == {
        "name": "cpu_user",
        "source": "proc",
        "kind": "rate",
        "unit": "cores",
        "trust": "host",
        "in_deployment": True,
        "group": "base",
    }
    assert len(schema["channels"]) == len(CHANNELS)
