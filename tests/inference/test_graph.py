"""An exported model is the model: same probabilities, nothing beside the file, nothing of the machine in it."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import numpy as np
import onnx
import pytest
from numpy.testing import assert_allclose
from onnx import TensorProto, helper
from tests.models.test_models import examples, fitted

from phasewatch.errors import MismatchError, RunError, UsageError
from phasewatch.inference.onnx_check import check_onnx
from phasewatch.inference.onnx_export import MAX_PARITY_ERROR, check_parity, run_onnx, to_onnx
from phasewatch.models.base import ModelInputs

EXPORTED = ("gbt", "mlp", "cnn", "gru", "lstm", "transformer", "tcn")


@cache
def exported(key: str, classes: int = 5):  # type: ignore[no-untyped-def]
    model = fitted(key, classes=classes)
    return model, to_onnx(model)


@pytest.mark.parametrize("key", EXPORTED)
def test_the_graph_gives_the_models_probabilities_with_gaps_and_without(key: str) -> None:
    model, data = exported(key)

    assert check_parity(model, data, examples(key, seed=3).inputs) <= MAX_PARITY_ERROR


@pytest.mark.parametrize("key", EXPORTED)
def test_the_graph_speaks_the_standard_operators_and_holds_nothing_of_the_machine(key: str) -> None:
    _, data = exported(key)
    proto = onnx.load_from_string(data)

    assert {opset.domain for opset in proto.opset_import} <= {"", "ai.onnx", "ai.onnx.ml"}
    assert not any(tensor.external_data for tensor in proto.graph.initializer)
    assert b"/root" not in data
    assert b".py" not in data
    assert [i.name for i in proto.graph.input] == ["x"]
    assert [o.name for o in proto.graph.output] == ["probabilities"]


@pytest.mark.parametrize("key", ["gbt", "mlp"])
def test_the_same_model_is_the_same_bytes(key: str) -> None:
    assert to_onnx(fitted(key)) == to_onnx(fitted(key))


@pytest.mark.parametrize("key", ["gbt", "mlp"])
def test_a_phase_never_seen_in_train_has_probability_zero(key: str) -> None:
    _, data = exported(key, classes=3)
    p = run_onnx(data, examples(key, seed=3).inputs.x)

    assert (p[:, 3:] == 0).all()
    assert_allclose(p.sum(axis=1), 1.0, atol=1e-6)


def test_parity_check_refuses_the_graph_of_another_model() -> None:
    model, _ = exported("mlp")
    other = to_onnx(fitted("mlp", seed=1))

    with pytest.raises(MismatchError, match="differs from it by"):
        check_parity(model, other, examples("mlp", seed=3).inputs)


def test_parity_check_needs_a_window() -> None:
    model, data = exported("mlp")
    none = examples("mlp", seed=3).inputs

    with pytest.raises(MismatchError, match="no window"):
        check_parity(model, data, ModelInputs(x=none.x[:0], spec=none.spec))


@pytest.mark.parametrize("key", ["minirocket", "levels_only"])
def test_a_baseline_is_not_exported(key: str) -> None:
    with pytest.raises(UsageError, match=f"{key} cannot be exported; gbt"):
        to_onnx(fitted(key))


def hostile(data: bytes, change: str) -> bytes:
    """An exported graph with one thing changed that no export has."""
    model = onnx.load_from_string(data)
    graph, first = model.graph, model.graph.node[0]
    weight = graph.initializer[0]
    if change == "weights in another file":
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        entry = weight.external_data.add()
        entry.key, entry.value = "location", "../../etc/passwd"
    elif change == "a foreign operator":
        first.domain = "com.evil"
    elif change == "a foreign operator set":
        model.opset_import.append(helper.make_opsetid("com.evil", 1))
    elif change == "a loop":
        body = helper.make_graph([], "body", [], [])
        graph.node.append(helper.make_node("Loop", ["", ""], [], body=body))
    elif change == "a graph inside an operator":
        first.attribute.append(helper.make_attribute("body", helper.make_graph([], "inner", [], [])))
    elif change == "functions of its own":
        model.functions.add().name = "f"
    elif change == "facts beside it":
        model.metadata_props.add().key = "x"
    elif change == "a constant of any size":
        graph.initializer.append(helper.make_tensor("big", TensorProto.INT64, [2], [2**17, 2**17], raw=False))
        graph.node.insert(0, helper.make_node("ConstantOfShape", ["big"], ["filled"]))
    elif change == "an input of another size":
        graph.input[0].type.tensor_type.shape.dim[1].dim_value += 1
    elif change == "a second output":
        graph.output.append(graph.output[0])
    elif change == "numbers in a second field":
        weight.float_data.append(1.0)
    elif change == "a shape beside its numbers":
        weight.dims[0] += 1
    elif change == "a name twice":
        graph.node[1].output[0] = graph.node[0].output[0]
    elif change == "a version that is too new":
        model.opset_import[0].version = 99
    return bytes(model.SerializeToString())


HOSTILE = (
    "weights in another file",
    "a foreign operator",
    "a foreign operator set",
    "a loop",
    "a graph inside an operator",
    "functions of its own",
    "facts beside it",
    "a constant of any size",
    "an input of another size",
    "a second output",
    "numbers in a second field",
    "a shape beside its numbers",
    "a name twice",
    "a version that is too new",
)


def check(data: bytes, key: str = "mlp") -> None:
    check_onnx(data, file="bad.onnx", model=key, shape=examples(key, 1).inputs.x.shape[1:])


@pytest.mark.parametrize("key", EXPORTED)
def test_what_is_exported_passes_the_check(key: str) -> None:
    check(exported(key)[1], key)


@pytest.mark.parametrize("change", HOSTILE)
@pytest.mark.parametrize("key", ["gbt", "gru"])
def test_a_graph_that_holds_what_no_export_has_is_refused(key: str, change: str) -> None:
    with pytest.raises(RunError, match=r"^bad\.onnx: "):
        check(hostile(exported(key)[1], change), key)


def field(number: int, wire: int, payload: bytes, *, tag_bytes: int = 0, above: int = 0) -> bytes:
    """One field of a message; its tag padded to a number of bytes, or with bits above the 32nd."""
    return varint((number << 3 | wire) + (above << 32), tag_bytes) + payload


def varint(value: int, least: int = 0) -> bytes:
    out = bytearray()
    while value > 127 or len(out) + 1 < least:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


OPSET = field(8, 2, varint(12) + field(1, 2, varint(8) + b"com.evil") + field(2, 0, b"\x01"))


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(field(8, 2, OPSET[1:], above=1), id="a tag with bit 32 set, which a runtime does not see"),
        pytest.param(field(8, 2, OPSET[1:], tag_bytes=4), id="a tag longer than it need be"),
        pytest.param(field(2**29 - 1, 0, b"\x00"), id="a field that nobody knows"),
        pytest.param(field(0, 0, b"\x00"), id="field 0"),
        pytest.param(field(7, 3, b"") + field(7, 4, b""), id="a group"),
        pytest.param(field(1, 5, b"\x08\x00\x00\x00"), id="a number of another width"),
        pytest.param(field(1, 0, b"\x0a"), id="a field that may be there once, the last of which counts"),
        pytest.param(field(5, 0, b"\x81\x00"), id="a number longer than it need be"),
        pytest.param(field(5, 0, b"\xff" * 10 + b"\x01"), id="a number of more than 64 bits"),
        pytest.param(field(6, 2, varint(2) + b"\xff\xff"), id="a text"),
        pytest.param(field(7, 2, varint(2**40)), id="a size above what is left"),
        pytest.param(OPSET, id="a foreign operator set, plainly"),
        pytest.param(field(8, 2, varint(6) + field(1, 2, b"\x00") + field(1, 2, varint(0))), id="two domains in one"),
    ],
)
def test_bytes_that_two_readers_could_understand_differently_are_refused(hidden: bytes) -> None:
    good = exported("mlp")[1]
    check(good)

    with pytest.raises(RunError, match=r"^bad\.onnx: "):
        check(good + hidden)


def test_a_graph_that_is_another_format_of_the_runtime_too_is_refused() -> None:
    model = onnx.load_from_string(exported("mlp")[1])
    model.producer_name = "ORTM, says the producer"
    data = model.SerializeToString()
    assert data[4:8] == b"ORTM"

    with pytest.raises(RunError):
        check(data)


def node_of(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == kind)


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("nodes_truenodeids", 0, 0),
        ("nodes_truenodeids", 0, 2**31),
        ("nodes_falsenodeids", 0, -1),
        ("nodes_featureids", 0, 6),
        ("nodes_featureids", 0, -1),
        ("nodes_treeids", 0, 1),
        ("nodes_nodeids", 1, 0),
        ("class_ids", 0, 5),
        ("class_ids", 0, -1),
        ("class_nodeids", 0, 0),
        ("class_treeids", 0, 10**9),
        ("nodes_values", 0, float("nan")),
        ("class_weights", 0, float("inf")),
        ("classlabels_int64s", 0, 7),
        ("nodes_modes", 0, b"BRANCH_MEMBER"),
        ("nodes_modes", 0, b"LEAF"),
    ],
)
def test_trees_whose_indices_lead_elsewhere_are_refused(name: str, at: int, value: int | float | bytes) -> None:
    model = onnx.load_from_string(exported("gbt")[1])
    attribute = next(a for a in node_of(model, "TreeEnsembleClassifier").attribute if a.name == name)
    values = attribute.ints or attribute.floats or attribute.strings
    values[at] = value

    with pytest.raises(RunError, match=r"trees: "):
        check(model.SerializeToString(), "gbt")


def test_an_attribute_of_trees_that_is_cut_or_absent_is_refused() -> None:
    good = onnx.load_from_string(exported("gbt")[1])
    for number, attribute in enumerate(node_of(good, "TreeEnsembleClassifier").attribute):
        model = onnx.ModelProto.FromString(good.SerializeToString())
        mine = node_of(model, "TreeEnsembleClassifier").attribute
        for values in (mine[number].ints, mine[number].floats, mine[number].strings):
            if len(values):
                del values[-1]
        if attribute.name == "post_transform":
            mine[number].s = b"LOGISTIC"
        with pytest.raises(RunError):
            check(model.SerializeToString(), "gbt")

        del mine[number]
        with pytest.raises(RunError):
            check(model.SerializeToString(), "gbt")


def test_operators_that_could_fill_memory_are_refused_before_they_run() -> None:
    model = onnx.load_from_string(exported("gru")[1])
    for name in {name for node in model.graph.node if node.op_type == "Concat" for name in node.input}:
        for tensor in model.graph.initializer:
            if tensor.name == name and tensor.data_type == TensorProto.INT64:
                tensor.raw_data = (2**24).to_bytes(8, "little") * (len(tensor.raw_data) // 8)

    with pytest.raises(RunError, match="would take"):
        check(model.SerializeToString(), "gru")


def test_operators_of_another_model_are_refused() -> None:
    with pytest.raises(RunError, match="operator"):
        check(exported("gru")[1], "transformer")


def test_noise_is_refused_in_words_and_quickly() -> None:
    rng = np.random.default_rng(0)
    good = exported("mlp")[1]
    for _ in range(500):
        cut = bytearray(good[: rng.integers(0, len(good) + 1)])
        for place in rng.integers(0, max(1, len(cut)), 3):
            if cut:
                cut[place % len(cut)] = rng.integers(0, 256)
        with suppress(RunError):
            check(bytes(cut))
