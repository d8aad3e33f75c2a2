"""Coverage of the interval on simulated corpora with a known truth: by session it holds, by window it does not."""

from __future__ import annotations

import pytest
from tests.evaluation.coverage import coverage


def test_an_interval_over_sessions_holds_the_truth_and_one_over_windows_does_not() -> None:
    """The small form: 60 corpora of 40 episodes; 9 in 10 is what so few corpora can tell from 19 in 20."""
    held = coverage(40, corpora=60, resamples=300)

    assert held.by_session >= 0.88
    assert held.by_window <= 0.75


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
