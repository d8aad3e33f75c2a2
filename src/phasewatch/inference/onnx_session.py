"""The one place that loads onnxruntime: one thread, no messages; its reports are off since `phasewatch` was imported."""

from __future__ import annotations

from typing import Any


def open_session(data: bytes) -> Any:
    """Return an `InferenceSession` of a graph, on one thread and silent.

    Raises:
        ImportError: If onnxruntime is not installed.
        Exception: What onnxruntime raises of a graph that it refuses; its errors share no base class.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    # The runtime guesses the format from the bytes; only the one that was checked may be read.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
