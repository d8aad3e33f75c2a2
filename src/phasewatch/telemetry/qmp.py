"""What the QEMU monitor counts, over its QMP socket: the `qmp` source.

One socket serves one client, and QEMU answers in order, so one connection carries both the 2 Hz queries and the
register samples. `x-` commands are unstable: what a version cannot answer is None, field by field. Each question has
its own deadline, and one that fails or is slow costs its own fields only (`questions`).
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from phasewatch.channels import list_raw_fields
from phasewatch.errors import VmError
from phasewatch.telemetry.base import AsyncClock, ReadingValues
from phasewatch.telemetry.counters import BlockReading, BlockSum, VirtqueueSum
from phasewatch.telemetry.questions import (
    ANSWER_OVERDUE_S,
    NOT_ASKED,
    RETRY_ROUNDS,
    ROUND_DEADLINE_S,
    MonitorQuery,
    QueryRound,
)
from phasewatch.types import STALE_NS, SourceKind

REGISTER_PERIOD_NS = (
    100_000_000  # one register read per 0.1 s, whatever the number of vCPUs: else our polling names the host
)
MIN_REGISTER_SAMPLES = 3  # below this a share of register samples says nothing
BALLOON_PATH = "/machine/peripheral/balloon0"
BALLOON_POLLING_PROPERTY = "guest-stats-polling-interval"  # seconds; 0, as QEMU starts, means never
JIT_LIMIT_S = 0.005  # QEMU counts all translated blocks in its main loop: 6 ms after a boot, 0.2 s after an hour
RESTART_EVENTS = (
    "RESET",
    "RESUME",
)  # events after which the guest's counters may start again; a snapshot ends in RESUME
ANSWER_TIMEOUT_S = ANSWER_OVERDUE_S + 5.0  # the questions of a round keep their own deadlines
QUEUE_LIST_ROUNDS = 60  # rounds until the disks' queues are listed again, unless something shows a change before
MAX_RATE_GAP_NS = STALE_NS + 500_000_000  # no rate reaches across such a gap
BALLOON_REPORT_TIMEOUT_NS = 30_000_000_000  # a balloon that reported nothing for so long may be polled by nobody

_JIT_PATTERNS = {
    "tb": re.compile(r"^TB count\s+(\d+)", re.MULTILINE),
    "partial": re.compile(r"^TLB partial flushes\s+(\d+)", re.MULTILINE),
    "code": re.compile(r"^gen code size\s+(\d+)", re.MULTILINE),
}
_HALTED_PATTERN = re.compile(r"\bHLT=([01])")
_PRIVILEGE_PATTERN = re.compile(r"\bCPL=([0-3])")
_UNREPORTED_STAT = 2**64 - 1  # the balloon driver's word for "not reported"


class QmpMonitor:
    """One QMP connection with a deadline on every question, and a way to fail in words."""

    def __init__(self, path: Path, *, timeout_s: float = 2.0) -> None:
        self.path, self._timeout_s = path, timeout_s
        self._client: Any = None
        self.events: Counter[str] = Counter()  # name → how often QEMU sent it, as far as it was noticed
        self.connections = 0

    async def connect(self) -> None:
        """Connect and negotiate.

        Raises:
            VmError: If nobody answers: no such socket, or it already serves another client.
        """
        from qemu.qmp import QMPClient, QMPError

        logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())  # an answer that nobody waits for is no news
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
        self.connections += 1

    # `timeout_s` is Any, so that a caller may hand over arguments with hyphens as a dict.
    async def ask(self, command: str, *, timeout_s: Any = None, **arguments: object) -> Any:
        """Ask one question.

        Args:
            command: Of QMP.
            timeout_s: Deadline in seconds; the monitor's own if left out.
            arguments: Of the command.

        Raises:
            VmError: If QEMU refuses it, is gone, or stays silent past the deadline.
        """
        from qemu.qmp import QMPError

        if self._client is None:
            raise VmError(f"{self.path}: not connected to the QEMU monitor")
        limit_s: float = self._timeout_s if timeout_s is None else timeout_s
        self.count_events()
        try:
            async with asyncio.timeout(limit_s):
                return await self._client.execute(command, arguments or None)
        except (TimeoutError, OSError, EOFError, QMPError) as exc:
            raise VmError(f"{self.path}: {command}: {str(exc) or f'no answer within {limit_s:g} s'}") from exc

    def count_events(self) -> None:
        """Count the events that came; nobody waits for them, and unread they would pile up for ever."""
        if self._client is not None:
            for event in self._client.events.clear():
                self.events[str(event.get("event"))] += 1

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
    found = [pattern.search(text) for pattern in _JIT_PATTERNS.values()]
    tb, partial, code = (int(match[1]) if match else None for match in found)
    return tb, partial, code


def parse_registers(text: str) -> tuple[bool, bool] | None:
    """Read (runs, in user mode) from `info registers`; None where there is no HLT flag, as on aarch64."""
    halted, ring = _HALTED_PATTERN.search(text), _PRIVILEGE_PATTERN.search(text)
    if not halted or not ring:
        return None
    runs = halted[1] == "0"
    return runs, runs and ring[1] == "3"


class JitUse(StrEnum):
    """Whether a source asks `x-query-jit`, which holds QEMU up the longer, the more the guest has run."""

    ALWAYS = "always"
    WHILE_FAST = "while fast"
    NEVER = "never"


class QmpSource:
    """Asks one VM's monitor twice a second, and for one vCPU's registers ten times a second.

    Args:
        monitor: A connected `QmpMonitor`; the source leaves it open.
        vcpus: How many vCPUs take turns in the register samples.
        clock: Paces the register samples.
        balloon: Its path in QEMU's tree; empty where there is none.
        registers: Whether they tell anything; under KVM the kernel halts a vCPU, and QEMU does not hear of it.
        jit: Whether translation counters are asked for; a watcher does not, unless its user says so.
        deadline_s: Of one reading.

    Attributes:
        vcpu_numbers: Returns whose registers are sampled: the VM's vCPUs may change.
    """

    source = SourceKind.QMP

    def __init__(
        self,
        *,
        monitor: QmpMonitor,
        vcpus: int,
        clock: AsyncClock,
        balloon: str = BALLOON_PATH,
        registers: bool = True,
        jit: JitUse = JitUse.ALWAYS,
        deadline_s: float = ROUND_DEADLINE_S,
    ) -> None:
        self._monitor, self._clock, self._balloon_path = monitor, clock, balloon
        self.vcpu_numbers: Callable[[], Sequence[int]] = lambda: range(vcpus)
        self._may_sample = registers
        self._samples: list[tuple[bool, bool]] = []
        self._sampler: asyncio.Task[None] | None = None
        self._samples_lost = 0
        self._blocks = MonitorQuery("query-blockstats", lambda: self._ask("query-blockstats"))
        self._balloon = MonitorQuery("guest-stats", self._ask_balloon)
        self._rings = MonitorQuery("x-query-virtio-queue-status", self._ask_rings)
        self._jit = MonitorQuery(
            "x-query-jit", self._ask_jit, limit_s=JIT_LIMIT_S if jit is JitUse.WHILE_FAST else None
        )
        questions = [self._blocks, *([self._balloon] if balloon else []), self._rings]
        if jit is not JitUse.NEVER:
            questions.append(self._jit)  # last: what is slow delays nobody
        self._round = QueryRound(questions, clock, deadline_s=deadline_s)
        self._block_sum, self._ring_sum = BlockSum(), VirtqueueSum()
        self._disks: frozenset[Hashable] = frozenset()
        self._queues: list[tuple[str, int]] = []
        self._list_in = 0
        self._requests = 0  # that the disks completed since their queues were read
        self._restarts = 0
        self._balloon_update: int | None = None
        self._report_ns = clock.mono_ns()  # when the guest's last report came
        self._given_ns = -MAX_RATE_GAP_NS  # and when one was given on
        self._is_gap = self._is_restarted = False

    async def open(self) -> None:
        """Find the disk's queues and the balloon, and begin to sample registers.

        Raises:
            VmError: If the monitor does not answer at all.
        """
        await self._list_queues(None)
        self._restarts = self._count_restarts()
        if self._balloon_path:
            try:
                await self._monitor.ask("qom-set", path=self._balloon_path, property=BALLOON_POLLING_PROPERTY, value=1)
            except VmError:
                self._round.remove(self._balloon)
        if self._jit in self._round.questions and self._jit.limit_s is not None:
            for _ in range(3):  # who is too slow is known before a model is chosen
                await self._round.ask()
        if self._may_sample and parse_registers(await self._registers(0)) is not None:
            self._sampler = asyncio.create_task(self._sample_registers())

    async def close(self) -> None:
        """Stop sampling registers, and wait for no answer any more."""
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await sampler
        await self._round.close()

    async def read(self) -> ReadingValues:
        """Return one reading; a question that fails or is late leaves its fields None."""
        await self._round.ask()
        self._monitor.count_events()
        restarts, before = self._count_restarts(), self._restarts
        self._restarts = restarts
        if restarts != before:
            self._is_restarted = self._is_gap = True
            self._list_in = 0
            self._round.revive()
        blocks = self._use(self._blocks, self._block_sum.add)
        rings = self._use(self._rings, lambda used: used)
        sums: ReadingValues = (None,) * 6
        highest = None
        if blocks is not None:
            sums, highest = blocks.sums, blocks.highest
            self._requests += blocks.requests or 0
            if blocks.members != self._disks:
                self._disks, self._list_in = blocks.members, 0
        vq_blk = self._sum_rings(rings, blocks) if rings else None
        tb, partial, code = self._use(self._jit, parse_jit) or (None, None, None)
        busy, user = self._shares()
        faults, free, cache = self._use(self._balloon, self._use_balloon) or (None, None, None)
        return (*sums, vq_blk, tb, partial, busy, user, faults, free, cache, code, highest)

    @property
    def lost(self) -> dict[str, int]:
        """Readings lost, of each question that lost any."""
        found = {question.name: question.lost for question in self._round.questions}
        found["info registers"] = self._samples_lost
        return {name: count for name, count in found.items() if count}

    def pop_notes(self) -> list[str]:
        """Return what people must know since the last call."""
        return self._round.pop_notes()

    def given_up_reason(self, field: str) -> str:
        """Return why a raw field is not asked for any more; empty while it is."""
        return self._jit.given_up if field.startswith("jit_") else ""

    def drop_fields(self, fields: frozenset[str]) -> None:
        """Stop asking for fields that this VM does not have."""
        of_blocks = {spec.field for spec in list_raw_fields(SourceKind.QMP) if spec.field.startswith(("blk_", "wr_"))}
        for question, own in ((self._blocks, of_blocks), (self._jit, {"jit_tb", "jit_tlb_partial", "jit_code_bytes"})):
            if own <= fields and question in self._round.questions:
                self._round.remove(question)
        for question in self._round.questions:
            question.lost = 0  # what was lost while the VM was looked at is no reading of a watch
        self._samples_lost = 0
        self._round.pop_notes()

    def _use(self, question: MonitorQuery, use: Any) -> Any:
        """Return what is wanted of an answer; None without one, or if it has another shape."""
        if question.answer is None or question.answer is NOT_ASKED:
            return None
        try:
            return use(question.answer)
        except (KeyError, TypeError, ValueError, AttributeError):
            question.refuse("an answer of another shape")
            return None

    async def _ask(self, command: str, **arguments: object) -> Any:
        return await self._monitor.ask(command, timeout_s=ANSWER_TIMEOUT_S, **arguments)

    def _count_restarts(self) -> int:
        return self._monitor.connections + sum(self._monitor.events[name] for name in RESTART_EVENTS)

    async def _list_queues(self, timeout_s: float | None) -> None:
        """List the queues of every virtio disk; a monitor that does not know the question has none."""
        queues: list[tuple[str, int]] = []
        try:
            devices = await self._monitor.ask("x-query-virtio", timeout_s=timeout_s)
        except VmError:  # what was known stays
            self._list_in = RETRY_ROUNDS if self._queues else QUEUE_LIST_ROUNDS
            return
        for device in devices:
            if device["name"] != "virtio-blk":
                continue
            for number in range(1024):  # QEMU's own limit; the first number that it refuses is one past the last
                try:
                    await self._used_index(device["path"], number, timeout_s)
                except (VmError, KeyError):
                    break
                queues.append((device["path"], number))
        self._queues, self._list_in = queues, QUEUE_LIST_ROUNDS

    async def _used_index(self, path: str, number: int, timeout_s: float | None = ANSWER_TIMEOUT_S) -> int:
        status = await self._monitor.ask("x-query-virtio-queue-status", timeout_s=timeout_s, path=path, queue=number)
        return int(status["used-idx"])

    async def _ask_rings(self) -> Any:
        """Read the used index of every queue; one that is refused is gone, and all are listed again."""
        self._list_in -= 1
        if self._list_in < 0:
            await self._list_queues(ANSWER_TIMEOUT_S)
        if not self._queues:
            return NOT_ASKED
        used: dict[Hashable, int] = {}
        for path, number in list(self._queues):
            try:
                used[path, number] = await self._used_index(path, number)
            except (VmError, KeyError):
                self._list_in = 0
        return used

    def _sum_rings(self, used: Mapping[Hashable, int], blocks: BlockReading | None) -> int | None:
        """Add up what the queues completed since they were read last."""
        requests = self._requests if blocks is not None and blocks.requests is not None else None
        restarted, self._is_restarted, self._requests = self._is_restarted, False, 0
        return self._ring_sum.add(used, requests=requests, restarted=restarted)

    async def _ask_jit(self) -> str:
        return str((await self._ask("x-query-jit"))["human-readable-text"])

    async def _ask_balloon(self) -> Any:
        """Read the guest's report; if none came for long, check that QEMU still polls for one."""
        if self._clock.mono_ns() - self._report_ns > BALLOON_REPORT_TIMEOUT_NS:
            self._report_ns = self._clock.mono_ns()
            if await self._ask("qom-get", path=self._balloon_path, property=BALLOON_POLLING_PROPERTY) == 0:
                await self._ask("qom-set", path=self._balloon_path, property=BALLOON_POLLING_PROPERTY, value=1)
        return await self._ask("qom-get", path=self._balloon_path, property="guest-stats")

    def _use_balloon(self, report: Mapping[str, Any]) -> ReadingValues:
        """Return the guest's word on its memory: once per report, and with a gap where the machine was restarted."""
        update, stats = report["last-update"], report["stats"]
        if update == self._balloon_update or not update:
            return None, None, None
        self._balloon_update = update
        now_ns = self._report_ns = self._clock.mono_ns()
        if self._is_gap and now_ns - self._given_ns <= MAX_RATE_GAP_NS:
            return None, None, None
        self._is_gap, self._given_ns = False, now_ns
        found = (
            stats.get(key, _UNREPORTED_STAT) for key in ("stat-minor-faults", "stat-free-memory", "stat-disk-caches")
        )
        # The guest may lie, and a number past int64 would cost the whole bundle.
        return tuple(value if isinstance(value, int) and 0 <= value < 2**63 else None for value in found)

    def _shares(self) -> tuple[float | None, float | None]:
        samples, self._samples = self._samples, []
        if len(samples) < MIN_REGISTER_SAMPLES:
            self._samples_lost += self._sampler is not None
            return None, None
        return sum(runs for runs, _ in samples) / len(samples), sum(user for _, user in samples) / len(samples)

    async def _registers(self, vcpu: int) -> str:
        return str(
            await self._monitor.ask("human-monitor-command", **{"command-line": "info registers", "cpu-index": vcpu})
        )

    async def _sample_registers(self) -> None:
        due_ns, turn, pause_ns = self._clock.mono_ns(), 0, REGISTER_PERIOD_NS
        while True:
            due_ns = max(due_ns + pause_ns, self._clock.mono_ns())
            await self._clock.sleep_until(due_ns)
            numbers = self.vcpu_numbers() or (0,)
            pause_ns = min(
                2 * pause_ns, 20 * REGISTER_PERIOD_NS
            )  # a monitor that refuses or is silent is asked less often
            with suppress(VmError):
                sample = parse_registers(await self._registers(numbers[turn % len(numbers)]))
                pause_ns = REGISTER_PERIOD_NS
                if sample is not None:
                    self._samples.append(sample)
            turn += 1
