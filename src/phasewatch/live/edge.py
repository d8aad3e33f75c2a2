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

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.atomic import read_regular
from phasewatch.errors import MismatchError, MissingTool, RunError
from phasewatch.export.edge import CARD, FORMAT, HEADER, SCHEMA, EdgeHeader, EdgeModel, seal
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.features.schema import schema_hash
from phasewatch.models.base import InputKind, Inputs, InputSpec, Table, check_shares
from phasewatch.models.foreign import foreign_errors
from phasewatch.models.onnxfile import INPUT, OUTPUT, check_onnx
from phasewatch.models.onnxfile import MAX_BYTES as MAX_ONNX_BYTES
from phasewatch.models.onnxgraph import BATCH
from phasewatch.models.onnxsession import open_session
from phasewatch.vocab import PHASES, WINDOW_BINS

MAX_BUNDLE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 4 * 2**20
MAX_MEMBERS = 32
KINDS = (InputKind.TABLE, InputKind.TENSOR)
_END = struct.Struct("<4s4H2LH")  # what a .zip without a comment ends with
_PLAIN_FLAGS = 0x0806  # how well it was packed, and that names are UTF-8
_MEMBER = re.compile(r"[a-z0-9][a-z0-9_.+-]{0,80}")
SUM_TOLERANCE = 1e-3  # of five float32
_AGAIN = "make it again with `phasewatch export RUN --out X.zip`"


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeBundle:
    """A bundle whose every byte was checked. `onnx` is by member name."""

    file: str
    header: EdgeHeader
    onnx: Mapping[str, bytes]
    card: str

    def spec_of(self, model: EdgeModel) -> InputSpec:
        """Say what one of its models takes."""
        return InputSpec(
            kind=InputKind(model.input_kind), names=model.columns, mask=model.threat,
            schema_hash=self.header.schema_hash, behaviour_fingerprint=self.header.behaviour_fingerprint,
            table=Table(model.table), floors=tuple(model.floors.items()),
        )  # fmt: skip


def read_edge(path: Path) -> EdgeBundle:
    """Read a bundle from a file.

    Raises:
        RunError: If it is absent, over a bound, or no edge bundle.
        MismatchError: If its bytes were changed, or it was made for other channels, stats or phases.
    """
    try:
        data = read_regular(path, MAX_BUNDLE_BYTES)
    except OSError as exc:
        raise RunError(f"{path}: cannot be read: {exc.strerror}") from exc
    return parse_edge(data, file=str(path))


def parse_edge(data: bytes, *, file: str) -> EdgeBundle:
    """Read a bundle; errors call it ``file``. See `read_edge`."""
    members = _members(data, file)
    header = _header(members.pop(HEADER), file)
    if set(members) != set(header.members):
        odd = min(set(members) ^ set(header.members))
        raise MismatchError(f"{file}: {odd} stands in the bundle or in its {HEADER}, not in both; {_AGAIN}")
    for name, entry in header.members.items():
        found = hashlib.sha256(members[name]).hexdigest()
        if (found, len(members[name])) != (entry.sha256, entry.bytes):
            raise MismatchError(
                f"{file}: {name}: found sha256 {found[:12]}, expected {entry.sha256[:12]}; the file was changed, {_AGAIN}"
            )
    onnx = {}
    for model in header.models:
        if model.member not in members or model.input_kind not in KINDS or model.table not in list(Table):
            raise RunError(f"{file}: {model.member} is not there, or takes {model.input_kind[:20]!r}; {_AGAIN}")
        if model.table == Table.COMMISSIONED and not _channels(model) <= model.floors.keys():
            raise RunError(f"{file}: {model.member} lacks the scales of a clean day; {_AGAIN}")
        time = (WINDOW_BINS,) if model.input_kind == InputKind.TENSOR else ()
        check_onnx(
            members[model.member], file=f"{file}: {model.member}", model=model.model, shape=(len(model.columns), *time)
        )
        onnx[model.member] = members[model.member]
    card = members.get(CARD, b"").decode("utf-8", "replace")
    return EdgeBundle(file=file, header=header, onnx=onnx, card=card)


def _channels(model: EdgeModel) -> set[str]:
    is_tensor = model.input_kind == InputKind.TENSOR
    return {name if is_tensor else name.rpartition(".")[0] for name in model.columns}


def _members(data: bytes, file: str) -> dict[str, bytes]:
    """Give the members by name; sizes are believed only after they were read."""
    if len(data) > MAX_BUNDLE_BYTES:
        raise RunError(f"{file}: more than {MAX_BUNDLE_BYTES:,} bytes, not an edge bundle")
    end = data[-_END.size :]
    if len(end) == _END.size and end[:4] == b"PK\5\6":  # else it is not a .zip, which is said below
        _, _, _, _, count, directory, _, comment = _END.unpack(end)
        if count > MAX_MEMBERS or directory > MAX_MEMBERS * 256 or comment or data[-42:-38] == b"PK\6\7":
            raise RunError(f"{file}: not an edge bundle: it holds {count} files, or a directory of another kind")
    elif data[:2] == b"PK":
        raise RunError(f"{file}: not a readable .zip: something follows its directory; {_AGAIN}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            if words := _container_offence(archive, infos, len(data)):
                raise RunError(f"{file}: not an edge bundle: {words}; {_AGAIN}")
            if HEADER not in names or len(names) > MAX_MEMBERS or len(set(names)) != len(names):
                raise RunError(f"{file}: not an edge bundle: it holds {len(names)} files, {HEADER} once is needed")
            found: dict[str, bytes] = {}
            for info in infos:
                if not _MEMBER.fullmatch(info.filename) or info.flag_bits & 1:
                    raise RunError(f"{file}: a member has the name {info.filename[:40]!r}, or is encrypted; {_AGAIN}")
                limit = MAX_ONNX_BYTES if info.filename.endswith(".onnx") else MAX_TEXT_BYTES
                with archive.open(info) as member:
                    found[info.filename] = member.read(limit + 1)
                if len(found[info.filename]) > limit:
                    raise RunError(f"{file}: {info.filename} is larger than {limit:,} bytes; {_AGAIN}")
            return found
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as exc:
        raise RunError(f"{file}: not a readable .zip: {exc}; {_AGAIN}") from exc
    except Exception as exc:  # zlib.error and what else a decompressor raises on noise
        if isinstance(exc, RunError):
            raise
        raise RunError(f"{file}: not a readable .zip: {exc}; {_AGAIN}") from exc


def _container_offence(archive: zipfile.ZipFile, infos: Sequence[zipfile.ZipInfo], size: int) -> str:
    """Return what a .zip holds beside its members, in words; empty if nothing does and no member is twice there or hidden."""
    if archive.comment or any(info.extra or info.comment or info.flag_bits & ~_PLAIN_FLAGS for info in infos):
        return "it is encrypted, was written as a stream, or holds comments or extra fields"
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos):
        return "it is packed in a way that no export is"
    if sum(info.file_size for info in infos) > MAX_BUNDLE_BYTES:
        return f"its members have more than {MAX_BUNDLE_BYTES:,} bytes"
    # Every byte belongs to one member: its local header, its data and its entry in the directory, whose end follows.
    taken = sum(76 + 2 * len(info.orig_filename.encode("utf-8", "replace")) + info.compress_size for info in infos) + 22
    return "" if taken == size else f"{size:,} bytes, of which its members account for {taken:,}"


def _header(data: bytes, file: str) -> EdgeHeader:
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found != FORMAT:
            raise MismatchError(f"{file}: found format {found[:40]!r}, this version reads {FORMAT!r}; {_AGAIN}")
        header = msgspec.json.decode(data, type=EdgeHeader)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RunError(f"{file}: {HEADER}: {exc}; {_AGAIN}") from exc
    if header.sha256 != seal(header).sha256:
        raise MismatchError(f"{file}: {HEADER}: its digest does not fit its content, so it was edited; {_AGAIN}")
    for what, theirs, ours in (
        ("classes", ", ".join(header.classes), ", ".join(PHASES)),
        ("feature schema", header.schema_hash, schema_hash()),
        ("behaviour fingerprint", header.behaviour_fingerprint, behaviour_fingerprint()),
    ):
        if theirs != ours:
            raise MismatchError(
                f"{file}: {what} {theirs[:16]}, this version makes {ours[:16]}: it was trained on other numbers; "
                "train again, then " + _AGAIN
            )
    if not header.models or SCHEMA not in header.members:
        raise RunError(f"{file}: {HEADER} lists no model, or no {SCHEMA}; {_AGAIN}")
    return header


class _Format(msgspec.Struct, frozen=True):
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
                raise MissingTool(f"{file}: onnxruntime is not installed; pip install 'phasewatch[live]'") from exc
        self._answers(np.full((1, *self._shape()), np.nan, np.float32))

    def predict_proba(self, inputs: Inputs) -> NDArray[np.float64]:
        """Give the probability of each phase, ``(n, 5)``.

        Raises:
            MismatchError: If the columns, the schema or the mask are not those that it was made for.
            RunError: If its answers are no probabilities.
        """
        if words := self.spec.difference(inputs.spec):
            raise MismatchError(f"{self._file}: {words}")
        if not len(inputs):
            return np.zeros((0, len(PHASES)))
        # No more windows at a time than its memory was bounded for.
        parts = [self._answers(inputs.x[at : at + BATCH]) for at in range(0, len(inputs), BATCH)]
        return np.concatenate(parts)

    def _answers(self, x: NDArray[np.float32]) -> NDArray[np.float64]:
        with foreign_errors(self._file, "the runtime cannot run it"):
            found = self._session.run([OUTPUT], {INPUT: x})[0]
        shares = check_shares(found, len(x), where=self._file)
        if not (np.abs(shares.sum(axis=1) - 1.0) <= SUM_TOLERANCE).all():
            raise RunError(f"{self._file}: probabilities that do not sum to 1; {_AGAIN}")
        return shares

    def _shape(self) -> tuple[int, ...]:
        width = len(self.spec.names)
        return (width, WINDOW_BINS) if self.spec.kind is InputKind.TENSOR else (width,)
