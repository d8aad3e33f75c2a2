"""Heavy-tailed channels to numbers that a net can learn from: fitted on train alone, missing values marked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phasewatch.errors import RunError

LIMIT = 10.0  # of a scaled value: a rate a thousand times its usual size still has a place

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Scaler:
    """``asinh(x / size)``, a logarithm that has room for zero and for falls, with the median absolute size of train.

    Attributes:
        size: ``(f,)`` float64 per column or channel; 1 where train has no value other than 0.
    """

    size: NDArray[np.float64]

    @classmethod
    def fit(cls, x: Floats) -> Scaler:
        """Learn the sizes from train.

        Args:
            x: ``(n, f)`` or ``(n, c, t)`` float32; NaN is missing.
        """
        columns = np.moveaxis(np.abs(x.astype(np.float64)), 1, 0).reshape(x.shape[1], -1)
        size = np.ones(len(columns))
        for i, column in enumerate(columns):
            told = column[np.isfinite(column) & (column > 0)]
            if len(told):
                size[i] = np.median(told)
        return cls(size)

    @classmethod
    def of(cls, size: NDArray[np.float64], *, place: str) -> Scaler:
        """Return the scaler of a checkpoint.

        Raises:
            RunError: If a size is not above 0 or not finite.
        """
        if not (np.isfinite(size) & (size > 0.0)).all():
            raise RunError(f"{place}: a scale is not a finite number above 0; train the model again")
        return cls(size)

    def apply(self, x: Floats) -> Floats:
        """Scale, clip, put 0 for what is missing, and append where it was: ``(n, f, …)`` → ``(n, 2f, …)`` float32."""
        size = self.size.reshape(-1, *([1] * (x.ndim - 2)))
        missing = ~np.isfinite(x)
        scaled = np.arcsinh(np.where(missing, 0.0, x.astype(np.float64)) / size).clip(-LIMIT, LIMIT)
        return np.concatenate([scaled.astype(np.float32), missing.astype(np.float32)], axis=1)
