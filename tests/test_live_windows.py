"""The windows of every second: their labels and inputs, and that every fifth is a window of the feature table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tests.factories.bundles import S, episode, episode_id

from phasewatch.artifacts import BINS_DIR, FEATURES_FILE, RunEpisode
from phasewatch.binning.align import bin_episode
from phasewatch.binning.storage import build_index_row, open_bins, write_bins
from phasewatch.dataset.live_windows import compute_live_digest, iter_live_windows, list_live_windows
from phasewatch.errors import RunError
from phasewatch.features.schema import feature_names
from phasewatch.features.tables import write_feature_tables
from phasewatch.models.base import InputKind, InputSpec
from phasewatch.types import BundleStatus

PHASES = (("clean", 17), ("unknown", 4), ("infecting", 13), ("active", 21))
EPISODES = tuple(episode(PHASES, number=i, agent=False) for i in (1, 2))
NAMES = tuple(name for name in feature_names() if name.startswith("netflow."))
SPEC = InputSpec(kind=InputKind.TABLE, names=NAMES, mask="tap", schema_hash="5", behaviour_fingerprint="b")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with write_bins(folder / BINS_DIR) as made:
        for whole in EPISODES:
            binned = bin_episode(whole)
            row = replace(build_index_row(whole, binned), flagged=((30, 1),))
            made.add(row, binned.bins, binned.levels)
    statuses = {("h1", episode_id(i)): BundleStatus.ACCEPTED for i in (1, 2)}
    write_feature_tables(folder, open_bins(folder / BINS_DIR), statuses)
    return folder


def episodes(run: Path) -> tuple[RunEpisode, ...]:
    return tuple(
        RunEpisode(
            host_id=row.host_id,
            episode_id=row.episode_id,
            session=row.session,
            role=row.role,
            profile=row.profile,
            sample_name=row.sample_name,
            sample_kind=row.sample_kind,
            origin=row.origin,
            agent=row.agent,
            plan_seed=0,
            proc_sketch=(),
            started_wall_ns=row.t0_ns,
            duration_s=55.0,
        )
        for row in open_bins(run / BINS_DIR).rows
    )


def test_windows_of_known_phase_begin_every_second(run: Path) -> None:
    windows = list_live_windows(run, episodes(run))
    first = windows.take(windows.episode_index == 0)
    t0_ns = EPISODES[0].t0_ns
    starts = (first.t_center_ns - t0_ns) / S - 5

    # 55 s hold 46 whole windows; the two with most of their time in the 4 s of unknown phase are left out.
    assert starts.tolist() == [*range(13), *range(15, 46)]
    assert first.t_center_s.tolist() == (starts + 5).tolist()
    assert windows.episode_index.tolist() == [0] * 44 + [1] * 44
    assert first.y.tolist() == [0] * 13 + [2] * 14 + [3] * 17


def test_every_fifth_window_is_one_of_the_table(run: Path) -> None:
    table = pq.read_table(run / FEATURES_FILE)
    windows = list_live_windows(run, episodes(run))
    parts = list(iter_live_windows(run, windows, SPEC))
    every_fifth = windows.t_center_s % 5 == 0
    table = table.filter(pc.field("phase") >= 0)

    for name, values in (
        ("t_center_ns", windows.t_center_ns),
        ("t_center_s", windows.t_center_s),
        ("phase", windows.y),
        ("purity", windows.purity),
        ("flags", windows.flags),
    ):
        assert values[every_fifth].tolist() == table[name].to_pylist()
    x = np.concatenate([part.x for part in parts])[every_fifth]
    expected = np.column_stack([table[name].to_numpy() for name in NAMES])
    assert np.array_equal(x, expected, equal_nan=True)


def test_digest_changes_with_labels_bins_and_input(run: Path) -> None:
    windows = list_live_windows(run, episodes(run))
    digest = compute_live_digest(run, windows, SPEC)

    assert digest == compute_live_digest(run, windows, SPEC)
    assert digest != compute_live_digest(run, replace(windows, y=windows.y[::-1]), SPEC)
    assert digest != compute_live_digest(run, windows, replace(SPEC, names=NAMES[:-1]))
    assert digest != compute_live_digest(run, list_live_windows(run, episodes(run)[:1]), SPEC)


def test_episode_without_bins_is_refused(run: Path) -> None:
    unknown = replace(episodes(run)[0], episode_id=episode_id(9))

    with pytest.raises(RunError, match=episode_id(9)):
        list_live_windows(run, [unknown])
