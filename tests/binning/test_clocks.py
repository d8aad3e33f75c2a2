"""Which clock a stamp is in, what is put right, what is lost, and where the wall clock stepped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.factories.bundles import BOOT0, MONO0, T0, S, episode, shifted, with_clocks, with_rows

from phasewatch.binning.align import bin_episode
from phasewatch.binning.clocks import find_clock_steps, rebase_episode, rebase_stamp
from phasewatch.bundle.model import Episode
from phasewatch.types import BundleStatus, ClockBase, SourceKind

MONOTONIC = ((MONO0, T0), (MONO0 + 3600 * S, T0 + 3600 * S))


def in_monotonic(whole: Episode, source: SourceKind = SourceKind.QMP) -> Episode:
    """Stamp one source in the monotonic clock, and let the manifest go on claiming Unix time."""
    return with_rows(whole, shifted(whole.rows[source], MONO0 - T0))


def codes(whole: Episode) -> list[str]:
    return [finding.code for finding in rebase_episode(whole)[1]]


def test_a_stamp_lies_on_the_line_through_the_two_pairs() -> None:
    pair = ((100, 1_000), (200, 1_201))

    assert [rebase_stamp(c, pair) for c in (100, 150, 200, 0)] == [1_000, 1_100, 1_201, 799]


def test_re_basing_is_exact_where_64_bits_overflow() -> None:
    pair = ((10**18, 2 * 10**18), (10**18 + 3 * 10**12, 2 * 10**18 + 3 * 10**12 + 7))

    assert rebase_stamp(10**18 + 3 * 10**11, pair) == 2 * 10**18 + 3 * 10**11  # 0.7 ns of drift are cut off
    assert rebase_stamp(10**18 + 5 * 10**11, pair) == 2 * 10**18 + 5 * 10**11 + 1


def test_a_faultless_episode_is_handed_back_as_it_is() -> None:
    whole = episode()

    same, findings = rebase_episode(whole)

    assert same is whole
    assert findings == ()


def test_a_declared_clock_is_re_based_without_a_word() -> None:
    whole = episode()
    moved = with_clocks(
        with_rows(whole, shifted(whole.rows[SourceKind.PROC], BOOT0 - T0)), base={SourceKind.PROC: ClockBase.BOOTTIME}
    )

    assert codes(moved) == []
    assert np.array_equal(bin_episode(moved).bins, bin_episode(whole).bins, equal_nan=True)


def test_a_declared_clock_without_pairs_loses_the_source() -> None:
    whole = with_clocks(episode(), base={SourceKind.QMP: ClockBase.GUEST})

    rebased, findings = rebase_episode(whole)

    assert SourceKind.QMP not in rebased.rows
    assert [(f.code, f.severity, f.place) for f in findings] == [("clock-base:qmp", BundleStatus.DEGRADED, "qmp.jsonl")]


def test_losing_proc_rejects_the_episode() -> None:
    _, findings = rebase_episode(with_clocks(episode(), base={SourceKind.PROC: ClockBase.GUEST}))

    assert [(f.code, f.severity) for f in findings] == [("clock-base:proc", BundleStatus.REJECTED)]


def test_a_wrong_base_that_one_clock_explains_is_repaired() -> None:
    whole = episode()

    assert codes(in_monotonic(whole)) == ["clock-base-repaired:qmp"]
    assert np.array_equal(bin_episode(in_monotonic(whole)).bins, bin_episode(whole).bins, equal_nan=True)


def test_a_wrong_base_that_no_clock_explains_loses_the_source() -> None:
    whole = episode()

    assert codes(with_rows(whole, shifted(whole.rows[SourceKind.QMP], -(10**18)))) == ["clock-base:qmp"]


def test_a_wrong_base_that_two_clocks_explain_loses_the_source() -> None:
    (c0, u0), (c1, u1) = MONOTONIC
    other = ((c0, u0 + 5 * S), (c1, u1 + 5 * S))
    whole = with_clocks(in_monotonic(episode()), pairs={ClockBase.MONOTONIC: MONOTONIC, ClockBase.BOOTTIME: other})

    rebased, findings = rebase_episode(whole)

    assert SourceKind.QMP not in rebased.rows
    assert "boottime and monotonic both fit" in findings[0].words


def test_on_a_machine_that_never_slept_two_clocks_are_one() -> None:
    (c0, u0), (c1, u1) = MONOTONIC
    as_good = ((c0, u0 + 900_000), (c1, u1 + 900_000))  # pairs are read one after the other
    whole = with_clocks(in_monotonic(episode()), pairs={ClockBase.MONOTONIC: MONOTONIC, ClockBase.BOOTTIME: as_good})

    assert codes(whole) == ["clock-base-repaired:qmp"]
    assert np.array_equal(bin_episode(whole).bins, bin_episode(episode()).bins, equal_nan=True)


@pytest.mark.parametrize(
    ("moved", "expected"),
    [
        pytest.param(0.50, [], id="half of the rows in place: a source that stopped early, not a wrong clock"),
        pytest.param(0.52, ["clock-base:qmp"], id="fewer than half in place, and no clock takes 95 % of them"),
        pytest.param(0.95, ["clock-base-repaired:qmp"], id="one clock takes 95 %"),
    ],
)
def test_a_base_is_doubted_when_fewer_than_half_of_the_rows_are_near_the_labels(
    moved: float, expected: list[str]
) -> None:
    whole = episode([("clean", 47)], lead_s=2.0)
    r = whole.rows[SourceKind.QMP]
    n = len(r)
    assert n == 100
    stamps = r.t_wall_ns.copy()
    stamps[: round(n * moved)] += MONO0 - T0
    if moved == 0.95:
        stamps[95:] -= 10**17
    split = with_rows(whole, replace(r, t_wall_ns=stamps))

    assert [c for c in codes(split) if c != "clock-step"] == expected


def test_a_source_without_rows_has_no_clock_to_doubt() -> None:
    r = episode().rows[SourceKind.QMP]
    empty = replace(
        r, t_wall_ns=r.t_wall_ns[:0], t_mono_ns=r.t_mono_ns[:0], seq=r.seq[:0],
        columns=tuple(c[:0] for c in r.columns), present=r.present[:0],
    )  # fmt: skip

    assert codes(with_rows(episode(), empty)) == []


def test_what_was_re_based_is_not_re_based_again() -> None:
    once, _ = rebase_episode(in_monotonic(episode()))

    again, findings = rebase_episode(once)

    assert again is once
    assert findings == ()


def test_a_garbage_stamp_of_another_clock_is_held_within_64_bits() -> None:
    whole = episode()
    r = whole.rows[SourceKind.PROC]
    stamps = r.t_wall_ns - T0 + MONO0
    stamps[3] = 2**63 - 1
    wild = with_clocks(with_rows(whole, replace(r, t_wall_ns=stamps)), base={SourceKind.PROC: ClockBase.MONOTONIC})

    assert int(rebase_episode(wild)[0].rows[SourceKind.PROC].t_wall_ns.max()) == 2**63 - 1
    assert bin_episode(wild).bins.shape == bin_episode(whole).bins.shape


def stepped(whole: Episode, by_ms: int) -> Episode:
    """Let the wall clock step 10 s into the episode, for every source."""
    moved = [
        replace(r, t_wall_ns=r.t_wall_ns + (r.t_mono_ns > MONO0 + 10 * S) * (by_ms * 1_000_000))
        for r in whole.rows.values()
    ]
    return with_rows(whole, *moved)


@pytest.mark.parametrize("by_ms", [251, -251, 5_000])
def test_a_step_of_more_than_250_ms_is_found_once_and_flags_the_bins_that_it_touches(by_ms: int) -> None:
    whole = stepped(episode([("clean", 30)]), by_ms)
    grid = bin_episode(whole)

    assert [(f.code, f.severity) for f in grid.findings] == [("clock-step", BundleStatus.DEGRADED)]
    flagged = np.flatnonzero(grid.flags).tolist()
    assert flagged == list(range(flagged[0], flagged[-1] + 1))
    assert flagged[0] in range(16, 21)
    assert flagged[-1] in range(19, 33)
    assert set(grid.flags[flagged].tolist()) == {1}


@pytest.mark.parametrize("by_ms", [240, -240])
def test_a_smaller_step_passes_and_no_rate_feels_it(by_ms: int) -> None:
    whole = episode([("clean", 30)], noise=0.0, jitter_s=0.0)

    grid = bin_episode(stepped(whole, by_ms))

    assert grid.findings == ()
    assert not grid.flags.any()
    assert np.nanmax(grid.bins[:, 0]) == pytest.approx(np.nanmin(grid.bins[:, 0]), rel=1e-6)


def test_rows_out_of_order_are_no_step() -> None:
    whole = episode([("clean", 10)])
    r = whole.rows[SourceKind.PROC]
    back = np.arange(len(r))[::-1]
    reversed_rows = replace(
        r, t_wall_ns=r.t_wall_ns[back], t_mono_ns=r.t_mono_ns[back], seq=r.seq[back],
        columns=tuple(c[back] for c in r.columns), present=r.present[back],
    )  # fmt: skip

    assert len(find_clock_steps(with_rows(whole, reversed_rows))) == 0
    assert np.array_equal(bin_episode(with_rows(whole, reversed_rows)).bins, bin_episode(whole).bins, equal_nan=True)
