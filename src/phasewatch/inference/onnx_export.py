"""Convert a fitted model to one ONNX graph, from raw windows (NaN where unknown) to calibrated probabilities.

The graph includes the scaler, the marks of missing values, the phases absent from train and the temperature, computed
in float64 as in the model.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.errors import MismatchError, RunError, UsageError
from phasewatch.inference.onnx_check import ONNX_INPUT, ONNX_OUTPUT, check_onnx
from phasewatch.inference.onnx_session import open_session
from phasewatch.inference.sklearn_export import build_sklearn_graph
from phasewatch.metrics import N_CLASSES
from phasewatch.models.adapters import TableAdapter
from phasewatch.models.base import InputKind, ModelInputs, PhaseModel
from phasewatch.models.gradient_boosting import GradientBoosting
from phasewatch.models.neural import SCALER_LIMIT, NeuralNetModel
from phasewatch.models.trees import TreeArrays
from phasewatch.parallel.pool import set_environment

__all__ = ["MAX_PARITY_ERROR", "check_parity", "run_onnx", "to_onnx"]

MAX_PARITY_ERROR = 1e-5
_TREES_OPSET, _TREES_ML_OPSET, _TREES_IR_VERSION = 15, 3, 8


def to_onnx(model: PhaseModel) -> bytes:
    """Convert a fitted model to ONNX; the same model gives the same bytes.

    The graph's input is ``x``, float32 ``(n, f)`` or ``(n, c, t)``, its output ``probabilities``, float32 ``(n, 5)``.

    Raises:
        UsageError: If the model cannot be exported, such as a baseline.
    """
    if isinstance(model, NeuralNetModel):
        proto = _build_net_graph(model)
    elif isinstance(model, GradientBoosting) and model.kind is InputKind.TABLE:  # of levels it is a baseline
        proto = _build_tree_graph(model)
    elif isinstance(model, TableAdapter):
        proto = build_sklearn_graph(model)
    elif (module := model.torch_module()) is not None:
        proto = _build_module_graph(model, module)
    else:
        raise UsageError(
            f"model {model.key} cannot be exported; gbt, mlp, cnn, gru, lstm, transformer, tcn, scikit-learn "
            "classifiers of a TableAdapter, and models with a torch_module can"
        )
    _strip_metadata(proto, model.key)
    data = bytes(proto.SerializeToString(deterministic=True))
    try:
        check_onnx(data, file=model.key, model=model.key, shape=model.spec.shape if model.spec else (0,))
    except RunError as exc:
        if isinstance(model, NeuralNetModel | GradientBoosting):
            raise
        raise UsageError(f"model {model.key} cannot be exported, because a watcher would refuse it: {exc}") from exc
    return data


def run_onnx(data: bytes, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run a graph on one thread: ``(n, f)`` or ``(n, c, t)`` float32 → ``(n, 5)`` float32 probabilities."""
    result: NDArray[np.float32] = open_session(data).run([ONNX_OUTPUT], {ONNX_INPUT: x})[0]
    return result


def check_parity(model: PhaseModel, data: bytes, inputs: ModelInputs) -> float:
    """Compare a graph with its model on windows, on windows with gaps, on an empty window and on a single one.

    Returns:
        The largest difference of a probability.

    Raises:
        MismatchError: If it is above `MAX_PARITY_ERROR`, or there is no window.
    """
    if not len(inputs):
        raise MismatchError(f"model {model.key}: there is no window to compare its export on")
    gappy = inputs.x.copy()
    gappy[np.random.default_rng(0).random(gappy.shape) < 0.2] = np.nan
    worst = 0.0
    for x in (inputs.x, gappy, np.full_like(inputs.x[:1], np.nan), inputs.x[-1:]):
        expected = model.predict_proba(ModelInputs(x=x, spec=inputs.spec))
        worst = max(worst, float(np.abs(run_onnx(data, x) - expected).max()))
    if not worst <= MAX_PARITY_ERROR:
        raise MismatchError(
            f"model {model.key}: its export differs from it by {worst:.2g} on {len(inputs)} windows, "
            f"expected at most {MAX_PARITY_ERROR:g}; nothing was written"
        )
    return worst


def _build_net_graph(model: NeuralNetModel) -> Any:
    """Trace a network with its scaler and temperature."""
    import torch

    class Whole(torch.nn.Module):
        """The computation of `NeuralNetModel.predict_proba` in torch."""

        size: torch.Tensor
        never: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.net = model.net
            ending = [1] * (len(model.spec.shape) - 1 if model.spec else 0)
            self.register_buffer("size", torch.from_numpy(model.scaler.size).reshape(-1, *ending))
            never = [0.0 if code in model.seen else -np.inf for code in range(N_CLASSES)]
            self.register_buffer("never", torch.tensor(never, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            missing = ~torch.isfinite(x)
            z = torch.where(missing, 0.0, x).double() / self.size
            a = z.abs()
            # asinh by logarithm: runtimes have asinh in float32 only.
            scaled = (torch.sign(z) * torch.log(a + torch.sqrt(a * a + 1.0))).clamp(-SCALER_LIMIT, SCALER_LIMIT)
            scores = self.net(torch.cat([scaled.float(), missing.float()], dim=1)).double() + self.never
            return torch.softmax(scores / model.temperature, dim=1).float()

    return _trace(model, Whole().eval())


def _build_module_graph(model: PhaseModel, module: Any) -> Any:
    """Trace a user's torch module with the phases of train and the temperature.

    Raises:
        UsageError: If torch cannot convert the module.
    """
    import torch

    class Tempered(torch.nn.Module):
        """The computation of `PhaseModel.predict_proba` on the shares of the module."""

        never: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.module = module
            never = [0.0 if code in model.seen else -np.inf for code in range(N_CLASSES)]
            self.register_buffer("never", torch.tensor(never, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logs = torch.log(self.module(x).double()) + self.never
            return torch.softmax(logs / model.temperature, dim=1).float()

    try:
        return _trace(model, Tempered().eval())
    except Exception as exc:  # the module is a user's: torch raises errors of many classes for what it cannot convert
        words = " ".join(str(exc).split())[:200] or type(exc).__name__
        raise UsageError(f"model {model.key} cannot be exported: torch does not convert its module: {words}") from exc


def _trace(model: PhaseModel, whole: Any) -> Any:
    """Trace a torch module from raw windows to probabilities."""
    import torch

    shape = (2, *(model.spec.shape if model.spec else ()))
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it would warn that torchvision is not installed
    try:
        with warnings.catch_warnings(), _redirect_torch_cache():
            warnings.simplefilter("ignore")  # deprecations inside torch
            program = torch.onnx.export(
                whole,
                (torch.zeros(shape),),
                dynamo=True,
                input_names=[ONNX_INPUT],
                output_names=[ONNX_OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("n")},),
                verbose=False,
            )
    finally:
        log.setLevel(level)
    if program is None:
        raise MismatchError(f"model {model.key}: torch returned no graph of it")
    return program.model_proto


@contextmanager
def _redirect_torch_cache() -> Iterator[None]:
    """Redirect the cache of torch's compiler to a temporary folder; otherwise it leaves one with the user's name."""
    with (
        tempfile.TemporaryDirectory(prefix="phasewatch-") as folder,
        set_environment({"TORCHINDUCTOR_CACHE_DIR": folder}),
    ):
        yield


def _build_tree_graph(model: GradientBoosting) -> Any:
    """Write the trees as one operator, and the computation of `predict_proba` on their sums.

    The tests are exact: thresholds and inputs are float32. Sums are float32 in the operator.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shape = model.spec.shape if model.spec else ()
    never = np.array([0.0 if code in model.seen else -np.inf for code in range(N_CLASSES)])
    graph = helper.make_graph(
        [
            helper.make_node(
                "TreeEnsembleClassifier",
                [ONNX_INPUT],
                ["label", "sums"],
                domain="ai.onnx.ml",
                **_list_tree_attributes(model.trees),
            ),
            helper.make_node("Cast", ["sums"], ["sums64"], to=TensorProto.DOUBLE),
            helper.make_node("Add", ["sums64", "never"], ["seen"]),
            helper.make_node("Div", ["seen", "temperature"], ["tempered"]),
            helper.make_node("Softmax", ["tempered"], ["soft"], axis=1),
            helper.make_node("Cast", ["soft"], [ONNX_OUTPUT], to=TensorProto.FLOAT),
        ],
        model.key,
        [helper.make_tensor_value_info(ONNX_INPUT, TensorProto.FLOAT, [None, *shape])],
        [helper.make_tensor_value_info(ONNX_OUTPUT, TensorProto.FLOAT, [None, N_CLASSES])],
        [numpy_helper.from_array(never, "never"), numpy_helper.from_array(np.array(model.temperature), "temperature")],
    )
    opsets = [helper.make_opsetid("", _TREES_OPSET), helper.make_opsetid("ai.onnx.ml", _TREES_ML_OPSET)]
    whole = helper.make_model(graph, opset_imports=opsets, ir_version=_TREES_IR_VERSION, producer_name="phasewatch")
    onnx.checker.check_model(whole, full_check=True)
    return whole


def _list_tree_attributes(trees: TreeArrays) -> dict[str, Any]:
    """Return the attributes of the operator; in each tree the leaves follow the tests."""
    capacity = trees.leaf.shape[1]
    n_tests = trees.size.astype(np.int64)[:, None] - 1
    place = np.arange(2 * capacity - 1)
    kept = place < 2 * n_tests + 1
    is_test = kept & (place < n_tests)
    is_leaf = kept & ~is_test
    tree, own = np.broadcast_to(np.arange(len(n_tests))[:, None], kept.shape), np.broadcast_to(place, kept.shape)

    def spread(values: NDArray[Any], where: NDArray[np.bool_]) -> NDArray[Any]:
        """Return the values of the tests or of the leaves in the order of the nodes, 0 elsewhere."""
        whole = np.zeros(kept.shape, values.dtype)
        whole[where] = values[np.arange(values.shape[1]) < where.sum(axis=1, keepdims=True)]
        return whole[kept]

    def number(child: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return the node of each child: a test keeps its number, a leaf follows the tests."""
        found = np.where(child >= 0, child, n_tests - 1 - child)
        return spread(found.astype(np.int64), is_test)

    return {
        "nodes_treeids": tree[kept],
        "nodes_nodeids": own[kept],
        "nodes_featureids": spread(trees.feature.astype(np.int64), is_test),
        "nodes_values": spread(trees.threshold, is_test),
        "nodes_modes": np.where(is_test[kept], "BRANCH_LEQ", "LEAF").tolist(),
        "nodes_truenodeids": number(trees.left),
        "nodes_falsenodeids": number(trees.right),
        "nodes_missing_value_tracks_true": spread(trees.nan_left.astype(np.int64), is_test),
        "class_treeids": tree[is_leaf],
        "class_nodeids": own[is_leaf],
        "class_ids": tree[is_leaf] % N_CLASSES,
        "class_weights": spread(trees.leaf.astype(np.float32), is_leaf)[is_leaf[kept]],
        "classlabels_int64s": np.arange(N_CLASSES),
        "post_transform": "NONE",
    }


def _strip_metadata(proto: Any, name: str) -> None:
    """Remove metadata about the machine and the source lines, which are not part of the model."""
    proto.graph.name = name  # converters draw a random one
    proto.doc_string, proto.graph.doc_string = "", ""
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    for part in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    del proto.graph.value_info[:]
