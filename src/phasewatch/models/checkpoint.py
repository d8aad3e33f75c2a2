"""A checkpoint on disk: `checkpoint.json` and the files whose sha256 it lists, verified before any parser sees them."""

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

WEIGHTS_FILE = "weights.safetensors"

CHECKPOINT_FORMAT = "phasewatch-checkpoint/1"
CHECKPOINT_FILE = "checkpoint.json"
MAX_CHECKPOINT_HEADER_BYTES = 4 * 2**20
MAX_CHECKPOINT_BYTES = 128 * 2**20
MAX_CHECKPOINT_FILES = 8
MAX_COLUMNS = 4096
_TEMPERATURE_RANGE = (0.1, 10.0)  # calibration stays in 0.25..4
_FILE_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,40}")

SettingValue = int | float | str | bool | None


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Size and digest of one file beside the header."""

    bytes: int
    sha256: str


class CheckpointHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`checkpoint.json`.

    Attributes:
        model: A registry key; text of a checkpoint is never imported.
        columns: What the model takes, in order; `mask` is the threat model that chose them.
        table, floors: What was made of the values, and the scales that this took from train.
        seen: Codes of the phases that occurred in train; the others have probability 0.
        temperature: Of the probabilities, fitted on validation B.
        filter: What smooths them over time, fitted on train and validation B; None where windows were dealt.
        alarm: ``none`` or ``phase``, the filter whose probabilities it hears → the rule, fixed when this was trained.
        trained_on: Part → digest of the very windows and labels.
        trained_with: Part → number of windows.
        val_a_macro_f1: What models are chosen by.
        files: Name → size and sha256.
        sha256: Digest of the canonical JSON (sorted keys, no spaces) of all of this with this field empty.
    """

    format: str
    model: str
    input_kind: Annotated[str, msgspec.Meta(pattern="^(table|tensor|elapsed|levels|host)$")]
    mask: str
    columns: tuple[str, ...]
    schema_hash: str
    behaviour_fingerprint: str
    classes: tuple[str, ...]
    seen: tuple[int, ...]
    seed: int
    config: dict[str, SettingValue]
    temperature: float
    history: dict[str, tuple[float, ...]]
    trained_on: dict[str, str]
    versions: dict[str, str]
    files: dict[str, FileEntry]
    table: Annotated[str, msgspec.Meta(pattern="^(raw|context|commissioned)$")] = "raw"
    floors: dict[str, float] = {}
    filter: PhaseFilter | None = None
    alarm: dict[str, AlarmRule] = {}
    trained_with: dict[str, int] = {}
    val_a_macro_f1: float = 0.0
    sha256: str = ""


def collect_versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Name the versions of phasewatch and of the distributions; one that is not installed is passed over."""
    found = {"phasewatch": __version__}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_checkpoint(folder: Path, header: CheckpointHeader, files: Mapping[str, bytes]) -> None:
    """Write the files, then the header that makes them a checkpoint."""
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
    """Give the header with the digest that fits it."""
    open_ = msgspec.structs.replace(header, sha256="")
    digest = hashlib.sha256(msgspec.json.encode(open_, order="sorted")).hexdigest()
    return msgspec.structs.replace(header, sha256=digest)


def read_checkpoint(folder: Path) -> tuple[CheckpointHeader, dict[str, bytes]]:
    """Read a checkpoint's header and the verified bytes of its files.

    Raises:
        RunError: If a file is absent, too large, or not a checkpoint's.
        MismatchError: If a file's bytes are not those that were written, or the checkpoint is of another format.
    """
    header = read_header(folder)
    files: dict[str, bytes] = {}
    if (
        len(header.files) > MAX_CHECKPOINT_FILES
        or sum(max(e.bytes, 0) for e in header.files.values()) > MAX_CHECKPOINT_BYTES
    ):
        raise RunError(
            f"{folder / CHECKPOINT_FILE}: lists {len(header.files)} files, or more than {MAX_CHECKPOINT_BYTES:,} bytes; "
            "the checkpoint was not made by phasewatch"
        )
    for name, entry in header.files.items():
        if not _FILE_NAME.fullmatch(name):
            raise RunError(
                f"{folder / CHECKPOINT_FILE}: file name {name!r} is not a plain name; the checkpoint was not made by phasewatch"
            )
        data = _read_bounded(folder / name, MAX_CHECKPOINT_BYTES)
        if (found := hashlib.sha256(data).hexdigest()) != entry.sha256 or len(data) != entry.bytes:
            raise MismatchError(
                f"{folder / name}: found sha256 {found[:12]} ({len(data)} bytes), expected {entry.sha256[:12]} "
                f"({entry.bytes} bytes); the file was changed or cut, train the cell again"
            )
        files[name] = data
    return header, files


def read_header(folder: Path) -> CheckpointHeader:
    """Read and check `checkpoint.json` alone."""
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
        raise MismatchError(f"{path}: its digest does not fit its content, so it was edited; train the model again")
    expected = tuple(str(p) for p in PHASES)
    if header.classes != expected:
        raise MismatchError(f"{path}: found classes {', '.join(header.classes)}, expected {', '.join(expected)}")
    if words := _describe_invalid_value(header):
        raise RunError(f"{path}: {words} cannot be; train the model again")
    return header


def _describe_invalid_value(header: CheckpointHeader) -> str:
    """Name a value that no training gives; empty if there is none."""
    low, high = _TEMPERATURE_RANGE
    if not header.seen or not set(header.seen) <= set(range(len(PHASES))):
        return f"seen {str(header.seen)[:40]}"
    if not low <= header.temperature <= high:
        return f"temperature {header.temperature:g}"
    if not 0 <= header.seed < 2**63:
        return f"seed {str(header.seed)[:40]}"
    if not 1 <= len(header.columns) <= MAX_COLUMNS or len(set(header.columns)) != len(header.columns):
        return f"a list of {len(header.columns)} columns, none at all, more than {MAX_COLUMNS} or one twice,"
    if not all(0.0 < scale <= 1e30 for scale in header.floors.values()):
        return "floors with a scale that is not finite or not above 0"
    return ""


class _CheckpointFormat(msgspec.Struct, frozen=True):
    format: str


def _read_bounded(path: Path, limit: int) -> bytes:
    try:
        data = atomic.read_regular(path, limit)
    except FileNotFoundError as exc:
        raise RunError(f"{path}: absent; is its folder a checkpoint of `phasewatch train`?") from exc
    except OSError as exc:
        raise RunError(f"{path}: cannot be read: {exc.strerror}") from exc
    if len(data) > limit:
        raise RunError(f"{path}: more than {limit} bytes, not a checkpoint's file")
    return data


MAX_WEIGHTS_HEADER_BYTES = 2**20
_MAX_MAGNITUDE = 1e30  # of a number in a file: what is computed from it in float32 has room
_DTYPE_BYTES = {"F32": 4, "F64": 8}

ExpectedArrays = Mapping[str, tuple[str, tuple[int, ...]]]


class _ArrayEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def pack_weights(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Give the bytes of a file; the same arrays are the same bytes."""
    from safetensors.numpy import save

    return bytes(save({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}))


def unpack_weights(
    files: Mapping[str, bytes], name: str, expected: ExpectedArrays, *, model: str
) -> dict[str, NDArray[Any]]:
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
    _check_weights_header(files[name], expected, place)
    with foreign_errors(place, "is not a safetensors file"):
        found: dict[str, NDArray[Any]] = load(files[name])
    if any(not (np.abs(value) <= _MAX_MAGNITUDE).all() for value in found.values()):
        raise RunError(f"{place} holds a number that is not finite or above {_MAX_MAGNITUDE:g}")
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
    theirs = {key: (entry.dtype, entry.shape) for key, entry in found.items()}
    if theirs != dict(expected):
        odd = min(key for key in theirs.keys() | expected.keys() if theirs.get(key) != expected.get(key))
        raise RunError(
            f"{place} holds {odd[:60]} as {_describe_array(theirs.get(odd))}, expected {_describe_array(expected.get(odd))}"
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
