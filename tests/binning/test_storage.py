"""Grids on disk: streamed, mapped, ordered, the same bytes each time, there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.binning.test_clocks import stepped
from tests.factories.bundles import T0, S, episode, episode_id

from phasewatch.binning.align import bin_episode
from phasewatch.binning.storage import BinIndexRow, build_index_row, open_bins, write_bins
from phasewatch.channels import BASE_CHANNELS, CHANNELS
from phasewatch.errors import RunError
from phasewatch.types import Phase

EPISODES = (
    episode([("clean", 12), ("active", 9)], number=1, agent=False),
    stepped(episode([("clean", 14)], number=2), 400),
    episode([("dormant", 1.2)], number=3, host_id="h2"),
)


def write(folder: Path) -> None:
    with write_bins(folder, inputs={"store": "abc"}) as made:
        for whole in EPISODES:
            grid = bin_episode(whole)
            made.add(build_index_row(whole, grid), grid.bins, grid.levels)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    write(tmp_path)

    grids = open_bins(tmp_path)

    assert [row.episode_id for row in grids.rows] == [episode_id(i) for i in (1, 2, 3)]
    assert [row.offset for row in grids.rows] == [0, 42, 70]
    assert grids.inputs == {"store": "abc"}
    for row, whole in zip(grids.rows, EPISODES, strict=True):
        grid = bin_episode(whole)
        assert np.array_equal(grids.episode_bins(row).view(np.uint32), grid.bins.view(np.uint32))
        assert np.array_equal(grids.episode_levels(row).view(np.uint32), grid.levels.view(np.uint32))
        assert np.array_equal(row.bin_flags, grid.flags)


def test_the_index_says_who_an_episode_is_and_what_its_labels_are(tmp_path: Path) -> None:
    write(tmp_path)

    row = open_bins(tmp_path).rows[0]

    assert (row.host_id, row.profile, row.sample_name, row.session) == ("h1", "cryptomine", "sample", "session-1")
    assert (row.sample_kind, row.origin, row.role, row.agent) == ("emulated", "simulated", "lab", False)
    assert (row.arch, row.accel) == ("x86_64", "tcg")
    assert row.spans == ((Phase.CLEAN, T0, T0 + 12 * S), (Phase.ACTIVE, T0 + 12 * S, T0 + 21 * S))


def test_the_arrays_are_plain_npy_files_mapped_and_not_read(tmp_path: Path) -> None:
    write(tmp_path)

    assert np.load(tmp_path / "grids.npy").shape == (72, len(CHANNELS))
    assert np.load(tmp_path / "levels.npy").dtype == np.dtype("<f4")
    assert isinstance(open_bins(tmp_path).bins, np.memmap)


def test_the_same_episodes_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name)

    for file in ("grids.npy", "levels.npy", "index.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_no_episodes_give_empty_grids(tmp_path: Path) -> None:
    with write_bins(tmp_path):
        pass

    assert open_bins(tmp_path).rows == ()
    assert open_bins(tmp_path).bins.shape == (0, len(CHANNELS))


def test_bins_of_a_version_without_extended_channels_are_unknown_there(tmp_path: Path) -> None:
    write(tmp_path)
    whole = np.load(tmp_path / "grids.npy")
    np.save(tmp_path / "grids.npy", np.ascontiguousarray(whole[:, : len(BASE_CHANNELS)]))

    bins = open_bins(tmp_path).bins

    assert bins.shape == whole.shape
    assert np.array_equal(bins[:, : len(BASE_CHANNELS)], whole[:, : len(BASE_CHANNELS)], equal_nan=True)
    assert np.isnan(bins[:, len(BASE_CHANNELS) :]).all()


def test_a_write_that_fails_leaves_what_stood_there(tmp_path: Path) -> None:
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail() -> None:
        with write_bins(tmp_path) as made:
            grid = bin_episode(EPISODES[0])
            made.add(build_index_row(EPISODES[0], grid), grid.bins, grid.levels)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_episodes_must_come_in_order_and_once(tmp_path: Path) -> None:
    grid = bin_episode(EPISODES[1])
    row = build_index_row(EPISODES[1], grid)

    with write_bins(tmp_path) as made:
        made.add(row, grid.bins, grid.levels)

        with pytest.raises(ValueError, match="must come after"):
            made.add(row, grid.bins, grid.levels)


def test_arrays_that_do_not_fit_their_row_are_refused(tmp_path: Path) -> None:
    grid = bin_episode(EPISODES[1])

    with pytest.raises(ValueError, match="28 bins"), write_bins(tmp_path) as made:
        made.add(build_index_row(EPISODES[1], grid), grid.bins[:-1], grid.levels)


@pytest.mark.parametrize("file", ["grids.npy", "levels.npy", "index.parquet"])
@pytest.mark.parametrize("harm", ["gone", "cut", "another's"])
def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, file: str, harm: str) -> None:
    write(tmp_path)
    target = tmp_path / file
    if harm == "gone":
        target.unlink()
    elif harm == "cut":
        target.write_bytes(target.read_bytes()[:-5])
    else:
        with write_bins(tmp_path / "other") as made:
            grid = bin_episode(EPISODES[2])
            made.add(build_index_row(EPISODES[2], grid), grid.bins, grid.levels)
        target.write_bytes((tmp_path / "other" / file).read_bytes())

    with pytest.raises(RunError, match="phasewatch validate"):
        open_bins(tmp_path)


def test_an_index_row_is_a_value() -> None:
    grid = bin_episode(EPISODES[0])

    assert build_index_row(EPISODES[0], grid) == build_index_row(EPISODES[0], grid)
    assert isinstance(hash(build_index_row(EPISODES[0], grid)), int)
    assert isinstance(build_index_row(EPISODES[0], grid), BinIndexRow)
