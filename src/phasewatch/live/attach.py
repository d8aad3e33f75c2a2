"""Attach to a running VM: open its telemetry sources, detach and restore it.

`attach` adds packet filters and, for some channels, dirty bitmaps to the VM, and turns on balloon polling. `detach`
undoes all. A channel that the VM cannot provide is masked in the survey, with the reason.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from phasewatch.channels import list_raw_fields
from phasewatch.errors import VmError
from phasewatch.live.discover import find_vcpu_threads
from phasewatch.live.ownership import (
    find_other_watchers,
    remove_abandoned_folders,
    remove_watch_record,
)
from phasewatch.live.survey import VCPU_FIELDS, VmSurvey, list_source_channels, save_watch_record
from phasewatch.telemetry.af_packet import PacketSource
from phasewatch.telemetry.base import ReadingValues, TelemetrySource
from phasewatch.telemetry.capture import CaptureSource
from phasewatch.telemetry.libvirt import DomainBlockSource, DomainNetworkSource
from phasewatch.telemetry.monitor_sensors import (
    SENSOR_FIELDS,
    MonitorSensors,
    remove_bitmaps,
)
from phasewatch.telemetry.proc import ProcSource
from phasewatch.telemetry.process import translate_threads
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
from phasewatch.telemetry.tap import TAP_FIELDS, TapSource, find_cards_without_tap, find_tap_devices
from phasewatch.telemetry.vcpu_threads import VcpuFinder, VcpuThreads
from phasewatch.types import SourceKind

__all__ = ["MaskedSource", "attach", "detach"]

_PROBE_READINGS = 3  # one late answer does not show that a VM cannot answer


async def attach(survey: VmSurvey) -> tuple[TelemetrySource, ...]:
    """Open every source of a VM, which changes the VM as `survey.task` describes.

    Returns:
        The open sources in the order in which a recorder reads them. A source that cannot be opened is masked.

    Raises:
        OSError: If /proc of the process cannot be read.
    """
    await _remove_abandoned(survey)
    process, vcpus = _build_process_source(survey)
    masked_process: TelemetrySource = process if survey.tids else MaskedSource(process, VCPU_FIELDS)
    await masked_process.open()
    sources = [masked_process, await _open_network_source(survey), await _open_monitor_source(survey, vcpus)]
    return tuple(source for source in sources if source is not None)


async def detach(survey: VmSurvey, sources: Sequence[TelemetrySource]) -> bool:
    """Close the sources and restore the VM; return False if something that was added may still be in it."""
    for source in sources:
        with suppress(Exception):  # whatever one raises, the others must be closed
            await source.close()
    if survey.domain is not None:
        await survey.domain.close()
    if survey.monitor is None:
        return True
    is_clean = await _remove_objects(survey.monitor, survey.task.objects)
    if survey.has_sensors:
        is_clean &= await _remove_own_bitmaps(survey.monitor, survey.task.bitmaps)
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
        save_watch_record(survey)
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


async def _open_monitor_source(survey: VmSurvey, finder: VcpuFinder) -> QmpSource | DomainBlockSource | None:
    """Open the monitor's source, and mask what it does not answer; None if it answers nothing.

    A domain of libvirt without a free monitor is read through libvirt.
    """
    if survey.domain is not None:
        return DomainBlockSource(survey.domain)
    if survey.monitor is None:
        return None
    is_kvm = survey.facts.accel == "kvm"
    sensors = MonitorSensors(clock=survey.clock, bitmaps=survey.task.bitmaps) if survey.has_sensors else None
    source = QmpSource(
        monitor=survey.monitor,
        vcpus=survey.facts.vcpus,
        clock=survey.clock,
        balloon=survey.task.balloon,
        registers=not is_kvm,
        jit=JitUse.NEVER if is_kvm else survey.jit,
        sensors=sensors,
    )
    with suppress(VmError, KeyError, TypeError, ValueError):
        vcpus = await _find_vcpus(survey)
        finder.current = vcpus if vcpus.tids else finder.current
    source.vcpu_numbers = lambda: finder.current.numbers
    try:
        await source.open()
        _mask_missing_sensors(survey, sensors)
        await _mask_unanswered(survey, source)
    except (VmError, KeyError, TypeError, ValueError) as exc:
        reason = str(exc) if isinstance(exc, VmError) else "the monitor's answers have an unknown shape"
        survey.mask(SourceKind.QMP, reason)
        await source.close()
        return None
    return source


def _mask_missing_sensors(survey: VmSurvey, sensors: MonitorSensors | None) -> None:
    """Mask the fields of sensors that are not read, or that this VM does not have."""
    if sensors is None:
        reason = (
            "not read: it adds dirty bitmaps to the disks or samples pages; name a channel set that contains it with "
            "--channels, or save the telemetry"
        )
        survey.mask(SourceKind.QMP, reason, frozenset(SENSOR_FIELDS))
        return
    for field, reason in sensors.missing.items():
        survey.mask(SourceKind.QMP, reason, frozenset({field}))


async def _mask_unanswered(survey: VmSurvey, source: QmpSource) -> None:
    """Mask the fields that this QEMU does not provide, after a few readings."""
    fields = tuple(spec.field for spec in list_raw_fields(SourceKind.QMP))
    expected = frozenset(fields) - REGISTER_FIELDS - BALLOON_FIELDS - frozenset(SENSOR_FIELDS)  # these may come later
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
    """Open the best network source: frames at the taps, else frames from QEMU, else counters of the taps, else None.

    What the source cannot provide is masked.
    """
    packets = PacketSource(pid=survey.facts.pid, monitor=survey.monitor, proc=survey.proc)
    tap_reason = ""
    try:
        await packets.open()
        return await _accept_capture(survey, packets)
    except VmError as exc:
        if find_tap_devices(survey.facts.pid, survey.proc):
            tap_reason = str(exc)
            survey.notes.append(f"frames cannot be captured at the taps: {tap_reason}")
    reason = tap_reason or "the VM has no network card that can be captured"
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
    return await _open_tap_counters(survey, reason)


async def _open_tap_counters(survey: VmSurvey, reason: str) -> TapSource | DomainNetworkSource | None:
    """Open the counters of the taps, and mask what they do not show; None if there are none.

    Args:
        survey: The VM.
        reason: Why its frames cannot be captured.
    """
    if others := find_cards_without_tap(survey.facts.pid, survey.proc):
        reason = f"{', '.join(others)}: has no tap that counts its frames, and no filter is possible; {reason}"
        survey.mask(SourceKind.NETFLOW, reason)
        return None
    counters = TapSource(pid=survey.facts.pid, proc=survey.proc)
    try:
        await counters.open()
    except OSError:
        return await _open_domain_network(survey, reason)
    _mask_frame_contents(survey, " and ".join(counters.names))
    return counters


async def _open_domain_network(survey: VmSurvey, reason: str) -> DomainNetworkSource | None:
    """Open libvirt's counters of the network cards; None and everything masked if there are none."""
    if survey.domain is not None:
        counters = DomainNetworkSource(survey.domain)
        with suppress(VmError):
            await counters.open()
            _mask_frame_contents(survey, f"libvirt ({' and '.join(survey.domain.taps)})")
            return counters
    survey.mask(SourceKind.NETFLOW, reason)
    return None


def _mask_frame_contents(survey: VmSurvey, taps: str) -> None:
    """Mask what the counters of taps do not show."""
    unknown = frozenset(spec.field for spec in list_raw_fields(SourceKind.NETFLOW)) - TAP_FIELDS
    survey.mask(SourceKind.NETFLOW, f"{taps} counts frames and bytes only, not what is in them", unknown)
    survey.notes.append(f"the network is seen through the counters of {taps} only")


async def _accept_capture(
    survey: VmSurvey, capture: PacketSource | CaptureSource
) -> PacketSource | CaptureSource | None:
    """Mask what an open capture cannot provide; close it and return None if that is everything."""
    survey.notes.extend(capture.describe())
    unknown = capture.unknown_fields
    if unknown:
        survey.mask(SourceKind.NETFLOW, "a network card cannot be captured; the notes below name it", unknown)
    if survey.available.intersection(list_source_channels(SourceKind.NETFLOW)):
        return capture
    await capture.close()
    return None


async def _remove_abandoned(survey: VmSurvey) -> None:
    """Remove the objects and folders of a watcher that was killed together with its cleanup process."""
    if survey.monitor is not None:
        gone: tuple[str, ...] = ()
        with suppress(VmError, KeyError, TypeError):
            gone = await remove_bitmaps(survey.monitor.ask, survey.abandoned)
        survey.notes.extend(f"removed the dirty bitmap {name}, which a killed watcher had left" for name in set(gone))
        for name in survey.abandoned:
            if name in gone:
                continue
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


async def _remove_own_bitmaps(monitor: QmpMonitor, names: Collection[str]) -> bool:
    """Remove dirty bitmaps that their source did not; return whether none is left."""
    try:
        await remove_bitmaps(monitor.ask, names)
    except (VmError, KeyError, TypeError):
        return False
    return True
