"""Where windows stand, whose phase they are of, how pure, and what their flags say."""

from __future__ import annotations

import numpy as np
import pytest
from tests.factories.bundles import T0, S, marks

from phasewatch.features.windows import (
    FLAG_CLOCK_STEP,
    FLAG_MIXED,
    build_label_spans,
    combine_window_flags,
    compute_centers_s,
    compute_window_starts,
    label_windows,
    n_windows,
)
from phasewatch.types import LIVE_STRIDE_BINS

CODES = {"clean": 0, "armed": 1, "infecting": 2, "active": 3, "dormant": 4, "unknown": -1}


@pytest.mark.parametrize(
    ("n_bins", "w"), [(0, 0), (19, 0), (20, 1), (29, 1), (30, 2), (360, 35)], ids=lambda value: str(value)
)
def test_a_window_is_twenty_bins_and_one_begins_every_ten(n_bins: int, w: int) -> None:
    assert n_windows(n_bins) == w


@pytest.mark.parametrize(("n_bins", "w"), [(0, 0), (19, 0), (20, 1), (21, 1), (22, 2), (360, 171)], ids=str)
def test_live_windows_begin_every_second(n_bins: int, w: int) -> None:
    assert n_windows(n_bins, LIVE_STRIDE_BINS) == w
    assert compute_window_starts(T0, 3, LIVE_STRIDE_BINS).tolist() == [T0, T0 + S, T0 + 2 * S]
    assert compute_centers_s(3, LIVE_STRIDE_BINS).tolist() == [5.0, 6.0, 7.0]


def test_windows_begin_at_the_first_label_and_are_named_by_their_middle() -> None:
    assert compute_window_starts(T0, 3).tolist() == [T0, T0 + 5 * S, T0 + 10 * S]
    assert compute_centers_s(3).tolist() == [5.0, 10.0, 15.0]
    assert compute_centers_s(3).dtype == np.float32


@pytest.mark.parametrize(
    ("phases", "expected", "purity"),
    [
        pytest.param([("clean", 10)], "clean", 1.0, id="one phase"),
        pytest.param([("clean", 6), ("armed", 4)], "clean", 0.6, id="the phase that holds most wins"),
        pytest.param([("clean", 4), ("armed", 6)], "armed", 0.6, id="wherever it stands"),
        pytest.param([("active", 3), ("clean", 4), ("active", 3)], "active", 0.6, id="its spans are summed"),
        pytest.param([("clean", 5), ("armed", 5)], "armed", 0.5, id="a tie goes to the one that starts later"),
        pytest.param([("armed", 5), ("clean", 5)], "clean", 0.5, id="a tie goes to the later, not to the larger code"),
        pytest.param(
            [("active", 2.5), ("clean", 5), ("active", 2.5)], "active", 0.5, id="a tie goes to the later last span"
        ),
        pytest.param([("unknown", 6), ("clean", 4)], "unknown", 0.6, id="unknown is a phase like any other here"),
        pytest.param([("clean", 4.999999999), ("armed", 5.000000001)], "armed", 0.5, id="a nanosecond decides"),
    ],
)
def test_the_label_is_decided_by_nanoseconds(phases: list[tuple[str, float]], expected: str, purity: float) -> None:
    labels = label_windows(build_label_spans(marks(phases)), compute_window_starts(T0, 1))

    assert labels.phase.tolist() == [CODES[expected]]
    assert labels.phase.dtype == np.int8
    assert labels.purity.tolist() == [np.float32(purity)]
    assert labels.is_mixed.tolist() == [len({name for name, _ in phases}) > 1]


def test_a_phase_that_begins_where_the_window_ends_is_not_in_it() -> None:
    labels = label_windows(build_label_spans(marks([("clean", 10), ("active", 10)])), compute_window_starts(T0, 3))

    assert labels.phase.tolist() == [0, 3, 3]
    assert labels.purity.tolist() == [1.0, 0.5, 1.0]
    assert labels.is_mixed.tolist() == [False, True, False]


def test_flags_say_mixed_and_where_the_clock_stepped() -> None:
    bin_flags = np.zeros(40, np.uint8)
    bin_flags[29] = FLAG_CLOCK_STEP

    flags = combine_window_flags(bin_flags, np.array([False, True, True]))

    assert flags.tolist() == [0, FLAG_CLOCK_STEP | FLAG_MIXED, FLAG_CLOCK_STEP | FLAG_MIXED]
    assert flags.dtype == np.uint8


def test_flags_of_live_windows_are_those_of_their_own_bins() -> None:
    bin_flags = np.zeros(24, np.uint8)
    bin_flags[0] = bin_flags[23] = FLAG_CLOCK_STEP

    flags = combine_window_flags(bin_flags, np.zeros(3, np.bool_), LIVE_STRIDE_BINS)

    assert flags.tolist() == [FLAG_CLOCK_STEP, 0, FLAG_CLOCK_STEP]


def test_no_window_has_no_label() -> None:
    labels = label_windows(build_label_spans(marks([("clean", 3)])), compute_window_starts(T0, 0))

    assert (
        len(labels.phase)
        == len(labels.purity)
        == len(combine_window_flags(np.zeros(6, np.uint8), labels.is_mixed))
        == 0
    )
