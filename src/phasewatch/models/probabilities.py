"""Probabilities of the five phases: checks of a model's output, temperature, softmax and class weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.errors import RunError
from phasewatch.metrics import N_CLASSES, apply_temperature, log_loss
from phasewatch.models.checkpoint import MAX_MAGNITUDE

__all__ = [
    "check_probabilities",
    "compute_class_weights",
    "fit_temperature",
    "mask_unseen_phases",
    "softmax",
]

TEMPERATURE_BOUNDS = (0.25, 4.0)  # without bounds, a few hundred windows that are all right ask for certainty


def check_probabilities(answers: Any, n: int, *, where: str) -> FloatArray:
    """Check the output of a model.

    Args:
        answers: What the model returned.
        n: Number of windows that it was given.
        where: Name of the model, for the message.

    Returns:
        ``(n, 5)`` float64, each value between 0 and `MAX_MAGNITUDE`; rows need not sum to 1.

    Raises:
        RunError: If the output is anything else.
    """
    try:
        shares: FloatArray = np.asarray(answers, np.float64)
    except (TypeError, ValueError) as exc:
        raise RunError(f"{where}: its answers are no numbers: {exc}") from exc
    if shares.shape != (n, N_CLASSES):
        raise RunError(f"{where}: answers of shape {shares.shape} for {n} windows, expected ({n}, {N_CLASSES})")
    bad = ~((shares >= 0.0) & (shares <= MAX_MAGNITUDE)).all(axis=1)  # NaN is neither
    if bad.any():
        at = int(np.argmax(bad))
        raise RunError(
            f"{where}: window {at} of {n}: answers {', '.join(f'{v:g}' for v in shares[at])}, expected probabilities: "
            "finite and not below 0"
        )
    return shares


def fit_temperature(probabilities: FloatArray, y: NDArray[np.int64]) -> float:
    """Estimate the temperature of the smallest log loss by a bounded search over its logarithm.

    Args:
        probabilities: ``(n, 5)`` float64; rows sum to 1.
        y: ``(n,)`` int64 phase codes.

    Returns:
        A temperature in `TEMPERATURE_BOUNDS`; 1 without windows, or where no other value has a smaller loss.

    Source: Guo et al. 2017, section 4.2; Brent's bounded method in `scipy.optimize.minimize_scalar`.
    """
    if not len(y):
        return 1.0
    from scipy.optimize import minimize_scalar  # of the train extra: a loaded model needs no scipy

    def loss(log_t: float) -> float:
        return log_loss(apply_temperature(probabilities, float(np.exp(log_t))), y)

    low, high = TEMPERATURE_BOUNDS
    search = minimize_scalar(loss, bounds=(np.log(low), np.log(high)), method="bounded", options={"xatol": 1e-8})
    # A flat or multimodal loss (all windows of one class) can end at a worse value than 1.
    return float(np.exp(search.x)) if loss(float(search.x)) < loss(0.0) else 1.0


def mask_unseen_phases(scores: FloatArray, seen: tuple[int, ...]) -> FloatArray:
    """Return a copy of the scores with −inf for the phases that train did not have.

    Args:
        scores: ``(n, 5)`` float64.
        seen: Codes of the phases in train.
    """
    masked = np.full_like(scores, -np.inf)
    masked[:, list(seen)] = scores[:, list(seen)]
    return masked


def softmax(scores: FloatArray) -> FloatArray:
    """Return the softmax of each row, ``(n, 5)`` float64 → ``(n, 5)`` float64; −inf gives 0."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares: FloatArray = powers / powers.sum(axis=1, keepdims=True)
    return shares


def compute_class_weights(y: NDArray[np.int64]) -> FloatArray:
    """Compute weights that give each class in `y` the same total weight.

    Args:
        y: ``(n,)`` int64 phase codes.

    Returns:
        ``(5,)`` float64 as scikit-learn's ``class_weight="balanced"``; 0 for a class that does not occur.
    """
    counts = np.bincount(y, minlength=N_CLASSES).astype(np.float64)
    present = counts > 0
    weights: FloatArray = np.divide(len(y), counts * present.sum(), out=np.zeros(N_CLASSES), where=present)
    return weights
