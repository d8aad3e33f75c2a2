"""Validate one bundle: from its bytes to a verdict, which is a row of the index, and to bins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import NumericArray
from phasewatch.binning.align import EpisodeBins, bin_rebased_episode
from phasewatch.binning.clocks import rebase_episode
from phasewatch.binning.storage import BinIndexRow
from phasewatch.bundle.archive import unpack_bundle, unpack_manifest
from phasewatch.bundle.model import Episode, Manifest
from phasewatch.bundle.problems import BundleFinding, find_severity
from phasewatch.channels import list_raw_fields
from phasewatch.errors import BundleError, escape_unprintable
from phasewatch.store.local import UNREADABLE_RECEIPT
from phasewatch.types import PHASES, BundleStatus, EpisodeOrigin, Phase, SourceKind
from phasewatch.validate import checks
from phasewatch.validate.readings import FieldNulls, count_nulls, drop_impossible

__all__ = [
    "SKETCH_SIZE",
    "USABLE_STATUSES",
    "BundleCheck",
    "BundleLocation",
    "BundleVerdict",
    "SweepResult",
    "build_unreadable_verdict",
    "proc_sketch",
    "telemetry_sha256",
    "validate_bundle",
]

SKETCH_SIZE = 64
MIN_DISTINCT_SHARE = 0.5  # of a field's increments; a more regular field does not distinguish machines

HashArray = NDArray[np.uint64]

_PROC_FIELDS = [spec.field for spec in list_raw_fields(SourceKind.PROC)]
_CPU_TIME_COLUMNS = np.array(
    [_PROC_FIELDS.index(f) for f in ("vcpu_run_ns", "vcpu_wait_ns", "main_run_ns", "aux_run_ns")]
)
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def telemetry_sha256(episode: Episode) -> str:
    """Return the SHA-256 of all readings without stamps and sequence numbers, equal for copies under other ids.

    It covers the fields that the recorder had, so that it does not change when a later version has more.
    """
    digest = sha256()
    for source in SourceKind:
        readings = episode.rows.get(source)
        if readings is None:
            continue
        declared = episode.manifest.fields.get(source, ())
        kept = [i for i, name in enumerate(readings.fields) if name in declared]
        digest.update(f"{source}:{len(readings)}:{','.join(readings.fields[i] for i in kept)};".encode())
        for i in kept:
            digest.update(np.ascontiguousarray(readings.columns[i]).tobytes())
        digest.update(np.ascontiguousarray(readings.present[:, kept]).tobytes())
    return digest.hexdigest()


def proc_sketch(episode: Episode) -> tuple[int, ...]:
    """Return a sketch of the CPU times of proc: the 64 smallest digests of two successive increments.

    Episodes that share half of the smaller sketch are near-duplicates (a bottom-k sketch of the Jaccard similarity;
    Broder 1997). Increments are digested because the counters are totals since the start of QEMU, and a copy may add a
    constant. Each CPU time is digested separately, so that noise on one does not hide a copy. The unit is ns, so two
    machines hardly ever agree twice in a row. If the CPU times were not read or are too regular, the increments of all
    fields are digested together.

    The digest is splitmix64's finaliser: fast, but not safe against an adversary.
    """
    readings = episode.rows.get(SourceKind.PROC)
    if readings is None or len(readings) < 3:
        return ()
    columns, present = readings.columns, readings.present
    mono = readings.t_mono_ns
    if (mono[1:] < mono[:-1]).any():  # reordered rows are the same rows
        order = np.lexsort((readings.seq, mono))
        columns, present = tuple(column[order] for column in columns), present[order]
    digests = []
    for fields in _group_by_presence(present[:, _CPU_TIME_COLUMNS]):
        places = _CPU_TIME_COLUMNS[fields]
        read = present[:, places[0]]
        values = np.array([columns[place] for place in places])
        steps = np.diff(values if read.all() else values[:, read])
        ranked = np.sort(steps)
        distinct = 1 + np.count_nonzero(ranked[:, 1:] != ranked[:, :-1], axis=1)
        varied = (distinct >= MIN_DISTINCT_SHARE * steps.shape[1]) & (steps.shape[1] > 1)
        digests.append(_digest_pairs(steps[varied].view(np.uint64), steps[varied] != 0, fields[varied] + 1))
    if not any(map(len, digests)):
        digests = [_digest_rows(columns, present)]
    sketch: list[int] = np.unique(np.concatenate(digests))[:SKETCH_SIZE].tolist()
    return tuple(sketch)


def _group_by_presence(present: NDArray[np.bool_]) -> Iterator[NDArray[np.intp]]:
    """Yield the columns of ``(n, k)`` bool that are equal, as arrays of indices; mostly there is one group."""
    groups: dict[bytes, list[int]] = {}
    for i, read in enumerate(present.T):
        groups.setdefault(read.tobytes(), []).append(i)
    yield from (np.array(members) for members in groups.values())


def _digest_rows(columns: Sequence[NumericArray], present: NDArray[np.bool_]) -> HashArray:
    """Return ``(m,)`` uint64 digests of two successive increments of all fields that change.

    Args:
        columns: One ``(n,)`` array per field.
        present: ``(n, fields)`` bool.
    """
    read = present.any(axis=1)
    kept = [column[read] for column in columns]
    moving = [column.view(np.uint64) for column in kept if len(column) > 2 and bool((column != column[0]).any())]
    if not moving:
        return np.empty(0, np.uint64)
    steps = np.array([np.diff(column) for column in moving])
    mixed: HashArray = np.zeros(steps.shape[1], np.uint64)
    for row in steps:
        mixed = _mix_splitmix64(mixed ^ row) + _GOLDEN_GAMMA
    return _digest_pairs(mixed[None, :], (steps != 0).any(axis=0)[None, :], np.zeros(1, np.intp))


def _digest_pairs(steps: HashArray, moved: NDArray[np.bool_], salts: NDArray[np.intp]) -> HashArray:
    """Return ``(d,)`` uint64 digests of each increment with the next one of its row, where both are not zero.

    Args:
        steps: ``(k, m)`` uint64 increments.
        moved: ``(k, m)`` bool, whether the increment is not zero.
        salts: ``(k,)``, one per row.
    """
    first = _mix_splitmix64(steps[:, :-1] ^ salts[:, None].astype(np.uint64)) + _GOLDEN_GAMMA
    found: HashArray = _mix_splitmix64(first ^ steps[:, 1:])[moved[:, 1:] & moved[:, :-1]]
    return found


def _mix_splitmix64(x: HashArray) -> HashArray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


USABLE_STATUSES = (BundleStatus.ACCEPTED, BundleStatus.DEGRADED)


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleLocation:
    """The place of a bundle in a store.

    Attributes:
        path: Path in the store, for messages and the index.
        host_id, episode_id: From the path; None if malformed.
        receipt: SHA-256 in its receipt; None without one. See `store.local` for malformed and unreadable ones.
    """

    path: str
    host_id: str | None
    episode_id: str | None
    receipt: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleVerdict:
    """One row of `validation_v1.parquet`; texts are empty and numbers 0 where the bundle could not be read.

    Attributes:
        reasons: Codes of the findings, worst first.
        detail: Place and text of the worst finding.
        rows, lost: By source in the order of `SourceKind`: rows in the bundle, and rows that did not arrive.
        seconds: Labelled time by phase in the order of `PHASES`.
        vcpu_wait: Mean time that the vCPUs waited for a core that other work used, in cores; NaN if unknown.
        duplicate_of: ``host_id/episode_id`` of the bundle with the same telemetry; empty without one.
        flags: All bin flags combined.
        background: Benign load that ran beside a malicious profile; empty without one, None if nothing recorded it.
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
    status: BundleStatus
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
    background: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BundleCheck:
    """The result of `validate_bundle`.

    Attributes:
        episode: The rebased episode; None if the bundle is not usable.
        binned: Its bins; None if the bundle is not usable.
        findings: All findings, worst first.
        nulls: Nulls by source and field, if they were requested and the bundle could be read.
    """

    verdict: BundleVerdict
    episode: Episode | None
    binned: EpisodeBins | None
    findings: tuple[BundleFinding, ...] = ()
    nulls: Mapping[SourceKind, tuple[FieldNulls, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SweepResult:
    """The result of a worker: a bundle's verdict, and its bins if it is usable.

    Attributes:
        row: Index row of the bins.
        bins: ``(n, 73)`` float32.
        levels: ``(n, 13)`` float32.
        seconds: Time that reading and checking took.
    """

    verdict: BundleVerdict
    row: BinIndexRow | None
    bins: NDArray[np.float32] | None
    levels: NDArray[np.float32] | None
    seconds: float = 0.0


def validate_bundle(data: bytes, place: BundleLocation, *, counts_nulls: bool = False) -> BundleCheck:
    """Decode, check and bin one bundle.

    Args:
        data: The bytes of the bundle.
        place: Its place in the store.
        counts_nulls: Count the nulls of each field, too.
    """
    digest = sha256(data).hexdigest()
    findings: list[BundleFinding] = []
    if place.receipt is None:
        findings.append(checks.build_finding("no-receipt", "there is no receipt", place=place.path))
    elif place.receipt == UNREADABLE_RECEIPT:
        words = "its receipt could not be read; check the store's disk, permissions or network, and validate again"
        findings.append(
            BundleFinding(code="bundle-unreadable", severity=BundleStatus.ERRORED, place=place.path, words=words)
        )
    elif place.receipt != digest:
        words = f"sha256 {digest[:12]}…, the receipt says {place.receipt[:12]}"
        findings.append(checks.build_finding("receipt", words, place=place.path))
    try:
        episode = unpack_bundle(data, file=place.path)
    except BundleError as error:
        severity = find_severity(error.code)
        findings.append(BundleFinding(code=error.code, severity=severity, place=error.place, words=error.words))
        return BundleCheck(
            verdict=_build_refused_verdict(data, digest, place, findings),
            episode=None,
            binned=None,
            findings=_sort_findings(findings),
        )
    findings += checks.find_identity_mismatch(episode, host_id=place.host_id, episode_id=place.episode_id)
    rebased, clock_findings = rebase_episode(episode)
    findings += [*clock_findings, *checks.find_episode_problems(rebased)]
    status = checks.compute_status(findings)
    binned = bin_rebased_episode(drop_impossible(rebased), clock_findings) if status in USABLE_STATUSES else None
    verdict = _build_verdict(rebased, digest, len(data), place, findings, flags=_combine_bin_flags(binned))
    nulls = count_nulls(rebased) if counts_nulls else {}
    return BundleCheck(
        verdict=verdict,
        episode=rebased if binned else None,
        binned=binned,
        findings=_sort_findings(findings),
        nulls=nulls,
    )


def build_unreadable_verdict(place: BundleLocation, code: str, words: str, size: int) -> BundleVerdict:
    """Return the verdict on a bundle that could not be read at all, such as a missing file or a lost worker."""
    spec = checks.describe_code(code)
    severity = spec.severity if spec else BundleStatus.ERRORED
    return _build_refused_verdict(
        b"", "", place, [BundleFinding(code=code, severity=severity, place=place.path, words=words)], size=size
    )


def _combine_bin_flags(binned: EpisodeBins | None) -> int:
    return int(binned.flags.max(initial=0)) if binned is not None else 0


def _sort_findings(findings: Sequence[BundleFinding]) -> tuple[BundleFinding, ...]:
    """Sort findings, the worst first; equal ones keep their order."""
    order = ["note", *map(str, BundleStatus)]
    return tuple(sorted(findings, key=lambda f: -order.index(str(f.severity))))


def _summarise_findings(path: str, findings: Sequence[BundleFinding]) -> tuple[BundleStatus, tuple[str, ...], str]:
    """Return the status, the codes (worst first, each once), and place and text of the worst finding."""
    ranked = _sort_findings(findings)
    codes = tuple(dict.fromkeys(f.code for f in ranked))
    place = ranked[0].place if ranked else ""
    whole = place if place.startswith(path) else f"{path}:{place}".rstrip(":")
    detail = escape_unprintable(f"{whole}: {ranked[0].words}") if ranked else ""
    return checks.compute_status(findings), codes, detail


def _build_refused_verdict(
    data: bytes, digest: str, place: BundleLocation, findings: Sequence[BundleFinding], size: int | None = None
) -> BundleVerdict:
    """Return the verdict on a bundle that could not be decoded, with the facts of its manifest if that is readable."""
    manifest: Manifest | None = None
    if data:
        try:
            manifest = unpack_manifest(data, file=place.path)
        except BundleError:
            manifest = None
    status, codes, detail = _summarise_findings(place.path, findings)
    return BundleVerdict(
        path=place.path,
        episode_id=place.episode_id or (manifest.episode_id if manifest else ""),
        host_id=place.host_id or (manifest.host.host_id if manifest else ""),
        profile=manifest.profile if manifest else "",
        sample_name=manifest.sample_name if manifest else "",
        sample_kind=str(manifest.sample_kind) if manifest else "",
        origin=str(manifest.origin) if manifest else "",
        role=str(manifest.role) if manifest else "",
        session=manifest.session if manifest else "",
        plan_seed=manifest.plan_seed if manifest else 0,
        agent=manifest.agent if manifest else False,
        status=status,
        reasons=codes,
        detail=detail,
        sha256=digest,
        telemetry_sha256="",
        proc_sketch=(),
        bytes=len(data) if size is None else size,
        started_wall_ns=manifest.started_wall_ns if manifest else 0,
        duration_s=manifest.duration_s if manifest else 0.0,
        rows=_count_rows(manifest),
        lost=_count_lost_rows(manifest),
        seconds=(0.0,) * len(PHASES),
        vcpu_wait=math.nan,
        duplicate_of="",
        flags=0,
    )


def _build_verdict(
    episode: Episode, digest: str, size: int, place: BundleLocation, findings: Sequence[BundleFinding], *, flags: int
) -> BundleVerdict:
    manifest = episode.manifest
    status, codes, detail = _summarise_findings(place.path, findings)
    return BundleVerdict(
        path=place.path,
        episode_id=place.episode_id or manifest.episode_id,
        host_id=place.host_id or manifest.host.host_id,
        profile=manifest.profile,
        sample_name=manifest.sample_name,
        sample_kind=str(manifest.sample_kind),
        origin=str(manifest.origin),
        role=str(manifest.role),
        session=manifest.session,
        plan_seed=manifest.plan_seed,
        agent=manifest.agent,
        status=status,
        reasons=codes,
        detail=detail,
        sha256=digest,
        telemetry_sha256=telemetry_sha256(episode),
        proc_sketch=proc_sketch(episode),
        bytes=size,
        started_wall_ns=manifest.started_wall_ns,
        duration_s=manifest.duration_s,
        rows=_count_rows(manifest),
        lost=_count_lost_rows(manifest),
        seconds=_sum_phase_seconds(episode),
        vcpu_wait=checks.compute_vcpu_wait_cores(episode),
        duplicate_of="",
        flags=flags,
        neighbours=manifest.neighbours,
        background=(
            None
            if manifest.recording is None or manifest.origin is EpisodeOrigin.IMPORTED
            else manifest.recording.background
        ),
    )


def _count_rows(manifest: Manifest | None) -> tuple[int, ...]:
    """Return the rows of each source that the manifest lists; 0 without a manifest."""
    listed = manifest.members if manifest else {}
    return tuple(listed[f"{s}.jsonl"].rows if f"{s}.jsonl" in listed else 0 for s in SourceKind)


def _count_lost_rows(manifest: Manifest | None) -> tuple[int, ...]:
    """Return the rows of each source that were emitted and are not listed; 0 without a manifest."""
    lost = checks.count_lost_rows(manifest) if manifest else {}
    return tuple(lost.get(s, 0) for s in SourceKind)


def _sum_phase_seconds(episode: Episode) -> tuple[float, ...]:
    """Return the labelled seconds of each phase, in the order of `PHASES`."""
    sums: dict[Phase, int] = dict.fromkeys(PHASES, 0)
    for mark, following in zip(episode.marks, episode.marks[1:], strict=False):
        if mark.phase in sums:
            sums[mark.phase] += following.t_wall_ns - mark.t_wall_ns
    return tuple(round(sums[phase] / 1e9, 3) for phase in PHASES)
