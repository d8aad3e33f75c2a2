"""Find contradictions between the manifest, the labels and the rows of a bundle.

Each check is a pure function from an episode (clocks rebased, impossible readings turned into null) to issues. An issue
rejects the bundle if a model could learn something false from it: impossible labels, rows beside wrong labels, or a
simulated VM that passes for a real one. If something is only missing, or no model sees the fact, the
bundle is degraded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from phasewatch.arrays import IntArray
from phasewatch.binning.clocks import LABEL_MARGIN_NS, MIN_CLOCK_STEP_NS
from phasewatch.binning.ranges import channel_range
from phasewatch.bundle.container import LABELS_FILE, MANIFEST_FILE
from phasewatch.bundle.labels import list_phase_starts
from phasewatch.bundle.model import Episode, SourceRows
from phasewatch.bundle.problems import CheckIssue
from phasewatch.channels import CHANNELS, CUSTOM_CHANNEL_KEYS, list_raw_fields
from phasewatch.types import (
    BENIGN_PROFILE,
    ChannelGroup,
    ChannelKind,
    ChannelTrust,
    EpisodeOrigin,
    EpisodeRole,
    Phase,
    SampleKind,
    SourceKind,
)
from phasewatch.validate.readings import compute_max_emitted, find_impossible, find_read_fields

__all__ = ["CONTRADICTION_CHECKS", "MALICIOUS_PHASES", "compute_mean_cores", "find_out_of_range"]

MALICIOUS_PHASES = frozenset({Phase.ARMED, Phase.INFECTING, Phase.ACTIVE, Phase.DORMANT})
MAX_START_LEAD_NS = 3_600_000_000_000  # between the start of an episode (boot, settling) and its first label
MAX_ID_LEAD_NS = 366 * 86_400_000_000_000  # between the time in an id and the first label; a simulator makes ids early
MAX_CLOCK_RATE_ERROR = 0.01  # of a source's monotonic clock against its wall clock, without steps
HZ_TOLERANCE = 1.25  # rows may be this much faster than the nominal rate
CPU_TOLERANCE = 0.1  # relative, and in cores: counters are not read at the same instant
MEMORY_TOLERANCE = 1.1
MAX_LISTED_NAMES = 4


_CHANNELS_BY_NAME = {c.full_name: c for c in CHANNELS}
# Channels that every host has, whatever its hypervisor and processor.
_UNIVERSAL_CHANNELS = frozenset(
    c.full_name
    for c in CHANNELS
    if c.accel == "any"
    and c.arch == "any"
    and c.trust is ChannelTrust.HOST
    and c.group is ChannelGroup.BASE  # bundles from before the extended channels have none
    and (c.source, c.name) not in CUSTOM_CHANNEL_KEYS
)
_KVM_FIELDS = frozenset(f for c in CHANNELS if c.accel == "kvm" for f in c.fields)
# Made of base fields: bundles from before the extended channels have their readings, and do not name them.
_UNNAMED_CHANNELS = frozenset(
    c.full_name
    for c in CHANNELS
    if c.group is ChannelGroup.EXTENDED
    and all(spec.group is ChannelGroup.BASE for spec in list_raw_fields(c.source) if spec.field in c.fields)
)
_TCG_FIELDS = frozenset(
    f for c in CHANNELS if c.accel == "tcg" and (c.source, c.name) not in CUSTOM_CHANNEL_KEYS for f in c.fields
)
_X86_FIELDS = frozenset(
    f for c in CHANNELS if c.arch == "x86" and (c.source, c.name) not in CUSTOM_CHANNEL_KEYS for f in c.fields
)
_X86_ARCHS = ("x86_64", "i386", "i486", "i586", "i686", "amd64", "unknown")


def _find_channel_contradictions(episode: Episode) -> list[CheckIssue]:
    """Compare the channels that the manifest claims or lists as absent with those that were read.

    Missing sources are skipped; `checks` reports them.
    """
    m = episode.manifest
    claimed, absent = set(m.channels_available), set(m.recording.absent) if m.recording else set()
    found: list[CheckIssue] = []
    if unknown := sorted(claimed - _CHANNELS_BY_NAME.keys()):
        words = f"channels_available names unknown channels: {_format_names(unknown)}"
        found.append(CheckIssue("channels", words, place=MANIFEST_FILE))
    if both := sorted(claimed & absent):
        words = f"both available and absent: {_format_names(both)}"
        found.append(CheckIssue("channels", words, place=MANIFEST_FILE))
    if not m.agent and (silent := sorted(c for c in claimed if c.startswith(f"{SourceKind.GUEST}."))):
        words = f"available although the agent was off: {_format_names(silent)}"
        found.append(CheckIssue("channels", words, source=SourceKind.GUEST))
    for source, readings in episode.rows.items():
        ever = find_read_fields(readings)
        if not ever:
            continue
        of_source = [c for c in CHANNELS if c.source is source]
        read = {c.full_name for c in of_source if ever.issuperset(c.fields)}
        if not read and source is not SourceKind.PROC:
            found.append(CheckIssue("missing", "none of its channels was ever read", source=source))
            continue
        expected = (claimed | (_UNIVERSAL_CHANNELS - absent)) & {c.full_name for c in of_source}
        custom = {c.full_name for c in of_source if (c.source, c.name) in CUSTOM_CHANNEL_KEYS}
        if never := sorted(expected - read):
            words = f"never read, without a reason: {_format_names(never)}"
            found.append(CheckIssue("channels", words, source=source))
        if unlisted := sorted(read - claimed - absent - custom - _UNNAMED_CHANNELS):
            words = f"read, and not in channels_available: {_format_names(unlisted)}"
            found.append(CheckIssue("channels", words, source=source))
        if listed := sorted((read & absent) - claimed):
            words = f"listed as absent, and read: {_format_names(listed)}"
            found.append(CheckIssue("channels-unlisted", words, source=source))
    return found


def _find_low_nominal_hz(episode: Episode) -> list[CheckIssue]:
    """Find nominal rates far below that of the rows; `checks` finds those far above."""
    found = []
    for source, readings in episode.rows.items():
        nominal_hz = episode.manifest.nominal_hz.get(source, 0.0)
        steps = np.diff(readings.t_mono_ns)
        if len(steps) < 3 or int(steps.min()) * nominal_hz * HZ_TOLERANCE >= 1e9:
            continue
        median_ns = float(np.median(np.diff(np.sort(readings.t_mono_ns))))
        observed_hz = 1e9 / max(median_ns, 1.0)
        if nominal_hz * HZ_TOLERANCE < observed_hz:
            words = f"nominal_hz is {nominal_hz:g}, but the rows come at {observed_hz:.3g} Hz"
            found.append(CheckIssue("nominal-hz", words, source=source))
    return found


def _find_sequence_errors(episode: Episode) -> list[CheckIssue]:
    """Find rows whose sequence number and monotonic stamp do not both increase, whatever the order in the file."""
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


def _find_excess_emitted(episode: Episode) -> list[CheckIssue]:
    """Find counts of emitted rows that are too high for the sampling rate and the duration."""
    m, found = episode.manifest, []
    for source, emitted in m.rows_emitted.items():
        if emitted > (most := compute_max_emitted(m, source)):
            words = f"rows_emitted is {emitted:,}; at most {most:,} are possible in {m.duration_s:.0f} s"
            found.append(CheckIssue("emitted", words, source=source))
    return found


def _find_label_clock_errors(episode: Episode) -> list[CheckIssue]:
    """Compare the two stamps of each label with those of the proc rows next to it."""
    proc = episode.rows.get(SourceKind.PROC)
    if proc is None or not len(proc):
        return []
    mono, ahead = _compute_clock_offsets(proc)
    for mark in episode.marks:
        place = int(np.searchsorted(mono, mark.t_mono_ns))
        neighbours = ahead[max(0, place - 1) : place + 1].tolist()
        apart = min(abs(mark.t_wall_ns - mark.t_mono_ns - offset) for offset in neighbours)
        if apart > MIN_CLOCK_STEP_NS:
            name = mark.phase or "end"
            words = f"`{name}`: wall and monotonic stamp differ by {apart / 1e9:.3f} s from those of the proc rows"
            return [CheckIssue("label-clock", words, place=LABELS_FILE)]
    return []


def _find_row_clock_errors(episode: Episode) -> list[CheckIssue]:
    """Find sources whose clocks do not match those of proc, or whose two clocks run at different rates.

    The guest's monotonic clock has its own origin; only its rate is checked.
    """
    found, proc = [], episode.rows.get(SourceKind.PROC)
    for source, readings in episode.rows.items():
        if len(readings) < 2:
            continue
        mono, ahead = _compute_clock_offsets(readings)
        if (drift := _compute_clock_drift_ns(mono, ahead)) is not None:
            words = f"apart from steps, the monotonic clock falls {drift / 1e9:.3f} s behind the wall clock"
            found.append(CheckIssue("row-clock", words, source=source))
        elif source not in (SourceKind.PROC, SourceKind.GUEST) and proc is not None and len(proc):
            apart = _compute_clock_distance_ns(mono, ahead, *_compute_clock_offsets(proc))
            if apart > MIN_CLOCK_STEP_NS:
                words = f"wall and monotonic stamps differ by {apart / 1e9:.3f} s from those of the proc rows"
                found.append(CheckIssue("row-clock", words, source=source))
    return found


def _compute_clock_offsets(readings: SourceRows) -> tuple[IntArray, IntArray]:
    """Return the monotonic stamps and the offset of the wall clock, both ``(n,)`` int64 in ns, by monotonic time."""
    mono, ahead = (
        readings.t_mono_ns,
        readings.t_wall_ns - readings.t_mono_ns,
    )  # neither stamp is negative, so the difference fits
    if (mono[1:] < mono[:-1]).any():
        order = np.argsort(mono, kind="stable")
        mono, ahead = mono[order], ahead[order]
    return mono, ahead


def _compute_clock_drift_ns(mono: IntArray, ahead: IntArray) -> float | None:
    """Return the drift between the two clocks without steps, in ns; None if it is within the tolerance.

    Args:
        mono, ahead: ``(n,)`` int64 of `_compute_clock_offsets`.
    """
    if int(ahead.max()) - int(ahead.min()) <= MIN_CLOCK_STEP_NS:
        return None
    moved = np.diff(ahead.astype(np.float64))
    drift = float(moved[np.abs(moved) <= MIN_CLOCK_STEP_NS].sum())
    span = float(int(mono[-1]) - int(mono[0]))
    return drift if abs(drift) > max(MIN_CLOCK_STEP_NS, MAX_CLOCK_RATE_ERROR * span) else None


def _compute_clock_distance_ns(mono: IntArray, ahead: IntArray, proc_mono: IntArray, proc_ahead: IntArray) -> float:
    """Return the median difference between a source's clock offset and that of proc at the same time, in ns.

    Args:
        mono, ahead: ``(n,)`` int64 of `_compute_clock_offsets`.
        proc_mono, proc_ahead: ``(m,)`` int64, those of proc.
    """
    ends = (int(ahead.min()), int(ahead.max()), int(proc_ahead.min()), int(proc_ahead.max()))
    if max(ends) - min(ends) <= MIN_CLOCK_STEP_NS:  # without a step, all offsets agree
        return 0.0
    place = np.searchsorted(proc_mono, mono)
    before = proc_ahead[np.clip(place - 1, 0, len(proc_ahead) - 1)]
    after = proc_ahead[np.clip(place, 0, len(proc_ahead) - 1)]
    offsets = ahead.astype(np.float64)
    return float(np.median(np.minimum(np.abs(offsets - before), np.abs(offsets - after))))


def _find_kind_contradictions(episode: Episode) -> list[CheckIssue]:
    """Compare profile and sample kind with each other and with the labels."""
    m = episode.manifest
    is_benign = m.profile == BENIGN_PROFILE or m.sample_kind is SampleKind.BENIGN
    if is_benign and (phases := _list_malicious_phases(episode)):
        words = f"profile {m.profile}, kind {m.sample_kind}, but labels of {phases}"
        return [CheckIssue("kind-phases", words, place=LABELS_FILE)]
    contradict = (m.profile == BENIGN_PROFILE and m.sample_kind is SampleKind.EMULATED) or (
        m.profile != BENIGN_PROFILE and m.sample_kind is SampleKind.BENIGN
    )
    words = f"profile {m.profile} of kind {m.sample_kind}"
    return [CheckIssue("kind", words, place=MANIFEST_FILE)] if contradict else []


def _find_role_contradictions(episode: Episode) -> list[CheckIssue]:
    """Find malicious phases in an episode whose role is benign."""
    role, phases = episode.manifest.role, _list_malicious_phases(episode)
    if role is EpisodeRole.LAB or not phases:
        return []
    return [CheckIssue("role-phases", f"role {role}, but labels of {phases}", place=LABELS_FILE)]


def _list_malicious_phases(episode: Episode) -> str:
    return ", ".join(dict.fromkeys(str(mark.phase) for mark in episode.marks if mark.phase in MALICIOUS_PHASES))


def _find_origin_contradictions(episode: Episode) -> list[CheckIssue]:
    """Compare the origin with the recording and with the kind of the sample."""
    m = episode.manifest
    words = ""
    if m.origin is EpisodeOrigin.SIMULATED and m.recording is not None:
        words = "the origin is simulated, but a recording is described"
    elif m.origin is EpisodeOrigin.SIMULATED and m.sample_kind is SampleKind.LIVE:
        words = "the origin is simulated, but the sample is a live one"
    elif m.origin is not EpisodeOrigin.SIMULATED and m.recording is None:
        words = f"the origin is {m.origin}, but recording is null"
    return [CheckIssue("origin", words, place=MANIFEST_FILE)] if words else []


def _find_start_contradictions(episode: Episode) -> list[CheckIssue]:
    """Compare the start and the time in the id (a UUIDv7) with the labels; a split by time uses the start."""
    m, t0_ns = episode.manifest, episode.t0_ns
    id_time_ns = int(m.episode_id[:8] + m.episode_id[9:13], 16) * 1_000_000
    words = ""
    if not t0_ns - MAX_START_LEAD_NS <= m.started_wall_ns <= episode.t_end_ns:
        words = f"started_wall_ns is {_format_hours(m.started_wall_ns - t0_ns)} from the first label"
    elif t0_ns - id_time_ns > MAX_ID_LEAD_NS:
        words = f"the first label is {_format_hours(t0_ns - id_time_ns)} later than the time in the episode's id"
    return [CheckIssue("started", words, place=MANIFEST_FILE)] if words else []


def _format_hours(span_ns: int) -> str:
    return f"{span_ns / 3.6e12:,.1f} h"


def _find_plan_contradictions(episode: Episode) -> list[CheckIssue]:
    """Compare the labelled phases with the plan; they may stop early, and end with `dormant`."""
    planned = [phase for phase, _ in episode.manifest.plan]
    done = [mark.phase for mark in episode.marks if mark.phase is not None]
    if all(phase is Phase.UNKNOWN for phase in planned):
        return []
    shortened = done[:-1] if done[-1] is Phase.DORMANT else done
    if done == planned[: len(done)] or shortened == planned[: len(shortened)]:
        return []
    words = f"planned: {' '.join(planned)}; labelled: {' '.join(done)}"
    return [CheckIssue("plan", words, place=LABELS_FILE)]


def _find_labelling_contradictions(episode: Episode) -> list[CheckIssue]:
    """Compare the labels with those that a person gave, which the manifest lists with who, when and why."""
    labelling = episode.manifest.labelling
    if labelling is None:
        return []
    starts = [(mark.t_wall_ns, mark.phase) for mark in episode.marks if mark.phase is not None]
    t0_ns, t_end_ns = episode.t0_ns, episode.t_end_ns
    is_inside = labelling.labels[0].start_wall_ns >= t0_ns and labelling.labels[-1].end_wall_ns <= t_end_ns
    if is_inside and starts == list_phase_starts(labelling.labels, t0_ns, t_end_ns):
        return []
    return [CheckIssue("labelling", "the labels are not those that the manifest lists", place=LABELS_FILE)]


def _find_stray_rows(episode: Episode) -> list[CheckIssue]:
    """Find rows that are stamped far outside the labels."""
    low, high, found = episode.t0_ns - LABEL_MARGIN_NS, episode.t_end_ns + LABEL_MARGIN_NS, []
    for source, readings in episode.rows.items():
        outside = int(((readings.t_wall_ns < low) | (readings.t_wall_ns > high)).sum())
        if outside:
            margin_s = LABEL_MARGIN_NS // 10**9
            words = f"{outside} of {len(readings)} rows are stamped more than {margin_s} s outside the labels"
            found.append(CheckIssue("stray", words, source=source))
    return found


def _find_counter_errors(episode: Episode) -> list[CheckIssue]:
    """Find counters that fell, and counters that grew faster than any machine can."""
    found = []
    for source, readings in episode.rows.items():
        if len(readings) < 2:
            continue
        fell: list[str] = []
        jumped: list[str] = []
        for fields, steps, seconds in _iter_increments(source, readings):
            limits = np.array([[_MAX_PER_SECOND.get((source, field), np.inf)] for field in fields])
            for words, wrong in ((fell, steps < 0), (jumped, steps > limits * seconds)):
                if wrong.any():
                    counts = zip(fields, wrong.sum(axis=1).tolist(), strict=True)
                    words += [f"{field}: {n} times" for field, n in counts if n]
        if fell:
            found.append(CheckIssue("reset", f"fell: {_format_names(fell)}", source=source))
        if jumped:
            found.append(CheckIssue("range", f"grew faster than possible: {_format_names(jumped)}", source=source))
    return found


def _iter_increments(
    source: SourceKind, readings: SourceRows
) -> Iterable[tuple[list[str], IntArray, NDArray[np.float64]]]:
    """Yield groups of ``k`` counters that were read in the same rows.

    Yields:
        Their fields, their increments ``(k, m)`` int64, and the seconds of each increment ``(m,)`` float64.
    """
    mono, present, columns = readings.t_mono_ns, readings.present, readings.columns
    if not (mono[1:] >= mono[:-1]).all():
        order = np.lexsort((readings.seq, mono))
        mono, present, columns = mono[order], present[order], tuple(column[order] for column in columns)
    specs = list_raw_fields(source)
    counters = [i for i, spec in enumerate(specs) if spec.nature == "counter" and spec.type == "int"]
    groups: dict[bytes, list[int]] = {}
    for i in counters:
        groups.setdefault(present[:, i].tobytes(), []).append(i)
    for places in groups.values():
        read = present[:, places[0]]
        values, at = np.array([columns[i][read] for i in places]), mono[read]
        if len(at) > 1:
            yield [readings.fields[i] for i in places], np.diff(values), np.maximum(np.diff(at), 1) / 1e9


def _compute_rate_limits() -> dict[tuple[SourceKind, str], float]:
    """Return the maximum increase of each counter per second in its unit, from the ranges of the channels."""
    limits = {}
    for c in CHANNELS:
        if c.kind is ChannelKind.RATE and (c.source, c.name) not in CUSTOM_CHANNEL_KEYS:
            limits[c.source, c.fields[0]] = channel_range(c)[1] / c.scale
    return limits


_MAX_PER_SECOND = _compute_rate_limits()


def find_out_of_range(episode: Episode) -> list[CheckIssue]:
    """Find readings outside the ranges of their fields, in an episode before `readings.drop_impossible`."""
    found = []
    for source, readings in episode.rows.items():
        wild = find_impossible(readings)
        if wild is not None and wild.any():
            counts = [
                f"{field}: {n} of {len(readings)} readings"
                for field, n in zip(readings.fields, wild.sum(axis=0).tolist(), strict=True)
                if n
            ]
            found.append(CheckIssue("range", f"outside the possible range: {_format_names(counts)}", source=source))
    return found


def _find_host_issues(episode: Episode) -> list[CheckIssue]:
    """Compare the host's vCPUs, memory, accelerator and architecture with the rows."""
    return [CheckIssue("host-facts", words, place=MANIFEST_FILE) for words in _find_host_contradictions(episode)]


def _find_host_contradictions(episode: Episode) -> Iterable[str]:
    host, recording = episode.manifest.host, episode.manifest.recording
    if recording is not None and len(recording.pinning) not in (0, host.vcpus):
        yield f"{host.vcpus} vCPUs, but {len(recording.pinning)} are pinned"
    most = host.vcpus * (1 + CPU_TOLERANCE) + CPU_TOLERANCE
    for field in ("vcpu_run_ns", "vcpu_wait_ns"):
        cores = compute_mean_cores(episode, field)
        if cores > most:
            yield f"{host.vcpus} vCPUs, but {field} grew by {cores:.2f} cores"
    for source, field in ((SourceKind.QMP, "bal_free_bytes"), (SourceKind.GUEST, "mem_free_bytes")):
        free = _compute_maximum(episode, source, field)
        if host.mem_mib > 1 and free > MEMORY_TOLERANCE * host.mem_mib * 2**20:  # 1 MiB means unknown
            yield f"{host.mem_mib} MiB of memory, but {source}.{field} reads {free / 2**20:,.0f} MiB"
    qmp = episode.rows.get(SourceKind.QMP)
    if qmp is None:
        return
    read = find_read_fields(qmp)
    if host.accel not in ("tcg", "unknown") and (only := sorted(read & _TCG_FIELDS)):
        yield f"the accelerator is {host.accel}, but fields of TCG alone were read: {_format_names(only)}"
    if host.accel not in ("kvm", "unknown") and (only := sorted(read & _KVM_FIELDS)):
        yield f"the accelerator is {host.accel}, but fields of KVM alone were read: {_format_names(only)}"
    if host.arch not in _X86_ARCHS and (only := sorted(read & _X86_FIELDS)):
        yield f"the architecture is {host.arch}, but fields of x86 alone were read: {_format_names(only)}"


def compute_mean_cores(episode: Episode, field: str) -> float:
    """Return the mean increase of a CPU time of proc during the labels, in cores; NaN without two readings."""
    readings = episode.rows.get(SourceKind.PROC)
    if readings is None or field not in readings.fields:
        return float("nan")
    place = readings.fields.index(field)
    wall = readings.t_wall_ns
    inside = (wall >= episode.t0_ns) & (wall <= episode.t_end_ns) & readings.present[:, place]
    grown, mono = readings.columns[place][inside], readings.t_mono_ns[inside]
    if len(mono) < 2:
        return float("nan")
    first, last = int(mono.argmin()), int(mono.argmax())  # rows may be in any order
    if mono[last] <= mono[first]:
        return float("nan")
    # Python integers: a difference across the whole range of int64 would overflow in numpy.
    return float(int(grown[last]) - int(grown[first])) / float(mono[last] - mono[first])


def _compute_maximum(episode: Episode, source: SourceKind, field: str) -> float:
    readings = episode.rows.get(source)
    return float(readings.columns[readings.fields.index(field)].max(initial=0)) if readings is not None else 0.0


def _format_names(names: list[str]) -> str:
    more = len(names) - MAX_LISTED_NAMES
    return ", ".join(names[:MAX_LISTED_NAMES]) + (f" and {more} more" if more > 0 else "")


CONTRADICTION_CHECKS: tuple[Callable[[Episode], list[CheckIssue]], ...] = (
    _find_channel_contradictions,
    _find_low_nominal_hz,
    _find_sequence_errors,
    _find_excess_emitted,
    _find_label_clock_errors,
    _find_row_clock_errors,
    _find_kind_contradictions,
    _find_role_contradictions,
    _find_origin_contradictions,
    _find_start_contradictions,
    _find_plan_contradictions,
    _find_labelling_contradictions,
    _find_stray_rows,
    _find_counter_errors,
    _find_host_issues,
)
