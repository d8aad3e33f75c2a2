"""Contradictions inside a bundle: what its manifest, labels and rows say of the same thing, held against each other.

Each check is a pure function from an episode (its clocks put right, impossible readings turned into null) to remarks.
Rejected is what could teach a model something false: labels that cannot be, rows beside the wrong labels, a simulated
machine that passes for a real one. What only lacks something, or contradicts a fact that no model sees, is degraded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from phasewatch.channels import CHANNELS, EXTRAS, raw_fields
from phasewatch.episode.model import Episode, SourceRows
from phasewatch.grid.clocks import SLACK_NS, STEP_NS
from phasewatch.grid.ranges import channel_range
from phasewatch.validate.rates import emitted_limit
from phasewatch.validate.readings import fields_read, impossible
from phasewatch.validate.remarks import Remark
from phasewatch.vocab import BENIGN, Kind, Origin, Phase, Role, SampleKind, Source, Trust

MALICIOUS = frozenset({Phase.ARMED, Phase.INFECTING, Phase.ACTIVE, Phase.DORMANT})
STARTED_BEFORE_NS = 3_600_000_000_000  # how long before the first label an episode may have begun: boot and settling
ID_BEFORE_NS = (
    366 * 86_400_000_000_000
)  # how long before its labels an id may have been made; a simulator makes it first
MAX_RATE_ERROR = 0.01  # of a source's monotonic clock against its wall clock, beside steps
HZ_SLACK = 1.25  # rows may come that much faster than promised
CPU_SLACK = 0.1  # of the vCPUs, and in cores: counters are read a moment apart
MEMORY_SLACK = 1.1
SHOWN = 4

Ints = NDArray[np.int64]

_OWN = frozenset((row["source"], row["name"]) for row in EXTRAS.channels)
_KNOWN = {c.full_name: c for c in CHANNELS}
# What every host gives, whatever its hypervisor and processor.
_EVERYWHERE = frozenset(
    c.full_name
    for c in CHANNELS
    if c.accel == "any" and c.arch == "any" and c.trust is Trust.HOST and (c.source, c.name) not in _OWN
)
_TCG_FIELDS = frozenset(f for c in CHANNELS if c.accel == "tcg" and (c.source, c.name) not in _OWN for f in c.fields)
_X86_FIELDS = frozenset(f for c in CHANNELS if c.arch == "x86" and (c.source, c.name) not in _OWN for f in c.fields)
_X86 = ("x86_64", "i386", "i486", "i586", "i686", "amd64", "unknown")


def check_channels(episode: Episode) -> list[Remark]:
    """Compare the channels that the manifest claims or lists as absent with those that were read.

    A source that is missing as a whole is not looked at: that is said already.
    """
    m = episode.manifest
    claimed, absent = set(m.channels_available), set(m.recording.absent) if m.recording else set()
    found: list[Remark] = []
    if unknown := sorted(claimed - _KNOWN.keys()):
        found.append(Remark("channels", f"channels_available names what is no channel: {_listed(unknown)}", place="manifest.json"))  # fmt: skip
    if both := sorted(claimed & absent):
        found.append(Remark("channels", f"available and absent at once: {_listed(both)}", place="manifest.json"))
    if not m.agent and (silent := sorted(c for c in claimed if c.startswith(f"{Source.GUEST}."))):
        found.append(Remark("channels", f"the agent was off, and yet available: {_listed(silent)}", source=Source.GUEST))  # fmt: skip
    for source, readings in episode.rows.items():
        ever = fields_read(readings)
        if not ever:
            continue
        own = [c for c in CHANNELS if c.source is source]
        read = {c.full_name for c in own if ever.issuperset(c.fields)}
        if not read and source is not Source.PROC:
            found.append(Remark("missing", "none of its channels was ever read", source=source))
            continue
        owed = {c.full_name for c in own if c.full_name in claimed or c.full_name in _EVERYWHERE - absent}
        if never := sorted(owed - read):
            found.append(Remark("channels", f"never read, and no reason is given: {_listed(never)}", source=source))
        if hidden := sorted(read - claimed - absent - {c.full_name for c in own if (c.source, c.name) in _OWN}):
            found.append(Remark("channels", f"read, and not in channels_available: {_listed(hidden)}", source=source))
        if listed := sorted((read & absent) - claimed):
            found.append(Remark("channels-unlisted", f"listed as absent, and read: {_listed(listed)}", source=source))
    return found


def check_nominal_hz(episode: Episode) -> list[Remark]:
    """Find a promised rate far below the one at which the rows come; a promise too high is `check_sources`' to find."""
    found = []
    for source, readings in episode.rows.items():
        promised = episode.manifest.nominal_hz.get(source, 0.0)
        steps = np.diff(readings.t_mono_ns)
        if len(steps) < 3 or int(steps.min()) * promised * HZ_SLACK >= 1e9:
            continue
        middle = float(np.median(np.diff(np.sort(readings.t_mono_ns))))
        observed = 1e9 / max(middle, 1.0)
        if promised * HZ_SLACK < observed:
            found.append(Remark("nominal-hz", f"nominal_hz is {promised:g}, and the rows come at {observed:.3g} a second", source=source))  # fmt: skip
    return found


def check_sequence(episode: Episode) -> list[Remark]:
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
            found.append(Remark("sequence", words, source=source))
    return found


def check_emitted(episode: Episode) -> list[Remark]:
    """Find a number of emitted rows that no sampler of that rate gives in the time."""
    m, found = episode.manifest, []
    for source, emitted in m.rows_emitted.items():
        if emitted > (most := emitted_limit(m, source)):
            words = f"rows_emitted is {emitted:,}; in {m.duration_s:.0f} s no more than {most:,} could be"
            found.append(Remark("emitted", words, source=source))
    return found


def check_labels_clock(episode: Episode) -> list[Remark]:
    """Hold each label's wall stamp against its monotonic one, by the rows of proc that were read next to it."""
    proc = episode.rows.get(Source.PROC)
    if proc is None or not len(proc):
        return []
    mono, ahead = _offsets(proc)
    for mark in episode.marks:
        place = int(np.searchsorted(mono, mark.t_mono_ns))
        beside = ahead[max(0, place - 1) : place + 1].tolist()
        apart = min(abs(mark.t_wall_ns - mark.t_mono_ns - offset) for offset in beside)
        if apart > STEP_NS:
            words = f"`{mark.phase or 'end'}`: wall and monotonic stamp are {apart / 1e9:.3f} s apart from those of proc's rows"
            return [Remark("label-clock", words, place="labels.jsonl")]
    return []


def check_row_clocks(episode: Episode) -> list[Remark]:
    """Find a source whose clocks do not fit those of proc, or whose monotonic clock runs at another rate than its wall.

    The guest's monotonic clock may begin anywhere; it must only run at the same rate.
    """
    found, proc = [], episode.rows.get(Source.PROC)
    for source, readings in episode.rows.items():
        if len(readings) < 2:
            continue
        mono, ahead = _offsets(readings)
        if (drift := _drift(mono, ahead)) is not None:
            words = f"beside steps the monotonic clock loses {drift / 1e9:.3f} s on the wall clock"
            found.append(Remark("row-clock", words, source=source))
        elif source not in (Source.PROC, Source.GUEST) and proc is not None and len(proc):
            apart = _apart(mono, ahead, *_offsets(proc))
            if apart > STEP_NS:
                words = f"wall and monotonic stamps are {apart / 1e9:.3f} s apart from those of proc's rows"
                found.append(Remark("row-clock", words, source=source))
    return found


def _offsets(readings: SourceRows) -> tuple[Ints, Ints]:
    """Return monotonic stamps and how far the wall clock is ahead of them, both ``(n,)`` in order of the first."""
    mono, ahead = readings.t_mono_ns, readings.t_wall_ns - readings.t_mono_ns  # neither is negative
    if (mono[1:] < mono[:-1]).any():
        order = np.argsort(mono, kind="stable")
        mono, ahead = mono[order], ahead[order]
    return mono, ahead


def _drift(mono: Ints, ahead: Ints) -> float | None:
    """Return how far the clocks drifted apart beside steps, in ns; None if that is within the slack."""
    if int(ahead.max()) - int(ahead.min()) <= STEP_NS:
        return None
    moved = np.diff(ahead.astype(np.float64))
    drift = float(moved[np.abs(moved) <= STEP_NS].sum())
    span = float(int(mono[-1]) - int(mono[0]))
    return drift if abs(drift) > max(STEP_NS, MAX_RATE_ERROR * span) else None


def _apart(mono: Ints, ahead: Ints, proc_mono: Ints, proc_ahead: Ints) -> float:
    """Return the median distance between a source's offset and that of proc at the same monotonic time, in ns."""
    ends = (int(ahead.min()), int(ahead.max()), int(proc_ahead.min()), int(proc_ahead.max()))
    if max(ends) - min(ends) <= STEP_NS:  # no step, and no doubt
        return 0.0
    place = np.searchsorted(proc_mono, mono)
    before = proc_ahead[np.clip(place - 1, 0, len(proc_ahead) - 1)]
    after = proc_ahead[np.clip(place, 0, len(proc_ahead) - 1)]
    mine = ahead.astype(np.float64)
    return float(np.median(np.minimum(np.abs(mine - before), np.abs(mine - after))))


def check_kind(episode: Episode) -> list[Remark]:
    """Hold profile and sample kind against each other and against the labels."""
    m = episode.manifest
    is_benign = m.profile == BENIGN or m.sample_kind is SampleKind.BENIGN
    if is_benign and (phases := _malicious(episode)):
        words = f"profile {m.profile}, kind {m.sample_kind}, and labels of {phases}"
        return [Remark("kind-phases", words, place="labels.jsonl")]
    contradict = (m.profile == BENIGN and m.sample_kind is SampleKind.EMULATED) or (
        m.profile != BENIGN and m.sample_kind is SampleKind.BENIGN
    )
    words = f"profile {m.profile} of kind {m.sample_kind}"
    return [Remark("kind", words, place="manifest.json")] if contradict else []


def check_role(episode: Episode) -> list[Remark]:
    """Find malicious phases in an episode that is known to be benign by its role."""
    role, phases = episode.manifest.role, _malicious(episode)
    if role is Role.LAB or not phases:
        return []
    return [Remark("role-phases", f"role {role}, and labels of {phases}", place="labels.jsonl")]


def _malicious(episode: Episode) -> str:
    return ", ".join(dict.fromkeys(str(mark.phase) for mark in episode.marks if mark.phase in MALICIOUS))


def check_origin(episode: Episode) -> list[Remark]:
    """Hold the origin against the recording, and against a sample that cannot be simulated."""
    m = episode.manifest
    words = ""
    if m.origin is Origin.SIMULATED and m.recording is not None:
        words = "the origin is simulated, and yet a recording is described"
    elif m.origin is Origin.SIMULATED and m.sample_kind is SampleKind.LIVE:
        words = "the origin is simulated, and the sample a live one"
    elif m.origin is Origin.RECORDED and m.recording is None:
        words = "the origin is recorded, and recording is null"
    return [Remark("origin", words, place="manifest.json")] if words else []


def check_started(episode: Episode) -> list[Remark]:
    """Hold the episode's start and the time in its id (a UUIDv7) against the labels: a time split goes by the start."""
    m, t0_ns = episode.manifest, episode.t0_ns
    made_ns = int(m.episode_id[:8] + m.episode_id[9:13], 16) * 1_000_000
    words = ""
    if not t0_ns - STARTED_BEFORE_NS <= m.started_wall_ns <= episode.t_end_ns:
        words = f"started_wall_ns is {_hours(m.started_wall_ns - t0_ns)} from the first label"
    elif t0_ns - made_ns > ID_BEFORE_NS:
        words = f"the first label is {_hours(t0_ns - made_ns)} later than the time in the episode's id"
    return [Remark("started", words, place="manifest.json")] if words else []


def _hours(span_ns: int) -> str:
    return f"{span_ns / 3.6e12:,.1f} h"


def check_plan(episode: Episode) -> list[Remark]:
    """Hold the labels' phases against the plan's: the same in the same order, cut short or ended by `dormant`."""
    planned = [phase for phase, _ in episode.manifest.plan]
    done = [mark.phase for mark in episode.marks if mark.phase is not None]
    if all(phase is Phase.UNKNOWN for phase in planned):
        return []
    kept = done[:-1] if done[-1] is Phase.DORMANT else done
    if done == planned[: len(done)] or kept == planned[: len(kept)]:
        return []
    words = f"planned: {' '.join(planned)}; labelled: {' '.join(done)}"
    return [Remark("plan", words, place="labels.jsonl")]


def check_stray(episode: Episode) -> list[Remark]:
    """Find rows stamped far outside the labels, in a source of which most rows are where they belong."""
    low, high, found = episode.t0_ns - SLACK_NS, episode.t_end_ns + SLACK_NS, []
    for source, readings in episode.rows.items():
        outside = int(((readings.t_wall_ns < low) | (readings.t_wall_ns > high)).sum())
        if outside:
            words = f"{outside} of {len(readings)} rows are stamped more than {SLACK_NS // 10**9} s outside the labels"
            found.append(Remark("stray", words, source=source))
    return found


def check_counters(episode: Episode) -> list[Remark]:
    """Find counters that fell, and counters that grew faster than any machine can count."""
    found = []
    for source, readings in episode.rows.items():
        if len(readings) < 2:
            continue
        fell: list[str] = []
        leapt: list[str] = []
        for fields, steps, seconds in _increments(source, readings):
            limits = np.array([[_MOST_A_SECOND.get((source, field), np.inf)] for field in fields])
            for words, wrong in ((fell, steps < 0), (leapt, steps > limits * seconds)):
                if wrong.any():
                    words += [f"{field}: {n} times" for field, n in zip(fields, wrong.sum(axis=1).tolist(), strict=True) if n]  # fmt: skip
        if fell:
            found.append(Remark("reset", f"fell: {_listed(fell)}", source=source))
        if leapt:
            found.append(Remark("range", f"grew faster than can be: {_listed(leapt)}", source=source))
    return found


def _increments(source: Source, readings: SourceRows) -> Iterable[tuple[list[str], Ints, NDArray[np.float64]]]:
    """Yield counters that share their readings, their increments ``(k, m)`` and the seconds that each took ``(m,)``."""
    mono, present, columns = readings.t_mono_ns, readings.present, readings.columns
    if not (mono[1:] >= mono[:-1]).all():
        order = np.lexsort((readings.seq, mono))
        mono, present, columns = mono[order], present[order], tuple(column[order] for column in columns)
    counts = [(i, spec.field) for i, spec in enumerate(raw_fields(source)) if spec.nature == "counter" and spec.type == "int"]  # fmt: skip
    together: dict[bytes, list[int]] = {}
    for i, _ in counts:
        together.setdefault(present[:, i].tobytes(), []).append(i)
    for places in together.values():
        read = present[:, places[0]]
        values, at = np.array([columns[i][read] for i in places]), mono[read]
        if len(at) > 1:
            yield [readings.fields[i] for i in places], np.diff(values), np.maximum(np.diff(at), 1) / 1e9


def _rate_limits() -> dict[tuple[Source, str], float]:
    """Derive from the channels what a counter may add in a second, in the counter's own unit."""
    limits = {}
    for c in CHANNELS:
        if c.kind is Kind.RATE and (c.source, c.name) not in _OWN:
            limits[c.source, c.fields[0]] = channel_range(c)[1] / c.scale
    return limits


_MOST_A_SECOND = _rate_limits()


def check_range(episode: Episode) -> list[Remark]:
    """Find readings outside their fields' ranges; asked of the episode before they are turned into null."""
    found = []
    for source, readings in episode.rows.items():
        wild = impossible(readings)
        if wild is not None and wild.any():
            told = [
                f"{field}: {n} of {len(readings)} readings"
                for field, n in zip(readings.fields, wild.sum(axis=0).tolist(), strict=True)
                if n
            ]
            found.append(Remark("range", f"outside what can be: {_listed(told)}", source=source))
    return found


def check_host(episode: Episode) -> list[Remark]:
    """Hold the machine's facts against the rows: cores against CPU time, memory against memory, hypervisor against fields."""
    return [Remark("host-facts", words, place="manifest.json") for words in _host_words(episode)]


def _host_words(episode: Episode) -> Iterable[str]:
    host, recording = episode.manifest.host, episode.manifest.recording
    if recording is not None and len(recording.pinning) not in (0, host.vcpus):
        yield f"{host.vcpus} vCPUs, and {len(recording.pinning)} of them are pinned"
    most = host.vcpus * (1 + CPU_SLACK) + CPU_SLACK
    for field in ("vcpu_run_ns", "vcpu_wait_ns"):
        cores = mean_cores(episode, field)
        if cores > most:
            yield f"{host.vcpus} vCPUs, and {field} says that they took {cores:.2f} cores"
    for source, field in ((Source.QMP, "bal_free_bytes"), (Source.GUEST, "mem_free_bytes")):
        free = _greatest(episode, source, field)
        if host.mem_mib > 1 and free > MEMORY_SLACK * host.mem_mib * 2**20:  # 1 MiB stands for unknown
            yield f"{host.mem_mib} MiB of memory, and {source}.{field} says that {free / 2**20:,.0f} MiB are free"
    qmp = episode.rows.get(Source.QMP)
    if qmp is None:
        return
    read = fields_read(qmp)
    if host.accel not in ("tcg", "unknown") and (only := sorted(read & _TCG_FIELDS)):
        yield f"the accelerator is {host.accel}, and what only TCG counts was read: {_listed(only)}"
    if host.arch not in _X86 and (only := sorted(read & _X86_FIELDS)):
        yield f"the machine is {host.arch}, and what only x86 shows was read: {_listed(only)}"


def mean_cores(episode: Episode, field: str) -> float:
    """Return the mean share of a core that a CPU time of proc grew by during the labels; NaN without two readings."""
    readings = episode.rows.get(Source.PROC)
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


def _greatest(episode: Episode, source: Source, field: str) -> float:
    readings = episode.rows.get(source)
    return float(readings.columns[readings.fields.index(field)].max(initial=0)) if readings is not None else 0.0


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


CHECKS: tuple[Callable[[Episode], list[Remark]], ...] = (
    check_channels,
    check_nominal_hz,
    check_sequence,
    check_emitted,
    check_labels_clock,
    check_row_clocks,
    check_kind,
    check_role,
    check_origin,
    check_started,
    check_plan,
    check_stray,
    check_counters,
    check_host,
)
