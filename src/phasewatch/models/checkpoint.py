"""The checkpoint format: `checkpoint.json` and the files that it lists, whose digests are verified before parsing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch import atomic
from phasewatch._version import __version__
from phasewatch.errors import MismatchError, RunError
from phasewatch.models.alarm import AlarmRule
from phasewatch.models.foreign import foreign_errors
from phasewatch.models.smoothing import PhaseFilter
from phasewatch.types import PHASES

__all__ = [
    "CHECKPOINT_FILE",
    "CHECKPOINT_FORMAT",
    "MAX_CHECKPOINT_BYTES",
    "MAX_CHECKPOINT_FILES",
    "MAX_CHECKPOINT_HEADER_BYTES",
    "MAX_COLUMNS",
    "MAX_MAGNITUDE",
    "MAX_WEIGHTS_HEADER_BYTES",
    "WEIGHTS_FILE",
    "CheckpointHeader",
    "ExpectedArrays",
    "FileEntry",
    "add_header_digest",
    "collect_versions",
    "pack_weights",
    "read_checkpoint",
    "read_header",
    "unpack_weights",
    "write_checkpoint",
]

WEIGHTS_FILE = "weights.safetensors"
CHECKPOINT_FORMAT = "phasewatch-checkpoint/2"
CHECKPOINT_FILE = "checkpoint.json"
MAX_CHECKPOINT_HEADER_BYTES = 4 * 2**20
MAX_CHECKPOINT_BYTES = 128 * 2**20
MAX_CHECKPOINT_FILES = 8
MAX_COLUMNS = 4096
_TEMPERATURE_RANGE = (0.1, 10.0)  # calibration stays in 0.25..4
_FILE_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,40}")

_SettingValue = int | float | str | bool | None


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Size and digest of one file listed in a header."""

    bytes: int
    sha256: str


class CheckpointHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of `checkpoint.json`.

    Attributes:
        model: A registry key; text of a checkpoint is never imported.
        columns: Columns of the model's input, in order; `mask` is the channel set that chose them.
        table, floors: Transform of the values, and the channel scales that it took from train.
        seen: Codes of the phases in train; the others have probability 0.
        temperature: Temperature of the probabilities, fitted on validation B.
        filter: Phase filter, fitted on train and validation B; None for the random window split.
        alarms: Alarm rules, at most one of each kind at each stride, fixed in training.
        trained_on: Part → digest of its windows and labels.
        trained_with: Part → number of windows.
        val_a_macro_f1: Macro-F1 on validation A, by which models are selected.
        files: File name → size and sha256.
        sha256: Digest of the canonical JSON (sorted keys, no spaces) of the header with this field empty.
    """

    format: str
    model: str
    input_kind: Annotated[str, msgspec.Meta(pattern="^(table|tensor|elapsed|levels|host|load|duration)$")]
    mask: str
    columns: tuple[str, ...]
    schema_hash: str
    behaviour_fingerprint: str
    classes: tuple[str, ...]
    seen: tuple[int, ...]
    seed: int
    config: dict[str, _SettingValue]
    temperature: float
    history: dict[str, tuple[float, ...]]
    trained_on: dict[str, str]
    versions: dict[str, str]
    files: dict[str, FileEntry]
    table: Annotated[str, msgspec.Meta(pattern="^(raw|context|commissioned)$")] = "raw"
    floors: dict[str, float] = {}
    filter: PhaseFilter | None = None
    alarms: tuple[AlarmRule, ...] = ()
    trained_with: dict[str, int] = {}
    val_a_macro_f1: float = 0.0
    sha256: str = ""


def collect_versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Return the installed versions of phasewatch and of the distributions; missing ones are left out."""
    found = {"phasewatch": __version__}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_checkpoint(folder: Path, header: CheckpointHeader, files: Mapping[str, bytes]) -> None:
    """Write the files, then the header that lists them.

    Args:
        folder: Folder of the checkpoint; created if absent.
        header: Header whose `files` and `sha256` are filled in here.
        files: File name → bytes.
    """
    atomic.make_folder(folder)
    for name, data in sorted(files.items()):
        atomic.write_atomic(folder / name, data)
    entries = {
        name: FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in sorted(files.items())
    }
    full = add_header_digest(msgspec.structs.replace(header, files=entries))
    atomic.write_atomic(
        folder / CHECKPOINT_FILE, msgspec.json.format(msgspec.json.encode(full, order="sorted"), indent=1) + b"\n"
    )


def add_header_digest(header: CheckpointHeader) -> CheckpointHeader:
    """Return the header with its own digest in `sha256`."""
    without_digest = msgspec.structs.replace(header, sha256="")
    digest = hashlib.sha256(msgspec.json.encode(without_digest, order="sorted")).hexdigest()
    return msgspec.structs.replace(header, sha256=digest)


def read_checkpoint(folder: Path) -> tuple[CheckpointHeader, dict[str, bytes]]:
    """Read the header of a checkpoint and its files, with their digests verified.

    Raises:
        RunError: If a file is absent, too large or invalid.
        MismatchError: If a file's bytes were changed, or the checkpoint has another format.
    """
    header = read_header(folder)
    files: dict[str, bytes] = {}
    if (
        len(header.files) > MAX_CHECKPOINT_FILES
        or sum(max(e.bytes, 0) for e in header.files.values()) > MAX_CHECKPOINT_BYTES
    ):
        raise RunError(
            f"{folder / CHECKPOINT_FILE}: lists {len(header.files)} files, or over {MAX_CHECKPOINT_BYTES:,} bytes; "
            "the checkpoint was not made by phasewatch"
        )
    for name, entry in header.files.items():
        if not _FILE_NAME.fullmatch(name):
            raise RunError(
                f"{folder / CHECKPOINT_FILE}: invalid file name {name!r}; the checkpoint was not made by phasewatch"
            )
        data = _read_bounded(folder / name, MAX_CHECKPOINT_BYTES)
        if (found := hashlib.sha256(data).hexdigest()) != entry.sha256 or len(data) != entry.bytes:
            raise MismatchError(
                f"{folder / name}: found sha256 {found[:12]} ({len(data)} bytes), expected {entry.sha256[:12]} "
                f"({entry.bytes} bytes); the file was changed or cut, train the model again"
            )
        files[name] = data
    return header, files


def read_header(folder: Path) -> CheckpointHeader:
    """Read and check `checkpoint.json` without the other files.

    Raises:
        RunError: If it is absent, too large or invalid.
        MismatchError: If it was edited, or has another format or other classes.
    """
    path = folder / CHECKPOINT_FILE
    data = _read_bounded(path, MAX_CHECKPOINT_HEADER_BYTES)
    try:
        found = msgspec.json.decode(data, type=_CheckpointFormat).format
        if found != CHECKPOINT_FORMAT:
            raise MismatchError(
                f"{path}: found format {found!r}, this version reads {CHECKPOINT_FORMAT!r}; train the model again"
            )
        header = msgspec.json.decode(data, type=CheckpointHeader)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RunError(f"{path}: not a checkpoint: {exc}") from exc
    if header.sha256 != add_header_digest(header).sha256:
        raise MismatchError(f"{path}: the digest does not match the content, so it was edited; train the model again")
    expected = tuple(str(p) for p in PHASES)
    if header.classes != expected:
        raise MismatchError(f"{path}: found classes {', '.join(header.classes)}, expected {', '.join(expected)}")
    if (invalid := _find_invalid_value(header)) is not None:
        raise RunError(f"{path}: invalid value: {invalid}; train the model again")
    return header


def _find_invalid_value(header: CheckpointHeader) -> str | None:
    """Return a value that no training produces, for the message; None if all are valid."""
    low, high = _TEMPERATURE_RANGE
    if not header.seen or not set(header.seen) <= set(range(len(PHASES))):
        return f"seen {str(header.seen)[:40]}"
    if not low <= header.temperature <= high:
        return f"temperature {header.temperature:g}"
    if not 0 <= header.seed < 2**63:
        return f"seed {str(header.seed)[:40]}"
    if not 1 <= len(header.columns) <= MAX_COLUMNS or len(set(header.columns)) != len(header.columns):
        return f"{len(header.columns)} columns, expected 1 to {MAX_COLUMNS} and each once"
    if not all(0.0 < scale <= MAX_MAGNITUDE for scale in header.floors.values()):
        return "floors with a scale that is not finite or not above 0"
    if len({(rule.kind, rule.stride_s) for rule in header.alarms}) != len(header.alarms):
        return "alarms with two rules of one kind and stride"
    return None


class _CheckpointFormat(msgspec.Struct, frozen=True):
    format: str


def _read_bounded(path: Path, limit: int) -> bytes:
    try:
        data = atomic.read_regular(path, limit)
    except FileNotFoundError as exc:
        raise RunError(f"{path}: not found; is its folder a checkpoint of `phasewatch train`?") from exc
    except OSError as exc:
        raise RunError(f"{path}: cannot be read: {exc.strerror}") from exc
    if len(data) > limit:
        raise RunError(f"{path}: more than {limit} bytes, not a checkpoint's file")
    return data


MAX_WEIGHTS_HEADER_BYTES = 2**20
MAX_MAGNITUDE = 1e30  # of a number in a file: sums of such numbers stay finite in float32
_DTYPE_BYTES = {"F32": 4, "F64": 8, "I32": 4, "U8": 1}

ExpectedArrays = Mapping[str, tuple[str, tuple[int, ...]]]


class _ArrayEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def pack_weights(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Render arrays as a safetensors file; the same arrays give the same bytes."""
    from safetensors.numpy import save

    return bytes(save({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}))


def unpack_weights(
    files: Mapping[str, bytes], name: str, expected: ExpectedArrays, *, model: str
) -> dict[str, NDArray[Any]]:
    """Parse a safetensors file whose array names, dtypes and shapes are known.

    Args:
        files: Files of a checkpoint, name → bytes.
        name: Name of the safetensors file.
        expected: Array name → dtype (a key of `_DTYPE_BYTES`) and shape, as the model's settings imply them.
        model: Key of the model, for messages.

    Raises:
        RunError: If the file is absent or not a safetensors file, holds other arrays than expected, or a number that
            is not finite or above `MAX_MAGNITUDE`.
    """
    from safetensors.numpy import load

    place = f"checkpoint of {model}: {name}"
    if name not in files:
        raise RunError(f"{place} is not among its files ({', '.join(files) or 'none'})")
    _check_weights_header(files[name], expected, place)
    with foreign_errors(place, "is not a safetensors file"):
        found: dict[str, NDArray[Any]] = load(files[name])
    if any(not (np.abs(value) <= MAX_MAGNITUDE).all() for value in found.values()):
        raise RunError(f"{place} holds a number that is not finite or above {MAX_MAGNITUDE:g}")
    return found


def _check_weights_header(data: bytes, expected: ExpectedArrays, place: str) -> None:
    """Raise RunError unless the header names exactly the expected arrays, and they fill the file without a gap."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, MAX_WEIGHTS_HEADER_BYTES):
        raise RunError(f"{place} is not a safetensors file: its header of {size:,} bytes is cut short or too large")
    try:
        raw = msgspec.json.decode(data[8 : 8 + size], type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        found = {key: msgspec.json.decode(value, type=_ArrayEntry) for key, value in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RunError(f"{place} is not a safetensors file: {exc}") from exc
    shapes = {key: (entry.dtype, entry.shape) for key, entry in found.items()}
    if shapes != dict(expected):
        odd = min(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
        raise RunError(
            f"{place} holds {odd[:60]} as {_describe_array(shapes.get(odd))}, "
            f"expected {_describe_array(expected.get(odd))}"
        )
    at = 0
    for key, entry in sorted(found.items(), key=lambda item: item[1].data_offsets):
        length = prod(entry.shape) * _DTYPE_BYTES[entry.dtype]
        if entry.data_offsets != (at, at + length):
            raise RunError(f"{place}: {key[:60]} lies at {entry.data_offsets}, expected ({at}, {at + length})")
        at += length
    if at != len(data) - 8 - size:
        raise RunError(f"{place} holds {len(data) - 8 - size:,} bytes of arrays, expected {at:,}")


def _describe_array(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if entry is None else f"{entry[0][:10]} of shape {str(entry[1])[:60]}"
