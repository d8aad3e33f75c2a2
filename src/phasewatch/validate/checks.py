"""Check an episode: pure functions from an episode to findings, and the table of all finding codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from phasewatch.arrays import IntArray
from phasewatch.bundle.contention import compute_quota_contention
from phasewatch.bundle.model import Episode, Manifest
from phasewatch.bundle.problems import FINDING_CODES, BundleFinding, CheckIssue, FindingSpec, Severity
from phasewatch.types import HOST_SOURCES, MAX_WAIT_CORES, STALE_NS, BundleStatus, EpisodeOrigin, SourceKind
from phasewatch.validate import contradictions, readings
from phasewatch.validate.contradictions import compute_mean_cores
from phasewatch.validate.readings import compute_expected_hz, compute_max_emitted

__all__ = [
    "CHECK_CODES",
    "build_finding",
    "compute_status",
    "compute_vcpu_wait_cores",
    "count_lost_rows",
    "describe_code",
    "find_episode_problems",
    "find_identity_mismatch",
    "list_codes",
]

_PROC_FILE = f"{SourceKind.PROC}.jsonl"
MIN_ROW_SHARE = 0.9  # of the expected rows; below it the episode is degraded
MISSING_ROW_SHARE = 0.5  # below it the source counts as missing
MISSING_SILENCE_NS = 10_000_000_000
MIN_RUN_WITHOUT_WAIT_S = 1.0  # of vCPU time without any waiting; with more, the kernel does not count waiting

_CODE_TABLE: tuple[tuple[str, Severity, str], ...] = (
    ("worker-lost", BundleStatus.ERRORED, "The process that read the bundle died or hung, twice."),
    ("receipt", BundleStatus.REJECTED, "The bundle's digest differs from its receipt, or the receipt is malformed."),
    (
        "identity",
        BundleStatus.REJECTED,
        "The manifest names another host or episode than the bundle's path in the store.",
    ),
    (
        "rows",
        BundleStatus.REJECTED,
        "The source proc has no readings, or fewer than half of the expected rows. An imported episode may lack it.",
    ),
    ("duplicate", BundleStatus.REJECTED, "Another bundle, kept or accepted earlier, holds the same telemetry."),
    (
        "contested",
        BundleStatus.REJECTED,
        "The same telemetry is stored under another host or with other labels. The bundle that was accepted "
        "earlier is kept; if none was, all are rejected.",
    ),
    ("nulls-proc", BundleStatus.REJECTED, "More than half of the readings of proc are null."),
    (
        "kind-phases",
        BundleStatus.REJECTED,
        "The profile or sample kind is benign, but the labels name a malicious phase.",
    ),
    (
        "role-phases",
        BundleStatus.REJECTED,
        "The role is commission or soak, which are benign, but the labels name a malicious phase.",
    ),
    (
        "labelling",
        BundleStatus.REJECTED,
        "The labels are not those that a person gave, as the manifest lists them with who, when and why.",
    ),
    (
        "origin",
        BundleStatus.REJECTED,
        "The origin and the recording contradict each other: the recording is null exactly if the episode is "
        "simulated.",
    ),
    ("started", BundleStatus.REJECTED, "The episode's start, the time in its id and its labels are too far apart."),
    (
        "label-clock",
        BundleStatus.REJECTED,
        "The labels' two clocks contradict each other or those of the rows of proc.",
    ),
    (
        "row-clock",
        BundleStatus.REJECTED,
        "A source's two clocks contradict those of proc or run at different rates, so its rows may be beside "
        "the wrong labels.",
    ),
    (
        "emitted",
        BundleStatus.REJECTED,
        "The manifest claims more emitted rows than the sampling rate allows for the duration.",
    ),
    ("no-receipt", BundleStatus.DEGRADED, "The bundle has no receipt."),
    ("loss", BundleStatus.DEGRADED, "Fewer rows arrived than the sampler emitted."),
    ("silence", BundleStatus.DEGRADED, "The source has no readings for more than 2.5 s."),
    ("rate", BundleStatus.DEGRADED, "The source has fewer than 90 % of the expected rows."),
    (
        "missing",
        BundleStatus.DEGRADED,
        "The source has no readings (no rows, or only nulls), none for more than 10 s, or fewer than half of "
        "the expected rows.",
    ),
    (
        "nulls",
        BundleStatus.DEGRADED,
        "A field of the source is null for more than 2.5 s, or in more than a tenth of its readings.",
    ),
    (
        "channels",
        BundleStatus.DEGRADED,
        "The listed and the actual channels of the source differ: one was never read, is unknown, or is "
        "listed as absent.",
    ),
    (
        "nominal-hz",
        BundleStatus.DEGRADED,
        "The source's nominal rate is far below that of its rows, which would hide losses.",
    ),
    (
        "sequence",
        BundleStatus.DEGRADED,
        "The rows' sequence numbers or monotonic stamps are negative, repeat or contradict each other.",
    ),
    ("stray", BundleStatus.DEGRADED, "Rows are stamped more than a minute outside the labels."),
    ("reset", BundleStatus.DEGRADED, "A counter fell; the bins across the fall are unknown."),
    ("range", BundleStatus.DEGRADED, "A reading or an increase is outside the possible range; it is left out."),
    (
        "kind",
        BundleStatus.DEGRADED,
        "Profile and sample kind contradict each other: the kind is benign exactly if the profile is `benign`.",
    ),
    ("plan", BundleStatus.DEGRADED, "The labels name other phases than the plan, or in another order."),
    ("host-facts", BundleStatus.DEGRADED, "The rows contradict the manifest's description of the machine."),
    (
        "clock-base-repaired",
        BundleStatus.DEGRADED,
        "The stamps were in another clock than the manifest says, and were rebased.",
    ),
    (
        "clock-base",
        BundleStatus.DEGRADED,
        "The stamps are in an unknown clock. The source counts as missing; without proc the bundle is rejected.",
    ),
    (
        "clock-step",
        BundleStatus.DEGRADED,
        "Wall and monotonic clock moved apart by more than 250 ms; the windows across the step are flagged.",
    ),
    (
        "contention",
        BundleStatus.DEGRADED,
        "Other work kept the vCPUs waiting for a core for more than a tenth of the time.",
    ),
    (
        "contention-unknown",
        "note",
        "It is unknown whether the vCPUs waited for a core: the waiting time was not read, or never changes.",
    ),
    ("channels-unlisted", "note", "A channel was read that the manifest lists as absent."),
    ("constant", "note", "No field of the source changes; an idle network card reads zero."),
    ("constant-proc", BundleStatus.DEGRADED, "No field of proc changes, which is impossible for a running machine."),
)

CHECK_CODES: dict[str, FindingSpec] = {
    code: FindingSpec(code=code, severity=how, about=why) for code, how, why in _CODE_TABLE
}


def describe_code(code: str) -> FindingSpec | None:
    """Return the meaning of a code, or None for an unknown one; a source after a colon is ignored."""
    bare = code.partition(":")[0]
    return CHECK_CODES.get(bare) or FINDING_CODES.get(bare)


def list_codes() -> tuple[str, ...]:
    """Return every code that a verdict can hold, those of the checks first."""
    return (*CHECK_CODES, *FINDING_CODES)


def compute_status(findings: Iterable[BundleFinding]) -> BundleStatus:
    """Return the status of a bundle with these findings: the worst severity; notes do not count."""
    order = list(BundleStatus)
    return max(
        (BundleStatus(f.severity) for f in findings if f.severity != "note"),
        key=order.index,
        default=BundleStatus.ACCEPTED,
    )


def build_finding(code: str, words: str, *, source: SourceKind | None = None, place: str = "") -> BundleFinding:
    """Return a finding with the severity of its code.

    Args:
        code: A key of `CHECK_CODES`.
        words: What was found and what was expected.
        source: The source whose rows it is about; appended to the code.
        place: The member; by default that of the source.
    """
    return BundleFinding(
        code=f"{code}:{source}" if source else code,
        severity=CHECK_CODES[code].severity,
        place=place or (f"{source}.jsonl" if source else ""),
        words=words,
    )


def find_episode_problems(episode: Episode) -> tuple[BundleFinding, ...]:
    """Run all checks on an episode with rebased clocks; impossible readings count as null."""
    possible = readings.drop_impossible(episode)
    issues = [] if possible is episode else contradictions.find_out_of_range(episode)
    issues += [issue for check in ISSUE_CHECKS for issue in check(possible)]
    findings = (finding for check in FINDING_CHECKS for finding in check(possible))
    return (*findings, *map(_build_finding_from_issue, issues))


def _build_finding_from_issue(issue: CheckIssue) -> BundleFinding:
    return build_finding(issue.code, issue.words, source=issue.source, place=issue.place)


def find_identity_mismatch(
    episode: Episode, *, host_id: str | None, episode_id: str | None
) -> tuple[BundleFinding, ...]:
    """Compare the ids in the manifest with those of the bundle's path in the store."""
    claimed = f"{episode.manifest.host.host_id}/{episode.manifest.episode_id}"
    stored = f"{host_id or '?'}/{episode_id or '?'}"
    if claimed == stored:
        return ()
    return (build_finding("identity", f"the manifest names {claimed}, the path {stored}"),)


def _compute_longest_silence_ns(episode: Episode, wall: IntArray) -> int:
    """Return the longest time without a reading between the first and the last label, in ns.

    Args:
        episode: The episode.
        wall: ``(n,)`` int64 wall stamps of the readings in ns, in any order.
    """
    wall = np.sort(wall)
    inside = wall[(wall > episode.t0_ns) & (wall < episode.t_end_ns)]
    edges = np.concatenate(([episode.t0_ns], inside, [episode.t_end_ns]))
    return int(np.diff(edges).max())


def _list_expected_sources(episode: Episode) -> tuple[SourceKind, ...]:
    """Return the sources that an episode must have: those of the host, and the guest if its agent was on.

    An imported episode must have those that it lists, and at least one.
    """
    if episode.manifest.origin is EpisodeOrigin.IMPORTED:
        return tuple(episode.manifest.nominal_hz) or HOST_SOURCES
    return (*HOST_SOURCES, SourceKind.GUEST) if episode.manifest.agent else HOST_SOURCES


def _find_source_problems(episode: Episode) -> list[BundleFinding]:
    """Find missing sources, low rates and long gaps; without proc the bundle is rejected.

    A row whose fields are all null is no reading, so a source with only such rows is missing.
    """
    found = []
    for source in _list_expected_sources(episode):
        code = "rows" if source is SourceKind.PROC else "missing"
        given = episode.rows.get(source)
        if given is None or len(given) == 0:
            found.append(build_finding(code, "there are no rows", source=source))
            continue
        read = readings.find_read_rows(given)
        wall = given.t_wall_ns if read.all() else given.t_wall_ns[read]
        if not len(wall):
            found.append(build_finding(code, f"{len(given)} rows, and every field of each is null", source=source))
            continue
        rows = int(((wall >= episode.t0_ns) & (wall <= episode.t_end_ns)).sum())
        due = compute_expected_hz(episode.manifest, source) * (episode.t_end_ns - episode.t0_ns) / 1e9
        empty = len(given) - len(wall)
        words = f"{rows} rows, {due:.0f} were due" + (f"; {empty} rows are null throughout" if empty else "")
        silence_ns = _compute_longest_silence_ns(episode, wall)
        if rows + 1 < MISSING_ROW_SHARE * due:
            found.append(build_finding(code, words, source=source))
        elif silence_ns > MISSING_SILENCE_NS and source is not SourceKind.PROC:
            found.append(build_finding(code, f"silent for {silence_ns / 1e9:.1f} s", source=source))
        else:
            if silence_ns > STALE_NS:
                found.append(build_finding("silence", f"silent for {silence_ns / 1e9:.1f} s", source=source))
            if rows < MIN_ROW_SHARE * due:
                found.append(build_finding("rate", words, source=source))
    return found


def _find_lost_rows(episode: Episode) -> list[BundleFinding]:
    """Find sources with fewer rows than the sampler emitted."""
    found, lost = [], count_lost_rows(episode.manifest)
    for source, emitted in episode.manifest.rows_emitted.items():
        rows = lost.get(source, 0)
        if rows > 0:
            found.append(build_finding("loss", f"{rows} of {emitted} rows never arrived", source=source))
    return found


def count_lost_rows(manifest: Manifest) -> Mapping[SourceKind, int]:
    """Return, by source, how many rows were emitted and are not in the bundle; impossible counts are capped."""
    listed = manifest.members
    return {
        source: max(
            0,
            min(emitted, compute_max_emitted(manifest, source))
            - (listed[f"{source}.jsonl"].rows if f"{source}.jsonl" in listed else 0),
        )
        for source, emitted in manifest.rows_emitted.items()
    }


def compute_vcpu_wait_cores(episode: Episode) -> float:
    """Return the mean time that the vCPU threads waited for a core, in cores; NaN without two readings.

    Under a CPU quota, waiting counts only as far as other work can have caused it (`bundle.contention`).
    """
    fields = ("vcpu_wait_ns", "vcpu_run_ns", "main_run_ns", "aux_run_ns")
    recording, proc = episode.manifest.recording, episode.rows.get(SourceKind.PROC)
    quota = (recording.shape or {}).get("quota_cores") if recording is not None else None
    if recording is None or recording.throttled_s is None or not isinstance(quota, float) or quota <= 0:
        return compute_mean_cores(episode, "vcpu_wait_ns")
    if proc is None or not set(fields) <= set(proc.fields):
        return compute_mean_cores(episode, "vcpu_wait_ns")
    places = [proc.fields.index(field) for field in fields]
    inside = (proc.t_wall_ns >= episode.t0_ns) & (proc.t_wall_ns <= episode.t_end_ns)
    inside &= proc.present[:, places].all(axis=1)
    order = np.flatnonzero(inside)[np.argsort(proc.t_mono_ns[inside], kind="stable")]
    wait_ns, *used_ns = (proc.columns[place][order].astype(np.float64) for place in places)
    return compute_quota_contention(
        proc.t_mono_ns[order].astype(np.float64),
        wait_ns,
        np.sum(used_ns, axis=0),
        quota_cores=quota,
        throttled_s=recording.throttled_s,
    )


def _find_contention(episode: Episode) -> list[BundleFinding]:
    """Find contention: vCPUs that waited for a core, which lowers every rate."""
    wait = compute_vcpu_wait_cores(episode)
    if wait > MAX_WAIT_CORES:
        return [build_finding("contention", f"vCPUs waited for {wait:.2f} cores")]
    if np.isnan(wait):
        return [build_finding("contention-unknown", "vcpu_wait_ns was not read twice", place=_PROC_FILE)]
    ran = compute_mean_cores(episode, "vcpu_run_ns") * (episode.t_end_ns - episode.t0_ns) / 1e9
    if (
        compute_mean_cores(episode, "vcpu_wait_ns") == 0 and ran > MIN_RUN_WITHOUT_WAIT_S
    ):  # a kernel that does not count waiting reports 0
        words = f"vcpu_wait_ns does not change while the vCPUs run for {ran:.1f} s"
        return [build_finding("contention-unknown", words, place=_PROC_FILE)]
    return []


def _find_constant_sources(episode: Episode) -> list[BundleFinding]:
    """Find sources whose readings never change."""
    found = []
    for source, given in episode.rows.items():
        if len(given) < 2 or not given.present.any():
            continue
        if all(bool((column == column[0]).all()) for column in given.columns):
            code = "constant-proc" if source is SourceKind.PROC else "constant"
            found.append(build_finding(code, f"{len(given)} rows, all equal", source=source))
    return found


FINDING_CHECKS: tuple[Callable[[Episode], list[BundleFinding]], ...] = (
    _find_source_problems,
    _find_lost_rows,
    _find_contention,
    _find_constant_sources,
)

# Checks in other modules; they return issues, whose severity is in the table above.
ISSUE_CHECKS: tuple[Callable[[Episode], list[CheckIssue]], ...] = (
    readings.find_excess_nulls,
    *contradictions.CONTRADICTION_CHECKS,
)
