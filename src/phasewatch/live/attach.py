"""Attach to a running VM: survey it without changing it, open its telemetry sources, detach and restore it.

`survey_vm` only looks. `attach` opens the sources, which adds packet filters to the VM and turns on balloon polling.
`detach` undoes both. A channel that the VM cannot provide is masked in the survey, with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from phasewatch.channels import CHANNELS, build_channel_mask, list_raw_fields
from phasewatch.errors import VmError
from phasewatch.live.access import check_permission, connect_monitor
from phasewatch.live.cleanup import CleanupTask
from phasewatch.live.discover import RunningVm, find_vcpu_threads
from phasewatch.live.ownership import (
    WATCH_RECORD_FORMAT,
    WatchRecord,
    build_name_prefix,
    find_original_interval,
    find_other_watchers,
    find_watch_folders,
    is_abandoned,
    make_private_folder,
    remove_abandoned_folders,
    remove_watch_record,
    write_watch_record,
)
from phasewatch.telemetry.base import AsyncClock, ReadingValues, TelemetrySource
from phasewatch.telemetry.capture import CaptureSource, build_filter_ids
from phasewatch.telemetry.network_cards import Nic, parse_network_cards
from phasewatch.telemetry.proc import ProcSource
from phasewatch.telemetry.process import PROC_ROOT, translate_threads
from phasewatch.telemetry.qmp import (
    BALLOON_FIELDS,
    BALLOON_POLLING_PROPERTY,
    JIT_FIELDS,
    REGISTER_FIELDS,
    JitUse,
    QmpMonitor,
    QmpSource,
    parse_registers,
)
from phasewatch.telemetry.tap import TAP_FIELDS, TapSource, find_cards_without_tap
from phasewatch.telemetry.vcpu_threads import VcpuFinder, VcpuThreads
from phasewatch.types import SourceKind

__all__ = [
    "MaskedSource",
    "VmFacts",
    "VmSurvey",
    "attach",
    "choose_jit_use",
    "detach",
    "explain_masked_channels",
    "list_source_channels",
    "survey_vm",
]

_VCPU_FIELDS = frozenset({"vcpu_run_ns", "vcpu_wait_ns", "vcpu_vcs", "vcpu_ics", "aux_run_ns"})
_JIT_CHANNELS = frozenset(c.full_name for c in CHANNELS if c.source is SourceKind.QMP and JIT_FIELDS & set(c.fields))
_BALLOON_TYPE_PREFIX = "child<virtio-balloon"
_PROBE_READINGS = 3  # one late answer does not show that a VM cannot answer


@dataclass(frozen=True, slots=True, kw_only=True)
class VmFacts:
    """Facts about a VM that the host knows; a text is empty, and `mem_mib` 1, where nothing is known.

    Attributes:
        pid: QEMU's process id.
        name: Name of the VM.
        host_id: Host id of the VM in a store.
        arch: Architecture of the guest.
        accel: ``kvm`` or ``tcg``.
        vcpus: Number of vCPUs, at least 1.
        mem_mib: Memory of the guest.
        machine: QEMU's machine type.
        hypervisor: QEMU's version.
        nic: Model of the first network card.
    """

    pid: int
    name: str
    host_id: str
    arch: str
    accel: str
    vcpus: int
    mem_mib: int = 1
    machine: str = ""
    hypervisor: str = ""
    nic: str = ""


@dataclass(slots=True, kw_only=True)
class VmSurvey:
    """What a look at a VM showed; the VM was not changed.

    Attributes:
        facts: Facts about the VM.
        monitor: The connected QMP monitor; None if there is none.
        tids: The vCPU threads, one entry per vCPU; empty if unknown.
        nic: The first network card; None if unknown.
        taps: Tap devices of the VM on the host.
        task: Changes that must be undone once `attach` has run; the cleanup process must know them before.
        clock: Clock of the host.
        start_ticks: Start time of QEMU's process, which tells it from a later one with its pid.
        abandoned: Ids of objects that a dead watcher left in the VM; `attach` removes them.
        masked: Channel → reason why this VM cannot provide it.
        notes: Messages for the user.
        proc: Path of /proc.
        jit: Whether `attach` reads QEMU's translation counters.
    """

    facts: VmFacts
    monitor: QmpMonitor | None
    tids: tuple[int, ...]
    nic: Nic | None
    taps: tuple[str, ...]
    task: CleanupTask
    clock: AsyncClock
    start_ticks: int = 0
    abandoned: tuple[str, ...] = ()
    masked: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    proc: Path = PROC_ROOT
    jit: JitUse = JitUse.NEVER

    @property
    def available(self) -> frozenset[str]:
        """Full names of the channels that the VM can provide."""
        return frozenset(c.full_name for c in CHANNELS) - self.masked.keys()

    def mask(self, source: SourceKind, reason: str, fields: frozenset[str] | None = None) -> None:
        """Mark channels of a source as missing.

        Args:
            source: The source.
            reason: Why they are missing, for people.
            fields: Only channels that read one of these raw fields; None for all.
        """
        for name in list_source_channels(source, fields):
            self.masked.setdefault(name, reason)


def list_source_channels(source: SourceKind, fields: Collection[str] | None = None) -> tuple[str, ...]:
    """Return the full names of a source's channels, or of those that read some of its raw fields."""
    own = (c for c in CHANNELS if c.source is source)
    return tuple(c.full_name for c in own if fields is None or not set(c.fields).isdisjoint(fields))


def choose_jit_use(channel_set: str) -> JitUse:
    """Return whether to read QEMU's translation counters: only for a named channel set that contains them.

    Args:
        channel_set: Name that the user gave; empty if none.

    Raises:
        UsageError: If there is no such channel set.
    """
    if not channel_set:
        return JitUse.NEVER
    named = {c.full_name for c, is_in in zip(CHANNELS, build_channel_mask(channel_set), strict=True) if is_in}
    return JitUse.WHILE_FAST if named & _JIT_CHANNELS else JitUse.NEVER


def explain_masked_channels(masked: Mapping[str, str]) -> list[str]:
    """Return one line per reason, with the channels that are missing for it."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in masked.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]


async def survey_vm(machine: RunningVm, *, qmp: Path | None, clock: AsyncClock, proc: Path = PROC_ROOT) -> VmSurvey:
    """Look at a running VM without changing it.

    Args:
        machine: From `phasewatch.live.discover`.
        qmp: QMP socket that the user named, which must answer; None tries the VM's own sockets.
        clock: Clock for the sources that `attach` opens.
        proc: Path of /proc.

    Raises:
        MachineError: If its /proc may not be read.
        VmError: If the named socket does not answer, or belongs to another VM.
    """
    check_permission(machine, proc)
    monitor: QmpMonitor | None = None
    no_monitor_reason = ""
    try:
        monitor = await connect_monitor(machine, qmp, proc)
    except VmError as exc:
        if qmp is not None:
            raise
        no_monitor_reason = str(exc)
    tids = find_vcpu_threads(machine.pid, proc)
    nic, balloon, interval_s = None, "", 0
    abandoned: tuple[str, ...] = ()
    if monitor is not None:
        inner_tids = await monitor.query_vcpu_threads()
        tids = translate_threads(machine.pid, inner_tids, proc)
        if len(tids) < len(inner_tids):
            tids = ()
        nic = await _find_nic(monitor)
        balloon, interval_s = await _find_balloon(monitor)
        abandoned = await _find_abandoned(monitor, proc)
    facts = VmFacts(
        pid=machine.pid,
        name=machine.name,
        host_id=machine.host_id,
        arch=machine.arch,
        accel=machine.accel,
        vcpus=max(1, len(tids)),
        nic=nic.model if nic else "",
    )
    if monitor is not None:
        facts = replace(facts, **await _query_facts(monitor))
    interval_s = find_original_interval(
        interval_s,
        find_watch_folders(proc),
        is_marked=bool(abandoned),
        vm_pid=machine.pid,
        vm_start_ticks=machine.start_ticks,
    )
    folder = _make_folder_for(machine, proc) if monitor and (nic or balloon) else None
    survey = VmSurvey(
        facts=facts,
        monitor=monitor,
        tids=tids,
        nic=nic,
        taps=machine.taps,
        clock=clock,
        proc=proc,
        start_ticks=machine.start_ticks,
        task=CleanupTask(
            vm_pid=machine.pid,
            vm_start_ticks=machine.start_ticks,
            proc=str(proc),
            qmp=str(monitor.path) if monitor else "",
            objects=build_filter_ids(build_name_prefix()) if monitor and nic else (),
            balloon=balloon,
            interval_s=interval_s,
            folder=str(folder or ""),
        ),
        abandoned=abandoned,
    )
    _save_watch_record(survey)
    _mask_absent(survey, no_monitor_reason)
    return survey


def _mask_absent(survey: VmSurvey, no_monitor_reason: str) -> None:
    survey.mask(SourceKind.GUEST, "no agent runs in the guest")
    if survey.monitor is None:
        survey.mask(SourceKind.QMP, no_monitor_reason)
        survey.notes.append(f"no QEMU monitor: {no_monitor_reason}")
        survey.notes.append("without a monitor a pause, suspension, reset or restore of the VM goes unnoticed")
    elif not survey.task.balloon:
        survey.mask(SourceKind.QMP, "the VM has no balloon", BALLOON_FIELDS)
    if not survey.tids:
        reason = "the vCPU threads are unknown (start QEMU with -name X,debug-threads=on)"
        survey.mask(SourceKind.PROC, reason, _VCPU_FIELDS)


async def attach(survey: VmSurvey) -> tuple[TelemetrySource, ...]:
    """Open every source of a VM, which changes the VM as `survey.task` describes.

    Returns:
        The open sources in the order in which a recorder reads them. A source that cannot be opened is masked.

    Raises:
        OSError: If /proc of the process cannot be read.
    """
    await _remove_abandoned(survey)
    process, vcpus = _build_process_source(survey)
    masked_process: TelemetrySource = process if survey.tids else MaskedSource(process, _VCPU_FIELDS)
    await masked_process.open()
    sources = [masked_process, await _open_network_source(survey), await _open_monitor_source(survey, vcpus)]
    return tuple(source for source in sources if source is not None)


async def detach(survey: VmSurvey, sources: Sequence[TelemetrySource]) -> bool:
    """Close the sources and restore the VM; return False if something that was added may still be in it."""
    for source in sources:
        with suppress(Exception):  # whatever one raises, the others must be closed
            await source.close()
    if survey.monitor is None:
        return True
    is_clean = await _remove_objects(survey.monitor, survey.task.objects)
    # Remove the record before looking for others: two watchers that end at once would else wait for each other.
    remove_watch_record(survey.task.folder)
    if survey.task.balloon and not find_other_watchers(survey.facts.pid, survey.start_ticks, survey.proc):
        try:
            await survey.monitor.ask(
                "qom-set", path=survey.task.balloon, property=BALLOON_POLLING_PROPERTY, value=survey.task.interval_s
            )
        except VmError:
            is_clean = False
    if not is_clean:
        _save_watch_record(survey)
    await survey.monitor.close()
    return is_clean


class MaskedSource:
    """A source of which some raw fields are always None.

    Args:
        source: The source itself.
        fields: The fields that mean nothing for this VM.
    """

    def __init__(self, source: TelemetrySource, fields: frozenset[str]) -> None:
        self._inner = source
        self._is_kept = tuple(spec.field not in fields for spec in list_raw_fields(source.source))

    @property
    def source(self) -> SourceKind:
        """Kind of the source."""
        return self._inner.source

    async def open(self) -> None:
        """Open the source itself."""
        await self._inner.open()

    async def read(self) -> ReadingValues:
        """Return one reading with the masked fields set to None."""
        values = zip(await self._inner.read(), self._is_kept, strict=True)
        return tuple(value if is_kept else None for value, is_kept in values)

    async def close(self) -> None:
        """Close the source itself."""
        await self._inner.close()


def _build_process_source(survey: VmSurvey) -> tuple[ProcSource, VcpuFinder]:
    finder = VcpuFinder(VcpuThreads(tids=frozenset(survey.tids)), lambda: _find_vcpus(survey))
    source = ProcSource(pid=survey.facts.pid, vcpu_tids=survey.tids, proc=survey.proc, vcpus=finder)
    return source, finder


async def _find_vcpus(survey: VmSurvey) -> VcpuThreads:
    """Return the present vCPUs, from QMP ``query-cpus-fast``, or without a monitor from the names of the threads.

    Raises:
        VmError: If the monitor does not answer.
    """
    pid, proc = survey.facts.pid, survey.proc
    if survey.monitor is None:
        return VcpuThreads(tids=frozenset(find_vcpu_threads(pid, proc)))
    cpus = await survey.monitor.ask("query-cpus-fast")
    return VcpuThreads(
        tids=frozenset(translate_threads(pid, [int(cpu["thread-id"]) for cpu in cpus], proc)),
        numbers=tuple(sorted(int(cpu["cpu-index"]) for cpu in cpus)),
    )


async def _open_monitor_source(survey: VmSurvey, finder: VcpuFinder) -> QmpSource | None:
    """Open the monitor's source, and mask what it does not answer; None if it answers nothing."""
    if survey.monitor is None:
        return None
    is_kvm = survey.facts.accel == "kvm"
    source = QmpSource(
        monitor=survey.monitor,
        vcpus=survey.facts.vcpus,
        clock=survey.clock,
        balloon=survey.task.balloon,
        registers=not is_kvm,
        jit=JitUse.NEVER if is_kvm else survey.jit,
    )
    with suppress(VmError, KeyError, TypeError, ValueError):
        vcpus = await _find_vcpus(survey)
        finder.current = vcpus if vcpus.tids else finder.current
    source.vcpu_numbers = lambda: finder.current.numbers
    try:
        await source.open()
        await _mask_unanswered(survey, source)
    except (VmError, KeyError, TypeError, ValueError) as exc:
        reason = str(exc) if isinstance(exc, VmError) else "the monitor's answers have an unknown shape"
        survey.mask(SourceKind.QMP, reason)
        await source.close()
        return None
    return source


async def _mask_unanswered(survey: VmSurvey, source: QmpSource) -> None:
    """Mask the fields that this QEMU does not provide, after a few readings."""
    fields = tuple(spec.field for spec in list_raw_fields(SourceKind.QMP))
    expected = frozenset(fields) - REGISTER_FIELDS - BALLOON_FIELDS  # those two may come later
    silent = expected
    for _ in range(_PROBE_READINGS):
        values = await source.read()
        silent -= {name for name, value in zip(fields, values, strict=True) if value is not None}
        if not silent - JIT_FIELDS:
            break
    if silent == expected:
        survey.mask(SourceKind.QMP, "the monitor answered no query")
        return
    if silent & JIT_FIELDS:
        survey.mask(SourceKind.QMP, _explain_missing_jit(survey, source), silent & JIT_FIELDS)
    if "vq_blk" in silent:
        survey.mask(SourceKind.QMP, "the VM has no virtio-blk disk whose queues can be read", frozenset({"vq_blk"}))
    survey.mask(SourceKind.QMP, "the monitor gave no answer", silent)
    source.drop_fields(silent)
    facts, text = survey.facts, ""
    if survey.monitor is not None and facts.accel != "kvm":
        with suppress(VmError):
            text = str(await survey.monitor.ask("human-monitor-command", **{"command-line": "info registers"}))
    if parse_registers(text) is None:
        reason = f"the registers of {facts.arch} under {facts.accel} do not show it"
        survey.mask(SourceKind.QMP, reason, REGISTER_FIELDS)


def _explain_missing_jit(survey: VmSurvey, source: QmpSource) -> str:
    if survey.facts.accel != "tcg":
        return f"only TCG counts it, this VM runs on {survey.facts.accel or 'another accelerator'}"
    if survey.jit is JitUse.NEVER:
        return (
            "not read: QEMU stops while it counts, longer the longer the guest has run; name a channel set that "
            "contains it with --channels to read it while that is fast"
        )
    return source.find_give_up_reason("jit_tb") or "the monitor gave no answer"


async def _open_network_source(survey: VmSurvey) -> TelemetrySource | None:
    """Open the best network source: captured frames, else counters of the taps, else None and everything masked."""
    reason = "the VM has no network card that can be captured"
    if survey.monitor and survey.nic and survey.task.folder:
        capture = CaptureSource(
            monitor=survey.monitor,
            folder=Path(survey.task.folder),
            ids=survey.task.objects,
            pid=survey.facts.pid,
            proc=survey.proc,
        )
        try:
            await capture.open()
            return await _accept_capture(survey, capture)
        except VmError as exc:
            reason = str(exc)
    if others := find_cards_without_tap(survey.facts.pid, survey.proc):
        reason = f"{', '.join(others)}: has no tap that counts its frames, and no filter is possible; {reason}"
        survey.mask(SourceKind.NETFLOW, reason)
        return None
    counters = TapSource(pid=survey.facts.pid, proc=survey.proc)
    try:
        await counters.open()
    except OSError:
        survey.mask(SourceKind.NETFLOW, reason)
        return None
    taps = " and ".join(counters.names)
    unknown = frozenset(spec.field for spec in list_raw_fields(SourceKind.NETFLOW)) - TAP_FIELDS
    survey.mask(SourceKind.NETFLOW, f"{taps} counts frames and bytes only, not what is in them", unknown)
    survey.notes.append(f"the network is seen through the counters of {taps} only")
    return counters


async def _accept_capture(survey: VmSurvey, capture: CaptureSource) -> CaptureSource | None:
    """Mask what an open capture cannot provide; close it and return None if that is everything."""
    survey.notes.extend(capture.describe())
    unknown = capture.unknown_fields
    if unknown:
        survey.mask(SourceKind.NETFLOW, "a network card cannot be captured; the notes below name it", unknown)
    if survey.available.intersection(list_source_channels(SourceKind.NETFLOW)):
        return capture
    await capture.close()
    return None


def _save_watch_record(survey: VmSurvey) -> None:
    """Save how the VM was, for the next watcher in case this one and its cleanup process are killed."""
    record = WatchRecord(
        format=WATCH_RECORD_FORMAT,
        vm_pid=survey.facts.pid,
        vm_start_ticks=survey.start_ticks,
        vm_name=survey.facts.name,
        balloon=survey.task.balloon,
        interval_s=survey.task.interval_s,
    )
    write_watch_record(survey.task.folder, record)


async def _find_abandoned(monitor: QmpMonitor, proc: Path) -> tuple[str, ...]:
    """Return the ids of objects in the VM (``qom-list /objects``) whose watcher is certainly dead."""
    with suppress(VmError, KeyError, TypeError):
        names = [str(child["name"]) for child in await monitor.ask("qom-list", path="/objects")]
        return tuple(name for name in names if is_abandoned(name, proc))
    return ()


async def _remove_abandoned(survey: VmSurvey) -> None:
    """Remove the objects and folders of a watcher that was killed together with its cleanup process."""
    if survey.monitor is not None:
        for name in survey.abandoned:
            try:
                await survey.monitor.ask("object-del", id=name)
                survey.notes.append(f"removed {name}, which a killed watcher had left in the VM")
            except VmError as exc:
                survey.notes.append(f"{name}, left by a killed watcher, stays in the VM: {exc}")
    for folder in remove_abandoned_folders(survey.facts.pid, survey.start_ticks, survey.proc):
        survey.notes.append(f"removed {folder}, which a killed watcher had left")


async def _remove_objects(monitor: QmpMonitor, objects: Collection[str]) -> bool:
    """Remove objects that their source did not: one never handed over, or whose QMP command timed out."""
    if not objects:
        return True
    try:
        for child in await monitor.ask("qom-list", path="/objects"):
            if child["name"] in objects:
                await monitor.ask("object-del", id=child["name"])
    except (VmError, KeyError, TypeError):
        return False
    return True


async def _query_facts(monitor: QmpMonitor) -> dict[str, Any]:
    """Return the fields of `VmFacts` that the monitor answers.

    Source: QMP ``query-target``, ``query-kvm``, ``query-version``, ``query-memory-size-summary``, ``qom-get /machine``.
    """
    facts: dict[str, Any] = {}
    with suppress(VmError, KeyError, TypeError):
        facts["arch"] = str((await monitor.ask("query-target"))["arch"])
    with suppress(VmError, KeyError, TypeError):
        facts["accel"] = "kvm" if (await monitor.ask("query-kvm"))["enabled"] else "tcg"
    with suppress(VmError, KeyError, TypeError):
        facts["hypervisor"] = f"QEMU {await monitor.query_version()}"
    with suppress(VmError, KeyError, TypeError, ValueError):
        facts["mem_mib"] = max(1, int((await monitor.ask("query-memory-size-summary"))["base-memory"]) >> 20)
    with suppress(VmError, KeyError, TypeError):
        facts["machine"] = str(await monitor.ask("qom-get", path="/machine", property="type")).removesuffix("-machine")
    return facts


async def _find_nic(monitor: QmpMonitor) -> Nic | None:
    with suppress(VmError):
        text = str(await monitor.ask("human-monitor-command", **{"command-line": "info network"}))
        return next(iter(parse_network_cards(text)), None)
    return None


async def _find_balloon(monitor: QmpMonitor) -> tuple[str, int]:
    """Return the balloon's path in QEMU's object tree and its polling interval (s); an empty path if there is none."""
    for parent in ("/machine/peripheral", "/machine/peripheral-anon"):
        with suppress(VmError, KeyError, TypeError, ValueError):
            for child in await monitor.ask("qom-list", path=parent):
                if str(child["type"]).startswith(_BALLOON_TYPE_PREFIX):
                    path = f"{parent}/{child['name']}"
                    return path, int(await monitor.ask("qom-get", path=path, property=BALLOON_POLLING_PROPERTY))
    return "", 0


def _make_folder_for(machine: RunningVm, proc: Path) -> Path | None:
    try:
        owner = (proc / str(machine.pid)).stat().st_uid
    except OSError:
        owner = os.geteuid()
    return make_private_folder(owner)
