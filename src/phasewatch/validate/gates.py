"""The gates: small pure functions from an episode to findings, and the table that explains every code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from phasewatch.episode.findings import CODES, CodeSpec, Finding, Severity
from phasewatch.episode.model import Episode, Manifest, SourceRows
from phasewatch.vocab import STALE_NS, Source, Status

HOST_SOURCES = (Source.PROC, Source.QMP, Source.NETFLOW)
MIN_RATE = 0.9  # of the nominal rows; below it the episode is degraded
MISSING_RATE = 0.5  # below it the source counts as missing
MISSING_SILENCE_NS = 10_000_000_000
MAX_WAIT_CORES = 0.10  # of vCPU threads waiting for a core; measured: above it every rate is held down

_ABOUT: tuple[tuple[str, Severity, str], ...] = (
    ("worker-lost", Status.ERRORED, "The process that read the bundle died or hung, twice."),
    ("receipt", Status.REJECTED, "The bundle's bytes are not those that its receipt vouches for, or the receipt is malformed."),
    ("identity", Status.REJECTED, "The manifest names another host or episode than the bundle's place in the store."),
    ("rows", Status.REJECTED, "The source without which nothing can be said has no rows, or fewer than half of its nominal rate."),
    ("duplicate", Status.REJECTED, "An earlier bundle holds the same telemetry, row for row."),
    ("no-receipt", Status.DEGRADED, "Nothing vouches for the bundle's bytes."),
    ("loss", Status.DEGRADED, "Fewer rows arrived than the sampler emitted."),
    ("silence", Status.DEGRADED, "The source says nothing for more than 2.5 s."),
    ("rate", Status.DEGRADED, "Fewer than 90 % of the rows that the nominal rate promises."),
    ("missing", Status.DEGRADED, "The source has no rows, is silent for more than 10 s, or gives fewer than half of its rows."),
    ("clock-base-repaired", Status.DEGRADED, "The stamps were in another clock than the manifest says, and were re-based."),
    ("clock-base", Status.DEGRADED, "The stamps are in an unknown clock; the source counts as missing, and without proc the bundle is rejected."),
    ("clock-step", Status.DEGRADED, "Wall and monotonic clock parted by more than 250 ms; the windows across it are flagged."),
    ("contention", Status.DEGRADED, "The vCPUs waited for a core for more than a tenth of the time."),
    ("constant", "note", "No field of the source changes; an idle network card is zero and innocent."),
    ("constant-proc", Status.DEGRADED, "No field of proc changes, which a running machine cannot do."),
)  # fmt: skip

GATES: dict[str, CodeSpec] = {code: CodeSpec(code=code, severity=how, about=why) for code, how, why in _ABOUT}


def explain(code: str) -> CodeSpec | None:
    """Give what a code means; what stands behind a colon is its source. None for an unknown one."""
    bare = code.partition(":")[0]
    return GATES.get(bare) or CODES.get(bare)


def known_codes() -> tuple[str, ...]:
    """Give every code that a verdict can carry, gates first."""
    return (*GATES, *CODES)


def worst(findings: Iterable[Finding]) -> Status:
    """Give the status that the findings make of a bundle: the worst wins, notes change nothing."""
    order = list(Status)
    return max((Status(f.severity) for f in findings if f.severity != "note"), key=order.index, default=Status.ACCEPTED)


def finding(code: str, words: str, *, source: Source | None = None, place: str = "") -> Finding:
    """Make a finding of a gate's code, with the table's severity."""
    full = f"{code}:{source}" if source else code
    return Finding(code=full, severity=GATES[code].severity, place=place or (f"{source}.jsonl" if source else ""), words=words)  # fmt: skip


def check(episode: Episode) -> tuple[Finding, ...]:
    """Run all gates on an episode whose clocks are put right."""
    return tuple(found for gate in EPISODE_GATES for found in gate(episode))


def check_place(episode: Episode, *, host_id: str | None, episode_id: str | None) -> tuple[Finding, ...]:
    """Hold the manifest's ids against the bundle's place in the store."""
    told = f"{episode.manifest.host.host_id}/{episode.manifest.episode_id}"
    stood = f"{host_id or '?'}/{episode_id or '?'}"
    return () if told == stood else (finding("identity", f"the manifest says {told}, the place {stood}"),)


def _labelled_rows(episode: Episode, readings: SourceRows) -> int:
    """Count the rows between the first label and the end."""
    wall = readings.t_wall_ns
    return int(((wall >= episode.t0_ns) & (wall <= episode.t_end_ns)).sum())


def _longest_silence_ns(episode: Episode, readings: SourceRows) -> int:
    """Measure the longest stretch between label start and end without a row."""
    wall = np.sort(readings.t_wall_ns)
    inside = wall[(wall > episode.t0_ns) & (wall < episode.t_end_ns)]
    edges = np.concatenate(([episode.t0_ns], inside, [episode.t_end_ns]))
    return int(np.diff(edges).max())


def _nominal_rows(episode: Episode, source: Source) -> float:
    return episode.manifest.nominal_hz.get(source, 0.0) * (episode.t_end_ns - episode.t0_ns) / 1e9


def _sources(episode: Episode) -> tuple[Source, ...]:
    """Give the sources that the episode owes: the host's, and the guest's where its agent was on."""
    return (*HOST_SOURCES, Source.GUEST) if episode.manifest.agent else HOST_SOURCES


def check_sources(episode: Episode) -> list[Finding]:
    """Hold each source's rate and longest silence against its promise; without proc nothing can be said."""
    found = []
    for source in _sources(episode):
        code = "rows" if source is Source.PROC else "missing"
        readings = episode.rows.get(source)
        if readings is None or len(readings) == 0:
            found.append(finding(code, "there are no rows", source=source))
            continue
        rows, nominal = _labelled_rows(episode, readings), _nominal_rows(episode, source)
        silence_ns = _longest_silence_ns(episode, readings)
        if nominal and rows < MISSING_RATE * nominal:
            found.append(finding(code, f"{rows} rows, {nominal:.0f} were due", source=source))
        elif silence_ns > MISSING_SILENCE_NS and source is not Source.PROC:
            found.append(finding(code, f"silent for {silence_ns / 1e9:.1f} s", source=source))
        else:
            if silence_ns > STALE_NS:
                found.append(finding("silence", f"silent for {silence_ns / 1e9:.1f} s", source=source))
            if nominal and rows < MIN_RATE * nominal:
                found.append(finding("rate", f"{rows} rows, {nominal:.0f} were due", source=source))
    return found


def check_loss(episode: Episode) -> list[Finding]:
    """Compare the rows that arrived with those that the sampler emitted."""
    found, lost = [], lost_rows(episode.manifest)
    for source, emitted in episode.manifest.rows_emitted.items():
        rows = lost.get(source, 0)
        if rows > 0:
            found.append(finding("loss", f"{rows} of {emitted} rows never arrived", source=source))
    return found


def lost_rows(manifest: Manifest) -> Mapping[Source, int]:
    """Count, per source, the rows that were emitted and are not in the bundle."""
    listed = manifest.members
    return {
        source: max(0, emitted - (listed[f"{source}.jsonl"].rows if f"{source}.jsonl" in listed else 0))
        for source, emitted in manifest.rows_emitted.items()
    }


def vcpu_wait_cores(episode: Episode) -> float:
    """Give the mean share of a core for which vCPU threads waited during the labels; NaN without two readings."""
    readings = episode.rows.get(Source.PROC)
    if readings is None or "vcpu_wait_ns" not in readings.fields:
        return float("nan")
    place = readings.fields.index("vcpu_wait_ns")
    inside = (
        (readings.t_wall_ns >= episode.t0_ns) & (readings.t_wall_ns <= episode.t_end_ns) & readings.present[:, place]
    )
    waited, mono = readings.columns[place][inside], readings.t_mono_ns[inside]
    if len(mono) < 2 or mono[-1] <= mono[0]:
        return float("nan")
    # Python's integers: from one end of 64 bits to the other, numpy's would wrap and warn.
    return float(int(waited[-1]) - int(waited[0])) / float(mono[-1] - mono[0])


def check_contention(episode: Episode) -> list[Finding]:
    """See whether the vCPUs had to wait for a core, which holds every rate down."""
    wait = vcpu_wait_cores(episode)
    return [finding("contention", f"vCPUs waited for {wait:.2f} cores")] if wait > MAX_WAIT_CORES else []


def check_constant(episode: Episode) -> list[Finding]:
    """Find sources of which no field ever changes."""
    found = []
    for source, readings in episode.rows.items():
        if len(readings) > 1 and all(bool((column == column[0]).all()) for column in readings.columns):
            code = "constant-proc" if source is Source.PROC else "constant"
            found.append(finding(code, f"{len(readings)} rows, all alike", source=source))
    return found


EPISODE_GATES: tuple[Callable[[Episode], list[Finding]], ...] = (
    check_sources,
    check_loss,
    check_contention,
    check_constant,
)
