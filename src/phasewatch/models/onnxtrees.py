"""The trees of an exported model: every index in its place before a runtime follows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.models.onnxgraph import N_CLASSES, Node

MAX_NODES = 2**19
TREES = ("ai.onnx.ml", "TreeEnsembleClassifier")
_LARGEST = 1e30
_INTS = (
    "nodes_treeids", "nodes_nodeids", "nodes_featureids", "nodes_truenodeids", "nodes_falsenodeids",
    "nodes_missing_value_tracks_true", "class_treeids", "class_nodeids", "class_ids", "classlabels_int64s",
)  # fmt: skip
_FLOATS = ("nodes_values", "class_weights", "base_values")
_OTHERS = ("nodes_modes", "post_transform")

Ints = NDArray[np.int64]


def check_trees(nodes: Sequence[Node], features: int) -> None:
    """Check the attributes of the one operator of trees that a graph has.

    Raises:
        ValueError: If there is not one, an attribute is none of the exporter's, a node is numbered otherwise than from
            0 within its tree, a child does not stand behind its parent, a column is not there, a leaf has not one
            weight, or a number is not finite.
    """
    found = [node for node in nodes if node.type == TREES]
    if len(found) != 1:
        raise ValueError(f"{len(found)} operators of trees, expected one")
    attributes = found[0].attributes
    if odd := set(attributes) ^ {*_INTS, *_FLOATS, *_OTHERS}:
        raise ValueError(f"trees: attribute {min(odd)[:40]!r} is absent, or none of an export's")
    ints = {name: _array(attributes, name, np.dtype(np.int64)) for name in _INTS}
    floats = {name: _array(attributes, name, np.dtype("<f4")) for name in _FLOATS}
    modes = _array(attributes, "nodes_modes", np.dtype(object))
    if attributes["post_transform"] != b"SOFTMAX":
        raise ValueError("trees: their sums are not made shares by SOFTMAX")
    if ints["classlabels_int64s"].tolist() != list(range(N_CLASSES)) or len(floats["base_values"]) != N_CLASSES:
        raise ValueError(f"trees: not of {N_CLASSES} classes")
    for name, values in floats.items():
        if not (np.abs(values) <= _LARGEST).all():
            raise ValueError(f"trees: {name} holds a number that is not finite or above {_LARGEST:g}")
    _check_nodes(ints, modes, len(floats["nodes_values"]), features)
    _check_leaves(ints, modes == b"LEAF", len(floats["class_weights"]))


def _array(attributes: Any, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    value = attributes[name]
    if not isinstance(value, np.ndarray) or value.dtype != dtype or not 1 <= len(value) <= MAX_NODES:
        raise ValueError(f"trees: {name} is no list of at most {MAX_NODES:,} values of its type")
    return value


def _check_nodes(ints: dict[str, Ints], modes: NDArray[Any], size: int, features: int) -> None:
    names = [name for name in _INTS if name.startswith("nodes_")]
    if any(len(ints[name]) != size for name in names) or len(modes) != size:
        raise ValueError("trees: lists of nodes of different lengths")
    tree, own = ints["nodes_treeids"], ints["nodes_nodeids"]
    starts = np.flatnonzero(np.r_[True, tree[1:] != tree[:-1]])
    sizes = np.diff(np.r_[starts, size])
    start = np.repeat(starts, sizes)
    if (tree != np.repeat(np.arange(len(starts)), sizes)).any() or (own != np.arange(size) - start).any():
        raise ValueError("trees: nodes are not numbered from 0, tree by tree")
    leaf = modes == b"LEAF"
    if not (leaf | (modes == b"BRANCH_LT")).all():
        raise ValueError("trees: a node that is neither a leaf nor a test for 'less than'")
    column, tracks = ints["nodes_featureids"], ints["nodes_missing_value_tracks_true"]
    if not ((column >= 0) & (column < features)).all() or not np.isin(tracks, (0, 1)).all():
        raise ValueError(f"trees: a column that is none of {features}")
    last = np.repeat(sizes, sizes)
    yes, no = ints["nodes_truenodeids"], ints["nodes_falsenodeids"]
    for child in (yes, no):
        if not ((child > own) & (child < last))[~leaf].all() or child[leaf].any():
            raise ValueError("trees: a child does not stand behind its parent in its tree")
    reached = np.bincount(np.concatenate([(start + yes)[~leaf], (start + no)[~leaf]]), minlength=size)
    if (reached != (own != 0)).any():
        raise ValueError("trees: a node is reached not at all, or twice")


def _check_leaves(ints: dict[str, Ints], leaf: NDArray[np.bool_], size: int) -> None:
    if any(len(ints[name]) != size for name in ("class_treeids", "class_nodeids", "class_ids")):
        raise ValueError("trees: lists of leaves of different lengths")
    if not ((ints["class_ids"] >= 0) & (ints["class_ids"] < N_CLASSES)).all():
        raise ValueError(f"trees: a weight for a class that is none of {N_CLASSES}")
    theirs = np.stack([ints["class_treeids"], ints["class_nodeids"]])
    ours = np.stack([ints["nodes_treeids"][leaf], ints["nodes_nodeids"][leaf]])
    order = np.lexsort(theirs[::-1])
    if theirs.shape != ours.shape or (theirs[:, order] != ours).any():
        raise ValueError("trees: a leaf has not one weight")
