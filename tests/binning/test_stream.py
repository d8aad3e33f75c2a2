"""Live equals offline: whatever the portions, the order within lateness and the restarts, bins are the batch's bit
for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.factories.bundles import T0, S, bare, episode, rows

from phasewatch.binning.align import FLAG_CLOCK_STEP, FLAG_LATE, bin_episode
from phasewatch.binning.clocks import rebase_episode
from phasewatch.binning.stream import LATENESS_NS, ClosedBin, StreamBinner
from phasewatch.bundle.archive import unpack_bundle
from phasewatch.bundle.model import Episode
from phasewatch.channels import CHANNELS, list_raw_fields
from phasewatch.features.fingerprint import build_golden_episodes
from phasewatch.features.stats import window_stats
from phasewatch.types import BIN_NS, STRIDE_BINS, WINDOW_BINS, SourceKind

CORPUS = Path(__file__).parents[2] / "corpus" / "lab-v1"
Bins = NDArray[np.float32]
Reading = tuple[int, SourceKind, tuple[int | float | None, ...]]


def readings_of(whole: Episode) -> list[Reading]:
    """The episode's readings in order of their wall stamps."""
    made: list[Reading] = []
    for source, r in rebase_episode(whole)[0].rows.items():
        columns = [
            [v if here else None for v, here in zip(column.tolist(), r.present[:, i].tolist(), strict=True)]
            for i, column in enumerate(r.columns)
        ]
        for row in zip(r.t_wall_ns.tolist(), r.t_mono_ns.tolist(), r.seq.tolist(), *columns, strict=True):
            made.append((row[0], source, row))
    return sorted(made, key=lambda reading: (reading[0], reading[2][2]))


def first_of(whole: Episode, *, seconds: int = 40) -> Episode:
    """The episode's first seconds: cheaper to play a hundred times; what is stamped later still stands in it."""
    end = replace(
        whole.marks[-1], t_wall_ns=whole.t0_ns + seconds * S, t_mono_ns=whole.marks[0].t_mono_ns + seconds * S
    )
    return replace(whole, marks=(*(m for m in whole.marks[:-1] if m.t_wall_ns < end.t_wall_ns), end))


@cache
def recorded() -> tuple[tuple[Episode, list[Reading], Bins], ...]:
    """Real recordings of the bundled corpus, one a host, and the golden episodes, with what the batch makes of them."""
    hosts = sorted(path for path in CORPUS.iterdir() if path.is_dir())
    found = [
        unpack_bundle(path.read_bytes(), file=path.name) for path in (sorted(h.glob("*.tar.zst"))[0] for h in hosts)
    ]
    whole = [*(first_of(each) for each in found), *(golden for _, golden in build_golden_episodes())]
    return tuple((each, readings_of(each), bin_episode(each).bins) for each in whole)


def play(grid: StreamBinner, readings: list[Reading], end_ns: int, *, seed: int = 0, worst_ns: int = 0) -> Bins:
    """Feed readings, each late by at most so much, to a watcher that wakes when it likes; give what it closed."""
    rng = np.random.default_rng(seed)
    due = [r[0] + int(late) for r, late in zip(readings, rng.integers(0, worst_ns + 1, len(readings)), strict=True)]
    waiting = [(due[i], readings[i]) for i in np.argsort(due, kind="stable")]
    closed: list[ClosedBin] = []
    now_ns = waiting[0][0]
    while now_ns < end_ns + LATENESS_NS:
        now_ns += int(rng.choice([1_000_000, 100_000_000, 700_000_000, 3_000_000_000]) * rng.random())
        portion = [reading for at_ns, reading in waiting if at_ns <= now_ns]
        waiting = waiting[len(portion) :]
        for _, source, row in portion:
            grid.add(source, row)
        closed += grid.close_until(min(now_ns, end_ns + LATENESS_NS))
    assert [b.number for b in closed] == list(range(len(closed)))
    return np.array([b.values for b in closed])


def same(left: Bins, right: Bins) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def check(which: int, seed: int, worst_ns: int) -> None:
    whole, readings, offline = recorded()[which % len(recorded())]
    grid = StreamBinner(whole.t0_ns)

    live = play(grid, readings, whole.t0_ns + len(offline) * BIN_NS, seed=seed, worst_ns=worst_ns)

    assert grid.n_late == 0
    assert same(live, offline)
    windows = [window_stats(live[i : i + WINDOW_BINS]) for i in range(0, len(live) - WINDOW_BINS + 1, STRIDE_BINS)]
    expected = window_stats(offline)
    assert same(np.concatenate([expected[:0], *windows]), expected)  # of an episode shorter than a window, none


SCHEDULES = (
    st.integers(0, 59),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 10_000_000, 400_000_000, LATENESS_NS - 1]),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(*SCHEDULES)
def test_live_equals_offline(which: int, seed: int, worst_ns: int) -> None:
    check(which, seed, worst_ns)


@pytest.mark.soak
def test_live_equals_offline_on_a_thousand_schedules(soak_row: Callable[..., None]) -> None:
    taken: list[int] = []

    @settings(max_examples=1000, deadline=None)
    @given(*SCHEDULES)
    def run(which: int, seed: int, worst_ns: int) -> None:
        check(which, seed, worst_ns)
        taken.append(worst_ns)

    run()

    soak_row(
        "Live equals offline, bit for bit",
        schedules=len(taken),
        **{"latest reading, ms": round(max(taken) / 1e6)},
        different=0,
    )


def test_a_grid_put_aside_and_taken_up_again_goes_on_with_the_same_bits() -> None:
    whole, readings, offline = recorded()[0]
    grid, closed = StreamBinner(whole.t0_ns), []
    for number, (now_ns, source, row) in enumerate(readings):
        if number % 97 == 50:
            grid = copy.deepcopy(grid)
        closed += grid.close_until(now_ns - 1)
        grid.add(source, row)
    closed += grid.close_until(whole.t0_ns + len(offline) * BIN_NS + LATENESS_NS)

    assert same(np.array([b.values for b in closed[: len(offline)]]), offline)


def test_a_watcher_begun_anew_is_an_episode_that_begins_later() -> None:
    whole, readings, _ = recorded()[0]
    t0_ns = whole.t0_ns + 30 * BIN_NS
    since = [reading for reading in readings if reading[0] > t0_ns - 400_000_000]
    later = replace(
        whole,
        marks=(replace(whole.marks[0], t_wall_ns=t0_ns), *(m for m in whole.marks if m.t_wall_ns > t0_ns)),
        rows={
            source: replace(
                r,
                t_wall_ns=r.t_wall_ns[kept],
                t_mono_ns=r.t_mono_ns[kept],
                seq=r.seq[kept],
                columns=tuple(c[kept] for c in r.columns),
                present=r.present[kept],
            )
            for source, r in whole.rows.items()
            for kept in [r.t_wall_ns > t0_ns - 400_000_000]
        },
    )
    offline = bin_episode(later).bins

    live = play(StreamBinner(t0_ns), since, t0_ns + len(offline) * BIN_NS)

    assert same(live, offline)


def sent(at_s: list[float], counts: list[int | None]) -> list[Reading]:
    return readings_of(bare(rows(SourceKind.NETFLOW, at_s, out_pkts=counts), seconds=60))


OUT_PKTS = [c.full_name for c in CHANNELS].index("netflow.out_pkts")


def test_a_bin_is_closed_a_second_after_its_end_whatever_is_missing() -> None:
    grid = StreamBinner(T0)

    assert grid.close_until(T0 + 3 * BIN_NS - 1) == []
    assert [b.number for b in grid.close_until(T0 + 3 * BIN_NS)] == [0]
    assert grid.next_close_ns == T0 + 4 * BIN_NS
    assert np.isnan(grid.close_until(T0 + 4 * BIN_NS)[0].values).all()


def test_a_late_tick_is_counted_left_out_and_flags_its_own_bin_and_those_that_it_would_have_changed() -> None:
    first, second, third = sent([-0.25, 0.25, 0.75], [100, 110, 140])
    grid = StreamBinner(T0)
    grid.add(first[1], first[2])
    grid.close_until(T0 + 3 * BIN_NS)

    assert not grid.add(second[1], second[2])
    assert grid.add(third[1], third[2])
    assert grid.n_late == 1
    (bin_,) = grid.close_until(T0 + 4 * BIN_NS)
    # The increment of the lost reading is in the span of the next one: nothing is counted twice or dropped.
    assert bin_.values[OUT_PKTS] == 40.0
    # Bin 1 is not what the batch makes of all three; with gaps of up to 2.5 s that may go on for 5 s.
    assert [grid.combine_flags(number, 1) for number in range(12)] == [FLAG_LATE] * 11 + [0]


@pytest.mark.parametrize("seed", range(4))
def test_a_window_that_no_flag_speaks_of_is_the_batchs_though_readings_come_late(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_flagged = 0
    for whole, readings, offline in recorded():
        slow = set(rng.choice(len(readings), 4, replace=False).tolist())
        due = sorted((r[0] + (1_800_000_000 if i in slow else 0), i) for i, r in enumerate(readings))
        grid, live, flags = StreamBinner(whole.t0_ns), [], []
        for at_ns, i in [*due, (whole.t0_ns + (len(offline) + 4) * BIN_NS, -1)]:
            for bin_ in grid.close_until(at_ns):
                live.append(bin_.values)
                flags.append(grid.combine_flags(bin_.number - WINDOW_BINS + 1, WINDOW_BINS) & FLAG_LATE)
            if i >= 0:
                grid.add(*readings[i][1:])
        for end in range(WINDOW_BINS, len(offline) + 1, STRIDE_BINS):
            own = same(np.array(live[end - WINDOW_BINS : end]), offline[end - WINDOW_BINS : end])
            late_ns = [readings[i][0] for i in slow]
            # What came after the window was decided could not be told of it.
            is_gone = any(0 < whole.t0_ns + end * BIN_NS - at_ns < 800_000_000 for at_ns in late_ns)
            assert own or flags[end - 1] or is_gone
            n_flagged += bool(flags[end - 1])
    assert n_flagged > 20


def test_flags_are_there_however_many_bins_are_closed_at_once() -> None:
    (late,) = sent([0.25], [100])
    grid = StreamBinner(T0)
    grid.close_until(T0 + 3 * BIN_NS)
    grid.add(*late[1:])

    closed = grid.close_until(T0 + 100 * BIN_NS)

    assert len(closed) > 90
    assert grid.combine_flags(0, WINDOW_BINS) == FLAG_LATE
    grid.close_until(T0 + 101 * BIN_NS)
    assert grid.combine_flags(0, WINDOW_BINS) == 0  # those of the call before are forgotten


def test_a_step_of_the_wall_clock_flags_what_it_touches_as_the_batch_does() -> None:
    whole = next(whole for name, whole in build_golden_episodes() if "step" in name)
    grid = StreamBinner(whole.t0_ns)
    for _, source, row in readings_of(whole):
        grid.add(source, row)

    offline = bin_episode(whole).flags
    assert offline.any()
    assert [grid.combine_flags(i, 1) & FLAG_CLOCK_STEP for i in range(len(offline))] == offline.tolist()


def test_memory_does_not_grow_with_the_hours() -> None:
    grid = StreamBinner(T0)
    values = (7,) * len(list_raw_fields(SourceKind.PROC))
    for i in range(4000):
        now_ns = T0 + i * S // 2 + S // 4
        grid.add(SourceKind.PROC, (now_ns, now_ns - T0, i, *values))
        grid.close_until(now_ns)
        grid.add(SourceKind.NETFLOW, (now_ns - 5 * S, now_ns - T0, i, *(7,) * len(list_raw_fields(SourceKind.NETFLOW))))

    assert len(grid._rows[SourceKind.PROC]) <= 5
    assert len(grid._flags) <= 60
    assert grid.n_late > 3900


def test_a_number_too_large_for_the_grid_is_no_reading() -> None:
    whole = episode([("clean", 12)], agent=False)
    grid = StreamBinner(whole.t0_ns)
    for _, source, row in readings_of(whole):
        grid.add(source, (*row[:3], 2**70, *row[4:]))

    closed = grid.close_until(whole.t_end_ns + LATENESS_NS)

    assert all(np.isnan(b.values[0]) for b in closed)
    # No agent, no KVM, and the first field of three sources gone: one channel each, and two mean sizes.
    assert closed[-1].n_finite == len(CHANNELS) - 8 - 4 - 3 - 2
