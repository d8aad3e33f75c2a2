"""The fast binner and the plain reading of the contract agree to the last bit, on whatever episode hypothesis can
think of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from tests.factories.bundles import episode
from tests.oracle import slow
from tests.oracle.episodes import episodes

from phasewatch.binning.align import bin_episode
from phasewatch.bundle.model import Episode
from phasewatch.channels import CHANNELS
from phasewatch.features.fingerprint import build_golden_episodes
from phasewatch.features.stats import episode_stats, window_stats
from phasewatch.features.windows import (
    build_label_spans,
    combine_window_flags,
    compute_window_starts,
    label_windows,
    n_windows,
)


def assert_same(whole: Episode, *, channels: slice = slice(None)) -> None:
    """Compare everything that section 4 defines, as bits."""
    fast, plain = bin_episode(whole), slow.grid(whole)
    n = len(fast.bins)

    assert n == len(plain.bins)
    assert [f.code for f in fast.findings] == plain.codes
    assert fast.bins.view(np.uint32).tolist() == plain.bins
    assert fast.levels.view(np.uint32).tolist() == plain.levels

    w = n_windows(n)
    labels = label_windows(build_label_spans(whole.marks), compute_window_starts(whole.t0_ns, w))
    truth = [slow.label(whole, j) for j in range(w)]

    assert w == slow.n_windows(n)
    assert labels.phase.tolist() == [phase for phase, _, _ in truth]
    assert labels.purity.view(np.uint32).tolist() == [purity for _, purity, _ in truth]
    assert combine_window_flags(fast.flags, labels.is_mixed).tolist() == [slow.flags(whole, plain, j) for j in range(w)]

    every = range(len(plain.bins[0]))[channels]
    stats = window_stats(fast.bins).view(np.uint32)

    assert stats.shape == (w, len(CHANNELS), 5)
    for j in range(w):
        rows = plain.bins[10 * j : 10 * j + 20]
        assert stats[j, channels].tolist() == [slow.stats([row[c] for row in rows]) for c in every]
    whole_stats = episode_stats(fast.bins).view(np.uint32)

    assert whole_stats[channels].tolist() == [slow.stats([row[c] for row in plain.bins]) for c in every]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(whole=episodes())
def test_any_episode_has_the_same_bits_in_both_readings_of_the_contract(whole: Episode) -> None:
    assert_same(whole)


@pytest.mark.parametrize("name", [name for name, _ in build_golden_episodes()])
def test_a_golden_episode_has_the_same_bits(name: str) -> None:
    assert_same(dict(build_golden_episodes())[name])


def test_an_ordinary_episode_has_the_same_bits() -> None:
    assert_same(episode([("clean", 20), ("infecting", 13), ("active", 22)]))
