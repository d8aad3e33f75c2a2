"""What a foreign VM's monitor can be asked for: its vCPUs, its counters, and what is masked because it gives no answer."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from phasewatch.channels import CHANNELS, mask_of, raw_fields
from phasewatch.errors import VmError
from phasewatch.live.find import vcpu_threads
from phasewatch.record.proc import ProcSource
from phasewatch.record.qmp import JitUse, QmpSource, parse_registers
from phasewatch.record.threads import VcpuFinder, Vcpus, map_threads
from phasewatch.vocab import Source

if TYPE_CHECKING:
    from phasewatch.live.attach import Survey

JIT_FIELDS = frozenset({"jit_tb", "jit_tlb_partial", "jit_code_bytes"})
BALLOON_FIELDS = frozenset({"bal_minor_faults", "bal_free_bytes", "bal_cache_bytes"})
REGISTER_FIELDS = frozenset({"vcpu_busy", "vcpu_user"})
_TRIES = 3  # a question that is late once is not one that this VM cannot answer
_JIT_CHANNELS = frozenset(c.full_name for c in CHANNELS if c.source is Source.QMP and JIT_FIELDS & set(c.fields))


def jit_use(channel_set: str) -> JitUse:
    """Return whether QEMU is asked for its translation counters: only for a channel set that the user named and that has them.

    Raises:
        UsageError: If there is no such channel set.
    """
    if not channel_set:
        return JitUse.NEVER
    named = {c.full_name for c, is_in in zip(CHANNELS, mask_of(channel_set), strict=True) if is_in}
    return JitUse.WHILE_FAST if named & _JIT_CHANNELS else JitUse.NEVER


async def find_vcpus(found: Survey) -> Vcpus:
    """Return the vCPUs as they are now: by the monitor, else by the names of the threads.

    Raises:
        VmError: If the monitor does not answer.
    """
    pid, proc = found.facts.pid, found.proc
    if found.monitor is None:
        return Vcpus(tids=frozenset(vcpu_threads(pid, proc)))
    cpus = await found.monitor.ask("query-cpus-fast")
    return Vcpus(
        tids=map_threads(pid, [int(cpu["thread-id"]) for cpu in cpus], proc),
        numbers=tuple(sorted(int(cpu["cpu-index"]) for cpu in cpus)),
    )


def open_process(found: Survey) -> tuple[ProcSource, VcpuFinder]:
    """Return the source of the process, and what follows its vCPUs."""
    finder = VcpuFinder(Vcpus(tids=frozenset(found.tids)), lambda: find_vcpus(found))
    source = ProcSource(pid=found.facts.pid, vcpu_tids=found.tids, proc=found.proc, vcpus=finder)
    return source, finder


async def open_monitor(found: Survey, finder: VcpuFinder) -> QmpSource | None:
    """Open the monitor's source; None if it answers nothing. What it does not answer is masked in `found`."""
    if found.monitor is None:
        return None
    source = QmpSource(
        monitor=found.monitor, vcpus=found.facts.vcpus, clock=found.clock, balloon=found.task.balloon,
        registers=found.facts.accel != "kvm", jit=JitUse.NEVER if found.facts.accel == "kvm" else found.jit,
    )  # fmt: skip
    with suppress(VmError, KeyError, TypeError, ValueError):
        vcpus = await find_vcpus(found)
        finder.now = vcpus if vcpus.tids else finder.now
    source.vcpu_numbers = lambda: finder.now.numbers
    try:
        await source.open()
        await _mask_silent(found, source)
    except (VmError, KeyError, TypeError, ValueError) as exc:
        found.mask(Source.QMP, str(exc) if isinstance(exc, VmError) else "the monitor's answers have another shape")
        await source.close()
        return None
    return source


async def _mask_silent(found: Survey, source: QmpSource) -> None:
    """Mask what this QEMU cannot answer, by asking a few times."""
    fields = tuple(spec.field for spec in raw_fields(Source.QMP))
    may_come = REGISTER_FIELDS | BALLOON_FIELDS
    silent = frozenset(fields) - may_come
    for _ in range(_TRIES):
        values = await source.read()
        silent -= {name for name, value in zip(fields, values, strict=True) if value is not None}
        if not silent - JIT_FIELDS:
            break
    if silent == frozenset(fields) - may_come:
        found.mask(Source.QMP, "the monitor answered no question")
        return
    accel = found.facts.accel
    if silent & JIT_FIELDS:
        found.mask(Source.QMP, _why_no_jit(found, source), silent & JIT_FIELDS)
    if "vq_blk" in silent:
        found.mask(Source.QMP, "the VM has no virtio-blk disk whose queues can be read", frozenset({"vq_blk"}))
    found.mask(Source.QMP, "the monitor gave no answer", silent)
    source.drop_silent(silent)
    text = ""
    if found.monitor is not None and accel != "kvm":
        with suppress(VmError):
            text = str(await found.monitor.ask("human-monitor-command", **{"command-line": "info registers"}))
    if parse_registers(text) is None:
        found.mask(Source.QMP, f"the registers of {found.facts.arch} under {accel} do not show it", REGISTER_FIELDS)


def _why_no_jit(found: Survey, source: QmpSource) -> str:
    if found.facts.accel != "tcg":
        return f"only TCG counts it, this VM runs on {found.facts.accel or 'another accelerator'}"
    if found.jit is JitUse.NEVER:
        return (
            "not asked for: QEMU stands still while it counts, longer the more the guest has run; a channel set named "
            "with --channel-set has it asked while it is fast"
        )
    return source.given_up("jit_tb") or "the monitor gave no answer"
