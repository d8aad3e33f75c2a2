"""The search for near-duplicates: what it finds, and that no host can make it long."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace

import pytest
from tests.factories.split_episodes import episode

from phasewatch.splits import SplitEpisode, find_near_duplicates
from phasewatch.splits.near import MAX_SKETCH_HOLDERS, find_copied_episodes

SKETCH = tuple(range(64))


def alike(count: int, sketch: object = None) -> list[SplitEpisode]:
    """Many episodes of one host, each with the sketch that a function gives its number, or all with the same."""
    made = [replace(episode(n, "evil"), episode_id=f"e{n:06}", plan_seed=n + 1) for n in range(count)]
    return [replace(e, proc_sketch=sketch(n) if callable(sketch) else SKETCH) for n, e in enumerate(made)]


def half_alike(number: int) -> tuple[int, ...]:
    """Half of the digests are everybody's."""
    return (*SKETCH[:32], *range(1000 + 32 * number, 1032 + 32 * number))


def chained(number: int) -> tuple[int, ...]:
    """Each shares its digests with as many neighbours as may hold one."""
    return tuple(range(8 * number, 8 * number + 64))


def test_episodes_of_an_equal_sketch_are_one_however_many_they_are() -> None:
    near = find_near_duplicates(alike(MAX_SKETCH_HOLDERS + 5))

    assert near.find_twins(["e000020"], frozenset({"e000003", "e000007"})) == {"e000020": "e000003"}


@pytest.mark.parametrize(("holders", "is_found"), [(MAX_SKETCH_HOLDERS, True), (MAX_SKETCH_HOLDERS + 1, False)])
def test_digest_shared_by_many_sketches_is_ignored(holders: int, is_found: bool) -> None:
    near = find_near_duplicates(alike(holders, half_alike))

    assert bool(near.find_twins(["e000001"], frozenset({"e000002"}))) is is_found


def test_two_runs_that_are_one_are_found_also_among_digests_that_everybody_holds() -> None:
    crowd = alike(MAX_SKETCH_HOLDERS + 1, half_alike)
    twin = replace(crowd[3], episode_id="twin", proc_sketch=(*crowd[3].proc_sketch[:-1], 7))

    near = find_near_duplicates([*crowd, twin])

    assert near.find_twins(["twin"], frozenset(e.episode_id for e in crowd)) == {"twin": "e000003"}


@pytest.mark.parametrize("sketch", [None, half_alike, chained], ids=["equal", "half", "chained"])
def test_time_and_memory_grow_with_the_number_of_bundles_alone(sketch: object) -> None:
    """4 × 500: quadratic growth would be 16 times the time and memory of 500; other load may double the time."""

    def measured(count: int) -> tuple[float, int]:
        episodes = alike(count, sketch)
        tracemalloc.start()
        began = time.process_time()
        find_near_duplicates(episodes)
        find_copied_episodes(episodes)
        spent = time.process_time() - began
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return spent, peak

    few = min(measured(500) for _ in range(2))
    many = min(measured(2_000) for _ in range(2))

    assert many[0] < 13 * few[0]
    assert many[1] < 8 * few[1]
