"""What an exported model may hold: looked at byte by byte before a runtime's parser sees it.

An ONNX file is a protocol-buffers message. It may name files beside it as the home of its weights, and operators of
foreign libraries; a model that came from elsewhere gets neither. Source: onnx.proto of ONNX 1.18 (field numbers).
"""

from __future__ import annotations

from collections.abc import Iterator

from phasewatch.errors import RunError

INPUT, OUTPUT = "x", "probabilities"
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml"})
MAX_BYTES = 64 * 2**20
_MAX_DEPTH = 12

# Fields of the messages that are walked; what they hold otherwise is of no interest here.
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 20, 25
_OPSET_DOMAIN = 1
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_ATTRIBUTE, _NODE_DOMAIN = 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES = 22, 23
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14


def check_onnx(data: bytes, *, file: str) -> None:
    """Refuse what is no ONNX model, or one that reaches for other files, foreign operators or functions of its own.

    Raises:
        RunError: Naming the file and what it holds.
    """

    def refuse(words: str) -> RunError:
        return RunError(f"{file}: {words}; export it again with `phasewatch export RUN --out X.zip`")

    if len(data) > MAX_BYTES:
        raise refuse(f"{len(data):,} bytes, at most {MAX_BYTES:,} are read")
    try:
        words = _offence(memoryview(data))
    except (ValueError, IndexError, RecursionError) as exc:
        raise refuse(f"not an ONNX model ({exc or 'cut short'})") from None
    if words:
        raise refuse(words)


def _offence(model: memoryview) -> str:
    """Say what a model holds that it may not; empty if nothing."""
    has_graph = False
    for field, value in _fields(model):
        if field == _MODEL_OPSET:
            domain = _text(value, _OPSET_DOMAIN)
            if domain not in DOMAINS:
                return f"its operators come from the foreign domain {domain[:60]!r}"
        elif field in (_MODEL_FUNCTIONS, _MODEL_TRAINING):
            return "it brings functions or training steps of its own"
        elif field == _MODEL_GRAPH:
            has_graph = True
            if words := _graph_offence(value, 0):
                return words
    return "" if has_graph else "not an ONNX model (it has no graph)"


def _graph_offence(graph: memoryview, depth: int) -> str:
    if depth > _MAX_DEPTH:
        return f"its graphs stand in each other more than {_MAX_DEPTH} deep"
    for field, value in _fields(graph):
        words = ""
        if field == _GRAPH_INITIALIZER:
            words = _tensor_offence(value)
        elif field == _GRAPH_SPARSE:
            words = "it holds sparse tensors"
        elif field == _GRAPH_NODE:
            words = _node_offence(value, depth)
        if words:
            return words
    return ""


def _node_offence(node: memoryview, depth: int) -> str:
    for field, value in _fields(node):
        if field == _NODE_DOMAIN and (domain := bytes(value).decode("utf-8", "replace")) not in DOMAINS:
            return f"an operator comes from the foreign domain {domain[:60]!r}"
        if field != _NODE_ATTRIBUTE:
            continue
        for inner, part in _fields(value):
            words = ""
            if inner in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
                words = _tensor_offence(part)
            elif inner in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                words = _graph_offence(part, depth + 1)
            elif inner in (_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES):
                words = "it holds sparse tensors"
            if words:
                return words
    return ""


def _tensor_offence(tensor: memoryview) -> str:
    if any(field in (_TENSOR_EXTERNAL, _TENSOR_LOCATION) for field, _ in _fields(tensor)):
        return "its weights lie in another file"
    return ""


def _text(message: memoryview, wanted: int) -> str:
    return next((bytes(value).decode("utf-8", "replace") for field, value in _fields(message) if field == wanted), "")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Give the fields of a message in turn; a number's value is empty, for none that is a number is of interest."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        field, kind = key >> 3, key & 7
        if kind == 2:
            size, at = _varint(message, at)
            if size > len(message) - at:
                raise ValueError("cut short")
            yield field, message[at : at + size]
            at += size
            continue
        if kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError("no protocol buffers")
        if at > len(message):
            raise ValueError("cut short")
        yield field, message[:0]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
