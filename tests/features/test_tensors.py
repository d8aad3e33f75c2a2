"""Windows as tensors are views of the grid: the same floats, no second copy on disk or in memory."""

from __future__ import annotations

import numpy as np
import pytest

from phasewatch.features.windows import build_window_view, compute_window_rows, gather_windows

BINS = np.arange(100 * 3, dtype=np.float32).reshape(100, 3)


def test_a_window_is_twenty_rows_of_the_grid_and_shares_its_memory() -> None:
    view = build_window_view(BINS)

    assert view.shape == (9, 20, 3)
    assert np.array_equal(view[4], BINS[40:60])
    assert np.shares_memory(view, BINS)
    assert not view.flags.writeable


def test_windows_of_one_second_apart_are_views_too() -> None:
    view = build_window_view(BINS, 2)

    assert view.shape == (41, 20, 3)
    assert np.array_equal(view[7], BINS[14:34])


def test_an_episode_too_short_for_a_window_has_none() -> None:
    assert build_window_view(BINS[:19]).shape == (0, 20, 3)


def test_windows_of_many_episodes_are_gathered_in_any_order() -> None:
    begins = np.concatenate([compute_window_rows(0, 45), compute_window_rows(45, 55)])
    assert begins.tolist() == [0, 10, 20, 45, 55, 65, 75]

    batch = gather_windows(BINS, begins[[5, 0, 3]])

    assert batch.flags.c_contiguous
    assert np.array_equal(batch, np.stack([BINS[65:85], BINS[0:20], BINS[45:65]]))


@pytest.mark.parametrize("begin", [-1, 81])
def test_a_window_outside_the_grid_is_refused(begin: int) -> None:
    with pytest.raises(IndexError):
        gather_windows(BINS, np.array([begin]))


def test_no_windows_make_an_empty_batch() -> None:
    assert gather_windows(BINS, np.array([], np.int64)).shape == (0, 20, 3)
    assert gather_windows(BINS[:5], np.array([], np.int64)).shape == (0, 20, 3)
