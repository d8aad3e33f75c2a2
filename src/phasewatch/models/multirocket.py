"""MultiRocket of the aeon library, and ridge regression on its features; an optional model without a checkpoint.

Source: Tan, Dempster, Bergmeir, Webb, "MultiRocket: multiple pooling operators and transformations for fast and
effective time series classification", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from phasewatch.arrays import FloatArray
from phasewatch.errors import UsageError
from phasewatch.models.adapters import CollectionAdapter
from phasewatch.models.probabilities import softmax

__all__ = ["MultiRocket", "MultiRocketConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiRocketConfig:
    """Settings.

    Attributes:
        kernels: Kernels; each gives four features of the series and four of its differences.
        penalty: Ridge penalty.
    """

    kernels: Annotated[int, Meta(ge=84, le=50_000)] = 1_000
    penalty: Annotated[float, Meta(gt=0.0, le=1e9)] = 1_000.0


class MultiRocket(CollectionAdapter):
    """MultiRocket features, standardised, and a ridge classifier whose scores become shares by softmax."""

    key = "multirocket"
    Config = MultiRocketConfig

    def make(self, seed: int) -> Any:
        """Return the pipeline.

        Raises:
            UsageError: If aeon is not installed.
        """
        try:
            from aeon.transformations.collection.convolution_based import MultiRocket as Transform
        except ImportError as exc:
            raise UsageError(
                f"model multirocket needs the aeon library ({exc}); install it: pip install 'phasewatch[rocket]'"
            ) from exc
        transform = Transform(n_kernels=self.config.kernels, n_jobs=1, random_state=seed)
        return _RocketPipeline(transform, self.config.penalty)


class _RocketPipeline:
    """A classifier with `fit`, `classes_` and `predict_proba`."""

    def __init__(self, transform: Any, penalty: float) -> None:
        from sklearn.linear_model import RidgeClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self._transform = transform
        self._ridge = make_pipeline(StandardScaler(), RidgeClassifier(alpha=penalty, class_weight="balanced"))

    def fit(self, x: FloatArray, y: Any) -> None:
        self._ridge.fit(np.asarray(self._transform.fit_transform(x)), y)
        self.classes_ = self._ridge.classes_

    def predict_proba(self, x: FloatArray) -> FloatArray:
        scores = self._ridge.decision_function(np.asarray(self._transform.transform(x)))
        return softmax(scores if scores.ndim == 2 else np.column_stack([-scores, scores]))
