"""MiniRocket with a ridge classifier over the bins.

Source: Dempster, Schmidt, Webb, "MiniRocket: a very fast (almost) deterministic transform", KDD 2021. 84 kernels of
length 9 with weights −1 and 2, dilations that fit a window of 20 bins, and the proportion of positive values above
biases that are quantiles of train. It is written in numpy because the window is short and nothing may be compiled at
prediction time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.errors import RunError
from phasewatch.metrics import N_CLASSES, confusion_counts, macro_f1
from phasewatch.models import checkpoint
from phasewatch.models.base import InputKind, LabelledExamples, PhaseModel
from phasewatch.models.checkpoint import WEIGHTS_FILE
from phasewatch.models.neural import AsinhScaler
from phasewatch.models.probabilities import mask_unseen_phases, softmax

__all__ = ["BIASES_PER_KERNEL", "DILATIONS", "KERNELS", "MiniRocket", "MiniRocketConfig"]

_KERNEL_LENGTH = 9
DILATIONS = (1, 2)  # (20 − 1) // 8 = 2 is the widest that fits
KERNELS = tuple(combinations(range(_KERNEL_LENGTH), 3))  # positions of the three weights 2; all others are −1
BIASES_PER_KERNEL = 10
_N_FEATURES = len(KERNELS) * len(DILATIONS) * BIASES_PER_KERNEL
_RIDGE_PENALTIES = tuple(float(v) for v in np.logspace(0, 5, 6))
_MAX_KERNEL_CHANNELS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniRocketConfig:
    """Settings.

    Attributes:
        bias_windows: Train windows whose quantiles are the biases.
    """

    bias_windows: int = 256


class MiniRocket(PhaseModel):
    """Proportions of positive values of 168 dilated kernels over random channels, ridge regression, then softmax."""

    key = "minirocket"
    kind: ClassVar[InputKind] = InputKind.TENSOR
    Config = MiniRocketConfig

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        scaled = self._fit_features(train)
        watched = self._standardise(self._transform(self._scale(val.inputs.x)))
        self._coef, self._intercept = np.zeros((N_CLASSES, _N_FEATURES)), np.zeros(N_CLASSES)
        best = -1.0
        scores = []
        for coef, intercept in _fit_ridge(scaled, train, _RIDGE_PENALTIES):
            decided = mask_unseen_phases(watched @ coef.T + intercept, self.seen)
            score = float(macro_f1(confusion_counts(val.y, decided.argmax(axis=1))))
            scores.append(round(score, 6))
            if score > best:
                best, self._coef, self._intercept = score, coef, intercept
        self.history = {"val_a_macro_f1": tuple(scores)}

    def _refit(self, everything: LabelledExamples) -> None:
        """Fit with the penalty that was best on validation A."""
        penalty = _RIDGE_PENALTIES[int(np.argmax(self.history["val_a_macro_f1"]))]
        scaled = self._fit_features(everything)
        ((self._coef, self._intercept),) = _fit_ridge(scaled, everything, (penalty,))

    def _fit_features(self, train: LabelledExamples) -> FloatArray:
        """Draw the channels, fit scales and biases, and return the standardised features of the windows."""
        rng = np.random.default_rng(self.seed)
        self._scaler = AsinhScaler.fit(train.inputs.x)
        self._chosen = _draw_channels(len(train.inputs.spec.names), rng)
        x = self._scale(train.inputs.x)
        sample = x[rng.choice(len(x), min(len(x), self.config.bias_windows), replace=False)]
        quantiles = (np.arange(1, _N_FEATURES + 1) * ((5**0.5 + 1) / 2)) % 1.0  # a sequence of low discrepancy
        outputs = zip(_convolve(sample, self._chosen), quantiles.reshape(-1, BIASES_PER_KERNEL), strict=True)
        self._biases = np.concatenate([np.quantile(output, q) for output, q in outputs])
        features = self._transform(x)
        self._mean = features.mean(axis=0)
        self._spread = features.std(axis=0) + 1e-8
        return self._standardise(features)

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        features = self._standardise(self._transform(self._scale(x)))
        return softmax(mask_unseen_phases(features @ self._coef.T + self._intercept, self.seen))

    def _scale(self, x: NDArray[np.float32]) -> FloatArray:
        return self._scaler.apply(x)[:, : x.shape[1]].astype(np.float64)

    def _transform(self, x: FloatArray) -> FloatArray:
        biases = self._biases.reshape(-1, BIASES_PER_KERNEL)
        parts = [(c[:, :, None] > b).mean(axis=1) for c, b in zip(_convolve(x, self._chosen), biases, strict=True)]
        return np.concatenate(parts, axis=1)

    def _standardise(self, features: FloatArray) -> FloatArray:
        scaled: FloatArray = (features - self._mean) / self._spread
        return scaled

    def _arrays(self) -> dict[str, NDArray[np.float64]]:
        return {
            "scaler.size": self._scaler.size,
            "biases": self._biases,
            "mean": self._mean,
            "spread": self._spread,
            "coef": self._coef,
            "intercept": self._intercept,
            "channels": self._chosen.astype(np.float64),
        }

    def _files(self) -> Mapping[str, bytes]:
        return {WEIGHTS_FILE: checkpoint.pack_weights(self._arrays())}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        n = len(self.spec.names) if self.spec else 0
        shapes = {
            "scaler.size": (n,),
            "biases": (_N_FEATURES,),
            "mean": (_N_FEATURES,),
            "spread": (_N_FEATURES,),
            "coef": (N_CLASSES, _N_FEATURES),
            "intercept": (N_CLASSES,),
            "channels": (_N_FEATURES // BIASES_PER_KERNEL, n),
        }
        place = f"checkpoint of {self.key}: {WEIGHTS_FILE}"
        arrays = checkpoint.unpack_weights(
            files, WEIGHTS_FILE, {name: ("F64", shape) for name, shape in shapes.items()}, model=self.key
        )
        self._scaler = AsinhScaler.from_sizes(arrays["scaler.size"], place=place)
        if not (arrays["spread"] > 0.0).all() or not np.isin(arrays["channels"], (0.0, 1.0)).all():
            raise RunError(f"{place}: a spread is not above 0, or a channel mark is not 0 or 1; train the model again")
        self._biases, self._mean, self._spread = arrays["biases"], arrays["mean"], arrays["spread"]
        self._coef, self._intercept = arrays["coef"], arrays["intercept"]
        self._chosen = arrays["channels"].astype(np.bool_)

    def _libraries(self) -> tuple[str, ...]:
        return ("numpy", "safetensors")


def _draw_channels(channels: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw the channels that each kernel and dilation sums, few more often than many: ``(168, c)`` bool."""
    chosen = np.zeros((len(KERNELS) * len(DILATIONS), channels), np.bool_)
    most = min(channels, _MAX_KERNEL_CHANNELS)
    for row in chosen:
        count = int(2.0 ** rng.uniform(0.0, np.log2(most + 1)))
        row[rng.choice(channels, min(count, channels), replace=False)] = True
    return chosen


def _convolve(x: FloatArray, chosen: NDArray[np.bool_]) -> Iterator[FloatArray]:
    """Yield the output ``(n, t)`` of each kernel and dilation; the ends are padded with zeros.

    Args:
        x: ``(n, c, t)`` float64.
        chosen: ``(168, c)`` bool: channels that each kernel and dilation sums.
    """
    at = 0
    for dilation in DILATIONS:
        reach = dilation * (_KERNEL_LENGTH // 2)
        for kernel in KERNELS:
            summed = np.pad(x[:, chosen[at]].sum(axis=1), ((0, 0), (reach, reach)))
            size = x.shape[2]
            taps = [summed[:, k * dilation : k * dilation + size] for k in range(_KERNEL_LENGTH)]
            # −1 everywhere and 2 at three places is −(sum of all) + 3 (sum of the three).
            yield 3.0 * (taps[kernel[0]] + taps[kernel[1]] + taps[kernel[2]]) - np.sum(taps, axis=0)
            at += 1


def _fit_ridge(
    features: FloatArray, examples: LabelledExamples, penalties: tuple[float, ...]
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Yield coefficients ``(5, f)`` and intercepts ``(5,)`` for each penalty, from normal equations computed once.

    The result is that of scikit-learn's `Ridge` with `sample_weight`, which computes them again for each penalty
    (measured: six penalties cost five times as much there).

    Args:
        features: ``(n, f)`` float64.
        examples: The windows, whose labels and weights are used.
        penalties: Ridge penalties.
    """
    y, weight = examples.y, examples.compute_weights()
    share = weight / weight.sum()
    targets = np.where(np.eye(N_CLASSES)[y] > 0, 1.0, -1.0)
    middle, level = share @ features, share @ targets
    centred = features - middle
    weighed = centred * weight[:, None]
    gram, right = weighed.T @ centred, weighed.T @ (targets - level)
    diagonal = gram.diagonal().copy()
    for penalty in penalties:
        np.fill_diagonal(gram, diagonal + penalty)
        # In C order, as a restored checkpoint has them: another memory order changes the order of the sums.
        coef = np.ascontiguousarray(np.linalg.solve(gram, right).T)
        yield coef, level - coef @ middle
