"""Gradient-boosted trees as plain arrays: read from LightGBM after training, checked, stored and evaluated in numpy.

A checkpoint holds these arrays and nothing else, so that no native parser ever reads a stranger's bytes. The process
that trained a model predicts from the same arrays as one that loads it: the bits are the same. The evaluation follows
Lucchese et al. 2015, "QuickScorer": each test that fails rules out the leaves of its left subtree, and a window ends
in the first leaf that is left.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import Float32Array, FloatArray
from phasewatch.errors import MissingToolError
from phasewatch.metrics import N_CLASSES
from phasewatch.models.checkpoint import MAX_MAGNITUDE, ExpectedArrays

__all__ = [
    "MAX_LEAVES",
    "MAX_ROUNDS",
    "TreeArrays",
    "TreeEvaluator",
    "list_expected_arrays",
    "load_lightgbm",
    "parse_lightgbm_text",
]

MAX_ROUNDS = 1_000
MAX_LEAVES = 64  # of a tree: its leaves fit one 64-bit word
_OPENMP_LIBRARY = "libgomp.so.1"
_FEW_WINDOWS = 64  # up to here it is faster to evaluate all trees at once for each window (measured)
_CHUNK = 8_192  # windows; bounds the memory
_CATEGORICAL, _DEFAULT_LEFT, _MISSING_TYPE, _NAN_IS_MISSING = 1, 2, 12, 8  # bits of LightGBM's decision_type


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeArrays:
    """Trees of equal capacity: `t` trees of at most `leaves` leaves. Tree i adds to the score of class ``i % 5``.

    A window goes left at a node if its value is at most the threshold, or is NaN and the node sends NaN to the left.
    A child ≥ 0 is a node of the same tree, after its parent; a child < 0 is the leaf ``-1 - child``. Unused places
    hold 0.

    Attributes:
        feature: ``(t, leaves - 1)`` int32 column of each test.
        threshold: ``(t, leaves - 1)`` float32, rounded down from float64, which is exact for float32 inputs.
        nan_left: ``(t, leaves - 1)`` uint8, 1 where NaN goes left.
        left, right: ``(t, leaves - 1)`` int32 children.
        leaf: ``(t, leaves)`` float64 score of each leaf.
        size: ``(t,)`` int32 number of leaves of each tree.
    """

    feature: NDArray[np.int32]
    threshold: NDArray[np.float32]
    nan_left: NDArray[np.uint8]
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    leaf: NDArray[np.float64]
    size: NDArray[np.int32]

    @classmethod
    def create_empty(cls, rounds: int, leaves: int) -> Self:
        """Return trees of one leaf with score 0."""
        arrays = {
            name: np.zeros(shape, _NUMPY_DTYPES[dtype])
            for name, (dtype, shape) in list_expected_arrays(rounds, leaves).items()
        }
        arrays["size"][:] = 1
        return cls(**arrays)

    def to_mapping(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check(self, features: int) -> None:
        """Check that every window reaches exactly one leaf of each tree, whatever its values are.

        Args:
            features: Number of columns of the model's input.

        Raises:
            ValueError: If a column, child or number of leaves is out of range, a node or leaf is not reached exactly
                once from its root, an unused place is not 0, or a number is not finite or above `MAX_MAGNITUDE`.
        """
        trees, slots = self.feature.shape
        if not ((self.size >= 1) & (self.size <= slots + 1)).all():
            raise ValueError(f"a tree of fewer than 1 or more than {slots + 1} leaves")
        node, leaf = np.arange(slots), np.arange(slots + 1)
        used = node < self.size[:, None] - 1
        for name in ("feature", "threshold", "nan_left", "left", "right"):
            if getattr(self, name)[~used].any():
                raise ValueError(f"{name} has a value at an unused place")
        if self.leaf[leaf >= self.size[:, None]].any():
            raise ValueError("leaf has a value at an unused place")
        for values in (self.threshold, self.leaf):
            if not (np.abs(values) <= MAX_MAGNITUDE).all():
                raise ValueError(f"a number that is not finite or above {MAX_MAGNITUDE:g}")
        if not ((self.feature >= 0) & (self.feature < features)).all() or (self.nan_left > 1).any():
            raise ValueError(f"a column outside 0 to {features - 1}, or a direction that is neither 0 nor 1")
        inner, last = np.zeros((trees, slots), np.int64), np.zeros((trees, slots + 1), np.int64)
        for child in (self.left, self.right):
            is_node = used & (child >= 0)
            is_leaf = used & (child < 0)
            if (
                not ((child > node) & (child < self.size[:, None] - 1))[is_node].all()
                or not (-1 - child.astype(np.int64) < self.size[:, None])[is_leaf].all()
            ):
                raise ValueError("a child that is not in its tree, or not after its parent")
            rows, places = np.nonzero(is_node)
            np.add.at(inner, (rows, child[rows, places]), 1)
            rows, places = np.nonzero(is_leaf)
            np.add.at(last, (rows, -1 - child[rows, places]), 1)
        if (inner != (used & (node > 0))).any():
            raise ValueError("a node that is not reached, or reached twice")
        if (last != ((leaf < self.size[:, None]) & (self.size[:, None] > 1))).any():
            raise ValueError("a leaf that is not reached, or reached twice")


_NUMPY_DTYPES = {"I32": np.int32, "F32": np.float32, "U8": np.uint8, "F64": np.float64}


def list_expected_arrays(rounds: int, leaves: int) -> ExpectedArrays:
    """Return name → dtype and shape of the arrays of a model with these settings."""
    trees, slots = rounds * N_CLASSES, leaves - 1
    return {
        "feature": ("I32", (trees, slots)),
        "threshold": ("F32", (trees, slots)),
        "nan_left": ("U8", (trees, slots)),
        "left": ("I32", (trees, slots)),
        "right": ("I32", (trees, slots)),
        "leaf": ("F64", (trees, leaves)),
        "size": ("I32", (trees,)),
    }


class TreeEvaluator:
    """Evaluate trees that were checked."""

    def __init__(self, trees: TreeArrays) -> None:
        """Compute for each test the leaves that it rules out when it fails, and order the leaves from the left."""
        self.trees = trees
        count, slots = trees.feature.shape
        capacity = slots + 1
        word = np.dtype(np.uint16 if capacity <= 16 else np.uint32 if capacity <= 32 else np.uint64)
        rows = np.arange(count)
        # Leaves below each node, children first; then the place of each node's first leaf, parents first.
        below = np.zeros((count, slots), np.int64)
        for node in range(slots - 1, -1, -1):
            for child in (trees.left[:, node], trees.right[:, node]):
                below[:, node] += np.where(child >= 0, below[rows, np.maximum(child, 0)], 1)
        used = np.arange(slots) < trees.size[:, None] - 1
        first = np.zeros((count, slots), np.int64)
        order = np.zeros((count, capacity), np.int64)
        self._ruled_out = np.zeros((count, slots), word)
        for node in range(slots):
            here = used[:, node]
            left, right, start = trees.left[:, node], trees.right[:, node], first[:, node]
            n_left = np.where(left >= 0, below[rows, np.maximum(left, 0)], 1)
            for child, at in ((left, start), (right, start + n_left)):
                is_node, is_leaf = here & (child >= 0), here & (child < 0)
                first[rows[is_node], child[is_node]] = at[is_node]
                order[rows[is_leaf], at[is_leaf]] = -1 - child[is_leaf]
            # In 64 bits: (2^n_left − 1) shifted to the first leaf of the node.
            bits = (np.uint64(1) << n_left.astype(np.uint64)) - np.uint64(1)
            self._ruled_out[:, node] = np.where(here, bits << start.astype(np.uint64), 0).astype(word)
        self._leaf = np.take_along_axis(trees.leaf, order, axis=1)
        self._nan_right = trees.nan_left == 0
        self._columns = np.unique(trees.feature[used])

    def compute_scores(self, x: Float32Array) -> FloatArray:
        """Compute the sum of the leaves that each window reaches, ``(n, f)`` float32 → ``(n, 5)`` float64.

        A window has the same bits alone and in any batch: leaves are added in the order of the trees.
        """
        if len(x) <= _FEW_WINDOWS:
            return np.array([self._score_window(row) for row in x]).reshape(-1, N_CLASSES)
        return np.concatenate([self._score_chunk(x[at : at + _CHUNK]) for at in range(0, len(x), _CHUNK)])

    def _score_window(self, row: Float32Array) -> FloatArray:
        values = row[self.trees.feature]
        fails = (values > self.trees.threshold) | (np.isnan(values) & self._nan_right)
        gone = np.bitwise_or.reduce(np.where(fails, self._ruled_out, self._ruled_out.dtype.type(0)), axis=1)
        reached = self._leaf[np.arange(len(gone)), _find_first_leaf(gone)].reshape(-1, N_CLASSES)
        total: FloatArray = np.cumsum(reached, axis=0)[-1]
        return total

    def _score_chunk(self, x: Float32Array) -> FloatArray:
        columns = np.ascontiguousarray(x.T)
        unknown = np.isnan(columns)
        has_gaps = bool(unknown[self._columns].any())
        scores = np.zeros((N_CLASSES, len(x)))
        for tree, size in enumerate(self.trees.size.tolist()):
            used = slice(0, size - 1)
            tested = self.trees.feature[tree, used]
            fails = columns[tested] > self.trees.threshold[tree, used, None]
            if has_gaps:
                fails |= unknown[tested] & self._nan_right[tree, used, None]
            gone = np.bitwise_or.reduce(fails * self._ruled_out[tree, used, None], axis=0)
            scores[tree % N_CLASSES] += self._leaf[tree, _find_first_leaf(gone)]
        return scores.T


def _find_first_leaf(gone: NDArray[Any]) -> NDArray[np.intp]:
    """Return the place of the lowest bit that is 0."""
    place: NDArray[np.intp] = np.bitwise_count(gone & ~(gone + gone.dtype.type(1))).astype(np.intp)
    return place


def load_lightgbm() -> Any:
    """Import LightGBM, which links to the system's OpenMP library; where there is none, that of torch serves.

    Raises:
        MissingToolError: If neither library is there.
    """
    try:
        return import_module("lightgbm")
    except OSError as exc:
        found = find_spec("torch")  # not imported: only its folder is of interest
        for folder in (found.submodule_search_locations if found is not None else None) or ():
            with suppress(OSError):
                ctypes.CDLL(str(Path(folder) / "lib" / _OPENMP_LIBRARY))
                return import_module("lightgbm")
        raise MissingToolError(
            f"LightGBM cannot be loaded: {exc}; install its OpenMP library: apt-get install libgomp1"
        ) from exc


def parse_lightgbm_text(text: str, *, rounds: int, leaves: int) -> TreeArrays:
    """Parse the trees that LightGBM wrote in this process (`Booster.model_to_string`).

    Training may end before `rounds`, when no split improves the fit; the trees that are missing add 0.

    Args:
        text: Text of a model of five classes.
        rounds, leaves: Settings that the model was trained with.
    """
    trees = TreeArrays.create_empty(rounds, leaves)
    for number, block in enumerate(_iterate_blocks(text)):
        size = int(block["num_leaves"])
        trees.size[number] = size
        trees.leaf[number, :size] = [float(v) for v in block["leaf_value"].split()]
        if size == 1:
            continue
        used = slice(0, size - 1)
        kinds = np.array(block["decision_type"].split(), np.int64)
        exact = np.array([float(v) for v in block["threshold"].split()])
        if (kinds & _CATEGORICAL).any():
            raise ValueError("LightGBM made a categorical split of numbers")
        # Where train has no NaN, LightGBM takes NaN for 0.
        by_rule = np.where((kinds & _MISSING_TYPE) == _NAN_IS_MISSING, (kinds & _DEFAULT_LEFT) > 0, exact >= 0.0)
        trees.feature[number, used] = np.array(block["split_feature"].split(), np.int64)
        trees.threshold[number, used] = _round_down(exact)
        trees.nan_left[number, used] = by_rule
        trees.left[number, used] = np.array(block["left_child"].split(), np.int64)
        trees.right[number, used] = np.array(block["right_child"].split(), np.int64)
    return trees


def _iterate_blocks(text: str) -> Iterator[Mapping[str, str]]:
    """Yield the fields of each tree."""
    body = text.partition("\nTree=")[2].partition("\nend of trees")[0]
    for block in body.split("\nTree=") if body else ():
        yield dict(line.split("=", 1) for line in block.splitlines() if "=" in line)


def _round_down(values: FloatArray) -> Float32Array:
    """Return the largest float32 at or below each number; those beyond `MAX_MAGNITUDE` are cut to it."""
    cut = values.clip(-MAX_MAGNITUDE, MAX_MAGNITUDE)
    nearest = cut.astype(np.float32)
    rounded: Float32Array = np.where(nearest > cut, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    return rounded.clip(-_LARGEST, _LARGEST)


_LARGEST = np.nextafter(np.float32(MAX_MAGNITUDE), np.float32(0))  # float32 of it may lie above it
