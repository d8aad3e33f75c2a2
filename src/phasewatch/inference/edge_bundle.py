"""Read an edge bundle in memory: by name, within bounds, every digest held against the bytes, nothing extracted."""

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
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.features.schema import schema_hash
from phasewatch.inference.onnx_check import MAX_ONNX_BYTES, ONNX_INPUT, ONNX_OUTPUT, check_onnx
from phasewatch.inference.onnx_graph import ONNX_BATCH
from phasewatch.inference.onnx_session import open_session
from phasewatch.models.alarm import AlarmRule
from phasewatch.models.base import InputKind, InputSpec, InputVariant, ModelInputs, check_probabilities
from phasewatch.models.checkpoint import CheckpointHeader, FileEntry
from phasewatch.models.foreign import foreign_errors
from phasewatch.models.smoothing import SMOOTHING_NONE, SMOOTHING_PHASE, PhaseFilter
from phasewatch.types import PHASES, WINDOW_BINS

EDGE_FORMAT = "phasewatch-edge/1"
EDGE_HEADER_FILE, EDGE_SCHEMA_FILE, EDGE_CARD_FILE = "edge.json", "feature_schema_v1.json", "card.md"
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a .zip can say


class TrainingOrigin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who a model learnt from, each list sorted; empty where that is not known."""

    hosts: tuple[str, ...] = ()
    accels: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    episodes: int = 0


class EdgeModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of the bundle.

    Attributes:
        member: Name of its ONNX file: raw windows in, calibrated probabilities out.
        threat: The mask that chose its columns.
        columns: What it takes, in order; `table` says what was made of the values, `floors` the scales of a clean day.
        rules: Phase filter, alarm and what else a cell fixed when it was trained, as its checkpoint has them.
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
        recipe, fold: How the episodes were split for training.
        models: Largest mask first.
        members: Every other file of the bundle.
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
    """Give the header with the digest that fits it."""
    open_ = msgspec.structs.replace(header, sha256="")
    digest = hashlib.sha256(msgspec.json.encode(open_, order="sorted")).hexdigest()
    return msgspec.structs.replace(header, sha256=digest)


def pack_edge_bundle(header: EdgeHeader, members: Mapping[str, bytes]) -> bytes:
    """Make the bytes of a bundle; `header.members` is filled in here.

    Raises:
        UsageError: If a model's ONNX file is not among the members.
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
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as file:
        for name, data in ((EDGE_HEADER_FILE, text), *sorted(members.items())):
            info = zipfile.ZipInfo(name, _ZIP_EPOCH)
            info.create_system, info.external_attr = 3, 0o100644 << 16
            file.writestr(info, data)
    return made.getvalue()


MAX_BUNDLE_BYTES = 256 * 2**20
MAX_TEXT_MEMBER_BYTES = 4 * 2**20
MAX_MEMBERS = 32
EXPORTABLE_INPUT_KINDS = (InputKind.TABLE, InputKind.TENSOR)
_ZIP_END = struct.Struct("<4s4H2LH")  # what a .zip without a comment ends with
_ALLOWED_ZIP_FLAGS = 0x0806  # how well it was packed, and that names are UTF-8
_MEMBER_NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_.+-]{0,80}")
PROBABILITY_SUM_TOLERANCE = 1e-3  # of five float32
_EXPORT_HINT = "make it again with `phasewatch export RUN --out X.zip`"


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeBundle:
    """A bundle whose every byte was checked. `onnx` is by member name."""

    file: str
    header: EdgeHeader
    onnx: Mapping[str, bytes]
    card: str

    def build_input_spec(self, model: EdgeModel) -> InputSpec:
        """Say what one of its models takes."""
        return InputSpec(
            kind=InputKind(model.input_kind), names=model.columns, mask=model.threat,
            schema_hash=self.header.schema_hash, behaviour_fingerprint=self.header.behaviour_fingerprint,
            table=InputVariant(model.table), floors=tuple(model.floors.items()),
        )  # fmt: skip


def read_edge_bundle(path: Path) -> EdgeBundle:
    """Read a bundle from a file.

    Raises:
        RunError: If it is absent, over a bound, or no edge bundle.
        MismatchError: If its bytes were changed, or it was made for other channels, stats or phases.
    """
    try:
        data = read_regular(path, MAX_BUNDLE_BYTES)
    except OSError as exc:
        raise RunError(f"{path}: cannot be read: {exc.strerror}") from exc
    return parse_edge_bundle(data, file=str(path))


def parse_edge_bundle(data: bytes, *, file: str) -> EdgeBundle:
    """Read a bundle; errors call it ``file``. See `read_edge_bundle`."""
    members = _read_members(data, file)
    header = _parse_header(members.pop(EDGE_HEADER_FILE), file)
    if set(members) != set(header.members):
        odd = min(set(members) ^ set(header.members))
        raise MismatchError(
            f"{file}: {odd} stands in the bundle or in its {EDGE_HEADER_FILE}, not in both; {_EXPORT_HINT}"
        )
    for name, entry in header.members.items():
        found = hashlib.sha256(members[name]).hexdigest()
        if (found, len(members[name])) != (entry.sha256, entry.bytes):
            raise MismatchError(
                f"{file}: {name}: found sha256 {found[:12]}, expected {entry.sha256[:12]}; the file was changed, {_EXPORT_HINT}"
            )
    onnx = {}
    for model in header.models:
        if (
            model.member not in members
            or model.input_kind not in EXPORTABLE_INPUT_KINDS
            or model.table not in list(InputVariant)
        ):
            raise RunError(f"{file}: {model.member} is not there, or takes {model.input_kind[:20]!r}; {_EXPORT_HINT}")
        if model.table == InputVariant.COMMISSIONED and not _list_model_channels(model) <= model.floors.keys():
            raise RunError(f"{file}: {model.member} lacks the scales of a clean day; {_EXPORT_HINT}")
        time = (WINDOW_BINS,) if model.input_kind == InputKind.TENSOR else ()
        check_onnx(
            members[model.member], file=f"{file}: {model.member}", model=model.model, shape=(len(model.columns), *time)
        )
        onnx[model.member] = members[model.member]
    card = members.get(EDGE_CARD_FILE, b"").decode("utf-8", "replace")
    return EdgeBundle(file=file, header=header, onnx=onnx, card=card)


def _list_model_channels(model: EdgeModel) -> set[str]:
    is_tensor = model.input_kind == InputKind.TENSOR
    return {name if is_tensor else name.rpartition(".")[0] for name in model.columns}


def _read_members(data: bytes, file: str) -> dict[str, bytes]:
    """Give the members by name; sizes are believed only after they were read."""
    if len(data) > MAX_BUNDLE_BYTES:
        raise RunError(f"{file}: more than {MAX_BUNDLE_BYTES:,} bytes, not an edge bundle")
    end = data[-_ZIP_END.size :]
    if len(end) == _ZIP_END.size and end[:4] == b"PK\5\6":  # else it is not a .zip, which is said below
        _, _, _, _, count, directory, _, comment = _ZIP_END.unpack(end)
        if count > MAX_MEMBERS or directory > MAX_MEMBERS * 256 or comment or data[-42:-38] == b"PK\6\7":
            raise RunError(f"{file}: not an edge bundle: it holds {count} files, or a directory of another kind")
    elif data[:2] == b"PK":
        raise RunError(f"{file}: not a readable .zip: something follows its directory; {_EXPORT_HINT}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            if words := _find_container_problem(archive, infos, len(data)):
                raise RunError(f"{file}: not an edge bundle: {words}; {_EXPORT_HINT}")
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
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as exc:
        raise RunError(f"{file}: not a readable .zip: {exc}; {_EXPORT_HINT}") from exc
    except Exception as exc:  # zlib.error and what else a decompressor raises on noise
        if isinstance(exc, RunError):
            raise
        raise RunError(f"{file}: not a readable .zip: {exc}; {_EXPORT_HINT}") from exc


def _find_container_problem(archive: zipfile.ZipFile, infos: Sequence[zipfile.ZipInfo], size: int) -> str:
    """Return what a .zip holds beside its members, in words; empty if nothing does and no member is twice there or hidden."""
    if archive.comment or any(info.extra or info.comment or info.flag_bits & ~_ALLOWED_ZIP_FLAGS for info in infos):
        return "it is encrypted, was written as a stream, or holds comments or extra fields"
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos):
        return "it is packed in a way that no export is"
    if sum(info.file_size for info in infos) > MAX_BUNDLE_BYTES:
        return f"its members have more than {MAX_BUNDLE_BYTES:,} bytes"
    # Every byte belongs to one member: its local header, its data and its entry in the directory, whose end follows.
    taken = sum(76 + 2 * len(info.orig_filename.encode("utf-8", "replace")) + info.compress_size for info in infos) + 22
    return "" if taken == size else f"{size:,} bytes, of which its members account for {taken:,}"


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
            f"{file}: {EDGE_HEADER_FILE}: its digest does not fit its content, so it was edited; {_EXPORT_HINT}"
        )
    for what, theirs, ours in (
        ("classes", ", ".join(header.classes), ", ".join(PHASES)),
        ("feature schema", header.schema_hash, schema_hash()),
        ("behaviour fingerprint", header.behaviour_fingerprint, behaviour_fingerprint()),
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
    """One exported model, run on one thread; what `PhaseModel.predict_proba` is for a checkpoint.

    Raises:
        MissingTool: If onnxruntime is not installed.
        RunError: If the runtime refuses the graph, or it takes another input than its header says.
    """

    def __init__(self, data: bytes, spec: InputSpec, *, file: str) -> None:
        self.spec, self._file = spec, file
        with foreign_errors(file, "the runtime refuses it"):
            try:
                self._session = open_session(data)
            except ImportError as exc:
                raise MissingToolError(f"{file}: onnxruntime is not installed; pip install 'phasewatch[live]'") from exc
        self._run_session(np.full((1, *self._input_shape()), np.nan, np.float32))

    def predict_proba(self, inputs: ModelInputs) -> NDArray[np.float64]:
        """Give the probability of each phase, ``(n, 5)``.

        Raises:
            MismatchError: If the columns, the schema or the mask are not those that it was made for.
            RunError: If its answers are no probabilities.
        """
        if words := self.spec.describe_mismatch(inputs.spec):
            raise MismatchError(f"{self._file}: {words}")
        if not len(inputs):
            return np.zeros((0, len(PHASES)))
        # No more windows at a time than its memory was bounded for.
        parts = [self._run_session(inputs.x[at : at + ONNX_BATCH]) for at in range(0, len(inputs), ONNX_BATCH)]
        return np.concatenate(parts)

    def _run_session(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        with foreign_errors(self._file, "the runtime cannot run it"):
            found = self._session.run([ONNX_OUTPUT], {ONNX_INPUT: x})[0]
        shares = check_probabilities(found, len(x), where=self._file)
        if not (np.abs(shares.sum(axis=1) - 1.0) <= PROBABILITY_SUM_TOLERANCE).all():
            raise RunError(f"{self._file}: probabilities that do not sum to 1; {_EXPORT_HINT}")
        return shares

    def _input_shape(self) -> tuple[int, ...]:
        width = len(self.spec.names)
        return (width, WINDOW_BINS) if self.spec.kind is InputKind.TENSOR else (width,)


class PostprocessingRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Phase filter and alarm; None where none was trained."""

    filter: PhaseFilter | None = None
    alarm: AlarmRule | None = None


def extract_rules(header: CheckpointHeader) -> PostprocessingRules:
    """Take them out of a checkpoint's header: the alarm is the one that hears the filter, where there is one."""
    return PostprocessingRules(
        filter=header.filter, alarm=header.alarm.get(SMOOTHING_NONE if header.filter is None else SMOOTHING_PHASE)
    )


def render_rules(rules: PostprocessingRules) -> dict[str, Any]:
    """Give them as plain values."""
    plain: dict[str, Any] = msgspec.to_builtins(rules)
    return plain


def parse_rules(plain: dict[str, Any], *, file: str) -> PostprocessingRules:
    """Read them.

    Raises:
        RunError: If a number in them cannot be.
    """
    try:
        return msgspec.convert(plain, PostprocessingRules)
    except (msgspec.ValidationError, OverflowError, RecursionError) as exc:
        raise RunError(
            f"{file}: its filter or alarm: {exc}; make it again with `phasewatch export RUN --out X.zip`"
        ) from exc
