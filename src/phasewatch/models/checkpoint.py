"""A checkpoint on disk: `checkpoint.json` and the files whose sha256 it lists, verified before any parser sees them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated

import msgspec

import phasewatch
from phasewatch import atomic
from phasewatch.errors import MismatchError, RunError
from phasewatch.models.alarm import AlarmRule
from phasewatch.models.filter import PhaseFilter
from phasewatch.vocab import PHASES

FORMAT = "phasewatch-checkpoint/1"
HEADER = "checkpoint.json"
MAX_HEADER_BYTES = 4 * 2**20
MAX_FILE_BYTES = 128 * 2**20
MAX_FILES = 8
MAX_COLUMNS = 4096
_TEMPERATURES = (0.1, 10.0)  # calibration stays in 0.25..4
_FILE_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,40}")

Setting = int | float | str | bool | None


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Size and digest of one file beside the header."""

    bytes: int
    sha256: str


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    config: dict[str, Setting]
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


def versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Name the versions of phasewatch and of the distributions; one that is not installed is passed over."""
    found = {"phasewatch": phasewatch.__version__}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(folder: Path, header: Header, files: Mapping[str, bytes]) -> None:
    """Write the files, then the header that makes them a checkpoint."""
    atomic.make_folder(folder)
    for name, data in sorted(files.items()):
        atomic.write_whole(folder / name, data)
    entries = {
        name: FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in sorted(files.items())
    }
    full = sealed(msgspec.structs.replace(header, files=entries))
    atomic.write_whole(
        folder / HEADER, msgspec.json.format(msgspec.json.encode(full, order="sorted"), indent=1) + b"\n"
    )


def sealed(header: Header) -> Header:
    """Give the header with the digest that fits it."""
    open_ = msgspec.structs.replace(header, sha256="")
    digest = hashlib.sha256(msgspec.json.encode(open_, order="sorted")).hexdigest()
    return msgspec.structs.replace(header, sha256=digest)


def read(folder: Path) -> tuple[Header, dict[str, bytes]]:
    """Read a checkpoint's header and the verified bytes of its files.

    Raises:
        RunError: If a file is absent, too large, or not a checkpoint's.
        MismatchError: If a file's bytes are not those that were written, or the checkpoint is of another format.
    """
    header = read_header(folder)
    files: dict[str, bytes] = {}
    if len(header.files) > MAX_FILES or sum(max(e.bytes, 0) for e in header.files.values()) > MAX_FILE_BYTES:
        raise RunError(
            f"{folder / HEADER}: lists {len(header.files)} files, or more than {MAX_FILE_BYTES:,} bytes; "
            "the checkpoint was not made by phasewatch"
        )
    for name, entry in header.files.items():
        if not _FILE_NAME.fullmatch(name):
            raise RunError(
                f"{folder / HEADER}: file name {name!r} is not a plain name; the checkpoint was not made by phasewatch"
            )
        data = _read_bounded(folder / name, MAX_FILE_BYTES)
        if (found := hashlib.sha256(data).hexdigest()) != entry.sha256 or len(data) != entry.bytes:
            raise MismatchError(
                f"{folder / name}: found sha256 {found[:12]} ({len(data)} bytes), expected {entry.sha256[:12]} "
                f"({entry.bytes} bytes); the file was changed or cut, train the cell again"
            )
        files[name] = data
    return header, files


def read_header(folder: Path) -> Header:
    """Read and check `checkpoint.json` alone."""
    path = folder / HEADER
    data = _read_bounded(path, MAX_HEADER_BYTES)
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found != FORMAT:
            raise MismatchError(f"{path}: found format {found!r}, this version reads {FORMAT!r}; train the model again")
        header = msgspec.json.decode(data, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RunError(f"{path}: not a checkpoint: {exc}") from exc
    if header.sha256 != sealed(header).sha256:
        raise MismatchError(f"{path}: its digest does not fit its content, so it was edited; train the model again")
    expected = tuple(str(p) for p in PHASES)
    if header.classes != expected:
        raise MismatchError(f"{path}: found classes {', '.join(header.classes)}, expected {', '.join(expected)}")
    if words := _offence(header):
        raise RunError(f"{path}: {words} cannot be; train the model again")
    return header


def _offence(header: Header) -> str:
    """Name a value that no training gives; empty if there is none."""
    low, high = _TEMPERATURES
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


class _Format(msgspec.Struct, frozen=True):
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
