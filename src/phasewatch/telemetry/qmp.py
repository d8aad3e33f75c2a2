"""Read the counters of the QEMU monitor over a QMP socket: the `qmp` source.

QMP commands (see QEMU's QMP reference):

- ``query-blockstats``: bytes, operations, write time (ns) and highest written offset of each disk.
- ``x-query-virtio-queue-status``: used index of each virtio-blk queue, listed by ``x-query-virtio``.
- ``qom-get guest-stats`` of the balloon: minor faults, free memory and disk caches, as the guest reports them.
- ``x-query-jit``: translated blocks, partial TLB flushes, code size (TCG only).
- What `monitor_sensors` asks, if it is given.
- ``info registers``: the flags HLT and CPL of one vCPU, sampled ten times a second (TCG on x86 only).

One socket serves one client and QEMU answers in order, so one connection carries the 2 Hz queries and the register
samples. ``x-`` commands are unstable: a field that a version cannot answer is None. Each query has its own deadline; a
failed or slow query costs its own fields only (`monitor_queries`).
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from phasewatch.channels import list_raw_fields
from phasewatch.errors import VmError
from phasewatch.telemetry.base import AsyncClock, ReadingValues
from phasewatch.telemetry.counters import BlockReading, BlockSum, VirtqueueSum
from phasewatch.telemetry.monitor_queries import (
    ANSWER_OVERDUE_S,
    NOT_ASKED,
    RETRY_ROUNDS,
    ROUND_DEADLINE_S,
    MonitorQuery,
    QueryRound,
)
from phasewatch.telemetry.monitor_sensors import SENSOR_FIELDS, MonitorSensors
from phasewatch.telemetry.qmp_connection import (
    AnswerWaiter,
    MonitorCommand,
    PendingAnswer,
    QmpConnection,
    open_connection,
)
from phasewatch.types import STALE_NS, SourceKind

__all__ = [
    "BALLOON_FIELDS",
    "BALLOON_POLLING_PROPERTY",
    "BALLOON_POLL_INTERVAL_S",
    "BLOCK_FIELDS",
    "JIT_FIELDS",
    "REGISTER_FIELDS",
    "JitUse",
    "QmpMonitor",
    "QmpSource",
    "parse_jit",
    "parse_registers",
]

JIT_FIELDS = frozenset({"jit_tb", "jit_tlb_partial", "jit_code_bytes"})
BALLOON_FIELDS = frozenset({"bal_minor_faults", "bal_free_bytes", "bal_cache_bytes"})
REGISTER_FIELDS = frozenset({"vcpu_busy", "vcpu_user"})
# What one answer of query-blockstats has.
BLOCK_FIELDS = frozenset(
    spec.field for spec in list_raw_fields(SourceKind.QMP) if spec.field.startswith(("blk_", "wr_"))
) - frozenset(SENSOR_FIELDS)
BALLOON_POLLING_PROPERTY = "guest-stats-polling-interval"  # seconds; 0, QEMU's default, means never
BALLOON_POLL_INTERVAL_S = 1  # the interval that a source sets
_BALLOON_PATH = "/machine/peripheral/balloon0"
# One register read per 0.1 s, whatever the number of vCPUs: else the cost of polling would identify the host.
_REGISTER_PERIOD_NS = 100_000_000
_MIN_REGISTER_SAMPLES = 3  # a share of fewer samples means nothing
_JIT_LIMIT_S = 0.005  # QEMU counts all translated blocks in its main loop: 6 ms after a boot, 0.2 s after an hour
# Events after which the guest's counters may start again; restoring a snapshot ends with RESUME.
_RESTART_EVENTS = ("RESET", "RESUME")
_ANSWER_TIMEOUT_S = ANSWER_OVERDUE_S + 5.0  # the queries of a round have deadlines of their own
_QUEUE_LIST_ROUNDS = 60  # rounds between two lists of the disks' queues, unless a change shows before
_MAX_RATE_GAP_NS = STALE_NS + 500_000_000  # no rate is computed across a longer gap
_BALLOON_REPORT_TIMEOUT_NS = 30_000_000_000  # after this time without a report the polling may have been turned off
_MAX_QUEUES = 1024  # QEMU's own limit of queues per device
_QUEUE_COMMAND = "x-query-virtio-queue-status"
_BLOCK_COMMANDS = (MonitorCommand("query-blockstats"),)

_JIT_PATTERNS = {
    "tb": re.compile(r"^TB count\s+(\d+)", re.MULTILINE),
    "partial": re.compile(r"^TLB partial flushes\s+(\d+)", re.MULTILINE),
    "code": re.compile(r"^gen code size\s+(\d+)", re.MULTILINE),
}
_HALTED_PATTERN = re.compile(r"\bHLT=([01])")
_PRIVILEGE_PATTERN = re.compile(r"\bCPL=([0-3])")
_UNREPORTED_STAT = 2**64 - 1  # the balloon driver's value for "not reported"


class QmpMonitor:
    """One QMP connection, with a deadline for every command.

    Args:
        path: The Unix socket.
        timeout_s: Default deadline of a command.

    Attributes:
        events: Event name → how often QEMU sent it.
        connections: How often `connect` succeeded.
    """

    def __init__(self, path: Path, *, timeout_s: float = 2.0) -> None:
        self.path, self._timeout_s = path, timeout_s
        self._connection: QmpConnection | None = None
        self.events: Counter[str] = Counter()
        self.connections = 0

    async def connect(self) -> None:
        """Connect and negotiate capabilities.

        Raises:
            VmError: If QEMU does not answer: there is no such socket, or it serves another client.
        """
        try:
            self._connection = await open_connection(self.path, self.events, self._timeout_s)
        except TimeoutError as exc:
            raise VmError(
                f"{self.path}: the QEMU monitor did not answer within {self._timeout_s:g} s (time-out); "
                "one QMP socket serves one client: close the other one, or give QEMU a second -qmp"
            ) from exc
        except (OSError, VmError) as exc:
            raise VmError(f"{self.path}: the QEMU monitor did not answer: {exc}") from exc
        self.connections += 1

    # `timeout_s` is Any, so that a caller may pass arguments with hyphens by `**`.
    async def ask(self, command: str, *, timeout_s: Any = None, **arguments: object) -> Any:
        """Execute one QMP command and return its result.

        Args:
            command: Name of the command.
            timeout_s: Deadline; None for the monitor's default.
            arguments: Arguments of the command.

        Raises:
            VmError: If QEMU refuses the command, is gone, or does not answer before the deadline.
        """
        limit_s: float = self._timeout_s if timeout_s is None else timeout_s
        try:
            return await self._require_connection().ask(MonitorCommand(command, arguments), limit_s)
        except VmError as exc:
            raise VmError(f"{self.path}: {command}: {exc}") from exc

    def post(self, commands: Sequence[MonitorCommand], waiter: AnswerWaiter) -> Sequence[PendingAnswer]:
        """Send commands in one write and return their outstanding answers, in the same order.

        Args:
            commands: The commands.
            waiter: Called with each answer as soon as it has come; it must not block.

        Raises:
            VmError: If QEMU is gone, or does not read its commands.
        """
        return self._require_connection().post(commands, waiter)

    def _require_connection(self) -> QmpConnection:
        if self._connection is None:
            raise VmError(f"{self.path}: not connected to the QEMU monitor")
        return self._connection

    @property
    def is_connected(self) -> bool:
        """Whether the connection is up, as far as is known."""
        return self._connection is not None and self._connection.is_open

    async def close(self) -> None:
        """Disconnect, even if QEMU is gone already."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort("the monitor was closed")
            await connection.wait_closed()

    async def query_vcpu_threads(self) -> tuple[int, ...]:
        """Return the thread ids of the vCPUs in order, in QEMU's own PID namespace (``query-cpus-fast``)."""
        cpus = await self.ask("query-cpus-fast")
        return tuple(cpu["thread-id"] for cpu in sorted(cpus, key=lambda cpu: cpu["cpu-index"]))

    async def query_version(self) -> str:
        """Return QEMU's version, such as ``7.2.22`` (``query-version``)."""
        qemu = (await self.ask("query-version"))["qemu"]
        return f"{qemu['major']}.{qemu['minor']}.{qemu['micro']}"


def parse_jit(text: str) -> tuple[int | None, int | None, int | None]:
    """Parse the text of ``x-query-jit`` into translated blocks, partial TLB flushes and code size (bytes)."""
    matches = [pattern.search(text) for pattern in _JIT_PATTERNS.values()]
    tb, partial, code = (int(match[1]) if match else None for match in matches)
    return tb, partial, code


def parse_registers(text: str) -> tuple[bool, bool] | None:
    """Parse ``info registers`` into (is running, is in user mode); None without an HLT flag, as on aarch64."""
    halted, privilege = _HALTED_PATTERN.search(text), _PRIVILEGE_PATTERN.search(text)
    if not halted or not privilege:
        return None
    is_running = halted[1] == "0"
    return is_running, is_running and privilege[1] == "3"


def _build_qom_get(path: str, name: str) -> MonitorCommand:
    return MonitorCommand("qom-get", {"path": path, "property": name})


@cache
def _build_register_command(vcpu: int) -> MonitorCommand:
    return MonitorCommand("human-monitor-command", {"command-line": "info registers", "cpu-index": vcpu})


class JitUse(StrEnum):
    """Whether a source uses ``x-query-jit``, which stops QEMU for longer the longer the guest has run."""

    ALWAYS = "always"
    WHILE_FAST = "while fast"
    NEVER = "never"


class QmpSource:
    """Queries one VM's monitor twice a second, and one vCPU's registers ten times a second.

    Args:
        monitor: A connected monitor; the source leaves it open.
        vcpus: Number of vCPUs that take turns in the register samples.
        clock: Times the register samples.
        balloon: Path of the balloon in QEMU's object tree; empty if there is none.
        registers: Whether to sample registers; useless under KVM, where the kernel halts vCPUs without telling QEMU.
        jit: Whether to read translation counters.
        sensors: Further queries, which change the VM until the source closes; None for none.
        deadline_s: Deadline of one reading.

    Attributes:
        vcpu_numbers: Returns the vCPUs whose registers are sampled; replaced where vCPUs may change.
    """

    source = SourceKind.QMP

    def __init__(
        self,
        *,
        monitor: QmpMonitor,
        vcpus: int,
        clock: AsyncClock,
        balloon: str = _BALLOON_PATH,
        registers: bool = True,
        jit: JitUse = JitUse.ALWAYS,
        sensors: MonitorSensors | None = None,
        deadline_s: float = ROUND_DEADLINE_S,
    ) -> None:
        self._monitor, self._clock, self._balloon_path = monitor, clock, balloon
        self._sensors = sensors
        self.vcpu_numbers: Callable[[], Sequence[int]] = lambda: range(vcpus)
        self._may_sample = registers
        self._samples: list[tuple[bool, bool]] = []
        self._sampler: asyncio.Task[None] | None = None
        self._register_answer: PendingAnswer | None = None
        self._samples_lost = 0
        self._blocks = MonitorQuery(
            "query-blockstats",
            lambda: self._ask("query-blockstats"),
            list_commands=lambda: _BLOCK_COMMANDS,
        )
        self._balloon = MonitorQuery("guest-stats", self._ask_balloon, list_commands=self._list_balloon_commands)
        self._balloon_commands = (_build_qom_get(balloon, "guest-stats"),)
        self._queue_query = MonitorQuery(
            _QUEUE_COMMAND,
            self._query_queues,
            list_commands=self._list_queue_commands,
            combine=self._combine_used_indices,
        )
        self._jit = MonitorQuery(
            "x-query-jit", self._ask_jit, limit_s=_JIT_LIMIT_S if jit is JitUse.WHILE_FAST else None
        )
        queries = [self._blocks, *([self._balloon] if balloon else []), self._queue_query]
        if jit is not JitUse.NEVER:
            queries.append(self._jit)  # last, because it is slow
        self._round = QueryRound(queries, clock, deadline_s=deadline_s, post=monitor.post)
        self._block_sum, self._queue_sum = BlockSum(), VirtqueueSum()
        self._disks: frozenset[Hashable] = frozenset()
        self._queues: dict[tuple[str, int], MonitorCommand] = {}
        self._rounds_to_list = 0  # rounds until the queues are listed again
        self._requests = 0  # requests that the disks completed since the queues were read
        self._restarts = 0
        self._balloon_update: int | None = None
        self._report_ns = clock.mono_ns()  # when the guest's last report arrived
        self._passed_on_ns = -_MAX_RATE_GAP_NS  # when a report was last part of a reading
        self._is_gap = self._is_restarted = False

    async def open(self) -> None:
        """Find the disks' queues, turn on balloon polling, and start the register samples.

        Raises:
            VmError: If the monitor does not answer the first register query.
        """
        await self._list_queues(None)
        self._restarts = self._count_restarts()
        if self._balloon_path:
            try:
                await self._monitor.ask(
                    "qom-set", path=self._balloon_path, property=BALLOON_POLLING_PROPERTY, value=BALLOON_POLL_INTERVAL_S
                )
            except VmError:
                self._round.remove(self._balloon)
        if self._sensors is not None:
            await self._sensors.open(self._ask)
            is_slow_asked = self._jit in self._round.queries
            place = len(self._round.queries) - is_slow_asked
            self._round.queries[place:place] = self._sensors.queries
        if self._jit in self._round.queries and self._jit.limit_s is not None:
            for _ in range(3):  # a slow query must be known before a model is chosen
                await self._round.ask()
        if self._may_sample and parse_registers(await self._query_registers(0)) is not None:
            self._sampler = asyncio.create_task(self._sample_registers())

    async def close(self) -> None:
        """Stop the register samples and all outstanding queries."""
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await sampler
        await self._round.close()
        if self._sensors is not None:
            await self._sensors.close()

    async def read(self) -> ReadingValues:
        """Return one reading; a query that fails or is late leaves its fields None."""
        await self._round.ask()
        restarts, before = self._count_restarts(), self._restarts
        self._restarts = restarts
        if restarts != before:
            self._is_restarted = self._is_gap = True
            self._rounds_to_list = 0
            self._round.revive()
        blocks = self._convert(self._blocks, self._block_sum.add)
        used = self._convert(self._queue_query, dict)
        sums: ReadingValues = (None,) * 6
        more: ReadingValues = (None,) * 3
        highest = None
        if blocks is not None:
            sums, more, highest = blocks.sums, blocks.extended, blocks.highest
            self._requests += blocks.requests or 0
            if blocks.members != self._disks:
                self._disks, self._rounds_to_list = blocks.members, 0
        vq_blk = self._sum_queues(used, blocks) if used else None
        tb, partial, code = self._convert(self._jit, parse_jit) or (None, None, None)
        busy, user = self._compute_register_shares()
        faults, free, cache = self._convert(self._balloon, self._convert_balloon) or (None, None, None)
        extended = (None,) * len(SENSOR_FIELDS) if self._sensors is None else self._sensors.pop_values()
        return (*sums, vq_blk, tb, partial, busy, user, faults, free, cache, code, highest, *more, *extended)

    @property
    def lost(self) -> dict[str, int]:
        """Lost readings of each query that lost any."""
        lost = {query.name: query.lost for query in self._round.queries}
        lost["info registers"] = self._samples_lost
        return {name: count for name, count in lost.items() if count}

    def pop_notes(self) -> list[str]:
        """Return and clear the messages since the last call."""
        return self._round.pop_notes()

    def find_give_up_reason(self, field: str) -> str | None:
        """Return why a translation counter is no longer read; None while it is, and for other fields."""
        return self._jit.give_up_reason if field in JIT_FIELDS else None

    def stop_registers(self) -> None:
        """Stop the register samples, half of all commands to the monitor, because nobody uses them."""
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.cancel()

    def drop_fields(self, fields: frozenset[str]) -> None:
        """Stop querying fields that this VM does not have, and reset the counts of lost readings."""
        for query, own in ((self._blocks, BLOCK_FIELDS), (self._jit, JIT_FIELDS)):
            if own <= fields and query in self._round.queries:
                self._round.remove(query)
        for query in self._round.queries:
            query.lost = 0  # readings lost during the survey do not count for a watch
        self._samples_lost = 0
        self._round.pop_notes()

    def _convert(self, query: MonitorQuery, convert: Callable[[Any], Any]) -> Any:
        """Return the converted answer of a query; None without an answer, or if it has an unknown shape."""
        if query.answer is None or query.answer is NOT_ASKED:
            return None
        try:
            return convert(query.answer)
        except (KeyError, TypeError, ValueError, AttributeError):
            query.refuse("an answer of an unknown shape")
            return None

    async def _ask(self, command: str, **arguments: object) -> Any:
        return await self._monitor.ask(command, timeout_s=_ANSWER_TIMEOUT_S, **arguments)

    def _count_restarts(self) -> int:
        return self._monitor.connections + sum(self._monitor.events[name] for name in _RESTART_EVENTS)

    async def _list_queues(self, timeout_s: float | None) -> None:
        """List the queues of every virtio-blk disk (``x-query-virtio``); none if QEMU does not know the command."""
        queues: dict[tuple[str, int], MonitorCommand] = {}
        try:
            devices = await self._monitor.ask("x-query-virtio", timeout_s=timeout_s)
        except VmError:  # keep the list
            self._rounds_to_list = RETRY_ROUNDS if self._queues else _QUEUE_LIST_ROUNDS
            return
        for device in devices:
            if device["name"] != "virtio-blk":
                continue
            for number in range(_MAX_QUEUES):  # the first number that QEMU refuses is one past the last queue
                path = str(device["path"])
                try:
                    await self._query_used_index(path, number, timeout_s)
                except (VmError, KeyError):
                    break
                queues[path, number] = MonitorCommand(_QUEUE_COMMAND, {"path": path, "queue": number})
        self._queues, self._rounds_to_list = queues, _QUEUE_LIST_ROUNDS

    async def _query_used_index(self, path: str, number: int, timeout_s: float | None = _ANSWER_TIMEOUT_S) -> int:
        status = await self._monitor.ask(_QUEUE_COMMAND, timeout_s=timeout_s, path=path, queue=number)
        return int(status["used-idx"])

    def _list_queue_commands(self) -> Sequence[MonitorCommand] | None:
        """Return one command for each queue; None if the queues must be listed first, or there is none."""
        self._rounds_to_list -= 1
        if self._rounds_to_list < 0 or not self._queues:
            return None
        return tuple(self._queues.values())

    def _combine_used_indices(self, answers: Sequence[PendingAnswer]) -> dict[Hashable, int]:
        """Return the used index of every queue; a refused one is gone, and all are listed again."""
        used: dict[Hashable, int] = {}
        for answer in answers:
            try:
                status = answer.decode()
                used[answer.command.arguments["path"], answer.command.arguments["queue"]] = int(status["used-idx"])
            except (VmError, KeyError):
                self._rounds_to_list = 0
        return used

    async def _query_queues(self) -> Any:
        """List the queues if that is due, and return the used index of every queue."""
        if self._rounds_to_list < 0:
            await self._list_queues(_ANSWER_TIMEOUT_S)
        if not self._queues:
            return NOT_ASKED
        used: dict[Hashable, int] = {}
        for path, number in list(self._queues):
            try:
                used[path, number] = await self._query_used_index(path, number)
            except (VmError, KeyError):
                self._rounds_to_list = 0
        return used

    def _sum_queues(self, used: Mapping[Hashable, int], blocks: BlockReading | None) -> int | None:
        """Add the requests that the queues completed since they were last read."""
        requests = self._requests if blocks is not None and blocks.requests is not None else None
        is_restarted, self._is_restarted, self._requests = self._is_restarted, False, 0
        return self._queue_sum.add(used, requests=requests, is_restarted=is_restarted)

    async def _ask_jit(self) -> str:
        return str((await self._ask("x-query-jit"))["human-readable-text"])

    def _list_balloon_commands(self) -> Sequence[MonitorCommand] | None:
        """Return the query of the guest's report; None if QEMU's polling must be checked first."""
        is_due = self._clock.mono_ns() - self._report_ns > _BALLOON_REPORT_TIMEOUT_NS
        return None if is_due else self._balloon_commands

    async def _ask_balloon(self) -> Any:
        """Return the guest's report; if none arrived for long, check that QEMU still polls for one."""
        if self._clock.mono_ns() - self._report_ns > _BALLOON_REPORT_TIMEOUT_NS:
            self._report_ns = self._clock.mono_ns()
            if await self._ask("qom-get", path=self._balloon_path, property=BALLOON_POLLING_PROPERTY) == 0:
                await self._ask(
                    "qom-set", path=self._balloon_path, property=BALLOON_POLLING_PROPERTY, value=BALLOON_POLL_INTERVAL_S
                )
        return await self._ask("qom-get", path=self._balloon_path, property="guest-stats")

    def _convert_balloon(self, report: Mapping[str, Any]) -> ReadingValues:
        """Return the guest's memory statistics: once per report, and with a gap after a restart of the VM."""
        update, stats = report["last-update"], report["stats"]
        if update == self._balloon_update or not update:
            return None, None, None
        self._balloon_update = update
        now_ns = self._report_ns = self._clock.mono_ns()
        if self._is_gap and now_ns - self._passed_on_ns <= _MAX_RATE_GAP_NS:
            return None, None, None
        self._is_gap, self._passed_on_ns = False, now_ns
        keys = ("stat-minor-faults", "stat-free-memory", "stat-disk-caches")
        values = (stats.get(key, _UNREPORTED_STAT) for key in keys)
        # The guest may report anything, and a number beyond int64 would make the whole bundle invalid.
        return tuple(value if isinstance(value, int) and 0 <= value < 2**63 else None for value in values)

    def _compute_register_shares(self) -> tuple[float | None, float | None]:
        samples, self._samples = self._samples, []
        if len(samples) < _MIN_REGISTER_SAMPLES:
            self._samples_lost += self._sampler is not None
            return None, None
        n_running = sum(is_running for is_running, _ in samples)
        return n_running / len(samples), sum(is_user for _, is_user in samples) / len(samples)

    async def _query_registers(self, vcpu: int) -> str:
        return str(
            await self._monitor.ask("human-monitor-command", **{"command-line": "info registers", "cpu-index": vcpu})
        )

    async def _sample_registers(self) -> None:
        now_ns, turn, pause_ns = self._clock.mono_ns(), 0, _REGISTER_PERIOD_NS
        due_ns = now_ns - now_ns % _REGISTER_PERIOD_NS
        while True:
            now_ns = self._clock.mono_ns()
            # At the same instants in all VMs, so that one turn of the event loop serves them all.
            due_ns = max(due_ns + pause_ns, now_ns - now_ns % _REGISTER_PERIOD_NS)
            await self._clock.sleep_until(due_ns)
            pause_ns = min(2 * pause_ns, 20 * _REGISTER_PERIOD_NS)  # query a failing monitor less often
            asked = self._register_answer
            if asked is not None and not asked.is_done:
                continue
            if asked is None or not asked.failure:
                pause_ns = _REGISTER_PERIOD_NS
            numbers = self.vcpu_numbers() or (0,)
            with suppress(VmError):
                (self._register_answer,) = self._monitor.post(
                    (_build_register_command(numbers[turn % len(numbers)]),), self._add_register_sample
                )
            turn += 1

    def _add_register_sample(self, answer: PendingAnswer) -> None:
        with suppress(VmError):
            sample = parse_registers(str(answer.decode()))
            if sample is not None:
                self._samples.append(sample)
