"""The bundle as a whole: round trips, damage, noise, and what reading may cost."""

from __future__ import annotations

import gc
import tracemalloc
from hashlib import sha256

import msgspec
import numpy as np
import pytest
from backports.zstd import compress
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.factories.small_bundles import M0, MARKS, T0, manifest, members_of, proc_rows, seal, small_bundle

from phasewatch.bundle import limits
from phasewatch.bundle.archive import encode_labels, pack_bundle, unpack_bundle, unpack_manifest
from phasewatch.bundle.container import compress_frame, decompress_frame
from phasewatch.bundle.model import Episode, LabelEvidence, LabelMark, RecordingMetadata
from phasewatch.bundle.rows import encode_rows
from phasewatch.channels import list_raw_fields
from phasewatch.errors import BundleError
from phasewatch.types import ClockBase, Phase, SourceKind

SMALL = small_bundle()


@st.composite
def episodes(draw: st.DrawFn) -> tuple[object, dict[str, bytes]]:
    steps = draw(st.lists(st.integers(1, 10**9), min_size=1, max_size=8))
    ends = np.cumsum([10**9, *steps])
    phases = draw(st.lists(st.sampled_from(list(Phase)), min_size=len(steps), max_size=len(steps)))
    at = [T0, *(T0 + int(e) for e in ends[1:])]
    marks = [LabelMark(t_wall_ns=t, t_mono_ns=t - T0 + M0, phase=p) for t, p in zip(at, [*phases, None], strict=True)]
    sources = draw(st.sets(st.sampled_from(list(SourceKind)), min_size=1))
    members, fields = {"labels.jsonl": encode_labels(marks)}, {}
    for source in sources:
        width = len(list_raw_fields(source))
        rows = draw(st.lists(st.lists(st.integers(0, 2**63 - 1), min_size=width + 3, max_size=width + 3), max_size=3))
        members[f"{source}.jsonl"] = encode_rows(
            source, [[*r[:3], *map(float_if(source), range(width), r[3:])] for r in rows]
        )
        fields[source] = tuple(spec.field for spec in list_raw_fields(source))
    text = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=20)
    made = manifest(
        duration_s=round((at[-1] - T0) / 1e9, 3), agent=True, fields=fields, profile=draw(text), session=draw(text),
        plan_seed=draw(st.integers(0, 2**63 - 1)), nominal_hz=dict.fromkeys(sources, 2.0),
        rows_emitted=dict.fromkeys(sources, 3),
        clocks=msgspec.structs.replace(manifest().clocks, base=dict.fromkeys(sources, ClockBase.UNIX)),
    )  # fmt: skip
    return made, members


def float_if(source: SourceKind) -> object:
    kinds = [spec.type for spec in list_raw_fields(source)]
    return lambda i, value: float(value) if kinds[i] == "float" else value


def test_what_the_recorder_knows_of_an_episode_reads_back() -> None:
    recording = RecordingMetadata(
        boot_s=4.0,
        settle_s=22.5,
        pinning=(),
        knobs={"rate": 2.5},
        background="",
        absent={},
        load=(("web", T0 + 1, T0 + 2), ("backup", T0 + 1, T0 + 9)),
        routine="pieces",
        shape={"machine": "q35", "mem_mib": 512, "quota_cores": 0.5},
        image="debian",
        twin="compress",
        evidence=(
            LabelEvidence(phase=Phase.CLEAN, step="phase clean", ack_id=4, exit_code=None),
            LabelEvidence(phase=Phase.ARMED, step="phase armed", ack_id=5, exit_code=0),
        ),
        throttled_s=1.25,
    )

    read = unpack_bundle(small_bundle(recording=recording), file="small").manifest.recording

    assert read == recording


def same(a: Episode, b: Episode) -> bool:
    return a.manifest == b.manifest and a.marks == b.marks and all(
        np.array_equal(x, y) for s in a.rows for x, y in zip(a.rows[s].columns, b.rows[s].columns, strict=True)
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(episodes())
def test_what_was_packed_is_what_is_unpacked(made: tuple[object, dict[str, bytes]]) -> None:
    wanted, members = made

    if unpackable := sum_of_steps(members) < 10**9:
        with pytest.raises(BundleError):
            unpack_bundle(pack_bundle(wanted, members, level=1), file="x")  # type: ignore[arg-type]
        return
    data = pack_bundle(wanted, members, level=1)  # type: ignore[arg-type]
    episode = unpack_bundle(data, file="x")

    assert not unpackable
    assert msgspec.structs.replace(episode.manifest, members={}) == wanted
    assert {name: bytes(content) for name, content in members_of(data).items() if name != "manifest.json"} == members
    assert encode_labels(episode.marks) == members["labels.jsonl"]
    assert pack_bundle(wanted, members, level=1) == data  # type: ignore[arg-type]


def sum_of_steps(members: dict[str, bytes]) -> int:
    stamps = [msgspec.json.decode(line)["t_wall_ns"] for line in members["labels.jsonl"].splitlines()]
    return int(stamps[-1] - stamps[0])


def test_peek_gives_the_manifest_alone() -> None:
    assert unpack_manifest(SMALL) == unpack_bundle(SMALL, file="x").manifest
    assert unpack_manifest(SMALL).members["proc.jsonl"].rows == 4


def test_peek_reads_no_further_than_it_needs() -> None:
    members = {"labels.jsonl": encode_labels(MARKS), "proc.jsonl": encode_rows(SourceKind.PROC, proc_rows(2000))}
    data = pack_bundle(manifest(rows_emitted={SourceKind.PROC: 2000}), members, level=1)

    assert unpack_manifest(data[:-1000]) == unpack_manifest(data)


def test_a_source_without_a_member_is_not_in_the_episode() -> None:
    assert set(unpack_bundle(SMALL, file="x").rows) == {SourceKind.PROC}


def test_the_bins_lie_between_the_first_label_and_the_end() -> None:
    episode = unpack_bundle(SMALL, file="x")

    assert (episode.t0_ns, episode.t_end_ns, episode.n_bins) == (T0, T0 + 2 * 10**9, 4)


def test_a_writer_cannot_pack_what_a_reader_refuses() -> None:
    members = {"labels.jsonl": encode_labels(MARKS), "proc.jsonl": encode_rows(SourceKind.PROC, proc_rows())}

    with pytest.raises(BundleError, match="manifest-id"):
        pack_bundle(manifest(episode_id="7"), members)
    with pytest.raises(ValueError, match=r"no bundle holds 'notes\.txt'"):
        pack_bundle(manifest(), {**members, "notes.txt": b""})
    with pytest.raises(ValueError, match="zstd level 22"):
        pack_bundle(manifest(), members, level=22)


def test_every_flipped_bit_is_seen_by_the_reader_or_by_the_receipt() -> None:
    whole, receipt = unpack_bundle(SMALL, file="x"), sha256(SMALL).hexdigest()
    harmless = 0
    for at in range(len(SMALL)):
        for bit in range(8):
            spoilt = SMALL[:at] + bytes([SMALL[at] ^ 1 << bit]) + SMALL[at + 1 :]
            assert sha256(spoilt).hexdigest() != receipt
            try:
                episode = unpack_bundle(spoilt, file="x")
            except BundleError:
                continue
            harmless += 1
            assert same(episode, whole), f"bit {bit} of byte {at} changed the content unseen"

    assert harmless <= 32  # spare bits of the entropy coder's tables: the content is the same


def test_every_flipped_bit_of_the_tar_but_for_words_of_the_manifest_is_refused() -> None:
    tar = decompress_frame(SMALL, file="x")
    after_manifest = 512 + len(members_of(SMALL)["manifest.json"])
    for at in (*range(512), *range(after_manifest, len(tar))):
        spoilt = tar[:at] + bytes([tar[at] ^ 1 << at % 8]) + tar[at + 1 :]

        with pytest.raises(BundleError):
            unpack_bundle(compress_frame(spoilt, level=1), file="x")


def test_every_cut_is_refused() -> None:
    for length in range(len(SMALL)):
        with pytest.raises(BundleError):
            unpack_bundle(SMALL[:length], file="x")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    for data in (noise, b"\x28\xb5\x2f\xfd" + noise, compress(noise, options={201: 1})):
        with pytest.raises(BundleError):
            unpack_bundle(data, file="x")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["manifest.json", "labels.jsonl", "proc.jsonl"]), st.data())
def test_a_member_of_noise_is_refused(name: str, data: st.DataObject) -> None:
    members = members_of(SMALL)
    content = members[name]
    at = data.draw(st.integers(0, len(content) - 1))
    spoilt = content[:at] + data.draw(st.binary(min_size=1, max_size=5)) + content[at + data.draw(st.integers(0, 9)) :]
    if spoilt == content:
        return

    try:
        unpack_bundle(seal({**members, name: spoilt}), file="x")
    except BundleError:
        return
    assert name == "manifest.json"  # the only member that is not under a digest of its own: words in it may be others


def test_a_bomb_costs_no_more_than_the_bound() -> None:
    bomb = compress(bytes(256 << 20), options={201: 1, 200: 0, 101: 20})
    gc.collect()
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match="decompressed-size"):
            unpack_bundle(bomb, file="x")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 3 * limits.MAX_DECOMPRESSED_BYTES


def test_the_largest_honest_member_is_read() -> None:
    n = limits.MAX_SOURCE_ROWS
    members = {"labels.jsonl": encode_labels(MARKS), "proc.jsonl": encode_rows(SourceKind.PROC, proc_rows(n))}

    episode = unpack_bundle(pack_bundle(manifest(rows_emitted={SourceKind.PROC: n}), members, level=1), file="x")

    assert len(episode.rows[SourceKind.PROC]) == n
