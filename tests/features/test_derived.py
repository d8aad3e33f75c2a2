"""Ratio and burst columns against a slow reading of their definitions, one window at a time."""

from __future__ import annotations

import math
from itertools import pairwise, product
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tests.factories.bins import build_busy_bins, same_bits

from phasewatch.channels import CHANNEL_NAMES, CHANNELS
from phasewatch.features.derived import DERIVED_FEATURES, RATIO_FEATURES, derive_history, derived_features

NAMES = [feature.name for feature in DERIVED_FEATURES]
NAN = float("nan")

RATIOS = {
    "disk_write_size": ("qmp.blk_wr_bytes", "qmp.blk_wr_ops", 0.05),
    "disk_read_size": ("qmp.blk_rd_bytes", "qmp.blk_rd_ops", 0.05),
    "disk_write_per_flush": ("qmp.blk_wr_bytes", "qmp.blk_flush_ops", 0.02),
    "net_out_to_in": ("netflow.out_bytes", "netflow.in_bytes", 10),
    "net_out_size": ("netflow.out_bytes", "netflow.out_pkts", 0.1),
    "net_in_size": ("netflow.in_bytes", "netflow.in_pkts", 0.1),
    "net_out_per_flow": ("netflow.out_bytes", "netflow.new_flows", 0.02),
    "net_in_per_flow": ("netflow.in_bytes", "netflow.new_flows", 0.02),
    "net_packets_per_flow": ("netflow.out_pkts", "netflow.new_flows", 0.02),
    "net_refused_per_connection": ("netflow.rst_in", "netflow.syn_out", 0.02),
    "net_dns_per_flow": ("netflow.dns_queries", "netflow.new_flows", 0.02),
    "net_connections_per_flow": ("netflow.syn_out", "netflow.new_flows", 0.02),
    "net_in_packets_to_out": ("netflow.in_pkts", "netflow.out_pkts", 0.1),
    "net_in_packets_per_connection": ("netflow.in_pkts", "netflow.syn_out", 0.02),
    "disk_write_per_cpu": ("qmp.blk_wr_bytes", "proc.vcpu_run", 0.01),
    "net_out_per_cpu": ("netflow.out_bytes", "proc.vcpu_run", 0.01),
    "disk_read_to_write": ("qmp.blk_rd_bytes", "qmp.blk_wr_bytes", 1000),
    "net_in_to_disk_write": ("netflow.in_bytes", "qmp.blk_wr_bytes", 1000),
    "net_out_to_disk_read": ("netflow.out_bytes", "qmp.blk_rd_bytes", 1000),
    "cpu_switches": ("proc.vcpu_vcs", "proc.vcpu_run", 0.01),
    "cpu_wait": ("proc.vcpu_wait", "proc.vcpu_run", 0.01),
    "jit_blocks_per_cpu": ("qmp.jit_tb", "proc.vcpu_run", 0.01),
    "jit_flushes_per_cpu": ("qmp.jit_tlb_partial", "proc.vcpu_run", 0.01),
}
ACTIVE = {
    "cpu": ("proc.vcpu_run", 0.15),
    "sending": ("netflow.out_pkts", 0.0),
    "download": ("netflow.in_bytes", 3000.0),
    "disk_write": ("qmp.blk_wr_bytes", 0.0),
    "disk_read": ("qmp.blk_rd_bytes", 0.0),
    "upload": ("netflow.out_bytes", 3000.0),
    "connecting": ("netflow.syn_out", 0.0),
    "resolving": ("netflow.dns_queries", 0.0),
}


def read_slowly(window: np.ndarray) -> dict[str, float]:
    """Return every derived column of one window, ``(h, 46)``, by its definition, in plain Python."""

    def values(name: str) -> list[float]:
        return [float(v) for v in window[:, CHANNEL_NAMES.index(name)]]

    def filled(name: str) -> list[float]:
        return [v if math.isfinite(v) else 0.0 for v in values(name)]

    def mean_known(name: str) -> float:
        known = [v for v in values(name) if math.isfinite(v)]
        return math.fsum(known) / len(known) if len(known) >= 10 else NAN

    found = {f"ratio.{n}": mean_known(a) / (mean_known(b) + floor) for n, (a, b, floor) in RATIOS.items()}
    cpu, h = filled("proc.vcpu_run"), len(window)
    for q in (5, 25, 75):
        found[f"burst.cpu_p{q}"] = float(np.percentile(cpu, q))
    found["burst.cpu_above_10_share"] = sum(v > 0.1 for v in cpu) / h
    found["burst.cpu_above_50_share"] = sum(v > 0.5 for v in cpu) / h
    found["burst.cpu_change"] = math.fsum(abs(b - a) for a, b in pairwise(cpu)) / (h - 1)
    root = {name: [math.sqrt(v) if v > 0 else 0.0 for v in filled(name)] for name in CHANNEL_NAMES}
    for name, series in (
        ("cpu", cpu),
        ("net_out", root["netflow.out_bytes"]),
        ("disk_write", root["qmp.blk_wr_bytes"]),
    ):
        middle = math.fsum(series) / h
        x = [v - middle for v in series]
        energy = math.fsum(v * v for v in x)
        if energy <= 1e-12:
            peak = period = after = 0.0
        else:
            at = {lag: math.fsum(a * b for a, b in zip(x, x[lag:], strict=False)) / energy for lag in range(min(h, 41))}
            best = max((lag for lag in at if lag >= 3), key=lambda lag: at[lag])
            peak, period, after = at[best], best / 2, at[1]
        found[f"burst.{name}_autocorrelation_peak"] = peak
        found[f"burst.{name}_period"] = period
        found[f"burst.{name}_autocorrelation_next"] = after
    is_on = {name: [v > limit for v in filled(channel)] for name, (channel, limit) in ACTIVE.items()}
    for name in ("sending", "connecting", "resolving", "disk_write", "cpu"):
        on = is_on[name]
        starts = [i for i in range(h) if on[i] and not (i and on[i - 1])]
        gaps = [(b - a) / 2 for a, b in pairwise(starts)]
        found[f"burst.{name}_starts"] = len(starts) / (h / 120)
        found[f"burst.{name}_length"] = sum(on) / 2 / max(len(starts), 1)
        found[f"burst.{name}_interval"] = float(np.mean(gaps)) if len(gaps) >= 2 else -1.0
        found[f"burst.{name}_irregularity"] = float(np.std(gaps) / np.mean(gaps)) if len(gaps) >= 2 else -1.0
    six = ("cpu", "sending", "download", "disk_write", "disk_read", "upload")
    for i, a in enumerate(six):
        for b in six[i:]:
            key = f"burst.{a}_share" if a == b else f"burst.{a}_and_{b}"
            found[key] = sum(x and y for x, y in zip(is_on[a], is_on[b], strict=True)) / h
    for name, channel in (("net_out", "netflow.out_bytes"), ("net_in", "netflow.in_bytes")):
        on_values = [v for v in filled(channel) if v > 0]
        found[f"burst.{name}_median"] = median(on_values) if on_values else 0.0
        found[f"burst.{name}_variation"] = float(np.std(on_values) / np.mean(on_values)) if on_values else -1.0
    for feature in DERIVED_FEATURES:
        if any(sum(map(math.isfinite, values(name))) < 10 for name in feature.channels):
            found[feature.name] = NAN
    return found


def test_names_are_unique_and_every_column_says_what_it_needs() -> None:
    assert len(set(NAMES)) == len(NAMES) == 83
    assert all(name.startswith(("ratio.", "burst.")) for name in NAMES)
    for feature in DERIVED_FEATURES:
        assert set(feature.channels) <= set(CHANNEL_NAMES)
        assert all(name in feature.formula for name in feature.channels)
        assert feature.unit


@pytest.mark.parametrize("gaps", [0.0, 0.05, 0.5])
def test_columns_have_the_values_of_their_definitions(gaps: float) -> None:
    bins = build_busy_bins(70, 5, gaps=gaps)
    found = derived_features(bins).astype(np.float64)

    assert found.shape == (6, 83)
    for j in range(6):
        expected = read_slowly(bins[10 * j : 10 * j + 20].astype(np.float64))
        assert found[j].tolist() == pytest.approx([expected[name] for name in NAMES], rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("horizon", [60, 120])
def test_a_longer_horizon_uses_the_bins_that_there_are(horizon: int) -> None:
    bins = build_busy_bins(150, 6)
    found = derive_history([bins], horizon).astype(np.float64)

    for j in range(len(found)):
        expected = read_slowly(bins[max(0, 20 + 10 * j - horizon) : 20 + 10 * j].astype(np.float64))
        assert found[j].tolist() == pytest.approx([expected[name] for name in NAMES], rel=1e-5, abs=1e-6)


def test_a_beacon_every_three_seconds_shows_its_period_and_its_regularity() -> None:
    bins = np.zeros((20, len(CHANNELS)), np.float32)
    bins[1::6, CHANNEL_NAMES.index("netflow.out_pkts")] = 8.0
    bins[1::6, CHANNEL_NAMES.index("netflow.out_bytes")] = 900.0
    found = dict(zip(NAMES, derived_features(bins)[0].tolist(), strict=True))

    assert found["burst.net_out_period"] == 3.0
    assert found["burst.sending_interval"] == 3.0
    assert found["burst.sending_irregularity"] == 0.0
    assert found["burst.sending_starts"] == 24.0
    assert found["burst.sending_length"] == 0.5
    assert found["burst.net_out_median"] == 900.0
    assert found["burst.sending_share"] == pytest.approx(0.2)
    assert found["burst.cpu_and_sending"] == 0.0
    assert found["ratio.net_out_size"] == pytest.approx(180 / 1.7)


def test_a_window_without_activity_has_no_interval_and_no_size() -> None:
    found = dict(zip(NAMES, derived_features(np.zeros((20, len(CHANNELS)), np.float32))[0].tolist(), strict=True))

    assert found["burst.cpu_interval"] == found["burst.cpu_irregularity"] == found["burst.net_out_variation"] == -1.0
    assert found["burst.cpu_period"] == found["burst.net_in_median"] == found["ratio.disk_write_size"] == 0.0


def test_a_channel_with_nine_known_bins_makes_only_its_columns_unknown() -> None:
    bins = build_busy_bins(20, 7)
    whole = derived_features(bins)[0]
    bins[:11, CHANNEL_NAMES.index("netflow.syn_out")] = np.nan
    found = derived_features(bins)[0]

    needs = np.array(["netflow.syn_out" in feature.channels for feature in DERIVED_FEATURES])
    assert np.isnan(found[needs]).all()
    assert same_bits(found[~needs], whole[~needs])


def test_too_few_bins_have_no_window() -> None:
    assert derived_features(np.zeros((19, len(CHANNELS)), np.float32)).shape == (0, 83)
    assert derive_history([], 120, with_bursts=False).shape == (0, len(RATIO_FEATURES))


BINS = npst.arrays(
    np.float32,
    st.tuples(st.integers(20, 46), st.just(len(CHANNELS))),
    elements=st.one_of(
        st.just(np.nan), st.floats(width=32), st.sampled_from([0.0, 0.2, 1.0, 4000.0, 3e38, -3e38, 1e-45, np.inf])
    ),
    fill=st.sampled_from([0.0, 0.25, 7.0, np.nan]),
)


@settings(max_examples=60, deadline=None)
@given(bins=BINS, horizon=st.sampled_from([20, 60, 120]))
def test_any_bins_give_finite_values_or_nan_and_the_same_bits_alone_and_among_many(
    bins: np.ndarray, horizon: int
) -> None:
    before = bins.copy()
    found = derive_history([bins, bins[5:], bins], horizon)
    each = [derive_history([part], horizon) for part in (bins, bins[5:], bins)]

    assert same_bits(bins, before)
    assert not np.isinf(found).any()
    assert same_bits(found, np.concatenate(each))


@pytest.mark.parametrize("horizon", [20, 60, 120, 240])
@pytest.mark.parametrize("gaps", [0.0, 0.1])
def test_a_window_has_the_same_bits_at_every_stride_and_as_the_newest(horizon: int, gaps: float) -> None:
    bins = build_busy_bins(300, 8, gaps=gaps)
    slow, fast = derive_history([bins], horizon), derive_history([bins], horizon, 2)

    assert fast.shape == (141, 83)
    assert same_bits(fast[::5], slow)
    for j in (0, 3, 64, 140):
        end = 20 + 2 * j
        assert same_bits(derive_history([bins[:end]], horizon, newest_only=True), fast[j : j + 1])
        assert same_bits(
            derive_history([bins[max(0, end - horizon) : end]], horizon, newest_only=True), fast[j : j + 1]
        )


def test_ratios_alone_are_the_first_columns() -> None:
    bins = build_busy_bins(80, 9, gaps=0.3)

    assert same_bits(
        derive_history([bins], 60, with_bursts=False), derive_history([bins], 60)[:, : len(RATIO_FEATURES)]
    )


def test_infinite_bins_count_as_unknown() -> None:
    bins = build_busy_bins(40, 10)
    for i, c in product(range(3, 8), range(len(CHANNELS))):
        bins[i, c] = np.inf if (i + c) % 2 else -np.inf

    assert same_bits(derived_features(bins), derived_features(np.where(np.isfinite(bins), bins, np.float32(np.nan))))
