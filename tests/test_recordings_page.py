"""The page of a store of recordings: its areas, volumes and real windows, each against a slow oracle."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tools import recordings

from phasewatch.simulate import simulate
from phasewatch.types import Phase
from phasewatch.validate.sweep import sweep


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recordings") / "store"
    simulate(made, episodes=24, hosts=2, seed=3)
    return made


@pytest.fixture(scope="module")
def episodes(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[recordings.RecordedEpisode, ...]:
    run = tmp_path_factory.mktemp("run")
    return recordings.read_episodes(store, run, sweep(store, run, workers=1).verdicts)


def test_page_has_a_row_for_each_host_and_each_extended_channel(store: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"

    assert recordings.main([str(store), "--out", str(page), "--title", "Some store"]) == 0

    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Some store")
    for word in ("netflow.new_dsts", "qmp.blk_rewritten", "VMs at a time", "active ransom-walk"):
        assert word in text
    assert all(f"| {folder.name} |" in text for folder in store.iterdir() if folder.is_dir())


def test_rounds_are_the_episodes_that_overlap_in_time(episodes: tuple[recordings.RecordedEpisode, ...]) -> None:
    rounds = recordings.group_rounds(episodes)

    assert sorted(e.verdict.episode_id for one in rounds for e in one) == sorted(e.verdict.episode_id for e in episodes)
    for one, after in pairwise(rounds):
        assert max(e.ended_s for e in one) <= min(e.began_s for e in after)
    for one in rounds:
        assert all(any(e.began_s < o.ended_s and o.began_s < e.ended_s for o in one if o is not e) for e in one[1:])


def test_area_of_an_act_is_the_share_of_pairs_that_are_ordered(
    episodes: tuple[recordings.RecordedEpisode, ...],
) -> None:
    channel, act = "qmp.blk_wr_bytes", "active ransom-walk"
    lab = [e for e in episodes if e.manifest.role == "lab"]
    positive = np.concatenate([e.means[channel][recordings.mark_act(e, act)] for e in lab])
    clean = np.concatenate([e.means[channel][e.phase == Phase.CLEAN.code] for e in lab])
    positive, clean = positive[np.isfinite(positive)], clean[np.isfinite(clean)]
    pairs = (positive[:, None] > clean).mean() + 0.5 * (positive[:, None] == clean).mean()

    assert recordings.compute_auc(positive, clean) == pytest.approx(float(pairs))


def test_acts_are_the_phases_and_active_by_profile(episodes: tuple[recordings.RecordedEpisode, ...]) -> None:
    acts = recordings.list_acts(episodes)

    assert acts[:3] == ("armed", "infecting", "dormant")
    marked = sum(int(recordings.mark_act(e, act).sum()) for e in episodes for act in acts)
    assert marked == sum(int((e.phase > 0).sum()) for e in episodes)


def test_real_windows_hold_the_bytes_of_their_ten_seconds(tmp_path: Path) -> None:
    run = tmp_path / "machine" / "Zip" / "Zip-1"
    run.mkdir(parents=True)
    rng = np.random.default_rng(5)
    reads, writes = (np.sort(rng.uniform(0, 30, n)) for n in (400, 90))
    for name, times in (("ata_read.csv", reads), ("ata_write.csv", writes)):
        lines = [f"{1000 + int(t)},{round(t % 1 * 1e9)},77,4096" for t in times]
        (run / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    windows = recordings.read_real_windows(tmp_path)["Zip"]

    first = min(reads[0], writes[0])
    for i, row in enumerate(windows):
        begin = first + 5.0 * i
        for value, times in zip(row, (reads, writes), strict=True):
            inside = ((times >= begin - 1e-6) & (times < begin + 10.0 - 1e-6)).sum()
            assert value == pytest.approx(4096 * inside / 10.0, abs=4096 / 10.0)
    assert len(windows) in (3, 4)


def test_a_folder_without_real_recordings_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="ata_read"):
        recordings.read_real_windows(tmp_path)
