"""Decode the manifest of an episode from strict JSON, and check the rules that types cannot express."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator
from itertools import pairwise
from typing import Any

import msgspec

from phasewatch.bundle import limits
from phasewatch.bundle.container import LABELS_FILE, MANIFEST_FILE, MEMBER_FILES, find_member_source
from phasewatch.bundle.model import (
    BUNDLE_FORMAT,
    KNOWN_BUNDLE_FORMATS,
    RECORDING_KEYS_2,
    LabellingMetadata,
    Manifest,
    RecordingMetadata,
)
from phasewatch.bundle.problems import parse_strict_json
from phasewatch.channels import list_raw_fields
from phasewatch.errors import BundleError
from phasewatch.types import EPISODE_ID_PATTERN, HOST_ID_PATTERN, EpisodeOrigin, Phase, SourceKind

__all__ = ["check_manifest", "decode_manifest"]

_DECODER = msgspec.json.Decoder(Manifest)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAY_BE_EMPTY = frozenset({"background", "disk", "nic", "cpu", "guest_kernel", "recorder", "hypervisor"})


def decode_manifest(data: bytes, *, file: str) -> Manifest:
    """Parse `manifest.json`: no duplicate, unknown or missing keys, and each value of its type.

    Args:
        data: The content of the member.
        file: Name of the bundle in errors.

    Raises:
        BundleError: If it is malformed.
    """

    def refuse(code: str, words: str) -> BundleError:
        return BundleError(code=code, words=words, file=file, member=MANIFEST_FILE)

    if len(data) > limits.MAX_MANIFEST_BYTES:
        raise refuse("tar-size", f"{len(data):,} bytes; at most {limits.MAX_MANIFEST_BYTES:,} are allowed")
    if b"\0" in data or not data.isascii():
        raise refuse("text-encoding", "a byte-order mark, a NUL or a byte that is not ASCII")
    try:
        plain = parse_strict_json(data)
    except BundleError as exc:
        code = "manifest-key-twice" if exc.code == "key-twice" else "manifest-json"
        raise refuse(code, exc.words) from None
    name = plain.get("format") if isinstance(plain, dict) else None
    if isinstance(name, str) and name not in KNOWN_BUNDLE_FORMATS:
        raise refuse("manifest-format", _describe_unknown_format(name))
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError, OverflowError) as exc:
        raise refuse("manifest-schema", str(exc)[:200]) from None


def check_manifest(manifest: Manifest, *, file: str) -> None:
    """Check the rules on a manifest (docs/formats/bundle.md).

    Args:
        manifest: The manifest.
        file: Name of the bundle in errors.

    Raises:
        BundleError: At the first violation.
    """
    for code, words in _find_violations(manifest):
        raise BundleError(code=code, words=words, file=file, member=MANIFEST_FILE)


def _find_violations(m: Manifest) -> Iterator[tuple[str, str]]:
    if m.format not in KNOWN_BUNDLE_FORMATS:
        yield "manifest-format", _describe_unknown_format(m.format)
    if m.origin is EpisodeOrigin.IMPORTED and m.format != BUNDLE_FORMAT:
        yield "manifest-schema", f"the origin is imported, which {m.format[:60]} does not know"
    if bad := _find_bad_value(msgspec.to_builtins(m), ""):
        yield bad
    if not EPISODE_ID_PATTERN.fullmatch(m.episode_id):
        yield "manifest-id", f"episode_id {m.episode_id!r} is not a UUIDv7"
    if not HOST_ID_PATTERN.fullmatch(m.host.host_id):
        yield "manifest-id", f"host_id {m.host.host_id!r} does not match {HOST_ID_PATTERN.pattern}"
    for neighbour in m.neighbours:
        if not EPISODE_ID_PATTERN.fullmatch(neighbour) or neighbour == m.episode_id:
            yield "manifest-id", f"the neighbour {neighbour!r} is not another episode's id"
    yield from _find_range_violations(m)
    yield from _find_source_violations(m)
    yield from _find_clock_violations(m)
    if m.recording is not None:
        yield from _find_recording_violations(m.recording, m.format)
    if m.labelling is not None:
        yield from _find_labelling_violations(m.labelling, m)


def _describe_unknown_format(name: str) -> str:
    return f"the format is {name[:60]!r}; this reader knows {' and '.join(KNOWN_BUNDLE_FORMATS)}"


def _find_bad_value(value: Any, key: str) -> tuple[str, str] | None:
    """Return code and text of the first string, number or list, at any depth, that breaks a rule; None without one."""
    if isinstance(value, str):
        if not value and key not in _MAY_BE_EMPTY:
            return "manifest-string", f"{key} is empty"
        if len(value) > limits.MAX_STRING_CHARS or not (value.isascii() and value.isprintable()):
            return "manifest-string", f"{key} is not at most {limits.MAX_STRING_CHARS} printable ASCII characters"
    elif isinstance(value, float):
        if not math.isfinite(value):
            return "manifest-range", f"{key} is not a finite number"
    elif isinstance(value, int):
        if not limits.INT64_MIN <= value <= limits.INT64_MAX:
            return "manifest-range", f"{key} does not fit into 64 bits"
    elif isinstance(value, list | tuple):
        if len(value) > limits.MAX_LIST_ITEMS:
            return "manifest-range", f"{key} has {len(value):,} items; at most {limits.MAX_LIST_ITEMS:,} are allowed"
        for item in value:
            if bad := _find_bad_value(item, key):
                return bad
    elif isinstance(value, dict):
        if len(value) > limits.MAX_LIST_ITEMS:
            return "manifest-range", f"{key} has {len(value):,} keys; at most {limits.MAX_LIST_ITEMS:,} are allowed"
        whose = f"a key of {key or 'the manifest'}"
        for name, item in value.items():
            if bad := _find_bad_value(str(name), whose) or _find_bad_value(item, str(name)):
                return bad
    return None


def _find_range_violations(m: Manifest) -> Iterator[tuple[str, str]]:
    if not limits.MIN_STAMP_NS <= m.started_wall_ns <= limits.MAX_STAMP_NS:
        yield "manifest-range", "started_wall_ns is not Unix nanoseconds of 2006 to 2116"
    longest = limits.MAX_LABELLED_NS / 1e9 + limits.DURATION_TOLERANCE_S
    if not limits.MIN_LABELLED_NS / 1e9 - limits.DURATION_TOLERANCE_S <= m.duration_s <= longest:
        yield "manifest-range", f"duration_s is {m.duration_s:g}; 1 to 3,600 is allowed"
    if m.host.vcpus < 1 or m.host.mem_mib < 1:
        yield "manifest-range", "the host has no CPU or no memory"
    if any(seconds < 0 for _, seconds in m.plan):
        yield "manifest-range", "a planned phase has a negative length"
    if len(set(m.channels_available)) != len(m.channels_available):
        yield "manifest-range", "channels_available names a channel twice"


def _find_recording_violations(recording: RecordingMetadata, format_name: str) -> Iterator[tuple[str, str]]:
    if recording.boot_s < 0 or recording.settle_s < 0:
        yield "manifest-range", "boot_s or settle_s is negative"
    if recording.throttled_s is not None and recording.throttled_s < 0:
        yield "manifest-range", "throttled_s is negative"
    for kind, start_ns, end_ns in recording.load:
        if not limits.MIN_STAMP_NS <= start_ns < end_ns <= limits.MAX_STAMP_NS:
            yield "manifest-range", f"the load {kind} does not end after it starts, by Unix time in nanoseconds"
    if format_name != BUNDLE_FORMAT:
        given = msgspec.to_builtins(recording)
        for key in RECORDING_KEYS_2:
            if key in given:
                yield "manifest-schema", f"recording has {key}, which {format_name} does not know"


def _find_labelling_violations(labelling: LabellingMetadata, m: Manifest) -> Iterator[tuple[str, str]]:
    if m.format != BUNDLE_FORMAT:
        yield "manifest-schema", f"the manifest has labelling, which {m.format[:60]} does not know"
    if not EPISODE_ID_PATTERN.fullmatch(labelling.ancestor_id) or labelling.ancestor_id == m.episode_id:
        yield "manifest-id", f"ancestor_id {labelling.ancestor_id!r} is not another episode's id"
    if not _SHA256.fullmatch(labelling.ancestor_sha256):
        yield "manifest-string", "ancestor_sha256 is not a SHA-256 in hex"
    if not labelling.labels:
        yield "manifest-range", "labelling has no label"
    for label in labelling.labels:
        if not limits.MIN_STAMP_NS <= label.start_wall_ns < label.end_wall_ns <= limits.MAX_STAMP_NS:
            yield "manifest-range", f"the label {label.phase} does not end after it starts, by Unix time in nanoseconds"
        if not limits.MIN_STAMP_NS <= label.when_wall_ns <= limits.MAX_STAMP_NS:
            yield "manifest-range", f"when_wall_ns of the label {label.phase} is not Unix nanoseconds of 2006 to 2116"
        if label.phase is Phase.UNKNOWN:
            yield "manifest-schema", "a label of labelling is unknown, which is what the time without a label is"
    for before, after in pairwise(labelling.labels):
        if after.start_wall_ns < before.end_wall_ns:
            yield "manifest-range", f"the labels {before.phase} and {after.phase} overlap, or are out of order"


def _find_source_violations(m: Manifest) -> Iterator[tuple[str, str]]:
    for source, hz in m.nominal_hz.items():
        if not 0 < hz <= limits.MAX_NOMINAL_HZ:
            yield "manifest-range", f"nominal_hz of {source} is {hz:g}"
    for source, rows in m.rows_emitted.items():
        if not 0 <= rows <= limits.MAX_ROWS_EMITTED:
            yield "manifest-range", f"rows_emitted of {source} is {rows:,}; 0 to {limits.MAX_ROWS_EMITTED:,} is allowed"
    for source, fields in m.fields.items():
        known = [spec.field for spec in list_raw_fields(source)]
        if list(fields) != [field for field in known if field in set(fields)] or not fields:
            yield "manifest-fields", f"the fields of {source} are not raw fields in the order of the table, each once"
    if LABELS_FILE not in m.members:
        yield "manifest-schema", f"members does not list {LABELS_FILE}"
    for name, member in m.members.items():
        if name not in MEMBER_FILES or name == MANIFEST_FILE:
            yield "manifest-schema", f"members lists {name[:60]!r}, which is not a member of the format"
        elif member.bytes < 0 or member.rows < 0 or not _SHA256.fullmatch(member.sha256):
            yield "manifest-schema", f"members has no valid size, count and digest of {name}"
        elif (owner := find_member_source(name)) is not None:
            tables: tuple[tuple[str, Container[SourceKind]], ...] = (
                ("fields", m.fields),
                ("nominal_hz", m.nominal_hz),
                ("rows_emitted", m.rows_emitted),
                ("clocks.base", m.clocks.base),
            )
            for key, table in tables:
                if owner not in table:
                    yield "manifest-source", f"{key} lacks {owner}, which has rows"


def _find_clock_violations(m: Manifest) -> Iterator[tuple[str, str]]:
    for clock, ((c0, u0), (c1, u1)) in m.clocks.pairs.items():
        if c1 <= c0 or u1 <= u0:
            yield "clock-pair", f"the pair of {clock} does not move forward"
        elif abs((u1 - u0) - (c1 - c0)) > limits.MAX_CLOCK_DRIFT * (c1 - c0):
            yield "clock-pair", f"{clock} drifts by more than {limits.MAX_CLOCK_DRIFT:.0%} against Unix time"
