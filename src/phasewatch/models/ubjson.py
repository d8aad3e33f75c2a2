"""Parse and render Universal Binary JSON as XGBoost writes it; every size is checked against the bytes that are left.

Source: ubjson.org, draft 12, without what XGBoost never writes (no-ops, null, sized objects, arrays without a count).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_UBJSON_DEPTH",
    "MAX_UBJSON_TEXT_BYTES",
    "MAX_UBJSON_VALUES",
    "parse_ubjson",
    "render_array",
    "render_ubjson",
]

MAX_UBJSON_DEPTH = 8
MAX_UBJSON_VALUES = 200_000  # 5,000 trees of 22 values need 110,000
MAX_UBJSON_TEXT_BYTES = 1_024

_INT64_STRUCT = struct.Struct(">q")
_INTEGER_SIZES = {b"i": 1, b"U": 1, b"I": 2, b"l": 4, b"L": 8}
_ARRAY_DTYPES: Mapping[bytes, np.dtype[Any]] = {
    b"i": np.dtype("i1"),
    b"U": np.dtype("u1"),
    b"I": np.dtype(">i2"),
    b"l": np.dtype(">i4"),
    b"L": np.dtype(">i8"),
    b"d": np.dtype(">f4"),
    b"D": np.dtype(">f8"),
}


def parse_ubjson(data: bytes) -> Any:
    """Parse one value: objects to dicts, counted arrays to lists, typed arrays to views of `data`.

    Raises:
        ValueError: If the bytes are cut short, hold any other type, or exceed a bound.
    """
    reader = _UbjsonReader(data)
    value = reader.read_value(0)
    if reader.at != len(data):
        raise ValueError(f"{len(data) - reader.at} bytes follow the end")
    return value


class _UbjsonReader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.left = data, 0, MAX_UBJSON_VALUES

    def read_value(self, depth: int) -> Any:
        self.left -= 1
        if self.left < 0 or depth > MAX_UBJSON_DEPTH:
            raise ValueError(
                f"more than {MAX_UBJSON_VALUES:,} values, or more than {MAX_UBJSON_DEPTH} inside each other"
            )
        marker = self.data[self.at : self.at + 1]
        self.at += 1
        if marker == b"[":
            return self._read_array(depth)
        if marker in _INTEGER_SIZES:
            return self._read_integer(marker)
        if marker == b"S":
            return self._read_text()
        if marker == b"{":
            return self._read_object(depth)
        raise ValueError(f"unknown type {marker!r} at byte {self.at - 1}")

    def _read_object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        data = self.data
        while data[self.at : self.at + 1] != b"}":
            key = self._read_text()
            if key in found:
                raise ValueError(f"key {key[:40]!r} twice")
            found[key] = self.read_value(depth + 1)
        self.at += 1
        return found

    def _read_array(self, depth: int) -> list[Any] | NDArray[Any]:
        at = self.at
        head = self.data[at : at + 3]
        if head[:1] == b"$" and head[2:] == b"#":
            dtype = _ARRAY_DTYPES.get(head[1:2])
            if dtype is None:
                raise ValueError(f"array of unknown type {head[1:2]!r} at byte {at}")
            self.at += 3
            count = self._read_size()
            size = count * dtype.itemsize
            if size > len(self.data) - self.at:
                raise ValueError(f"cut short: {size:,} bytes are announced at byte {self.at}")
            self.at += size
            return np.frombuffer(self.data, dtype, count, self.at - size)
        if head[:1] != b"#":
            raise ValueError(f"array without a count at byte {at}")
        self.at += 1
        count = self._read_size()
        if count > self.left:
            raise ValueError(f"more than {MAX_UBJSON_VALUES:,} values")
        return [self.read_value(depth + 1) for _ in range(count)]

    def _read_text(self) -> str:
        size = self._read_size()
        if size > MAX_UBJSON_TEXT_BYTES:
            raise ValueError(f"a text of {size:,} bytes, at most {MAX_UBJSON_TEXT_BYTES:,} are read")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def _read_size(self) -> int:
        """Read a size that is not above the bytes that are left; XGBoost writes nearly all of them with 64 bits."""
        data, at = self.data, self.at
        if data[at : at + 1] == b"L" and at + 9 <= len(data):
            size = int(_INT64_STRUCT.unpack_from(data, at + 1)[0])
            self.at = at + 9
        else:
            size = self._read_integer(self._read_bytes(1))
        if not 0 <= size <= len(data) - self.at:
            raise ValueError(f"a size of {size:,} at byte {at}, where {len(data) - self.at:,} are left")
        return size

    def _read_integer(self, marker: bytes) -> int:
        if marker not in _INTEGER_SIZES:
            raise ValueError(f"type {marker!r} in place of a whole number at byte {self.at}")
        return int.from_bytes(self._read_bytes(_INTEGER_SIZES[marker]), "big", signed=marker != b"U")

    def _read_bytes(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"cut short: {size:,} bytes are announced at byte {self.at}")
        self.at += size
        return self.data[self.at - size : self.at]


def render_array(values: NDArray[Any], kind: bytes) -> bytes:
    """Render a typed array as XGBoost does (64-bit counts).

    Args:
        values: ``(n,)`` numbers, converted to the type.
        kind: Type marker of UBJSON, such as ``b"d"`` for float32.
    """
    return b"[$" + kind + b"#L" + len(values).to_bytes(8, "big") + values.astype(_ARRAY_DTYPES[kind]).tobytes()


def render_ubjson(value: Any) -> bytes:
    """Render an object, list, text or integer as XGBoost does; bytes are values that were rendered before."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, Mapping):
        return b"{" + b"".join(_render_text(key) + render_ubjson(inner) for key, inner in value.items()) + b"}"
    if isinstance(value, list):
        return b"[#L" + len(value).to_bytes(8, "big") + b"".join(map(render_ubjson, value))
    if isinstance(value, str):
        return b"S" + _render_text(value)
    sizes = ((b"i", 1), (b"I", 2), (b"l", 4), (b"L", 8))
    marker, size = next((m, s) for m, s in sizes if -(2 ** (8 * s - 1)) <= value < 2 ** (8 * s - 1))
    return marker + int(value).to_bytes(size, "big", signed=True)


def _render_text(text: str) -> bytes:
    data = text.encode()
    return b"L" + len(data).to_bytes(8, "big") + data
