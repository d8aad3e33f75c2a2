"""Fault injection: each kind of fault changes a bundle and names the validation result that it must cause."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.bundle.container import decompress_frame
from phasewatch.bundle.model import BundleMember, LabelMark, Manifest, SourceRows
from phasewatch.errors import BundleError, UsageError, suggest_names
from phasewatch.simulate.episodes import EpisodeDraft
from phasewatch.types import BundleStatus, SourceKind

__all__ = [
    "DUPLICATE_FAULT",
    "FAULTS",
    "FaultSpec",
    "copy_telemetry",
    "draw_fault",
    "find_faults",
    "flip_bit",
    "step_clock",
]

_MemberBytes = Mapping[str, bytes]
_DraftInjector = Callable[[np.random.Generator, EpisodeDraft], EpisodeDraft]
_MemberInjector = Callable[[np.random.Generator, _MemberBytes], _MemberBytes]

_MANIFEST_NAME, _LABELS_NAME, _PROC_NAME = "manifest.json", "labels.jsonl", "proc.jsonl"


# ---- faults of the packed bytes ----


def _strip_checksum(data: bytes) -> bytes:
    """Clear the checksum flag of the header and remove the checksum."""
    return data[:4] + bytes([data[4] & ~0x04]) + data[5:-4]


def flip_bit(rng: np.random.Generator, data: bytes) -> bytes:
    """Flip one bit in the last tenth of the compressed content, as a bad medium would.

    About one bit in two thousand is padding that no decoder reads; only the receipt would reveal it. Such a bit is not
    chosen.
    """
    while True:
        at = int(rng.integers(len(data) * 9 // 10, len(data) - 4))
        changed = data[:at] + bytes([data[at] ^ 1 << int(rng.integers(0, 8))]) + data[at + 1 :]
        try:
            decompress_frame(changed, file="")
        except BundleError:
            return changed


@cache
def _build_decompression_bomb() -> bytes:
    """Build 2 KiB that decompress to 64 MiB: one frame of 512 blocks, each one byte repeated 131,072 times."""
    header = b"\x28\xb5\x2f\xfd" + b"\x04" + b"\x68"  # a checksum follows, no size is stated, the window is 8 MiB
    block = 1 << 1 | (128 << 10) << 3  # block type RLE
    blocks = [(block | (i == 511)).to_bytes(3, "little") + b"\0" for i in range(512)]
    return b"".join((header, *blocks, b"\0\0\0\0"))


# ---- faults of members ----


def _update_manifest_members(members: _MemberBytes) -> _MemberBytes:
    """Update the manifest's digests, sizes and row counts of changed members."""
    manifest = msgspec.json.decode(members[_MANIFEST_NAME], type=Manifest)
    listed = {
        name: BundleMember(bytes=len(content), sha256=sha256(content).hexdigest(), rows=content.count(b"\n"))
        for name, content in members.items()
        if name != _MANIFEST_NAME
    }
    text = msgspec.json.encode(msgspec.structs.replace(manifest, members=listed), order="deterministic") + b"\n"
    return {**members, _MANIFEST_NAME: text}


def _alter_member(rng: np.random.Generator, members: _MemberBytes) -> _MemberBytes:
    """Change one digit of a row without updating the manifest."""
    content = members[_PROC_NAME]
    at = content.index(b"0", int(rng.integers(0, len(content) // 2)))
    return {**members, _PROC_NAME: content[:at] + b"1" + content[at + 1 :]}


def _replace_in_manifest(old: bytes, new: bytes) -> _MemberInjector:
    """Return a fault that replaces text of the manifest."""
    return lambda rng, members: {**members, _MANIFEST_NAME: members[_MANIFEST_NAME].replace(old, new)}


def _set_unknown_phase(rng: np.random.Generator, members: _MemberBytes) -> _MemberBytes:
    """Set an unknown phase in the labels."""
    content = re.sub(rb'"phase":"[a-z]+"', b'"phase":"zombie"', members[_LABELS_NAME], count=1)
    return _update_manifest_members({**members, _LABELS_NAME: content})


def _drop_end_label(rng: np.random.Generator, members: _MemberBytes) -> _MemberBytes:
    """Remove the `end` row of the labels."""
    lines = members[_LABELS_NAME].splitlines(keepends=True)
    return _update_manifest_members({**members, _LABELS_NAME: b"".join(lines[:-1])})


def _replace_value(text: bytes) -> _MemberInjector:
    """Return a fault that replaces one integer of a row by other text."""

    def replace_integer(rng: np.random.Generator, members: _MemberBytes) -> _MemberBytes:
        lines = members[_PROC_NAME].splitlines(keepends=True)
        at = int(rng.integers(0, len(lines)))
        lines[at] = re.sub(rb'"cpu_sys_ns":\d+', b'"cpu_sys_ns":' + text, lines[at])
        return _update_manifest_members({**members, _PROC_NAME: b"".join(lines)})

    return replace_integer


def _duplicate_key(rng: np.random.Generator, members: _MemberBytes) -> _MemberBytes:
    """Write one key of a row twice with different values."""
    lines = members[_PROC_NAME].splitlines(keepends=True)
    at = int(rng.integers(0, len(lines)))
    lines[at] = lines[at].replace(b"}\n", b',"threads":1}\n')
    return _update_manifest_members({**members, _PROC_NAME: b"".join(lines)})


def _truncate_member(rng: np.random.Generator, members: _MemberBytes) -> _MemberBytes:
    """Cut a member in the middle of its last row."""
    return _update_manifest_members({**members, _PROC_NAME: members[_PROC_NAME][:-20]})


# ---- faults of drafts ----


def _change_episode_id(manifest: Manifest, episode_id: str, neighbours: tuple[str, ...]) -> Manifest:
    """Return a manifest with another episode id."""
    return msgspec.structs.replace(manifest, episode_id=episode_id, neighbours=neighbours)


def _set_foreign_episode_id(rng: np.random.Generator, draft: EpisodeDraft) -> EpisodeDraft:
    """Set an episode id that differs from the path in the store."""
    other = draft.manifest.episode_id[:-4] + ("0000" if not draft.manifest.episode_id.endswith("0000") else "ffff")
    return replace(draft, manifest=_change_episode_id(draft.manifest, other, ()))


def _reverse_labels(rng: np.random.Generator, draft: EpisodeDraft) -> EpisodeDraft:
    """Swap the time stamps of the last two marks, so that time goes backwards."""
    *before, a, b = draft.marks
    swapped = (
        replace(a, t_wall_ns=b.t_wall_ns, t_mono_ns=b.t_mono_ns),
        replace(b, t_wall_ns=a.t_wall_ns, t_mono_ns=a.t_mono_ns),
    )
    return replace(draft, marks=(*before, *swapped))


def _stretch_duration(rng: np.random.Generator, draft: EpisodeDraft) -> EpisodeDraft:
    """Set a duration in the manifest that is 0.05 s longer than the labels."""
    longer = round(draft.manifest.duration_s + 0.05, 3)
    return replace(draft, manifest=msgspec.structs.replace(draft.manifest, duration_s=longer))


def _drop_source(source: SourceKind) -> _DraftInjector:
    """Return a fault that removes a source, as if its sampler had never started."""

    def drop(rng: np.random.Generator, draft: EpisodeDraft) -> EpisodeDraft:
        emitted = {**draft.manifest.rows_emitted, source: 0}
        manifest = msgspec.structs.replace(draft.manifest, rows_emitted=emitted)
        return replace(draft, manifest=manifest, rows={s: rows for s, rows in draft.rows.items() if s is not source})

    return drop


def _select_rows(draft: EpisodeDraft, source: SourceKind, mask: NDArray[np.bool_], *, is_lost: bool) -> EpisodeDraft:
    """Select the rows of a mask, ``(n,)`` bool; the others were lost after emission (`is_lost`) or never emitted."""
    rows = draft.rows[source]
    kept = replace(
        rows,
        t_wall_ns=rows.t_wall_ns[mask],
        t_mono_ns=rows.t_mono_ns[mask],
        seq=rows.seq[mask] if is_lost else np.arange(int(mask.sum()), dtype=np.int64),
        columns=tuple(column[mask] for column in rows.columns),
        present=rows.present[mask],
    )
    manifest = draft.manifest
    if not is_lost:
        emitted = {**manifest.rows_emitted, source: len(kept)}
        manifest = msgspec.structs.replace(manifest, rows_emitted=emitted)
    return replace(draft, manifest=manifest, rows={**draft.rows, source: kept})


def _insert_gap(source: SourceKind) -> _DraftInjector:
    """Return a fault that interrupts a sampler for 4 to 6 s."""

    def pause(rng: np.random.Generator, draft: EpisodeDraft) -> EpisodeDraft:
        at = np.arange(len(draft.rows[source]))
        first = int(rng.integers(20, len(at) - 40))
        return _select_rows(draft, source, (at < first) | (at >= first + int(rng.integers(8, 12))), is_lost=False)

    return pause


def _lose_rows(source: SourceKind) -> _DraftInjector:
    """Return a fault that loses three single rows after emission."""

    def lose(rng: np.random.Generator, draft: EpisodeDraft) -> EpisodeDraft:
        mask = np.ones(len(draft.rows[source]), np.bool_)
        mask[10 + 20 * rng.choice((len(mask) - 20) // 20, 3, replace=False)] = False
        return _select_rows(draft, source, mask, is_lost=True)

    return lose


def _subsample_rows(source: SourceKind, *, n_kept: int, cycle: int) -> _DraftInjector:
    """Return a fault that slows a sampler down: it emits `n_kept` of every `cycle` readings."""
    return lambda rng, draft: _select_rows(
        draft, source, np.arange(len(draft.rows[source])) % cycle < n_kept, is_lost=False
    )


def _stamp_with_monotonic_clock(*, has_pairs: bool) -> _DraftInjector:
    """Return a fault that stamps netflow with the monotonic clock although the manifest says Unix time.

    Args:
        has_pairs: Whether the manifest keeps the clock pairs that allow a repair.
    """

    def stamp(rng: np.random.Generator, draft: EpisodeDraft) -> EpisodeDraft:
        rows = draft.rows[SourceKind.NETFLOW]
        wrong = replace(rows, t_wall_ns=rows.t_mono_ns.copy())
        manifest = draft.manifest
        if not has_pairs:
            manifest = msgspec.structs.replace(manifest, clocks=msgspec.structs.replace(manifest.clocks, pairs={}))
        return replace(draft, manifest=manifest, rows={**draft.rows, SourceKind.NETFLOW: wrong})

    return stamp


def step_clock(rng: np.random.Generator, draft: EpisodeDraft) -> EpisodeDraft:
    """Step the wall clock 0.6 s forward near the middle; the monotonic clock is unchanged."""
    first, last = draft.marks[0].t_wall_ns, draft.marks[-1].t_wall_ns
    at_ns = first + int((last - first) * rng.uniform(0.3, 0.7))
    step_ns = 600_000_000

    def mark(each: LabelMark) -> LabelMark:
        return replace(each, t_wall_ns=each.t_wall_ns + step_ns) if each.t_wall_ns >= at_ns else each

    def stamp(each: SourceRows) -> SourceRows:
        return replace(each, t_wall_ns=each.t_wall_ns + np.where(each.t_wall_ns >= at_ns, step_ns, 0))

    marks = tuple(mark(each) for each in draft.marks)
    duration_s = round((marks[-1].t_wall_ns - marks[0].t_wall_ns) / 1e9, 3)
    return EpisodeDraft(
        manifest=msgspec.structs.replace(draft.manifest, duration_s=duration_s),
        marks=marks,
        rows={source: stamp(each) for source, each in draft.rows.items()},
    )


def _add_cpu_contention(rng: np.random.Generator, draft: EpisodeDraft) -> EpisodeDraft:
    """Add 0.3 s per second to the time that the vCPU waited for a core."""
    rows = draft.rows[SourceKind.PROC]
    i = rows.fields.index("vcpu_wait_ns")
    waited = rows.columns[i] + (rows.t_mono_ns - rows.t_mono_ns[0]) * 3 // 10
    columns = (*rows.columns[:i], waited, *rows.columns[i + 1 :])
    return replace(draft, rows={**draft.rows, SourceKind.PROC: replace(rows, columns=columns)})


def _freeze_source(source: SourceKind) -> _DraftInjector:
    """Return a fault that repeats the first row of a source in all its rows."""

    def still(rng: np.random.Generator, draft: EpisodeDraft) -> EpisodeDraft:
        rows = draft.rows[source]
        columns = tuple(np.full_like(column, column[0]) for column in rows.columns)
        return replace(draft, rows={**draft.rows, source: replace(rows, columns=columns)})

    return still


_ReceiptKind = Literal["of the file", "of the undamaged", "wrong", "malformed", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSpec:
    """One kind of fault.

    Attributes:
        name: Name in the ground truth.
        status, reasons: The expected result of validation; the reasons are codes, the most severe first.
        draft, members, data: The changes of the draft, of the encoded members, and of the packed bytes.
        receipt: The bytes that the receipt has the digest of.
    """

    name: str
    status: BundleStatus
    reasons: tuple[str, ...]
    draft: _DraftInjector | None = None
    members: _MemberInjector | None = None
    data: Callable[[np.random.Generator, bytes], bytes] | None = None
    receipt: _ReceiptKind = "of the file"


def _degraded_fault(name: str, reason: str, draft: _DraftInjector, *more: str) -> FaultSpec:
    return FaultSpec(name=name, status=BundleStatus.DEGRADED, reasons=(reason, *more), draft=draft)


def _rejected_fault(name: str, reason: str, members: _MemberInjector) -> FaultSpec:
    return FaultSpec(name=name, status=BundleStatus.REJECTED, reasons=(reason,), members=members)


def _errored_fault(name: str, reason: str, data: Callable[[np.random.Generator, bytes], bytes]) -> FaultSpec:
    return FaultSpec(name=name, status=BundleStatus.ERRORED, reasons=(reason,), data=data)


# A copy of the other episode of its session.
DUPLICATE_FAULT = FaultSpec(name="duplicate", status=BundleStatus.REJECTED, reasons=("duplicate",))

FAULTS: tuple[FaultSpec, ...] = (
    # The bytes cannot be decoded.
    _errored_fault("truncated", "zstd-truncated", lambda rng, data: data[: int(len(data) * rng.uniform(0.1, 0.95))]),
    _errored_fault("empty", "compressed-size", lambda rng, data: b""),
    _errored_fault("not-zstd", "zstd-magic", lambda rng, data: gzip.compress(data, 1, mtime=0)),
    _errored_fault("no-checksum", "zstd-checksum-flag", lambda rng, data: _strip_checksum(data)),
    _errored_fault("skippable-frame", "zstd-skippable", lambda rng, data: b"\x50\x2a\x4d\x18\x04\0\0\0note" + data),
    _errored_fault("trailing-bytes", "zstd-trailing", lambda rng, data: data + b"\0" * 16),
    _errored_fault("bomb", "decompressed-size", lambda rng, data: _build_decompression_bomb()),
    FaultSpec(
        name="bit-flip",
        status=BundleStatus.ERRORED,
        reasons=("zstd-corrupt", "receipt"),
        data=flip_bit,
        receipt="of the undamaged",
    ),
    # The content breaks a rule.
    FaultSpec(name="wrong-receipt", status=BundleStatus.REJECTED, reasons=("receipt",), receipt="wrong"),
    FaultSpec(name="malformed-receipt", status=BundleStatus.REJECTED, reasons=("receipt",), receipt="malformed"),
    DUPLICATE_FAULT,
    _rejected_fault("member-altered", "member-sha256", _alter_member),
    _rejected_fault("member-unknown", "member-unknown", lambda rng, members: {**members, "notes.txt": b"hello\n"}),
    _rejected_fault(
        "future-format", "manifest-format", _replace_in_manifest(b"phasewatch-episode/2", b"phasewatch-episode/9")
    ),
    _rejected_fault("unknown-phase", "label-phase", _set_unknown_phase),
    _rejected_fault("no-end", "label-end", _drop_end_label),
    _rejected_fault("nan", "row-non-finite", _replace_value(b"NaN")),
    _rejected_fault("huge-number", "row-int64", _replace_value(b"9223372036854775808")),
    _rejected_fault("fraction", "row-type", _replace_value(b"0.5")),
    _rejected_fault("text-for-number", "row-type", _replace_value(b'"7"')),
    _rejected_fault("key-twice", "row-key-twice", _duplicate_key),
    _rejected_fault("cut-member", "text-last-newline", _truncate_member),
    FaultSpec(name="labels-backwards", status=BundleStatus.REJECTED, reasons=("label-order",), draft=_reverse_labels),
    FaultSpec(
        name="wrong-duration", status=BundleStatus.REJECTED, reasons=("label-duration",), draft=_stretch_duration
    ),
    FaultSpec(
        name="foreign-identity", status=BundleStatus.REJECTED, reasons=("identity",), draft=_set_foreign_episode_id
    ),
    FaultSpec(
        name="missing-proc", status=BundleStatus.REJECTED, reasons=("rows:proc",), draft=_drop_source(SourceKind.PROC)
    ),
    FaultSpec(
        name="sparse-proc",
        status=BundleStatus.REJECTED,
        reasons=("rows:proc",),
        draft=_subsample_rows(SourceKind.PROC, n_kept=2, cycle=5),
    ),
    # Usable, with missing or repaired parts.
    FaultSpec(name="no-receipt", status=BundleStatus.DEGRADED, reasons=("no-receipt",), receipt="none"),
    _degraded_fault("gap", "silence:qmp", _insert_gap(SourceKind.QMP)),
    _degraded_fault("lost-rows", "loss:proc", _lose_rows(SourceKind.PROC)),
    _degraded_fault("missing-netflow", "missing:netflow", _drop_source(SourceKind.NETFLOW)),
    _degraded_fault("slow-qmp", "rate:qmp", _subsample_rows(SourceKind.QMP, n_kept=3, cycle=4)),
    _degraded_fault("clock-base", "clock-base-repaired:netflow", _stamp_with_monotonic_clock(has_pairs=True)),
    _degraded_fault(
        "clock-base-lost", "clock-base:netflow", _stamp_with_monotonic_clock(has_pairs=False), "missing:netflow"
    ),
    _degraded_fault("clock-step", "clock-step", step_clock),
    _degraded_fault("contention", "contention", _add_cpu_contention),
    _degraded_fault("constant-proc", "constant-proc:proc", _freeze_source(SourceKind.PROC)),
)


def draw_fault(
    rng: np.random.Generator, *, may_duplicate: bool, kinds: Sequence[FaultSpec] = FAULTS
) -> FaultSpec | None:
    """Draw a kind of fault. Without an episode to copy, a duplicate is replaced by another kind, or by None."""
    fault = kinds[int(rng.integers(0, len(kinds)))]
    if fault is not DUPLICATE_FAULT or may_duplicate:
        return fault
    return next((kind for kind in kinds if kind is not DUPLICATE_FAULT), None)


def find_faults(names: Sequence[str]) -> tuple[FaultSpec, ...]:
    """Return the faults with these names in the order of the table; all faults if no name is given.

    Raises:
        UsageError: If a name is unknown; the message suggests the nearest.
    """
    known = {fault.name: fault for fault in FAULTS}
    for name in names:
        if name not in known:
            raise UsageError(f"no fault {name!r}; {suggest_names(name, known)}")
    return tuple(fault for fault in FAULTS if not names or fault.name in names)


def copy_telemetry(original: EpisodeDraft, draft: EpisodeDraft) -> EpisodeDraft:
    """Return the telemetry of `original` under the id of `draft`."""
    manifest = _change_episode_id(original.manifest, draft.manifest.episode_id, draft.manifest.neighbours)
    return replace(original, manifest=manifest)
