"""The random walk through the phases."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasewatch.profiles import (
    PHASE_RANGE_S,
    START_PROBABILITIES,
    TRANSITION_PROBABILITIES,
    draw_episode_length,
    draw_phase_walk,
)
from phasewatch.types import PHASES, Phase


def test_tables_are_distributions_over_known_phases() -> None:
    for choices in (START_PROBABILITIES, *TRANSITION_PROBABILITIES.values()):
        assert sum(weight for _, weight in choices) == pytest.approx(1)
        assert {phase for phase, _ in choices} <= set(PHASES)
    assert set(TRANSITION_PROBABILITIES) == set(PHASES)


def test_clean_is_reachable_from_every_infected_phase() -> None:
    assert all(
        Phase.CLEAN in {phase for phase, _ in TRANSITION_PROBABILITIES[phase]}
        for phase in PHASES
        if phase is not Phase.CLEAN
    )


@given(st.integers(0, 2**32), st.floats(1, 600).map(lambda s: round(s, 3)))
def test_walk_takes_allowed_steps_and_fills_its_length(seed: int, length_s: float) -> None:
    walk = draw_phase_walk(np.random.default_rng(seed), length_s=length_s)

    assert sum(seconds for _, seconds in walk) == pytest.approx(length_s, abs=1e-6)
    assert all(after in {p for p, _ in TRANSITION_PROBABILITIES[before]} for (before, _), (after, _) in pairwise(walk))
    assert all(PHASE_RANGE_S[0] <= seconds <= PHASE_RANGE_S[1] + 1 for _, seconds in walk[:-1])


def test_equal_seeds_give_equal_walks() -> None:
    assert draw_phase_walk(np.random.default_rng(7), length_s=150) == draw_phase_walk(
        np.random.default_rng(7), length_s=150
    )


def test_start_phases_and_lengths_follow_the_table() -> None:
    rng = np.random.default_rng(1)
    starts = [draw_phase_walk(rng, length_s=100)[0][0] for _ in range(2000)]
    lengths = [draw_episode_length(rng) for _ in range(200)]

    assert starts.count(Phase.CLEAN) / 2000 == pytest.approx(0.35, abs=0.04)
    assert min(lengths) >= 100
    assert max(lengths) <= 180
