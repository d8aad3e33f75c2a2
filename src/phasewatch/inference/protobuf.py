"""Parse protocol-buffers messages strictly: an encoding that two parsers could read differently is an error.

An untrusted file must have the same meaning for our check and for the runtime's parser. Source: protobuf.dev,
"Encoding".
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import numpy as np
from numpy.typing import NDArray

__all__ = ["MessageShape", "ProtobufMessage", "WireType", "parse_message", "parse_varints", "read_varint"]

_MAX_FIELD = 2**29 - 1
_MAX_TAG_BYTES = 5


class WireType(Enum):
    """Encoding of a field."""

    VARINT = 0
    BYTES = 2
    FIXED32 = 5


class MessageShape:
    """The allowed fields of a message: number → encoding; and the error text of some that are not allowed."""

    def __init__(
        self,
        name: str,
        once: Mapping[int, WireType],
        repeated: Mapping[int, WireType] | None = None,
        refused: Mapping[int, str] | None = None,
    ) -> None:
        self.name, self.once, self.repeated, self.refused = name, once, repeated or {}, refused or {}


class ProtobufMessage:
    """The fields of one message: varints as 64-bit integers, all others as bytes."""

    def __init__(self, fields: Mapping[int, list[int | memoryview]]) -> None:
        self._fields = fields

    def number(self, field: int, default: int = 0) -> int:
        """Return a field as a signed 64-bit integer."""
        value = self._fields.get(field, [default])[0]
        number = value if isinstance(value, int) else int.from_bytes(value, "little")
        return number - 2**64 if number >= 2**63 else number

    def has(self, field: int) -> bool:
        """Return whether a field is present."""
        return field in self._fields

    def text(self, field: int, limit: int = 200) -> str:
        """Return a field as text; empty if it is absent.

        Raises:
            ValueError: If it is longer than `limit` bytes or not UTF-8.
        """
        data = self.data(field)
        if len(data) > limit:
            raise ValueError(f"a text of {len(data):,} bytes, at most {limit} are read")
        return bytes(data).decode("utf-8")

    def data(self, field: int) -> memoryview:
        """Return the bytes of a field; empty if it is absent."""
        value = self._fields.get(field, [memoryview(b"")])[0]
        return value if isinstance(value, memoryview) else memoryview(b"")

    def repeated(self, field: int) -> list[memoryview]:
        """Return the bytes of a repeated field."""
        return [value for value in self._fields.get(field, []) if isinstance(value, memoryview)]

    def numbers(self, field: int) -> list[int]:
        """Return a repeated field of signed 64-bit integers."""
        found = [value for value in self._fields.get(field, []) if isinstance(value, int)]
        return [value - 2**64 if value >= 2**63 else value for value in found]


def parse_message(data: memoryview, shape: MessageShape, *, limit: int = 10_000) -> ProtobufMessage:
    """Parse the fields of one message.

    Args:
        data: Bytes of the message.
        shape: Its allowed fields.
        limit: Largest number of fields.

    Raises:
        ValueError: If a field is unknown, has another encoding or occurs too often, a number is not in its shortest
            form, or the message is cut short.
    """
    fields: dict[int, list[int | memoryview]] = {}
    at = count = 0
    while at < len(data):
        tag, after = read_varint(data, at)
        count += 1
        if after - at > _MAX_TAG_BYTES or not 1 <= tag >> 3 <= _MAX_FIELD or count > limit:
            raise ValueError(f"{shape.name}: a field of number {tag >> 3}, or more than {limit:,} fields")
        field, wire, at = tag >> 3, tag & 7, after
        kind = shape.once.get(field) or shape.repeated.get(field)
        if kind is None or kind.value != wire or (field in fields and field in shape.once):
            words = f"{shape.name} holds field {field} of type {wire}, which may not be there, or not twice"
            raise ValueError(shape.refused.get(field, words))
        value: int | memoryview
        if kind is WireType.VARINT:
            value, at = read_varint(data, at)
        else:
            size, at = read_varint(data, at) if kind is WireType.BYTES else (4, at)
            if size > len(data) - at:
                raise ValueError("cut short")
            value, at = data[at : at + size], at + size
        fields.setdefault(field, []).append(value)
    return ProtobufMessage(fields)


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the varint at position `at`, and the position after it.

    Raises:
        ValueError: If it is cut short, above 64 bits, or not in its shortest form.
    """
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("cut short")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if (not byte and shift) or value >= 2**64:
                break
            return value, at
    raise ValueError("a number is above 64 bits, or longer than it need be")


def parse_varints(data: memoryview) -> NDArray[np.uint64]:
    """Return all varints of a block that holds nothing else, ``(n,)`` uint64, with the rules of `read_varint`.

    Raises:
        ValueError: As `read_varint`.
    """
    raw = np.frombuffer(data, np.uint8)
    if not len(raw):
        return np.zeros(0, np.uint64)
    ends = np.flatnonzero(raw < 128)
    if not len(ends) or ends[-1] != len(raw) - 1:
        raise ValueError("cut short")
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    last = raw[ends]
    if (sizes > 10).any() or ((last == 0) & (sizes > 1)).any() or ((sizes == 10) & (last > 1)).any():
        raise ValueError("a number is above 64 bits, or longer than it need be")
    values = np.zeros(len(ends), np.uint64)
    for place in range(int(sizes.max())):
        has = sizes > place
        part = (raw[starts[has] + place] & 127).astype(np.uint64)
        values[has] |= part << np.uint64(7 * place)
    return values
