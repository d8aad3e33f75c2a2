"""A fitted model as one ONNX graph: raw windows in (NaN where nothing was known), calibrated probabilities out.

Scaler, missing marks, phases never seen in train and temperature stand in the graph, so that nobody has to repeat them
elsewhere. They are computed in float64, as the model itself does.
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
from phasewatch.types import WINDOW_BINS

MAX_PARITY_ERROR = 1e-5
TREES_OPSET = 15  # the newest that onnxmltools' trees are written for


def to_onnx(model: PhaseModel) -> bytes:
    """Give the bytes of a fitted model as ONNX; the same model is the same bytes.

    The graph's input is ``x``, float32 ``(n, f)`` or ``(n, c, 20)``, its output ``probabilities``, float32 ``(n, 5)``.

    Raises:
        UsageError: If the model is of a kind that has no graph: a baseline.
    """
    if isinstance(model, NeuralNetModel):
        proto = _build_net_graph(model)
    elif isinstance(model, GradientBoosting) and model.kind is InputKind.TABLE:  # of levels it is a baseline
        proto = _build_tree_graph(model)
    else:
        raise UsageError(f"model {model.key} is not exported: gbt, mlp, cnn, gru, lstm and transformer are")
    _strip_metadata(proto, model.key)
    data = bytes(proto.SerializeToString(deterministic=True))
    names = model.spec.names if model.spec else ()
    time = (WINDOW_BINS,) if model.kind is InputKind.TENSOR else ()
    check_onnx(data, file=model.key, model=model.key, shape=(len(names), *time))
    return data


def run_onnx(data: bytes, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Give what a graph says of windows, on one thread."""
    result: NDArray[np.float32] = open_session(data).run([ONNX_OUTPUT], {ONNX_INPUT: x})[0]
    return result


def check_parity(model: PhaseModel, data: bytes, inputs: ModelInputs) -> float:
    """Hold a graph against its model on windows, on the same with gaps, on one that knows nothing, on one alone.

    Returns:
        The largest difference of a probability.

    Raises:
        MismatchError: If it is above 1e-5.
    """
    if not len(inputs):
        raise MismatchError(f"model {model.key}: there is no window to hold its export against")
    gappy = inputs.x.copy()
    gappy[np.random.default_rng(0).random(gappy.shape) < 0.2] = np.nan
    worst = 0.0
    for x in (inputs.x, gappy, np.full_like(inputs.x[:1], np.nan), inputs.x[-1:]):
        expected = model.predict_proba(ModelInputs(x=x, spec=inputs.spec))
        worst = max(worst, float(np.abs(run_onnx(data, x) - expected).max()))
    if not worst <= MAX_PARITY_ERROR:
        raise MismatchError(
            f"model {model.key}: its export differs from it by {worst:.2g} on {len(inputs)} windows, at most {MAX_PARITY_ERROR:g} "
            "is allowed; nothing was written"
        )
    return worst


def _build_net_graph(model: NeuralNetModel) -> Any:
    """Trace a net between its scaler and its temperature."""
    import torch

    class Whole(torch.nn.Module):
        """What `NeuralNetModel.predict_proba` does, in torch."""

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

    names = model.spec.names if model.spec else ()
    shape = (2, len(names), *((WINDOW_BINS,) if model.kind == "tensor" else ()))
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # that torchvision is not here is of no interest
    try:
        with warnings.catch_warnings(), _redirect_torch_cache():
            warnings.simplefilter("ignore")  # torch's own, about its own insides
            made = torch.onnx.export(
                Whole().eval(), (torch.zeros(shape),), dynamo=True, input_names=[ONNX_INPUT], output_names=[ONNX_OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False,
            )  # fmt: skip
    finally:
        log.setLevel(level)
    if made is None:
        raise MismatchError(f"model {model.key}: torch gave no graph of it")
    return made.model_proto


@contextmanager
def _redirect_torch_cache() -> Iterator[None]:
    """Redirect the cache of torch's compiler to a folder that is removed; it would leave one with the user's name behind."""
    with (
        tempfile.TemporaryDirectory(prefix="phasewatch-") as folder,
        set_environment({"TORCHINDUCTOR_CACHE_DIR": folder}),
    ):
        yield


def _build_tree_graph(model: GradientBoosting) -> Any:
    """Convert trees, and append what `predict_proba` does with their shares."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnxmltools.convert import convert_xgboost
    from onnxmltools.convert.common.data_types import FloatTensorType

    n = len(model.spec.names) if model.spec else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trees = convert_xgboost(
            model.booster, initial_types=[(ONNX_INPUT, FloatTensorType([None, n]))], target_opset=TREES_OPSET
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
        trees.opset_import.append(helper.make_opsetid("", TREES_OPSET))
    onnx.checker.check_model(trees, full_check=True)
    return trees


def _strip_metadata(proto: Any, name: str) -> None:
    """Take out what tells of the machine and the source lines that a graph was made on, not of the model."""
    proto.graph.name = name  # converters draw one at random
    proto.doc_string, proto.graph.doc_string = "", ""
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    for part in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    del proto.graph.value_info[:]
