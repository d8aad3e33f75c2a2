"""Predict the newest windows of many VMs in one call, with the bits that `PhasePredictor` gives for each alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array
from phasewatch.features.inputs import compute_newest_inputs
from phasewatch.inference.predictor import PhasePredictor
from phasewatch.models.base import ModelInputs

__all__ = ["BatchPredictor"]

# Each window of a tree model is a sum over trees in a fixed order. Matrix products of other models have other bits for
# one row than for several, so their windows are run one by one.
_BATCHED_MODELS = frozenset({"gbt"})


class BatchPredictor:
    """Predicts windows of several VMs with one model.

    Args:
        predictor: The model; its baseline is that of every VM.
    """

    def __init__(self, predictor: PhasePredictor) -> None:
        self._predictor = predictor

    def predict_newest(self, histories: Sequence[Float32Array]) -> NDArray[np.float64]:
        """Predict the calibrated probabilities of the window that ends with the last bin of each history.

        Args:
            histories: As the argument of `PhasePredictor.predict_newest`, one for each VM.

        Returns:
            ``(n, 5)`` float64 in the order of PHASES.
        """
        own = self._predictor
        x = compute_newest_inputs(histories, own.spec, scaling=own.scaling)
        if own.model in _BATCHED_MODELS:
            return own.estimator.predict_proba(ModelInputs(x=x, spec=own.spec))
        rows = [own.estimator.predict_proba(ModelInputs(x=row[None], spec=own.spec)) for row in x]
        return np.concatenate(rows) if rows else np.empty((0, 5))
