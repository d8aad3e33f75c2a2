"""Check an XGBoost model file before XGBoost's native parser reads it, because that parser trusts every index.

The file is parsed here, compared with what `GradientBoosting` writes, and rendered again from the checked values.
XGBoost reads only bytes that this module rendered. Source: XGBoost's model schema (doc/model.schema), 3.0 to 3.4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.errors import RunError
from phasewatch.metrics import N_CLASSES
from phasewatch.models.checkpoint import MAX_MAGNITUDE
from phasewatch.models.ubjson import parse_ubjson, render_array, render_ubjson

__all__ = ["MAX_TREES", "MAX_TREES_BYTES", "MAX_TREE_NODES", "check_xgboost_trees"]

MAX_TREES_BYTES = 64 * 2**20
MAX_TREES = 5_000  # 1,000 rounds
MAX_TREE_NODES = 2**20
_NO_PARENT = 2**31 - 1
_FLOAT_FIELDS = ("base_weights", "loss_changes", "split_conditions", "sum_hessian")
_NODE_FIELDS: Mapping[str, bytes] = {
    "base_weights": b"d", "default_left": b"U", "left_children": b"l", "loss_changes": b"d", "parents": b"l",
    "right_children": b"l", "split_conditions": b"d", "split_indices": b"l", "split_type": b"U", "sum_hessian": b"d",
}  # fmt: skip
_EMPTY_FIELDS: Mapping[str, bytes] = {
    "categories": b"l", "categories_nodes": b"l", "categories_segments": b"L", "categories_sizes": b"L",
}  # fmt: skip
_DTYPES = {b"d": ">f4", b"U": "|u1", b"l": ">i4", b"L": ">i8"}
_NUMBER = r"-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?"
_BASE_SCORE = re.compile(rf"{_NUMBER}|\[{_NUMBER}(,{_NUMBER}){{{N_CLASSES - 1}}}\]")

_TreeArrays = dict[str, NDArray[Any]]


def check_xgboost_trees(data: bytes, *, place: str, features: int) -> bytes:
    """Check a model file and return the same trees, rendered from the checked values, for XGBoost to read.

    Args:
        data: Bytes of ``model.ubj``.
        place: File name, for messages.
        features: Number of columns of the model's input.

    Raises:
        RunError: Unless the file has five classes, one tree for each class and round, indices within their arrays,
            every node reached once from its root, finite numbers, no categories, and sizes within bounds.
    """

    def build_error(problem: str) -> RunError:
        return RunError(f"{place}: {problem}; the file was not written by phasewatch, train the model again")

    if len(data) > MAX_TREES_BYTES:
        raise build_error(f"{len(data):,} bytes, expected at most {MAX_TREES_BYTES:,}")
    try:
        return _check_model(parse_ubjson(data), features)
    except ValueError as exc:  # UnicodeDecodeError is one
        raise build_error(f"not a model of gradient-boosted trees: {exc}") from exc


def _check_model(model: Any, features: int) -> bytes:
    learner = _check_object(
        _check_object(model, "the file", ("learner", "version"))["learner"],
        "learner",
        ("attributes", "feature_names", "feature_types", "gradient_booster", "learner_model_param", "objective"),
    )
    _check_object(learner["attributes"], "attributes", ())
    _check_empty_lists(learner, ("feature_names", "feature_types"))
    booster = _check_object(learner["gradient_booster"], "gradient_booster", ("model", "name"))
    forest = _check_object(
        booster["model"], "model", ("gbtree_model_param", "iteration_indptr", "tree_info", "trees"), ("cats",)
    )
    if "cats" in forest:
        cats = _check_object(forest["cats"], "cats", ("enc", "feature_segments", "sorted_idx"))
        _check_empty_lists(cats, tuple(cats))
    trees = forest["trees"]
    if not isinstance(trees, list) or not N_CLASSES <= len(trees) <= MAX_TREES or len(trees) % N_CLASSES:
        raise ValueError(f"expected {N_CLASSES} trees a round, {MAX_TREES:,} at most")
    _check_equal(booster["name"], "gbtree", "name")
    _check_equal(
        forest["gbtree_model_param"], {"num_parallel_tree": "1", "num_trees": str(len(trees))}, "number of trees"
    )
    _check_equal(forest["tree_info"], [i % N_CLASSES for i in range(len(trees))], "tree_info")
    _check_equal(forest["iteration_indptr"], list(range(0, len(trees) + 1, N_CLASSES)), "iteration_indptr")
    _check_equal(
        learner["objective"],
        {"name": "multi:softprob", "softmax_multiclass_param": {"num_class": str(N_CLASSES)}},
        "objective",
    )
    _check_params(learner["learner_model_param"], features)
    _check_version(model["version"])
    nodes = [_check_node_arrays(tree, number, features) for number, tree in enumerate(trees)]
    _check_structure(nodes, features)
    forest["trees"] = [
        b"{" + b"".join(map(_join_pair, _render_tree(tree, arrays))) + b"}"
        for tree, arrays in zip(trees, nodes, strict=True)
    ]
    if "cats" in forest:
        forest["cats"] = {
            "enc": [],
            "feature_segments": _render_empty_array(b"l"),
            "sorted_idx": _render_empty_array(b"l"),
        }
    return render_ubjson(
        {"learner": {**learner, "feature_names": [], "feature_types": []}, "version": model["version"]}
    )


def _join_pair(pair: tuple[bytes, bytes]) -> bytes:
    """Return a rendered key followed by its rendered value."""
    return pair[0] + pair[1]


def _render_empty_array(kind: bytes) -> bytes:
    return render_array(np.zeros(0), kind)


def _check_object(value: Any, name: str, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, dict) or not set(keys) <= value.keys() <= {*keys, *optional}:
        found = ", ".join(value)[:80] if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{name} holds {found or 'nothing'}, expected {', '.join(keys) or 'nothing'}")
    return value


def _check_equal(found: Any, expected: Any, name: str) -> None:
    if type(found) is not type(expected) or found != expected:
        raise ValueError(f"{name} is {str(found)[:40]}, expected {str(expected)[:40]}")


def _check_empty_lists(parent: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if not isinstance(parent[name], list | np.ndarray) or len(parent[name]):
            raise ValueError(f"{name} is not empty")


def _check_params(value: Any, features: int) -> None:
    params = _check_object(
        value, "learner_model_param", ("base_score", "boost_from_average", "num_class", "num_feature", "num_target")
    )
    for name, expected in (("num_class", N_CLASSES), ("num_feature", features), ("num_target", 1)):
        _check_equal(params[name], str(expected), name)
    score = params["base_score"]
    if not isinstance(score, str) or not _BASE_SCORE.fullmatch(score):
        raise ValueError("base_score is not a finite number")
    if not all(
        isfinite(number := float(text)) and abs(number) <= MAX_MAGNITUDE for text in score.strip("[]").split(",")
    ):
        raise ValueError("base_score is not a finite number")
    if params["boost_from_average"] not in ("0", "1"):
        raise ValueError("boost_from_average is neither 0 nor 1")


def _check_version(value: Any) -> None:
    is_version = isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 <= v < 1000 for v in value)
    if not is_version or value[0] < 3:
        raise ValueError("the version is not one of XGBoost 3")


def _check_node_arrays(value: Any, number: int, features: int) -> _TreeArrays:
    """Return the arrays of a tree; each has one entry for each node."""
    tree = _check_object(value, "a tree", (*_NODE_FIELDS, *_EMPTY_FIELDS, "id", "tree_param"))
    _check_equal(tree["id"], number, "id of a tree")
    _check_empty_lists(tree, tuple(_EMPTY_FIELDS))
    size = len(tree["parents"]) if isinstance(tree["parents"], np.ndarray) else 0
    for name, kind in _NODE_FIELDS.items():
        array = tree[name]
        if not isinstance(array, np.ndarray) or array.dtype != _DTYPES[kind] or len(array) != size or not size:
            raise ValueError(f"tree {number}: {name} does not have one number of its type for each node")
    _check_equal(
        tree["tree_param"],
        {"num_deleted": "0", "num_feature": str(features), "num_nodes": str(size), "size_leaf_vector": "1"},
        f"tree_param of tree {number}",
    )
    return {name: tree[name] for name in _NODE_FIELDS}


def _check_structure(trees: list[_TreeArrays], features: int) -> None:
    """Check all trees at once: finite numbers, valid columns, children after their parent and reached once."""
    sizes = np.array([len(tree["parents"]) for tree in trees], np.int64)
    total = int(sizes.sum())
    if total > MAX_TREE_NODES:
        raise ValueError(f"{total:,} nodes, expected at most {MAX_TREE_NODES:,}")
    start = np.repeat(np.cumsum(sizes) - sizes, sizes)
    own, size = np.arange(total) - start, np.repeat(sizes, sizes)

    def joined(name: str) -> NDArray[np.int64]:
        return np.concatenate([tree[name] for tree in trees]).astype(np.int64)

    for name in _FLOAT_FIELDS:
        values = np.concatenate([tree[name] for tree in trees])
        if not (np.abs(values) <= MAX_MAGNITUDE).all():
            raise ValueError(f"{name} holds a number that is not finite or above {MAX_MAGNITUDE:g}")
    left, right, parents = joined("left_children"), joined("right_children"), joined("parents")
    split, columns = left != -1, joined("split_indices")
    if not (columns >= 0).all() or not (columns < features).all():
        raise ValueError(f"split_indices holds a column outside 0 to {features - 1}")
    if joined("split_type").any() or (joined("default_left") > 1).any():
        raise ValueError("split_type or default_left holds an invalid value")
    if (split != (right != -1)).any():
        raise ValueError("a node has one child")
    for child in (left, right):
        if not ((child > own) & (child < size))[split].all():
            raise ValueError("a child does not follow its parent in its tree")
        if (parents[(start + child)[split]] != own[split]).any():
            raise ValueError("parents and children do not match")
    reached = np.bincount(np.concatenate([(start + left)[split], (start + right)[split]]), minlength=total)
    is_root = own == 0
    if (reached != ~is_root).any() or (parents[is_root] != _NO_PARENT).any():
        raise ValueError("a node is not reached, or reached twice")


def _render_tree(tree: dict[str, Any], arrays: _TreeArrays) -> list[tuple[bytes, bytes]]:
    """Render the keys and values of a tree in the order of their names, as XGBoost writes them."""
    values: dict[str, bytes] = {name: render_array(arrays[name], kind) for name, kind in _NODE_FIELDS.items()}
    values |= {name: _EMPTY_BYTES[name] for name in _EMPTY_FIELDS}
    values |= {"id": render_ubjson(tree["id"]), "tree_param": render_ubjson(tree["tree_param"])}
    return [(_RENDERED_KEYS[name], values[name]) for name in _RENDERED_KEYS]


_EMPTY_BYTES = {name: _render_empty_array(kind) for name, kind in _EMPTY_FIELDS.items()}
_RENDERED_KEYS = {name: render_ubjson(name)[1:] for name in sorted((*_NODE_FIELDS, *_EMPTY_FIELDS, "id", "tree_param"))}
