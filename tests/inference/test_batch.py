"""Predictions of many VMs at once: the bits of each VM alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.factories.bins import build_busy_bins
from tests.inference.test_predictor import KINDS, build_predictor

from phasewatch.inference.batch import BatchPredictor
from phasewatch.inference.model_selection import find_models
from phasewatch.inference.predictor import PhasePredictor
from phasewatch.models.base import InputKind, InputVariant

EDGE = Path(__file__).parents[2] / "corpus" / "lab-v1.edge.zip"


def build_histories(n: int) -> list[np.ndarray]:
    """Build the bins of VMs of different age, some with gaps, with masked channels, or with nothing known."""
    histories = [build_busy_bins(20 + 31 * (i % 9), seed=i, gaps=(0.0, 0.05, 0.6)[i % 3]) for i in range(n)]
    for bins in histories[::4]:
        bins[:, 5:30] = np.nan
    histories[-1][:] = np.nan
    return histories


def predict_each(predictor: PhasePredictor, histories: list[np.ndarray]) -> np.ndarray:
    return np.stack([predictor.predict_newest(bins) for bins in histories])


@pytest.mark.parametrize("n", [1, 2, 7, 64, 130])
@pytest.mark.parametrize("threat", ["realistic", "portable", "proc+netflow", "proc+tap", "proc"])
def test_bundled_models_give_each_vm_the_bits_of_that_vm_alone(threat: str, n: int) -> None:
    candidate = next(c for c in find_models(EDGE) if c.threat == threat)
    predictor, histories = candidate.load_predictor(), build_histories(n)

    together = BatchPredictor(predictor).predict_newest(histories)

    assert np.array_equal(together.view(np.uint64), predict_each(predictor, histories).view(np.uint64))


@pytest.mark.parametrize(("kind", "table"), KINDS)
def test_inputs_of_every_kind_have_the_bits_of_each_vm_alone(kind: InputKind, table: InputVariant) -> None:
    predictor, histories = build_predictor(kind, table), build_histories(24)

    assert np.array_equal(BatchPredictor(predictor).predict_newest(histories), predict_each(predictor, histories))


def test_no_vm_gives_no_row() -> None:
    predictor = build_predictor(InputKind.TABLE, InputVariant.RAW)

    assert BatchPredictor(predictor).predict_newest([]).shape == (0, 5)
