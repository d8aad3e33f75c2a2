"""Named arrays as safetensors bytes: no code inside, names, types and shapes checked before an array is made.

Source: the safetensors format, a JSON header behind its size (8 bytes, little-endian), then the arrays end to end.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.errors import RunError
from phasewatch.models.foreign import foreign_errors

MAX_HEADER_BYTES = 2**20
_LARGEST = 1e30  # of a number in a file: what is computed from it in float32 has room
_BYTES = {"F32": 4, "F64": 8}

Expected = Mapping[str, tuple[str, tuple[int, ...]]]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Give the bytes of a file; the same arrays are the same bytes."""
    from safetensors.numpy import save

    return bytes(save({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}))


def unpack(files: Mapping[str, bytes], name: str, expected: Expected, *, model: str) -> dict[str, NDArray[Any]]:
    """Read a file whose arrays are known by name, type and shape.

    Args:
        files: Of a checkpoint.
        name: Of the file.
        expected: Array → its type (``F32`` or ``F64``) and shape, as the model's settings imply them.
        model: For messages.

    Raises:
        RunError: If the file is absent, is no safetensors file, or holds other arrays than expected.
    """
    from safetensors.numpy import load

    place = f"checkpoint of {model}: {name}"
    if name not in files:
        raise RunError(f"{place} is not among its files ({', '.join(files) or 'none'})")
    _check_header(files[name], expected, place)
    with foreign_errors(place, "is not a safetensors file"):
        found: dict[str, NDArray[Any]] = load(files[name])
    if any(not (np.abs(value) <= _LARGEST).all() for value in found.values()):
        raise RunError(f"{place} holds a number that is not finite or above {_LARGEST:g}")
    return found


def _check_header(data: bytes, expected: Expected, place: str) -> None:
    """Raise RunError unless the header names exactly the expected arrays, and they fill the file without a gap."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, MAX_HEADER_BYTES):
        raise RunError(f"{place} is not a safetensors file: its header of {size:,} bytes is cut short or too large")
    try:
        raw = msgspec.json.decode(data[8 : 8 + size], type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        found = {key: msgspec.json.decode(value, type=_Entry) for key, value in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RunError(f"{place} is not a safetensors file: {exc}") from exc
    theirs = {key: (entry.dtype, entry.shape) for key, entry in found.items()}
    if theirs != dict(expected):
        odd = min(key for key in theirs.keys() | expected.keys() if theirs.get(key) != expected.get(key))
        raise RunError(f"{place} holds {odd[:60]} as {_words(theirs.get(odd))}, expected {_words(expected.get(odd))}")
    at = 0
    for key, entry in sorted(found.items(), key=lambda item: item[1].data_offsets):
        length = prod(entry.shape) * _BYTES[entry.dtype]
        if entry.data_offsets != (at, at + length):
            raise RunError(f"{place}: {key[:60]} lies at {entry.data_offsets}, expected ({at}, {at + length})")
        at += length
    if at != len(data) - 8 - size:
        raise RunError(f"{place} holds {len(data) - 8 - size:,} bytes of arrays, expected {at:,}")


def _words(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if entry is None else f"{entry[0][:10]} of shape {str(entry[1])[:60]}"
