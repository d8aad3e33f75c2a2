"""Read block, network and balloon counters of libvirt's domains by bulk calls, without a QMP socket of their own.

Parameters of ``virConnectGetAllDomainStats(3)`` (`virsh domstats`) and the raw fields that they become:

- ``block.N.rd.bytes``, ``wr.bytes`` (B), ``rd.reqs``, ``wr.reqs``, ``fl.reqs`` (requests), ``wr.times``, ``rd.times``,
  ``fl.times`` (ns): the block fields, summed over the disks. libvirt asks QEMU's ``query-blockstats`` for them.
- ``net.N.tx.pkts``, ``tx.bytes``, ``rx.pkts``, ``rx.bytes`` (frames, B; as the guest sees them): the tap fields.
- ``balloon.minor_fault`` (faults), ``unused``, ``disk_caches`` (KiB): the balloon fields, where the guest reports them
  often enough; ``balloon.last-update`` (s, host time) shows when it did.
- ``state.state``: whether the domain runs.

libvirt has nothing for the other fields of the monitor: virtqueues, registers, translation counters, merged requests.
``block.N.allocation`` is no substitute for ``wr_highest_bytes``: it is the end of the image file, not an offset of the
disk.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from phasewatch.channels import list_raw_fields
from phasewatch.errors import VmError
from phasewatch.telemetry.base import AsyncClock, ReadingValues, build_missing_reading
from phasewatch.telemetry.counters import CounterSum
from phasewatch.telemetry.libvirt_client import DomainStats, LibvirtClient, StatsClient
from phasewatch.telemetry.monitor_queries import ROUND_DEADLINE_S
from phasewatch.telemetry.netflow import NetflowReading
from phasewatch.types import SourceKind

__all__ = [
    "LIBVIRT_BALLOON_FIELDS",
    "LIBVIRT_BLOCK_FIELDS",
    "DomainBlockSource",
    "DomainNetworkSource",
    "LibvirtDomain",
    "LibvirtHypervisor",
    "parse_balloon",
    "parse_disks",
    "parse_network",
    "parse_state",
]

logger = logging.getLogger(__name__)

_DISK_PARAMETERS = {
    "blk_rd_bytes": "rd.bytes",
    "blk_wr_bytes": "wr.bytes",
    "blk_rd_ops": "rd.reqs",
    "blk_wr_ops": "wr.reqs",
    "blk_flush_ops": "fl.reqs",
    "blk_wr_ns": "wr.times",
    "blk_rd_ns": "rd.times",
    "blk_flush_ns": "fl.times",
}
LIBVIRT_BLOCK_FIELDS = frozenset(_DISK_PARAMETERS)
_BALLOON_PARAMETERS = {
    "bal_minor_faults": ("balloon.minor_fault", 1),
    "bal_free_bytes": ("balloon.unused", 1024),
    "bal_cache_bytes": ("balloon.disk_caches", 1024),
}
LIBVIRT_BALLOON_FIELDS = frozenset(_BALLOON_PARAMETERS)
_CARD_PARAMETERS = ("tx.pkts", "tx.bytes", "rx.pkts", "rx.bytes")  # in the order of `NetflowReading`
_QMP_FIELDS = tuple(spec.field for spec in list_raw_fields(SourceKind.QMP))
# virDomainState, in the words of QMP's query-status
_STATES = ("unknown", "running", "running", "paused", "shutdown", "shutdown", "crashed", "suspended")
_MAX_MEMBERS = 1024  # disks or network cards of one domain that are believed
_MAX_VALUE = 2**63

SHARD_DOMAINS = 16  # domains of one bulk call: about 2 to 6 ms each, which must end within the deadline of a reading
_SHARED_NS = 250_000_000  # a reading that began less than this time ago belongs to the same tick
_OPEN_DEADLINE_S = 5.0
_OVERDUE_NS = 2_000_000_000  # after this time the connection is given up: one QEMU that hangs must not stop the others
_MAX_ABANDONED = 4  # calls that may hang at once, each of which occupies a worker of the daemon
_MAX_PAUSE_NS = 30_000_000_000  # longest pause between two attempts to connect
_SILENT_READINGS = 4  # readings in a row without an answer until a domain counts as silent: 2 s
_BUSY_READINGS, _MAX_BUSY = 20, 4  # of so many readings, more without disks than this are reported


class HypervisorReading(NamedTuple):
    """One answer: the domains of a bulk call and how often each was reset."""

    domains: Mapping[str, DomainStats]
    resets: Mapping[str, int]


def parse_disks(values: Mapping[str, Any]) -> dict[Hashable, tuple[int, ...]] | None:
    """Return disk → its counters in the order of `_DISK_PARAMETERS`.

    A disk without counters, such as an empty drive, is left out.

    Returns:
        None if no disk has counters though there are disks: the monitor was not asked.
    """
    disks: dict[Hashable, tuple[int, ...]] = {}
    n_disks = _parse_count(values, "block.count")
    for number in range(n_disks):
        counters = [_parse_counter(values, f"block.{number}.{name}") for name in _DISK_PARAMETERS.values()]
        if None not in counters:
            disks[number, values.get(f"block.{number}.name")] = tuple(counter or 0 for counter in counters)
    return None if n_disks and not disks else disks


def parse_network(values: Mapping[str, Any]) -> dict[Hashable, tuple[int, ...]] | None:
    """Return tap device → frames and bytes that the guest sent and received; None if a card has no counters."""
    cards: dict[Hashable, tuple[int, ...]] = {}
    for number in range(_parse_count(values, "net.count")):
        counters = [_parse_counter(values, f"net.{number}.{name}") for name in _CARD_PARAMETERS]
        if None in counters:
            return None
        cards[values.get(f"net.{number}.name", number)] = tuple(counter or 0 for counter in counters)
    return cards


def parse_balloon(values: Mapping[str, Any]) -> tuple[int, tuple[int | None, ...]] | None:
    """Return when the guest last reported (s, host time), and the balloon fields; None if it never did."""
    updated_s = _parse_counter(values, "balloon.last-update")
    if not updated_s:
        return None
    counters = ((_parse_counter(values, name), factor) for name, factor in _BALLOON_PARAMETERS.values())
    scaled = (None if counter is None else counter * factor for counter, factor in counters)
    return updated_s, tuple(value if value is not None and value < _MAX_VALUE else None for value in scaled)


def parse_state(values: Mapping[str, Any]) -> str:
    """Return the state of a domain in the words of QMP's ``query-status``."""
    number = _parse_counter(values, "state.state")
    return _STATES[number] if number is not None and number < len(_STATES) else "unknown"


def _parse_counter(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    return value if isinstance(value, int) and 0 <= value < _MAX_VALUE else None


def _parse_count(values: Mapping[str, Any], name: str) -> int:
    return min(_MAX_MEMBERS, _parse_counter(values, name) or 0)


class LibvirtHypervisor:
    """The local libvirt daemon: one object for all VMs of a watch, which opens nothing before a domain is added.

    Domains share bulk calls of up to `SHARD_DOMAINS` each, every one on a connection and in a thread of its own, so
    that a QEMU that hangs delays few others.

    Args:
        clock: Clock of the host.
        make_client: Returns a new connection; tests pass fakes.
    """

    def __init__(self, clock: AsyncClock, make_client: Callable[[], StatsClient] = LibvirtClient) -> None:
        self._clock, self._make_client = clock, make_client
        self._shards: list[_Shard] = []

    async def add_domain(self, uuid: str) -> LibvirtDomain:
        """Return a domain that is read from now on.

        Raises:
            VmError: If libvirt does not answer, or does not know the domain.
        """
        shard = next((shard for shard in self._shards if len(shard.uuids) < SHARD_DOMAINS), None)
        if shard is None:
            shard = _Shard(self._clock, self._make_client)
            self._shards.append(shard)
        domain = LibvirtDomain(self, shard, uuid.lower())
        shard.uuids.append(domain.uuid)
        try:
            await domain.find()
        except BaseException:
            self.remove_domain(domain)
            raise
        return domain

    def remove_domain(self, domain: LibvirtDomain) -> None:
        """Read a domain no more; the connection of the last one of its bulk call is closed."""
        shard = domain.shard
        if shard in self._shards and domain.uuid in shard.uuids:
            shard.uuids.remove(domain.uuid)
            if not shard.uuids:
                self._shards.remove(shard)
                shard.close()

    def close(self) -> None:
        """Close every connection; one in which a call hangs closes when the call ends."""
        shards, self._shards = self._shards, []
        for shard in shards:
            shard.close()


class LibvirtDomain:
    """One domain of libvirt.

    Args:
        hypervisor: The daemon.
        shard: The bulk call that it belongs to.
        uuid: UUID in lower case.

    Attributes:
        stats: What `find` found.
        resets: How often the domain was reset, as far as was read.
        state: State in the words of QMP's ``query-status``, as last read; ``silent`` after several failed readings.
    """

    def __init__(self, hypervisor: LibvirtHypervisor, shard: _Shard, uuid: str) -> None:
        self._hypervisor = hypervisor
        self.shard, self.uuid = shard, uuid
        self.stats = DomainStats(uuid=uuid, name="", values={})
        self.resets, self.state = 0, "unknown"
        self._resets_seen: tuple[int, int] | None = None
        self._n_unanswered = 0

    async def find(self) -> None:
        """Read the domain for the first time.

        Raises:
            VmError: If libvirt does not answer, or does not know the domain.
        """
        reading = await self.shard.read(_OPEN_DEADLINE_S, is_new=True)
        if reading is None:
            raise VmError(self.shard.failure or f"libvirt did not answer within {_OPEN_DEADLINE_S:g} s")
        if self.uuid not in reading.domains:
            raise VmError(f"libvirt knows no running domain with the UUID {self.uuid}")
        self.stats = reading.domains[self.uuid]
        self._update(reading)

    async def read(self) -> DomainStats | None:
        """Return the domain's part of this tick's bulk call; None if there is no answer in time, or no such domain."""
        reading = await self.shard.read(ROUND_DEADLINE_S)
        if reading is None or self.uuid not in reading.domains:
            self._n_unanswered += 1
            if self._n_unanswered >= _SILENT_READINGS:
                self.state = "silent"
            return None
        self._update(reading)
        return reading.domains[self.uuid]

    async def close(self) -> None:
        """Read the domain no more; may be called twice."""
        self._hypervisor.remove_domain(self)

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the tap devices that libvirt counts frames of."""
        return tuple(sorted(name for name in parse_network(self.stats.values) or {} if isinstance(name, str)))

    def _update(self, reading: HypervisorReading) -> None:
        self._n_unanswered = 0
        self.state = parse_state(reading.domains[self.uuid].values)
        now = self.shard.connections, reading.resets.get(self.uuid, 0)
        before, self._resets_seen = self._resets_seen or now, now
        self.resets += now[1] - (before[1] if before[0] == now[0] else 0)


class DomainBlockSource:
    """Reads block and balloon counters of one domain: the `qmp` source of a VM whose monitor libvirt uses.

    Args:
        domain: The domain.
    """

    source = SourceKind.QMP

    def __init__(self, domain: LibvirtDomain) -> None:
        self._domain = domain
        self._disks = CounterSum()
        self._balloon_update: int | None = None
        self._unanswered = self._busy = 0
        self._recent: deque[bool] = deque(maxlen=_BUSY_READINGS)
        self._is_reported = False
        self._notes: list[str] = []

    async def open(self) -> None:
        """Do nothing; the hypervisor is connected."""

    async def close(self) -> None:
        """Do nothing; the hypervisor closes its connections."""

    async def read(self) -> ReadingValues:
        """Return one reading; None for the fields that libvirt does not have, or could not read now."""
        stats = await self._domain.read()
        if stats is None:
            self._unanswered += 1
            return build_missing_reading(self.source)
        fields: dict[str, int | None] = {}
        disks = parse_disks(stats.values)
        self._count_busy(disks is None)
        if disks is not None:
            sums = self._disks.add(disks, len(_DISK_PARAMETERS))
            fields = dict(zip(_DISK_PARAMETERS, sums, strict=True))
        balloon = parse_balloon(stats.values)
        if balloon is not None and balloon[0] != self._balloon_update:
            self._balloon_update = balloon[0]
            fields |= zip(_BALLOON_PARAMETERS, balloon[1], strict=True)
        return tuple(fields.get(name) for name in _QMP_FIELDS)

    @property
    def lost(self) -> dict[str, int]:
        """Lost readings by reason, without zeros."""
        lost = {"libvirt without an answer": self._unanswered, "libvirt while its monitor was used": self._busy}
        return {reason: count for reason, count in lost.items() if count}

    def pop_notes(self) -> list[str]:
        """Return and clear the messages since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def _count_busy(self, is_busy: bool) -> None:
        self._busy += is_busy
        self._recent.append(is_busy)
        n_busy = sum(self._recent)
        if n_busy > _MAX_BUSY and not self._is_reported:
            self._is_reported = True
            self._notes.append(
                f"{n_busy} of the last {len(self._recent)} readings have no disks: another client of libvirt (a second "
                "watcher, virsh, an exporter, a backup) was using the domain's monitor"
            )
        elif not n_busy:
            self._is_reported = False


class DomainNetworkSource:
    """Reads frames and bytes of one domain's network cards: the `netflow` source where taps cannot be looked into.

    Args:
        domain: The domain.
    """

    source = SourceKind.NETFLOW

    def __init__(self, domain: LibvirtDomain) -> None:
        self._domain = domain
        self._cards = CounterSum()

    async def open(self) -> None:
        """Check that every card is counted.

        Raises:
            VmError: If the domain has no card, or one that libvirt counts nothing of.
        """
        if not parse_network(self._domain.stats.values):
            raise VmError("libvirt counts no frames of this domain's network cards")

    async def close(self) -> None:
        """Do nothing; the hypervisor closes its connections."""

    async def read(self) -> ReadingValues:
        """Return one reading; None for every field while a card has no counters."""
        stats = await self._domain.read()
        cards = parse_network(stats.values) if stats is not None else None
        if not cards:
            return build_missing_reading(self.source)
        counters = self._cards.add(cards, len(_CARD_PARAMETERS))
        return (*counters, *(None for _ in range(len(NetflowReading._fields) - len(counters))))


class _Shard:
    """One bulk call per tick for some domains, in a thread of its own, with deadlines and reconnection.

    Attributes:
        uuids: The domains.
        failure: Why the last call failed, for people; empty if it did not.
        connections: How often a connection was opened.
    """

    def __init__(self, clock: AsyncClock, make_client: Callable[[], StatsClient]) -> None:
        self.uuids: list[str] = []
        self.failure = ""
        self.connections = 0
        self._clock, self._make_client = clock, make_client
        self._worker: _Worker | None = None
        self._call: asyncio.Future[HypervisorReading] | None = None
        self._asked_ns = self._retry_ns = self._pause_ns = 0
        self._abandoned: list[asyncio.Future[HypervisorReading]] = []
        self._has_answered = self._is_reported = False

    async def read(self, deadline_s: float, *, is_new: bool = False) -> HypervisorReading | None:
        """Return this tick's answer; None if it does not come in time.

        Args:
            deadline_s: Deadline.
            is_new: Whether an answer of this tick that may have been asked for before is not enough.
        """
        while is_new and self._call is not None and not self._call.done():  # it was asked before the domain was added
            done, _ = await asyncio.wait([self._call], timeout=deadline_s)
            if not done:
                break
        call = self._call
        if call is None or is_new or self._clock.mono_ns() - self._asked_ns >= _SHARED_NS:
            call = self._start_call()
        if call is None:
            return None
        await asyncio.wait([call], timeout=deadline_s)
        return self._collect(call) if call.done() else None

    def close(self) -> None:
        """Close the connection; if a call hangs in it, its thread closes it when the call ends."""
        self._drop_worker()

    def _start_call(self) -> asyncio.Future[HypervisorReading] | None:
        """Start the next bulk call; None while one is outstanding, or the daemon is left alone."""
        call = self._call
        if call is not None and call.done():
            self._collect(call)  # an error that came after the deadline
        now_ns = self._clock.mono_ns()
        if call is not None and not call.done():
            if now_ns - self._asked_ns < _OVERDUE_NS:
                return None
            self._abandoned = [each for each in self._abandoned if not each.done()]
            self._fail(f"libvirt did not answer within {_OVERDUE_NS / 1e9:g} s")
            if len(self._abandoned) >= _MAX_ABANDONED:
                return None
            self._abandoned.append(call)
            self._drop_worker()
        elif now_ns < self._retry_ns:
            return None
        if self._worker is None:
            self._worker = _Worker(self._make_client)
            self.connections += 1
        self._asked_ns = now_ns
        self._call = self._worker.ask(tuple(dict.fromkeys(self.uuids)))
        return self._call

    def _collect(self, call: asyncio.Future[HypervisorReading]) -> HypervisorReading | None:
        try:
            reading = call.result()
        except VmError as exc:
            if call is self._call:
                self._call = None
                self._drop_worker()
                self._fail(str(exc))
                self._pause_ns = min(_MAX_PAUSE_NS, max(1_000_000_000, 2 * self._pause_ns))
                self._retry_ns = self._clock.mono_ns() + self._pause_ns
            return None
        if self._is_reported:
            logger.info("libvirt answers again")
        self.failure, self._has_answered, self._is_reported, self._pause_ns = "", True, False, 0
        return reading

    def _drop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()

    def _fail(self, reason: str) -> None:
        self.failure = reason
        if self._has_answered and not self._is_reported:
            self._is_reported = True
            logger.warning("%s; its readings are unknown until it answers again", reason)


class _Worker:
    """A thread with one connection, which it opens, uses and closes; a daemon thread, because a call may never end."""

    def __init__(self, make_client: Callable[[], StatsClient]) -> None:
        self._jobs: queue.SimpleQueue[tuple[tuple[str, ...], asyncio.Future[HypervisorReading]] | None] = (
            queue.SimpleQueue()
        )
        self._client = make_client()
        threading.Thread(target=self._run, name="libvirt", daemon=True).start()

    def ask(self, uuids: tuple[str, ...]) -> asyncio.Future[HypervisorReading]:
        """Return the future answer of one bulk call."""
        answer: asyncio.Future[HypervisorReading] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(_retrieve_exception)
        self._jobs.put((uuids, answer))
        return answer

    def stop(self) -> None:
        """Close the connection after the last call."""
        self._jobs.put(None)

    def _run(self) -> None:
        client, is_open = self._client, False
        while (job := self._jobs.get()) is not None:
            uuids, answer = job
            result: HypervisorReading | Exception
            try:
                if not is_open:
                    client.open()
                    is_open = True
                domains = client.read(uuids)
                result = HypervisorReading(domains, {uuid: client.count_resets(uuid) for uuid in uuids})
            except Exception as exc:  # whatever a binding raises, the watch goes on
                result = exc if isinstance(exc, VmError) else VmError(f"libvirt: {exc!r}")
            with suppress(RuntimeError):  # the event loop is closed
                answer.get_loop().call_soon_threadsafe(_set_answer, answer, result)
        client.close()


def _set_answer(answer: asyncio.Future[HypervisorReading], result: HypervisorReading | Exception) -> None:
    if answer.done():
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def _retrieve_exception(answer: asyncio.Future[HypervisorReading]) -> None:
    if not answer.cancelled():
        answer.exception()  # nobody may wait for it any more
