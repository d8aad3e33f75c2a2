"""What a foreign VM can give: look first and touch nothing, then open the sources, and say of the rest why it is missing."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phasewatch.channels import CHANNELS, build_channel_mask, list_raw_fields
from phasewatch.errors import VmError
from phasewatch.live.cleanup import CleanupTask
from phasewatch.live.discover import RunningVm, find_vcpu_threads
from phasewatch.live.ownership import WATCH_RECORD_FORMAT as RECORD_FORMAT
from phasewatch.live.ownership import (
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
from phasewatch.live.reach import check_permission, connect_monitor
from phasewatch.telemetry.base import AsyncClock, ReadingValues, TelemetrySource
from phasewatch.telemetry.capture import CaptureSource, build_filter_ids
from phasewatch.telemetry.cards import Nic, parse_network_cards
from phasewatch.telemetry.proc import ProcSource
from phasewatch.telemetry.process import PROC_ROOT, translate_threads
from phasewatch.telemetry.qmp import BALLOON_POLLING_PROPERTY, JitUse, QmpMonitor, QmpSource, parse_registers
from phasewatch.telemetry.tap import TAP_FIELDS, TapSource, find_cards_without_tap
from phasewatch.telemetry.threads import VcpuFinder, VcpuThreads, map_threads
from phasewatch.types import SourceKind

if TYPE_CHECKING:
    pass  # own


JIT_FIELDS = frozenset({"jit_tb", "jit_tlb_partial", "jit_code_bytes"})
BALLOON_FIELDS = frozenset({"bal_minor_faults", "bal_free_bytes", "bal_cache_bytes"})
REGISTER_FIELDS = frozenset({"vcpu_busy", "vcpu_user"})
_SILENCE_ATTEMPTS = 3  # a question that is late once is not one that this VM cannot answer
_JIT_CHANNELS = frozenset(c.full_name for c in CHANNELS if c.source is SourceKind.QMP and JIT_FIELDS & set(c.fields))


def choose_jit_use(channel_set: str) -> JitUse:
    """Return whether QEMU is asked for its translation counters: only for a channel set that the user named and that has them.

    Raises:
        UsageError: If there is no such channel set.
    """
    if not channel_set:
        return JitUse.NEVER
    named = {c.full_name for c, is_in in zip(CHANNELS, build_channel_mask(channel_set), strict=True) if is_in}
    return JitUse.WHILE_FAST if named & _JIT_CHANNELS else JitUse.NEVER


async def _find_vcpus(found: VmSurvey) -> VcpuThreads:
    """Return the vCPUs as they are now: by the monitor, else by the names of the threads.

    Raises:
        VmError: If the monitor does not answer.
    """
    pid, proc = found.facts.pid, found.proc
    if found.monitor is None:
        return VcpuThreads(tids=frozenset(find_vcpu_threads(pid, proc)))
    cpus = await found.monitor.ask("query-cpus-fast")
    return VcpuThreads(
        tids=map_threads(pid, [int(cpu["thread-id"]) for cpu in cpus], proc),
        numbers=tuple(sorted(int(cpu["cpu-index"]) for cpu in cpus)),
    )


def open_process_source(found: VmSurvey) -> tuple[ProcSource, VcpuFinder]:
    """Return the source of the process, and what follows its vCPUs."""
    finder = VcpuFinder(VcpuThreads(tids=frozenset(found.tids)), lambda: _find_vcpus(found))
    source = ProcSource(pid=found.facts.pid, vcpu_tids=found.tids, proc=found.proc, vcpus=finder)
    return source, finder


async def open_monitor_source(found: VmSurvey, finder: VcpuFinder) -> QmpSource | None:
    """Open the monitor's source; None if it answers nothing. What it does not answer is masked in `found`."""
    if found.monitor is None:
        return None
    source = QmpSource(
        monitor=found.monitor, vcpus=found.facts.vcpus, clock=found.clock, balloon=found.task.balloon,
        registers=found.facts.accel != "kvm", jit=JitUse.NEVER if found.facts.accel == "kvm" else found.jit,
    )  # fmt: skip
    with suppress(VmError, KeyError, TypeError, ValueError):
        vcpus = await _find_vcpus(found)
        finder.current = vcpus if vcpus.tids else finder.current
    source.vcpu_numbers = lambda: finder.current.numbers
    try:
        await source.open()
        await _mask_unanswered(found, source)
    except (VmError, KeyError, TypeError, ValueError) as exc:
        found.mask(SourceKind.QMP, str(exc) if isinstance(exc, VmError) else "the monitor's answers have another shape")
        await source.close()
        return None
    return source


async def _mask_unanswered(found: VmSurvey, source: QmpSource) -> None:
    """Mask what this QEMU cannot answer, by asking a few times."""
    fields = tuple(spec.field for spec in list_raw_fields(SourceKind.QMP))
    may_come = REGISTER_FIELDS | BALLOON_FIELDS
    silent = frozenset(fields) - may_come
    for _ in range(_SILENCE_ATTEMPTS):
        values = await source.read()
        silent -= {name for name, value in zip(fields, values, strict=True) if value is not None}
        if not silent - JIT_FIELDS:
            break
    if silent == frozenset(fields) - may_come:
        found.mask(SourceKind.QMP, "the monitor answered no question")
        return
    accel = found.facts.accel
    if silent & JIT_FIELDS:
        found.mask(SourceKind.QMP, _explain_missing_jit(found, source), silent & JIT_FIELDS)
    if "vq_blk" in silent:
        found.mask(SourceKind.QMP, "the VM has no virtio-blk disk whose queues can be read", frozenset({"vq_blk"}))
    found.mask(SourceKind.QMP, "the monitor gave no answer", silent)
    source.drop_fields(silent)
    text = ""
    if found.monitor is not None and accel != "kvm":
        with suppress(VmError):
            text = str(await found.monitor.ask("human-monitor-command", **{"command-line": "info registers"}))
    if parse_registers(text) is None:
        found.mask(SourceKind.QMP, f"the registers of {found.facts.arch} under {accel} do not show it", REGISTER_FIELDS)


def _explain_missing_jit(found: VmSurvey, source: QmpSource) -> str:
    if found.facts.accel != "tcg":
        return f"only TCG counts it, this VM runs on {found.facts.accel or 'another accelerator'}"
    if found.jit is JitUse.NEVER:
        return (
            "not asked for: QEMU stands still while it counts, longer the more the guest has run; a channel set named "
            "with --channels has it asked while it is fast"
        )
    return source.given_up_reason("jit_tb") or "the monitor gave no answer"


VCPU_FIELDS = frozenset({"vcpu_run_ns", "vcpu_wait_ns", "vcpu_vcs", "vcpu_ics", "aux_run_ns"})
_BALLOON_TYPE_PREFIX = "child<virtio-balloon"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmFacts:
    """What is known of the VM without its help; texts may be empty."""

    pid: int
    name: str
    host_id: str
    arch: str
    accel: str
    vcpus: int
    mem_mib: int
    machine: str
    hypervisor: str
    nic: str


@dataclass(slots=True, kw_only=True)
class VmSurvey:
    """What was found by looking: nothing in the VM was changed.

    Attributes:
        monitor: Connected; None where there is none to be had.
        tids: vCPU threads; empty where nobody names them.
        start_ticks: When its process started, so that a later one with its number is not taken for it.
        task: What must be undone once `attach` has run; a guard is to know it before.
        abandoned: Objects that a dead watcher left in it; `attach` takes them out.
        masked: Channel → why this VM cannot give it.
        notes: What the user must know.
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
    jit: JitUse = JitUse.NEVER  # whether `attach` asks QEMU for its translation counters

    @property
    def available(self) -> frozenset[str]:
        """Full names of the channels that it can give."""
        return frozenset(c.full_name for c in CHANNELS) - self.masked.keys()

    def mask(self, source: SourceKind, why: str, fields: frozenset[str] | None = None) -> None:
        """Mark the channels of a source, or those that read some of its fields, as missing."""
        for name in list_source_channels(source, fields):
            self.masked.setdefault(name, why)


def list_source_channels(source: SourceKind, fields: Collection[str] | None = None) -> tuple[str, ...]:
    """Return full names of the channels of a source, or of those that read some of its fields."""
    own = (c for c in CHANNELS if c.source is source)
    return tuple(c.full_name for c in own if fields is None or not set(c.fields).isdisjoint(fields))


async def survey_vm(machine: RunningVm, *, qmp: Path | None, clock: AsyncClock, proc: Path = PROC_ROOT) -> VmSurvey:
    """Look at a running machine.

    Args:
        machine: From `find`.
        qmp: A socket that the user named: it must answer. Otherwise the machine's own are tried.
        clock: For what is opened later.
        proc: Where /proc is.

    Raises:
        MachineError: If its /proc may not be read.
        VmError: If the named socket does not answer, or is another machine's.
    """
    check_permission(machine, proc)
    monitor, why = await connect_monitor(machine, qmp, proc)
    facts = {"arch": machine.arch, "accel": machine.accel, "machine": "", "hypervisor": "", "mem_mib": 1}
    tids = find_vcpu_threads(machine.pid, proc)
    nic, balloon, interval = None, "", 0
    if monitor is not None:
        tids = translate_threads(machine.pid, await monitor.vcpu_tids(), proc) or ()
        facts |= await _query_facts(monitor)
        nic = await _find_nic(monitor)
        balloon, interval = await _find_balloon(monitor)
    abandoned = await _find_abandoned(monitor, proc) if monitor else ()
    interval = find_original_interval(
        interval,
        find_watch_folders(proc),
        is_marked=bool(abandoned),
        vm_pid=machine.pid,
        vm_start_ticks=machine.start_ticks,
    )
    folder = _make_vm_folder(machine, proc) if monitor and (nic or balloon) else ""
    ids = build_filter_ids(build_name_prefix())
    found = VmSurvey(
        facts=VmFacts(
            pid=machine.pid, name=machine.name, host_id=machine.host_id, vcpus=max(1, len(tids)), nic=nic.model if nic else "", **facts,  # type: ignore[arg-type]
        ),
        monitor=monitor, tids=tids, nic=nic, taps=machine.taps, clock=clock, proc=proc, start_ticks=machine.start_ticks,
        task=CleanupTask(
            vm_pid=machine.pid, vm_start_ticks=machine.start_ticks, proc=str(proc),
            qmp=str(monitor.path) if monitor else "", objects=ids if monitor and nic else (), balloon=balloon,
            interval_s=interval, folder=folder,
        ),
        abandoned=abandoned,
    )  # fmt: skip
    _save_watch_record(found)
    found.mask(SourceKind.GUEST, "nothing runs in the guest for a watcher")
    if monitor is None:
        found.mask(SourceKind.QMP, why)
        found.notes.append(f"no QEMU monitor: {why}")
        found.notes.append("without a monitor nobody sees whether the VM is paused, suspended, reset or restored")
    elif not balloon:
        found.mask(
            SourceKind.QMP,
            "the VM has no balloon",
            frozenset({"bal_minor_faults", "bal_free_bytes", "bal_cache_bytes"}),
        )
    if not tids:
        found.mask(
            SourceKind.PROC, "nobody names the vCPU threads (start QEMU with -name X,debug-threads=on)", VCPU_FIELDS
        )
    return found


async def attach(found: VmSurvey) -> tuple[TelemetrySource, ...]:
    """Open every source that the VM has; from here on it carries what `found.task` says.

    Returns:
        The sources in the order in which the recorder reads them. What cannot be opened is masked in `found`.
    """
    await _remove_abandoned(found)
    process, vcpus = open_process_source(found)
    own: TelemetrySource = process
    if not found.tids:
        own = MaskedSource(own, VCPU_FIELDS)
    sources: list[TelemetrySource] = [own]
    await own.open()
    card = await _open_network_source(found)
    if card is not None:
        sources.append(card)
    asked = await open_monitor_source(found, vcpus)
    if asked is not None:
        sources.append(asked)
    return tuple(sources)


async def detach(found: VmSurvey, sources: Sequence[TelemetrySource]) -> bool:
    """Close the sources and give the VM back as it was; False if something of ours may still stand in it."""
    for source in sources:
        with suppress(Exception):  # whatever one met, the others are closed
            await source.close()
    if found.monitor is None:
        return True
    left = await _remove_objects(found.monitor, found.task.objects)
    remove_watch_record(
        found.task.folder
    )  # before others are looked for, else two that end at once wait for each other
    if found.task.balloon and not find_other_watchers(found.facts.pid, found.start_ticks, found.proc):
        try:
            await found.monitor.ask(
                "qom-set", path=found.task.balloon, property=BALLOON_POLLING_PROPERTY, value=found.task.interval_s
            )
        except VmError:
            left = False
    if not left:
        _save_watch_record(found)
    await found.monitor.close()
    return left


def _save_watch_record(found: VmSurvey) -> None:
    """Write down how the VM was, for the next watcher, should this one and its guard be killed."""
    facts, task = found.facts, found.task
    record = WatchRecord(
        format=RECORD_FORMAT, vm_pid=facts.pid, vm_start_ticks=found.start_ticks, vm_name=facts.name, balloon=task.balloon,
        interval_s=task.interval_s,
    )  # fmt: skip
    write_watch_record(task.folder, record)


async def _find_abandoned(monitor: QmpMonitor, proc: Path) -> tuple[str, ...]:
    """Return the ids of objects that a watcher which is dead for certain left in the VM."""
    with suppress(VmError, KeyError, TypeError):
        names = [str(child["name"]) for child in await monitor.ask("qom-list", path="/objects")]
        return tuple(name for name in names if is_abandoned(name, proc))
    return ()


async def _remove_abandoned(found: VmSurvey) -> None:
    """Remove from the VM and from memory what a watcher that was killed with its guard left there."""
    if found.monitor is not None:
        for name in found.abandoned:
            try:
                await found.monitor.ask("object-del", id=name)
                found.notes.append(f"took out {name}, which a watcher that was killed had left in the VM")
            except VmError as exc:
                found.notes.append(f"{name}, left by a watcher that was killed, stays in the VM: {exc}")
    for folder in remove_abandoned_folders(found.facts.pid, found.start_ticks, found.proc):
        found.notes.append(f"removed {folder}, which a watcher that was killed had left")


async def _remove_objects(monitor: QmpMonitor, objects: Collection[str]) -> bool:
    """Take out of the VM what its source did not: one that was never handed over, or whose question timed out."""
    if not objects:
        return True
    try:
        for child in await monitor.ask("qom-list", path="/objects"):
            if child["name"] in objects:
                await monitor.ask("object-del", id=child["name"])
    except (VmError, KeyError, TypeError):
        return False
    return True


class MaskedSource:
    """A source some of whose fields mean nothing here: they are None."""

    def __init__(self, source: TelemetrySource, fields: frozenset[str]) -> None:
        self._inner = source
        self._kept = tuple(spec.field not in fields for spec in list_raw_fields(source.source))

    @property
    def source(self) -> SourceKind:
        """Which rows it fills."""
        return self._inner.source

    async def open(self) -> None:
        """Open the source itself."""
        await self._inner.open()

    async def read(self) -> ReadingValues:
        """Take one reading without those fields."""
        return tuple(v if kept else None for v, kept in zip(await self._inner.read(), self._kept, strict=True))

    async def close(self) -> None:
        """Close the source itself."""
        await self._inner.close()


async def _query_facts(monitor: QmpMonitor) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    with suppress(VmError, KeyError, TypeError):
        facts["arch"] = str((await monitor.ask("query-target"))["arch"])
    with suppress(VmError, KeyError, TypeError):
        facts["accel"] = "kvm" if (await monitor.ask("query-kvm"))["enabled"] else "tcg"
    with suppress(VmError, KeyError, TypeError):
        facts["hypervisor"] = f"QEMU {await monitor.version()}"
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
    """Give the balloon's path in QEMU's tree and its polling interval; empty where there is none."""
    for parent in ("/machine/peripheral", "/machine/peripheral-anon"):
        with suppress(VmError, KeyError, TypeError, ValueError):
            for child in await monitor.ask("qom-list", path=parent):
                if str(child["type"]).startswith(_BALLOON_TYPE_PREFIX):
                    path = f"{parent}/{child['name']}"
                    return path, int(await monitor.ask("qom-get", path=path, property=BALLOON_POLLING_PROPERTY))
    return "", 0


def _make_vm_folder(machine: RunningVm, proc: Path) -> str:
    try:
        owner = (proc / str(machine.pid)).stat().st_uid
    except OSError:
        owner = os.geteuid()
    return make_private_folder(owner)


async def _open_network_source(found: VmSurvey) -> TelemetrySource | None:
    """Open the best view of the network cards: every frame's head, else the taps' counters, else none."""
    why = "the VM has no network card that can be looked at"
    if found.monitor and found.nic and found.task.folder:
        cards = CaptureSource(
            monitor=found.monitor, folder=Path(found.task.folder), ids=found.task.objects, pid=found.facts.pid, proc=found.proc
        )  # fmt: skip
        try:
            await cards.open()
            found.notes.extend(cards.describe())
            unknown = cards.unknown_fields
            if unknown:
                found.mask(SourceKind.NETFLOW, "a network card cannot be looked at; the notes below name it", unknown)
            if found.available.intersection(list_source_channels(SourceKind.NETFLOW)):
                return cards
            await cards.close()
            return None
        except VmError as exc:
            why = str(exc)
    if others := find_cards_without_tap(found.facts.pid, found.proc):
        found.mask(SourceKind.NETFLOW, f"{', '.join(others)}: no tap counts its frames, and no filter can; {why}")
        return None
    counters = TapSource(pid=found.facts.pid, proc=found.proc)
    try:
        await counters.open()
    except OSError:
        found.mask(SourceKind.NETFLOW, why)
        return None
    taps = " and ".join(counters.names)
    unseen = frozenset(spec.field for spec in list_raw_fields(SourceKind.NETFLOW)) - TAP_FIELDS
    found.mask(SourceKind.NETFLOW, f"{taps} counts frames and bytes and looks into none", unseen)
    found.notes.append(f"of the network only the counters of {taps} are seen")
    return counters


def explain_masked_channels(masked: Mapping[str, str]) -> list[str]:
    """Say in few lines what is missing and why, channels of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for name, why in masked.items():
        by_reason.setdefault(why, []).append(name)
    return [f"{', '.join(names)}: {why}" for why, names in by_reason.items()]
