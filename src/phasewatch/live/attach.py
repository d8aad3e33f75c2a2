"""What a foreign VM can give: look first and touch nothing, then open the sources, and say of the rest why it is missing."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phasewatch.channels import CHANNELS, raw_fields
from phasewatch.errors import VmError
from phasewatch.live.dump import DumpSource, TapSource
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
from phasewatch.record.base import Clock, TelemetrySource, Values, nothing_of
from phasewatch.record.proc import ProcSource
from phasewatch.record.process import PROC, translate_threads
from phasewatch.record.qmp import POLLING, Monitor, QmpSource, parse_registers
from phasewatch.vocab import Source

VCPU_FIELDS = frozenset({"vcpu_run_ns", "vcpu_wait_ns", "vcpu_vcs", "vcpu_ics", "aux_run_ns"})
_NIC = re.compile(
    r"^(?P<nic>\S+): index=\d+,type=nic,model=(?P<model>[^,]+),macaddr=(?P<mac>[0-9a-f:]{17})", re.MULTILINE
)
_PEER = re.compile(r"^ \\ (?P<id>\S+): index=\d+,type=(?P<type>[a-z0-9-]+)(?P<rest>.*)$")
_TARGET = "child<virtio-balloon"


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A card of the VM and what it is plugged into; `ifname` is the host's tap device, if it is one."""

    netdev: str
    kind: str
    model: str
    mac: bytes
    ifname: str = ""


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

    @property
    def available(self) -> frozenset[str]:
        """Full names of the channels that it can give."""
        return frozenset(c.full_name for c in CHANNELS) - self.masked.keys()

    def mask(self, source: Source, why: str, fields: frozenset[str] | None = None) -> None:
        """Mark the channels of a source, or those that read some of its fields, as missing."""
        for channel in CHANNELS:
            if channel.source is source and (fields is None or fields & set(channel.fields)):
                self.masked.setdefault(channel.full_name, why)


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
    ids = tuple(f"{name_prefix()}-{letter}" for letter in "ab")
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
    own: TelemetrySource = ProcSource(pid=found.facts.pid, vcpu_tids=found.tids, proc=found.proc)
    if not found.tids:
        own = Blind(own, VCPU_FIELDS)
    sources: list[TelemetrySource] = [own]
    await own.open()
    card = await _open_card(found)
    if card is not None:
        sources.append(card)
    if found.monitor is not None:
        asked = QmpSource(
            monitor=found.monitor, vcpus=found.facts.vcpus, clock=found.clock, balloon=found.task.balloon,
            registers=found.facts.accel != "kvm",
        )  # fmt: skip
        try:
            await asked.open()
            await _mask_silent(found, asked)
            sources.append(asked)
        except VmError as exc:
            found.mask(Source.QMP, str(exc))
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
    """Take out of the VM, and out of memory, what a watcher that was killed with its guard left there."""
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


def parse_network(text: str) -> tuple[Nic, ...]:
    """Read the cards and their backends from the monitor's `info network`."""
    cards: list[Nic] = []
    lines = text.replace("\r", "").splitlines()
    for at, line in enumerate(lines):
        card = _NIC.match(line)
        peer = _PEER.match(lines[at + 1]) if card and at + 1 < len(lines) else None
        if card and peer:
            ifname = re.search(r",ifname=([^,\s]{1,15})", peer["rest"])
            cards.append(
                Nic(
                    netdev=peer["id"], kind=peer["type"], model=card["model"],
                    mac=bytes.fromhex(card["mac"].replace(":", "")), ifname=ifname[1] if ifname else "",
                )
            )  # fmt: skip
    return tuple(cards)


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
    """Open the best view of the network card: every frame's head, else the tap's counters, else none."""
    nic, monitor, why = found.nic, found.monitor, "the VM has no network card that can be looked at"
    tap = nic.ifname if nic and nic.ifname else next(iter(found.taps), "")
    if monitor and nic and found.task.folder and not (tap and _has_vhost(found)):
        card = DumpSource(
            monitor=monitor, netdev=nic.netdev, mac=nic.mac, folder=Path(found.task.folder),
            ids=(found.task.objects[0], found.task.objects[1]),
        )  # fmt: skip
        try:
            await card.open()
            found.notes.append(f"while it is watched the VM carries the filter {found.task.objects[0]} on {nic.netdev}")
            return card
        except VmError as exc:
            why = str(exc)
    if tap:
        counters = TapSource(name=tap)
        with suppress(OSError):
            await counters.open()
            seen = {"out_pkts", "out_bytes", "in_pkts", "in_bytes"}
            unseen = frozenset(spec.field for spec in raw_fields(Source.NETFLOW)) - seen
            found.mask(Source.NETFLOW, f"{tap} counts frames and bytes and looks into none", unseen)
            found.notes.append(f"of the network only the counters of {tap} are seen")
            return counters
    found.mask(Source.NETFLOW, why)
    return None


def _has_vhost(found: Survey) -> bool:
    """Say whether the card's frames pass QEMU by, in the kernel, where no filter sees them."""
    with suppress(OSError):
        for entry in (found.proc / str(found.facts.pid) / "fd").iterdir():
            with suppress(OSError):
                if str(entry.readlink()) == "/dev/vhost-net":
                    return True
    return False


async def _mask_silent(found: Survey, asked: QmpSource) -> None:
    """Mask what this QEMU cannot answer, by asking once."""
    values = await asked.read()
    if values == nothing_of(Source.QMP):
        found.mask(Source.QMP, "the monitor gave no counters of disks")
        return
    may_come = {"vcpu_busy", "vcpu_user", "bal_minor_faults", "bal_free_bytes", "bal_cache_bytes"}
    silent = frozenset(
        spec.field
        for spec, value in zip(raw_fields(Source.QMP), values, strict=True)
        if value is None and spec.field not in may_come
    )
    if silent & {"jit_tb", "jit_tlb_partial"}:
        found.mask(
            Source.QMP,
            f"only TCG counts it, this VM runs on {found.facts.accel or 'another accelerator'}",
            silent & {"jit_tb", "jit_tlb_partial"},
        )
    if "vq_blk" in silent:
        found.mask(Source.QMP, "the VM has no virtio-blk disk whose queues can be read", frozenset({"vq_blk"}))
    found.mask(Source.QMP, "the monitor gave no answer", silent)
    if found.monitor is not None:
        text = ""
        with suppress(VmError):
            text = str(await found.monitor.ask("human-monitor-command", **{"command-line": "info registers"}))
        if found.facts.accel == "kvm" or parse_registers(text) is None:
            why = f"the registers of {found.facts.arch} under {found.facts.accel} do not show it"
            found.mask(Source.QMP, why, frozenset({"vcpu_busy", "vcpu_user"}))


def explain_masks(masked: Mapping[str, str]) -> list[str]:
    """Say in few lines what is missing and why, channels of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for name, why in masked.items():
        by_reason.setdefault(why, []).append(name)
    return [f"{', '.join(names)}: {why}" for why, names in by_reason.items()]
