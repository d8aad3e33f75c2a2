"""Frames as a packet socket delivers them, and an interpreter of the filter that cuts them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phasewatch.telemetry.frame_batch import FrameBatch
from phasewatch.telemetry.packet_socket import LONG_SNAP_BYTES, build_snap_filter

Passed = tuple[bytes, bool, int]  # a whole frame, whether the guest sent it, when it passed (ns)


def make_batch(frames: Sequence[Passed]) -> FrameBatch:
    """Return frames as the kernel delivers them: cut by the filter, with other bytes behind."""
    data = np.full((len(frames), LONG_SNAP_BYTES), 0xEE, np.uint8)
    captured = []
    for row, (frame, _, _) in zip(data, frames, strict=True):
        kept = frame[: run_filter(frame)]
        row[: len(kept)] = np.frombuffer(kept, np.uint8)
        captured.append(len(kept))
    return FrameBatch(
        data=data,
        captured=np.array(captured, np.int64),
        sizes=np.array([len(frame) for frame, _, _ in frames], np.int64),
        outgoing=np.array([outgoing for _, outgoing, _ in frames], bool),
        t_ns=np.array([t_ns for _, _, t_ns in frames], np.int64),
    )


def run_filter(frame: bytes) -> int:
    """Return how many bytes of a frame the filter keeps, as the kernel computes it; 0 discards the frame."""
    program, at, value = build_snap_filter(), 0, 0
    while True:
        code, yes, no, operand = program[at]
        at += 1
        match code:
            case 0x80:
                value = len(frame)
            case 0x28 | 0x30:
                size = 2 if code == 0x28 else 1
                if operand + size > len(frame):
                    return 0
                value = int.from_bytes(frame[operand : operand + size])
            case 0x15:
                at += yes if value == operand else no
            case 0x35:
                at += yes if value >= operand else no
            case 0x06:
                return operand
            case _:
                raise AssertionError(code)
