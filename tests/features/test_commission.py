"""A clean day: what is measured, how it maps bins and stats, and its file."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import iqr

from phasewatch.errors import DataError
from phasewatch.features.normalise import (
    build_scaling,
    compute_scale_floors,
    measure_baseline,
    parse_baseline,
    render_baseline,
)
from phasewatch.features.stats import window_stats

NAMES = ("proc.cpu_user", "qmp.blk_wr_bytes", "netflow.out_pkts")
RNG = np.random.default_rng(0)


def bins(n: int = 200) -> np.ndarray:
    x = RNG.gamma(2.0, 3.0, size=(n, 3)).astype(np.float32)
    x[RNG.random(x.shape) < 0.1] = np.nan
    return x


def test_baseline_is_median_and_interquartile_range() -> None:
    x = bins()
    day = measure_baseline("pc", NAMES, x)

    assert_allclose(day.median, np.nanmedian(x.astype(float), axis=0))
    assert_allclose(day.spread, iqr(x.astype(float), axis=0, nan_policy="omit"))


def test_floors_are_a_hundredth_of_the_range_or_one() -> None:
    x = np.stack([np.linspace(0, 100, 101), np.full(101, 7.0), np.full(101, np.nan)], axis=1).astype(np.float32)

    assert compute_scale_floors(x).tolist() == pytest.approx([0.9, 1.0, 1.0])
    assert compute_scale_floors(x.reshape(101, 3, 1).repeat(4, axis=2)).tolist() == pytest.approx([0.9, 1.0, 1.0])


def test_bins_are_shifted_and_scaled_and_a_quiet_channel_is_not_stretched() -> None:
    x = bins()
    x[:, 1] = 5.0
    to = build_scaling(measure_baseline("pc", NAMES, x), np.array([0.5, 0.5, 0.5]))

    assert_array_equal(to.scale_bins(x)[:, 1], 0.0)
    assert to.scale[1] == 0.5
    assert np.nanmedian(to.scale_bins(x)[:, 0]) == pytest.approx(0.0, abs=1e-6)


def test_channel_without_a_baseline_keeps_its_zero_and_floor_and_is_marked() -> None:
    x = bins()
    x[9:, 2] = np.nan  # fewer than ten known bins
    to = build_scaling(measure_baseline("pc", NAMES, x), np.array([0.5, 0.5, 2.0]))

    assert to.is_missing.tolist() == [False, False, True]
    assert (to.shift[2], to.scale[2]) == (0.0, 2.0)
    none = build_scaling(None, np.array([0.5, 0.5, 2.0]))
    assert none.is_missing.all()
    assert (none.shift.tolist(), none.scale.tolist()) == ([0.0] * 3, [0.5, 0.5, 2.0])


def test_scaled_stats_are_the_stats_of_scaled_bins() -> None:
    x = bins(20)
    to = build_scaling(measure_baseline("pc", NAMES, bins()), np.array([0.1, 0.1, 0.1]))

    assert_allclose(
        to.scale_stats(window_stats(x).reshape(1, -1)),
        window_stats(to.scale_bins(x)).reshape(1, -1),
        rtol=1e-4,
        atol=1e-5,
    )


def test_baseline_file_is_read_as_it_was_written() -> None:
    x = bins()
    x[:, 2] = np.nan
    day = measure_baseline("pc", NAMES, x)
    again = parse_baseline(render_baseline(day), file="host.json")

    assert again.host_id == "pc"
    assert again.names == NAMES
    assert_array_equal(again.median, day.median)
    turned = again.select_channels((NAMES[1], "proc.elsewhere", NAMES[0]))
    assert_array_equal(turned.median, [day.median[1], np.nan, day.median[0]])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "not a commissioning file"),
        (b'{"format":"x","host_id":"pc","bins":1,"channels":[]}', "found format 'x'"),
        (
            b'{"format":"phasewatch-commission/1","host_id":"pc","bins":1,"channels":[{"name":"a","median":1.0,"spread":-1}]}',
            "below 0",
        ),
        (
            b'{"format":"phasewatch-commission/1","host_id":"pc","bins":1,"channels":[{"name":"a","median":1.0,"spread":null}]}',
            "without its spread",
        ),
    ],
)
def test_invalid_baseline_file_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=rf"host\.json: .*{words}"):
        parse_baseline(data, file="host.json")
