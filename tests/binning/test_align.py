"""What a bin is: which readings it spans, when it repeats, when it knows nothing, and that it never knows the
future."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.factories.bundles import MONO0, T0, S, bare, episode, rows, with_rows

from phasewatch.binning.align import bin_episode
from phasewatch.bundle.model import Episode, SourceRows
from phasewatch.channels import CHANNELS, LEVEL_CHANNELS
from phasewatch.types import SourceKind

NAN = float("nan")


def column(whole: Episode, name: str) -> list[float]:
    """Return one channel's bins, NaN as None so that lists compare."""
    at = [c.full_name for c in CHANNELS].index(name)
    return plain(bin_episode(whole).bins[:, at])


def plain(values: NDArray[np.float32]) -> list[float]:
    return [None if np.isnan(v) else float(v) for v in values]  # type: ignore[misc]


def frames(at_s: list[float], counts: list[int | None], **more: object) -> SourceRows:
    """Readings of one counter, frames sent; its channel is a rate in 1/s."""
    return rows(SourceKind.NETFLOW, at_s, out_pkts=counts, **more)  # type: ignore[arg-type]


def running(at_s: list[float], values: list[int | None], **more: object) -> SourceRows:
    """Readings of one gauge, runnable processes."""
    return rows(SourceKind.GUEST, at_s, procs_running=values, **more)  # type: ignore[arg-type]


def test_a_bin_is_half_a_second_and_the_last_incomplete_one_is_dropped() -> None:
    grid = bin_episode(bare(seconds=2.9))

    assert grid.bins.shape == (5, len(CHANNELS))
    assert grid.levels.shape == (5, 13)
    assert grid.flags.shape == (5,)


def test_a_rate_is_the_change_from_the_last_reading_of_the_bin_before_over_the_time_between_them() -> None:
    whole = bare(frames([-0.25, 0.25, 0.75], [100, 110, 140]), seconds=1)

    assert column(whole, "netflow.out_pkts") == [20.0, 60.0]


def test_each_increment_is_in_exactly_one_bin() -> None:
    at, counts = [-0.1, 0.3, 0.45, 0.7, 1.31, 1.32, 1.9], [0, 1, 3, 7, 15, 31, 63]
    whole = bare(frames(at, counts), seconds=2)

    spans = [0.55, 0.25, 0.62, 0.58]  # seconds from the last reading of one bin to that of the next
    increments = [rate * span for rate, span in zip(column(whole, "netflow.out_pkts"), spans, strict=True)]
    assert increments == pytest.approx([3, 4, 24, 32], rel=1e-6)
    assert sum(increments) == pytest.approx(63)


def test_a_bin_knows_nothing_after_its_end() -> None:
    whole = episode([("clean", 12)])
    for cut_s in (0.5, 3.0, 7.5, 11.5):
        until = {
            source: replace(
                r,
                t_wall_ns=r.t_wall_ns[kept],
                t_mono_ns=r.t_mono_ns[kept],
                seq=r.seq[kept],
                columns=tuple(c[kept] for c in r.columns),
                present=r.present[kept],
            )
            for source, r in whole.rows.items()
            for kept in [r.t_wall_ns <= T0 + round(cut_s * S)]
        }
        n = int(cut_s * 2)

        assert np.array_equal(
            bin_episode(replace(whole, rows=until)).bins[:n], bin_episode(whole).bins[:n], equal_nan=True
        )


def test_a_reading_stamped_exactly_at_a_bins_end_belongs_to_it() -> None:
    whole = bare(running([0.5, 0.500000001], [7, 9]), seconds=1)

    assert column(whole, "guest.procs_running") == [7.0, 9.0]


def test_a_bin_without_a_reading_of_its_own_repeats_the_one_before() -> None:
    whole = bare(frames([-0.5, 0.5, 1.5], [0, 10, 40]), seconds=2)

    assert column(whole, "netflow.out_pkts") == [10.0, 10.0, 30.0, 30.0]


def test_the_first_bin_repeats_the_unstored_one_that_ends_at_t0() -> None:
    whole = bare(frames([-1.2, -0.2, 0.8], [0, 10, 40]), seconds=1)

    assert column(whole, "netflow.out_pkts") == [10.0, 30.0]


def test_the_unstored_bin_knows_a_gauge_from_one_reading_and_a_rate_only_from_two() -> None:
    one = rows(SourceKind.GUEST, [-0.2], procs_running=[4], ctxt=[100])

    assert column(bare(one, seconds=1), "guest.procs_running") == [4.0, 4.0]
    assert column(bare(one, seconds=1), "guest.ctxt") == [None, None]


def test_before_the_first_reading_nothing_is_known() -> None:
    whole = bare(running([1.2], [4]), seconds=2)

    assert column(whole, "guest.procs_running") == [None, None, 4.0, 4.0]


def test_a_rate_whose_span_has_no_reading_before_it_starts_at_the_first_in_the_bin() -> None:
    assert column(bare(frames([0.1, 0.3], [0, 10]), seconds=1), "netflow.out_pkts") == [50.0, 50.0]
    assert column(bare(frames([0.3, 0.8], [0, 10]), seconds=1), "netflow.out_pkts") == [None, 20.0]


@pytest.mark.parametrize(
    ("second_s", "expected"),
    [
        pytest.param(2.7, [0.0, 0.0, 0.0, 0.0, 0.0, 4.0], id="a silence of 2.5 s is bridged"),
        pytest.param(2.700000001, [0.0, 0.0, 0.0, 0.0, 0.0, None], id="a gap is skipped, not filled"),
    ],
)
def test_a_step_longer_than_two_and_a_half_seconds_makes_no_rate(second_s: float, expected: list[float | None]) -> None:
    whole = bare(frames([-0.3, 0.2, second_s], [0, 0, 10]), seconds=3)

    assert column(whole, "netflow.out_pkts") == expected


def test_a_reading_is_stale_two_and_a_half_seconds_after_it_was_taken() -> None:
    assert column(bare(running([0.5], [4]), seconds=4), "guest.procs_running") == [4.0] * 6 + [None] * 2
    assert column(bare(running([0.499999999], [4]), seconds=4), "guest.procs_running") == [4.0] * 5 + [None] * 3


def test_a_counter_that_falls_makes_its_bin_unknown_and_no_other() -> None:
    whole = bare(frames([-0.25, 0.25, 0.75, 1.25], [50, 60, 5, 15]), seconds=1.5)

    assert column(whole, "netflow.out_pkts") == [20.0, None, 20.0]


def test_a_reset_inside_a_span_is_seen_even_if_the_ends_rise() -> None:
    whole = bare(frames([-0.25, 0.1, 0.2, 0.3], [50, 60, 5, 90]), seconds=0.5 + 0.5)

    assert column(whole, "netflow.out_pkts") == [None, None]


def test_a_reset_of_one_counter_leaves_the_others_alone() -> None:
    r = rows(SourceKind.NETFLOW, [-0.25, 0.25], out_pkts=[50, 5], in_pkts=[50, 60])

    assert column(bare(r, seconds=1), "netflow.out_pkts") == [None, None]
    assert column(bare(r, seconds=1), "netflow.in_pkts") == [20.0, 20.0]


def test_a_level_may_fall() -> None:
    r = rows(SourceKind.PROC, [-0.25, 0.25], rss_anon_bytes=[8192, 4096])

    assert column(bare(r, seconds=1), "proc.rss_anon_delta") == [-8192.0, -8192.0]


def test_time_differences_are_those_of_the_monotonic_clock() -> None:
    r = frames([-0.25, 0.25, 0.99], [0, 10, 20], mono_s=[-0.25, 0.25, 0.75])

    assert column(bare(r, seconds=1), "netflow.out_pkts") == [20.0, 20.0]


@pytest.mark.parametrize("mono_s", [[-0.25, -0.25], [-0.25, -0.3]], ids=["standing still", "running back"])
def test_a_span_in_which_monotonic_time_does_not_pass_is_unknown(mono_s: list[float]) -> None:
    assert column(bare(frames([-0.25, 0.25], [0, 10], mono_s=mono_s), seconds=1), "netflow.out_pkts") == [None, None]


def test_a_ratio_is_one_change_over_the_other_and_zero_where_the_second_stood_still() -> None:
    r = rows(SourceKind.QMP, [-0.25, 0.25, 0.75, 1.25], blk_wr_ns=[0, 6_000_000, 6_000_000, 1], blk_wr_ops=[0, 3, 3, 4])

    assert column(bare(r, seconds=1.5), "qmp.blk_wr_lat") == [np.float32(0.002), 0.0, None]


def test_a_reading_of_a_ratio_needs_both_fields() -> None:
    r = rows(SourceKind.NETFLOW, [-0.25, 0.25, 0.75], out_bytes=[0, 500, 1800], out_pkts=[0, None, 3])

    assert column(bare(r, seconds=1), "netflow.mean_out_size") == [None, 600.0]
    assert column(bare(r, seconds=1), "netflow.out_bytes") == [1000.0, 2600.0]


def test_a_null_is_no_reading_of_that_field_alone() -> None:
    r = rows(SourceKind.NETFLOW, [-0.25, 0.25, 0.75], out_pkts=[0, None, 30], in_pkts=[0, 10, 20])

    assert column(bare(r, seconds=1), "netflow.out_pkts") == [None, 30.0]
    assert column(bare(r, seconds=1), "netflow.in_pkts") == [20.0, 20.0]


def test_a_gauge_is_the_mean_of_its_readings_in_the_bin() -> None:
    r = rows(SourceKind.QMP, [-0.1, 0.1, 0.2, 0.3, 0.7], vcpu_busy=[1.0, 0.1, 0.2, 0.6, 0.5])

    assert column(bare(r, seconds=1), "qmp.vcpu_busy") == [np.float32((0.1 + 0.2 + 0.6) / 3), 0.5]


def test_a_count_is_the_largest_of_its_ticks_in_the_bin() -> None:
    r = rows(SourceKind.NETFLOW, [-0.1, 0.1, 0.2, 0.3, 0.7], dst_ports=[90, 3, 8, 5, 2])

    assert column(bare(r, seconds=1), "netflow.dst_ports") == [8.0, 2.0]


def test_a_gauge_is_known_across_a_gap_of_its_neighbours() -> None:
    whole = bare(running([-3.0, 0.2], [9, 4]), seconds=1)

    assert column(whole, "guest.procs_running") == [4.0, 4.0]


def test_readings_count_in_the_order_of_their_stamps_and_then_of_their_numbers() -> None:
    shuffled = frames([0.75, -0.25, 0.25], [60, 0, 10], seq=[2, 0, 1])
    twice = running([0.2, 0.2], [9, 4], seq=[8, 7])  # number 7 was taken first

    assert column(bare(shuffled, seconds=1), "netflow.out_pkts") == [20.0, 100.0]
    assert column(bare(twice, seconds=1), "guest.procs_running") == [6.5, 6.5]


def test_counters_are_subtracted_before_they_become_floats() -> None:
    whole = bare(frames([-0.25, 0.25], [2**53 + 1, 2**53 + 2]), seconds=1)

    assert column(whole, "netflow.out_pkts") == [2.0, 2.0]


def test_scales_turn_raw_units_into_the_channels_own() -> None:
    r = rows(SourceKind.PROC, [-0.25, 0.25], cpu_user_ns=[0, 250_000_000])

    assert column(bare(r, seconds=1), "proc.cpu_user") == [0.5, 0.5]


def test_a_missing_source_is_unknown_and_disturbs_no_other() -> None:
    whole = episode([("clean", 10)])
    without = bin_episode(with_rows(whole, without=[SourceKind.QMP])).bins
    is_qmp = np.array([c.source is SourceKind.QMP for c in CHANNELS])

    assert np.isnan(without[:, is_qmp]).all()
    assert np.array_equal(without[:, ~is_qmp], bin_episode(whole).bins[:, ~is_qmp])


def test_there_is_one_nan_and_no_negative_zero() -> None:
    r = rows(SourceKind.QMP, [-0.25, 0.25, 0.75], vcpu_busy=[-0.0, -0.0, -1e-300], jit_tb=[5, 4, 3])
    stored = set(bin_episode(bare(r, seconds=1)).bins.view(np.uint32).ravel().tolist())

    assert stored == {0x7FC00000, 0}


def test_levels_are_gridded_beside_the_channels() -> None:
    r = rows(SourceKind.PROC, [0.2, 0.7], rss_bytes=[4096, 8192])
    at = [c.full_name for c in LEVEL_CHANNELS].index("proc.rss")

    assert plain(bin_episode(bare(r, seconds=1)).levels[:, at]) == [4096.0, 8192.0]


def test_an_episode_without_any_reading_is_all_unknown() -> None:
    grid = bin_episode(bare(rows(SourceKind.PROC, []), seconds=3))

    assert np.isnan(grid.bins).all()
    assert np.isnan(grid.levels).all()


def test_stamps_at_the_ends_of_the_clock_break_nothing() -> None:
    r = frames([-0.25, 0.25], [0, 10])
    wild = replace(r, t_wall_ns=np.array([0, 2**63 - 1], np.int64), t_mono_ns=np.array([MONO0, 2**63 - 1], np.int64))

    assert column(bare(wild, seconds=1), "netflow.out_pkts") == [None, None]
