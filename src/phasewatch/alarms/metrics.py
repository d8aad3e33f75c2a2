"""Render the figures of a watch for Prometheus, as OpenMetrics text or in the older text format (pure).

Source: OpenMetrics 1.0; Prometheus text exposition format 0.0.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from phasewatch._version import __version__
from phasewatch.alarms.delivery import OutputCounters
from phasewatch.alarms.life import Alarm, AlarmStatus, find_vm_id
from phasewatch.events.schema import EventEnvelope, PerfEvent, PhaseEvent, TelemetryEvent
from phasewatch.models.alarm import AlarmKind
from phasewatch.types import PHASES

__all__ = [
    "CONTENT_TYPES",
    "METRIC_NAMES",
    "MetricsFormat",
    "MetricsSnapshot",
    "VmFigures",
    "WatchFigures",
    "render_metrics",
]

_FORGET_NS = 600_000_000_000  # a VM without an event for this long is no longer shown
_MAX_LABEL_CHARS = 256
_MAX_TRACKED = 4096  # VMs


class MetricsFormat(StrEnum):
    """The text formats that Prometheus reads."""

    OPENMETRICS = "openmetrics"
    PROMETHEUS = "prometheus"


CONTENT_TYPES = {
    MetricsFormat.OPENMETRICS: "application/openmetrics-text; version=1.0.0; charset=utf-8",
    MetricsFormat.PROMETHEUS: "text/plain; version=0.0.4; charset=utf-8",
}


@dataclass(slots=True, kw_only=True)
class VmFigures:
    """The newest figures of one VM.

    Attributes:
        vm, vm_id: Name and identity.
        seen_ns: Wall time of its last event.
        windows: Windows with a decision since the start of the watch.
        phase: Its newest decision; None before the first.
        bins_end_ns: End of its newest bin of readings; None before the first.
        lost_rows, late_rows: Readings that were lost or late since the start of the watch.
    """

    vm: str
    vm_id: str
    seen_ns: int
    windows: int = 0
    phase: PhaseEvent | None = None
    bins_end_ns: int | None = None
    lost_rows: int = 0
    late_rows: int = 0


@dataclass(slots=True)
class WatchFigures:
    """Follows the events of all VMs.

    Attributes:
        vms: Figures by identity.
        perf: The newest event about the cost of the process.
    """

    vms: dict[str, VmFigures] = field(default_factory=dict)
    perf: PerfEvent | None = None

    def add(self, event: EventEnvelope) -> None:
        """Add one event."""
        data = event.data
        if isinstance(data, PerfEvent):
            self.perf = data
        if not isinstance(data, PhaseEvent | TelemetryEvent):
            return
        vm_id = find_vm_id(data.vm, data.host)
        known = self.vms.get(vm_id)
        if known is None:
            if len(self.vms) >= _MAX_TRACKED:
                return
            known = self.vms[vm_id] = VmFigures(vm=data.vm, vm_id=vm_id, seen_ns=event.t_wall_ns)
        known.seen_ns = max(known.seen_ns, event.t_wall_ns)
        if isinstance(data, PhaseEvent):
            known.phase = data
            known.windows += 1
        else:
            known.bins_end_ns = data.t0_ns + round(len(data.values) * data.bin_s * 1e9)
            known.lost_rows, known.late_rows = data.lost_rows, data.late_rows

    def forget(self, vm_id: str) -> None:
        """Remove a VM that ended."""
        self.vms.pop(vm_id, None)

    def forget_silent(self, now_ns: int) -> None:
        """Remove the VMs without an event for ten minutes."""
        for vm_id in [key for key, known in self.vms.items() if known.seen_ns < now_ns - _FORGET_NS]:
            del self.vms[vm_id]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSnapshot:
    """What one answer shows.

    Attributes:
        figures: Figures of the VMs and of the process.
        open_alarms: The open alarms.
        silenced: Ids of those that a silence covers.
        outputs: Counts of the outputs.
        max_vms: VMs that are shown; further ones are counted.
        now_ns: Wall time.
    """

    figures: WatchFigures
    open_alarms: Sequence[Alarm] = ()
    silenced: frozenset[str] = frozenset()
    outputs: Sequence[OutputCounters] = ()
    max_vms: int = 512
    now_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """A metric and its samples; `name` without ``_total``."""

    name: str
    type: str
    about: str
    unit: str = ""


_Sample = tuple[Mapping[str, str], float]

_FAMILIES = (
    _Family(name="phasewatch_build_info", type="gauge", about="Version of the watcher."),
    _Family(name="phasewatch_vms", type="gauge", about="VMs that are watched."),
    _Family(name="phasewatch_vms_omitted", type="gauge", about="VMs that are watched and not shown here."),
    _Family(
        name="phasewatch_vm_phase_probability",
        type="gauge",
        about="Probability of each phase in the newest window.",
    ),
    _Family(name="phasewatch_vm_alarm", type="gauge", about="1 while an alarm of the VM is open."),
    _Family(name="phasewatch_vm_alarm_acknowledged", type="gauge", about="1 while the open alarm is acknowledged."),
    _Family(name="phasewatch_vm_alarm_silenced", type="gauge", about="1 while a silence covers the open alarm."),
    _Family(
        name="phasewatch_vm_alarm_raised_timestamp_seconds",
        type="gauge",
        unit="seconds",
        about="Time at which the open alarm was raised.",
    ),
    _Family(name="phasewatch_vm_windows", type="counter", about="Windows with a decision since the watch began."),
    _Family(name="phasewatch_vm_lost_readings", type="counter", about="Readings that never arrived."),
    _Family(name="phasewatch_vm_late_readings", type="counter", about="Readings that came after their bin was closed."),
    _Family(
        name="phasewatch_vm_readings_age_seconds",
        type="gauge",
        unit="seconds",
        about="Time since the end of the newest bin of readings.",
    ),
    _Family(
        name="phasewatch_vm_decision_age_seconds",
        type="gauge",
        unit="seconds",
        about="Time since the end of the newest window with a decision.",
    ),
    _Family(
        name="phasewatch_vm_decision_delay_seconds",
        type="gauge",
        unit="seconds",
        about="Time from the end of the newest window to its decision.",
    ),
    _Family(name="phasewatch_output_sent", type="counter", about="Alarms that an output delivered."),
    _Family(name="phasewatch_output_lost", type="counter", about="Alarms that an output did not deliver."),
    _Family(name="phasewatch_output_backlog", type="gauge", about="Alarms that wait in an output."),
    _Family(name="phasewatch_output_failing", type="gauge", about="1 while the last delivery of an output failed."),
    _Family(name="phasewatch_process_cpu_cores", type="gauge", about="CPU seconds per second of the watcher."),
    _Family(
        name="phasewatch_process_resident_memory_bytes",
        type="gauge",
        unit="bytes",
        about="Resident memory of the watcher.",
    ),
)
METRIC_NAMES = tuple(f"{f.name}_total" if f.type == "counter" else f.name for f in _FAMILIES)


def render_metrics(snapshot: MetricsSnapshot, *, form: MetricsFormat = MetricsFormat.OPENMETRICS) -> bytes:
    """Return the figures as text.

    Args:
        snapshot: The figures.
        form: Format of the text.
    """
    samples = _collect_samples(snapshot)
    lines: list[str] = []
    for family in _FAMILIES:
        is_counter = family.type == "counter"
        sample_name = f"{family.name}_total" if is_counter else family.name
        shown = sample_name if form is MetricsFormat.PROMETHEUS else family.name
        lines.append(f"# HELP {shown} {family.about}")
        lines.append(f"# TYPE {shown} {family.type}")
        if family.unit and form is MetricsFormat.OPENMETRICS:
            lines.append(f"# UNIT {shown} {family.unit}")
        for labels, value in samples[family.name]:
            lines.append(f"{sample_name}{_render_labels(labels)} {_render_value(value)}")
    if form is MetricsFormat.OPENMETRICS:
        lines.append("# EOF")
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def _collect_samples(snapshot: MetricsSnapshot) -> dict[str, list[_Sample]]:
    samples: dict[str, list[_Sample]] = {family.name: [] for family in _FAMILIES}
    # VMs with an alarm first, so that a bound never hides one.
    alarms: dict[str, dict[AlarmKind, Alarm]] = {}
    for alarm in snapshot.open_alarms:
        alarms.setdefault(alarm.vm_id, {})[alarm.kind] = alarm
    figures = sorted(snapshot.figures.vms.values(), key=lambda known: (known.vm_id not in alarms, known.vm_id))
    for known in figures[: snapshot.max_vms]:
        for name, labels, value in _list_vm_samples(known, alarms.get(known.vm_id, {}), snapshot):
            samples[name].append(({"vm": known.vm, "vm_id": known.vm_id, **labels}, value))
    samples["phasewatch_build_info"].append(({"version": __version__}, 1.0))
    samples["phasewatch_vms"].append(({}, float(len(figures))))
    samples["phasewatch_vms_omitted"].append(({}, float(max(0, len(figures) - snapshot.max_vms))))
    for output in snapshot.outputs:
        of = {"output": output.name}
        samples["phasewatch_output_sent"].append((of, float(output.sent)))
        samples["phasewatch_output_lost"].append((of, float(output.lost)))
        samples["phasewatch_output_backlog"].append((of, float(output.backlog)))
        samples["phasewatch_output_failing"].append((of, float(output.is_failing)))
    if perf := snapshot.figures.perf:
        samples["phasewatch_process_cpu_cores"].append(({}, perf.cpu_cores))
        samples["phasewatch_process_resident_memory_bytes"].append(({}, float(perf.rss_bytes)))
    return samples


def _list_vm_samples(
    known: VmFigures, alarms: Mapping[AlarmKind, Alarm], snapshot: MetricsSnapshot
) -> Iterator[tuple[str, Mapping[str, str], float]]:
    for kind in AlarmKind:
        alarm, of = alarms.get(kind), {"kind": str(kind)}
        yield "phasewatch_vm_alarm", of, float(alarm is not None)
        is_seen = alarm is not None and alarm.status is AlarmStatus.ACKNOWLEDGED
        yield "phasewatch_vm_alarm_acknowledged", of, float(is_seen)
        yield "phasewatch_vm_alarm_silenced", of, float(alarm is not None and alarm.id in snapshot.silenced)
        if alarm is not None:
            yield "phasewatch_vm_alarm_raised_timestamp_seconds", of, alarm.raised_ns / 1e9
    yield "phasewatch_vm_windows", {}, float(known.windows)
    yield "phasewatch_vm_lost_readings", {}, float(known.lost_rows)
    yield "phasewatch_vm_late_readings", {}, float(known.late_rows)
    if known.bins_end_ns is not None:
        yield "phasewatch_vm_readings_age_seconds", {}, (snapshot.now_ns - known.bins_end_ns) / 1e9
    if known.phase is not None:
        for phase, p in zip(PHASES, known.phase.p, strict=True):
            yield "phasewatch_vm_phase_probability", {"phase": str(phase)}, p
        yield "phasewatch_vm_decision_age_seconds", {}, (snapshot.now_ns - known.phase.t_end_ns) / 1e9
        if known.phase.latency_ms is not None:
            yield "phasewatch_vm_decision_delay_seconds", {}, known.phase.latency_ms / 1e3


def _render_labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape_label(value)}"' for name, value in labels.items()) + "}"


def _escape_label(value: str) -> str:
    value = value[:_MAX_LABEL_CHARS]
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"').replace("\r", "\ufffd")


def _render_value(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
