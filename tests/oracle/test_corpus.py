"""Real recordings give the same bits in the fast and in the slow reading of the contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.oracle.test_bins import assert_same

from phasewatch.bundle.archive import unpack_bundle

CORPUS = Path(__file__).parents[2] / "corpus" / "lab-v1"
BUNDLES = sorted(CORPUS.glob("*/*.tar.zst"))
A_FEW = BUNDLES[:: max(1, len(BUNDLES) // 3)][:3]
SOME_CHANNELS = slice(0, None, 5)  # stats of every fifth channel; bins of all


def test_the_corpus_is_here() -> None:
    assert len(BUNDLES) >= 30


@pytest.mark.parametrize("path", A_FEW, ids=lambda path: path.name[:36])
def test_a_recorded_episode_has_the_same_bits(path: Path) -> None:
    assert_same(unpack_bundle(path.read_bytes(), file=path.name), channels=SOME_CHANNELS)


@pytest.mark.soak
def test_every_recorded_episode_has_the_same_bits(soak_row: Callable[..., None]) -> None:
    same = 0
    for path in BUNDLES:
        assert_same(unpack_bundle(path.read_bytes(), file=path.name))
        same += 1
    soak_row("Slow oracle over the recordings", episodes=len(BUNDLES), other_bits=len(BUNDLES) - same)
