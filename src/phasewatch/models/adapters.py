"""Bring your own: a scikit-learn classifier of tables, or an aeon-style one of collections ``(n, c, t)``.

An author writes a class with a key and one method::

    class Forest(TableAdapter):
        key = "forest"

        def make(self, seed):
            return RandomForestClassifier(500, class_weight="balanced", random_state=seed)

and trains it by ``phasewatch train RUN --add-model my_module:Forest``, or names it in the entry points
``phasewatch.models`` of a package.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.errors import ModelError, RunError
from phasewatch.metrics import N_CLASSES
from phasewatch.models.base import InputKind, LabelledExamples, Persistence, PhaseModel
from phasewatch.types import PHASES


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What can be set is up to the author's class."""


class _AdapterBase(PhaseModel):
    """What both share: train's medians for what is missing, the classifier's classes mapped to phases.

    The classifier is given labels 0 to k - 1 of the k phases that train has, because many refuse a gap; they are the
    phase codes where no phase lacks. Its `classes_` may also be the names of phases.

    Attributes:
        imputes: Fill missing values; False for a classifier that takes NaN as it comes.
    """

    Config: ClassVar[type] = AdapterConfig
    persist: ClassVar[Persistence] = "none"
    imputes: ClassVar[bool] = True

    @abstractmethod
    def make(self, seed: int) -> Any:
        """Give a classifier that is not fitted: ``fit(X, y)``, ``predict_proba(X)`` or ``predict(X)``, ``classes_``."""

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        x = train.inputs.x
        columns = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
        known = np.isfinite(columns)
        self._fill = np.array([np.median(c[k]) if k.any() else 0.0 for c, k in zip(columns, known, strict=True)])
        self._classifier = self.make(self.seed)
        self._classifier.fit(self._impute(x), np.searchsorted(self.seen, train.y))

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        told = np.zeros((len(x), N_CLASSES))
        if hasattr(self._classifier, "predict_proba"):
            answers = np.asarray(self._classifier.predict_proba(self._impute(x)), np.float64)
            codes = self._map_classes(getattr(self._classifier, "classes_", range(len(self.seen))))
            if answers.shape != (len(x), len(codes)):
                raise ModelError(
                    f"model {self.key}: predict_proba gives shape {answers.shape} for {len(x)} windows and "
                    f"{len(codes)} classes, expected ({len(x)}, {len(codes)})"
                )
            told[:, codes[codes >= 0]] = answers[:, codes >= 0]
        else:
            codes = self._map_classes(self._classifier.predict(self._impute(x)))
            if codes.shape != (len(x),):
                raise ModelError(f"model {self.key}: predict gives shape {codes.shape} for {len(x)} windows")
            if (codes < 0).any():
                raise ModelError(f"model {self.key}: predict gives a class that train does not have")
            told[np.arange(len(x)), codes] = 1.0
        if told.shape[0] and not (np.isfinite(told).all() and (told >= 0).all()):
            raise ModelError(f"model {self.key}: its classifier gives probabilities below 0 or not finite")
        # A classifier that is sure of everything would make the log loss of one mistake unbounded.
        return told + 1e-6 * np.isin(np.arange(N_CLASSES), self.seen)

    def _map_classes(self, classes: Any) -> NDArray[np.intp]:
        """Return the phase code of each class, -1 for a class that train does not have.

        Raises:
            ModelError: If a class is neither a label that it was given nor the name of a phase.
        """
        found = np.asarray(classes)
        names = {str(phase): phase.code for phase in PHASES}
        if found.dtype.kind in "USO" and all(str(c) in names for c in found.ravel()):
            return np.array([names[str(c)] for c in found.ravel()], np.intp).reshape(found.shape)
        try:
            labels = found.astype(np.intp)
            is_label = bool((labels == found).all())
        except (TypeError, ValueError):
            is_label = False
        if not is_label or (found.size and not 0 <= labels.min() <= labels.max() < N_CLASSES):
            raise ModelError(
                f"model {self.key}: its classes are {', '.join(map(str, found.ravel()[:6]))}, expected the labels that "
                f"fit was given (0 to {len(self.seen) - 1}) or names of phases ({', '.join(PHASES)})"
            )
        codes = np.full(N_CLASSES, -1, np.intp)
        codes[: len(self.seen)] = self.seen
        of: NDArray[np.intp] = codes[labels]
        return of

    def _impute(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        values = x.astype(np.float64)
        if not self.imputes:
            return values
        fill = self._fill.reshape(-1, *([1] * (x.ndim - 2)))
        filled: FloatArray = np.where(np.isfinite(values), values, fill)
        return filled

    def _files(self) -> Mapping[str, bytes]:
        return {}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        raise RunError(f"model {self.key} keeps no weights: it is scored by the process that fitted it")


class TableAdapter(_AdapterBase):
    """A scikit-learn classifier over the five stats of each channel, ``(n, f)``."""

    kind = InputKind.TABLE


class CollectionAdapter(_AdapterBase):
    """A classifier of collections in aeon's form over the window's bins, ``(n, c, t)``."""

    kind = InputKind.TENSOR
