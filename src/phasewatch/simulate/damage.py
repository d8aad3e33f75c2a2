"""The hands that do the faults: each takes an episode, its members or its bytes, and gives them back spoilt in one way."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from hashlib import sha256

import msgspec
import numpy as np
from numpy.typing import NDArray

from phasewatch.episode.frame import decompress_frame
from phasewatch.episode.model import LabelMark, Manifest, Member, SourceRows
from phasewatch.errors import BundleError
from phasewatch.simulate.episode import Draft
from phasewatch.vocab import Source

Members = Mapping[str, bytes]
OnDraft = Callable[[np.random.Generator, Draft], Draft]
OnMembers = Callable[[np.random.Generator, Members], Members]

_MANIFEST, _LABELS, _PROC = "manifest.json", "labels.jsonl", "proc.jsonl"


# ---- bytes ------------------------------------------------------------------------------------------------------


def without_checksum(data: bytes) -> bytes:
    """Clear the header's checksum flag and take the checksum off."""
    return data[:4] + bytes([data[4] & ~0x04]) + data[5:-4]


def flip_bit(rng: np.random.Generator, data: bytes) -> bytes:
    """Flip one bit of the compressed content's last tenth, as a bad medium would.

    One in some two thousand is padding that no decoder looks at: nothing would be wrong but the receipt.
    """
    while True:
        at = int(rng.integers(len(data) * 9 // 10, len(data) - 4))
        spoilt = data[:at] + bytes([data[at] ^ 1 << int(rng.integers(0, 8))]) + data[at + 1 :]
        try:
            decompress_frame(spoilt, file="")
        except BundleError:
            return spoilt


@cache
def bomb() -> bytes:
    """Give 2 KiB that would become 64 MiB: one frame of 512 blocks, each one byte repeated 131,072 times."""
    header = b"\x28\xb5\x2f\xfd" + b"\x04" + b"\x68"  # a checksum follows, no size is stated, the window is 8 MiB
    block = 1 << 1 | (128 << 10) << 3  # of the kind "repeated"
    blocks = [(block | (i == 511)).to_bytes(3, "little") + b"\0" for i in range(512)]
    return b"".join((header, *blocks, b"\0\0\0\0"))


# ---- members ----------------------------------------------------------------------------------------------------


def _listed(members: Members) -> Members:
    """Make the manifest agree again with members that were changed on purpose."""
    manifest = msgspec.json.decode(members[_MANIFEST], type=Manifest)
    listed = {
        name: Member(bytes=len(content), sha256=sha256(content).hexdigest(), rows=content.count(b"\n"))
        for name, content in members.items()
        if name != _MANIFEST
    }
    text = msgspec.json.encode(msgspec.structs.replace(manifest, members=listed), order="deterministic") + b"\n"
    return {**members, _MANIFEST: text}


def alter_unnoticed(rng: np.random.Generator, members: Members) -> Members:
    """Change one digit of a row, and let the manifest stand."""
    content = members[_PROC]
    at = content.index(b"0", int(rng.integers(0, len(content) // 2)))
    return {**members, _PROC: content[:at] + b"1" + content[at + 1 :]}


def edit_manifest(old: bytes, new: bytes) -> OnMembers:
    """Replace words of the manifest."""
    return lambda rng, members: {**members, _MANIFEST: members[_MANIFEST].replace(old, new)}


def rename_phase(rng: np.random.Generator, members: Members) -> Members:
    """Name a phase that no vocabulary knows."""
    content = re.sub(rb'"phase":"[a-z]+"', b'"phase":"zombie"', members[_LABELS], count=1)
    return _listed({**members, _LABELS: content})


def drop_end(rng: np.random.Generator, members: Members) -> Members:
    """Leave out the `end` row."""
    lines = members[_LABELS].splitlines(keepends=True)
    return _listed({**members, _LABELS: b"".join(lines[:-1])})


def put_value(text: bytes) -> OnMembers:
    """Put something else in place of one whole number of a row."""

    def put(rng: np.random.Generator, members: Members) -> Members:
        lines = members[_PROC].splitlines(keepends=True)
        at = int(rng.integers(0, len(lines)))
        lines[at] = re.sub(rb'"cpu_sys_ns":\d+', b'"cpu_sys_ns":' + text, lines[at])
        return _listed({**members, _PROC: b"".join(lines)})

    return put


def repeat_key(rng: np.random.Generator, members: Members) -> Members:
    """Write one key of a row twice, with two values."""
    lines = members[_PROC].splitlines(keepends=True)
    at = int(rng.integers(0, len(lines)))
    lines[at] = lines[at].replace(b"}\n", b',"threads":1}\n')
    return _listed({**members, _PROC: b"".join(lines)})


def cut_rows(rng: np.random.Generator, members: Members) -> Members:
    """End a member in the middle of its last row."""
    return _listed({**members, _PROC: members[_PROC][:-20]})


# ---- drafts -----------------------------------------------------------------------------------------------------


def renamed(manifest: Manifest, episode_id: str, neighbours: tuple[str, ...]) -> Manifest:
    """Give a manifest another id."""
    return msgspec.structs.replace(manifest, episode_id=episode_id, neighbours=neighbours)


def rename_episode(rng: np.random.Generator, draft: Draft) -> Draft:
    """Claim to be another episode than the place in the store says."""
    other = draft.manifest.episode_id[:-4] + ("0000" if not draft.manifest.episode_id.endswith("0000") else "ffff")
    return replace(draft, manifest=renamed(draft.manifest, other, ()))


def turn_labels(rng: np.random.Generator, draft: Draft) -> Draft:
    """Exchange the stamps of the last two marks, so that time goes backwards."""
    *before, a, b = draft.marks
    turned = (
        replace(a, t_wall_ns=b.t_wall_ns, t_mono_ns=b.t_mono_ns),
        replace(b, t_wall_ns=a.t_wall_ns, t_mono_ns=a.t_mono_ns),
    )
    return replace(draft, marks=(*before, *turned))


def stretch_duration(rng: np.random.Generator, draft: Draft) -> Draft:
    """Let the manifest claim a twentieth of a second more than the labels."""
    longer = round(draft.manifest.duration_s + 0.05, 3)
    return replace(draft, manifest=msgspec.structs.replace(draft.manifest, duration_s=longer))


def drop_source(source: Source) -> OnDraft:
    """Leave a source's member out, as if its sampler had never started."""

    def drop(rng: np.random.Generator, draft: Draft) -> Draft:
        emitted = {**draft.manifest.rows_emitted, source: 0}
        manifest = msgspec.structs.replace(draft.manifest, rows_emitted=emitted)
        return replace(draft, manifest=manifest, rows={s: rows for s, rows in draft.rows.items() if s is not source})

    return drop


def _keep(draft: Draft, source: Source, mask: NDArray[np.bool_], *, is_lost: bool) -> Draft:
    """Keep some rows; what is gone was either never emitted, or emitted and lost on the way."""
    rows = draft.rows[source]
    kept = replace(
        rows,
        t_wall_ns=rows.t_wall_ns[mask], t_mono_ns=rows.t_mono_ns[mask],
        seq=rows.seq[mask] if is_lost else np.arange(int(mask.sum()), dtype=np.int64),
        columns=tuple(column[mask] for column in rows.columns), present=rows.present[mask],
    )  # fmt: skip
    manifest = draft.manifest
    if not is_lost:
        emitted = {**manifest.rows_emitted, source: len(kept)}
        manifest = msgspec.structs.replace(manifest, rows_emitted=emitted)
    return replace(draft, manifest=manifest, rows={**draft.rows, source: kept})


def silence(source: Source) -> OnDraft:
    """Let a sampler pause for 4 to 6 s."""

    def pause(rng: np.random.Generator, draft: Draft) -> Draft:
        at = np.arange(len(draft.rows[source]))
        first = int(rng.integers(20, len(at) - 40))
        return _keep(draft, source, (at < first) | (at >= first + int(rng.integers(8, 12))), is_lost=False)

    return pause


def lose_rows(source: Source) -> OnDraft:
    """Lose three single rows on the way from the sampler."""

    def lose(rng: np.random.Generator, draft: Draft) -> Draft:
        mask = np.ones(len(draft.rows[source]), np.bool_)
        mask[10 + 20 * rng.choice((len(mask) - 20) // 20, 3, replace=False)] = False
        return _keep(draft, source, mask, is_lost=True)

    return lose


def thin_out(source: Source, *, keep: int, of: int) -> OnDraft:
    """Let a sampler run slow: it gives ``keep`` of ``of`` readings."""
    return lambda rng, draft: _keep(draft, source, np.arange(len(draft.rows[source])) % of < keep, is_lost=False)


def stamp_monotonic(*, has_pairs: bool) -> OnDraft:
    """Stamp netflow in the monotonic clock while the manifest says Unix time, with or without the means to repair it."""

    def stamp(rng: np.random.Generator, draft: Draft) -> Draft:
        rows = draft.rows[Source.NETFLOW]
        wrong = replace(rows, t_wall_ns=rows.t_mono_ns.copy())
        manifest = draft.manifest
        if not has_pairs:
            manifest = msgspec.structs.replace(manifest, clocks=msgspec.structs.replace(manifest.clocks, pairs={}))
        return replace(draft, manifest=manifest, rows={**draft.rows, Source.NETFLOW: wrong})

    return stamp


def step_clock(rng: np.random.Generator, draft: Draft) -> Draft:
    """Set the host's wall clock 0.6 s forward somewhere in the middle; the monotonic one runs on."""
    first, last = draft.marks[0].t_wall_ns, draft.marks[-1].t_wall_ns
    at_ns = first + int((last - first) * rng.uniform(0.3, 0.7))
    step_ns = 600_000_000

    def mark(each: LabelMark) -> LabelMark:
        return replace(each, t_wall_ns=each.t_wall_ns + step_ns) if each.t_wall_ns >= at_ns else each

    def stamp(each: SourceRows) -> SourceRows:
        return replace(each, t_wall_ns=each.t_wall_ns + np.where(each.t_wall_ns >= at_ns, step_ns, 0))

    marks = tuple(mark(each) for each in draft.marks)
    duration_s = round((marks[-1].t_wall_ns - marks[0].t_wall_ns) / 1e9, 3)
    return Draft(
        manifest=msgspec.structs.replace(draft.manifest, duration_s=duration_s), marks=marks,
        rows={source: stamp(each) for source, each in draft.rows.items()},
    )  # fmt: skip


def contend(rng: np.random.Generator, draft: Draft) -> Draft:
    """Let the vCPU wait for a core for 0.3 s in each second more."""
    rows = draft.rows[Source.PROC]
    i = rows.fields.index("vcpu_wait_ns")
    waited = rows.columns[i] + (rows.t_mono_ns - rows.t_mono_ns[0]) * 3 // 10
    columns = (*rows.columns[:i], waited, *rows.columns[i + 1 :])
    return replace(draft, rows={**draft.rows, Source.PROC: replace(rows, columns=columns)})


def freeze(source: Source) -> OnDraft:
    """Let every row of a source repeat its first."""

    def still(rng: np.random.Generator, draft: Draft) -> Draft:
        rows = draft.rows[source]
        columns = tuple(np.full_like(column, column[0]) for column in rows.columns)
        return replace(draft, rows={**draft.rows, source: replace(rows, columns=columns)})

    return still
