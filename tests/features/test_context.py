"""Context columns against a plain reading: what a window's history was, and never how long it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tests.factories.bins import build_busy_bins, same_bits

from phasewatch.channels import CHANNEL_NAMES, CHANNELS
from phasewatch.features.context import CONTEXT_CHANNELS, CONTEXT_FEATURES, context_features, list_context_columns
from phasewatch.features.derived import BURST_FEATURES, DERIVED_FEATURES, RATIO_FEATURES, derive_history
from phasewatch.features.schema import list_column_channels
from phasewatch.features.stats import window_stats

NAMES = [feature.name for feature in CONTEXT_FEATURES]


def place(name: str) -> int:
    return NAMES.index(name)


def test_columns_are_named_by_what_and_when_and_state_their_channels() -> None:
    assert len(set(NAMES)) == len(NAMES) == 26 * 9 + 2 * len(RATIO_FEATURES) + len(BURST_FEATURES) - 10 + 26 * 4
    assert {name.partition("@")[2] for name in NAMES} == {"30s", "60s", "120s", "-1", "-2"}
    assert all(list_column_channels(f.name) == f.channels for f in CONTEXT_FEATURES)
    assert set(CONTEXT_CHANNELS) <= {c.full_name for c in CHANNELS if c.in_deployment}


def test_a_channel_set_has_the_context_columns_whose_channels_it_has() -> None:
    names = list_context_columns(("proc.vcpu_run", "netflow.out_pkts", "guest.ctxt"))

    assert "burst.cpu_and_sending@60s" in names
    assert {c for name in names for c in list_column_channels(name)} == {"proc.vcpu_run", "netflow.out_pkts"}
    assert list_context_columns(("guest.ctxt",)) == ()


@pytest.mark.parametrize("gaps", [0.0, 0.2, 0.8])
def test_statistics_are_those_of_the_known_bins_of_each_horizon(gaps: float) -> None:
    bins = build_busy_bins(300, 3, gaps=gaps)
    found = context_features(bins).astype(np.float64)

    assert found.shape == (29, len(NAMES))
    for j in (0, 1, 4, 10, 11, 12, 28):
        end = 20 + 10 * j
        for seconds in (30, 60, 120):
            history = bins[max(0, end - 2 * seconds) : end].astype(np.float64)
            for channel in CONTEXT_CHANNELS:
                x = history[:, CHANNEL_NAMES.index(channel)]
                x = x[np.isfinite(x)]
                expected = [x.mean(), x.std(), x.max()] if len(x) >= 10 else [np.nan] * 3
                own = [found[j, place(f"{channel}.{stat}@{seconds}s")] for stat in ("mean", "std", "max")]
                assert own == pytest.approx(expected, rel=1e-6, abs=1e-12, nan_ok=True)


def test_earlier_windows_are_those_that_began_five_and_ten_seconds_before_or_the_first() -> None:
    bins = build_busy_bins(100, 4, gaps=0.1)
    found, stats = context_features(bins), window_stats(bins)
    cpu = CHANNEL_NAMES.index("proc.vcpu_run")

    for back in (1, 2):
        at = np.maximum(np.arange(9) - back, 0)
        assert same_bits(found[:, place(f"proc.vcpu_run.mean@-{back}")], stats[at, cpu, 0])
        highest = [np.nanmax(bins[10 * i : 10 * i + 20, cpu]) for i in at]
        assert found[:, place(f"proc.vcpu_run.max@-{back}")].tolist() == highest


def test_derived_columns_are_those_of_their_horizon() -> None:
    bins = build_busy_bins(280, 5)
    found = context_features(bins)

    for horizon, seconds in ((120, "60s"), (240, "120s")):
        expected = derive_history([bins], horizon)
        for i, feature in enumerate(DERIVED_FEATURES):
            if (name := f"{feature.name}@{seconds}") in NAMES:
                assert same_bits(found[:, place(name)], expected[:, i])


def test_a_steady_machine_looks_the_same_however_long_it_was_watched() -> None:
    """With constant bins no column tells how much history there is, so none tells the time since the start."""
    bins = np.tile(np.random.default_rng(6).random(len(CHANNELS)).astype(np.float32), (400, 1))
    found = context_features(bins).astype(np.float64)

    np.testing.assert_allclose(found, np.tile(found[-1], (len(found), 1)), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("gaps", [0.0, 0.3])
def test_a_window_has_the_same_bits_at_every_stride_and_from_two_minutes_alone(gaps: float) -> None:
    bins = build_busy_bins(330, 7, gaps=gaps)
    slow, fast = context_features(bins), context_features(bins, 2)

    assert same_bits(fast[::5], slow)
    for j in (0, 2, 9, 60, 120, 155):
        end = 20 + 2 * j
        assert same_bits(context_features(bins[max(0, end - 240) : end], newest_only=True), fast[j : j + 1])
        assert same_bits(context_features(bins[:end], newest_only=True), fast[j : j + 1])


@settings(max_examples=25, deadline=None)
@given(
    bins=npst.arrays(
        np.float32,
        st.tuples(st.integers(0, 70), st.just(len(CHANNELS))),
        elements=st.one_of(st.just(np.nan), st.floats(width=32), st.sampled_from([0.0, 3e38, -3e38, np.inf])),
        fill=st.sampled_from([0.0, 0.25, np.nan]),
    )
)
def test_any_bins_give_finite_values_or_nan(bins: np.ndarray) -> None:
    before = bins.copy()
    found = context_features(bins)

    assert found.shape == (max(0, (len(bins) - 20) // 10 + 1) if len(bins) >= 20 else 0, len(NAMES))
    assert same_bits(bins, before)
    assert not np.isinf(found).any()
