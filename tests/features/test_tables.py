"""The feature tables of a run: their columns, their order, what is in them, and that their bytes never vary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.factories.bundles import T0, S, episode, episode_id

from phasewatch.artifacts import EPISODE_FEATURES_FILE, FEATURE_SCHEMA_FILE, FEATURES_FILE
from phasewatch.binning.align import bin_episode
from phasewatch.binning.storage import MappedBins, build_index_row, open_bins, write_bins
from phasewatch.features.derived import derived_features
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.features.schema import feature_names, schema_hash, stat_names
from phasewatch.features.stats import episode_stats, window_stats
from phasewatch.features.tables import ParallelSettings, write_feature_tables
from phasewatch.types import BundleStatus, EpisodeOrigin, EpisodeRole

EPISODES = (
    episode([("clean", 12), ("active", 13)], number=1, agent=False),
    episode([("unknown", 16)], number=2, profile="benign", sample_name="idle", role=EpisodeRole.SOAK),
    episode([("dormant", 1.2)], number=3),
    episode([("armed", 30)], number=4, host_id="h2", origin=EpisodeOrigin.RECORDED),
    episode([("armed", 30)], number=5, host_id="h2"),
)
STATUSES = {
    ("h1", episode_id(1)): BundleStatus.ACCEPTED,
    ("h1", episode_id(2)): BundleStatus.DEGRADED,
    ("h1", episode_id(3)): BundleStatus.ACCEPTED,
    ("h2", episode_id(4)): BundleStatus.ACCEPTED,
    ("h2", episode_id(5)): BundleStatus.REJECTED,
}
IDS = ["episode_id", "host_id", "profile", "sample_name", "sample_kind", "origin", "role"]


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> MappedBins:
    folder = tmp_path_factory.mktemp("grids")
    with write_bins(folder) as made:
        for whole in EPISODES:
            grid = bin_episode(whole)
            made.add(build_index_row(whole, grid), grid.bins, grid.levels)
    return open_bins(folder)


def test_the_window_table_has_the_columns_of_the_contract(grids: MappedBins, tmp_path: Path) -> None:
    write_feature_tables(tmp_path, grids, STATUSES)

    schema = pq.read_schema(tmp_path / FEATURES_FILE)

    assert schema.names == [*IDS, "t_center_s", "t_center_ns", "phase", "purity", "flags", *feature_names()]
    types = dict(zip(schema.names, map(str, schema.types), strict=True))
    assert {types[name] for name in feature_names()} == {"float"}
    assert {name: types[name] for name in ("t_center_s", "t_center_ns", "phase", "purity", "flags")} == {
        "t_center_s": "float", "t_center_ns": "int64", "phase": "int8", "purity": "float", "flags": "uint8",
    }  # fmt: skip
    assert {types[name] for name in IDS} == {"string"}


def test_the_episode_table_has_one_row_for_each_used_episode_even_without_a_window(
    grids: MappedBins, tmp_path: Path
) -> None:
    count = write_feature_tables(tmp_path, grids, STATUSES)

    table = pq.read_table(tmp_path / EPISODE_FEATURES_FILE)

    assert table.column_names == [*IDS, "n_windows", *stat_names()]
    assert table.column("episode_id").to_pylist() == [episode_id(i) for i in (1, 2, 3, 4)]
    assert table.column("n_windows").to_pylist() == [4, 2, 0, 5]
    assert (count.episodes, count.windows, count.without_windows, count.unknown_windows) == (4, 11, 1, 2)


def test_rows_are_stats_and_derived_columns_in_the_order_of_host_episode_and_window(
    grids: MappedBins, tmp_path: Path
) -> None:
    write_feature_tables(tmp_path, grids, STATUSES)

    table = pq.read_table(tmp_path / FEATURES_FILE)

    used = [np.asarray(grids.episode_bins(row)) for row in (grids.rows[0], grids.rows[1], grids.rows[3])]
    stats = np.concatenate([window_stats(bins).reshape(-1, len(stat_names())) for bins in used])
    expected = np.concatenate([stats, np.concatenate([derived_features(bins) for bins in used])], axis=1)
    found = np.stack([table.column(name).to_numpy() for name in feature_names()], axis=1)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert table.column("host_id").to_pylist() == ["h1"] * 6 + ["h2"] * 5
    assert table.column("t_center_s").to_pylist()[:4] == [5.0, 10.0, 15.0, 20.0]
    assert table.column("t_center_ns").to_pylist()[:2] == [T0 + 5 * S, T0 + 10 * S]
    assert table.column("phase").to_pylist()[:6] == [0, 0, 3, 3, -1, -1]
    assert table.column("purity").to_pylist()[:4] == [1.0, np.float32(0.7), np.float32(0.8), 1.0]
    assert table.column("flags").to_pylist()[:6] == [0, 4, 4, 0, 0, 0]


def test_episode_features_are_the_same_five_over_all_bins(grids: MappedBins, tmp_path: Path) -> None:
    write_feature_tables(tmp_path, grids, STATUSES)

    table = pq.read_table(tmp_path / EPISODE_FEATURES_FILE)

    expected = episode_stats(np.asarray(grids.episode_bins(grids.rows[3]))).ravel()
    found = np.array([table.column(name)[3].as_py() for name in stat_names()], np.float32)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.isnan(table.column("proc.cpu_user.mean")[2].as_py())  # two bins are too few for a number


def test_degraded_episodes_can_be_left_out_and_are_counted(grids: MappedBins, tmp_path: Path) -> None:
    count = write_feature_tables(tmp_path, grids, STATUSES, include_degraded=False)

    assert pq.read_table(tmp_path / EPISODE_FEATURES_FILE).column("episode_id").to_pylist() == [
        episode_id(i) for i in (1, 3, 4)
    ]
    assert count.left_out == {"degraded": 1, "rejected": 1}


def test_an_episode_that_no_verdict_names_is_not_used(grids: MappedBins, tmp_path: Path) -> None:
    count = write_feature_tables(tmp_path, grids, {("h1", episode_id(1)): BundleStatus.ACCEPTED})

    assert count.episodes == 1
    assert count.left_out == {"not listed": 4}


def test_any_number_of_workers_gives_the_same_tables(grids: MappedBins, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        write_feature_tables(
            tmp_path / name,
            grids,
            STATUSES,
            spread=ParallelSettings(workers=workers, chunk_size=1, min_parallel_episodes=0),
        )

    for file in (FEATURES_FILE, EPISODE_FEATURES_FILE, FEATURE_SCHEMA_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_tables_are_the_same_bytes_each_time_and_name_their_inputs(grids: MappedBins, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_feature_tables(tmp_path / name, grids, STATUSES, inputs={"grids/index.parquet": "abc"})

    for file in (FEATURES_FILE, EPISODE_FEATURES_FILE, FEATURE_SCHEMA_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    facts = json.loads(pq.read_metadata(tmp_path / "a" / FEATURES_FILE).metadata[b"phasewatch.features"])
    assert facts == {"schema_hash": schema_hash(), "inputs": {"grids/index.parquet": "abc"}}


def test_rows_are_held_back_until_a_row_group_is_full(grids: MappedBins, tmp_path: Path) -> None:
    write_feature_tables(tmp_path, grids, STATUSES, row_group=3)
    small = pq.ParquetFile(tmp_path / FEATURES_FILE)

    assert [small.metadata.row_group(i).num_rows for i in range(small.num_row_groups)] == [3, 3, 3, 2]
    split = small.read()
    write_feature_tables(tmp_path, grids, STATUSES)
    whole = pq.ParquetFile(tmp_path / FEATURES_FILE)
    assert whole.num_row_groups == 1
    for name in split.column_names:
        assert np.array_equal(
            split.column(name).to_numpy(), whole.read().column(name).to_numpy(), equal_nan=name in feature_names()
        )


def test_only_the_id_columns_have_a_dictionary(grids: MappedBins, tmp_path: Path) -> None:
    write_feature_tables(tmp_path, grids, STATUSES)
    group = pq.read_metadata(tmp_path / FEATURES_FILE).row_group(0)

    for i in range(group.num_columns):
        column = group.column(i)
        assert ("RLE_DICTIONARY" in column.encodings) == (column.path_in_schema in IDS)
        assert column.compression == "ZSTD"


def test_no_used_episode_gives_empty_tables(grids: MappedBins, tmp_path: Path) -> None:
    write_feature_tables(tmp_path, grids, {})

    assert pq.read_table(tmp_path / FEATURES_FILE).num_rows == 0
    assert pq.read_table(tmp_path / EPISODE_FEATURES_FILE).num_rows == 0


def test_the_schema_file_carries_both_hashes(grids: MappedBins, tmp_path: Path) -> None:
    write_feature_tables(tmp_path, grids, STATUSES)

    schema = json.loads((tmp_path / FEATURE_SCHEMA_FILE).read_text())

    assert schema["schema_hash"] == schema_hash()
    assert schema["behaviour_fingerprint"] == behaviour_fingerprint()
