"""What the QEMU monitor counts, over its QMP socket: the `qmp` source.

One socket serves one client, and QEMU answers in order, so one connection carries both the 2 Hz queries and the
register samples. `x-` commands are unstable: what a version cannot answer is None, field by field.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from phasewatch.errors import VmError
from phasewatch.record.base import Clock, Values, nothing_of
from phasewatch.vocab import Source

REGISTERS_NS = 100_000_000  # one register read per 0.1 s, whatever the number of vCPUs: else our polling names the host
MIN_SAMPLES = 3  # below this a share of register samples says nothing
BALLOON = "/machine/peripheral/balloon0"
POLLING = "guest-stats-polling-interval"  # seconds; 0, as QEMU starts, means never

_JIT = {
    "tb": re.compile(r"^TB count\s+(\d+)", re.MULTILINE),
    "partial": re.compile(r"^TLB partial flushes\s+(\d+)", re.MULTILINE),
    "code": re.compile(r"^gen code size\s+(\d+)", re.MULTILINE),
}
_HALTED = re.compile(r"\bHLT=([01])")
_RING = re.compile(r"\bCPL=([0-3])")
_NO_STAT = 2**64 - 1  # the balloon driver's word for "not reported"


class Monitor:
    """One QMP connection with a deadline on every question, and a way to fail in words."""

    def __init__(self, path: Path, *, timeout_s: float = 2.0) -> None:
        self.path, self._timeout_s = path, timeout_s
        self._client: Any = None
        self.events: Counter[str] = Counter()  # name → how often QEMU sent it, as far as it was noticed

    async def connect(self) -> None:
        """Connect and negotiate.

        Raises:
            VmError: If nobody answers: no such socket, or it already serves another client.
        """
        from qemu.qmp import QMPClient, QMPError

        client = QMPClient("phasewatch")
        try:
            async with asyncio.timeout(self._timeout_s):
                await client.connect(str(self.path))
        except (TimeoutError, OSError, QMPError) as exc:
            with suppress(Exception):
                async with asyncio.timeout(self._timeout_s):
                    await client.disconnect()
            if isinstance(exc, TimeoutError):
                raise VmError(
                    f"{self.path}: the QEMU monitor did not answer within {self._timeout_s:g} s (time-out); "
                    "one QMP socket serves one client: close the other one, or give QEMU a second -qmp"
                ) from exc
            raise VmError(f"{self.path}: the QEMU monitor did not answer: {exc}") from exc
        self._client = client

    async def ask(self, command: str, **arguments: object) -> Any:
        """Ask one question.

        Raises:
            VmError: If QEMU refuses it, is gone, or stays silent past the deadline.
        """
        from qemu.qmp import QMPError

        if self._client is None:
            raise VmError(f"{self.path}: not connected to the QEMU monitor")
        for event in self._client.events.clear():  # nobody waits for events; unread they would pile up for ever
            self.events[str(event.get("event"))] += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._client.execute(command, arguments or None)
        except (TimeoutError, OSError, EOFError, QMPError) as exc:
            raise VmError(f"{self.path}: {command}: {str(exc) or f'no answer within {self._timeout_s:g} s'}") from exc

    @property
    def is_connected(self) -> bool:
        """Whether the connection stands, as far as is known."""
        from qemu.qmp import Runstate

        return self._client is not None and self._client.runstate is Runstate.RUNNING

    async def close(self) -> None:
        """Disconnect; QEMU may be gone already."""
        client, self._client = self._client, None
        if client is not None:
            with suppress(Exception):
                async with asyncio.timeout(self._timeout_s):
                    await client.disconnect()

    async def vcpu_tids(self) -> tuple[int, ...]:
        """Give the thread of each vCPU, in their order."""
        cpus = await self.ask("query-cpus-fast")
        return tuple(cpu["thread-id"] for cpu in sorted(cpus, key=lambda cpu: cpu["cpu-index"]))

    async def version(self) -> str:
        """Give QEMU's version, as in ``7.2.22``."""
        qemu = (await self.ask("query-version"))["qemu"]
        return f"{qemu['major']}.{qemu['minor']}.{qemu['micro']}"


def parse_jit(text: str) -> tuple[int | None, int | None, int | None]:
    """Read translated blocks, partial TLB flushes and code size (bytes) from `x-query-jit`."""
    found = [pattern.search(text) for pattern in _JIT.values()]
    tb, partial, code = (int(match[1]) if match else None for match in found)
    return tb, partial, code


def parse_registers(text: str) -> tuple[bool, bool] | None:
    """Read (runs, in user mode) from `info registers`; None where there is no HLT flag, as on aarch64."""
    halted, ring = _HALTED.search(text), _RING.search(text)
    if not halted or not ring:
        return None
    runs = halted[1] == "0"
    return runs, runs and ring[1] == "3"


def sum_blocks(devices: Sequence[Mapping[str, Any]]) -> tuple[int, int, int, int, int, int, int]:
    """Sum `query-blockstats` over the disks: bytes read and written, reads, writes, flushes, write ns, highest offset."""
    stats = [device["stats"] for device in devices if device.get("qdev") or device.get("device")]
    keys = ("rd_bytes", "wr_bytes", "rd_operations", "wr_operations", "flush_operations", "wr_total_time_ns")
    rd_bytes, wr_bytes, rd_ops, wr_ops, flushes, wr_ns = (sum(int(stat[key]) for stat in stats) for key in keys)
    return rd_bytes, wr_bytes, rd_ops, wr_ops, flushes, wr_ns, sum(int(stat["wr_highest_offset"]) for stat in stats)


class QmpSource:
    """Asks one VM's monitor twice a second, and for one vCPU's registers ten times a second.

    Args:
        monitor: A connected `Monitor`; the source leaves it open.
        vcpus: How many vCPUs take turns in the register samples.
        clock: Paces the register samples.
        balloon: Its path in QEMU's tree; empty where there is none.
        registers: Whether they tell anything; under KVM the kernel halts a vCPU, and QEMU does not hear of it.
    """

    source = Source.QMP

    def __init__(
        self, *, monitor: Monitor, vcpus: int, clock: Clock, balloon: str = BALLOON, registers: bool = True
    ) -> None:
        self._monitor, self._vcpus, self._clock, self._balloon_path = monitor, vcpus, clock, balloon
        self._queues: list[tuple[str, int]] = []
        self._used: dict[tuple[str, int], int] = {}
        self._vq_total = 0
        self._samples: list[tuple[bool, bool]] = []
        self._sampler: asyncio.Task[None] | None = None
        self._balloon_update: int | None = None
        self._has_balloon, self._may_sample = False, registers

    async def open(self) -> None:
        """Find the disk's queues and the balloon, and begin to sample registers.

        Raises:
            VmError: If the monitor does not answer at all.
        """
        self._queues = await self._find_queues()
        if self._balloon_path:
            with suppress(VmError):
                await self._monitor.ask("qom-set", path=self._balloon_path, property=POLLING, value=1)
                self._has_balloon = True
        if self._may_sample and parse_registers(await self._registers(0)) is not None:
            self._sampler = asyncio.create_task(self._sample_registers())

    async def close(self) -> None:
        """Stop sampling registers."""
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await sampler

    async def read(self) -> Values:
        """Take one reading; a question that fails leaves its fields None."""
        # The disk first: a VM whose monitor is silent costs one deadline, not four.
        try:
            blocks: Values = sum_blocks(await self._monitor.ask("query-blockstats"))
        except (VmError, KeyError, TypeError):
            return nothing_of(self.source)
        tb, partial, code = await self._jit()
        busy, user = self._shares()
        faults, free, cache = await self._balloon()
        vq_blk = await self._count_requests()
        return (*blocks[:6], vq_blk, tb, partial, busy, user, faults, free, cache, code, blocks[6])

    async def _find_queues(self) -> list[tuple[str, int]]:
        try:
            devices = await self._monitor.ask("x-query-virtio")
        except VmError:
            return []
        queues = []
        for device in devices:
            if device["name"] != "virtio-blk":
                continue
            for number in range(1024):  # QEMU's own limit; the first number that it refuses is one past the last
                try:
                    await self._monitor.ask("x-query-virtio-queue-status", path=device["path"], queue=number)
                except VmError:
                    break
                queues.append((device["path"], number))
        return queues

    async def _count_requests(self) -> int | None:
        """Add up what each queue completed since the last reading; `used-idx` is a 16 bit counter that wraps."""
        if not self._queues:
            return None
        for path, number in self._queues:
            try:
                used = (await self._monitor.ask("x-query-virtio-queue-status", path=path, queue=number))["used-idx"]
            except (VmError, KeyError):
                return None
            self._vq_total += (used - self._used.get((path, number), used)) % 65536
            self._used[path, number] = used
        return self._vq_total

    async def _jit(self) -> tuple[int | None, int | None, int | None]:
        try:
            return parse_jit((await self._monitor.ask("x-query-jit"))["human-readable-text"])
        except (VmError, KeyError):
            return None, None, None  # KVM translates nothing

    async def _balloon(self) -> Values:
        """Give the guest's word on its memory, once per report."""
        if not self._has_balloon:
            return None, None, None
        try:
            report = await self._monitor.ask("qom-get", path=self._balloon_path, property="guest-stats")
            update, stats = report["last-update"], report["stats"]
        except (VmError, KeyError):
            return None, None, None
        if update == self._balloon_update or not update:
            return None, None, None
        self._balloon_update = update
        found = (stats.get(key, _NO_STAT) for key in ("stat-minor-faults", "stat-free-memory", "stat-disk-caches"))
        # The guest may lie, and a number past int64 would cost the whole bundle.
        return tuple(value if isinstance(value, int) and 0 <= value < 2**63 else None for value in found)

    def _shares(self) -> tuple[float | None, float | None]:
        samples, self._samples = self._samples, []
        if len(samples) < MIN_SAMPLES:
            return None, None
        return sum(runs for runs, _ in samples) / len(samples), sum(user for _, user in samples) / len(samples)

    async def _registers(self, vcpu: int) -> str:
        return str(
            await self._monitor.ask("human-monitor-command", **{"command-line": "info registers", "cpu-index": vcpu})
        )

    async def _sample_registers(self) -> None:
        due_ns, turn = self._clock.mono_ns(), 0
        while True:
            due_ns = max(due_ns + REGISTERS_NS, self._clock.mono_ns())
            await self._clock.sleep_until(due_ns)
            with suppress(VmError):
                sample = parse_registers(await self._registers(turn % self._vcpus))
                if sample is not None:
                    self._samples.append(sample)
            turn += 1
