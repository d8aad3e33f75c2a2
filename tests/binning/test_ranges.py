"""What no machine can do reaches no bin: not infinite, not beyond its channel's range, offline and live."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.factories.bundles import T0, bare, episode, rows, with_rows

from phasewatch.binning.align import bin_episode
from phasewatch.binning.ranges import channel_range, raw_range
from phasewatch.binning.stream import StreamBinner
from phasewatch.channels import CHANNELS, LEVEL_CHANNELS, list_raw_fields
from phasewatch.types import BIN_NS, ChannelKind, SourceKind

NAMES = [c.full_name for c in CHANNELS]
AT_S = [-0.25 + 0.5 * i for i in range(22)]


@pytest.mark.parametrize("value", [1e308, 1e30, 1.5, -0.1])
def test_a_share_outside_0_to_1_is_unknown(value: float) -> None:
    busy = [0.5] * 10 + [value] + [0.5] * 11
    whole = bare(rows(SourceKind.QMP, AT_S, vcpu_busy=busy))

    bins = bin_episode(whole).bins[:, NAMES.index("qmp.vcpu_busy")]

    assert np.isnan(bins).sum() == 1
    assert set(bins[~np.isnan(bins)].tolist()) == {0.5}


def test_a_leap_of_a_counter_costs_its_own_bin_alone() -> None:
    run = [10**8 * i + (2**60 if i > 10 else 0) for i in range(22)]
    whole = bare(rows(SourceKind.PROC, AT_S, vcpu_run_ns=run))

    bins = bin_episode(whole).bins[:, NAMES.index("proc.vcpu_run")]

    assert np.isnan(bins).sum() == 1
    assert bins[~np.isnan(bins)] == pytest.approx(0.2)


def test_no_bin_is_infinite_whatever_the_rows_hold() -> None:
    whole = episode((("clean", 20.0),))
    rng = np.random.default_rng(3)
    for source, readings in dict(whole.rows).items():
        columns = []
        for spec, column in zip(list_raw_fields(source), readings.columns, strict=True):
            wild = (
                rng.integers(-(2**63), 2**63 - 1, len(column))
                if spec.type == "int"
                else rng.choice([1e308, -1e308, 0.5], len(column))
            )
            columns.append(np.where(rng.random(len(column)) < 0.3, wild, column))
        whole = with_rows(whole, replace(readings, columns=tuple(columns)))

    grid = bin_episode(whole)

    assert not np.isinf(grid.bins).any()
    assert not np.isinf(grid.levels).any()
    for i, channel in enumerate(CHANNELS):
        known = grid.bins[:, i][np.isfinite(grid.bins[:, i])].astype(np.float64)
        least, most = channel_range(channel)
        assert ((known >= least * 1.0001) & (known <= most * 1.0001)).all(), channel.full_name


def test_a_live_bin_is_bounded_as_one_offline() -> None:
    grid = StreamBinner(T0)
    fields = [spec.field for spec in list_raw_fields(SourceKind.QMP)]
    for i, at_s in enumerate(AT_S):
        values = [(7.0 if i == 10 else 0.5) if field == "vcpu_busy" else None for field in fields]
        at_ns = round(at_s * 1e9)
        grid.add(SourceKind.QMP, (T0 + at_ns, T0 + at_ns, i, *values))

    bins = np.array([b.values[NAMES.index("qmp.vcpu_busy")] for b in grid.close_until(T0 + 20 * BIN_NS + 10**9)])

    assert not np.isinf(bins).any()
    assert np.isnan(bins).sum() == 1


def test_every_channel_and_field_has_a_range_and_shares_have_theirs() -> None:
    for channel in (*CHANNELS, *LEVEL_CHANNELS):
        least, most = channel_range(channel)
        assert least < most < np.inf
        assert (least < 0) == (channel.kind is ChannelKind.DELTA)
    for source in SourceKind:
        for spec in list_raw_fields(source):
            assert raw_range(spec)[0] == 0
            assert (raw_range(spec)[1] == 1) == (spec.type == "float")
