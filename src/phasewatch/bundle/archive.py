"""Pack and unpack the file of an episode; unpacking trusts nothing and obeys the limits of `bundle.limits`."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

import msgspec

from phasewatch.bundle import limits
from phasewatch.bundle.container import (
    LABELS_FILE,
    MANIFEST_FILE,
    MEMBER_FILES,
    compress_frame,
    decompress_frame,
    decompress_start,
    find_member_source,
    join_members,
    split_members,
)
from phasewatch.bundle.labels import decode_labels, encode_labels
from phasewatch.bundle.manifest import check_manifest, decode_manifest
from phasewatch.bundle.model import BundleMember, Episode, Manifest, SourceRows
from phasewatch.bundle.rows import decode_rows
from phasewatch.errors import BundleError
from phasewatch.types import SourceKind

__all__ = ["encode_labels", "pack_bundle", "unpack_bundle", "unpack_manifest", "unpack_members"]

_ENCODER = msgspec.json.Encoder(order="deterministic")


def pack_bundle(manifest: Manifest, members: Mapping[str, bytes], *, level: int = 15) -> bytes:
    """Return the bytes of a bundle; equal content gives equal bytes.

    Args:
        manifest: The manifest; its ``members`` are filled in here.
        members: Content by name, of ``labels.jsonl`` and of each source with rows.
        level: Level of zstd, 1 to 19; the recorder uses 15, the simulator 3.

    Raises:
        BundleError: If the manifest breaks a rule of the format.
        ValueError: If a member is unknown.
    """
    if unknown := sorted(set(members) - set(MEMBER_FILES[1:])):
        raise ValueError(f"no bundle holds {unknown[0]!r}; members are {', '.join(MEMBER_FILES[1:])}")
    listed = {
        name: BundleMember(
            bytes=len(members[name]), sha256=sha256(members[name]).hexdigest(), rows=members[name].count(b"\n")
        )
        for name in MEMBER_FILES[1:]
        if name in members
    }
    filled = msgspec.structs.replace(manifest, members=listed)
    check_manifest(filled, file=manifest.episode_id)
    text = _ENCODER.encode(filled) + b"\n"
    ordered: dict[str, bytes] = {MANIFEST_FILE: text, **{name: members[name] for name in listed}}
    return compress_frame(join_members(ordered), level=level)


def unpack_bundle(data: bytes, *, file: str) -> Episode:
    """Decode a bundle and check every limit, digest and rule of the format; nothing is extracted to a path.

    Args:
        data: The bytes of the ``.tar.zst`` file.
        file: Name of the bundle in errors.

    Raises:
        BundleError: At the first violation; `bundle.problems` explains its code.
    """
    members = unpack_members(data, file=file)
    manifest = decode_manifest(bytes(members[MANIFEST_FILE]), file=file)
    check_manifest(manifest, file=file)
    _check_members(manifest, members, file=file)
    marks = decode_labels(bytes(members[LABELS_FILE]), duration_s=manifest.duration_s, file=file)
    if len(marks) != manifest.members[LABELS_FILE].rows:
        words = f"{len(marks)} lines; the manifest says {manifest.members[LABELS_FILE].rows}"
        raise BundleError(code="member-rows", words=words, file=file, member=LABELS_FILE)
    rows: dict[SourceKind, SourceRows] = {}
    for name, content in members.items():
        source = find_member_source(name)
        if source is not None:
            rows[source] = decode_rows(source, manifest.fields[source], bytes(content), file=file)
            _check_rows(manifest, source, len(rows[source]), file=file)
    return Episode(manifest=manifest, marks=marks, rows=rows)


def unpack_manifest(data: bytes, *, file: str = "") -> Manifest:
    """Decode only the manifest, from the first few KiB of a bundle; the rest is neither decompressed nor checked.

    Args:
        data: The bytes of the ``.tar.zst`` file, or its beginning.
        file: Name of the bundle in errors.

    Raises:
        BundleError: If the file does not begin like a bundle, or the manifest breaks a rule.
    """
    start = decompress_start(data, limits.MAX_MANIFEST_BYTES + 1024, file=file)
    members = split_members(start, file=file, only_first=True)
    if MANIFEST_FILE not in members:
        raise BundleError(code="member-missing", words="the first member is not the manifest", file=file)
    manifest = decode_manifest(bytes(members[MANIFEST_FILE]), file=file)
    check_manifest(manifest, file=file)
    return manifest


def unpack_members(data: bytes, *, file: str) -> dict[str, memoryview]:
    """Decompress a bundle and split it into its members, without decoding them.

    Args:
        data: The bytes of the ``.tar.zst`` file.
        file: Name of the bundle in errors.

    Returns:
        Views of the contents, by member name.

    Raises:
        BundleError: If it is not a bundle, or exceeds a limit.
    """
    members = split_members(decompress_frame(data, file=file), file=file)
    for name in (MANIFEST_FILE, LABELS_FILE):
        if name not in members:
            raise BundleError(code="member-missing", words=f"there is no {name}", file=file, member=name)
    return members


def _check_members(manifest: Manifest, members: Mapping[str, memoryview], *, file: str) -> None:
    """Compare the members with the list in the manifest."""

    def refuse(code: str, words: str, member: str) -> BundleError:
        return BundleError(code=code, words=words, file=file, member=member)

    for name in manifest.members:
        if name not in members:
            raise refuse("member-missing", "the manifest lists it, and the tar does not hold it", name)
    for name, content in members.items():
        if name == MANIFEST_FILE:
            continue
        listed = manifest.members.get(name)
        if listed is None:
            raise refuse("member-unlisted", "the tar holds it, and the manifest does not list it", name)
        if len(content) != listed.bytes:
            raise refuse("member-bytes", f"{len(content):,} bytes; the manifest says {listed.bytes:,}", name)
        found = sha256(content).hexdigest()
        if found != listed.sha256:
            raise refuse("member-sha256", f"sha256 {found[:12]}…; the manifest says {listed.sha256[:12]}…", name)


def _check_rows(manifest: Manifest, source: SourceKind, rows: int, *, file: str) -> None:
    """Compare the number of a source's rows with the manifest."""

    def refuse(code: str, words: str) -> BundleError:
        return BundleError(code=code, words=words, file=file, member=f"{source}.jsonl")

    listed, emitted = manifest.members[f"{source}.jsonl"].rows, manifest.rows_emitted[source]
    if rows != listed:
        raise refuse("member-rows", f"{rows:,} lines; the manifest says {listed:,}")
    if rows > emitted:
        raise refuse("manifest-rows", f"{rows:,} rows; the sampler emitted {emitted:,}")
    if source is SourceKind.GUEST and rows and not manifest.agent:
        raise refuse("manifest-agent", "the manifest says that the agent was off")
