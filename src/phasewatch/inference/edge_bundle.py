"""The edge bundle: a .zip with a model for each channel set; written and read in memory, every digest checked."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.atomic import read_regular
from phasewatch.errors import MismatchError, MissingToolError, RunError, UsageError
from phasewatch.features.fingerprint import compute_column_digests
from phasewatch.features.inputs import list_input_channels
from phasewatch.inference.onnx_check import MAX_ONNX_BYTES, ONNX_INPUT, ONNX_OUTPUT, check_onnx
from phasewatch.inference.onnx_graph import ONNX_BATCH
from phasewatch.inference.onnx_session import open_session
from phasewatch.models.alarm import AlarmRule
from phasewatch.models.base import InputKind, InputSpec, InputVariant, ModelInputs
from phasewatch.models.checkpoint import CheckpointHeader, FileEntry
from phasewatch.models.foreign import foreign_errors
from phasewatch.models.probabilities import check_probabilities
from phasewatch.models.smoothing import PhaseFilter
from phasewatch.types import PHASES

__all__ = [
    "EDGE_CARD_FILE",
    "EDGE_FORMAT",
    "EDGE_HEADER_FILE",
    "EDGE_SCHEMA_FILE",
    "EXPORTABLE_INPUT_KINDS",
    "MAX_BUNDLE_BYTES",
    "MAX_MEMBERS",
    "MAX_TEXT_MEMBER_BYTES",
    "EdgeBundle",
    "EdgeHeader",
    "EdgeModel",
    "OnnxModel",
    "PostprocessingRules",
    "TrainingOrigin",
    "add_edge_digest",
    "extract_rules",
    "pack_edge_bundle",
    "parse_edge_bundle",
    "parse_rules",
    "read_edge_bundle",
    "render_rules",
]

EDGE_FORMAT = "phasewatch-edge/2"
EDGE_HEADER_FILE, EDGE_SCHEMA_FILE, EDGE_CARD_FILE = "edge.json", "feature_schema_v2.json", "card.md"
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a .zip can store


class TrainingOrigin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hosts, accelerators, architectures, origins and profiles of the training data, sorted; empty if unknown."""

    hosts: tuple[str, ...] = ()
    accels: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    episodes: int = 0


class EdgeModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of the bundle.

    Attributes:
        member: Name of its ONNX file, from raw windows to calibrated probabilities.
        threat: Channel set that chose its columns.
        columns: Columns of its input, in order.
        table, floors: Transform of the values, and the smallest scale of each channel for the host's baseline.
        rules: Phase filter and alarm rules of its checkpoint.
    """

    member: str
    model: str
    threat: str
    table: str
    seed: int
    input_kind: str
    columns: tuple[str, ...]
    rules: dict[str, Any]
    floors: dict[str, float] = {}


class EdgeHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`edge.json`.

    Attributes:
        recipe, fold: Split of the training episodes.
        trained: Origin of the training data.
        models: Models, the largest channel set first.
        members: Every other file of the bundle → its size and sha256.
        sha256: Digest of the canonical JSON (sorted keys, no spaces) of all of this with this field empty.
    """

    format: str
    recipe: str
    fold: str
    schema_hash: str
    behaviour_fingerprint: str
    classes: tuple[str, ...]
    trained: TrainingOrigin
    models: tuple[EdgeModel, ...]
    versions: dict[str, str]
    members: dict[str, FileEntry]
    sha256: str = ""


def add_edge_digest(header: EdgeHeader) -> EdgeHeader:
    """Return the header with its own digest in `sha256`."""
    without_digest = msgspec.structs.replace(header, sha256="")
    digest = hashlib.sha256(msgspec.json.encode(without_digest, order="sorted")).hexdigest()
    return msgspec.structs.replace(header, sha256=digest)


def pack_edge_bundle(header: EdgeHeader, members: Mapping[str, bytes]) -> bytes:
    """Render an edge bundle; the same content gives the same bytes.

    Args:
        header: Header whose `members` and `sha256` are filled in here.
        members: File name → bytes.

    Raises:
        UsageError: If the ONNX file of a model is not among the members.
    """
    for model in header.models:
        if model.member not in members:
            raise UsageError(f"edge bundle: {model.member} is not among its members")
    entries = {
        name: FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in sorted(members.items())
    }
    full = add_edge_digest(msgspec.structs.replace(header, members=entries))
    text = msgspec.json.format(msgspec.json.encode(full, order="sorted"), indent=1) + b"\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, data in ((EDGE_HEADER_FILE, text), *sorted(members.items())):
            info = zipfile.ZipInfo(name, _ZIP_EPOCH)
            info.create_system, info.external_attr = 3, 0o100644 << 16
            file.writestr(info, data)
    return buffer.getvalue()


MAX_BUNDLE_BYTES = 256 * 2**20
MAX_TEXT_MEMBER_BYTES = 4 * 2**20
MAX_MEMBERS = 32
EXPORTABLE_INPUT_KINDS = (InputKind.TABLE, InputKind.TENSOR)
_ZIP_END = struct.Struct("<4s4H2LH")  # what a .zip without a comment ends with
_ALLOWED_ZIP_FLAGS = 0x0806  # compression level, and UTF-8 names
_MEMBER_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_.+-]{0,80}")
_PROBABILITY_SUM_TOLERANCE = 1e-3  # of five float32
_EXPORT_HINT = "make it again with `phasewatch export RUN --out X.zip`"


class _ContainerError(ValueError):
    """The .zip holds something that an export never writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeBundle:
    """A checked edge bundle.

    Attributes:
        file: Its name, for messages.
        header: The content of `edge.json`.
        onnx: Member name → bytes of the ONNX file.
        card: Text of the model card.
    """

    file: str
    header: EdgeHeader
    onnx: Mapping[str, bytes]
    card: str

    def build_input_spec(self, model: EdgeModel) -> InputSpec:
        """Return the input of one of its models."""
        return _build_input_spec(self.header, model)


def read_edge_bundle(path: Path) -> EdgeBundle:
    """Read and check an edge bundle.

    Raises:
        RunError: If it is absent, over a bound or not an edge bundle.
        MismatchError: If its bytes were changed, or it was trained with other channels, stats or phases.
    """
    try:
        data = read_regular(path, MAX_BUNDLE_BYTES)
    except OSError as exc:
        raise RunError(f"{path}: cannot be read: {exc.strerror}") from exc
    return parse_edge_bundle(data, file=str(path))


def parse_edge_bundle(data: bytes, *, file: str) -> EdgeBundle:
    """Parse and check an edge bundle; `file` is its name in errors. See `read_edge_bundle`."""
    members = _read_members(data, file)
    header = _parse_header(members.pop(EDGE_HEADER_FILE), file)
    if set(members) != set(header.members):
        odd = min(set(members) ^ set(header.members))
        raise MismatchError(
            f"{file}: {odd} is in the bundle or in its {EDGE_HEADER_FILE}, but not in both; {_EXPORT_HINT}"
        )
    for name, entry in header.members.items():
        found = hashlib.sha256(members[name]).hexdigest()
        if (found, len(members[name])) != (entry.sha256, entry.bytes):
            raise MismatchError(
                f"{file}: {name}: found sha256 {found[:12]}, expected {entry.sha256[:12]}; the file was changed, "
                + _EXPORT_HINT
            )
    onnx = {}
    for model in header.models:
        if (
            model.member not in members
            or model.input_kind not in EXPORTABLE_INPUT_KINDS
            or model.table not in list(InputVariant)
        ):
            raise RunError(
                f"{file}: {model.member} is absent, or has an unknown input {model.input_kind[:20]!r}; {_EXPORT_HINT}"
            )
        spec = _build_input_spec(header, model)
        if spec.table is InputVariant.COMMISSIONED and not (
            set(list_input_channels(spec.kind, spec.names)) <= model.floors.keys()
        ):
            raise RunError(f"{file}: {model.member} lacks the scales for the host's baseline; {_EXPORT_HINT}")
        check_onnx(members[model.member], file=f"{file}: {model.member}", model=model.model, shape=spec.shape)
        onnx[model.member] = members[model.member]
    card = members.get(EDGE_CARD_FILE, b"").decode("utf-8", "replace")
    return EdgeBundle(file=file, header=header, onnx=onnx, card=card)


def _build_input_spec(header: EdgeHeader, model: EdgeModel) -> InputSpec:
    digests = compute_column_digests(
        model.columns
    )  # a bundle has those of all its models, which may be of more columns
    return InputSpec(
        kind=InputKind(model.input_kind),
        names=model.columns,
        mask=model.threat,
        schema_hash=digests.schema_hash,
        behaviour_fingerprint=digests.behaviour_fingerprint,
        table=InputVariant(model.table),
        floors=tuple(model.floors.items()),
    )


def _read_members(data: bytes, file: str) -> dict[str, bytes]:
    """Return member name → bytes; sizes in the .zip are not trusted.

    Raises:
        RunError: If it is not a .zip as an export writes it.
    """
    if len(data) > MAX_BUNDLE_BYTES:
        raise RunError(f"{file}: more than {MAX_BUNDLE_BYTES:,} bytes, not an edge bundle")
    end = data[-_ZIP_END.size :]
    if len(end) == _ZIP_END.size and end[:4] == b"PK\5\6":  # otherwise it is not a .zip, which is an error below
        _, _, _, _, count, directory, _, comment = _ZIP_END.unpack(end)
        if count > MAX_MEMBERS or directory > MAX_MEMBERS * 256 or comment or data[-42:-38] == b"PK\6\7":
            raise RunError(f"{file}: not an edge bundle: it holds {count} files, or a directory of another kind")
    elif data[:2] == b"PK":
        raise RunError(f"{file}: not a readable .zip: something follows its directory; {_EXPORT_HINT}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            _check_container(archive, infos, len(data))
            if EDGE_HEADER_FILE not in names or len(names) > MAX_MEMBERS or len(set(names)) != len(names):
                raise RunError(
                    f"{file}: not an edge bundle: it holds {len(names)} files, {EDGE_HEADER_FILE} once is needed"
                )
            found: dict[str, bytes] = {}
            for info in infos:
                if not _MEMBER_NAME_PATTERN.fullmatch(info.filename) or info.flag_bits & 1:
                    raise RunError(
                        f"{file}: a member has the name {info.filename[:40]!r}, or is encrypted; {_EXPORT_HINT}"
                    )
                limit = MAX_ONNX_BYTES if info.filename.endswith(".onnx") else MAX_TEXT_MEMBER_BYTES
                with archive.open(info) as member:
                    found[info.filename] = member.read(limit + 1)
                if len(found[info.filename]) > limit:
                    raise RunError(f"{file}: {info.filename} is larger than {limit:,} bytes; {_EXPORT_HINT}")
            return found
    except _ContainerError as exc:
        raise RunError(f"{file}: not an edge bundle: {exc}; {_EXPORT_HINT}") from exc
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as exc:
        raise RunError(f"{file}: not a readable .zip: {exc}; {_EXPORT_HINT}") from exc
    except Exception as exc:  # zlib.error, and other exceptions of a decompressor on invalid data
        if isinstance(exc, RunError):
            raise
        raise RunError(f"{file}: not a readable .zip: {exc}; {_EXPORT_HINT}") from exc


def _check_container(archive: zipfile.ZipFile, infos: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Raise _ContainerError if a .zip holds anything but its members, each once."""
    if archive.comment or any(info.extra or info.comment or info.flag_bits & ~_ALLOWED_ZIP_FLAGS for info in infos):
        raise _ContainerError("it is encrypted, was written as a stream, or holds comments or extra fields")
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos):
        raise _ContainerError("it has an unknown compression")
    if sum(info.file_size for info in infos) > MAX_BUNDLE_BYTES:
        raise _ContainerError(f"its members have more than {MAX_BUNDLE_BYTES:,} bytes")
    # Every byte belongs to one member: its local header, its data and its entry in the directory, whose end follows.
    taken = sum(76 + 2 * len(info.orig_filename.encode("utf-8", "replace")) + info.compress_size for info in infos) + 22
    if taken != size:
        raise _ContainerError(f"{size:,} bytes, of which its members account for {taken:,}")


def _parse_header(data: bytes, file: str) -> EdgeHeader:
    try:
        found = msgspec.json.decode(data, type=_EdgeFormat).format
        if found != EDGE_FORMAT:
            raise MismatchError(
                f"{file}: found format {found[:40]!r}, this version reads {EDGE_FORMAT!r}; {_EXPORT_HINT}"
            )
        header = msgspec.json.decode(data, type=EdgeHeader)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RunError(f"{file}: {EDGE_HEADER_FILE}: {exc}; {_EXPORT_HINT}") from exc
    if header.sha256 != add_edge_digest(header).sha256:
        raise MismatchError(
            f"{file}: {EDGE_HEADER_FILE}: the digest does not match the content, so it was edited; {_EXPORT_HINT}"
        )
    digests = compute_column_digests(name for model in header.models for name in model.columns)
    for what, theirs, ours in (
        ("classes", ", ".join(header.classes), ", ".join(PHASES)),
        ("feature schema", header.schema_hash, digests.schema_hash),
        ("behaviour fingerprint", header.behaviour_fingerprint, digests.behaviour_fingerprint),
    ):
        if theirs != ours:
            raise MismatchError(
                f"{file}: {what} {theirs[:16]}, this version makes {ours[:16]}: it was trained on other numbers; "
                "train again, then " + _EXPORT_HINT
            )
    if not header.models or EDGE_SCHEMA_FILE not in header.members:
        raise RunError(f"{file}: {EDGE_HEADER_FILE} lists no model, or no {EDGE_SCHEMA_FILE}; {_EXPORT_HINT}")
    return header


class _EdgeFormat(msgspec.Struct, frozen=True):
    format: str


class OnnxModel:
    """An exported model, run by onnxruntime on one thread, with the interface of `PhaseModel.predict_proba`.

    Raises:
        MissingToolError: If onnxruntime is not installed.
        RunError: If the runtime refuses the graph, or it has another input than its header states.
    """

    def __init__(self, data: bytes, spec: InputSpec, *, file: str) -> None:
        self.spec, self._file = spec, file
        with foreign_errors(file, "the runtime refuses it"):
            try:
                self._session = open_session(data)
            except ImportError as exc:
                raise MissingToolError(f"{file}: onnxruntime is not installed; pip install 'phasewatch[live]'") from exc
        self._run_session(np.full((1, *self.spec.shape), np.nan, np.float32))

    def predict_proba(self, inputs: ModelInputs) -> NDArray[np.float64]:
        """Return the calibrated probability of each phase, ``(n, 5)`` float64 in the order of PHASES.

        Raises:
            MismatchError: If the input has other columns, another schema or channel set than the model's.
            RunError: If its output is not probabilities.
        """
        self.spec.require_match(inputs.spec, where=self._file)
        if not len(inputs):
            return np.zeros((0, len(PHASES)))
        # At most as many windows at a time as `check_graph` bounded the memory for.
        parts = [self._run_session(inputs.x[at : at + ONNX_BATCH]) for at in range(0, len(inputs), ONNX_BATCH)]
        return np.concatenate(parts)

    def _run_session(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        with foreign_errors(self._file, "the runtime cannot run it"):
            found = self._session.run([ONNX_OUTPUT], {ONNX_INPUT: x})[0]
        shares = check_probabilities(found, len(x), where=self._file)
        if not (np.abs(shares.sum(axis=1) - 1.0) <= _PROBABILITY_SUM_TOLERANCE).all():
            raise RunError(f"{self._file}: its probabilities do not sum to 1; {_EXPORT_HINT}")
        return shares


class PostprocessingRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Phase filter, None if none was fitted, and alarm rules: at most one of each kind at each stride.

    Raises:
        ValueError: If two rules have the same kind and stride.
    """

    filter: PhaseFilter | None = None
    alarms: tuple[AlarmRule, ...] = ()

    def __post_init__(self) -> None:
        if len({(rule.kind, rule.stride_s) for rule in self.alarms}) != len(self.alarms):
            raise ValueError("alarms: two rules of one kind and stride")


def extract_rules(header: CheckpointHeader) -> PostprocessingRules:
    """Return the rules of a checkpoint."""
    return PostprocessingRules(filter=header.filter, alarms=header.alarms)


def render_rules(rules: PostprocessingRules) -> dict[str, Any]:
    """Convert rules to plain values for JSON."""
    plain: dict[str, Any] = msgspec.to_builtins(rules)
    return plain


def parse_rules(plain: dict[str, Any], *, file: str) -> PostprocessingRules:
    """Parse rules from plain values; `file` is the name in errors.

    Raises:
        RunError: If a value is missing or out of its range.
    """
    try:
        return msgspec.convert(plain, PostprocessingRules)
    except (msgspec.ValidationError, OverflowError, RecursionError) as exc:
        raise RunError(f"{file}: invalid phase filter or alarm rule: {exc}; {_EXPORT_HINT}") from exc
