"""Named arrays as safetensors bytes: no code inside, shapes known before they are believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phasewatch.errors import RunError


def pack(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Give the bytes of a file; the same arrays are the same bytes."""
    from safetensors.numpy import save

    return bytes(save({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}))


def unpack(
    files: Mapping[str, bytes], name: str, shapes: Mapping[str, tuple[int, ...]], *, model: str
) -> dict[str, NDArray[Any]]:
    """Read a file whose arrays are known by name and shape.

    Raises:
        RunError: If the file is absent, is no safetensors file, or holds other arrays than expected.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if name not in files:
        raise RunError(f"checkpoint of {model}: {name} is not among its files ({', '.join(files) or 'none'})")
    try:
        found = load(files[name])
    except (SafetensorError, ValueError, KeyError) as exc:
        raise RunError(f"checkpoint of {model}: {name} is not a safetensors file: {exc}") from exc
    theirs = {key: tuple(value.shape) for key, value in found.items()}
    if theirs != dict(shapes):
        odd = next(key for key in sorted(theirs.keys() | shapes.keys()) if theirs.get(key) != shapes.get(key))
        raise RunError(
            f"checkpoint of {model}: {name} holds {odd} of shape {theirs.get(odd)}, expected {shapes.get(odd)}"
        )
    if any(not np.isfinite(value).all() for value in found.values()):
        raise RunError(f"checkpoint of {model}: {name} holds a number that is not finite")
    return found
