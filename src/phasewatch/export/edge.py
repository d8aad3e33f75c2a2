"""The edge bundle: one .zip that holds everything a watcher needs of some trained models, and who they learnt from.

`edge.json` says what the models take and lists every other member by size and sha256; it is sealed by its own digest.
Members are stored, not packed, dated alike and sorted: the same content is the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from typing import Any

import msgspec

from phasewatch.errors import UsageError
from phasewatch.models.checkpoint import FileEntry

FORMAT = "phasewatch-edge/1"
HEADER, SCHEMA, CARD = "edge.json", "feature_schema_v1.json", "card.md"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a .zip can say


class Trained(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    trained: Trained
    models: tuple[EdgeModel, ...]
    versions: dict[str, str]
    members: dict[str, FileEntry]
    sha256: str = ""


def seal(header: EdgeHeader) -> EdgeHeader:
    """Give the header with the digest that fits it."""
    open_ = msgspec.structs.replace(header, sha256="")
    digest = hashlib.sha256(msgspec.json.encode(open_, order="sorted")).hexdigest()
    return msgspec.structs.replace(header, sha256=digest)


def pack_edge(header: EdgeHeader, members: Mapping[str, bytes]) -> bytes:
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
    full = seal(msgspec.structs.replace(header, members=entries))
    text = msgspec.json.format(msgspec.json.encode(full, order="sorted"), indent=1) + b"\n"
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as file:
        for name, data in ((HEADER, text), *sorted(members.items())):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system, info.external_attr = 3, 0o100644 << 16
            file.writestr(info, data)
    return made.getvalue()
