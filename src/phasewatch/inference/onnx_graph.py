"""Check the operators of an ONNX graph and infer the shape of every tensor before it runs.

Shapes are inferred for one window and for a batch of `ONNX_BATCH` windows, the largest batch that is ever run. This
bounds the memory and time of an untrusted graph. Source: ONNX operators, opset 15 to 20.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.inference.onnx_trees import check_onnx_trees
from phasewatch.metrics import N_CLASSES
from phasewatch.models.checkpoint import MAX_MAGNITUDE

__all__ = [
    "ALLOWED_OPERATORS",
    "MAX_GRAPH_ELEMENTS",
    "MAX_WINDOW_PRODUCTS",
    "ONNX_BATCH",
    "ONNX_BOOL",
    "ONNX_DOUBLE",
    "ONNX_FLOAT",
    "ONNX_INT64",
    "USER_OPERATORS",
    "OnnxNode",
    "OnnxTensor",
    "check_graph",
]

ONNX_FLOAT, ONNX_INT64, ONNX_BOOL, ONNX_DOUBLE = 1, 7, 9, 11
ONNX_BATCH = 64
# Of all tensors together at `ONNX_BATCH` windows: a transformer of width 1,024 needs this many.
MAX_GRAPH_ELEMENTS = 2**26
MAX_WINDOW_PRODUCTS = 2**30  # multiplications for each window
_FLOAT_TYPES = (ONNX_FLOAT, ONNX_DOUBLE)
_MAX_DILATION = 64

_COMMON_OPERATORS = frozenset(
    {
        "Abs",
        "Add",
        "And",
        "Cast",
        "Clip",
        "Concat",
        "Div",
        "Gemm",
        "IsInf",
        "IsNaN",
        "Log",
        "Mul",
        "Not",
        "Sign",
        "Softmax",
        "Sqrt",
        "Where",
        "Gelu",
    }
)
_RECURRENT_OPERATORS = _COMMON_OPERATORS | frozenset(
    {"Shape", "Transpose", "MatMul", "Expand", "Slice", "Reshape", "ReduceMean", "Gather"}
)
ALLOWED_OPERATORS: Mapping[str, frozenset[tuple[str, str]]] = {
    "gbt": frozenset(
        {("ai.onnx.ml", "TreeEnsembleClassifier"), *(("", name) for name in ("Cast", "Add", "Div", "Softmax"))}
    ),
    **{
        key: frozenset(("", name) for name in names)
        for key, names in {
            "mlp": _COMMON_OPERATORS,
            "cnn": _COMMON_OPERATORS | {"Conv", "InstanceNormalization", "Reshape", "Shape", "ReduceMean", "ReduceMax"},
            "tcn": _COMMON_OPERATORS
            | {"Conv", "InstanceNormalization", "Reshape", "Shape", "Slice", "ReduceMean", "ReduceMax"},
            "gru": _RECURRENT_OPERATORS | {"GRU"},
            "lstm": _RECURRENT_OPERATORS | {"LSTM"},
            "transformer": _COMMON_OPERATORS
            | {"Transpose", "MatMul", "LayerNormalization", "Reshape", "Gather", "ReduceMean"},
        }.items()
    },
}
_TABLE_OPERATORS = frozenset({"TreeEnsembleClassifier", "Scaler", "LinearClassifier", "Normalizer"})
# A user's model may consist of every operator that any model has, and of those of a few classifiers.
USER_OPERATORS = frozenset().union(
    *ALLOWED_OPERATORS.values(),
    {("", name) for name in ("Exp", "Identity", "Neg", "Relu", "Sigmoid", "Sub", "Tanh")},
    {("ai.onnx.ml", name) for name in _TABLE_OPERATORS},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxTensor:
    """A tensor of a graph: type, shape, and values if they are known before it runs."""

    type: int
    shape: tuple[int, ...]
    values: NDArray[Any] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxNode:
    """An operator; `type` is its domain and name."""

    type: tuple[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


def check_graph(
    nodes: tuple[OnnxNode, ...], constants: Mapping[str, OnnxTensor], *, model: str, shape: tuple[int, ...]
) -> None:
    """Check a graph against what the exporter writes for a model.

    Args:
        nodes: Operators in order.
        constants: Constants by name.
        model: Key of the model; one that is not built in is a user's.
        shape: Shape of one window: ``(f,)`` or ``(c, t)``.

    Raises:
        ValueError: If an operator or attribute is not the exporter's, an input is missing, a shape does not fit, the
            output is not five numbers for each window, or the graph would use too much memory or time.
    """
    allowed = ALLOWED_OPERATORS.get(model, USER_OPERATORS)
    for node in nodes:
        if node.type not in allowed:
            domain, name = node.type
            raise ValueError(f"operator {name[:40]!r} of {domain[:40] or 'ai.onnx'!r} is not in an export of {model}")
    for n in (1, ONNX_BATCH):
        _infer_shapes(nodes, constants, (n, *shape))


def _infer_shapes(nodes: tuple[OnnxNode, ...], constants: Mapping[str, OnnxTensor], shape: tuple[int, ...]) -> None:
    """Infer every shape from the shape of the input."""
    n = shape[0]
    known: dict[str, OnnxTensor] = {**constants, "x": OnnxTensor(type=ONNX_FLOAT, shape=shape)}
    elements = products = 0
    for node in nodes:
        op = _OperatorShape(node, known)
        outputs = op.infer()
        products += op.products
        if len(node.outputs) != len(outputs) or any(not name or name in known for name in node.outputs):
            raise ValueError(f"{op.name}: {len(node.outputs)} outputs, or one whose name is taken")
        for name, tensor in zip(node.outputs, outputs, strict=True):
            elements += tensor.size
            if elements > MAX_GRAPH_ELEMENTS or products > n * MAX_WINDOW_PRODUCTS:
                raise ValueError(f"{op.name}: {n} windows would take {elements:,} numbers and {products:,} products")
            known[name] = tensor
    answer = known.get("probabilities")
    if answer is None or "probabilities" in constants or (answer.type, answer.shape) != (ONNX_FLOAT, (n, N_CLASSES)):
        raise ValueError(f"its answer is not float32 of shape (n, {N_CLASSES})")


class _OperatorShape:
    """An operator whose output shape is being inferred."""

    def __init__(self, node: OnnxNode, known: Mapping[str, OnnxTensor]) -> None:
        self.name, self.node, self.products = node.type[1], node, 0
        self._inputs: list[OnnxTensor | None] = []
        for name in node.inputs:
            if name and name not in known:
                raise ValueError(f"{self.name}: input {name[:40]!r} is not there")
            self._inputs.append(known[name] if name else None)
        self._unread = set(node.attributes)

    def infer(self) -> list[OnnxTensor]:
        found = _SHAPE_RULES[self.name](self)
        if self._unread:
            raise ValueError(f"{self.name}: attribute {min(self._unread)[:40]!r} is not one of the exporter's")
        return found

    def build_error(self, words: str) -> ValueError:
        shapes = ", ".join("none" if t is None else str(t.shape) for t in self._inputs)
        return ValueError(f"{self.name}: {words} (inputs: {shapes[:120]})")

    def inputs(self, least: int, most: int | None = None) -> list[OnnxTensor]:
        """Return the inputs; none of them may be left out."""
        if not least <= len(self._inputs) <= (most or least):
            raise self.build_error(f"{len(self._inputs)} inputs")
        found = [tensor for tensor in self._inputs if tensor is not None]
        if len(found) != len(self._inputs):
            raise self.build_error("an input is left out")
        return found

    def floats(self, least: int, most: int | None = None) -> list[OnnxTensor]:
        """Return the inputs, all of one floating type."""
        found = self.inputs(least, most)
        if found[0].type not in _FLOAT_TYPES or any(t.type != found[0].type for t in found):
            raise self.build_error("inputs of other types")
        return found

    def attribute(self, name: str, allowed: object, default: Any = None) -> Any:
        """Return an attribute that is one of `allowed`, or for a class any value of it."""
        self._unread.discard(name)
        value = self.node.attributes.get(name, default)
        fits = isinstance(value, allowed) if isinstance(allowed, type) else value in allowed  # type: ignore[operator]
        if isinstance(value, np.ndarray) or not fits:
            raise self.build_error(f"attribute {name} is {str(value)[:40]}")
        return value

    def ints(self, name: str) -> list[int]:
        """Return an attribute that is a short list of whole numbers."""
        self._unread.discard(name)
        value = self.node.attributes.get(name)
        if not isinstance(value, np.ndarray) or value.dtype != np.int64 or len(value) > 8:
            raise self.build_error(f"attribute {name} is no short list of whole numbers")
        return [int(v) for v in value]

    def numbers(self, name: str) -> NDArray[np.float32]:
        """Return an attribute that is a list of finite numbers."""
        self._unread.discard(name)
        value = self.node.attributes.get(name)
        if not isinstance(value, np.ndarray) or value.dtype != np.dtype("<f4"):
            raise self.build_error(f"attribute {name} is no list of numbers")
        if not (np.abs(value) <= MAX_MAGNITUDE).all():
            raise self.build_error(f"attribute {name} holds a number that is not finite or above {MAX_MAGNITUDE:g}")
        return value

    def constant(self, tensor: OnnxTensor, *, rank: int = 1) -> list[int]:
        """Return the whole numbers of an input that are known before it runs."""
        if tensor.type != ONNX_INT64 or tensor.values is None or len(tensor.shape) > rank or tensor.size > 8:
            raise self.build_error("a shape, axis or place is not known before it runs")
        return [int(v) for v in tensor.values.reshape(-1)]

    def axis(self, value: int, rank: int) -> int:
        """Return an axis counted from the front."""
        if not -rank <= value < rank:
            raise self.build_error(f"axis {value} of {rank}")
        return value % rank

    def broadcast(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the broadcast shape of several."""
        try:
            return np.broadcast_shapes(*shapes)
        except ValueError as exc:
            raise self.build_error("shapes that do not fit") from exc


def _build_int_tensor(values: list[int]) -> OnnxTensor:
    return OnnxTensor(type=ONNX_INT64, shape=(len(values),), values=np.array(values, np.int64))


def _infer_unary(op: _OperatorShape) -> list[OnnxTensor]:
    (x,) = op.floats(1)
    return [OnnxTensor(type=x.type, shape=x.shape)]


def _infer_gelu(op: _OperatorShape) -> list[OnnxTensor]:
    op.attribute("approximate", (b"none", b"tanh"), b"none")
    return _infer_unary(op)


def _infer_binary(op: _OperatorShape) -> list[OnnxTensor]:
    a, b = op.inputs(2)
    if op.name == "Mul" and a.type == b.type == ONNX_INT64:  # of sizes, known before it runs
        (left,), (right,) = op.constant(a), op.constant(b)
        return [_build_int_tensor([max(-1, min(left * right, MAX_GRAPH_ELEMENTS))])]
    op.floats(2)
    return [OnnxTensor(type=a.type, shape=op.broadcast(a.shape, b.shape))]


def _infer_predicate(op: _OperatorShape) -> list[OnnxTensor]:
    (x,) = op.floats(1)
    return [OnnxTensor(type=ONNX_BOOL, shape=x.shape)]


def _infer_logic(op: _OperatorShape) -> list[OnnxTensor]:
    found = op.inputs(1 if op.name == "Not" else 2)
    if any(t.type != ONNX_BOOL for t in found):
        raise op.build_error("inputs that are neither true nor false")
    return [OnnxTensor(type=ONNX_BOOL, shape=op.broadcast(*(t.shape for t in found)))]


def _infer_where(op: _OperatorShape) -> list[OnnxTensor]:
    test, a, b = op.inputs(3)
    if test.type != ONNX_BOOL or a.type not in _FLOAT_TYPES or a.type != b.type:
        raise op.build_error("inputs of other types")
    return [OnnxTensor(type=a.type, shape=op.broadcast(test.shape, a.shape, b.shape))]


def _infer_cast(op: _OperatorShape) -> list[OnnxTensor]:
    (x,) = op.inputs(1)
    if x.type not in (*_FLOAT_TYPES, ONNX_BOOL):
        raise op.build_error("an input of another type")
    return [OnnxTensor(type=op.attribute("to", _FLOAT_TYPES), shape=x.shape)]


def _infer_clip(op: _OperatorShape) -> list[OnnxTensor]:
    x, low, high = op.floats(3)
    if low.shape or high.shape:
        raise op.build_error("limits that are not one number")
    return [OnnxTensor(type=x.type, shape=x.shape)]


def _infer_concat(op: _OperatorShape) -> list[OnnxTensor]:
    found = op.inputs(2, 6)
    rank = len(found[0].shape)
    axis = op.axis(op.attribute("axis", int), rank) if rank else 0
    if rank == 0 or any(
        t.type != found[0].type or len(t.shape) != rank or _drop_axis(t, axis) != _drop_axis(found[0], axis)
        for t in found
    ):
        raise op.build_error("inputs that do not fit")
    if found[0].type == ONNX_INT64:
        return [_build_int_tensor([v for t in found for v in op.constant(t)][:9])]
    shape = list(found[0].shape)
    shape[axis] = sum(t.shape[axis] for t in found)
    return [OnnxTensor(type=found[0].type, shape=tuple(shape))]


def _drop_axis(tensor: OnnxTensor, axis: int) -> tuple[int, ...]:
    return tensor.shape[:axis] + tensor.shape[axis + 1 :]


def _infer_gemm(op: _OperatorShape) -> list[OnnxTensor]:
    a, b, c = op.floats(3)
    op.attribute("alpha", (1.0,), 1.0), op.attribute("beta", (1.0,), 1.0), op.attribute("transA", (0,), 0)
    turned = op.attribute("transB", (0, 1), 0)
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise op.build_error("inputs that are no tables")
    inner, outer = b.shape[::-1] if turned else b.shape
    if a.shape[1] != inner or c.shape != (outer,):
        raise op.build_error("inputs that do not fit")
    op.products = a.shape[0] * inner * outer
    return [OnnxTensor(type=a.type, shape=(a.shape[0], outer))]


def _infer_matmul(op: _OperatorShape) -> list[OnnxTensor]:
    a, b = op.floats(2)
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[-1] != b.shape[-2]:
        raise op.build_error("inputs that do not fit")
    shape = (*op.broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    op.products = prod(shape) * a.shape[-1]
    return [OnnxTensor(type=a.type, shape=shape)]


def _infer_conv(op: _OperatorShape) -> list[OnnxTensor]:
    x, w, b = op.floats(3)
    op.attribute("group", (1,), 1), op.attribute("auto_pad", (b"NOTSET",), b"NOTSET")
    if len(x.shape) != 3 or len(w.shape) != 3 or x.shape[1] != w.shape[1] or b.shape != w.shape[:1]:
        raise op.build_error("inputs that do not fit")
    width, pads = w.shape[2], op.ints("pads")
    dilations = op.ints("dilations")
    if op.ints("strides") != [1] or op.ints("kernel_shape") != [width]:
        raise op.build_error("steps or a kernel that no export has")
    if len(dilations) != 1 or not 1 <= dilations[0] <= _MAX_DILATION:
        raise op.build_error("a dilation that no export has")
    reach = dilations[0] * (width - 1)
    length = x.shape[2] + sum(pads) - reach
    if len(pads) != 2 or not all(0 <= pad <= reach for pad in pads) or length < 1:
        raise op.build_error("edges that no export has")
    op.products = x.shape[0] * length * prod(w.shape)
    return [OnnxTensor(type=x.type, shape=(x.shape[0], w.shape[0], length))]


def _infer_instance_norm(op: _OperatorShape) -> list[OnnxTensor]:
    x, scale, bias = op.floats(3)
    if (
        not 0.0 < op.attribute("epsilon", float) < 1.0
        or len(x.shape) != 3
        or not scale.shape == bias.shape == x.shape[1:2]
    ):
        raise op.build_error("inputs that do not fit")
    return [OnnxTensor(type=x.type, shape=x.shape)]


def _infer_layer_norm(op: _OperatorShape) -> list[OnnxTensor]:
    x, scale, bias = op.floats(3)
    op.attribute("axis", (-1,), -1), op.attribute("stash_type", (1,), 1)
    if not 0.0 < op.attribute("epsilon", float) < 1.0 or not x.shape or not scale.shape == bias.shape == x.shape[-1:]:
        raise op.build_error("inputs that do not fit")
    return [OnnxTensor(type=x.type, shape=x.shape)]


def _infer_reshape(op: _OperatorShape) -> list[OnnxTensor]:
    x, wanted = op.inputs(2)
    sizes, keeps = op.constant(wanted), not op.attribute("allowzero", (0, 1), 0)
    shape = [x.shape[i] if size == 0 and keeps and i < len(x.shape) else size for i, size in enumerate(sizes)]
    free = [i for i, size in enumerate(shape) if size == -1]
    if len(free) > 1 or any(size < 1 for size in shape if size != -1) or len(shape) > 6:
        raise op.build_error(f"shape {sizes}")
    if free:
        rest = -prod(shape)
        shape[free[0]] = x.size // rest
    if prod(shape) != x.size:
        raise op.build_error(f"shape {sizes}")
    return [OnnxTensor(type=x.type, shape=tuple(shape), values=None if x.values is None else x.values.reshape(shape))]


def _infer_shape(op: _OperatorShape) -> list[OnnxTensor]:
    (x,) = op.inputs(1)
    return [_build_int_tensor(list(x.shape[op.attribute("start", int, 0) : op.attribute("end", int, len(x.shape))]))]


def _infer_slice(op: _OperatorShape) -> list[OnnxTensor]:
    x, *rest = op.inputs(3, 5)
    starts, ends = (op.constant(t) for t in rest[:2])
    axes = op.constant(rest[2]) if len(rest) >= 3 else list(range(len(starts)))
    if len(rest) == 4 and op.constant(rest[3]) != [1]:
        raise op.build_error("a step other than 1")
    if not len(starts) == len(ends) == len(axes) == 1 or not x.shape:
        raise op.build_error("more than one cut")
    axis = op.axis(axes[0], len(x.shape))
    kept = range(x.shape[axis])[starts[0] : ends[0]]
    if not len(kept):
        raise op.build_error("nothing is left")
    if x.values is not None:
        return [_build_int_tensor(op.constant(x)[kept.start : kept.stop])]
    return [OnnxTensor(type=x.type, shape=(*x.shape[:axis], len(kept), *x.shape[axis + 1 :]))]


def _infer_gather(op: _OperatorShape) -> list[OnnxTensor]:
    x, places = op.inputs(2)
    axis = op.axis(op.attribute("axis", int, 0), len(x.shape)) if x.shape else 0
    if x.type not in _FLOAT_TYPES or not x.shape:
        raise op.build_error("an input of another type")
    for place in op.constant(places):
        op.axis(place, x.shape[axis])
    return [OnnxTensor(type=x.type, shape=(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :]))]


def _infer_expand(op: _OperatorShape) -> list[OnnxTensor]:
    x, wanted = op.inputs(2)
    sizes = op.constant(wanted)
    if x.type not in _FLOAT_TYPES or x.size != 1 or len(sizes) > 6 or any(size < 1 for size in sizes):
        raise op.build_error(f"shape {sizes}")
    return [OnnxTensor(type=x.type, shape=op.broadcast(x.shape, tuple(sizes)))]


def _infer_transpose(op: _OperatorShape) -> list[OnnxTensor]:
    (x,) = op.inputs(1)
    order = op.ints("perm")
    if x.type not in _FLOAT_TYPES or sorted(order) != list(range(len(x.shape))):
        raise op.build_error(f"order {order}")
    return [OnnxTensor(type=x.type, shape=tuple(x.shape[i] for i in order))]


def _infer_softmax(op: _OperatorShape) -> list[OnnxTensor]:
    (x,) = op.floats(1)
    op.axis(op.attribute("axis", int, -1), len(x.shape))
    return [OnnxTensor(type=x.type, shape=x.shape)]


def _infer_reduce(op: _OperatorShape) -> list[OnnxTensor]:
    x, wanted = op.inputs(2)
    axes = [op.axis(axis, len(x.shape)) for axis in op.constant(wanted)]
    op.attribute("noop_with_empty_axes", (0,), 0)
    if x.type not in _FLOAT_TYPES or len(axes) != 1 or op.attribute("keepdims", (0, 1), 1):
        raise op.build_error(f"axes {axes}")
    return [OnnxTensor(type=x.type, shape=_drop_axis(x, axes[0]))]


def _build_recurrent_rule(gates: int, states: int) -> Callable[[_OperatorShape], list[OnnxTensor]]:
    """Return the shape rule of a recurrent operator with a number of gates and of initial states."""

    def rule(op: _OperatorShape) -> list[OnnxTensor]:
        op.attribute("direction", (b"forward",), b"forward"), op.attribute("layout", (0,), 0)
        if gates == 3:
            op.attribute("linear_before_reset", (1,))
        else:
            op.attribute("input_forget", (0,), 0)
        width = op.attribute("hidden_size", int)
        found = op._inputs
        if len(found) != 5 + states or found[4] is not None or any(t is None for i, t in enumerate(found) if i != 4):
            raise op.build_error(f"{len(found)} inputs")
        x, w, r, b, *first = [t for t in found if t is not None]
        if len(x.shape) != 3 or any(t.type != ONNX_FLOAT for t in (x, w, r, b, *first)):
            raise op.build_error("inputs of other types")
        length, n, inputs = x.shape
        expected = [(1, gates * width, inputs), (1, gates * width, width), (1, 2 * gates * width)]
        if [w.shape, r.shape, b.shape] != expected or any(t.shape != (1, n, width) for t in first):
            raise op.build_error("inputs that do not fit")
        op.products = length * n * gates * width * (inputs + width)
        return [OnnxTensor(type=ONNX_FLOAT, shape=(length, 1, n, width))]

    return rule


def _infer_trees(op: _OperatorShape) -> list[OnnxTensor]:
    (x,) = op.floats(1)
    if x.type != ONNX_FLOAT or len(x.shape) != 2:
        raise op.build_error("an input that is no table of float32")
    op._unread.clear()
    classes = check_onnx_trees(op.node.attributes, x.shape[1])
    # At most the nodes of all trees for each window.
    op.products = x.shape[0] * len(op.node.attributes["nodes_values"])
    return _build_classifier_outputs(x, classes)


def _build_classifier_outputs(x: OnnxTensor, classes: int) -> list[OnnxTensor]:
    """Return the labels, which nothing reads, and one score for each class."""
    n = x.shape[0]
    return [OnnxTensor(type=ONNX_INT64, shape=(n,)), OnnxTensor(type=ONNX_FLOAT, shape=(n, classes))]


def _infer_scaler(op: _OperatorShape) -> list[OnnxTensor]:
    (x,) = op.floats(1)
    if (
        x.type != ONNX_FLOAT
        or len(x.shape) != 2
        or any(len(op.numbers(name)) not in (1, x.shape[1]) for name in ("offset", "scale"))
    ):
        raise op.build_error("not one offset and scale for each column of a table")
    return [OnnxTensor(type=x.type, shape=x.shape)]


def _infer_linear_classifier(op: _OperatorShape) -> list[OnnxTensor]:
    (x,) = op.floats(1)
    op.attribute("multi_class", (0, 1), 0)
    op.attribute("post_transform", (b"NONE", b"SOFTMAX", b"LOGISTIC"), b"NONE")
    labels = op.ints("classlabels_ints")
    if x.type != ONNX_FLOAT or len(x.shape) != 2 or not 2 <= len(labels) <= N_CLASSES:
        raise op.build_error("an input that is no table, or another number of classes")
    classes, width = len(labels), x.shape[1]
    if labels != list(range(classes)) or (len(op.numbers("coefficients")), len(op.numbers("intercepts"))) != (
        classes * width,
        classes,
    ):
        raise op.build_error("coefficients that do not fit")
    op.products = prod(x.shape) * classes
    return _build_classifier_outputs(x, classes)


def _infer_normalizer(op: _OperatorShape) -> list[OnnxTensor]:
    (x,) = op.floats(1)
    op.attribute("norm", (b"L1", b"L2", b"MAX"))
    if x.type != ONNX_FLOAT or len(x.shape) != 2:
        raise op.build_error("an input that is no table of float32")
    return [OnnxTensor(type=x.type, shape=x.shape)]


_SHAPE_RULES: Mapping[str, Callable[[_OperatorShape], list[OnnxTensor]]] = {
    **dict.fromkeys(("Abs", "Exp", "Identity", "Log", "Neg", "Relu", "Sigmoid", "Sign", "Sqrt", "Tanh"), _infer_unary),
    **dict.fromkeys(("Add", "Mul", "Div", "Sub"), _infer_binary),
    **dict.fromkeys(("IsInf", "IsNaN"), _infer_predicate),
    **dict.fromkeys(("And", "Not"), _infer_logic),
    **dict.fromkeys(("ReduceMean", "ReduceMax"), _infer_reduce),
    "Gelu": _infer_gelu,
    "Where": _infer_where,
    "Cast": _infer_cast,
    "Clip": _infer_clip,
    "Concat": _infer_concat,
    "Gemm": _infer_gemm,
    "MatMul": _infer_matmul,
    "Conv": _infer_conv,
    "InstanceNormalization": _infer_instance_norm,
    "LayerNormalization": _infer_layer_norm,
    "Reshape": _infer_reshape,
    "Shape": _infer_shape,
    "Slice": _infer_slice,
    "Gather": _infer_gather,
    "Expand": _infer_expand,
    "Transpose": _infer_transpose,
    "Softmax": _infer_softmax,
    "GRU": _build_recurrent_rule(3, 1),
    "LSTM": _build_recurrent_rule(4, 2),
    "TreeEnsembleClassifier": _infer_trees,
    "Scaler": _infer_scaler,
    "LinearClassifier": _infer_linear_classifier,
    "Normalizer": _infer_normalizer,
}
