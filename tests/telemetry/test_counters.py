"""Sums over members that come, go and restart: no invented growth, and a fall where growth is unknown."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from phasewatch.telemetry.counters import CounterSum, VirtqueueSum

MEMBERS = st.dictionaries(st.sampled_from("abc"), st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=3)
STEPS = st.lists(MEMBERS, min_size=2, max_size=12)


@given(STEPS)
def test_a_sum_grows_with_its_members_or_starts_again(readings: list[dict[str, tuple[int, int]]]) -> None:
    counters = CounterSum()
    before_sums = counters.add(readings[0], 2)
    for before, now in pairwise(readings):
        sums = counters.add(now, 2)
        grown = [sum(now[m][i] - before[m][i] for m in before if m in now) for i in range(2)]
        is_whole = all(m in now and all(a >= b for a, b in zip(now[m], before[m], strict=True)) for m in before)

        assert sums == (tuple(s + g for s, g in zip(before_sums, grown, strict=True)) if is_whole else (0, 0))
        before_sums = sums


@given(st.integers(0, 65535), st.lists(st.integers(0, 3000), max_size=40))
def test_a_wrapping_index_is_counted_correctly(start: int, grown: list[int]) -> None:
    ring = VirtqueueSum()
    ring.add({"q": start}, requests=0, is_restarted=False)
    total, index = 0, start
    for more in grown:
        total, index = total + more, (index + more) % 65536

        assert ring.add({"q": index}, requests=more, is_restarted=False) == total


@given(st.lists(st.tuples(st.integers(0, 65535), st.none() | st.integers(0, 20), st.booleans()), max_size=20))
def test_no_interval_exceeds_what_block_statistics_allow(
    steps: list[tuple[int, int | None, bool]],
) -> None:
    ring = VirtqueueSum()
    before: int | None = None
    for index, requests, restarted in steps:
        total = ring.add({"q": index}, requests=requests, is_restarted=restarted)
        limit = 4096 if requests is None else 2 * requests + 64
        if total is not None and before is not None and total > before:
            assert total - before <= limit
        before = total if total is not None else before


def test_a_restart_of_a_zero_sum_gives_no_reading() -> None:
    ring = VirtqueueSum()
    ring.add({"q": 7}, requests=0, is_restarted=False)

    assert ring.add({"q": 0}, requests=0, is_restarted=True) is None
