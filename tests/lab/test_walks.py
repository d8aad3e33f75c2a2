"""Load walks: spans fill the episode, one at least is a load, and idle spans in a row are one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from phasewatch.lab.walks import LoadSpan, draw_load_walk, list_load_kinds
from phasewatch.profiles import draw_phase_walk
from phasewatch.types import Phase


def draw(seed: int, *, idle_share: float = 0.3, length_s: float = 300.0) -> tuple[LoadSpan, ...]:
    return draw_load_walk(
        np.random.default_rng(seed),
        length_s=length_s,
        between_s=(10.0, 300.0),
        idle_share=idle_share,
        idle_kind="idle-cron",
        choose_kind=lambda: "compile",
        draw_knobs=lambda kind: (("duty", 0.5),),
    )


@pytest.mark.parametrize("seed", range(20))
def test_spans_fill_the_episode_without_gaps(seed: int) -> None:
    spans = draw(seed)

    assert (spans[0].start_s, spans[-1].end_s) == (0.0, 300.0)
    assert all(one.end_s == other.start_s for one, other in pairwise(spans))


@pytest.mark.parametrize("seed", range(20))
def test_at_least_one_span_is_a_load(seed: int) -> None:
    assert list_load_kinds(draw(seed, idle_share=1.0)) == ("compile",)


def test_idle_spans_in_a_row_are_one() -> None:
    for seed in range(50):
        assert not any(one.is_idle and other.is_idle for one, other in pairwise(draw(seed, idle_share=0.8)))


def test_idle_form_is_no_load_and_has_no_intensities() -> None:
    spans = [span for seed in range(30) for span in draw(seed)]

    assert all(span.knobs == () for span in spans if span.is_idle)
    assert {span.kind for span in spans} == {"compile", "idle-cron"}


def test_phase_before_a_forbidden_onset_lasts_to_the_end() -> None:
    for seed in range(300):
        walk = draw_phase_walk(
            np.random.default_rng(seed), length_s=120.0, between_s=(10, 300), is_log_uniform=True, after_onset_s=31.0
        )
        starts = np.cumsum([0.0, *(seconds for _, seconds in walk)])

        assert starts[-1] == pytest.approx(120.0)
        assert all(
            120.0 - start >= 30 for start, (phase, _) in zip(starts, walk, strict=False) if phase is Phase.INFECTING
        )
