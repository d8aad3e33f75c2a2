"""Clean hours are cut in time: what is learnt from, what sets thresholds and what only tests are never mixed."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from phasewatch.adaptation.site_hours import SitePart, assign_site_parts
from phasewatch.artifacts import RunEpisode
from phasewatch.dataset import EpisodeWindows
from phasewatch.types import EpisodeOrigin, EpisodeRole, SampleKind

S = 10**9


def hours(*episodes: tuple[str, int, int]) -> EpisodeWindows:
    """Windows of every second of (host, start, seconds) episodes."""
    known = tuple(
        RunEpisode(
            episode_id=f"e{i}", host_id=host, profile="benign", sample_name="own", sample_kind=SampleKind.BENIGN,
            origin=EpisodeOrigin.RECORDED, role=EpisodeRole.SOAK, session=f"e{i}", agent=False, plan_seed=0,
            proc_sketch=(), started_wall_ns=start * S, duration_s=float(seconds),
        )
        for i, (host, start, seconds) in enumerate(episodes)
    )  # fmt: skip
    at = [np.arange(seconds) for _, _, seconds in episodes]
    n = sum(map(len, at))
    return EpisodeWindows(
        episodes=known,
        episode_index=np.repeat(np.arange(len(known)), [len(a) for a in at]).astype(np.int32),
        t_center_ns=np.concatenate([start * S + a * S for (_, start, _), a in zip(episodes, at, strict=True)]),
        t_center_s=np.concatenate(at).astype(np.float32),
        purity=np.ones(n, np.float32),
        flags=np.zeros(n, np.uint8),
        y=np.zeros(n, np.int64),
    )


def parts_of(windows: EpisodeWindows, episode: int) -> NDArray[np.int8]:
    return assign_site_parts(windows)[windows.episode_index == episode]


def test_episodes_are_used_whole_in_the_order_of_their_start() -> None:
    windows = hours(("a", 900, 100), ("a", 0, 100), ("a", 300, 100), ("a", 600, 100))

    used = [set(parts_of(windows, i)) for i in range(4)]

    assert used == [{SitePart.TEST}, {SitePart.LEARN}, {SitePart.LEARN}, {SitePart.THRESHOLD}]


def test_an_episode_that_is_longer_than_a_part_is_cut_in_time() -> None:
    windows = hours(("a", 0, 100), ("a", 2000, 100), ("a", 3000, 1000))

    assert [set(parts_of(windows, i)) for i in range(2)] == [{SitePart.LEARN}] * 2
    assert set(parts_of(windows, 2)) == {SitePart.LEARN, SitePart.GAP, SitePart.THRESHOLD, SitePart.TEST}


def test_one_episode_is_cut_in_time_with_a_gap_as_long_as_an_alarm_looks_back() -> None:
    part = parts_of(hours(("a", 0, 1000)), 0)

    assert [int(p) for p in dict.fromkeys(part.tolist())] == [
        SitePart.LEARN, SitePart.GAP, SitePart.THRESHOLD, SitePart.TEST,
    ]  # fmt: skip
    assert np.flatnonzero(part == SitePart.GAP).tolist() == [*range(500, 560), *range(750, 810)]
    assert np.count_nonzero(part == SitePart.LEARN) == 500


@pytest.mark.parametrize("part", [SitePart.LEARN, SitePart.THRESHOLD, SitePart.TEST])
def test_each_host_is_cut_on_its_own(part: SitePart) -> None:
    windows = hours(("a", 0, 1000), ("b", 5000, 1000))

    assert all(part in parts_of(windows, i) for i in (0, 1))
