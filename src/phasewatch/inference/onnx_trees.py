"""Check the operator of trees in an ONNX graph: a runtime trusts every index in it.

Source: `TreeEnsembleClassifier` of ai.onnx.ml, version 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import IntArray
from phasewatch.metrics import N_CLASSES
from phasewatch.models.checkpoint import MAX_MAGNITUDE

__all__ = ["MAX_ONNX_TREE_NODES", "check_onnx_trees"]

MAX_ONNX_TREE_NODES = 2**19
_INT_ATTRIBUTES = (
    "nodes_treeids",
    "nodes_nodeids",
    "nodes_featureids",
    "nodes_truenodeids",
    "nodes_falsenodeids",
    "nodes_missing_value_tracks_true",
    "class_treeids",
    "class_nodeids",
    "class_ids",
    "classlabels_int64s",
)
_FLOAT_ATTRIBUTES = ("nodes_values", "class_weights")
_OTHER_ATTRIBUTES = ("nodes_modes", "post_transform")
_OPTIONAL_ATTRIBUTES = ("base_values", "nodes_hitrates")
_TRANSFORMS = (b"NONE", b"SOFTMAX", b"LOGISTIC")
_TESTS = (b"BRANCH_LEQ", b"BRANCH_LT")


def check_onnx_trees(attributes: Mapping[str, Any], features: int) -> int:
    """Check the attributes of a tree operator.

    Args:
        attributes: Attributes by name.
        features: Number of columns of its input.

    Returns:
        Number of classes, 2 to 5.

    Raises:
        ValueError: Unless nodes are numbered from 0 in each tree, children follow their parents and are reached once,
            columns are valid, each leaf has one weight for each of some classes, and numbers are finite.
    """
    needed = {*_INT_ATTRIBUTES, *_FLOAT_ATTRIBUTES, *_OTHER_ATTRIBUTES}
    if odd := (needed - set(attributes)) | (set(attributes) - needed - set(_OPTIONAL_ATTRIBUTES)):
        raise ValueError(f"trees: attribute {min(odd)[:40]!r} is absent, or not one of an exporter's")
    ints = {name: _check_array(attributes, name, np.dtype(np.int64)) for name in _INT_ATTRIBUTES}
    given = (*_FLOAT_ATTRIBUTES, *(name for name in _OPTIONAL_ATTRIBUTES if name in attributes))
    floats = {name: _check_array(attributes, name, np.dtype("<f4")) for name in given}
    modes = _check_array(attributes, "nodes_modes", np.dtype(object))
    if attributes["post_transform"] not in _TRANSFORMS:
        raise ValueError("trees: their sums are transformed in an unknown way")
    classes = len(ints["classlabels_int64s"])
    if not 2 <= classes <= N_CLASSES or ints["classlabels_int64s"].tolist() != list(range(classes)):
        raise ValueError(f"trees: their classes are not 0 to {N_CLASSES - 1} or fewer")
    if len(floats.get("base_values", ())) not in (0, 1 if classes == 2 else classes, classes):
        raise ValueError("trees: base_values does not have one number for each class")
    for name, values in floats.items():
        if not (np.abs(values) <= MAX_MAGNITUDE).all():
            raise ValueError(f"trees: {name} holds a number that is not finite or above {MAX_MAGNITUDE:g}")
    size = len(floats["nodes_values"])
    if len(floats.get("nodes_hitrates", floats["nodes_values"])) != size:
        raise ValueError("trees: lists of nodes of different lengths")
    _check_nodes(ints, modes, size, features)
    _check_leaves(ints, modes == b"LEAF", len(floats["class_weights"]), classes)
    return classes


def _check_array(attributes: Mapping[str, Any], name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    value = attributes[name]
    if not isinstance(value, np.ndarray) or value.dtype != dtype or not 1 <= len(value) <= MAX_ONNX_TREE_NODES:
        raise ValueError(f"trees: {name} is no list of at most {MAX_ONNX_TREE_NODES:,} values of its type")
    return value


def _check_nodes(ints: dict[str, IntArray], modes: NDArray[Any], size: int, features: int) -> None:
    names = [name for name in _INT_ATTRIBUTES if name.startswith("nodes_")]
    if any(len(ints[name]) != size for name in names) or len(modes) != size:
        raise ValueError("trees: lists of nodes of different lengths")
    tree, own = ints["nodes_treeids"], ints["nodes_nodeids"]
    starts = np.flatnonzero(np.r_[True, tree[1:] != tree[:-1]])
    sizes = np.diff(np.r_[starts, size])
    start = np.repeat(starts, sizes)
    if (tree != np.repeat(np.arange(len(starts)), sizes)).any() or (own != np.arange(size) - start).any():
        raise ValueError("trees: nodes are not numbered from 0, tree by tree")
    leaf = modes == b"LEAF"
    if not (leaf | np.isin(modes, _TESTS)).all():
        raise ValueError("trees: a node that is neither a leaf nor a test for 'less than' or 'at most'")
    column, tracks = ints["nodes_featureids"], ints["nodes_missing_value_tracks_true"]
    if not ((column >= 0) & (column < features)).all() or not np.isin(tracks, (0, 1)).all():
        raise ValueError(f"trees: a column outside 0 to {features - 1}")
    last = np.repeat(sizes, sizes)
    yes, no = ints["nodes_truenodeids"], ints["nodes_falsenodeids"]
    for child in (yes, no):
        if not ((child > own) & (child < last))[~leaf].all() or child[leaf].any():
            raise ValueError("trees: a child does not follow its parent in its tree")
    reached = np.bincount(np.concatenate([(start + yes)[~leaf], (start + no)[~leaf]]), minlength=size)
    if (reached != (own != 0)).any():
        raise ValueError("trees: a node is not reached, or reached twice")


def _check_leaves(ints: dict[str, IntArray], leaf: NDArray[np.bool_], size: int, classes: int) -> None:
    """Check that exactly the leaves have weights, at most one for each class."""
    if any(len(ints[name]) != size for name in ("class_treeids", "class_nodeids", "class_ids")):
        raise ValueError("trees: lists of leaves of different lengths")
    if not ((ints["class_ids"] >= 0) & (ints["class_ids"] < classes)).all():
        raise ValueError(f"trees: a weight for a class outside 0 to {classes - 1}")
    for name in ("class_treeids", "class_nodeids"):
        if not ((ints[name] >= 0) & (ints[name] < len(leaf))).all():
            raise ValueError("trees: a weight of a leaf that is not there")
    # One number for each place, below 2^19 * 2^19 * 8.
    theirs = (ints["class_treeids"] * MAX_ONNX_TREE_NODES + ints["class_nodeids"]) * 8 + ints["class_ids"]
    ours = ints["nodes_treeids"][leaf] * MAX_ONNX_TREE_NODES + ints["nodes_nodeids"][leaf]
    if len(np.unique(theirs)) != size or not np.array_equal(np.unique(theirs // 8), np.unique(ours)):
        raise ValueError("trees: a leaf does not have one weight for a class")
