"""Open onnxruntime sessions: one thread, no messages; importing `phasewatch` switches its telemetry off."""

from __future__ import annotations

from typing import Any

__all__ = ["open_session"]


def open_session(data: bytes) -> Any:
    """Return an `InferenceSession` of a graph, on one thread and without log messages.

    Raises:
        ImportError: If onnxruntime is not installed.
        Exception: If onnxruntime refuses the graph; its errors share no base class.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    # The runtime guesses the format from the bytes; it may read only the format that was checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
