"""The five numbers of a window: what they are, in which order they are summed, and what a gap does to them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tests.oracle import slow

from phasewatch.features.stats import SORTING_NETWORK_10, STATS, episode_stats, window_stats
from phasewatch.features.windows import n_windows

NAN = float("nan")


def one(values: list[float]) -> list[float]:
    """Return the five numbers of one channel's window."""
    return window_stats(np.array(values, np.float32)[:, None])[0, 0].tolist()


def test_the_order_is_mean_std_median_95th_percentile_slope() -> None:
    assert STATS == ("mean", "std", "p50", "p95", "slope")


def test_stats_of_a_ramp() -> None:
    mean, std, p50, p95, slope = one([float(b) for b in range(20)])

    assert mean == 9.5
    assert std == np.float32(np.sqrt(33.25))
    assert p50 == 9.5
    assert p95 == np.float32(18.05)
    assert slope == 2.0  # one a bin is two a second


def test_a_constant_has_no_spread_and_no_slope() -> None:
    assert one([3.0] * 20) == [3.0, 0.0, 3.0, 3.0, 0.0]


def test_ten_finite_bins_are_enough_and_nine_are_not() -> None:
    assert one([1.0] * 10 + [NAN] * 10) == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert np.isnan(one([1.0] * 9 + [NAN] * 11)).all()


def test_infinite_bins_count_as_missing() -> None:
    assert one([5.0] * 19 + [float("inf")]) == one([5.0] * 19 + [NAN])


def test_the_slope_of_a_gappy_window_uses_the_times_that_are_left() -> None:
    ramp = [float(b) if b not in (3, 4, 11) else NAN for b in range(20)]

    assert one(ramp)[4] == pytest.approx(2.0, rel=1e-6)


def test_sums_run_from_left_to_right() -> None:
    values = [2.0**60, 1.0, -(2.0**60)] + [1.0] * 17  # the first 1 is lost on 2^60, the others are not

    assert one(values)[0] == np.float32(17 / 20)


def test_a_column_gets_the_same_bits_whatever_stands_beside_it() -> None:
    bins = np.random.default_rng(1).standard_normal((50, 46)).astype(np.float32)
    bins[7, 3] = bins[44, 9] = np.nan
    together = window_stats(bins)

    for c in range(46):
        assert np.array_equal(window_stats(bins[:, [c]])[:, 0], together[:, c], equal_nan=True)


def test_a_window_gets_the_same_bits_whatever_stands_before_it() -> None:
    bins = np.random.default_rng(2).standard_normal((60, 5)).astype(np.float32)
    bins[3, 0] = bins[31, 1] = np.nan
    together = window_stats(bins)

    for j in range(5):
        assert np.array_equal(window_stats(bins[10 * j : 10 * j + 20])[0], together[j], equal_nan=True)


@pytest.mark.parametrize("stride", [1, 2, 5, 10])
@given(
    bins=npst.arrays(
        np.float32,
        st.tuples(st.integers(0, 55), st.just(2)),
        elements=st.one_of(st.just(np.nan), st.floats(width=32)),
        fill=st.sampled_from([0.25, 7.0]),
    )
)
def test_a_window_has_the_same_bits_at_every_stride(stride: int, bins: np.ndarray) -> None:
    stats = window_stats(bins, stride)

    assert stats.shape == (n_windows(len(bins), stride), 2, 5)
    for j in range(len(stats)):
        alone = window_stats(bins[stride * j : stride * j + 20])[0]
        assert np.array_equal(stats[j].view(np.uint32), alone.view(np.uint32))


@pytest.mark.parametrize("stride", [0, -2, 3, 4, 20])
def test_a_stride_that_does_not_divide_half_a_window_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="stride"):
        window_stats(np.zeros((40, 1), np.float32), stride)


def test_input_is_not_changed() -> None:
    bins = np.random.default_rng(3).standard_normal((30, 4)).astype(np.float32)
    before = bins.copy()

    window_stats(bins)
    episode_stats(bins)

    assert np.array_equal(bins, before)


def test_the_exchanges_sort_every_row_of_zeros_and_ones() -> None:
    for row in product([0, 1], repeat=10):  # which is to say: every row
        values = list(row)
        for i, j in SORTING_NETWORK_10:
            values[i], values[j] = min(values[i], values[j]), max(values[i], values[j])

        assert values == sorted(row)


def test_numpy_and_scipy_agree_to_a_millionth() -> None:
    from scipy.stats import linregress

    rng = np.random.default_rng(4)
    bins = (rng.standard_normal((120, 8)) * 10.0 ** rng.integers(-3, 9, 8)).astype(np.float32)
    bins[rng.random(bins.shape) < 0.1] = np.nan
    mine = window_stats(bins).astype(np.float64)

    for j, c in product(range(11), range(8)):
        x = bins[10 * j : 10 * j + 20, c].astype(np.float64)
        t, x = 0.5 * np.flatnonzero(np.isfinite(x)), x[np.isfinite(x)]
        expected = [x.mean(), x.std(), np.percentile(x, 50), np.percentile(x, 95), linregress(t, x).slope]
        scale = np.abs(x).max()
        assert mine[j, c] == pytest.approx(expected, rel=1e-6, abs=1e-6 * scale)


@given(
    bins=npst.arrays(
        np.float32,
        st.tuples(st.integers(0, 45), st.integers(1, 3)),
        elements=st.one_of(st.just(np.nan), st.floats(width=32), st.sampled_from([0.0, 1.0, 2.0, 3e38, 1e-45])),
        fill=st.sampled_from([0.25, 7.0]),
    )
)
def test_any_bins_have_the_bits_of_the_slow_reading(bins: np.ndarray) -> None:
    bins = bins + np.float32(0.0)  # a grid holds no negative zero
    stored = bins.view(np.uint32)
    n, c = bins.shape
    mine = window_stats(bins).view(np.uint32)

    assert mine.shape == (slow.n_windows(n), c, 5)
    for j, k in product(range(len(mine)), range(c)):
        assert mine[j, k].tolist() == slow.stats(stored[10 * j : 10 * j + 20, k].tolist())
    assert episode_stats(bins).view(np.uint32).tolist() == [slow.stats(stored[:, k].tolist()) for k in range(c)]
