"""What a foreign VM can give: look first and touch nothing, then open the sources, and say of the rest why it is missing."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phasewatch.channels import CHANNELS, raw_fields
from phasewatch.errors import VmError
from phasewatch.live.asking import open_monitor, open_process
from phasewatch.live.capture import CaptureSource, object_ids
from phasewatch.live.cards import Nic, parse_network
from phasewatch.live.find import Running, vcpu_threads
from phasewatch.live.guard import Task
from phasewatch.live.ownership import FORMAT as RECORD_FORMAT
from phasewatch.live.ownership import (
    WatchRecord,
    find_folders,
    find_others,
    forget_record,
    is_abandoned,
    make_private_folder,
    name_prefix,
    original_interval,
    remove_abandoned,
    write_record,
)
from phasewatch.live.reach import check_permission, connect
from phasewatch.live.tap import SEEN_FIELDS, TapSource, cards_without_tap
from phasewatch.record.base import Clock, TelemetrySource, Values
from phasewatch.record.process import PROC, translate_threads
from phasewatch.record.qmp import POLLING, JitUse, Monitor
from phasewatch.vocab import Source

VCPU_FIELDS = frozenset({"vcpu_run_ns", "vcpu_wait_ns", "vcpu_vcs", "vcpu_ics", "aux_run_ns"})
_TARGET = "child<virtio-balloon"


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
class Survey:
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
    monitor: Monitor | None
    tids: tuple[int, ...]
    nic: Nic | None
    taps: tuple[str, ...]
    task: Task
    clock: Clock
    start_ticks: int = 0
    abandoned: tuple[str, ...] = ()
    masked: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    proc: Path = PROC
    jit: JitUse = JitUse.NEVER  # whether `attach` asks QEMU for its translation counters

    @property
    def available(self) -> frozenset[str]:
        """Full names of the channels that it can give."""
        return frozenset(c.full_name for c in CHANNELS) - self.masked.keys()

    def mask(self, source: Source, why: str, fields: frozenset[str] | None = None) -> None:
        """Mark the channels of a source, or those that read some of its fields, as missing."""
        for name in channels_of(source, fields):
            self.masked.setdefault(name, why)


def channels_of(source: Source, fields: Collection[str] | None = None) -> tuple[str, ...]:
    """Return full names of the channels of a source, or of those that read some of its fields."""
    own = (c for c in CHANNELS if c.source is source)
    return tuple(c.full_name for c in own if fields is None or not set(c.fields).isdisjoint(fields))


async def survey(machine: Running, *, qmp: Path | None, clock: Clock, proc: Path = PROC) -> Survey:
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
    monitor, why = await connect(machine, qmp, proc)
    facts = {"arch": machine.arch, "accel": machine.accel, "machine": "", "hypervisor": "", "mem_mib": 1}
    tids = vcpu_threads(machine.pid, proc)
    nic, balloon, interval = None, "", 0
    if monitor is not None:
        tids = translate_threads(machine.pid, await monitor.vcpu_tids(), proc) or ()
        facts |= await _facts(monitor)
        nic = await _find_nic(monitor)
        balloon, interval = await _find_balloon(monitor)
    abandoned = await _find_abandoned(monitor, proc) if monitor else ()
    interval = original_interval(
        interval, find_folders(proc), is_marked=bool(abandoned), vm_pid=machine.pid, vm_start_ticks=machine.start_ticks
    )
    folder = _private_folder(machine, proc) if monitor and (nic or balloon) else ""
    ids = object_ids(name_prefix())
    found = Survey(
        facts=VmFacts(
            pid=machine.pid, name=machine.name, host_id=machine.host_id, vcpus=max(1, len(tids)), nic=nic.model if nic else "", **facts,  # type: ignore[arg-type]
        ),
        monitor=monitor, tids=tids, nic=nic, taps=machine.taps, clock=clock, proc=proc, start_ticks=machine.start_ticks,
        task=Task(
            vm_pid=machine.pid, vm_start_ticks=machine.start_ticks, proc=str(proc),
            qmp=str(monitor.path) if monitor else "", objects=ids if monitor and nic else (), balloon=balloon,
            interval_s=interval, folder=folder,
        ),
        abandoned=abandoned,
    )  # fmt: skip
    record_watch(found)
    found.mask(Source.GUEST, "nothing runs in the guest for a watcher")
    if monitor is None:
        found.mask(Source.QMP, why)
        found.notes.append(f"no QEMU monitor: {why}")
        found.notes.append("without a monitor nobody sees whether the VM is paused, suspended, reset or restored")
    elif not balloon:
        found.mask(
            Source.QMP, "the VM has no balloon", frozenset({"bal_minor_faults", "bal_free_bytes", "bal_cache_bytes"})
        )
    if not tids:
        found.mask(Source.PROC, "nobody names the vCPU threads (start QEMU with -name X,debug-threads=on)", VCPU_FIELDS)
    return found


async def attach(found: Survey) -> tuple[TelemetrySource, ...]:
    """Open every source that the VM has; from here on it carries what `found.task` says.

    Returns:
        The sources in the order in which the recorder reads them. What cannot be opened is masked in `found`.
    """
    await _remove_abandoned(found)
    process, vcpus = open_process(found)
    own: TelemetrySource = process
    if not found.tids:
        own = Blind(own, VCPU_FIELDS)
    sources: list[TelemetrySource] = [own]
    await own.open()
    card = await _open_card(found)
    if card is not None:
        sources.append(card)
    asked = await open_monitor(found, vcpus)
    if asked is not None:
        sources.append(asked)
    return tuple(sources)


async def detach(found: Survey, sources: Sequence[TelemetrySource]) -> bool:
    """Close the sources and give the VM back as it was; False if something of ours may still stand in it."""
    for source in sources:
        with suppress(Exception):  # whatever one met, the others are closed
            await source.close()
    if found.monitor is None:
        return True
    left = await _take_out(found.monitor, found.task.objects)
    forget_record(found.task.folder)  # before others are looked for, else two that end at once wait for each other
    if found.task.balloon and not find_others(found.facts.pid, found.start_ticks, found.proc):
        try:
            await found.monitor.ask("qom-set", path=found.task.balloon, property=POLLING, value=found.task.interval_s)
        except VmError:
            left = False
    if not left:
        record_watch(found)
    await found.monitor.close()
    return left


def record_watch(found: Survey) -> None:
    """Write down how the VM was, for the next watcher, should this one and its guard be killed."""
    facts, task = found.facts, found.task
    record = WatchRecord(
        format=RECORD_FORMAT, vm_pid=facts.pid, vm_start_ticks=found.start_ticks, vm_name=facts.name, balloon=task.balloon,
        interval_s=task.interval_s,
    )  # fmt: skip
    write_record(task.folder, record)


async def _find_abandoned(monitor: Monitor, proc: Path) -> tuple[str, ...]:
    """Return the ids of objects that a watcher which is dead for certain left in the VM."""
    with suppress(VmError, KeyError, TypeError):
        names = [str(child["name"]) for child in await monitor.ask("qom-list", path="/objects")]
        return tuple(name for name in names if is_abandoned(name, proc))
    return ()


async def _remove_abandoned(found: Survey) -> None:
    """Remove from the VM and from memory what a watcher that was killed with its guard left there."""
    if found.monitor is not None:
        for name in found.abandoned:
            try:
                await found.monitor.ask("object-del", id=name)
                found.notes.append(f"took out {name}, which a watcher that was killed had left in the VM")
            except VmError as exc:
                found.notes.append(f"{name}, left by a watcher that was killed, stays in the VM: {exc}")
    for folder in remove_abandoned(found.facts.pid, found.start_ticks, found.proc):
        found.notes.append(f"removed {folder}, which a watcher that was killed had left")


async def _take_out(monitor: Monitor, objects: Collection[str]) -> bool:
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


class Blind:
    """A source some of whose fields mean nothing here: they are None."""

    def __init__(self, source: TelemetrySource, fields: frozenset[str]) -> None:
        self._own = source
        self._kept = tuple(spec.field not in fields for spec in raw_fields(source.source))

    @property
    def source(self) -> Source:
        """Which rows it fills."""
        return self._own.source

    async def open(self) -> None:
        """Open the source itself."""
        await self._own.open()

    async def read(self) -> Values:
        """Take one reading without those fields."""
        return tuple(v if kept else None for v, kept in zip(await self._own.read(), self._kept, strict=True))

    async def close(self) -> None:
        """Close the source itself."""
        await self._own.close()


async def _facts(monitor: Monitor) -> dict[str, Any]:
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


async def _find_nic(monitor: Monitor) -> Nic | None:
    with suppress(VmError):
        text = str(await monitor.ask("human-monitor-command", **{"command-line": "info network"}))
        return next(iter(parse_network(text)), None)
    return None


async def _find_balloon(monitor: Monitor) -> tuple[str, int]:
    """Give the balloon's path in QEMU's tree and its polling interval; empty where there is none."""
    for parent in ("/machine/peripheral", "/machine/peripheral-anon"):
        with suppress(VmError, KeyError, TypeError, ValueError):
            for child in await monitor.ask("qom-list", path=parent):
                if str(child["type"]).startswith(_TARGET):
                    path = f"{parent}/{child['name']}"
                    return path, int(await monitor.ask("qom-get", path=path, property=POLLING))
    return "", 0


def _private_folder(machine: Running, proc: Path) -> str:
    try:
        owner = (proc / str(machine.pid)).stat().st_uid
    except OSError:
        owner = os.geteuid()
    return make_private_folder(owner)


async def _open_card(found: Survey) -> TelemetrySource | None:
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
                found.mask(Source.NETFLOW, "a network card cannot be looked at; the notes below name it", unknown)
            if found.available.intersection(channels_of(Source.NETFLOW)):
                return cards
            await cards.close()
            return None
        except VmError as exc:
            why = str(exc)
    if others := cards_without_tap(found.facts.pid, found.proc):
        found.mask(Source.NETFLOW, f"{', '.join(others)}: no tap counts its frames, and no filter can; {why}")
        return None
    counters = TapSource(pid=found.facts.pid, proc=found.proc)
    try:
        await counters.open()
    except OSError:
        found.mask(Source.NETFLOW, why)
        return None
    taps = " and ".join(counters.names)
    unseen = frozenset(spec.field for spec in raw_fields(Source.NETFLOW)) - SEEN_FIELDS
    found.mask(Source.NETFLOW, f"{taps} counts frames and bytes and looks into none", unseen)
    found.notes.append(f"of the network only the counters of {taps} are seen")
    return counters


def explain_masks(masked: Mapping[str, str]) -> list[str]:
    """Say in few lines what is missing and why, channels of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for name, why in masked.items():
        by_reason.setdefault(why, []).append(name)
    return [f"{', '.join(names)}: {why}" for why, names in by_reason.items()]
