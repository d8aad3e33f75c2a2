"""Find and read the episodes of a CIS490 store: folders, or archives that nothing is extracted from."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import PurePosixPath
from typing import Any, cast

import msgspec

from phasewatch import atomic
from phasewatch.importing.problems import ImportCode, ImportRefusal
from phasewatch.importing.readers import MAX_LINE_BYTES, SourceFile, open_expanded, parse_object
from phasewatch.types import HOST_ID_PATTERN, EpisodeId, SourceKind, build_uuid7

__all__ = [
    "DONE_FILE",
    "EVENTS_FILE",
    "LABELS_FILE",
    "META_FILE",
    "TELEMETRY_FILES",
    "CodeVersion",
    "EpisodeInput",
    "EpisodeMeta",
    "HostFingerprint",
    "Neighbours",
    "SampleMeta",
    "VmMeta",
    "build_id",
    "choose_host",
    "find_neighbours",
    "iter_episode_lines",
    "list_inputs",
    "read_members",
    "read_meta",
]

MAX_EXPANDED_BYTES = 256 << 20
MAX_MEMBER_BYTES = 64 << 20

_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
META_FILE, LABELS_FILE, EVENTS_FILE, DONE_FILE = "meta.json", "labels.jsonl", "events.jsonl", "done.marker"
TELEMETRY_FILES = {
    SourceKind.PROC: "telemetry-proc.jsonl",
    SourceKind.QMP: "telemetry-qmp.jsonl",
    SourceKind.NETFLOW: "netflow.jsonl",
    SourceKind.GUEST: "telemetry-guest.jsonl",
}
_READ = (META_FILE, LABELS_FILE, EVENTS_FILE, DONE_FILE, *TELEMETRY_FILES.values())
_KNOWN = (*_READ, "telemetry-perf.jsonl", "network.pcap", "stderr.log")


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeInput:
    """One episode of a store: an archive, or the files of a folder.

    Attributes:
        name: Path of the archive or the folder, relative to the source.
        ulid, host: As the path has them; the host is empty if the path has none.
    """

    name: str
    ulid: str
    host: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """The session of an episode, and the ids of those that ran beside it on its host."""

    session: str = ""
    ids: tuple[str, ...] = ()


def list_inputs(files: Sequence[SourceFile]) -> tuple[list[EpisodeInput], list[SourceFile]]:
    """Return the episodes among the files of a source, by path, and the files that belong to none."""
    inputs, folders, rest = [], dict[str, list[SourceFile]](), []
    for file in files:
        path = PurePosixPath(file.relative)
        ulid = path.name.removesuffix(".tar.zst")
        if path.name.endswith(".tar.zst") and _ULID.fullmatch(ulid):
            inputs.append(EpisodeInput(name=file.relative, ulid=ulid, host=_find_host(path.parent), files=(file,)))
        elif path.name in _KNOWN and _ULID.fullmatch(path.parent.name):
            folders.setdefault(str(path.parent), []).append(file)
        else:
            rest.append(file)
    for name, listed in folders.items():
        folder = PurePosixPath(name)
        inputs.append(
            EpisodeInput(
                name=name,
                ulid=folder.name,
                host=_find_host(folder.parent),
                files=tuple(f for f in listed if PurePosixPath(f.relative).name in _READ),
            )
        )
    return sorted(inputs, key=lambda e: e.name), rest


def _find_host(folder: PurePosixPath) -> str:
    return "" if folder.name in ("", ".", "episodes", "data", "shipped") else folder.name


def build_id(ulid: str) -> EpisodeId:
    """Return the episode id of a ULID: its time and its 80 random bits as a UUIDv7."""
    value = 0
    for letter in ulid:
        value = value << 5 | _CROCKFORD.index(letter)
    return build_uuid7(value >> 80, (value & (2**80 - 1)).to_bytes(10, "big"))


class _BoundedStream(RawIOBase):
    """Reads at most so many bytes of another stream, and then raises `ImportRefusal`."""

    def __init__(self, stream: Any, most: int) -> None:
        self._stream, self._left = stream, most

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        chunk: bytes = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(chunk)
        if self._left < 0:
            raise ImportRefusal(ImportCode.EXPANDED_SIZE, f"an archive of more than {MAX_EXPANDED_BYTES >> 20} MiB")
        return chunk


def read_members(source: EpisodeInput, wanted: Iterable[str] = _READ) -> dict[str, bytes]:
    """Read the members of an episode into memory; nothing is extracted to a path.

    Args:
        source: The episode.
        wanted: Names of the members.

    Raises:
        ImportRefusal: If a file cannot be read, is too large, or an archive holds anything but plain files, each once.
    """
    names = frozenset(wanted)
    members: dict[str, bytes] = {}
    if len(source.files) == 1 and source.files[0].relative.endswith(".tar.zst"):
        for name, data in _iter_archive(source.files[0], names):
            members[name] = data
            if names == members.keys():
                break
        return members
    for file in source.files:
        name = PurePosixPath(file.relative).name
        if name in names:
            try:
                data = atomic.read_regular(file.path, MAX_MEMBER_BYTES)
            except OSError as exc:
                raise ImportRefusal(ImportCode.UNREADABLE, exc.strerror or str(exc), file=file.relative) from None
            members[name] = _check_member_size(data, file.relative)
    return members


def _check_member_size(data: bytes, file: str) -> bytes:
    if len(data) > MAX_MEMBER_BYTES:
        words = f"larger than {MAX_MEMBER_BYTES >> 20} MiB"
        raise ImportRefusal(ImportCode.EXPANDED_SIZE, words, file=file)
    return data


def _iter_archive(file: SourceFile, names: frozenset[str]) -> Iterator[tuple[str, bytes]]:
    seen: set[str] = set()

    def refuse(code: ImportCode, words: str) -> ImportRefusal:
        return ImportRefusal(code, words, file=file.relative)

    with open_expanded(file) as (stream, _):
        try:
            with tarfile.open(fileobj=cast(Any, _BoundedStream(stream, MAX_EXPANDED_BYTES)), mode="r|") as archive:
                for member in archive:
                    parts = PurePosixPath(member.name).parts
                    if member.isdir() and len(parts) <= 1 and ".." not in parts:
                        continue
                    if member.name.startswith("/") or ".." in parts or len(parts) > 2:
                        raise refuse(ImportCode.PATH, f"the member {member.name[:60]!r} leaves its folder")
                    if not member.isreg():
                        raise refuse(ImportCode.ARCHIVE, f"the member {member.name[:60]!r} is no plain file")
                    name = parts[-1] if parts else ""
                    if name not in _KNOWN:
                        continue
                    if name in seen:
                        raise refuse(ImportCode.ARCHIVE, f"the member {name} is there twice")
                    seen.add(name)
                    if name in names:
                        reader = archive.extractfile(member)
                        data = reader.read(MAX_MEMBER_BYTES + 1) if reader is not None else b""
                        yield name, _check_member_size(data, f"{file.relative}:{name}")
        except (tarfile.TarError, ValueError) as exc:
            raise refuse(ImportCode.ARCHIVE, f"no tar: {exc}") from None
        except ImportRefusal as bad:
            bad.file = bad.file or file.relative
            raise


def find_neighbours(inputs: Sequence[EpisodeInput]) -> dict[str, Neighbours]:
    """Return, by name, the session and the neighbours of each episode: those of its host that overlap in time."""
    spans: dict[str, list[tuple[str, str, EpisodeInput]]] = {}
    for each in inputs:
        try:
            meta = read_meta(read_members(each, (META_FILE,)), each.name)
            start, end = meta.started_at_wall, meta.ended_at_wall
            host = choose_host(each, meta)
        except ImportRefusal:
            continue
        if start and end:
            spans.setdefault(host, []).append((start, end, each))
    found: dict[str, Neighbours] = {}
    for host, listed in spans.items():
        listed.sort(key=lambda s: (s[0], s[1], s[2].name))  # ISO 8601 of one form sorts by time
        runs: list[list[tuple[str, str, EpisodeInput]]] = []
        latest = ""
        for span in listed:
            if not runs or span[0] >= latest:
                runs.append([])
            runs[-1].append(span)
            latest = max(latest, span[1])
        for run in runs:
            session = f"{host}-{run[0][2].ulid.lower()}"
            for start, end, each in run:
                beside = [build_id(o.ulid) for s, e, o in run if o is not each and s < end and start < e]
                found[each.name] = Neighbours(session=session, ids=tuple(sorted(set(beside))[:1000]))
    return found


class VmMeta(msgspec.Struct):
    """`vm` of `meta.json`."""

    image_name: str = ""
    vcpus: int = 1
    ram_mib: int = 1
    cgroup_cpu_cap: str | None = None


class SampleMeta(msgspec.Struct):
    """`sample` of `meta.json`."""

    name: str | None = None
    profile: str | None = None
    sha256: str | None = None


class CodeVersion(msgspec.Struct):
    """`code_version` of `meta.json`."""

    commit: str = ""
    dirty: bool = False


class HostFingerprint(msgspec.Struct):
    """`host_fingerprint` of `meta.json`."""

    qemu_version: str = ""
    cpu_model: str = ""


class EpisodeMeta(msgspec.Struct):
    """What is read of `meta.json`; other keys are ignored."""

    episode_id: str
    schema_version: int
    started_at_wall: str = ""
    ended_at_wall: str | None = None
    host_id: str = ""
    git_commit: str = ""
    code_version: CodeVersion = msgspec.field(default_factory=CodeVersion)
    host_fingerprint: HostFingerprint = msgspec.field(default_factory=HostFingerprint)
    vm: VmMeta = msgspec.field(default_factory=VmMeta)
    sample: SampleMeta | None = None
    result: dict[str, Any] = {}


def read_meta(members: Mapping[str, bytes], name: str) -> EpisodeMeta:
    """Parse `meta.json`.

    Raises:
        ImportRefusal: If it is absent, malformed or of another version.
    """
    if META_FILE not in members:
        raise ImportRefusal(ImportCode.SCHEMA, f"there is no {META_FILE}", file=name)
    try:
        meta = msgspec.convert(parse_object(members[META_FILE].decode("utf-8-sig")), EpisodeMeta)
    except ImportRefusal as bad:
        bad.file = f"{name}/{META_FILE}"
        raise
    except (msgspec.ValidationError, UnicodeDecodeError) as exc:
        raise ImportRefusal(ImportCode.SCHEMA, str(exc), file=f"{name}/{META_FILE}") from None
    if meta.schema_version != 1:
        words = f"schema_version {meta.schema_version}; this version reads 1"
        raise ImportRefusal(ImportCode.SCHEMA, words, file=f"{name}/{META_FILE}")
    return meta


def choose_host(source: EpisodeInput, meta: EpisodeMeta) -> str:
    """Return the host's id: the folder of the episode, or else `host_id` of `meta.json`.

    Raises:
        ImportRefusal: If it is malformed.
    """
    host = (source.host or meta.host_id).lower()
    if not HOST_ID_PATTERN.fullmatch(host):
        words = f"host {host[:60]!r}; put the episode into a folder with the name of its host"
        raise ImportRefusal(ImportCode.HOST, words, file=source.name)
    return host


def iter_episode_lines(members: Mapping[str, bytes], member: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and object of each line of a member; nothing if it is not there.

    Raises:
        ImportRefusal: At the first malformed line.
    """
    place = f"{name}/{member}"
    for number, line in enumerate(members.get(member, b"").split(b"\n"), 1):
        try:
            if len(line) > MAX_LINE_BYTES:
                raise ImportRefusal(ImportCode.LINE_SIZE, f"longer than {MAX_LINE_BYTES:,} bytes")
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield number, parse_object(text)
        except UnicodeDecodeError:
            raise ImportRefusal(ImportCode.TEXT, "not UTF-8", file=place, line=number) from None
        except ImportRefusal as bad:
            bad.file, bad.line = place, number
            raise
