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
from phasewatch.export.graph import PARITY, check_parity, run_onnx, to_onnx
from phasewatch.models.base import Inputs
from phasewatch.models.onnxfile import check_onnx

SIX = ("gbt", "mlp", "cnn", "gru", "lstm", "transformer")


@cache
def exported(key: str, classes: int = 5):  # type: ignore[no-untyped-def]
    model = fitted(key, classes=classes)
    return model, to_onnx(model)


@pytest.mark.parametrize("key", SIX)
def test_the_graph_gives_the_models_probabilities_with_gaps_and_without(key: str) -> None:
    model, data = exported(key)

    assert check_parity(model, data, examples(key, seed=3).inputs) <= PARITY


@pytest.mark.parametrize("key", SIX)
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


def test_the_gate_refuses_the_graph_of_another_model() -> None:
    model, _ = exported("mlp")
    other = to_onnx(fitted("mlp", seed=1))

    with pytest.raises(MismatchError, match="differs from it by"):
        check_parity(model, other, examples("mlp", seed=3).inputs)


def test_the_gate_needs_a_window() -> None:
    model, data = exported("mlp")
    none = examples("mlp", seed=3).inputs

    with pytest.raises(MismatchError, match="no window"):
        check_parity(model, data, Inputs(x=none.x[:0], spec=none.spec))


@pytest.mark.parametrize("key", ["minirocket", "levels_only"])
def test_a_baseline_is_not_exported(key: str) -> None:
    with pytest.raises(UsageError, match=f"{key} is not exported: gbt"):
        to_onnx(fitted(key))


def hostile(**changes: object) -> bytes:
    """A graph that adds a tensor to its input, but for the changes."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    if changes.get("external"):
        weight.ClearField("float_data")
        weight.data_location = TensorProto.EXTERNAL
        entry = weight.external_data.add()
        entry.key, entry.value = "location", "../../etc/passwd"
    node = helper.make_node("Add", ["x", "w"], ["probabilities"], domain=str(changes.get("node", "")))
    if changes.get("inner"):
        inner = helper.make_graph([helper.make_node("Evil", [], ["y"], domain="evil")], "inner", [], [])
        node = helper.make_node("If", ["x"], ["probabilities"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [2])], [weight],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20)]
    if changes.get("opset"):
        opsets.append(helper.make_opsetid("com.evil", 1))
    made = helper.make_model(graph, opset_imports=opsets)
    if changes.get("function"):
        made.functions.add().name = "f"
    return bytes(made.SerializeToString())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"external": True}, "in another file", id="weights in another file"),
        pytest.param({"node": "com.evil"}, "foreign domain 'com.evil'", id="a foreign operator"),
        pytest.param({"opset": True}, "foreign domain 'com.evil'", id="a foreign operator set"),
        pytest.param({"inner": True}, "foreign domain 'evil'", id="a foreign operator in a branch"),
        pytest.param({"function": True}, "functions", id="functions of its own"),
    ],
)
def test_a_graph_that_reaches_out_of_its_file_is_refused(changes: dict[str, object], words: str) -> None:
    check_onnx(hostile(), file="good.onnx")

    with pytest.raises(RunError, match=rf"bad\.onnx.*{words}"):
        check_onnx(hostile(**changes), file="bad.onnx")


def test_noise_is_refused_in_words_and_quickly() -> None:
    rng = np.random.default_rng(0)
    good = hostile()
    for _ in range(500):
        cut = bytearray(good[: rng.integers(0, len(good) + 1)])
        for place in rng.integers(0, max(1, len(cut)), 3):
            if cut:
                cut[place % len(cut)] = rng.integers(0, 256)
        with suppress(RunError):
            check_onnx(bytes(cut), file="noise")
