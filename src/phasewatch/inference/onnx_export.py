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

from phasewatch.errors import MismatchError, UsageError
from phasewatch.inference.onnx_check import ONNX_INPUT, ONNX_OUTPUT, check_onnx
from phasewatch.inference.onnx_session import open_session
from phasewatch.metrics import N_CLASSES
from phasewatch.models.base import InputKind, ModelInputs, PhaseModel
from phasewatch.models.gradient_boosting import GradientBoosting
from phasewatch.models.neural import SCALER_LIMIT, NeuralNetModel
from phasewatch.parallel.pool import set_environment

__all__ = ["MAX_PARITY_ERROR", "check_parity", "run_onnx", "to_onnx"]

MAX_PARITY_ERROR = 1e-5
_TREES_OPSET = 15  # the newest that onnxmltools supports for trees


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
    else:
        raise UsageError(f"model {model.key} cannot be exported; gbt, mlp, cnn, gru, lstm and transformer can")
    _strip_metadata(proto, model.key)
    data = bytes(proto.SerializeToString(deterministic=True))
    check_onnx(data, file=model.key, model=model.key, shape=model.spec.shape if model.spec else (0,))
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
            ending = [1] * (len(shape) - 2)
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

    shape = (2, *(model.spec.shape if model.spec else (0,)))
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it would warn that torchvision is not installed
    try:
        with warnings.catch_warnings(), _redirect_torch_cache():
            warnings.simplefilter("ignore")  # deprecations inside torch
            program = torch.onnx.export(
                Whole().eval(),
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
    """Convert the trees, and append the computation of `predict_proba` on their output."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnxmltools.convert import convert_xgboost
    from onnxmltools.convert.common.data_types import FloatTensorType

    n = len(model.spec.names) if model.spec else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trees = convert_xgboost(
            model.booster, initial_types=[(ONNX_INPUT, FloatTensorType([None, n]))], target_opset=_TREES_OPSET
        )
    graph = trees.graph
    shares = next(out.name for out in graph.output if "prob" in out.name)
    if shares == ONNX_OUTPUT:
        for node in graph.node:
            node.output[:] = ["shares" if name == ONNX_OUTPUT else name for name in node.output]
        shares = "shares"
    kept = np.array([float(code in model.seen) for code in range(N_CLASSES)])
    graph.initializer.extend(
        [numpy_helper.from_array(kept, "kept"), numpy_helper.from_array(np.array(model.temperature), "temperature")]
    )
    graph.node.extend(
        [
            helper.make_node("Cast", [shares], ["shares64"], to=TensorProto.DOUBLE),
            helper.make_node("Mul", ["shares64", "kept"], ["seen"]),
            helper.make_node("Log", ["seen"], ["logs"]),  # log 0 = −inf is meant
            helper.make_node("Div", ["logs", "temperature"], ["tempered"]),
            helper.make_node("Softmax", ["tempered"], ["soft"], axis=1),
            helper.make_node("Cast", ["soft"], [ONNX_OUTPUT], to=TensorProto.FLOAT),
        ]
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(ONNX_OUTPUT, TensorProto.FLOAT, [None, N_CLASSES]))
    if all(opset.domain for opset in trees.opset_import):
        trees.opset_import.append(helper.make_opsetid("", _TREES_OPSET))
    onnx.checker.check_model(trees, full_check=True)
    return trees


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
