"""Convert a user's scikit-learn classifier of a table to an ONNX graph, with imputation, phases and temperature."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from phasewatch.errors import UsageError
from phasewatch.inference.onnx_check import ONNX_INPUT, ONNX_OUTPUT
from phasewatch.metrics import N_CLASSES
from phasewatch.models.adapters import SMALLEST_SHARE, TableAdapter

__all__ = ["build_sklearn_graph"]

_OPSETS = {"": 15, "ai.onnx.ml": 3}
_IR_VERSION = 8
_SHARES = "probabilities"  # skl2onnx's name of the classifier's second output


def build_sklearn_graph(model: TableAdapter) -> Any:
    """Convert the classifier by skl2onnx, and put the adapter's arithmetic before and behind it.

    Raises:
        UsageError: If the classifier has no probabilities, or skl2onnx cannot convert it.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    if not hasattr(model.classifier, "predict_proba"):
        raise UsageError(
            f"model {model.key} cannot be exported: its classifier has no predict_proba; use one that has, such as "
            "CalibratedClassifierCV around it where skl2onnx converts that"
        )
    inner = _convert(model)
    shape = model.spec.shape if model.spec else ()
    renamed = {ONNX_INPUT: "phasewatch.filled", ONNX_OUTPUT: "phasewatch.shares"}
    nodes = _keep_needed_nodes(inner.graph.node, _SHARES)
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    used = {name for node in nodes for name in node.input}
    constants = [
        numpy_helper.from_array(_to_little(numpy_helper.to_array(tensor)), tensor.name)
        for tensor in inner.graph.initializer
        if tensor.name in used
    ]
    before, first = _build_imputation(model)
    codes = model.list_class_codes()
    to_phases = np.array([[float(code == phase) for phase in range(N_CLASSES)] for code in codes])
    least = np.array([SMALLEST_SHARE if code in model.seen else 0.0 for code in range(N_CLASSES)])
    behind = [
        helper.make_node("Cast", ["phasewatch.shares"], ["phasewatch.shares64"], to=TensorProto.DOUBLE),
        helper.make_node("MatMul", ["phasewatch.shares64", "phasewatch.phases"], ["phasewatch.by_phase"]),
        helper.make_node("Add", ["phasewatch.by_phase", "phasewatch.least"], ["phasewatch.positive"]),
        helper.make_node("Log", ["phasewatch.positive"], ["phasewatch.logs"]),  # log 0 = −inf is meant
        helper.make_node("Div", ["phasewatch.logs", "phasewatch.temperature"], ["phasewatch.tempered"]),
        helper.make_node("Softmax", ["phasewatch.tempered"], ["phasewatch.soft"], axis=1),
        helper.make_node("Cast", ["phasewatch.soft"], [ONNX_OUTPUT], to=TensorProto.FLOAT),
    ]
    own = {
        "phasewatch.phases": to_phases,
        "phasewatch.least": least,
        "phasewatch.temperature": np.array(model.temperature),
        **first,
    }
    graph = helper.make_graph(
        [*before, *nodes, *behind],
        model.key,
        [helper.make_tensor_value_info(ONNX_INPUT, TensorProto.FLOAT, [None, *shape])],
        [helper.make_tensor_value_info(ONNX_OUTPUT, TensorProto.FLOAT, [None, N_CLASSES])],
        [*constants, *(numpy_helper.from_array(value, name) for name, value in own.items())],
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS.items()]
    whole = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="phasewatch")
    onnx.checker.check_model(whole, full_check=True)
    return whole


def _convert(model: TableAdapter) -> Any:
    import skl2onnx
    from skl2onnx.common.data_types import FloatTensorType

    width = len(model.spec.names) if model.spec else 0
    last = model.classifier.steps[-1][1] if hasattr(model.classifier, "steps") else model.classifier
    try:
        with warnings.catch_warnings(), _allow_booleans():
            warnings.simplefilter("ignore")
            return skl2onnx.to_onnx(
                model.classifier,
                initial_types=[(ONNX_INPUT, FloatTensorType([None, width]))],
                options={id(last): {"zipmap": False}},
                target_opset=_OPSETS,
            )
    except Exception as exc:  # skl2onnx raises errors of many classes for what it cannot convert
        words = " ".join(str(exc).split())[:200] or type(exc).__name__
        raise UsageError(
            f"model {model.key} cannot be exported: skl2onnx does not convert {type(last).__name__}: {words}"
        ) from exc


@contextmanager
def _allow_booleans() -> Iterator[None]:
    """Write booleans in attributes as 0 and 1: skl2onnx 1.20 hands them on, protobuf 7 refuses them."""
    from skl2onnx.common import _container

    make_node = _container.make_node

    def convert(*args: Any, **attributes: Any) -> Any:
        plain = {
            name: [int(v) if isinstance(v, bool | np.bool_) else v for v in value] if isinstance(value, list) else value
            for name, value in attributes.items()
        }
        return make_node(*args, **plain)

    _container.make_node = convert
    try:
        yield
    finally:
        _container.make_node = make_node


def _keep_needed_nodes(nodes: Any, output: str) -> list[Any]:
    """Return the operators that an output depends on, in their order."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    return kept[::-1]


def _build_imputation(model: TableAdapter) -> tuple[list[Any], dict[str, Any]]:
    """Return the operators and constants that fill missing values."""
    from onnx import helper

    if model.fill is None:
        return [helper.make_node("Identity", [ONNX_INPUT], ["phasewatch.filled"])], {}
    nodes = [
        helper.make_node("IsInf", [ONNX_INPUT], ["phasewatch.infinite"]),
        helper.make_node("IsNaN", [ONNX_INPUT], ["phasewatch.absent"]),
        helper.make_node("Not", ["phasewatch.infinite"], ["phasewatch.bounded"]),
        helper.make_node("Not", ["phasewatch.absent"], ["phasewatch.present"]),
        helper.make_node("And", ["phasewatch.bounded", "phasewatch.present"], ["phasewatch.finite"]),
        helper.make_node("Where", ["phasewatch.finite", ONNX_INPUT, "phasewatch.fill"], ["phasewatch.filled"]),
    ]
    return nodes, {"phasewatch.fill": model.fill.astype(np.float32)}


def _to_little(values: Any) -> Any:
    """Return an array in little-endian order, as the file holds it."""
    return values.astype(values.dtype.newbyteorder("<"))
