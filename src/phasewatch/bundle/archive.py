"""The file of an episode: `pack_bundle` makes the one spelling of its content, `unpack_bundle` reads it within bounds and trusts nothing."""

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
    """Make the bundle of an episode; the same content always gives the same bytes.

    Args:
        manifest: What the episode is; its ``members`` are filled in here.
        members: Name → content of ``labels.jsonl`` and of each source that has rows.
        level: Of zstd, 1 to 19: 15 from the recorder, 3 from the simulator.

    Raises:
        BundleError: If the manifest breaks a rule, so that `unpack_bundle` would refuse the result.
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
    """Read a bundle: every bound, digest and rule of the format, in one pass, never touching a path.

    Args:
        data: The bytes of the ``.tar.zst``.
        file: What errors call it.

    Raises:
        BundleError: At the first departure; the code stands in `episode.findings.CODES`.
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
    """Read a bundle's manifest alone, from the file's first few KiB; the rest is neither decompressed nor vouched for.

    Raises:
        BundleError: If the file does not begin as a bundle, or the manifest breaks a rule.
    """
    start = decompress_start(data, limits.MAX_MANIFEST_BYTES + 1024, file=file)
    members = split_members(start, file=file, only_first=True)
    if MANIFEST_FILE not in members:
        raise BundleError(code="member-missing", words="the first member is not the manifest", file=file)
    manifest = decode_manifest(bytes(members[MANIFEST_FILE]), file=file)
    check_manifest(manifest, file=file)
    return manifest


def unpack_members(data: bytes, *, file: str) -> dict[str, memoryview]:
    """Decompress a bundle and cut it into its members, without looking into them.

    Raises:
        BundleError: If it is no bundle, or over a bound.
    """
    members = split_members(decompress_frame(data, file=file), file=file)
    for name in (MANIFEST_FILE, LABELS_FILE):
        if name not in members:
            raise BundleError(code="member-missing", words=f"there is no {name}", file=file, member=name)
    return members


def _check_members(manifest: Manifest, members: Mapping[str, memoryview], *, file: str) -> None:
    """Hold the members against what the manifest says of them."""

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
    """Hold the number of a source's rows against what the manifest says of it."""

    def refuse(code: str, words: str) -> BundleError:
        return BundleError(code=code, words=words, file=file, member=f"{source}.jsonl")

    listed, emitted = manifest.members[f"{source}.jsonl"].rows, manifest.rows_emitted[source]
    if rows != listed:
        raise refuse("member-rows", f"{rows:,} lines; the manifest says {listed:,}")
    if rows > emitted:
        raise refuse("manifest-rows", f"{rows:,} rows; the sampler emitted {emitted:,}")
    if source is SourceKind.GUEST and rows and not manifest.agent:
        raise refuse("manifest-agent", "the manifest says that the agent was off")
