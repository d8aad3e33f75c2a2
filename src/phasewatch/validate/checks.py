"""The gates: small pure functions from an episode to findings, and the table that explains every code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from phasewatch.arrays import IntArray
from phasewatch.bundle.model import Episode, Manifest
from phasewatch.bundle.problems import FINDING_CODES, BundleFinding, CheckIssue, FindingSpec, Severity
from phasewatch.types import HOST_SOURCES, MAX_WAIT_CORES, STALE_NS, BundleStatus, SourceKind
from phasewatch.validate import contradictions, readings
from phasewatch.validate.contradictions import compute_mean_cores
from phasewatch.validate.readings import compute_expected_hz, compute_max_emitted

MIN_ROW_SHARE = 0.9  # of the nominal rows; below it the episode is degraded
MISSING_ROW_SHARE = 0.5  # below it the source counts as missing
MISSING_SILENCE_NS = 10_000_000_000
MIN_RUN_WITHOUT_WAIT_S = 1.0  # of vCPU time without a nanosecond of waiting: nobody counts it

_CODE_TABLE: tuple[tuple[str, Severity, str], ...] = (
    ("worker-lost", BundleStatus.ERRORED, "The process that read the bundle died or hung, twice."),
    ("receipt", BundleStatus.REJECTED, "The bundle's bytes are not those that its receipt vouches for, or the receipt is malformed."),
    ("identity", BundleStatus.REJECTED, "The manifest names another host or episode than the bundle's place in the store."),
    ("rows", BundleStatus.REJECTED, "The source without which nothing can be said has no readings, or fewer than half of its rows."),
    ("duplicate", BundleStatus.REJECTED, "Another bundle, kept or accepted before, holds the same telemetry, row for row."),
    ("contested", BundleStatus.REJECTED, "The same telemetry stands under another host or other labels; unless one was accepted before, nobody can tell which is true."),
    ("nulls-proc", BundleStatus.REJECTED, "More than half of the readings of proc are null: there are rows, and hardly a measurement."),
    ("kind-phases", BundleStatus.REJECTED, "The profile or sample kind is benign, and the labels name a malicious phase."),
    ("role-phases", BundleStatus.REJECTED, "The role is commission or soak, which are benign, and the labels name a malicious phase."),
    ("origin", BundleStatus.REJECTED, "The origin and the recording contradict each other: a recording is null if and only if the episode is simulated."),
    ("started", BundleStatus.REJECTED, "The episode's start, its id and its labels are of different times."),
    ("label-clock", BundleStatus.REJECTED, "The labels' two clocks do not fit each other, or not those of the rows of proc."),
    ("row-clock", BundleStatus.REJECTED, "A source's two clocks do not fit those of proc, or run at another rate; its rows may lie beside the wrong labels."),
    ("emitted", BundleStatus.REJECTED, "The manifest says that the sampler emitted more rows than its rate could give in the time."),
    ("no-receipt", BundleStatus.DEGRADED, "Nothing vouches for the bundle's bytes."),
    ("loss", BundleStatus.DEGRADED, "Fewer rows arrived than the sampler emitted."),
    ("silence", BundleStatus.DEGRADED, "The source says nothing for more than 2.5 s."),
    ("rate", BundleStatus.DEGRADED, "Fewer than 90 % of the rows that the nominal rate promises."),
    ("missing", BundleStatus.DEGRADED, "The source has no readings (no rows, or only nulls), is silent for more than 10 s, or gives fewer than half of its rows."),
    ("nulls", BundleStatus.DEGRADED, "A field of the source is null for more than 2.5 s, or in more than a tenth of its readings."),
    ("channels", BundleStatus.DEGRADED, "What the source says that it gives and what it gives are different: a channel that was never read, is unknown, or is listed as absent."),
    ("nominal-hz", BundleStatus.DEGRADED, "The source promises a rate far below the one at which its rows come, which would hide losses."),
    ("sequence", BundleStatus.DEGRADED, "The rows' numbers or monotonic stamps are negative, repeat or run against each other."),
    ("stray", BundleStatus.DEGRADED, "Rows are stamped more than a minute outside the labels."),
    ("reset", BundleStatus.DEGRADED, "A counter fell; the bins across the fall are unknown."),
    ("range", BundleStatus.DEGRADED, "A reading or an increment is outside what can be; it is left out."),
    ("kind", BundleStatus.DEGRADED, "Profile and sample kind contradict each other: exactly the profile `benign` is of kind benign."),
    ("plan", BundleStatus.DEGRADED, "The labels name other phases than the plan, or in another order."),
    ("host-facts", BundleStatus.DEGRADED, "The rows contradict what the manifest says of the machine."),
    ("clock-base-repaired", BundleStatus.DEGRADED, "The stamps were in another clock than the manifest says, and were re-based."),
    ("clock-base", BundleStatus.DEGRADED, "The stamps are in an unknown clock; the source counts as missing, and without proc the bundle is rejected."),
    ("clock-step", BundleStatus.DEGRADED, "Wall and monotonic clock parted by more than 250 ms; the windows across it are flagged."),
    ("contention", BundleStatus.DEGRADED, "The vCPUs waited for a core for more than a tenth of the time."),
    ("contention-unknown", "note", "Whether the vCPUs waited for a core is unknown: their waiting time was not read, or never moves."),
    ("channels-unlisted", "note", "A channel was read that the manifest lists as absent."),
    ("constant", "note", "No field of the source changes; an idle network card is zero and innocent."),
    ("constant-proc", BundleStatus.DEGRADED, "No field of proc changes, which a running machine cannot do."),
)  # fmt: skip

CHECK_CODES: dict[str, FindingSpec] = {
    code: FindingSpec(code=code, severity=how, about=why) for code, how, why in _CODE_TABLE
}


def describe_code(code: str) -> FindingSpec | None:
    """Give what a code means; what stands behind a colon is its source. None for an unknown one."""
    bare = code.partition(":")[0]
    return CHECK_CODES.get(bare) or FINDING_CODES.get(bare)


def list_codes() -> tuple[str, ...]:
    """Give every code that a verdict can carry, gates first."""
    return (*CHECK_CODES, *FINDING_CODES)


def compute_status(findings: Iterable[BundleFinding]) -> BundleStatus:
    """Give the status that the findings make of a bundle: the worst wins, notes change nothing."""
    order = list(BundleStatus)
    return max(
        (BundleStatus(f.severity) for f in findings if f.severity != "note"),
        key=order.index,
        default=BundleStatus.ACCEPTED,
    )


def build_finding(code: str, words: str, *, source: SourceKind | None = None, place: str = "") -> BundleFinding:
    """Make a finding of a gate's code, with the table's severity."""
    full = f"{code}:{source}" if source else code
    return BundleFinding(code=full, severity=CHECK_CODES[code].severity, place=place or (f"{source}.jsonl" if source else ""), words=words)  # fmt: skip


def check_episode(episode: Episode) -> tuple[BundleFinding, ...]:
    """Run all gates on an episode whose clocks are put right; readings that cannot be count as null."""
    possible = readings.drop_impossible(episode)
    remarks = [] if possible is episode else contradictions.check_range(episode)
    remarks += [each for look in ISSUE_CHECKS for each in look(possible)]
    return (*(each for gate in FINDING_CHECKS for each in gate(possible)), *map(_build_finding_from_issue, remarks))


def _build_finding_from_issue(remark: CheckIssue) -> BundleFinding:
    return build_finding(remark.code, remark.words, source=remark.source, place=remark.place)


def check_identity(episode: Episode, *, host_id: str | None, episode_id: str | None) -> tuple[BundleFinding, ...]:
    """Hold the manifest's ids against the bundle's place in the store."""
    told = f"{episode.manifest.host.host_id}/{episode.manifest.episode_id}"
    stood = f"{host_id or '?'}/{episode_id or '?'}"
    return () if told == stood else (build_finding("identity", f"the manifest says {told}, the place {stood}"),)


def _compute_longest_silence_ns(episode: Episode, wall: IntArray) -> int:
    """Measure the longest stretch between label start and end without a reading."""
    wall = np.sort(wall)
    inside = wall[(wall > episode.t0_ns) & (wall < episode.t_end_ns)]
    edges = np.concatenate(([episode.t0_ns], inside, [episode.t_end_ns]))
    return int(np.diff(edges).max())


def _list_expected_sources(episode: Episode) -> tuple[SourceKind, ...]:
    """Give the sources that the episode owes: the host's, and the guest's where its agent was on."""
    return (*HOST_SOURCES, SourceKind.GUEST) if episode.manifest.agent else HOST_SOURCES


def _check_sources(episode: Episode) -> list[BundleFinding]:
    """Hold each source's rate and longest silence against its promise; without proc nothing can be said.

    A row whose every field is null is no reading: a source of such rows is missing, however many there are.
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


def _check_loss(episode: Episode) -> list[BundleFinding]:
    """Compare the rows that arrived with those that the sampler emitted."""
    found, lost = [], count_lost_rows(episode.manifest)
    for source, emitted in episode.manifest.rows_emitted.items():
        rows = lost.get(source, 0)
        if rows > 0:
            found.append(build_finding("loss", f"{rows} of {emitted} rows never arrived", source=source))
    return found


def count_lost_rows(manifest: Manifest) -> Mapping[SourceKind, int]:
    """Count, per source, the rows that were emitted and are not in the bundle; what cannot have been emitted is none."""
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
    """Return the mean share of a core for which vCPU threads waited during the labels; NaN without two readings."""
    return compute_mean_cores(episode, "vcpu_wait_ns")


def _check_contention(episode: Episode) -> list[BundleFinding]:
    """See whether the vCPUs had to wait for a core, which holds every rate down."""
    wait = compute_vcpu_wait_cores(episode)
    if wait > MAX_WAIT_CORES:
        return [build_finding("contention", f"vCPUs waited for {wait:.2f} cores")]
    if np.isnan(wait):
        return [build_finding("contention-unknown", "vcpu_wait_ns was not read twice", place="proc.jsonl")]
    ran = compute_mean_cores(episode, "vcpu_run_ns") * (episode.t_end_ns - episode.t0_ns) / 1e9
    if wait == 0 and ran > MIN_RUN_WITHOUT_WAIT_S:  # a kernel that does not account for waiting says 0 for ever
        words = f"vcpu_wait_ns stands still while the vCPUs ran for {ran:.1f} s"
        return [build_finding("contention-unknown", words, place="proc.jsonl")]
    return []


def _check_constant(episode: Episode) -> list[BundleFinding]:
    """Find sources of which no field that was read ever changes."""
    found = []
    for source, given in episode.rows.items():
        if len(given) < 2 or not given.present.any():
            continue
        if all(bool((column == column[0]).all()) for column in given.columns):
            code = "constant-proc" if source is SourceKind.PROC else "constant"
            found.append(build_finding(code, f"{len(given)} rows, all alike", source=source))
    return found


FINDING_CHECKS: tuple[Callable[[Episode], list[BundleFinding]], ...] = (
    _check_sources,
    _check_loss,
    _check_contention,
    _check_constant,
)

# Checks in modules of their own: they remark, and the table above says how severe that is.
ISSUE_CHECKS: tuple[Callable[[Episode], list[CheckIssue]], ...] = (
    readings.check_nulls,
    *contradictions.CONTRADICTION_CHECKS,
)
