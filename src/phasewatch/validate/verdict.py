"""What is said of one thing in the store: a row of the index, made from bytes without touching the world."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from phasewatch.episode.bundle import peek, unpack
from phasewatch.episode.findings import Finding, severity_of
from phasewatch.episode.model import Episode, Manifest
from phasewatch.errors import BundleError, spell_controls
from phasewatch.grid.align import Grid, align_rebased
from phasewatch.grid.clocks import rebase
from phasewatch.grid.files import GridRow
from phasewatch.store.disk import UNREADABLE
from phasewatch.validate import gates
from phasewatch.validate.readings import FieldNulls, drop_impossible, null_counts
from phasewatch.validate.sketch import proc_sketch, telemetry_sha256
from phasewatch.vocab import PHASES, Phase, Source, Status

USABLE = (Status.ACCEPTED, Status.DEGRADED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a bundle lies, and what its receipt vouches for (None without one)."""

    path: str
    host_id: str | None
    episode_id: str | None
    receipt: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One row of `validation_v1.parquet`. Texts are empty and numbers 0 where the bundle could not be read so far.

    Attributes:
        reasons: Codes, worst first; `detail` is the worst one's place and words.
        rows, lost: Per source, in the order of Source: rows in the bundle, and rows that never arrived.
        seconds: Per phase, in the order of PHASES.
    """

    path: str
    episode_id: str
    host_id: str
    profile: str
    sample_name: str
    sample_kind: str
    origin: str
    role: str
    session: str
    plan_seed: int
    agent: bool
    status: Status
    reasons: tuple[str, ...]
    detail: str
    sha256: str
    telemetry_sha256: str
    proc_sketch: tuple[int, ...]
    bytes: int
    started_wall_ns: int
    duration_s: float
    rows: tuple[int, ...]
    lost: tuple[int, ...]
    seconds: tuple[float, ...]
    vcpu_wait: float
    duplicate_of: str
    flags: int
    neighbours: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Examined:
    """A verdict, and the episode and its grid where the bundle is usable.

    Attributes:
        findings: All that was found, worst first.
        nulls: How often each field of each source was null; empty where the bundle could not be read whole.
    """

    verdict: Verdict
    episode: Episode | None
    grid: Grid | None
    findings: tuple[Finding, ...] = ()
    nulls: Mapping[Source, tuple[FieldNulls, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Swept:
    """One bundle's verdict with its grid where it is usable; what crosses from a worker."""

    verdict: Verdict
    row: GridRow | None
    bins: NDArray[np.float32] | None
    levels: NDArray[np.float32] | None
    seconds: float = 0.0


def examine(data: bytes, place: Place, *, counts_nulls: bool = False) -> Examined:
    """Verify, decode, gate and grid one bundle, reading its bytes once; count the nulls of each field if asked to."""
    digest = sha256(data).hexdigest()
    findings: list[Finding] = []
    if place.receipt is None:
        findings.append(gates.finding("no-receipt", "no receipt stands beside it", place=place.path))
    elif place.receipt == UNREADABLE:
        words = "its receipt could not be read; mend the store's disk, permissions or network, and sweep again"
        findings.append(Finding(code="bundle-unreadable", severity=Status.ERRORED, place=place.path, words=words))
    elif place.receipt != digest:
        words = f"sha256 {digest[:12]}…, the receipt says {place.receipt[:12]}"
        findings.append(gates.finding("receipt", words, place=place.path))
    try:
        episode = unpack(data, file=place.path)
    except BundleError as error:
        severity = severity_of(error.code)
        findings.append(Finding(code=error.code, severity=severity, place=error.place, words=error.words))
        return Examined(
            verdict=_refused(data, digest, place, findings), episode=None, grid=None, findings=_ranked(findings)
        )
    findings += gates.check_place(episode, host_id=place.host_id, episode_id=place.episode_id)
    rebased, clock_findings = rebase(episode)
    findings += [*clock_findings, *gates.check(rebased)]
    status = gates.worst(findings)
    grid = align_rebased(drop_impossible(rebased), clock_findings) if status in USABLE else None
    verdict = _judged(rebased, digest, len(data), place, findings, flags=_flags(grid))
    nulls = null_counts(rebased) if counts_nulls else {}
    return Examined(
        verdict=verdict, episode=rebased if grid else None, grid=grid, findings=_ranked(findings), nulls=nulls
    )


def unreadable(place: Place, code: str, words: str, size: int) -> Verdict:
    """Give the verdict on what could not even be read: a lost worker, a missing file."""
    spec = gates.explain(code)
    severity = spec.severity if spec else Status.ERRORED
    return _refused(b"", "", place, [Finding(code=code, severity=severity, place=place.path, words=words)], size=size)


def _flags(grid: Grid | None) -> int:
    return int(grid.flags.max(initial=0)) if grid is not None else 0


def _ranked(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Sort findings, the worst first; of equal ones the first found."""
    order = ["note", *map(str, Status)]
    return tuple(sorted(findings, key=lambda f: -order.index(str(f.severity))))


def _summary(path: str, findings: Sequence[Finding]) -> tuple[Status, tuple[str, ...], str]:
    """Give status, codes (worst first, each once) and the worst finding's place and words."""
    ranked = _ranked(findings)
    codes = tuple(dict.fromkeys(f.code for f in ranked))
    place = ranked[0].place if ranked else ""
    whole = place if place.startswith(path) else f"{path}:{place}".rstrip(":")
    detail = spell_controls(f"{whole}: {ranked[0].words}") if ranked else ""
    return gates.worst(findings), codes, detail


def _refused(data: bytes, digest: str, place: Place, findings: Sequence[Finding], size: int | None = None) -> Verdict:
    """Judge a bundle that could not be read whole, with what its manifest says where that is readable."""
    manifest: Manifest | None = None
    if data:
        try:
            manifest = peek(data, file=place.path)
        except BundleError:
            manifest = None
    status, codes, detail = _summary(place.path, findings)
    return Verdict(
        path=place.path,
        episode_id=place.episode_id or (manifest.episode_id if manifest else ""),
        host_id=place.host_id or (manifest.host.host_id if manifest else ""),
        profile=manifest.profile if manifest else "", sample_name=manifest.sample_name if manifest else "",
        sample_kind=str(manifest.sample_kind) if manifest else "", origin=str(manifest.origin) if manifest else "",
        role=str(manifest.role) if manifest else "", session=manifest.session if manifest else "",
        plan_seed=manifest.plan_seed if manifest else 0, agent=manifest.agent if manifest else False,
        status=status, reasons=codes, detail=detail, sha256=digest, telemetry_sha256="", proc_sketch=(),
        bytes=len(data) if size is None else size,
        started_wall_ns=manifest.started_wall_ns if manifest else 0,
        duration_s=manifest.duration_s if manifest else 0.0,
        rows=_rows(manifest), lost=_lost(manifest), seconds=(0.0,) * len(PHASES),
        vcpu_wait=math.nan, duplicate_of="", flags=0,
    )  # fmt: skip


def _judged(
    episode: Episode, digest: str, size: int, place: Place, findings: Sequence[Finding], *, flags: int
) -> Verdict:
    manifest = episode.manifest
    status, codes, detail = _summary(place.path, findings)
    return Verdict(
        path=place.path, episode_id=place.episode_id or manifest.episode_id, host_id=place.host_id or manifest.host.host_id,
        profile=manifest.profile, sample_name=manifest.sample_name, sample_kind=str(manifest.sample_kind),
        origin=str(manifest.origin), role=str(manifest.role), session=manifest.session, plan_seed=manifest.plan_seed,
        agent=manifest.agent, status=status, reasons=codes, detail=detail, sha256=digest,
        telemetry_sha256=telemetry_sha256(episode), proc_sketch=proc_sketch(episode), bytes=size,
        started_wall_ns=manifest.started_wall_ns, duration_s=manifest.duration_s,
        rows=_rows(manifest), lost=_lost(manifest), seconds=_seconds(episode),
        vcpu_wait=gates.vcpu_wait_cores(episode), duplicate_of="", flags=flags, neighbours=manifest.neighbours,
    )  # fmt: skip


def _rows(manifest: Manifest | None) -> tuple[int, ...]:
    """Give the rows of each source that the manifest lists; 0 where it could not be read."""
    listed = manifest.members if manifest else {}
    return tuple(listed[f"{s}.jsonl"].rows if f"{s}.jsonl" in listed else 0 for s in Source)


def _lost(manifest: Manifest | None) -> tuple[int, ...]:
    """Give the rows of each source that its sampler emitted and the manifest does not list."""
    lost = gates.lost_rows(manifest) if manifest else {}
    return tuple(lost.get(s, 0) for s in Source)


def _seconds(episode: Episode) -> tuple[float, ...]:
    """Sum the seconds of each phase."""
    sums: dict[Phase, int] = dict.fromkeys(PHASES, 0)
    for mark, following in zip(episode.marks, episode.marks[1:], strict=False):
        if mark.phase in sums:
            sums[mark.phase] += following.t_wall_ns - mark.t_wall_ns
    return tuple(round(sums[phase] / 1e9, 3) for phase in PHASES)
