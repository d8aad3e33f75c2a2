"""A bundle of two seconds that is small enough to read, and the hands to spoil it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256

import msgspec

from phasewatch.bundle.archive import encode_labels, pack_bundle, unpack_members
from phasewatch.bundle.container import compress_frame, join_members
from phasewatch.bundle.model import BUNDLE_FORMAT, ClockMetadata, HostMetadata, LabelMark, Manifest
from phasewatch.bundle.rows import encode_rows
from phasewatch.channels import list_raw_fields
from phasewatch.types import ClockBase, EpisodeOrigin, EpisodeRole, Phase, SampleKind, SourceKind

T0 = 1_760_000_000_000_000_000
M0 = 5_000_000_000
EPISODE_ID = "0199c82c-c000-7000-8000-000000000001"
Members = Mapping[str, bytes]


def mark(at_s: float, phase: Phase | None) -> LabelMark:
    return LabelMark(t_wall_ns=T0 + int(at_s * 1e9), t_mono_ns=M0 + int(at_s * 1e9), phase=phase)


MARKS = (mark(0, Phase.CLEAN), mark(1.5, Phase.ARMED), mark(2, None))


def proc_rows(n: int = 4) -> list[list[int]]:
    width = len(list_raw_fields(SourceKind.PROC))
    return [[T0 + i * 500_000_000, M0 + i * 500_000_000, i, *(100 * j + i for j in range(width))] for i in range(n)]


def manifest(**changes: object) -> Manifest:
    base = Manifest(
        format=BUNDLE_FORMAT,
        episode_id=EPISODE_ID,
        host=HostMetadata(
            host_id="pc-a",
            arch="x86_64",
            accel="tcg",
            machine="pc",
            cpu="qemu64",
            vcpus=1,
            mem_mib=256,
            disk="virtio",
            nic="virtio",
            hypervisor="QEMU 7.2",
            guest_kernel="6.1",
            recorder="test",
        ),
        profile="benign",
        sample_name="idle",
        sample_kind=SampleKind.BENIGN,
        origin=EpisodeOrigin.SIMULATED,
        role=EpisodeRole.LAB,
        started_wall_ns=T0,
        duration_s=2.0,
        session="s-1",
        neighbours=(),
        plan_seed=7,
        plan=((Phase.CLEAN, 1.5), (Phase.ARMED, 0.5)),
        agent=False,
        nominal_hz={SourceKind.PROC: 2.0},
        rows_emitted={SourceKind.PROC: 4},
        channels_available=("proc.cpu_user",),
        fields={SourceKind.PROC: tuple(spec.field for spec in list_raw_fields(SourceKind.PROC))},
        clocks=ClockMetadata(
            base={SourceKind.PROC: ClockBase.UNIX},
            pairs={ClockBase.MONOTONIC: ((M0, T0), (M0 + 2_000_000_000, T0 + 2_000_000_000))},
        ),
        recording=None,
        members={},
    )
    return msgspec.structs.replace(base, **changes)


def small_bundle(level: int = 15, **changes: object) -> bytes:
    members = {"labels.jsonl": encode_labels(MARKS), "proc.jsonl": encode_rows(SourceKind.PROC, proc_rows())}
    return pack_bundle(manifest(**changes), members, level=level)


def members_of(data: bytes) -> dict[str, bytes]:
    return {name: bytes(view) for name, view in unpack_members(data, file="small").items()}


def seal(members: Members) -> bytes:
    """Pack members as they are, agreed or not."""
    return compress_frame(join_members(members), level=3)


def listed(members: Members) -> dict[str, bytes]:
    """Build the manifest agree with the members' sizes and digests, by text; other errors of the manifest stay."""
    plain = msgspec.json.decode(members["manifest.json"])
    plain["members"] = {
        name: {"bytes": len(content), "sha256": sha256(content).hexdigest(), "rows": content.count(b"\n")}
        for name, content in members.items()
        if name != "manifest.json"
    }
    return {**members, "manifest.json": msgspec.json.encode(plain) + b"\n"}


Change = Callable[[dict[str, bytes]], dict[str, bytes]]


def in_member(name: str, old: bytes, new: bytes) -> Change:
    """Replace the first occurrence of some bytes in a member, and let the manifest agree."""

    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        assert old in members[name], f"{name} does not hold {old!r}"
        return listed({**members, name: members[name].replace(old, new, 1)})

    return change


def in_manifest(old: bytes, new: bytes) -> Change:
    """Replace the first occurrence of some bytes in the manifest's text."""

    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        assert old in members["manifest.json"], f"the manifest does not hold {old!r}"
        return {**members, "manifest.json": members["manifest.json"].replace(old, new, 1)}

    return change


def with_manifest(**keys: object) -> Change:
    """Set keys of the manifest, whatever they hold."""

    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        plain = msgspec.json.decode(members["manifest.json"]) | keys
        return {**members, "manifest.json": msgspec.json.encode(plain) + b"\n"}

    return change
