"""Adapters for scikit-learn classifiers of tables ``(n, f)`` and aeon classifiers of collections ``(n, c, t)``.

A model's author writes a class with a key and one method::

    class Forest(TableAdapter):
        key = "forest"

        def make(self, seed):
            return RandomForestClassifier(500, class_weight="balanced", random_state=seed)

and trains it with ``phasewatch train RUN --add-model my_module:Forest``, or registers it in the entry points
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

__all__ = ["SMALLEST_SHARE", "AdapterConfig", "CollectionAdapter", "TableAdapter"]

SMALLEST_SHARE = 1e-6  # is added to the share of each phase in train


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """No settings; an author's class may define its own dataclass."""


class _AdapterBase(PhaseModel):
    """The common part: fill missing values with train's medians, and map the classifier's classes to phases.

    The classifier gets labels 0 to k - 1 for the k phases in train, because many classifiers refuse a gap. These are
    the phase codes if train has every phase. Its `classes_` may also be the names of phases.

    Attributes:
        imputes: Whether missing values are filled; False for a classifier that accepts NaN.
    """

    Config: ClassVar[type] = AdapterConfig
    persist: ClassVar[Persistence] = "none"
    imputes: ClassVar[bool] = True

    @abstractmethod
    def make(self, seed: int) -> Any:
        """Return an unfitted classifier with ``fit(X, y)``, ``classes_``, and ``predict_proba(X)`` or ``predict(X)``.

        Args:
            seed: Random seed of the experiment.
        """

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        x = train.inputs.x
        columns = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
        known = np.isfinite(columns)
        fill = [np.median(c[k]) if k.any() else 0.0 for c, k in zip(columns, known, strict=True)]
        self._fill = np.array(fill, np.float32).astype(np.float64)  # as an exported graph has it
        self._classifier = self.make(self.seed)
        self._classifier.fit(self._impute(x), np.searchsorted(self.seen, train.y))

    @property
    def classifier(self) -> Any:
        """The fitted classifier; `phasewatch export` converts it."""
        return self._classifier

    @property
    def fill(self) -> FloatArray | None:
        """``(f,)`` or ``(c,)`` values that stand in for missing ones; None if the classifier accepts NaN."""
        return self._fill if self.imputes else None

    def list_class_codes(self) -> tuple[int, ...]:
        """Return the phase code of each column of the classifier's probabilities; -1 for one that is ignored."""
        return tuple(self._map_classes(getattr(self._classifier, "classes_", range(len(self.seen)))).tolist())

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        probabilities = np.zeros((len(x), N_CLASSES))
        if hasattr(self._classifier, "predict_proba"):
            answers = np.asarray(self._classifier.predict_proba(self._impute(x)), np.float64)
            codes = self._map_classes(getattr(self._classifier, "classes_", range(len(self.seen))))
            if answers.shape != (len(x), len(codes)):
                raise ModelError(
                    f"model {self.key}: predict_proba returned shape {answers.shape} for {len(x)} windows and "
                    f"{len(codes)} classes, expected ({len(x)}, {len(codes)})"
                )
            probabilities[:, codes[codes >= 0]] = answers[:, codes >= 0]
        else:
            codes = self._map_classes(self._classifier.predict(self._impute(x)))
            if codes.shape != (len(x),):
                raise ModelError(
                    f"model {self.key}: predict returned shape {codes.shape} for {len(x)} windows, expected ({len(x)},)"
                )
            if (codes < 0).any():
                raise ModelError(f"model {self.key}: predict returned a class that train does not have")
            probabilities[np.arange(len(x)), codes] = 1.0
        if len(x) and not (np.isfinite(probabilities).all() and (probabilities >= 0).all()):
            raise ModelError(f"model {self.key}: the classifier returned probabilities below 0 or not finite")
        # A probability of exactly 0 would make the log loss of one error unbounded.
        return probabilities + SMALLEST_SHARE * np.isin(np.arange(N_CLASSES), self.seen)

    def _map_classes(self, classes: Any) -> NDArray[np.intp]:
        """Return the phase code of each class, with its shape; -1 for a class that train does not have.

        Raises:
            ModelError: If a class is neither a label that `fit` was given nor the name of a phase.
        """
        given = np.asarray(classes)
        names = {str(phase): phase.code for phase in PHASES}
        if given.dtype.kind in "USO" and all(str(c) in names for c in given.ravel()):
            return np.array([names[str(c)] for c in given.ravel()], np.intp).reshape(given.shape)
        try:
            labels = given.astype(np.intp)
            is_label = bool((labels == given).all())
        except (TypeError, ValueError):
            is_label = False
        if not is_label or (given.size and not 0 <= labels.min() <= labels.max() < N_CLASSES):
            raise ModelError(
                f"model {self.key}: its classes are {', '.join(map(str, given.ravel()[:6]))}, expected the labels that "
                f"fit was given (0 to {len(self.seen) - 1}) or names of phases ({', '.join(PHASES)})"
            )
        label_codes = np.full(N_CLASSES, -1, np.intp)
        label_codes[: len(self.seen)] = self.seen
        codes: NDArray[np.intp] = label_codes[labels]
        return codes

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
        raise RunError(f"model {self.key} stores no weights: it is scored by the process that fitted it")


class TableAdapter(_AdapterBase):
    """A scikit-learn classifier over the five stats of each channel, ``(n, f)`` float64."""

    kind = InputKind.TABLE


class CollectionAdapter(_AdapterBase):
    """An aeon classifier over the window's bins, ``(n, c, 20)`` float64."""

    kind = InputKind.TENSOR
