"""A model that learnt from permuted labels accuses a run only if it beats chance again with another permutation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phasewatch.audit.checks import CheckOutcome
from phasewatch.audit.models import PermutationPredictions, check_permuted_labels

SESSIONS, WINDOWS = 60, 20
HOSTS = [f"h{s % 3}" for s in range(SESSIONS) for _ in range(WINDOWS)]
NAMES = [f"s{s}" for s in range(SESSIONS) for _ in range(WINDOWS)]


@pytest.mark.parametrize(
    ("knows", "fate", "asked"),
    [
        pytest.param((0.0, 0.0), CheckOutcome.KEPT, 1, id="chance at once"),
        pytest.param((0.3, 0.0), CheckOutcome.KEPT, 2, id="one lucky permutation"),
        pytest.param((0.3, 0.3), CheckOutcome.BROKEN, 2, id="a leak shows in both"),
    ],
)
def test_it_takes_two_permutations_to_accuse(
    knows: tuple[float, float], fate: CheckOutcome, asked: int, tmp_path: Path
) -> None:
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "held_out_host-h0.json").write_text("{}")
    shares = list(knows)

    def answers(run: Path, rng: np.random.Generator) -> PermutationPredictions:
        truth = rng.integers(0, 5, len(HOSTS))
        said = np.where(rng.random(len(truth)) < shares.pop(0), truth, rng.integers(0, 5, len(truth)))
        return truth, said, np.full((len(truth), 5), 0.2), HOSTS, NAMES

    check = check_permuted_labels(tmp_path, answers=answers)

    assert check.fate is fate, check.words
    assert len(shares) == 2 - asked
