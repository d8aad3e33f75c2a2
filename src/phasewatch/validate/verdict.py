"""What is said of one thing in the store: a row of the index, made from bytes without touching the world."""

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
from phasewatch.types import PHASES, BundleStatus, Phase, SourceKind
from phasewatch.validate import checks
from phasewatch.validate.readings import FieldNulls, count_nulls, drop_impossible

SKETCH_SIZE = 64
MIN_DISTINCT_SHARE = 0.5  # of a field's increments; one that repeats itself more tells no machine from another

HashArray = NDArray[np.uint64]

_PROC_FIELDS = [spec.field for spec in list_raw_fields(SourceKind.PROC)]
_CPU_TIME_COLUMNS = np.array(
    [_PROC_FIELDS.index(f) for f in ("vcpu_run_ns", "vcpu_wait_ns", "main_run_ns", "aux_run_ns")]
)
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def telemetry_sha256(episode: Episode) -> str:
    """Digest all rows of all sources without stamps and numbers: equal for a copy under another id."""
    digest = sha256()
    for source in SourceKind:
        readings = episode.rows.get(source)
        if readings is None:
            continue
        digest.update(f"{source}:{len(readings)}:{','.join(readings.fields)};".encode())
        for column in readings.columns:
            digest.update(np.ascontiguousarray(column).tobytes())
        digest.update(np.ascontiguousarray(readings.present).tobytes())
    return digest.hexdigest()


def proc_sketch(episode: Episode) -> tuple[int, ...]:
    """Return the 64 smallest digests of two successive increments of a CPU time of proc.

    Two episodes that share half of the smaller sketch are near-duplicates (a bottom-k sketch of Jaccard similarity;
    Broder 1997). Counters are totals since QEMU started: their rows differ altogether when a constant is added, their
    increments do not. Each CPU time is digested by itself, so that noise on one does not hide a copy. They are counted
    in nanoseconds, so that two machines hardly ever agree twice in a row; where they were not read, or are too regular,
    the increments of all fields together stand in.

    The digest mixes 64-bit words (splitmix64's finaliser), fast and not against an adversary.
    """
    readings = episode.rows.get(SourceKind.PROC)
    if readings is None or len(readings) < 3:
        return ()
    columns, present = readings.columns, readings.present
    mono = readings.t_mono_ns
    if (mono[1:] < mono[:-1]).any():  # rows in another order are the same rows
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
    found: list[int] = np.unique(np.concatenate(digests))[:SKETCH_SIZE].tolist()
    return tuple(found)


def _group_by_presence(present: NDArray[np.bool_]) -> Iterator[NDArray[np.intp]]:
    """Group the columns of ``(n, k)`` that are present in the same rows; mostly that is one group."""
    groups: dict[bytes, list[int]] = {}
    for i, read in enumerate(present.T):
        groups.setdefault(read.tobytes(), []).append(i)
    yield from (np.array(members) for members in groups.values())


def _digest_rows(columns: Sequence[NumericArray], present: NDArray[np.bool_]) -> HashArray:
    """Digest the increments of all fields that move, row by row, two at a time."""
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
    """Digest each step with the next one of its row, where both moved.

    Args:
        steps: ``(k, m)``.
        moved: ``(k, m)``.
        salts: ``(k,)``, one for each row.
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
    """Where a bundle lies, and what its receipt vouches for (None without one)."""

    path: str
    host_id: str | None
    episode_id: str | None
    receipt: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleVerdict:
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BundleCheck:
    """A verdict, and the episode and its grid where the bundle is usable.

    Attributes:
        findings: All that was found, worst first.
        nulls: How often each field of each source was null; empty where the bundle could not be read whole.
    """

    verdict: BundleVerdict
    episode: Episode | None
    binned: EpisodeBins | None
    findings: tuple[BundleFinding, ...] = ()
    nulls: Mapping[SourceKind, tuple[FieldNulls, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SweepResult:
    """One bundle's verdict with its grid where it is usable; what crosses from a worker."""

    verdict: BundleVerdict
    row: BinIndexRow | None
    bins: NDArray[np.float32] | None
    levels: NDArray[np.float32] | None
    seconds: float = 0.0


def validate_bundle(data: bytes, place: BundleLocation, *, counts_nulls: bool = False) -> BundleCheck:
    """Verify, decode, gate and grid one bundle, reading its bytes once; count the nulls of each field if asked to."""
    digest = sha256(data).hexdigest()
    findings: list[BundleFinding] = []
    if place.receipt is None:
        findings.append(checks.build_finding("no-receipt", "no receipt stands beside it", place=place.path))
    elif place.receipt == UNREADABLE_RECEIPT:
        words = "its receipt could not be read; mend the store's disk, permissions or network, and sweep again"
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
    findings += checks.check_identity(episode, host_id=place.host_id, episode_id=place.episode_id)
    rebased, clock_findings = rebase_episode(episode)
    findings += [*clock_findings, *checks.check_episode(rebased)]
    status = checks.compute_status(findings)
    grid = bin_rebased_episode(drop_impossible(rebased), clock_findings) if status in USABLE_STATUSES else None
    verdict = _build_verdict(rebased, digest, len(data), place, findings, flags=_combine_bin_flags(grid))
    nulls = count_nulls(rebased) if counts_nulls else {}
    return BundleCheck(
        verdict=verdict, episode=rebased if grid else None, binned=grid, findings=_sort_findings(findings), nulls=nulls
    )


def build_unreadable_verdict(place: BundleLocation, code: str, words: str, size: int) -> BundleVerdict:
    """Give the verdict on what could not even be read: a lost worker, a missing file."""
    spec = checks.describe_code(code)
    severity = spec.severity if spec else BundleStatus.ERRORED
    return _build_refused_verdict(
        b"", "", place, [BundleFinding(code=code, severity=severity, place=place.path, words=words)], size=size
    )


def _combine_bin_flags(grid: EpisodeBins | None) -> int:
    return int(grid.flags.max(initial=0)) if grid is not None else 0


def _sort_findings(findings: Sequence[BundleFinding]) -> tuple[BundleFinding, ...]:
    """Sort findings, the worst first; of equal ones the first found."""
    order = ["note", *map(str, BundleStatus)]
    return tuple(sorted(findings, key=lambda f: -order.index(str(f.severity))))


def _summarise_findings(path: str, findings: Sequence[BundleFinding]) -> tuple[BundleStatus, tuple[str, ...], str]:
    """Give status, codes (worst first, each once) and the worst finding's place and words."""
    ranked = _sort_findings(findings)
    codes = tuple(dict.fromkeys(f.code for f in ranked))
    place = ranked[0].place if ranked else ""
    whole = place if place.startswith(path) else f"{path}:{place}".rstrip(":")
    detail = escape_unprintable(f"{whole}: {ranked[0].words}") if ranked else ""
    return checks.compute_status(findings), codes, detail


def _build_refused_verdict(
    data: bytes, digest: str, place: BundleLocation, findings: Sequence[BundleFinding], size: int | None = None
) -> BundleVerdict:
    """Judge a bundle that could not be read whole, with what its manifest says where that is readable."""
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
        profile=manifest.profile if manifest else "", sample_name=manifest.sample_name if manifest else "",
        sample_kind=str(manifest.sample_kind) if manifest else "", origin=str(manifest.origin) if manifest else "",
        role=str(manifest.role) if manifest else "", session=manifest.session if manifest else "",
        plan_seed=manifest.plan_seed if manifest else 0, agent=manifest.agent if manifest else False,
        status=status, reasons=codes, detail=detail, sha256=digest, telemetry_sha256="", proc_sketch=(),
        bytes=len(data) if size is None else size,
        started_wall_ns=manifest.started_wall_ns if manifest else 0,
        duration_s=manifest.duration_s if manifest else 0.0,
        rows=_count_rows(manifest), lost=_count_lost_rows(manifest), seconds=(0.0,) * len(PHASES),
        vcpu_wait=math.nan, duplicate_of="", flags=0,
    )  # fmt: skip


def _build_verdict(
    episode: Episode, digest: str, size: int, place: BundleLocation, findings: Sequence[BundleFinding], *, flags: int
) -> BundleVerdict:
    manifest = episode.manifest
    status, codes, detail = _summarise_findings(place.path, findings)
    return BundleVerdict(
        path=place.path, episode_id=place.episode_id or manifest.episode_id, host_id=place.host_id or manifest.host.host_id,
        profile=manifest.profile, sample_name=manifest.sample_name, sample_kind=str(manifest.sample_kind),
        origin=str(manifest.origin), role=str(manifest.role), session=manifest.session, plan_seed=manifest.plan_seed,
        agent=manifest.agent, status=status, reasons=codes, detail=detail, sha256=digest,
        telemetry_sha256=telemetry_sha256(episode), proc_sketch=proc_sketch(episode), bytes=size,
        started_wall_ns=manifest.started_wall_ns, duration_s=manifest.duration_s,
        rows=_count_rows(manifest), lost=_count_lost_rows(manifest), seconds=_sum_phase_seconds(episode),
        vcpu_wait=checks.compute_vcpu_wait_cores(episode), duplicate_of="", flags=flags, neighbours=manifest.neighbours,
    )  # fmt: skip


def _count_rows(manifest: Manifest | None) -> tuple[int, ...]:
    """Give the rows of each source that the manifest lists; 0 where it could not be read."""
    listed = manifest.members if manifest else {}
    return tuple(listed[f"{s}.jsonl"].rows if f"{s}.jsonl" in listed else 0 for s in SourceKind)


def _count_lost_rows(manifest: Manifest | None) -> tuple[int, ...]:
    """Give the rows of each source that its sampler emitted and the manifest does not list."""
    lost = checks.count_lost_rows(manifest) if manifest else {}
    return tuple(lost.get(s, 0) for s in SourceKind)


def _sum_phase_seconds(episode: Episode) -> tuple[float, ...]:
    """Sum the seconds of each phase."""
    sums: dict[Phase, int] = dict.fromkeys(PHASES, 0)
    for mark, following in zip(episode.marks, episode.marks[1:], strict=False):
        if mark.phase in sums:
            sums[mark.phase] += following.t_wall_ns - mark.t_wall_ns
    return tuple(round(sums[phase] / 1e9, 3) for phase in PHASES)
