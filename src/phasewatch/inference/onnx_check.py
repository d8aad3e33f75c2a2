"""Check an ONNX file before a runtime parses it: only what the exporter writes is allowed.

An ONNX file is a protocol-buffers message. It may contain infinite loops, weights in other files, and operators of
other libraries. This check allows the exporter's fields, operators, attributes, and tensors of known size alone.
Source: onnx.proto of ONNX 1.18.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.errors import RunError
from phasewatch.inference.onnx_graph import ONNX_FLOAT, OnnxNode, OnnxTensor, check_graph
from phasewatch.inference.protobuf import MessageShape, WireType, parse_message, parse_varints, read_varint
from phasewatch.metrics import N_CLASSES

__all__ = [
    "MAX_ONNX_BYTES",
    "ONNX_INPUT",
    "ONNX_OUTPUT",
    "check_onnx",
]

ONNX_INPUT, ONNX_OUTPUT = "x", "probabilities"
_TREES_MODEL = "gbt"
MAX_ONNX_BYTES = 64 * 2**20
MAX_GRAPH_NODES, MAX_INITIALIZERS, MAX_ATTRIBUTES, MAX_DIMENSIONS = 512, 512, 20, 6
MAX_TENSOR_ELEMENTS = 16 * 2**20  # of one tensor
_ORT_MARK = b"ORTM"  # a runtime takes a file with it at byte 4 for its own format
_OPSETS = {"": range(13, 27), "ai.onnx.ml": range(1, 4)}
_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 7: np.dtype("<i8"), 11: np.dtype("<f8")}

_V, _B, _F = WireType.VARINT, WireType.BYTES, WireType.FIXED32
_MODEL = MessageShape(
    "model",
    {1: _V, 2: _B, 3: _B, 4: _B, 5: _V, 6: _B, 7: _B},
    {8: _B},
    {20: "it brings training steps of its own", 25: "it brings functions of its own"},
)
_OPSET = MessageShape("operator set", {1: _B, 2: _V})
_GRAPH = MessageShape("graph", {2: _B, 10: _B}, {1: _B, 5: _B, 11: _B, 12: _B})
_NODE = MessageShape("operator", {3: _B, 4: _B, 6: _B, 7: _B}, {1: _B, 2: _B, 5: _B})
_TENSOR = MessageShape(
    "tensor",
    {2: _V, 8: _B, 9: _B, 12: _B},
    {1: _V},
    dict.fromkeys((13, 14), "its weights lie in another file"),
)
_VALUE = MessageShape("value", {1: _B, 2: _B, 3: _B})
_TYPE = MessageShape("type", {1: _B})
_TENSOR_TYPE = MessageShape("tensor type", {1: _V, 2: _B})
_SHAPE = MessageShape("shape", {}, {1: _B})
_DIMENSION = MessageShape("dimension", {1: _V, 2: _B})
_ATTRIBUTE = MessageShape(
    "attribute",
    {1: _B, 2: _F, 3: _V, 4: _B, 13: _B, 20: _V},
    {},
    dict.fromkeys((6, 11), "an operator holds a graph of its own"),
)
_KIND_FLOAT, _KIND_INT, _KIND_TEXT, _KIND_FLOATS, _KIND_INTS, _KIND_TEXTS = 1, 2, 3, 6, 7, 8
_LIST_KINDS = {7: _KIND_FLOATS, 8: _KIND_INTS, 9: _KIND_TEXTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxGraph:
    """A parsed graph: operators in order, constants by name."""

    nodes: tuple[OnnxNode, ...]
    constants: dict[str, OnnxTensor]
    opsets: dict[str, int]


def check_onnx(data: bytes, *, file: str, model: str, shape: tuple[int, ...]) -> None:
    """Raise RunError unless a file is an ONNX model as phasewatch's exporter writes it.

    Args:
        data: Bytes of the file.
        file: Its name, for messages.
        model: Key of the model, which determines the allowed operators; a key that is not built in is a user's model.
        shape: Shape of one window: ``(f,)`` or ``(c, t)``.
    """
    try:
        if len(data) > MAX_ONNX_BYTES:
            raise ValueError(f"{len(data):,} bytes, at most {MAX_ONNX_BYTES:,} are read")
        graph = _parse_onnx(data, shape)
        if model == _TREES_MODEL:
            _check_own_trees(graph.nodes)
        check_graph(graph.nodes, graph.constants, model=model, shape=shape)
    except ValueError as exc:  # UnicodeDecodeError is one
        raise RunError(
            f"{file}: not a model that phasewatch exports: {exc}; "
            "export it again with `phasewatch export RUN --out X.zip`"
        ) from None


def _check_own_trees(nodes: Sequence[OnnxNode]) -> None:
    """Raise ValueError unless there is one operator of trees, of five classes, whose sums are left as they are."""
    found = [node for node in nodes if node.type[1] == "TreeEnsembleClassifier"]
    if len(found) != 1 or found[0].inputs != (ONNX_INPUT,):
        raise ValueError(f"trees: {len(found)} operators, expected one of the windows")
    labels = found[0].attributes.get("classlabels_int64s")
    if found[0].attributes.get("post_transform") != b"NONE" or len(labels if labels is not None else ()) != N_CLASSES:
        raise ValueError("trees: their sums are transformed, or not of five classes")
    if extra := {"base_values", "nodes_hitrates"} & set(found[0].attributes):
        raise ValueError(f"trees: attribute {min(extra)} is not one of the exporter's")


def _parse_onnx(data: bytes, shape: tuple[int, ...]) -> OnnxGraph:
    """Parse a model whose graph has the one input `x` and the one output `probabilities`.

    Raises:
        ValueError: At the first difference from an export.
    """
    if data[4:8] == _ORT_MARK:
        raise ValueError("it looks like another format of the runtime")
    model = parse_message(memoryview(data), _MODEL, limit=64)
    opsets: dict[str, int] = {}
    for part in model.repeated(8):
        opset = parse_message(part, _OPSET)
        domain, version = opset.text(1), opset.number(2)
        if domain not in _OPSETS or domain in opsets or version not in _OPSETS[domain]:
            raise ValueError(f"it needs version {version} of the operators of {domain[:60]!r}, or names them twice")
        opsets[domain] = version
    if "" not in opsets or not model.has(7) or not 7 <= model.number(1) <= 13:
        raise ValueError("it has no graph, no operators or another version")
    for field in (2, 3, 4):
        model.text(field)
    if model.data(6):
        raise ValueError("it holds a text that the exporter does not write")
    graph = parse_message(model.data(7), _GRAPH, limit=MAX_GRAPH_NODES + MAX_INITIALIZERS + 16)
    graph.text(2)
    if graph.data(10) or len(graph.repeated(1)) > MAX_GRAPH_NODES or len(graph.repeated(5)) > MAX_INITIALIZERS:
        raise ValueError(f"it holds a text, more than {MAX_GRAPH_NODES} operators or {MAX_INITIALIZERS} tensors")
    _check_value_info(graph.repeated(11), ONNX_INPUT, shape)
    _check_value_info(graph.repeated(12), ONNX_OUTPUT, (5,))
    constants: dict[str, OnnxTensor] = {}
    for part in graph.repeated(5):
        name, tensor = _parse_tensor(part)
        if not name or name in constants or name in (ONNX_INPUT, ONNX_OUTPUT):
            raise ValueError(f"tensor {name[:40]!r} is there twice, or has no name of its own")
        constants[name] = tensor
    return OnnxGraph(nodes=tuple(map(_parse_node, graph.repeated(1))), constants=constants, opsets=opsets)


def _check_value_info(values: list[memoryview], name: str, shape: tuple[int, ...]) -> None:
    """Check the name, type and shape of the graph's input or output; its first size is free."""
    if len(values) != 1:
        raise ValueError(f"it has {len(values)} inputs or outputs, expected one")
    value = parse_message(values[0], _VALUE)
    kind = parse_message(parse_message(value.data(2), _TYPE).data(1), _TENSOR_TYPE)
    sizes = [parse_message(part, _DIMENSION) for part in parse_message(kind.data(2), _SHAPE, limit=8).repeated(1)]
    if (
        value.text(1) != name
        or value.data(3)
        or kind.number(1) != ONNX_FLOAT
        or len(sizes) != len(shape) + 1
        or sizes[0].has(1)
        or [size.number(1, -1) for size in sizes[1:]] != list(shape)
        or any(size.has(2) for size in sizes[1:])
    ):
        raise ValueError(f"its {name} is not float32 of shape (n, {', '.join(map(str, shape))})")
    sizes[0].text(2)


def _parse_tensor(data: memoryview) -> tuple[str, OnnxTensor]:
    tensor = parse_message(data, _TENSOR, limit=32)
    sizes, dtype = tensor.numbers(1), _DTYPES.get(tensor.number(2))
    if dtype is None or len(sizes) > MAX_DIMENSIONS or any(not 1 <= size <= MAX_TENSOR_ELEMENTS for size in sizes):
        raise ValueError(f"a tensor of type {tensor.number(2)} and shape {str(sizes)[:60]}")
    if (count := prod(sizes)) > MAX_TENSOR_ELEMENTS or len(tensor.data(9)) != count * dtype.itemsize or tensor.data(12):
        raise ValueError(f"a tensor of shape {str(sizes)[:60]} has {len(tensor.data(9)):,} bytes")
    values: NDArray[Any] = np.frombuffer(tensor.data(9), dtype).reshape(sizes)
    # A phase that train never showed is ruled out by an infinite score; nothing else may be infinite.
    name = tensor.text(8)
    if dtype.kind == "f" and not (np.isfinite(values) | ((values == -np.inf) & (values.size == 5))).all():
        raise ValueError(f"tensor {name[:40]!r} holds a number that is not finite")
    return name, OnnxTensor(type=tensor.number(2), shape=tuple(sizes), values=values)


def _parse_node(data: memoryview) -> OnnxNode:
    node = parse_message(data, _NODE, limit=64)
    if node.data(6):
        raise ValueError("an operator holds a text that the exporter does not write")
    node.text(3)
    attributes: dict[str, Any] = {}
    for part in node.repeated(5):
        name, value = _parse_attribute(part)
        if name in attributes or len(attributes) >= MAX_ATTRIBUTES:
            raise ValueError(f"attribute {name[:40]!r} is there twice, or one of too many")
        attributes[name] = value
    return OnnxNode(
        type=(node.text(7), node.text(4)),
        inputs=tuple(_parse_name(part) for part in node.repeated(1)),
        outputs=tuple(_parse_name(part) for part in node.repeated(2)),
        attributes=attributes,
    )


def _parse_name(data: memoryview) -> str:
    if len(data) > 200:
        raise ValueError("a name of more than 200 bytes")
    return bytes(data).decode("utf-8")


def _parse_attribute(data: memoryview) -> tuple[str, Any]:
    """Return an attribute's name and its value: int, float, bytes, or an array of one of them.

    A list may hold a hundred thousand numbers, each behind its own tag. It is read in one go: name first or last,
    then the list's items one behind the other, as protobuf's writers put them.
    """
    head, items, tail = _split_attribute(data)
    attribute = parse_message(memoryview(bytes(head) + bytes(tail)), _ATTRIBUTE)
    name, kind = attribute.text(1), attribute.number(20)
    if attribute.data(13) or not name:
        raise ValueError("an attribute holds a text that the exporter does not write, or no name")
    single = {_KIND_FLOAT: 2, _KIND_INT: 3, _KIND_TEXT: 4}
    # proto2 writers may leave the other values out or write them as their default; ours leaves them out.
    if any(attribute.has(field) for field in single.values() if field != single.get(kind)):
        raise ValueError(f"attribute {name[:40]!r} has two values")
    if len(items):
        field = items[0] >> 3
        if _LIST_KINDS[field] != kind:
            raise ValueError(f"attribute {name[:40]!r} says that it is of type {kind}")
        return name, _parse_list(items, field)
    if kind == _KIND_FLOAT and attribute.has(2):
        return name, float(np.frombuffer(attribute.data(2), "<f4")[0])
    if kind == _KIND_INT and attribute.has(3):
        return name, attribute.number(3)
    if kind == _KIND_TEXT and attribute.has(4):
        return name, attribute.text(4).encode()
    raise ValueError(f"attribute {name[:40]!r} has no value of its type")


def _split_attribute(data: memoryview) -> tuple[memoryview, memoryview, memoryview]:
    """Split an attribute into the bytes before its list, the list, and the bytes after it."""
    at = 0
    while at < len(data) and data[at] >> 3 not in _LIST_KINDS:
        at = _find_field_end(data, at)
    if at == len(data):
        return data, data[:0], data[:0]
    # After the list come a text (13) and the type (20), at most a few bytes; they start with other tags.
    tag, start = data[at], at
    if tag == 0x3D:
        raw = np.frombuffer(data[at:], np.uint8)
        at += 5 * _count_leading(raw[::5] == tag)
    elif tag == 0x40:
        while at < len(data) and data[at] == tag:
            at = _find_varint_run_end(data, at)
    else:
        while at < len(data) and data[at] == tag:
            at = _find_field_end(data, at)
    if tag not in (0x3D, 0x40, 0x4A) or at > len(data):
        raise ValueError("a list is not written as it must be, or cut short")
    return data[:start], data[start:at], data[at:]


def _count_leading(mask: NDArray[np.bool_]) -> int:
    return len(mask) if mask.all() else int(np.argmin(mask))


def _find_varint_run_end(data: memoryview, at: int) -> int:
    """Return the end of a run of (tag, number) pairs, checked in bulk."""
    raw = np.frombuffer(data[at:], np.uint8)
    ends = np.flatnonzero(raw < 128)  # every tag of the run is a byte below 128, so every second end is a number's
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else np.zeros(0, np.intp)
    tags = starts[::2]
    good = _count_leading(raw[tags] == 0x40) if len(tags) else 0
    last = 2 * good - 1
    if good == 0 or last >= len(ends):
        raise ValueError("cut short")
    return at + int(ends[last]) + 1


def _find_field_end(data: memoryview, at: int) -> int:
    """Return the end of the field that starts at `at`."""
    tag, at = read_varint(data, at)
    wire = tag & 7
    if wire == 0:
        return read_varint(data, at)[1]
    size, at = read_varint(data, at) if wire == 2 else ({5: 4, 1: 8}.get(wire, len(data) + 1), at)
    if size > len(data) - at:
        raise ValueError("cut short, or a group")
    return at + size


def _parse_list(items: memoryview, field: int) -> NDArray[Any]:
    if field == 7:
        return np.ascontiguousarray(np.frombuffer(items, np.uint8).reshape(-1, 5)[:, 1:]).view("<f4")[:, 0]
    if field == 8:
        return parse_varints(items)[1::2].astype(np.int64)
    found, at = [], 0
    while at < len(items):
        size = items[at + 1]
        if size > 100:
            raise ValueError("a text of a list is too long")
        found.append(bytes(items[at + 2 : at + 2 + size]))
        at += 2 + size
    return np.array(found, object)
