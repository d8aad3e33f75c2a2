"""Baselines that know one thing: class frequencies, elapsed time, host, whether a load runs, or for how long."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import FloatArray
from phasewatch.errors import RunError
from phasewatch.metrics import N_CLASSES, confusion_counts, macro_f1
from phasewatch.models.base import InputKind, LabelledExamples, PhaseModel
from phasewatch.types import STRIDE_S

__all__ = [
    "BASELINE_FILE",
    "LOAD_UNKNOWN",
    "MAX_TABLE_ROWS",
    "DurationBaseline",
    "ElapsedTimeBaseline",
    "EmptyConfig",
    "HostFrequencyBaseline",
    "LoadBaseline",
    "MajorityBaseline",
    "StratifiedBaseline",
]

BASELINE_FILE = "model.json"
MAX_TABLE_ROWS = 100_000  # strides of an episode, or hosts
_KERNEL_WIDTHS_S = (5.0, 10.0, 20.0, 40.0, 80.0)
LOAD_UNKNOWN = 2  # beside 0 (no load runs in the episode) and 1 (a load runs)
_DURATION_EDGES = (2, 3, 5, 9, 17, 33)  # windows; durations of 1, 2, 3–4, 5–8, 9–16, 17–32 and more share a row
_PSEUDO_WINDOWS = 5.0  # windows with train's frequencies that are added to each row of a table
_PhaseRow = tuple[float, float, float, float, float]
_CLASS_BALANCES = (0.0, 0.5, 1.0)  # 0 keeps the classes' frequencies, 1 gives all classes the same weight


@dataclass(frozen=True, slots=True, kw_only=True)
class EmptyConfig:
    """No settings."""


class MajorityBaseline(PhaseModel):
    """Predict the most frequent phase of train; the probabilities are train's frequencies."""

    key = "majority"
    Config = EmptyConfig

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        from sklearn.dummy import DummyClassifier

        # The prediction reads the shares alone: a restored baseline needs no scikit-learn.
        prior = DummyClassifier(strategy="prior").fit(train.inputs.x, train.y)
        self._shares = np.zeros(N_CLASSES)
        self._shares[prior.classes_] = prior.class_prior_

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        return np.tile(self._shares, (len(x), 1))

    def _files(self) -> Mapping[str, bytes]:
        return {BASELINE_FILE: msgspec.json.encode([self._shares.tolist()])}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        self._shares = _parse_rows(files, self.key)[0]


class StratifiedBaseline(MajorityBaseline):
    """Predict a random phase with train's frequencies; the draw depends on the seed and the window alone.

    `DummyClassifier(strategy="stratified")` is not used: it draws by the window's position in a call, so that the same
    window gets another phase in another batch, and its probabilities of 0 and 1 make the log loss unbounded.
    """

    key = "stratified"

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        salt = self.seed.to_bytes(8, "big", signed=True)
        digests = [hashlib.sha256(salt + row.tobytes()).digest() for row in np.ascontiguousarray(x, "<f4")]
        draws = np.array([int.from_bytes(d[:6], "big") / 2**48 for d in digests])
        drawn = (draws[:, None] >= self._shares.cumsum()).sum(axis=1).clip(0, N_CLASSES - 1)
        # Half of the weight stays with the frequencies, which bounds the log loss of a wrong guess.
        probabilities: FloatArray = 0.5 * np.eye(N_CLASSES)[drawn] + 0.5 * self._shares
        return probabilities


class HostFrequencyBaseline(PhaseModel):
    """Predict the phase frequencies of the window's host; an unseen host gets those of all train hosts."""

    key = "host_only"
    kind = InputKind.HOST
    Config = EmptyConfig

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        hosts = np.unique(train.inputs.x[:, 0])
        own = [np.bincount(train.y[train.inputs.x[:, 0] == h], minlength=N_CLASSES) for h in hosts]
        self._hosts = hosts.astype(np.float64)
        rows = np.array([np.bincount(train.y, minlength=N_CLASSES), *own], np.float64)
        self._rows = rows / rows.sum(axis=1, keepdims=True)

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        at = np.searchsorted(self._hosts, x[:, 0])
        known = np.append(self._hosts, np.nan)[at] == x[:, 0]
        rows: FloatArray = self._rows[np.where(known, at + 1, 0)]
        return rows

    def _files(self) -> Mapping[str, bytes]:
        return {BASELINE_FILE: msgspec.json.encode([self._rows.tolist(), self._hosts.tolist()])}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        try:
            rows, hosts = msgspec.json.decode(files[BASELINE_FILE], type=tuple[list[_PhaseRow], list[float]])
        except (KeyError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise RunError(f"checkpoint of {self.key}: {BASELINE_FILE} is absent or not rows and hosts: {exc}") from exc
        self._rows, self._hosts = _check_rows(rows, self.key), np.array(hosts)
        if len(rows) != len(hosts) + 1 or not (np.diff(self._hosts) > 0).all():
            raise RunError(
                f"checkpoint of {self.key}: {BASELINE_FILE} holds {len(rows)} rows for {len(hosts)} hosts, "
                "or hosts out of order"
            )


class ElapsedTimeBaseline(PhaseModel):
    """Predict the smoothed phase frequencies at the window's time since the first label.

    Kernel width and class balance are selected by macro-F1 on validation A. A time after the end of the longest train
    episode gets the frequencies of that end.
    """

    key = "elapsed_time"
    kind = InputKind.ELAPSED
    Config = EmptyConfig

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        strides = _compute_stride_index(train.inputs.x)
        counts = np.zeros((int(strides.max()) + 1, N_CLASSES))
        np.add.at(counts, (strides, train.y), 1.0)
        best = -1.0
        for width_s in _KERNEL_WIDTHS_S:
            for balance in _CLASS_BALANCES:
                rows = _smooth_counts(counts, width_s, balance)
                decided = rows[np.minimum(_compute_stride_index(val.inputs.x), len(rows) - 1)].argmax(axis=1)
                score = float(macro_f1(confusion_counts(val.y, decided)))
                if score > best:
                    best, self._rows = score, rows
                    self.history = {"val_a_macro_f1": (score,), "width_s": (width_s,), "balance": (balance,)}

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        rows: FloatArray = self._rows[np.minimum(_compute_stride_index(x), len(self._rows) - 1)]
        return rows

    def _files(self) -> Mapping[str, bytes]:
        return {BASELINE_FILE: msgspec.json.encode(self._rows.tolist())}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        self._rows = _parse_rows(files, self.key)


class LoadBaseline(PhaseModel):
    """Predict the smoothed phase frequencies of episodes with, without, and with unknown benign load.

    A model that is not above it has learnt whether a load runs, not what the malware does.
    """

    key = "load_only"
    kind = InputKind.LOAD
    Config = EmptyConfig

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        self._rows = _count_smoothed(_parse_load_codes(train.inputs.x), train.y, LOAD_UNKNOWN + 1)

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        rows: FloatArray = self._rows[_parse_load_codes(x)]
        return rows

    def _files(self) -> Mapping[str, bytes]:
        return {BASELINE_FILE: msgspec.json.encode(self._rows.tolist())}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        self._rows = _parse_rows(files, self.key)
        if len(self._rows) != LOAD_UNKNOWN + 1:
            raise RunError(
                f"checkpoint of {self.key}: {BASELINE_FILE} holds {len(self._rows)} rows, expected {LOAD_UNKNOWN + 1}"
            )


class DurationBaseline(PhaseModel):
    """Predict the smoothed phase frequencies of windows whose CPU state has lasted for as long.

    The state is whether the CPU use exceeds a threshold, which is fixed on train without labels. Windows whose CPU use
    is unknown share a row of their own. A model that is not above it has learnt how long loads last.
    """

    key = "duration_only"
    kind = InputKind.DURATION
    Config = EmptyConfig

    def _fit(self, train: LabelledExamples, val: LabelledExamples) -> None:
        self._threshold = _compute_otsu_threshold(train.inputs.x[:, 0])
        self._rows = _count_smoothed(self._categorise(train.inputs.x), train.y, _N_DURATION_ROWS)

    def _predict_proba(self, x: NDArray[np.float32]) -> FloatArray:
        rows: FloatArray = self._rows[self._categorise(x)]
        return rows

    def _categorise(self, x: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the row of each window, ``(n,)``: bins of durations without load, then with load, then unknown.

        Args:
            x: ``(n, h)`` float32 CPU use in cores of the window and of those before it, latest first; NaN where
                unknown.
        """
        known, is_busy = np.isfinite(x), x > self._threshold
        same = known & (is_busy == is_busy[:, :1])
        duration = np.where(same.all(axis=1), x.shape[1], same.argmin(axis=1))
        rows = np.searchsorted(_DURATION_EDGES, duration, side="right") + is_busy[:, 0] * (len(_DURATION_EDGES) + 1)
        return np.where(known[:, 0], rows, _N_DURATION_ROWS - 1).astype(np.int64)

    def _files(self) -> Mapping[str, bytes]:
        return {BASELINE_FILE: msgspec.json.encode([self._rows.tolist(), self._threshold])}

    def _restore(self, files: Mapping[str, bytes]) -> None:
        try:
            rows, threshold = msgspec.json.decode(files[BASELINE_FILE], type=tuple[list[_PhaseRow], float])
        except (KeyError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise RunError(
                f"checkpoint of {self.key}: {BASELINE_FILE} is absent or not rows and a threshold: {exc}"
            ) from exc
        self._rows, self._threshold = _check_rows(rows, self.key), threshold
        if len(rows) != _N_DURATION_ROWS or not np.isfinite(threshold):
            raise RunError(
                f"checkpoint of {self.key}: {BASELINE_FILE} holds {len(rows)} rows and the threshold {threshold}, "
                f"expected {_N_DURATION_ROWS} rows and a finite threshold"
            )


_N_DURATION_ROWS = 2 * (len(_DURATION_EDGES) + 1) + 1


def _parse_load_codes(x: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the code of each window's episode, ``(n, 1)`` float32 → ``(n,)``; NaN and foreign numbers are unknown."""
    codes = np.where(np.isfinite(x[:, 0]), x[:, 0], LOAD_UNKNOWN)
    return np.where((codes == 0) | (codes == 1), codes, LOAD_UNKNOWN).astype(np.int64)


def _count_smoothed(categories: NDArray[np.int64], y: NDArray[np.int64], n_rows: int) -> FloatArray:
    """Return the phase frequencies of each category, ``(n_rows, 5)``, shrunk towards those of all windows.

    A category without a window gets the frequencies of all windows.
    """
    counts = np.zeros((n_rows, N_CLASSES))
    np.add.at(counts, (categories, y), 1.0)
    overall = counts.sum(axis=0) / counts.sum()
    rows = counts + _PSEUDO_WINDOWS * overall
    normalised: FloatArray = rows / rows.sum(axis=1, keepdims=True)
    return normalised


def _compute_otsu_threshold(values: NDArray[np.float32]) -> float:
    """Return the threshold that splits values into the two groups with the largest variance between them.

    Unknown values are left out; 0 if fewer than two distinct values are known. Source: Otsu 1979.
    """
    known = np.sort(values[np.isfinite(values)].astype(np.float64))
    if not len(known) or known[0] == known[-1]:
        return 0.0
    n_below = np.arange(1, len(known))
    below = np.cumsum(known)[:-1] / n_below
    above = (known.sum() - np.cumsum(known)[:-1]) / (len(known) - n_below)
    between = n_below * (len(known) - n_below) * (above - below) ** 2
    at = int(np.where(known[1:] > known[:-1], between, -1.0).argmax())
    return float((known[at] + known[at + 1]) / 2)


def _compute_stride_index(t_center_s: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the number of strides since the first label: ``(n, 1)`` float32 s → ``(n,)`` int64."""
    strides: NDArray[np.int64] = np.maximum(np.rint(t_center_s[:, 0] / STRIDE_S).astype(np.int64), 0)
    return strides


def _smooth_counts(counts: FloatArray, width_s: float, balance: float) -> FloatArray:
    """Smooth ``(strides, 5)`` counts over time with a Gaussian kernel, balance the classes, normalise each row."""
    at = np.arange(len(counts)) * STRIDE_S
    kernel = np.exp(-0.5 * ((at[:, None] - at[None, :]) / width_s) ** 2)
    total = counts.sum(axis=0)
    even = np.divide(1.0, total**balance, out=np.zeros(N_CLASSES), where=total > 0)
    rows = (kernel @ counts) * even + 1e-9 * (total > 0)  # the floor keeps a time that no episode reached above 0
    normalised: FloatArray = rows / rows.sum(axis=1, keepdims=True)
    return normalised


def _parse_rows(files: Mapping[str, bytes], key: str) -> FloatArray:
    try:
        rows = msgspec.json.decode(files[BASELINE_FILE], type=list[_PhaseRow])
    except (KeyError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RunError(f"checkpoint of {key}: {BASELINE_FILE} is absent or not rows of five numbers: {exc}") from exc
    return _check_rows(rows, key)


def _check_rows(decoded: list[_PhaseRow], key: str) -> FloatArray:
    if not 1 <= len(decoded) <= MAX_TABLE_ROWS:
        raise RunError(
            f"checkpoint of {key}: {BASELINE_FILE} holds {len(decoded):,} rows, expected 1 to {MAX_TABLE_ROWS:,}"
        )
    rows = np.asarray(decoded, np.float64)
    if (rows < 0).any() or (rows > 1.000001).any() or not (rows.sum(axis=1) > 0).all():
        raise RunError(
            f"checkpoint of {key}: {BASELINE_FILE} holds a row that is not probabilities; train the model again"
        )
    return rows
