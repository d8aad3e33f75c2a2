"""Encode and decode `labels.jsonl`, the phase marks of an episode, with the rules on their order and span."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec

from phasewatch.bundle import limits
from phasewatch.bundle.container import LABELS_FILE
from phasewatch.bundle.model import LabelMark, OperatorLabel
from phasewatch.bundle.problems import find_malformed_line
from phasewatch.bundle.rows import count_lines
from phasewatch.errors import BundleError
from phasewatch.types import Phase

__all__ = ["decode_labels", "encode_labels", "list_phase_starts"]

_END_PHASE = "end"


class _LabelRow(msgspec.Struct, forbid_unknown_fields=True):
    """One line of `labels.jsonl`."""

    t_wall_ns: int
    t_mono_ns: int
    phase: str


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(_LabelRow)


def encode_labels(marks: Sequence[LabelMark]) -> bytes:
    """Return the marks as JSON lines; the last mark, whose phase is None, becomes the ``end`` row."""
    rows = [_LabelRow(m.t_wall_ns, m.t_mono_ns, _END_PHASE if m.phase is None else str(m.phase)) for m in marks]
    return _ENCODER.encode_lines(rows)


def list_phase_starts(labels: Sequence[OperatorLabel], t0_ns: int, t_end_ns: int) -> list[tuple[int, Phase]]:
    """Return the phase starts of a recording that a person labelled; the time without a label is `unknown`.

    Args:
        labels: Labels within the recording, in the order of time, without overlap.
        t0_ns, t_end_ns: Begin and end of the recording, in Unix ns.

    Returns:
        Unix time (ns) and phase of each start, the first at `t0_ns`; neighbours differ in phase.
    """
    starts: list[tuple[int, Phase]] = []
    at = t0_ns
    for label in labels:
        if label.start_wall_ns > at:
            starts.append((at, Phase.UNKNOWN))
        starts.append((label.start_wall_ns, label.phase))
        at = label.end_wall_ns
    if at < t_end_ns:
        starts.append((at, Phase.UNKNOWN))
    return [each for i, each in enumerate(starts) if i == 0 or starts[i - 1][1] is not each[1]]


def decode_labels(data: bytes, *, duration_s: float, file: str) -> tuple[LabelMark, ...]:
    """Parse `labels.jsonl`.

    Args:
        data: The content of the member.
        duration_s: Duration in the manifest; the labels must agree to 1 ms.
        file: Name of the bundle in errors.

    Raises:
        BundleError: At the first line that breaks a rule of the format.
    """

    def refuse(code: str, words: str, line: int = 0) -> BundleError:
        return BundleError(code=code, words=words, file=file, member=LABELS_FILE, line=line)

    n = count_lines(data, file=file, member=LABELS_FILE, most=limits.MAX_LABEL_ROWS, too_many="labels-many")
    try:
        rows: list[Any] = _DECODER.decode_lines(data)
        hint = ""
    except (msgspec.DecodeError, RecursionError) as exc:
        rows, hint = [], str(exc)
    if len(rows) != n or _ENCODER.encode_lines(rows) != data:
        blame = find_malformed_line(
            data, _DECODER, _LabelRow.__struct_fields__, file=file, member=LABELS_FILE, hint=hint or "not the format"
        )
        if blame is not None:
            raise blame
    marks = tuple(_parse_mark(row, line, n, refuse) for line, row in enumerate(rows, 1))
    if not marks or marks[-1].phase is not None:
        raise refuse("label-end", "the last row is not `end`", n)
    if n < 2:
        raise refuse("label-end", "there is no phase before `end`", 1)
    for line, (before, after) in enumerate(pairwise(marks), 2):
        if after.t_wall_ns <= before.t_wall_ns or after.t_mono_ns <= before.t_mono_ns:
            raise refuse("label-order", "a stamp is not later than the one before it", line)
    span_ns = marks[-1].t_wall_ns - marks[0].t_wall_ns
    if not limits.MIN_LABELLED_NS <= span_ns <= limits.MAX_LABELLED_NS:
        raise refuse("label-span", f"the labels span {span_ns / 1e9:.3f} s; 1 s to 3,600 s are allowed", n)
    if abs(span_ns / 1e9 - duration_s) > limits.DURATION_TOLERANCE_S + 1e-9:
        raise refuse(
            "label-duration", f"the labels span {span_ns / 1e9:.3f} s; the manifest says {duration_s:.3f} s", n
        )
    return marks


def _parse_mark(row: _LabelRow, line: int, n: int, refuse: Any) -> LabelMark:
    """Return the mark of one row.

    Raises:
        BundleError: If its stamps or its phase are invalid.
    """
    if not limits.MIN_STAMP_NS <= row.t_wall_ns <= limits.MAX_STAMP_NS:
        raise refuse("label-stamp", "t_wall_ns is not Unix nanoseconds of 2006 to 2116", line)
    if not 0 <= row.t_mono_ns <= limits.INT64_MAX:
        raise refuse("label-stamp", "t_mono_ns is negative or beyond 64 bits", line)
    if row.phase == _END_PHASE:
        if line != n:
            raise refuse("label-end", "`end` comes before the last row", line)
        return LabelMark(t_wall_ns=row.t_wall_ns, t_mono_ns=row.t_mono_ns, phase=None)
    try:
        phase = Phase(row.phase)
    except ValueError:
        words = f"{row.phase[:40]!r} is not a phase; phases are {', '.join(Phase)}"
        raise refuse("label-phase", words, line) from None
    return LabelMark(t_wall_ns=row.t_wall_ns, t_mono_ns=row.t_mono_ns, phase=phase)
