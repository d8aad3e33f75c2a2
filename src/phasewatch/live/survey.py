"""Look at a running VM without changing it: its facts, its channels, and what a dead watcher left in it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from phasewatch.channels import CHANNELS, build_channel_mask, has_extended_channels, list_raw_fields
from phasewatch.errors import MachineError, VmError
from phasewatch.live.access import connect_monitor, explain_hidden_io
from phasewatch.live.cleanup import CleanupTask
from phasewatch.live.discover import RunningVm, find_vcpu_threads
from phasewatch.live.ownership import (
    WATCH_RECORD_FORMAT,
    WatchRecord,
    build_name_prefix,
    find_original_interval,
    find_watch_folders,
    is_abandoned,
    make_private_folder,
    write_watch_record,
)
from phasewatch.telemetry.base import AsyncClock
from phasewatch.telemetry.capture import build_filter_ids
from phasewatch.telemetry.libvirt import (
    LIBVIRT_BALLOON_FIELDS,
    LIBVIRT_BLOCK_FIELDS,
    LibvirtDomain,
    LibvirtHypervisor,
    parse_balloon,
    parse_disks,
)
from phasewatch.telemetry.monitor_sensors import (
    build_bitmap_names,
    list_bitmaps,
)
from phasewatch.telemetry.network_cards import Nic, parse_network_cards
from phasewatch.telemetry.process import PROC_ROOT, ProcessHandle, translate_threads
from phasewatch.telemetry.qmp import (
    BALLOON_FIELDS,
    BALLOON_POLLING_PROPERTY,
    JIT_FIELDS,
    JitUse,
    QmpMonitor,
)
from phasewatch.types import SourceKind

__all__ = [
    "VCPU_FIELDS",
    "VmFacts",
    "VmSurvey",
    "choose_jit_use",
    "choose_sensor_use",
    "explain_masked_channels",
    "list_source_channels",
    "save_watch_record",
    "survey_vm",
]

VCPU_FIELDS = frozenset({"vcpu_run_ns", "vcpu_wait_ns", "vcpu_vcs", "vcpu_ics", "aux_run_ns"})
_JIT_CHANNELS = frozenset(c.full_name for c in CHANNELS if c.source is SourceKind.QMP and JIT_FIELDS & set(c.fields))
_BALLOON_TYPE_PREFIX = "child<virtio-balloon"
_IO_FIELDS = frozenset(spec.field for spec in list_raw_fields(SourceKind.PROC) if spec.field.startswith("io_"))
_QMP_FIELDS = frozenset(spec.field for spec in list_raw_fields(SourceKind.QMP))
_MAX_REPORT_AGE_S = 3  # an older report of the balloon means that the guest is asked less than once a second
_DOMAIN_READINGS = 3  # one reading without disks does not show that libvirt cannot read them


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
        domain: The VM's domain of libvirt, read in place of a monitor; None if it has a monitor or is no such domain.
        tids: The vCPU threads, one entry per vCPU; empty if unknown.
        nic: The first network card; None if unknown.
        taps: Tap devices of the VM on the host.
        task: Changes that must be undone once `attach` has run; the cleanup process must know them before.
        clock: Clock of the host.
        start_ticks: Start time of QEMU's process, which tells it from a later one with its pid.
        abandoned: Ids of objects and names of dirty bitmaps that a dead watcher left in the VM; `attach` removes them.
        masked: Channel → reason why this VM cannot provide it.
        notes: Messages for the user.
        proc: Path of /proc.
        jit: Whether `attach` reads QEMU's translation counters.
        has_sensors: Whether `attach` adds dirty bitmaps to the disks, and samples pages.
        process: QEMU's process; opened by the first `is_alive`.
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
    has_sensors: bool = False
    process: ProcessHandle | None = None
    domain: LibvirtDomain | None = None

    @property
    def is_alive(self) -> bool:
        """Whether QEMU's process still runs; a zombie or a later process with its pid does not count."""
        if self.process is None:
            self.process = ProcessHandle(self.facts.pid, self.start_ticks, self.proc)
        return self.process.is_alive

    def enable_sensors(self) -> None:
        """Enable the sensors that change the VM; the cleanup process must know them before `attach` opens them."""
        if self.monitor is not None:
            self.has_sensors = True
            self.task = msgspec.structs.replace(self.task, bitmaps=build_bitmap_names(build_name_prefix()))

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


def choose_sensor_use(channel_set: str, *, is_saved: bool) -> bool:
    """Return whether to open the sensors that change the VM: for a named channel set that has extended channels, and
    for telemetry that is saved.

    Args:
        channel_set: Name that the user gave; empty if none.
        is_saved: Whether the telemetry is saved.

    Raises:
        UsageError: If there is no such channel set.
    """
    mask = build_channel_mask(channel_set) if channel_set else (False,) * len(CHANNELS)
    return is_saved or has_extended_channels(c.full_name for c, is_in in zip(CHANNELS, mask, strict=True) if is_in)


def explain_masked_channels(masked: Mapping[str, str]) -> list[str]:
    """Return one line per reason, with the channels that are missing for it."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in masked.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]


async def survey_vm(
    machine: RunningVm,
    *,
    qmp: Path | None,
    clock: AsyncClock,
    proc: Path = PROC_ROOT,
    hypervisor: LibvirtHypervisor | None = None,
) -> VmSurvey:
    """Look at a running VM without changing it.

    Args:
        machine: From `phasewatch.live.discover`.
        qmp: QMP socket that the user named, which must answer; None tries the VM's own sockets.
        clock: Clock for the sources that `attach` opens.
        proc: Path of /proc.
        hypervisor: The libvirt daemon, asked about a domain of libvirt without a monitor that can be used; None asks
            it nothing.

    Raises:
        MachineError: If its /proc may not be read.
        VmError: If the named socket does not answer, or belongs to another VM.
    """
    opened: list[QmpMonitor | LibvirtDomain] = []
    try:
        return await _survey_vm(machine, opened, qmp=qmp, clock=clock, proc=proc, hypervisor=hypervisor)
    except BaseException:  # an open connection would keep every other client from the VM's monitor
        for connection in opened:
            await connection.close()
        raise


async def _survey_vm(
    machine: RunningVm,
    opened: list[QmpMonitor | LibvirtDomain],
    *,
    qmp: Path | None,
    clock: AsyncClock,
    proc: Path,
    hypervisor: LibvirtHypervisor | None,
) -> VmSurvey:
    hidden_io = explain_hidden_io(machine, proc)
    if hidden_io and not machine.is_libvirt_domain:
        raise MachineError(f"--pid {machine.pid}: {hidden_io}")
    monitor: QmpMonitor | None = None
    no_monitor_reason = ""
    try:
        monitor = await connect_monitor(machine, qmp, proc)
        opened.append(monitor)
    except VmError as exc:
        if qmp is not None:
            raise
        no_monitor_reason = str(exc)
    domain: LibvirtDomain | None = None
    if monitor is None and hypervisor is not None and machine.is_libvirt_domain:
        try:
            domain = await _find_domain(machine, hypervisor)
            opened.append(domain)
        except VmError as exc:
            no_monitor_reason = f"{no_monitor_reason}; {exc}"
    if hidden_io and domain is None:
        raise MachineError(f"--pid {machine.pid}: {hidden_io}")
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
    if domain is not None and isinstance(memory_kib := domain.stats.values.get("balloon.maximum"), int):
        facts = replace(facts, mem_mib=max(1, memory_kib >> 10))
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
        taps=machine.taps or (domain.taps if domain is not None else ()),
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
        domain=domain,
    )
    save_watch_record(survey)
    if hidden_io:
        survey.mask(SourceKind.PROC, hidden_io, _IO_FIELDS)
    _mask_absent(survey, no_monitor_reason)
    return survey


async def _find_domain(machine: RunningVm, hypervisor: LibvirtHypervisor) -> LibvirtDomain:
    """Return the domain of a QEMU process.

    Raises:
        VmError: If libvirt does not answer, or the domain with the process's UUID has another name.
    """
    domain = await hypervisor.add_domain(machine.uuid)
    try:
        if domain.stats.name != machine.name:
            raise VmError(f"libvirt's domain with the UUID {machine.uuid} has another name than process {machine.pid}")
        for _ in range(_DOMAIN_READINGS - 1):
            if parse_disks(domain.stats.values) is not None:
                break
            await domain.find()
    except BaseException:
        await domain.close()
        raise
    return domain


def _mask_absent(survey: VmSurvey, no_monitor_reason: str) -> None:
    survey.mask(SourceKind.GUEST, "no agent runs in the guest")
    if survey.domain is not None:
        _mask_absent_statistics(survey, survey.domain)
    elif survey.monitor is None:
        survey.mask(SourceKind.QMP, no_monitor_reason)
        survey.notes.append(f"no QEMU monitor: {no_monitor_reason}")
        survey.notes.append("without a monitor a pause, suspension, reset or restore of the VM goes unnoticed")
    elif not survey.task.balloon:
        survey.mask(SourceKind.QMP, "the VM has no balloon", BALLOON_FIELDS)
    if not survey.tids:
        reason = "the vCPU threads are unknown (start QEMU with -name X,debug-threads=on)"
        survey.mask(SourceKind.PROC, reason, VCPU_FIELDS)


def _mask_absent_statistics(survey: VmSurvey, domain: LibvirtDomain) -> None:
    """Mask what libvirt's statistics of a domain do not have."""
    survey.notes.append(
        "disks, pauses and resets are read from libvirt, which uses the VM's QMP socket itself; a snapshot that is "
        "restored goes unnoticed"
    )
    reason = "libvirt's statistics do not have it; a QMP socket of its own would give it to phasewatch"
    survey.mask(SourceKind.QMP, reason, _QMP_FIELDS - LIBVIRT_BLOCK_FIELDS - LIBVIRT_BALLOON_FIELDS)
    if parse_disks(domain.stats.values) is None:
        reason = "libvirt cannot read the disks: the domain's monitor hangs, or another client uses it all the time"
        survey.mask(SourceKind.QMP, reason, LIBVIRT_BLOCK_FIELDS)
    report = parse_balloon(domain.stats.values)
    if report is None or survey.clock.wall_ns() // 1_000_000_000 - report[0] > _MAX_REPORT_AGE_S:
        reason = (
            "the guest does not report it once a second: `virsh dommemstat NAME --period 1 --live` asks it to, if the "
            "domain has a balloon"
        )
        survey.mask(SourceKind.QMP, reason, LIBVIRT_BALLOON_FIELDS)


def save_watch_record(survey: VmSurvey) -> None:
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
    """Return the names of objects and dirty bitmaps in the VM whose watcher is certainly dead, or is this process.

    Source: QMP ``qom-list /objects`` and ``query-named-block-nodes``.
    """
    names: list[str] = []
    with suppress(VmError, KeyError, TypeError):
        names += [str(child["name"]) for child in await monitor.ask("qom-list", path="/objects")]
    with suppress(VmError, KeyError, TypeError):
        names += [name for _, name in await list_bitmaps(monitor.ask)]
    # This process is not attached to the VM yet: what bears its name is left from an attempt that failed.
    own = f"{build_name_prefix()}-"
    return tuple(dict.fromkeys(name for name in names if name.startswith(own) or is_abandoned(name, proc)))


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
