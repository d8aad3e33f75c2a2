"""Confusion matrix, F1, macro-F1, calibration error, Brier score and log loss, as pure array functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from phasewatch.arrays import FloatArray
from phasewatch.types import PHASES, Phase

__all__ = [
    "ECE_BINS",
    "EQUAL_MASS_BINS",
    "N_CLASSES",
    "STATES",
    "STATE_BY_PHASE",
    "apply_temperature",
    "brier_score",
    "brier_terms",
    "calibration_gap_terms",
    "classes_present",
    "compute_f1_from_terms",
    "compute_pooled_macro_f1",
    "confusion_counts",
    "debiased_rms",
    "ece",
    "ece_bin",
    "ece_terms",
    "equal_mass_bin",
    "f1_per_class",
    "f1_terms",
    "list_states_of_classes",
    "log_loss",
    "macro_f1",
    "merge_into_three_states",
]

N_CLASSES = len(PHASES)
ECE_BINS = 15
EQUAL_MASS_BINS = 10  # of equal numbers of windows, for the debiased calibration error
STATES = ("quiet", "infecting", "active")
STATE_BY_PHASE = tuple({Phase.INFECTING: 1, Phase.ACTIVE: 2}.get(p, 0) for p in PHASES)
# Smaller probabilities count as this in a log loss: a class without training data gives a finite loss.
_MIN_LOG_LOSS_PROBABILITY = 1e-15


def confusion_counts(
    y_true: NDArray[np.integer], y_pred: NDArray[np.integer], *, k: int = N_CLASSES
) -> NDArray[np.int64]:
    """Count windows by truth (rows) and decision (columns).

    Args:
        y_true: ``(n,)`` true phase codes.
        y_pred: ``(n,)`` decided phase codes.
        k: Number of classes.

    Returns:
        ``(k, k)`` int64.

    Raises:
        ValueError: If a label is not in 0..k−1; the caller removes windows of unknown phase.
    """
    truth, decided = np.asarray(y_true, np.int64), np.asarray(y_pred, np.int64)
    for what, labels in (("truth", truth), ("decision", decided)):
        if labels.size and (labels.min() < 0 or labels.max() >= k):
            raise ValueError(f"{what} has labels {labels.min()}..{labels.max()}, expected 0..{k - 1}")
    return np.bincount(truth * k + decided, minlength=k * k).reshape(k, k)


def f1_per_class(confusion: ArrayLike) -> NDArray[np.float64]:
    """Compute F1 of each class, ``(..., k, k)`` → ``(..., k)``; 0 where a class is neither true nor decided."""
    terms = f1_terms(confusion)
    k = terms.shape[-1] // 2
    return compute_f1_from_terms(terms[..., :k], terms[..., k:])


def f1_terms(confusion: ArrayLike) -> NDArray[np.float64]:
    """Compute the sums that F1 is a ratio of, ``(..., k, k)`` → ``(..., 2k)``.

    They are twice the hits of each class, then its true plus its decided windows. Both are sums over windows, so
    resampling them costs less than resampling confusion matrices.
    """
    c = np.asarray(confusion, np.float64)
    k = c.shape[-1]
    # Sums over axes of length 5 take numpy 10 times as long as one product with a 0/1 matrix (10,000 resamples).
    flat = c.reshape(*c.shape[:-2], k * k)
    truth, decided = np.divmod(np.arange(k * k), k)
    classes = np.arange(k)
    is_true, is_decided = truth[:, None] == classes, decided[:, None] == classes
    hit, either = 2.0 * (is_true & is_decided), is_true.astype(np.float64) + is_decided
    terms: FloatArray = flat @ np.concatenate([hit, either], axis=1)
    return terms


def compute_f1_from_terms(hits: NDArray[np.float64], either: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute F1 of each class from the two halves of `f1_terms`, ``(..., k)`` each."""
    # A class without a window has 0 above and 0 below: a tiny number below gives 0 and changes no other value.
    f1: FloatArray = hits / np.maximum(either, np.finfo(np.float64).tiny)
    return f1


def classes_present(confusion: ArrayLike) -> tuple[int, ...]:
    """Return the classes with at least one true window in a ``(k, k)`` matrix: K, over which macro-F1 is the mean."""
    return tuple(int(i) for i in np.flatnonzero(np.asarray(confusion).sum(axis=-1) > 0))


def macro_f1(confusion: ArrayLike, classes: Sequence[int] | None = None) -> NDArray[np.float64]:
    """Compute the mean F1 over the classes K, ``(..., k, k)`` → ``(...)``.

    A decision outside K is an error of the true class. Equals scikit-learn's `f1_score` with
    ``average="macro", labels=K, zero_division=0``.

    Args:
        confusion: Counts, or weighted counts of resamples.
        classes: K; None takes those present, which is only defined for one matrix.

    Raises:
        ValueError: If K is empty.
    """
    chosen = classes_present(confusion) if classes is None else tuple(classes)
    if not chosen:
        raise ValueError("macro-F1 needs a class with at least one true window")
    mean: NDArray[np.float64] = f1_per_class(confusion)[..., list(chosen)].mean(axis=-1)
    return mean


def compute_pooled_macro_f1(parts: Iterable[tuple[NDArray[np.integer], NDArray[np.integer]]]) -> float:
    """Compute macro-F1 over the windows of several folds together, as test scores are.

    Args:
        parts: True and decided phase codes of each fold, ``(n,)`` each.
    """
    confusion = sum((confusion_counts(y_true, y_pred) for y_true, y_pred in parts), np.zeros((N_CLASSES,) * 2))
    return float(macro_f1(confusion))


def merge_into_three_states(confusion: ArrayLike) -> NDArray[np.float64]:
    """Merge phases into quiet, infecting and active, in truth and decision, ``(..., 5, 5)`` → ``(..., 3, 3)``."""
    c = np.asarray(confusion, np.float64)
    states = len(STATES)
    fold = np.zeros((N_CLASSES, N_CLASSES, states, states))
    for truth, decided in np.ndindex(N_CLASSES, N_CLASSES):
        fold[truth, decided, STATE_BY_PHASE[truth], STATE_BY_PHASE[decided]] = 1.0
    flat = c.reshape(*c.shape[:-2], N_CLASSES**2) @ fold.reshape(N_CLASSES**2, states**2)
    folded: FloatArray = flat.reshape(*c.shape[:-2], states, states)
    return folded


def list_states_of_classes(classes: Sequence[int]) -> tuple[int, ...]:
    """Return the states that the classes K belong to, sorted."""
    return tuple(sorted({STATE_BY_PHASE[c] for c in classes}))


def ece_bin(probabilities: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return the bin of each window's highest probability, ``(n, k)`` → ``(n,)``: 15 equal bins, closed above."""
    top = np.asarray(probabilities, np.float64).max(axis=1)
    bins: NDArray[np.int64] = np.clip(np.ceil(top * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    return bins


def ece_terms(probabilities: NDArray[np.floating], y_true: NDArray[np.integer]) -> NDArray[np.float64]:
    """Compute each window's term of the calibration error, ``(n, 15)``: confidence − correct, in its bin's column.

    The error of a set of windows is the sum of its absolute column sums over the number of windows, so it can be
    resampled by weights.

    Args:
        probabilities: ``(n, k)``.
        y_true: ``(n,)`` true phase codes.
    """
    return calibration_gap_terms(probabilities, y_true, ece_bin(probabilities), ECE_BINS)


def ece(probabilities: NDArray[np.floating], y_true: NDArray[np.integer]) -> float:
    """Compute the expected calibration error of the decided class, from ``(n, k)`` and ``(n,)``.

    Source: Guo et al. 2017, equation 3.
    """
    return float(np.abs(ece_terms(probabilities, y_true).sum(axis=0)).sum() / len(y_true))


def equal_mass_bin(probabilities: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return each window's bin of confidence, ``(n,)`` in 0..9: bins that hold about as many windows each.

    Args:
        probabilities: ``(n, k)``; windows of equal confidence share a bin, so bins differ where many are equal.
    """
    top = np.asarray(probabilities, np.float64).max(axis=1)
    edges = (
        np.quantile(top, np.arange(1, EQUAL_MASS_BINS) / EQUAL_MASS_BINS, method="inverted_cdf")
        if len(top)
        else np.zeros(0)
    )
    bins: NDArray[np.int64] = np.searchsorted(edges, top, side="left")
    return bins


def calibration_gap_terms(
    probabilities: NDArray[np.floating], y_true: NDArray[np.integer], bins: NDArray[np.integer], n_bins: int
) -> NDArray[np.float64]:
    """Compute each window's confidence − correct, ``(n, n_bins)``, in its bin's column and 0 elsewhere.

    Args:
        probabilities: ``(n, k)``.
        y_true: ``(n,)`` true phase codes.
        bins: ``(n,)`` bin of each window.
        n_bins: Number of bins.
    """
    p = np.asarray(probabilities, np.float64)
    terms = np.zeros((len(p), n_bins))
    terms[np.arange(len(p)), bins] = p.max(axis=1) - (p.argmax(axis=1) == np.asarray(y_true))
    return terms


def debiased_rms(squared: float, resampled: NDArray[np.floating]) -> float:
    """Return the root of a squared calibration error minus its own bias, at least 0.

    The squared gap of a few windows exceeds 0 by chance, by the variance of the gap. Resampling adds that variance once
    more, so the mean over resamples estimates it.

    Args:
        squared: The squared error of the windows as they are.
        resampled: ``(B,)`` the squared error of each resample.

    Source: Kumar, Liang and Ma 2019, section 5, and Bröcker 2012; the variance comes from whole sessions, not windows.
    """
    return float(np.sqrt(max(0.0, 2.0 * squared - float(np.mean(resampled)))))


def brier_terms(probabilities: NDArray[np.floating], y_true: NDArray[np.integer]) -> NDArray[np.float64]:
    """Compute each window's squared distance to the truth, 0 to 2, from ``(n, k)`` and ``(n,)`` → ``(n,)``."""
    p = np.asarray(probabilities, np.float64)
    squared: NDArray[np.float64] = ((p - np.eye(p.shape[1])[np.asarray(y_true, np.int64)]) ** 2).sum(axis=1)
    return squared


def brier_score(probabilities: NDArray[np.floating], y_true: NDArray[np.integer]) -> float:
    """Compute the Brier score summed over classes (0 best, 2 worst), from ``(n, k)`` and ``(n,)``.

    Source: Brier 1950, equation 2.
    """
    return float(brier_terms(probabilities, y_true).mean())


def log_loss(probabilities: NDArray[np.floating], y_true: NDArray[np.integer]) -> float:
    """Compute the mean negative log probability of the truth in nats, from ``(n, k)`` and ``(n,)``.

    Probabilities below `_MIN_LOG_LOSS_PROBABILITY` count as it.
    """
    p = np.asarray(probabilities, np.float64)
    of_truth = p[np.arange(len(p)), np.asarray(y_true, np.int64)]
    return float(-np.log(np.maximum(of_truth, _MIN_LOG_LOSS_PROBABILITY)).mean())


def apply_temperature(probabilities: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """Soften (T > 1) or sharpen (T < 1) probabilities ``(n, k)``: p^(1/T), normalised to 1 per row.

    Zeros stay zero, and the order of classes does not change.
    """
    p = np.asarray(probabilities, np.float64)
    if temperature == 1.0 or not len(p):
        return p
    with np.errstate(divide="ignore"):  # log 0 = −inf is meant: exp gives the zero back
        scaled = np.log(p) / temperature
    raised = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    normalised: NDArray[np.float64] = raised / raised.sum(axis=1, keepdims=True)
    return normalised
