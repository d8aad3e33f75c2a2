"""What can be wrong with a bundle, done on purpose: one row a kind, with what a validator must say of it."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from phasewatch.errors import UsageError, name_the_nearest
from phasewatch.simulate import damage
from phasewatch.simulate.damage import Members
from phasewatch.simulate.episode import Draft
from phasewatch.vocab import Source, Status

Receipt = Literal["of the file", "of the undamaged", "wrong", "malformed", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: As the truth file spells it.
        status, reasons: What a validator must say: the reasons are codes, the worst first.
        draft, members, data: What is done, before the rows are spelled, after it, and to the packed bytes.
        receipt: What the receipt vouches for.
    """

    name: str
    status: Status
    reasons: tuple[str, ...]
    draft: Callable[[np.random.Generator, Draft], Draft] | None = None
    members: Callable[[np.random.Generator, Members], Members] | None = None
    data: Callable[[np.random.Generator, bytes], bytes] | None = None
    receipt: Receipt = "of the file"


def _degraded(name: str, reason: str, draft: Callable[[np.random.Generator, Draft], Draft], *more: str) -> Fault:
    return Fault(name=name, status=Status.DEGRADED, reasons=(reason, *more), draft=draft)


def _rejected(name: str, reason: str, members: Callable[[np.random.Generator, Members], Members]) -> Fault:
    return Fault(name=name, status=Status.REJECTED, reasons=(reason,), members=members)


def _errored(name: str, reason: str, data: Callable[[np.random.Generator, bytes], bytes]) -> Fault:
    return Fault(name=name, status=Status.ERRORED, reasons=(reason,), data=data)


DUPLICATE = Fault(
    name="duplicate", status=Status.REJECTED, reasons=("duplicate",)
)  # made of its session's other episode

FAULTS: tuple[Fault, ...] = (
    # The bytes cannot be read.
    _errored("truncated", "zstd-truncated", lambda rng, data: data[: int(len(data) * rng.uniform(0.1, 0.95))]),
    _errored("empty", "compressed-size", lambda rng, data: b""),
    _errored("not-zstd", "zstd-magic", lambda rng, data: gzip.compress(data, 1, mtime=0)),
    _errored("no-checksum", "zstd-checksum-flag", lambda rng, data: damage.without_checksum(data)),
    _errored("skippable-frame", "zstd-skippable", lambda rng, data: b"\x50\x2a\x4d\x18\x04\0\0\0note" + data),
    _errored("trailing-bytes", "zstd-trailing", lambda rng, data: data + b"\0" * 16),
    _errored("bomb", "decompressed-size", lambda rng, data: damage.bomb()),
    Fault(
        name="bit-flip", status=Status.ERRORED, reasons=("zstd-corrupt", "receipt"), data=damage.flip_bit,
        receipt="of the undamaged",
    ),
    # They can be read, and break a rule.
    Fault(name="wrong-receipt", status=Status.REJECTED, reasons=("receipt",), receipt="wrong"),
    Fault(name="malformed-receipt", status=Status.REJECTED, reasons=("receipt",), receipt="malformed"),
    DUPLICATE,
    _rejected("member-altered", "member-sha256", damage.alter_unnoticed),
    _rejected("member-unknown", "member-unknown", lambda rng, members: {**members, "notes.txt": b"hello\n"}),
    _rejected("future-format", "manifest-format", damage.edit_manifest(b"phasewatch-episode/1", b"phasewatch-episode/2")),
    _rejected("unknown-phase", "label-phase", damage.rename_phase),
    _rejected("no-end", "label-end", damage.drop_end),
    _rejected("nan", "row-non-finite", damage.put_value(b"NaN")),
    _rejected("huge-number", "row-int64", damage.put_value(b"9223372036854775808")),
    _rejected("fraction", "row-type", damage.put_value(b"0.5")),
    _rejected("text-for-number", "row-type", damage.put_value(b'"7"')),
    _rejected("key-twice", "row-key-twice", damage.repeat_key),
    _rejected("cut-member", "text-last-newline", damage.cut_rows),
    Fault(name="labels-backwards", status=Status.REJECTED, reasons=("label-order",), draft=damage.turn_labels),
    Fault(name="wrong-duration", status=Status.REJECTED, reasons=("label-duration",), draft=damage.stretch_duration),
    Fault(name="foreign-identity", status=Status.REJECTED, reasons=("identity",), draft=damage.rename_episode),
    Fault(name="missing-proc", status=Status.REJECTED, reasons=("rows:proc",), draft=damage.drop_source(Source.PROC)),
    Fault(
        name="sparse-proc", status=Status.REJECTED, reasons=("rows:proc",),
        draft=damage.thin_out(Source.PROC, keep=2, of=5),
    ),
    # Usable, with something missing or repaired.
    Fault(name="no-receipt", status=Status.DEGRADED, reasons=("no-receipt",), receipt="none"),
    _degraded("gap", "silence:qmp", damage.silence(Source.QMP)),
    _degraded("lost-rows", "loss:proc", damage.lose_rows(Source.PROC)),
    _degraded("missing-netflow", "missing:netflow", damage.drop_source(Source.NETFLOW)),
    _degraded("slow-qmp", "rate:qmp", damage.thin_out(Source.QMP, keep=3, of=4)),
    _degraded("clock-base", "clock-base-repaired:netflow", damage.stamp_monotonic(has_pairs=True)),
    _degraded("clock-base-lost", "clock-base:netflow", damage.stamp_monotonic(has_pairs=False), "missing:netflow"),
    _degraded("clock-step", "clock-step", damage.step_clock),
    _degraded("contention", "contention", damage.contend),
    _degraded("constant-proc", "constant-proc:proc", damage.freeze(Source.PROC)),
)  # fmt: skip


def choose(rng: np.random.Generator, *, may_duplicate: bool, kinds: Sequence[Fault] = FAULTS) -> Fault | None:
    """Draw a kind of fault; a duplicate only where there is something to copy, else another kind, or none is left."""
    fault = kinds[int(rng.integers(0, len(kinds)))]
    if fault is not DUPLICATE or may_duplicate:
        return fault
    return next((kind for kind in kinds if kind is not DUPLICATE), None)


def kinds_of(names: Sequence[str]) -> tuple[Fault, ...]:
    """Give the kinds of these names in the table's order; all of them for no name.

    Raises:
        UsageError: If a name is of none; it names the nearest.
    """
    known = {fault.name: fault for fault in FAULTS}
    for name in names:
        if name not in known:
            raise UsageError(f"no fault {name!r}; {name_the_nearest(name, known)}")
    return tuple(fault for fault in FAULTS if not names or fault.name in names)


def copy_as(original: Draft, draft: Draft) -> Draft:
    """Give another episode's telemetry under this one's id."""
    manifest = damage.renamed(original.manifest, draft.manifest.episode_id, draft.manifest.neighbours)
    return replace(original, manifest=manifest)
