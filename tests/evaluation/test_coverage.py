"""Coverage of the interval on simulated corpora with a known truth: by session it holds, by window it does not."""

from __future__ import annotations

import pytest
from tests.evaluation.coverage import cover_hosts, coverage


def test_an_interval_over_sessions_holds_the_truth_and_one_over_windows_does_not() -> None:
    """The small form: 60 corpora of 40 episodes; 9 in 10 is what so few corpora can tell from 19 in 20."""
    held = coverage(40, corpora=60, resamples=300)

    assert held.by_session >= 0.88
    assert held.by_window <= 0.75


def test_each_of_the_three_intervals_holds_its_own_target_and_the_first_holds_no_other() -> None:
    """The small form: 120 corpora of six hosts; 0.88 is what so few can tell from 0.95."""
    held = cover_hosts(0.45, corpora=120, resamples=300)

    assert min(held.same_hosts, held.mean_of_hosts, held.new_host) >= 0.88
    assert held.same_for_new < held.same_for_mean < held.same_hosts
    assert held.same_for_new < 0.75


@pytest.mark.soak
def test_coverage_of_the_three_intervals_on_500_corpora(capsys: pytest.CaptureFixture[str]) -> None:
    table = [cover_hosts(spread, corpora=500, resamples=2000) for spread in (0.0, 0.15, 0.3, 0.45)]

    with capsys.disabled():
        print(
            "\n| sd between hosts | these hosts | mean of new hosts | one new host | first for mean | first for new |"
        )
        print("|---|---|---|---|---|---|")
        for h in table:
            print(
                f"| {h.tau:.3f} | {h.same_hosts:.3f} | {h.mean_of_hosts:.3f} | {h.new_host:.3f} "
                f"| {h.same_for_mean:.3f} | {h.same_for_new:.3f} |"
            )
    assert all(0.93 <= h.same_hosts <= 0.97 for h in table)
    assert all(h.mean_of_hosts >= 0.93 for h in table)
    assert all(h.new_host >= 0.93 for h in table)


@pytest.mark.soak
def test_coverage_of_300_corpora_at_20_40_80_and_160_episodes(capsys: pytest.CaptureFixture[str]) -> None:
    table = [coverage(n, corpora=300, resamples=2000) for n in (20, 40, 80, 160)]

    with capsys.disabled():
        print("\n| episodes | corpora | 95 % interval by session | width | its plain percentiles | by window | width |")
        print("|---|---|---|---|---|---|---|")
        for h in table:
            print(
                f"| {h.episodes} | {h.corpora} | {h.by_session:.3f} | {h.width_by_session:.3f} | {h.plain:.3f} "
                f"| {h.by_window:.3f} | {h.width_by_window:.3f} |"
            )
    by = {h.episodes: h for h in table}
    assert by[40].by_session >= 0.90
    assert by[160].by_session >= 0.93
    assert all(h.by_window < 0.85 for h in table)
