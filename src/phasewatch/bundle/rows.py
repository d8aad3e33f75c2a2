"""Encode and decode the rows of one source: JSON lines on one side, columns on the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import isfinite
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import astuple
from numpy.typing import NDArray

from phasewatch.bundle import limits
from phasewatch.bundle.model import SourceRows
from phasewatch.bundle.problems import find_malformed_line
from phasewatch.channels import list_raw_fields
from phasewatch.errors import BundleError
from phasewatch.types import SourceKind

__all__ = ["STAMP_FIELDS", "count_lines", "decode_rows", "encode_columns", "encode_rows"]

STAMP_FIELDS = ("t_wall_ns", "t_mono_ns", "seq")

_ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowCodec:
    """The row type and decoder of some fields of a source."""

    row: type[msgspec.Struct]
    decoder: msgspec.json.Decoder[Any]
    is_float: tuple[bool, ...]  # by field, without the stamps


@lru_cache(maxsize=64)
def _build_codec(source: SourceKind, fields: tuple[str, ...]) -> _RowCodec:
    """Return the codec of some fields: stamps are whole numbers, and every field may be null."""
    types = {spec.field: spec.type for spec in list_raw_fields(source)}
    columns: list[tuple[str, Any]] = [(name, int) for name in STAMP_FIELDS]
    columns += [(name, float | None if types[name] == "float" else int | None) for name in fields]
    row = msgspec.defstruct(f"{source.capitalize()}Row", columns, forbid_unknown_fields=True, gc=False)
    return _RowCodec(
        row=row, decoder=msgspec.json.Decoder(row), is_float=tuple(types[name] == "float" for name in fields)
    )


def encode_rows(source: SourceKind, rows: Iterable[Sequence[int | float | None]]) -> bytes:
    """Return rows as JSON lines in the only form of the format: fixed order of keys, no spaces.

    Args:
        source: The source.
        rows: Tuples ``(t_wall_ns, t_mono_ns, seq, *values)``, the values in the order of the raw fields; None means no
            reading.

    Raises:
        ValueError: If a row has the wrong number of values, or a value that JSON or int64 cannot hold.
    """
    specs = list_raw_fields(source)
    codec = _build_codec(source, tuple(spec.field for spec in specs))
    is_float = (False,) * len(STAMP_FIELDS) + codec.is_float
    structs = []
    for row in rows:
        if len(row) != len(is_float):
            raise ValueError(f"a {source} row has {len(row)} values, not {len(is_float)}")
        structs.append(
            codec.row(*[_convert_to_json_number(v, to_float) for v, to_float in zip(row, is_float, strict=True)])
        )
    return _ENCODER.encode_lines(structs)


def encode_columns(rows: SourceRows) -> bytes:
    """Return columns as JSON lines; `decode_rows` is the inverse.

    Raises:
        ValueError: If the columns are not raw fields of the source in their order, or a value is not finite.
    """
    specs = [spec for spec in list_raw_fields(rows.source) if spec.field in rows.fields]
    if rows.fields != tuple(spec.field for spec in specs):
        raise ValueError(f"the columns are not the raw fields of {rows.source}")
    codec = _build_codec(rows.source, rows.fields)
    listed: list[list[Any]] = [rows.t_wall_ns.tolist(), rows.t_mono_ns.tolist(), rows.seq.tolist()]
    is_whole = [bool(known.all()) for known in rows.present.T]
    for i, column in enumerate(rows.columns):
        if column.dtype != (np.float64 if codec.is_float[i] else np.int64) or not np.isfinite(column).all():
            raise ValueError(f"{rows.source}.{rows.fields[i]} is not {specs[i].type}, or not finite")
        values = column.tolist()
        if not is_whole[i]:
            values = [v if known else None for v, known in zip(values, rows.present[:, i].tolist(), strict=True)]
        listed.append(values)
    return _ENCODER.encode_lines([codec.row(*values) for values in zip(*listed, strict=True)])


def _convert_to_json_number(value: Any, to_float: bool) -> int | float | None:
    """Return a value that JSON holds exactly: a 64-bit whole number, a finite fraction, or None.

    Raises:
        ValueError: If it is neither.
    """
    if value is None:
        return None
    if to_float:
        number = float(value)
        if not isfinite(number):
            raise ValueError(f"{value!r} is not a finite number")
        return number + 0.0  # no negative zero
    if isinstance(value, bool) or int(value) != value or not limits.INT64_MIN <= value <= limits.INT64_MAX:
        raise ValueError(f"{value!r} is not a 64-bit whole number")
    return int(value)


def decode_rows(source: SourceKind, fields: Sequence[str], data: bytes, *, file: str) -> SourceRows:
    """Parse the lines of one source into columns.

    Args:
        source: The source; each of its raw fields becomes a column, without any reading if ``fields`` lacks it.
        fields: The raw fields in the manifest, in their order.
        data: The content of the member.
        file: Name of the bundle in errors.

    Raises:
        BundleError: At the first line that breaks the format.
    """
    member = f"{source}.jsonl"
    codec = _build_codec(source, tuple(fields))
    n = data.count(b"\n")
    rows: list[Any] = []
    hint = ""
    if n <= limits.MAX_SOURCE_ROWS and len(data) <= n * limits.MAX_ROW_LINE_BYTES:
        try:
            rows = codec.decoder.decode_lines(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            hint = str(exc)
    # msgspec keeps the last of equal keys, accepts keys in any order and skips blanks. Only a file in the right form
    # is equal to its re-encoded rows, so this comparison replaces those checks, and those of the text.
    if hint or len(rows) != n or _ENCODER.encode_lines(rows) != data:
        count_lines(data, file=file, member=member, most=limits.MAX_SOURCE_ROWS, too_many="rows-many")
        error = find_malformed_line(data, codec.decoder, (*STAMP_FIELDS, *fields), file=file, member=member, hint=hint)
        if error is not None:
            raise error
    try:
        return _build_columns(source, tuple(fields), codec, rows)
    except OverflowError:
        raise _build_overflow_error(rows, file=file, member=member) from None
    except _ColumnValueError as bad:
        raise BundleError(code=bad.code, words=bad.words, file=file, member=member, line=bad.line) from None


def count_lines(data: bytes, *, file: str, member: str, most: int, too_many: str) -> int:
    """Return the number of lines of a member after checking its text.

    Args:
        data: The content of the member.
        file: Name of the bundle in errors.
        member: Name of the member in errors.
        most: Maximum number of lines.
        too_many: Code of the error for more lines.

    Raises:
        BundleError: If there are too many or too long lines, or the text is not plain ASCII lines.
    """

    def refuse(code: str, words: str, line: int = 0) -> BundleError:
        return BundleError(code=code, words=words, file=file, member=member, line=line)

    if not data:
        return 0
    n = data.count(b"\n")
    if n > most:  # before the array below, which is eight times as large as a member of newlines
        raise refuse(too_many, f"{n:,} lines; at most {most:,} are allowed")
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 10)
    lengths = np.diff(ends, prepend=-1)
    tail = len(data) - (int(ends[-1]) + 1 if len(ends) else 0)
    if max(int(lengths.max(initial=0)), tail) > limits.MAX_ROW_LINE_BYTES:
        is_long = lengths > limits.MAX_ROW_LINE_BYTES
        at = int(np.argmax(is_long)) + 1 if is_long.any() else len(ends) + 1
        raise refuse("line-size", f"a line is longer than {limits.MAX_ROW_LINE_BYTES:,} bytes", at)
    if not data.isascii() or b"\0" in data:
        at = next(i for i, line in enumerate(data.split(b"\n"), 1) if not line.isascii() or b"\0" in line)
        raise refuse("text-encoding", "a byte-order mark, a NUL or a byte that is not ASCII", at)
    if tail:
        raise refuse("text-last-newline", "the last line has no newline; the member may be truncated", len(ends) + 1)
    if (lengths == 1).any() or data.isspace():
        raise refuse("text-blank-line", "a blank line", int(np.argmax(lengths == 1)) + 1)
    return len(ends)


class _ColumnValueError(Exception):
    """A value that a column cannot hold."""

    def __init__(self, code: str, words: str, line: int) -> None:
        self.code, self.words, self.line = code, words, line
        super().__init__(words)


def _build_columns(source: SourceKind, fields: tuple[str, ...], codec: _RowCodec, rows: list[Any]) -> SourceRows:
    """Convert typed rows to arrays; the common case (whole numbers, no null) uses one `fromiter`."""
    n, k = len(rows), len(STAMP_FIELDS) + len(fields)
    ints: NDArray[np.int64] | None = None
    array: NDArray[Any]
    present = np.ones((n, len(fields)), np.bool_)
    stamps: list[NDArray[np.int64]]
    values: list[NDArray[Any]]
    if not any(codec.is_float):
        try:
            flat = np.fromiter(chain.from_iterable(map(astuple, rows)), np.int64, n * k)
            ints = np.ascontiguousarray(flat.reshape(n, k).T)
        except TypeError:  # a null among them
            ints = None
    if ints is not None:
        stamps, values = list(ints[:3]), list(ints[3:])
    else:
        listed = list(zip(*map(astuple, rows), strict=True)) if n else [()] * k
        is_float = (False,) * len(STAMP_FIELDS) + codec.is_float
        whole: list[Any] = []  # columns of whole numbers, converted together: twice as fast
        values = [np.empty(0)] * k
        for i, column in enumerate(listed):
            if is_float[i]:
                array = np.array(column, np.float64)  # null becomes NaN, which JSON does not have
                unknown = np.isnan(array)
                if unknown.any():
                    present[:, i - 3] = ~unknown
                    array[unknown] = 0.0
                values[i] = array
            elif None in column:
                present[:, i - 3] = [value is not None for value in column]
                whole.append([0 if value is None else value for value in column])
            else:
                whole.append(column)
        made = np.fromiter(chain.from_iterable(whole), np.int64, n * len(whole)).reshape(len(whole), n)
        for i, array in zip((i for i in range(k) if not is_float[i]), made, strict=True):
            values[i] = array
        stamps, values = values[:3], values[3:]
    for name, stamp in zip(STAMP_FIELDS, stamps[:2], strict=False):
        if n and int(stamp.min()) < 0:
            raise _ColumnValueError("row-stamp", f"{name} is negative", int(np.argmax(stamp < 0)) + 1)
    return _add_missing_fields(
        SourceRows(
            source=source,
            fields=fields,
            t_wall_ns=stamps[0],
            t_mono_ns=stamps[1],
            seq=stamps[2],
            columns=tuple(values),
            present=present,
        )
    )


def _add_missing_fields(rows: SourceRows) -> SourceRows:
    """Add columns without readings for the raw fields that an older recorder did not have."""
    specs = list_raw_fields(rows.source)
    if len(rows.fields) == len(specs):
        return rows
    n, at = len(rows), {field: i for i, field in enumerate(rows.fields)}
    present = np.zeros((n, len(specs)), np.bool_)
    columns: list[NDArray[Any]] = []
    for j, spec in enumerate(specs):
        i = at.get(spec.field)
        if i is None:
            columns.append(np.zeros(n, np.float64 if spec.type == "float" else np.int64))
        else:
            columns.append(rows.columns[i])
            present[:, j] = rows.present[:, i]
    return SourceRows(
        source=rows.source,
        fields=tuple(spec.field for spec in specs),
        t_wall_ns=rows.t_wall_ns,
        t_mono_ns=rows.t_mono_ns,
        seq=rows.seq,
        columns=tuple(columns),
        present=present,
    )


def _build_overflow_error(rows: list[Any], *, file: str, member: str) -> BundleError:
    """Return the error for the first number beyond 64 bits; numpy has found that there is one."""
    line, name = next(
        (line, name)
        for line, row in enumerate(rows, 1)
        for name, value in zip(row.__struct_fields__, astuple(row), strict=True)
        if isinstance(value, int) and not limits.INT64_MIN <= value <= limits.INT64_MAX
    )
    return BundleError(code="row-int64", words=f"{name} does not fit into 64 bits", file=file, member=member, line=line)
