"""Contradictions inside a bundle: what its manifest, labels and rows say of the same thing, held against each other.

Each check is a pure function from an episode (its clocks put right, impossible readings turned into null) to remarks.
Rejected is what could teach a model something false: labels that cannot be, rows beside the wrong labels, a simulated
machine that passes for a real one. What only lacks something, or contradicts a fact that no model sees, is degraded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import IntArray
from phasewatch.binning.clocks import LABEL_MARGIN_NS, MIN_CLOCK_STEP_NS
from phasewatch.binning.ranges import channel_range
from phasewatch.bundle.model import Episode, SourceRows
from phasewatch.bundle.problems import CheckIssue
from phasewatch.channels import CHANNELS, CUSTOM_CHANNELS, list_raw_fields
from phasewatch.types import (
    BENIGN_PROFILE,
    ChannelKind,
    ChannelTrust,
    EpisodeOrigin,
    EpisodeRole,
    Phase,
    SampleKind,
    SourceKind,
)
from phasewatch.validate.readings import compute_max_emitted, find_impossible, find_read_fields

MALICIOUS_PHASES = frozenset({Phase.ARMED, Phase.INFECTING, Phase.ACTIVE, Phase.DORMANT})
MAX_START_LEAD_NS = 3_600_000_000_000  # how long before the first label an episode may have begun: boot and settling
MAX_ID_LEAD_NS = (
    366 * 86_400_000_000_000
)  # how long before its labels an id may have been made; a simulator makes it first
MAX_CLOCK_RATE_ERROR = 0.01  # of a source's monotonic clock against its wall clock, beside steps
HZ_TOLERANCE = 1.25  # rows may come that much faster than promised
CPU_TOLERANCE = 0.1  # of the vCPUs, and in cores: counters are read a moment apart
MEMORY_TOLERANCE = 1.1
MAX_LISTED_NAMES = 4


_CUSTOM_CHANNELS = frozenset((row["source"], row["name"]) for row in CUSTOM_CHANNELS.channels)
_CHANNELS_BY_NAME = {c.full_name: c for c in CHANNELS}
# What every host gives, whatever its hypervisor and processor.
_UNIVERSAL_CHANNELS = frozenset(
    c.full_name
    for c in CHANNELS
    if c.accel == "any"
    and c.arch == "any"
    and c.trust is ChannelTrust.HOST
    and (c.source, c.name) not in _CUSTOM_CHANNELS
)
_TCG_FIELDS = frozenset(
    f for c in CHANNELS if c.accel == "tcg" and (c.source, c.name) not in _CUSTOM_CHANNELS for f in c.fields
)
_X86_FIELDS = frozenset(
    f for c in CHANNELS if c.arch == "x86" and (c.source, c.name) not in _CUSTOM_CHANNELS for f in c.fields
)
_X86_ARCHS = ("x86_64", "i386", "i486", "i586", "i686", "amd64", "unknown")


def _check_channels(episode: Episode) -> list[CheckIssue]:
    """Compare the channels that the manifest claims or lists as absent with those that were read.

    A source that is missing as a whole is not looked at: that is said already.
    """
    m = episode.manifest
    claimed, absent = set(m.channels_available), set(m.recording.absent) if m.recording else set()
    found: list[CheckIssue] = []
    if unknown := sorted(claimed - _CHANNELS_BY_NAME.keys()):
        found.append(CheckIssue("channels", f"channels_available names what is no channel: {_format_names(unknown)}", place="manifest.json"))  # fmt: skip
    if both := sorted(claimed & absent):
        found.append(
            CheckIssue("channels", f"available and absent at once: {_format_names(both)}", place="manifest.json")
        )
    if not m.agent and (silent := sorted(c for c in claimed if c.startswith(f"{SourceKind.GUEST}."))):
        found.append(CheckIssue("channels", f"the agent was off, and yet available: {_format_names(silent)}", source=SourceKind.GUEST))  # fmt: skip
    for source, readings in episode.rows.items():
        ever = find_read_fields(readings)
        if not ever:
            continue
        own = [c for c in CHANNELS if c.source is source]
        read = {c.full_name for c in own if ever.issuperset(c.fields)}
        if not read and source is not SourceKind.PROC:
            found.append(CheckIssue("missing", "none of its channels was ever read", source=source))
            continue
        owed = {c.full_name for c in own if c.full_name in claimed or c.full_name in _UNIVERSAL_CHANNELS - absent}
        if never := sorted(owed - read):
            found.append(
                CheckIssue("channels", f"never read, and no reason is given: {_format_names(never)}", source=source)
            )
        if hidden := sorted(
            read - claimed - absent - {c.full_name for c in own if (c.source, c.name) in _CUSTOM_CHANNELS}
        ):
            found.append(
                CheckIssue("channels", f"read, and not in channels_available: {_format_names(hidden)}", source=source)
            )
        if listed := sorted((read & absent) - claimed):
            found.append(
                CheckIssue("channels-unlisted", f"listed as absent, and read: {_format_names(listed)}", source=source)
            )
    return found


def _check_nominal_hz(episode: Episode) -> list[CheckIssue]:
    """Find a promised rate far below the one at which the rows come; a promise too high is `check_sources`' to find."""
    found = []
    for source, readings in episode.rows.items():
        promised = episode.manifest.nominal_hz.get(source, 0.0)
        steps = np.diff(readings.t_mono_ns)
        if len(steps) < 3 or int(steps.min()) * promised * HZ_TOLERANCE >= 1e9:
            continue
        middle = float(np.median(np.diff(np.sort(readings.t_mono_ns))))
        observed = 1e9 / max(middle, 1.0)
        if promised * HZ_TOLERANCE < observed:
            found.append(CheckIssue("nominal-hz", f"nominal_hz is {promised:g}, and the rows come at {observed:.3g} a second", source=source))  # fmt: skip
    return found


def _check_sequence(episode: Episode) -> list[CheckIssue]:
    """Hold the rows' numbers against their monotonic stamps: both grow from row to row, whatever the file's order."""
    found = []
    for source, readings in episode.rows.items():
        mono, seq = readings.t_mono_ns, readings.seq
        if not len(seq):
            continue
        if not (mono[1:] > mono[:-1]).all():
            order = np.lexsort((seq, mono))
            mono, seq = mono[order], seq[order]
        negative = int((seq < 0).sum())
        wrong = int(((mono[1:] <= mono[:-1]) | (seq[1:] <= seq[:-1])).sum())
        if negative or wrong:
            words = f"{negative} of {len(seq)} numbers are negative, {wrong} rows do not come after the one before"
            found.append(CheckIssue("sequence", words, source=source))
    return found


def _check_emitted(episode: Episode) -> list[CheckIssue]:
    """Find a number of emitted rows that no sampler of that rate gives in the time."""
    m, found = episode.manifest, []
    for source, emitted in m.rows_emitted.items():
        if emitted > (most := compute_max_emitted(m, source)):
            words = f"rows_emitted is {emitted:,}; in {m.duration_s:.0f} s no more than {most:,} could be"
            found.append(CheckIssue("emitted", words, source=source))
    return found


def _check_labels_clock(episode: Episode) -> list[CheckIssue]:
    """Hold each label's wall stamp against its monotonic one, by the rows of proc that were read next to it."""
    proc = episode.rows.get(SourceKind.PROC)
    if proc is None or not len(proc):
        return []
    mono, ahead = _compute_clock_offsets(proc)
    for mark in episode.marks:
        place = int(np.searchsorted(mono, mark.t_mono_ns))
        beside = ahead[max(0, place - 1) : place + 1].tolist()
        apart = min(abs(mark.t_wall_ns - mark.t_mono_ns - offset) for offset in beside)
        if apart > MIN_CLOCK_STEP_NS:
            words = f"`{mark.phase or 'end'}`: wall and monotonic stamp are {apart / 1e9:.3f} s apart from those of proc's rows"
            return [CheckIssue("label-clock", words, place="labels.jsonl")]
    return []


def _check_row_clocks(episode: Episode) -> list[CheckIssue]:
    """Find a source whose clocks do not fit those of proc, or whose monotonic clock runs at another rate than its wall.

    The guest's monotonic clock may begin anywhere; it must only run at the same rate.
    """
    found, proc = [], episode.rows.get(SourceKind.PROC)
    for source, readings in episode.rows.items():
        if len(readings) < 2:
            continue
        mono, ahead = _compute_clock_offsets(readings)
        if (drift := _compute_clock_drift_ns(mono, ahead)) is not None:
            words = f"beside steps the monotonic clock loses {drift / 1e9:.3f} s on the wall clock"
            found.append(CheckIssue("row-clock", words, source=source))
        elif source not in (SourceKind.PROC, SourceKind.GUEST) and proc is not None and len(proc):
            apart = _compute_clock_distance_ns(mono, ahead, *_compute_clock_offsets(proc))
            if apart > MIN_CLOCK_STEP_NS:
                words = f"wall and monotonic stamps are {apart / 1e9:.3f} s apart from those of proc's rows"
                found.append(CheckIssue("row-clock", words, source=source))
    return found


def _compute_clock_offsets(readings: SourceRows) -> tuple[IntArray, IntArray]:
    """Return monotonic stamps and how far the wall clock is ahead of them, both ``(n,)`` in order of the first."""
    mono, ahead = readings.t_mono_ns, readings.t_wall_ns - readings.t_mono_ns  # neither is negative
    if (mono[1:] < mono[:-1]).any():
        order = np.argsort(mono, kind="stable")
        mono, ahead = mono[order], ahead[order]
    return mono, ahead


def _compute_clock_drift_ns(mono: IntArray, ahead: IntArray) -> float | None:
    """Return how far the clocks drifted apart beside steps, in ns; None if that is within the slack."""
    if int(ahead.max()) - int(ahead.min()) <= MIN_CLOCK_STEP_NS:
        return None
    moved = np.diff(ahead.astype(np.float64))
    drift = float(moved[np.abs(moved) <= MIN_CLOCK_STEP_NS].sum())
    span = float(int(mono[-1]) - int(mono[0]))
    return drift if abs(drift) > max(MIN_CLOCK_STEP_NS, MAX_CLOCK_RATE_ERROR * span) else None


def _compute_clock_distance_ns(mono: IntArray, ahead: IntArray, proc_mono: IntArray, proc_ahead: IntArray) -> float:
    """Return the median distance between a source's offset and that of proc at the same monotonic time, in ns."""
    ends = (int(ahead.min()), int(ahead.max()), int(proc_ahead.min()), int(proc_ahead.max()))
    if max(ends) - min(ends) <= MIN_CLOCK_STEP_NS:  # no step, and no doubt
        return 0.0
    place = np.searchsorted(proc_mono, mono)
    before = proc_ahead[np.clip(place - 1, 0, len(proc_ahead) - 1)]
    after = proc_ahead[np.clip(place, 0, len(proc_ahead) - 1)]
    mine = ahead.astype(np.float64)
    return float(np.median(np.minimum(np.abs(mine - before), np.abs(mine - after))))


def _check_kind(episode: Episode) -> list[CheckIssue]:
    """Hold profile and sample kind against each other and against the labels."""
    m = episode.manifest
    is_benign = m.profile == BENIGN_PROFILE or m.sample_kind is SampleKind.BENIGN
    if is_benign and (phases := _list_malicious_phases(episode)):
        words = f"profile {m.profile}, kind {m.sample_kind}, and labels of {phases}"
        return [CheckIssue("kind-phases", words, place="labels.jsonl")]
    contradict = (m.profile == BENIGN_PROFILE and m.sample_kind is SampleKind.EMULATED) or (
        m.profile != BENIGN_PROFILE and m.sample_kind is SampleKind.BENIGN
    )
    words = f"profile {m.profile} of kind {m.sample_kind}"
    return [CheckIssue("kind", words, place="manifest.json")] if contradict else []


def _check_role(episode: Episode) -> list[CheckIssue]:
    """Find malicious phases in an episode that is known to be benign by its role."""
    role, phases = episode.manifest.role, _list_malicious_phases(episode)
    if role is EpisodeRole.LAB or not phases:
        return []
    return [CheckIssue("role-phases", f"role {role}, and labels of {phases}", place="labels.jsonl")]


def _list_malicious_phases(episode: Episode) -> str:
    return ", ".join(dict.fromkeys(str(mark.phase) for mark in episode.marks if mark.phase in MALICIOUS_PHASES))


def _check_origin(episode: Episode) -> list[CheckIssue]:
    """Hold the origin against the recording, and against a sample that cannot be simulated."""
    m = episode.manifest
    words = ""
    if m.origin is EpisodeOrigin.SIMULATED and m.recording is not None:
        words = "the origin is simulated, and yet a recording is described"
    elif m.origin is EpisodeOrigin.SIMULATED and m.sample_kind is SampleKind.LIVE:
        words = "the origin is simulated, and the sample a live one"
    elif m.origin is EpisodeOrigin.RECORDED and m.recording is None:
        words = "the origin is recorded, and recording is null"
    return [CheckIssue("origin", words, place="manifest.json")] if words else []


def _check_started(episode: Episode) -> list[CheckIssue]:
    """Hold the episode's start and the time in its id (a UUIDv7) against the labels: a time split goes by the start."""
    m, t0_ns = episode.manifest, episode.t0_ns
    made_ns = int(m.episode_id[:8] + m.episode_id[9:13], 16) * 1_000_000
    words = ""
    if not t0_ns - MAX_START_LEAD_NS <= m.started_wall_ns <= episode.t_end_ns:
        words = f"started_wall_ns is {_format_hours(m.started_wall_ns - t0_ns)} from the first label"
    elif t0_ns - made_ns > MAX_ID_LEAD_NS:
        words = f"the first label is {_format_hours(t0_ns - made_ns)} later than the time in the episode's id"
    return [CheckIssue("started", words, place="manifest.json")] if words else []


def _format_hours(span_ns: int) -> str:
    return f"{span_ns / 3.6e12:,.1f} h"


def _check_plan(episode: Episode) -> list[CheckIssue]:
    """Hold the labels' phases against the plan's: the same in the same order, cut short or ended by `dormant`."""
    planned = [phase for phase, _ in episode.manifest.plan]
    done = [mark.phase for mark in episode.marks if mark.phase is not None]
    if all(phase is Phase.UNKNOWN for phase in planned):
        return []
    kept = done[:-1] if done[-1] is Phase.DORMANT else done
    if done == planned[: len(done)] or kept == planned[: len(kept)]:
        return []
    words = f"planned: {' '.join(planned)}; labelled: {' '.join(done)}"
    return [CheckIssue("plan", words, place="labels.jsonl")]


def _check_stray_rows(episode: Episode) -> list[CheckIssue]:
    """Find rows stamped far outside the labels, in a source of which most rows are where they belong."""
    low, high, found = episode.t0_ns - LABEL_MARGIN_NS, episode.t_end_ns + LABEL_MARGIN_NS, []
    for source, readings in episode.rows.items():
        outside = int(((readings.t_wall_ns < low) | (readings.t_wall_ns > high)).sum())
        if outside:
            words = f"{outside} of {len(readings)} rows are stamped more than {LABEL_MARGIN_NS // 10**9} s outside the labels"
            found.append(CheckIssue("stray", words, source=source))
    return found


def _check_counters(episode: Episode) -> list[CheckIssue]:
    """Find counters that fell, and counters that grew faster than any machine can count."""
    found = []
    for source, readings in episode.rows.items():
        if len(readings) < 2:
            continue
        fell: list[str] = []
        leapt: list[str] = []
        for fields, steps, seconds in _iter_increments(source, readings):
            limits = np.array([[_MAX_PER_SECOND.get((source, field), np.inf)] for field in fields])
            for words, wrong in ((fell, steps < 0), (leapt, steps > limits * seconds)):
                if wrong.any():
                    words += [f"{field}: {n} times" for field, n in zip(fields, wrong.sum(axis=1).tolist(), strict=True) if n]  # fmt: skip
        if fell:
            found.append(CheckIssue("reset", f"fell: {_format_names(fell)}", source=source))
        if leapt:
            found.append(CheckIssue("range", f"grew faster than can be: {_format_names(leapt)}", source=source))
    return found


def _iter_increments(
    source: SourceKind, readings: SourceRows
) -> Iterable[tuple[list[str], IntArray, NDArray[np.float64]]]:
    """Yield counters that share their readings, their increments ``(k, m)`` and the seconds that each took ``(m,)``."""
    mono, present, columns = readings.t_mono_ns, readings.present, readings.columns
    if not (mono[1:] >= mono[:-1]).all():
        order = np.lexsort((readings.seq, mono))
        mono, present, columns = mono[order], present[order], tuple(column[order] for column in columns)
    counts = [(i, spec.field) for i, spec in enumerate(list_raw_fields(source)) if spec.nature == "counter" and spec.type == "int"]  # fmt: skip
    together: dict[bytes, list[int]] = {}
    for i, _ in counts:
        together.setdefault(present[:, i].tobytes(), []).append(i)
    for places in together.values():
        read = present[:, places[0]]
        values, at = np.array([columns[i][read] for i in places]), mono[read]
        if len(at) > 1:
            yield [readings.fields[i] for i in places], np.diff(values), np.maximum(np.diff(at), 1) / 1e9


def _compute_rate_limits() -> dict[tuple[SourceKind, str], float]:
    """Derive from the channels what a counter may add in a second, in the counter's own unit."""
    limits = {}
    for c in CHANNELS:
        if c.kind is ChannelKind.RATE and (c.source, c.name) not in _CUSTOM_CHANNELS:
            limits[c.source, c.fields[0]] = channel_range(c)[1] / c.scale
    return limits


_MAX_PER_SECOND = _compute_rate_limits()


def check_range(episode: Episode) -> list[CheckIssue]:
    """Find readings outside their fields' ranges; asked of the episode before they are turned into null."""
    found = []
    for source, readings in episode.rows.items():
        wild = find_impossible(readings)
        if wild is not None and wild.any():
            told = [
                f"{field}: {n} of {len(readings)} readings"
                for field, n in zip(readings.fields, wild.sum(axis=0).tolist(), strict=True)
                if n
            ]
            found.append(CheckIssue("range", f"outside what can be: {_format_names(told)}", source=source))
    return found


def _check_host(episode: Episode) -> list[CheckIssue]:
    """Hold the machine's facts against the rows: cores against CPU time, memory against memory, hypervisor against fields."""
    return [CheckIssue("host-facts", words, place="manifest.json") for words in _find_host_contradictions(episode)]


def _find_host_contradictions(episode: Episode) -> Iterable[str]:
    host, recording = episode.manifest.host, episode.manifest.recording
    if recording is not None and len(recording.pinning) not in (0, host.vcpus):
        yield f"{host.vcpus} vCPUs, and {len(recording.pinning)} of them are pinned"
    most = host.vcpus * (1 + CPU_TOLERANCE) + CPU_TOLERANCE
    for field in ("vcpu_run_ns", "vcpu_wait_ns"):
        cores = compute_mean_cores(episode, field)
        if cores > most:
            yield f"{host.vcpus} vCPUs, and {field} says that they took {cores:.2f} cores"
    for source, field in ((SourceKind.QMP, "bal_free_bytes"), (SourceKind.GUEST, "mem_free_bytes")):
        free = _compute_maximum(episode, source, field)
        if host.mem_mib > 1 and free > MEMORY_TOLERANCE * host.mem_mib * 2**20:  # 1 MiB stands for unknown
            yield f"{host.mem_mib} MiB of memory, and {source}.{field} says that {free / 2**20:,.0f} MiB are free"
    qmp = episode.rows.get(SourceKind.QMP)
    if qmp is None:
        return
    read = find_read_fields(qmp)
    if host.accel not in ("tcg", "unknown") and (only := sorted(read & _TCG_FIELDS)):
        yield f"the accelerator is {host.accel}, and what only TCG counts was read: {_format_names(only)}"
    if host.arch not in _X86_ARCHS and (only := sorted(read & _X86_FIELDS)):
        yield f"the machine is {host.arch}, and what only x86 shows was read: {_format_names(only)}"


def compute_mean_cores(episode: Episode, field: str) -> float:
    """Return the mean share of a core that a CPU time of proc grew by during the labels; NaN without two readings."""
    readings = episode.rows.get(SourceKind.PROC)
    if readings is None or field not in readings.fields:
        return float("nan")
    place = readings.fields.index(field)
    wall = readings.t_wall_ns
    inside = (wall >= episode.t0_ns) & (wall <= episode.t_end_ns) & readings.present[:, place]
    grown, mono = readings.columns[place][inside], readings.t_mono_ns[inside]
    if len(mono) < 2:
        return float("nan")
    first, last = int(mono.argmin()), int(mono.argmax())  # rows may stand in any order
    if mono[last] <= mono[first]:
        return float("nan")
    # Python's integers: from one end of 64 bits to the other, numpy's would wrap and warn.
    return float(int(grown[last]) - int(grown[first])) / float(mono[last] - mono[first])


def _compute_maximum(episode: Episode, source: SourceKind, field: str) -> float:
    readings = episode.rows.get(source)
    return float(readings.columns[readings.fields.index(field)].max(initial=0)) if readings is not None else 0.0


def _format_names(names: list[str]) -> str:
    more = len(names) - MAX_LISTED_NAMES
    return ", ".join(names[:MAX_LISTED_NAMES]) + (f" and {more} more" if more > 0 else "")


CONTRADICTION_CHECKS: tuple[Callable[[Episode], list[CheckIssue]], ...] = (
    _check_channels,
    _check_nominal_hz,
    _check_sequence,
    _check_emitted,
    _check_labels_clock,
    _check_row_clocks,
    _check_kind,
    _check_role,
    _check_origin,
    _check_started,
    _check_plan,
    _check_stray_rows,
    _check_counters,
    _check_host,
)
