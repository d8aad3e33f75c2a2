"""Read an edge bundle in memory: by name, within bounds, every digest held against the bytes, nothing extracted."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.errors import MismatchError, MissingTool, RunError
from phasewatch.export.edge import CARD, FORMAT, HEADER, SCHEMA, EdgeHeader, EdgeModel, seal
from phasewatch.features.fingerprint import behaviour_fingerprint
from phasewatch.features.schema import schema_hash
from phasewatch.models.base import InputKind, Inputs, InputSpec, Table
from phasewatch.models.onnxfile import INPUT, MAX_BYTES, OUTPUT, check_onnx
from phasewatch.models.onnxsession import open_session
from phasewatch.vocab import PHASES, WINDOW_BINS

MAX_BUNDLE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 4 * 2**20
MAX_MEMBERS = 32
KINDS = (InputKind.TABLE, InputKind.TENSOR)
_MEMBER = re.compile(r"[a-z0-9][a-z0-9_.+-]{0,80}")
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
        with path.open("rb") as file:
            data = file.read(MAX_BUNDLE_BYTES + 1)
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
        check_onnx(members[model.member], file=f"{file}: {model.member}")
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
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            if HEADER not in names or len(names) > MAX_MEMBERS or len(set(names)) != len(names):
                raise RunError(f"{file}: not an edge bundle: it holds {len(names)} files, {HEADER} once is needed")
            found: dict[str, bytes] = {}
            for info in infos:
                if not _MEMBER.fullmatch(info.filename) or info.flag_bits & 1:
                    raise RunError(f"{file}: a member has the name {info.filename[:40]!r}, or is encrypted; {_AGAIN}")
                limit = MAX_BYTES if info.filename.endswith(".onnx") else MAX_TEXT_BYTES
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
        try:
            self._session = open_session(data)
            nothing = np.full((1, *self._shape()), np.nan, np.float32)
            found = self._session.run([OUTPUT], {INPUT: nothing})[0]
        except ImportError as exc:
            raise MissingTool(f"{file}: onnxruntime is not installed; pip install 'phasewatch[live]'") from exc
        except Exception as exc:  # the runtime's errors share no base class
            raise RunError(f"{file}: the runtime refuses it: {str(exc)[:200]}; {_AGAIN}") from exc
        if found.shape != (1, len(PHASES)) or not np.isfinite(found).all():
            raise RunError(f"{file}: gives {found.shape} for one window, not (1, {len(PHASES)}); {_AGAIN}")

    def predict_proba(self, inputs: Inputs) -> NDArray[np.float64]:
        """Give the probability of each phase, ``(n, 5)``.

        Raises:
            MismatchError: If the columns, the schema or the mask are not those that it was made for.
        """
        if words := self.spec.difference(inputs.spec):
            raise MismatchError(f"{self._file}: {words}")
        if not len(inputs):
            return np.zeros((0, len(PHASES)))
        found: NDArray[np.float64] = self._session.run([OUTPUT], {INPUT: inputs.x})[0].astype(np.float64)
        return found

    def _shape(self) -> tuple[int, ...]:
        width = len(self.spec.names)
        return (width, WINDOW_BINS) if self.spec.kind is InputKind.TENSOR else (width,)
