"""What a bundle may not be: one line a refusal, with the code and the place that the reader names."""

from __future__ import annotations

import gzip
import io
import tarfile

import msgspec
import pytest
from backports.zstd import CompressionParameter, ZstdCompressor, compress
from tests.factories.small_bundles import (
    EPISODE_ID,
    M0,
    T0,
    Change,
    in_manifest,
    in_member,
    listed,
    members_of,
    seal,
    small_bundle,
    with_manifest,
)

from phasewatch.bundle import limits
from phasewatch.bundle.archive import unpack_bundle, unpack_manifest
from phasewatch.bundle.container import join_members
from phasewatch.bundle.model import BUNDLE_FORMAT
from phasewatch.bundle.problems import FINDING_CODES, find_severity
from phasewatch.errors import BundleError
from phasewatch.types import BundleStatus

PROC, LABELS, MANIFEST = "proc.jsonl", "labels.jsonl", "manifest.json"
CHECKED = {CompressionParameter.checksum_flag: 1}


def case(code: str, change: Change, name: str, place: str = "") -> object:
    return pytest.param(code, change, place, id=name)


def first_row(change: bytes) -> Change:
    """Write text before the value of the first row's first field."""
    return in_member(PROC, b'"cpu_user_ns":0', b'"cpu_user_ns":' + change)


def with_recording(format_name: str = BUNDLE_FORMAT, **keys: object) -> Change:
    """Set keys of the manifest's `recording`, whatever they hold."""
    required = {"boot_s": 3.0, "settle_s": 20.0, "pinning": [], "knobs": {}, "background": "", "absent": {}}
    return with_manifest(format=format_name, recording=required | keys)


MEMBER_CASES = [
    # rows
    case("row-non-finite", first_row(b"NaN"), "NaN", "small:proc.jsonl:1"),
    case("row-non-finite", first_row(b"-Infinity"), "minus infinity"),
    case("row-non-finite", first_row(b"1e999"), "1e999"),
    case("row-int64", first_row(b"9223372036854775808"), "one above the largest int64"),
    case("row-int64", first_row(b"-9223372036854775809"), "one below the smallest int64"),
    case("row-int64", first_row(b"9" * 400), "four hundred digits"),
    case("row-type", first_row(b"true"), "a truth for a whole number"),
    case("row-type", first_row(b"0.5"), "a fraction for a whole number"),
    case("row-type", first_row(b"1.0"), "a whole fraction for a whole number"),
    case("row-type", first_row(b'"7"'), "text for a number"),
    case("row-type", first_row(b"[1]"), "a list for a number"),
    case("row-type", in_member(PROC, b'"seq":0', b'"seq":null'), "null for a stamp"),
    case("row-json", first_row(b"01"), "a leading zero"),
    case("row-json", first_row(b"+1"), "a plus sign"),
    case("row-json", first_row(b"0x10"), "a hexadecimal number"),
    case("row-json", in_member(PROC, b"}\n{", b"}{"), "two objects on a line", "small:proc.jsonl:1"),
    case("row-json", in_member(PROC, b'{"t_wall_ns"', b'[{"t_wall_ns"'), "an unclosed list"),
    case("row-form", in_member(PROC, b',"seq"', b', "seq"'), "a space between keys"),
    case("row-form", in_member(PROC, b'"seq":1', b'"seq":1\t'), "a tab before a comma", "small:proc.jsonl:2"),
    case("row-form", in_member(PROC, b'{"t_wall_ns"', b'\r{"t_wall_ns"'), "a carriage return"),
    case("row-form", in_member(PROC, b'"seq"', b'"\\u0073eq"'), "a key spelled with an escape"),
    case("row-key-twice", in_member(PROC, b'"seq":0', b'"seq":0,"seq":1'), "a key twice"),
    case("row-key-twice", in_member(PROC, b'"threads":1400}', b'"threads":1400,"threads":1}'), "the last key twice"),
    case("row-key-unknown", in_member(PROC, b'"seq":0', b'"seq":0,"colour":1'), "an unknown key"),
    case("row-key-unknown", in_member(PROC, b'"threads"', b'"thread"'), "a misspelled key"),
    case("row-key-missing", in_member(PROC, b'"seq":0,', b""), "a missing stamp"),
    case("row-key-missing", in_member(PROC, b',"threads":1402', b""), "a missing field", "small:proc.jsonl:3"),
    case(
        "row-key-order",
        in_member(PROC, b'"seq":0,"cpu_user_ns":0', b'"cpu_user_ns":0,"seq":0'),
        "keys in another order",
    ),
    case("row-stamp", in_member(PROC, b'"t_mono_ns":5000000000', b'"t_mono_ns":-5000000000'), "a negative stamp"),
    case("line-size", in_member(PROC, b"{", b"{" + b" " * 4096), "a line of more than 4 KiB"),
    case("rows-many", lambda m: listed({**m, PROC: m[PROC].splitlines(True)[0] * 20_001}), "20,001 rows"),
    # text
    case("text-encoding", in_member(PROC, b"{", b"\xef\xbb\xbf{"), "a byte-order mark", "small:proc.jsonl:1"),
    case("text-encoding", in_member(PROC, b"}\n{", b"}\n\0{"), "a NUL", "small:proc.jsonl:2"),
    case("text-encoding", in_member(PROC, b'"seq"', '"séq"'.encode()), "a letter that is not ASCII"),
    case(
        "text-last-newline", lambda m: listed({**m, PROC: m[PROC][:-1]}), "no newline at the end", "small:proc.jsonl:4"
    ),
    case("text-last-newline", lambda m: listed({**m, PROC: m[PROC][:-30]}), "the last row is cut"),
    case("text-blank-line", in_member(PROC, b"}\n{", b"}\n\n{"), "a blank line", "small:proc.jsonl:2"),
    case("text-blank-line", lambda m: listed({**m, PROC: b"\n" + m[PROC]}), "a blank first line"),
    case("row-json", lambda m: listed({**m, PROC: m[PROC] + b"  \n"}), "a line of spaces"),
    # labels
    case(
        "label-phase", in_member(LABELS, b'"armed"', b'"zombie"'), "a phase that nobody knows", "small:labels.jsonl:2"
    ),
    case("label-phase", in_member(LABELS, b'"armed"', b'"Armed"'), "a phase in capitals"),
    case("row-type", in_member(LABELS, b'"armed"', b"1"), "a number for a phase"),
    case(
        "row-key-twice", in_member(LABELS, b'"phase":"armed"', b'"phase":"armed","phase":"clean"'), "two phases at once"
    ),
    case(
        "label-order", in_member(LABELS, str(T0 + 1_500_000_000).encode(), str(T0).encode()), "two labels at one time"
    ),
    case("label-order", in_member(LABELS, str(M0 + 1_500_000_000).encode(), b"1"), "monotonic time going backwards"),
    case("label-end", in_member(LABELS, b'"end"', b'"clean"'), "no end", "small:labels.jsonl:3"),
    case("label-end", in_member(LABELS, b'"armed"', b'"end"'), "two ends", "small:labels.jsonl:2"),
    case("label-end", lambda m: listed({**m, LABELS: m[LABELS].splitlines(True)[-1]}), "an end alone"),
    case("label-end", lambda m: listed({**m, LABELS: b""}), "no labels"),
    case("label-stamp", in_member(LABELS, str(T0).encode(), b"1760000000"), "a stamp in seconds"),
    case("label-stamp", in_member(LABELS, str(M0).encode(), b"-1"), "a negative monotonic stamp"),
    case(
        "label-span",
        in_member(LABELS, str(T0 + 2_000_000_000).encode(), str(T0 + 3601 * 10**9).encode()),
        "over an hour",
    ),
    case("label-duration", with_manifest(duration_s=2.002), "2 ms more in the manifest", "small:labels.jsonl:3"),
    case("labels-many", lambda m: listed({**m, LABELS: m[LABELS].splitlines(True)[0] * 65}), "65 labels"),
    # manifest
    case("manifest-json", lambda m: {**m, MANIFEST: b"not json\n"}, "no JSON", "small:manifest.json"),
    case("manifest-json", lambda m: {**m, MANIFEST: b"[" * 100_000}, "a hundred thousand brackets"),
    case("manifest-json", in_manifest(b'"plan_seed":7', b'"plan_seed":NaN'), "NaN in the manifest"),
    case("manifest-key-twice", in_manifest(b'"plan_seed":7', b'"plan_seed":7,"plan_seed":8'), "a key twice"),
    case("manifest-key-twice", in_manifest(b'"vcpus":1', b'"vcpus":1,"vcpus":2'), "a deep key twice"),
    case("manifest-schema", in_manifest(b'"plan_seed":7', b'"plan_seed":7,"x":1'), "an unknown key"),
    case("manifest-schema", in_manifest(b'"plan_seed":7,', b""), "a missing key"),
    case("manifest-schema", in_manifest(b'"plan_seed":7', b'"plan_seed":"7"'), "text for a number"),
    case("manifest-schema", in_manifest(b'"role":"lab"', b'"role":"home"'), "a role that nobody knows"),
    case("manifest-schema", in_manifest(b'"duration_s":2.0', b'"duration_s":1e999'), "an endless duration"),
    case("manifest-format", in_manifest(b"episode/2", b"episode/9"), "a later format"),
    case("manifest-schema", with_recording("phasewatch-episode/1", image="busybox"), "a newer key in an older format"),
    case("manifest-schema", with_recording(shape={"quota_cores": [1]}), "a list as a fact of the host"),
    case("manifest-schema", with_recording(evidence=[{"phase": "clean"}]), "evidence without its command"),
    case("manifest-range", with_recording(throttled_s=-0.5), "a negative throttled time"),
    case("manifest-range", with_recording(load=[["web", T0 + 1, T0 + 1]]), "a load without duration"),
    case("manifest-range", with_recording(load=[["web", 1, 2]]), "a load that ran in 1970"),
    case("manifest-string", with_recording(load=[["", T0, T0 + 1]]), "a load without a name"),
    case("manifest-id", with_manifest(episode_id="0199c82c-c000-4000-8000-000000000001"), "a UUID of version 4"),
    case("manifest-id", in_manifest(b'"host_id":"pc-a"', b'"host_id":"../a"'), "a host that climbs out"),
    case("manifest-id", in_manifest(b'"host_id":"pc-a"', b'"host_id":"Pc-a"'), "a host in capitals"),
    case("manifest-id", with_manifest(neighbours=[EPISODE_ID]), "its own neighbour"),
    case("manifest-string", with_manifest(profile=""), "a nameless profile"),
    case("manifest-string", with_manifest(session="x" * 201), "201 characters"),
    case("manifest-string", in_manifest(b'"QEMU 7.2"', b'"QEMU\\u001b[2J"'), "an escape sequence"),
    case("manifest-string", in_manifest(b'"QEMU 7.2"', b'"QEM\\u00dc"'), "an umlaut"),
    case("manifest-range", with_manifest(plan_seed=2**63), "a seed beyond int64"),
    case("manifest-range", with_manifest(duration_s=-1.0), "a negative duration"),
    case("manifest-range", with_manifest(started_wall_ns=5), "started in 1970"),
    case("manifest-range", with_manifest(nominal_hz={"proc": 0.0}), "a rate of zero"),
    case("manifest-range", with_manifest(channels_available=["a.b"] * 1001), "1,001 channels"),
    case("manifest-source", with_manifest(rows_emitted={}), "no count of what was emitted"),
    case("manifest-fields", with_manifest(fields={"proc": ["cpu_sys_ns", "cpu_user_ns"]}), "fields in another order"),
    case("manifest-fields", with_manifest(fields={"proc": ["cpu_user_ns", "colour"]}), "a field that RAW lacks"),
    case("manifest-rows", with_manifest(rows_emitted={"proc": 3}), "more rows than were emitted"),
    case(
        "clock-pair",
        with_manifest(clocks={"base": {"proc": "unix"}, "pairs": {"guest": [[1, 1], [1, 2]]}}),
        "a clock that stands",
    ),
    case(
        "clock-pair",
        with_manifest(clocks={"base": {"proc": "unix"}, "pairs": {"guest": [[0, 0], [100, 102]]}}),
        "2 % of drift",
    ),
    # members
    case(
        "member-sha256",
        lambda m: {**m, PROC: m[PROC].replace(b'"seq":0', b'"seq":9')},
        "a digit altered",
        "small:proc.jsonl",
    ),
    case("member-bytes", lambda m: {**m, PROC: m[PROC] + b"{}\n"}, "a member grew"),
    case("member-rows", in_manifest(b'"rows":3', b'"rows":4'), "another number of labels", "small:labels.jsonl"),
    case("member-rows", in_manifest(b'"rows":4', b'"rows":5'), "another number of lines", "small:proc.jsonl"),
    case("member-missing", lambda m: {k: v for k, v in m.items() if k != PROC}, "a listed member is gone"),
    case("member-missing", lambda m: {k: v for k, v in m.items() if k != LABELS}, "no labels at all"),
    case("member-missing", lambda m: {k: v for k, v in m.items() if k != MANIFEST}, "no manifest"),
    case("member-unlisted", lambda m: {**m, "qmp.jsonl": b""}, "an unlisted member"),
    case("member-unknown", lambda m: {**m, "notes.txt": b"hello"}, "a file of another name"),
    case("member-unknown", lambda m: {**m, "../../etc/cron.d/x": b"* * * * * root id\n"}, "a path that climbs out"),
    case("member-order", lambda m: dict(reversed(m.items())), "members in another order"),
    case("tar-size", lambda m: {**m, MANIFEST: b" " * (limits.MAX_MANIFEST_BYTES + 1)}, "a manifest over 256 KiB"),
]


@pytest.mark.parametrize(("code", "change", "place"), MEMBER_CASES)
def test_content_that_breaks_a_rule_is_refused_with_its_code(code: str, change: Change, place: str) -> None:
    data = seal(change(members_of(small_bundle())))

    with pytest.raises(BundleError) as refused:
        unpack_bundle(data, file="small")

    assert refused.value.code == code
    assert refused.value.place.startswith(place or "small")
    assert refused.value.words


def tar_of(data: bytes) -> bytes:
    return join_members(members_of(data))


def frame(tar: bytes) -> bytes:
    return compress(tar, options=CHECKED)


def edited(tar: bytes, at: int, new: bytes, *, sum_again: bool = True) -> bytes:
    """Overwrite part of the first header, with a checksum that fits."""
    block = tar[:at] + new + tar[at + len(new) : 512]
    if sum_again:
        total = sum(block[:148]) + 8 * 32 + sum(block[156:])
        block = block[:148] + b"%06o\0 " % total + block[156:]
    return block + tar[512:]


def repacked(kind: int) -> bytes:
    """What Python's tarfile makes of the same members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, content in members_of(small_bundle()).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mtime = 1.5 if kind == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def streamed(content: bytes, *, window_log: int = 20) -> bytes:
    options = {**CHECKED, CompressionParameter.content_size_flag: 0, CompressionParameter.window_log: window_log}
    machine = ZstdCompressor(options=options)
    return machine.compress(content) + machine.flush()


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0note"
GOOD = small_bundle()
TAR = tar_of(GOOD)

BYTE_CASES = [
    ("compressed-size", b"", "an empty file"),
    ("compressed-size", bytes(limits.MAX_COMPRESSED_BYTES + 1), "a file over 16 MiB"),
    ("zstd-magic", b"hello, world", "text"),
    ("zstd-magic", gzip.compress(TAR, mtime=0), "gzip"),
    ("zstd-magic", TAR, "a bare tar"),
    ("zstd-truncated", GOOD[:3], "three bytes"),
    ("zstd-truncated", GOOD[:4], "a magic number alone"),
    ("zstd-truncated", GOOD[:6], "a header cut off"),
    ("zstd-truncated", GOOD[:-1], "one byte missing"),
    ("zstd-truncated", GOOD[: len(GOOD) // 2], "half a file"),
    ("zstd-checksum-flag", compress(TAR), "no checksum"),
    ("zstd-skippable", SKIPPABLE + GOOD, "a skippable frame in front"),
    ("zstd-skippable", GOOD + SKIPPABLE, "a skippable frame behind"),
    ("zstd-trailing", GOOD + b"\0", "a byte behind"),
    ("zstd-trailing", GOOD + GOOD, "two frames"),
    ("zstd-header", GOOD[:4] + bytes([GOOD[4] | 0x08]) + GOOD[5:], "a reserved bit"),
    ("zstd-header", GOOD[:4] + bytes([GOOD[4] | 0x10]) + GOOD[5:], "an unused bit"),
    ("zstd-dictionary", GOOD[:4] + bytes([GOOD[4] | 0x01]) + GOOD[5:], "a dictionary"),
    ("zstd-window", streamed(TAR, window_log=24), "a window of 16 MiB"),
    ("zstd-corrupt", GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "a wrong checksum"),
    ("decompressed-size", frame(bytes(limits.MAX_DECOMPRESSED_BYTES + 1)), "a bomb that says so"),
    ("decompressed-size", streamed(bytes(limits.MAX_DECOMPRESSED_BYTES + 1)), "a bomb that does not"),
    ("tar-truncated", frame(b""), "an empty tar"),
    ("tar-truncated", frame(TAR[:700]), "a tar cut inside a member"),
    ("tar-truncated", frame(TAR[:-1024]), "no closing blocks"),
    ("tar-truncated", frame(TAR[:-512]), "one closing block"),
    ("tar-trailing", frame(TAR + b"x" * 512), "something after the end"),
    ("tar-checksum", frame(edited(TAR, 0, b"Manifest", sum_again=False)), "a header that does not add up"),
    ("tar-checksum", frame(edited(TAR, 148, b"zzzzzz\0 ", sum_again=False)), "a checksum that is no number"),
    ("tar-kind", frame(edited(TAR, 156, b"1")), "a hard link"),
    ("tar-kind", frame(edited(TAR, 156, b"2")), "a symbolic link"),
    ("tar-kind", frame(edited(TAR, 156, b"5")), "a folder"),
    ("tar-kind", frame(edited(TAR, 156, b"3")), "a device"),
    ("tar-kind", frame(edited(TAR, 156, b"S")), "a sparse file"),
    ("tar-kind", frame(edited(TAR, 156, b"\0")), "an old-style file"),
    ("tar-kind", frame(repacked(tarfile.PAX_FORMAT)), "a PAX extension"),
    ("tar-kind", frame(repacked(tarfile.GNU_FORMAT)), "GNU tar's magic"),
    ("tar-header", frame(repacked(tarfile.USTAR_FORMAT)), "another time"),
    ("tar-header", frame(edited(TAR, 100, b"0000755")), "another mode"),
    ("tar-header", frame(edited(TAR, 265, b"root")), "an owner's name"),
    ("tar-header", frame(edited(TAR, 345, b"etc")), "a path before the name"),
    ("tar-size", frame(edited(TAR, 124, b"99999999999")), "a size that is not octal"),
    ("tar-size", frame(edited(TAR, 124, b"\x80" + bytes(11))), "a binary size"),
    ("tar-padding", frame(TAR.replace(b"}\n\0", b"}\n!", 1)), "something in the padding"),
]


@pytest.mark.parametrize(("code", "data"), [pytest.param(c, d, id=name) for c, d, name in BYTE_CASES])
def test_bytes_that_are_no_bundle_are_refused_with_their_code(code: str, data: bytes) -> None:
    with pytest.raises(BundleError) as refused:
        unpack_bundle(data, file="small")

    assert refused.value.code == code
    assert refused.value.place.startswith("small")


def test_a_member_that_stands_twice_is_refused() -> None:
    name, content = next(iter(members_of(GOOD).items()))
    once = join_members({name: content})[:-1024]

    with pytest.raises(BundleError) as refused:
        unpack_bundle(frame(once + TAR), file="small")

    assert refused.value.code == "member-twice"


def test_rows_of_the_guest_while_its_agent_was_off_are_refused() -> None:
    members = members_of(GOOD)
    plain = msgspec.json.decode(members[MANIFEST])
    plain["fields"]["guest"], plain["nominal_hz"]["guest"], plain["rows_emitted"]["guest"] = ["up_ns"], 1.0, 1
    plain["clocks"]["base"]["guest"] = "unix"
    row = b'{"t_wall_ns":1,"t_mono_ns":1,"seq":0,"up_ns":1}\n'
    members |= {MANIFEST: msgspec.json.encode(plain), "guest.jsonl": row}

    with pytest.raises(BundleError) as refused:
        unpack_bundle(seal(listed(members)), file="small")

    assert refused.value.code == "manifest-agent"


def test_peek_refuses_what_does_not_begin_as_a_bundle() -> None:
    for data in (b"", b"hello", GOOD[:30], frame(bytes(2048)), frame(join_members({LABELS: b""}))):
        with pytest.raises(BundleError):
            unpack_manifest(data, file="small")


def test_every_refusal_of_this_table_has_a_severity_and_a_sentence() -> None:
    used = {p.values[0] for p in MEMBER_CASES} | {code for code, _, _ in BYTE_CASES}  # type: ignore[attr-defined]
    elsewhere = {"member-twice", "manifest-agent", "bundle-missing", "bundle-unreadable"}

    assert used | elsewhere == set(FINDING_CODES)
    assert all(
        spec.about.endswith(".") and spec.severity in (BundleStatus.ERRORED, BundleStatus.REJECTED)
        for spec in FINDING_CODES.values()
    )


def test_a_code_with_a_source_behind_it_is_judged_as_the_code() -> None:
    assert find_severity("row-json:proc") is BundleStatus.REJECTED
