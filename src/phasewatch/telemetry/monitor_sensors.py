"""Ask a QEMU monitor what the guest writes and dirties: dirty bitmaps of its disks, page sampling, KVM's statistics.

- ``block-dirty-bitmap-add`` adds two bitmaps of 64 KiB clusters to each disk: one remembers every cluster that was
  written, the other is cleared after each reading. ``query-named-block-nodes`` has their counts.
- ``calc-dirty-rate`` samples pages in a thread of QEMU for a second; ``query-dirty-rate`` has the result.
- ``query-stats`` (KVM only) has the exits of the vCPUs.

The bitmaps are in QEMU's memory alone, one bit for 64 KiB of disk, and are removed when the source closes.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from phasewatch.errors import VmError
from phasewatch.telemetry.base import AsyncClock
from phasewatch.telemetry.counters import CounterSum
from phasewatch.telemetry.monitor_queries import NOT_ASKED, MonitorQuery

__all__ = [
    "BITMAP_FIELDS",
    "DIRTY_RATE_FIELDS",
    "KVM_FIELDS",
    "MAX_DISK_BYTES",
    "MAX_SAMPLED_MEMORY_BYTES",
    "SENSOR_FIELDS",
    "MonitorAsker",
    "MonitorSensors",
    "build_bitmap_names",
    "list_bitmaps",
    "remove_bitmaps",
]

BITMAP_FIELDS = ("blk_clusters", "blk_rewritten")
DIRTY_RATE_FIELDS = ("mem_dirty_rate",)
KVM_FIELDS = ("kvm_exits", "kvm_io_exits", "kvm_halt_exits", "kvm_halt_polls")
SENSOR_FIELDS = (*BITMAP_FIELDS, *DIRTY_RATE_FIELDS, *KVM_FIELDS)
MAX_DISK_BYTES = 1 << 42  # a larger disk gets no bitmap: one of 4 TiB takes 8 MiB of QEMU's memory
MAX_SAMPLED_MEMORY_BYTES = 1 << 36  # a larger guest is not sampled: 128 pages per GiB is QEMU's least
_CLUSTER_BYTES = 1 << 16
_LIST_ROUNDS = 20  # rounds between two lists of the disks: 10 s
_SAMPLED_PAGES = 1024  # aimed at, over all of the guest's memory
_MIN_SAMPLE_PAGES, _MAX_SAMPLE_PAGES = 128, 4096  # per GiB, QEMU's limits
_SAMPLING_S = 1  # QEMU's shortest
_MAX_AGE_NS = 2_500_000_000  # a dirty rate is repeated for at most this long
_KVM_STATS = ("exits", "io_exits", "mmio_exits", "halt_exits", "halt_attempted_poll")


class MonitorAsker(Protocol):
    """Sends commands to a QEMU monitor."""

    async def __call__(self, command: str, **arguments: object) -> Any:
        """Execute one QMP command and return its result; raises VmError."""


def build_bitmap_names(prefix: str) -> tuple[str, ...]:
    """Return the names of the two bitmaps that a watcher adds to a disk: of all time, and of one reading.

    Args:
        prefix: Identity of the watcher, from `phasewatch.live.ownership.build_name_prefix`.
    """
    return f"{prefix}-written", f"{prefix}-reading"


async def list_bitmaps(ask: MonitorAsker) -> tuple[tuple[str, str], ...]:
    """Return node and name of every dirty bitmap of a VM's disks.

    Raises:
        VmError: If QEMU does not answer.
        KeyError, TypeError: If the answer has an unknown shape.
    """
    nodes = _parse_bitmaps(await ask("query-named-block-nodes", flat=True))
    return tuple((node, name) for node, bitmaps in nodes.items() for name in bitmaps)


async def remove_bitmaps(ask: MonitorAsker, names: Collection[str]) -> tuple[str, ...]:
    """Remove the dirty bitmaps of some names from all disks; return the name of each that was removed.

    Raises:
        VmError: If QEMU does not answer, or refuses to remove one.
        KeyError, TypeError: If the answer has an unknown shape.
    """
    removed = []
    for node, name in await list_bitmaps(ask):
        if name in names:
            await ask("block-dirty-bitmap-remove", node=node, name=name)
            removed.append(name)
    return tuple(removed)


def _parse_bitmaps(nodes: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return node → bitmap → bytes that it marks."""
    return {
        node["node-name"]: {
            bitmap["name"]: int(bitmap["count"]) for bitmap in node.get("dirty-bitmaps", ()) if "name" in bitmap
        }
        for node in nodes
    }


class _ClusterCounter:
    """Counts written and rewritten clusters of all disks from the counts of two bitmaps each (no input or output)."""

    def __init__(self) -> None:
        self.touched = self.rewritten = 0
        self._written: dict[str, int] = {}  # bytes that the bitmap of all time had marked
        self._uncleared: dict[str, int] = {}  # bytes of the bitmap of one reading that were counted before

    def add(self, node: str, *, written: int, reading: int) -> None:
        """Add one reading of one disk, in bytes."""
        before = self._written.get(node, 0)
        touched = max(0, reading - self._uncleared.get(node, 0)) // _CLUSTER_BYTES
        fresh = max(0, written - before) // _CLUSTER_BYTES
        self._written[node], self._uncleared[node] = written, reading
        self.touched += touched
        # A cluster written between the reading and the clearing is fresh, and in no reading.
        self.rewritten += max(0, touched - fresh)

    def clear(self, node: str) -> None:
        """Note that the bitmap of one reading is empty again."""
        self._uncleared[node] = 0

    def keep(self, nodes: Iterable[str]) -> None:
        """Forget all other disks."""
        kept = set(nodes)
        for table in (self._written, self._uncleared):
            for node in table.keys() - kept:
                del table[node]


class MonitorSensors:
    """The queries of the extended sensors; `QmpSource` sends them with its own.

    Args:
        clock: Clock of the host.
        bitmaps: Names of the two bitmaps, from `build_bitmap_names`.

    Attributes:
        queries: The queries that this VM answers, after `open`.
        missing: Raw field → reason why this VM does not have it, after `open`.
    """

    def __init__(self, *, clock: AsyncClock, bitmaps: tuple[str, ...]) -> None:
        self._clock, self._names = clock, bitmaps
        self._ask: MonitorAsker | None = None
        self._clusters = _ClusterCounter()
        self._disks: tuple[str, ...] = ()
        self._rounds_to_list = 0
        self._sample_pages = 0
        self._is_measuring = False
        self._dirty_rate: int | None = None
        self._dirty_ns = 0
        self._kvm_sums = [CounterSum() for _ in KVM_FIELDS]
        self._bitmap_query = MonitorQuery("dirty bitmaps", self._query_bitmaps)
        self._rate_query = MonitorQuery("query-dirty-rate", self._query_dirty_rate)
        self._kvm_query = MonitorQuery("query-stats", self._query_kvm)
        self.queries: list[MonitorQuery] = []
        self.missing: dict[str, str] = {}

    async def open(self, ask: MonitorAsker) -> None:
        """Add the bitmaps, and find out what this VM answers; what it does not is in `missing`.

        Args:
            ask: Executes a QMP command.
        """
        self._ask = ask
        self.queries, self.missing = [], {}
        for query, fields, prepare in (
            (self._bitmap_query, BITMAP_FIELDS, self._add_bitmaps),
            (self._rate_query, DIRTY_RATE_FIELDS, self._choose_sampling),
            (self._kvm_query, KVM_FIELDS, self._find_kvm_stats),
        ):
            try:
                reason = await prepare(ask)
            except (VmError, KeyError, TypeError, ValueError) as exc:
                reason = str(exc) or "the monitor's answer has an unknown shape"
            if reason:
                self.missing |= dict.fromkeys(fields, reason)
            else:
                self.queries.append(query)

    async def close(self) -> None:
        """Remove the bitmaps; a page sampling that runs ends by itself."""
        if self._ask is not None:
            with suppress(VmError, KeyError, TypeError):
                await remove_bitmaps(self._ask, self._names)

    def pop_values(self) -> tuple[int | None, ...]:
        """Return the values of `SENSOR_FIELDS` after a round; None where a query has no answer."""
        clusters = (
            (self._clusters.touched, self._clusters.rewritten) if self._bitmap_query.answer is True else (None,) * 2
        )
        rate = self._dirty_rate if self._rate_query.answer is not None else None
        if self._clock.mono_ns() - self._dirty_ns > _MAX_AGE_NS:
            rate = None
        return (*clusters, rate, *self._convert_kvm())

    # ---- bitmaps

    async def _add_bitmaps(self, ask: MonitorAsker) -> str:
        """Add bitmaps to the disks that lack them; return why none has them, or nothing."""
        disks, too_large = [], 0
        for device in await ask("query-block"):
            inserted = device.get("inserted")
            if not inserted or inserted["ro"] or not (device.get("qdev") or device.get("device")):
                continue
            if int(inserted["image"]["virtual-size"]) > MAX_DISK_BYTES:
                too_large += 1
                continue
            disks.append(str(inserted["node-name"]))
        present = _parse_bitmaps(await ask("query-named-block-nodes", flat=True))
        for node in disks:
            for name in self._names:
                if name not in present.get(node, {}):
                    await ask(
                        "block-dirty-bitmap-add", node=node, name=name, granularity=_CLUSTER_BYTES, persistent=False
                    )
        self._disks, self._rounds_to_list = tuple(disks), _LIST_ROUNDS
        self._clusters.keep(disks)
        if disks:
            return ""
        return f"no disk is smaller than {MAX_DISK_BYTES >> 40} TiB" if too_large else "the VM has no writable disk"

    async def _query_bitmaps(self) -> Any:
        ask = self._ask
        if ask is None:
            return None
        self._rounds_to_list -= 1
        if self._rounds_to_list < 0:
            await self._add_bitmaps(ask)
        written_name, reading_name = self._names
        present = _parse_bitmaps(await ask("query-named-block-nodes", flat=True))
        is_whole = True
        for node in self._disks:
            bitmaps = present.get(node, {})
            if written_name not in bitmaps or reading_name not in bitmaps:
                is_whole, self._rounds_to_list = False, 0  # another disk or snapshot: list them again
                continue
            self._clusters.add(node, written=bitmaps[written_name], reading=bitmaps[reading_name])
            if bitmaps[reading_name]:
                await ask("block-dirty-bitmap-clear", node=node, name=reading_name)
                self._clusters.clear(node)
        return True if is_whole else NOT_ASKED

    # ---- memory

    async def _choose_sampling(self, ask: MonitorAsker) -> str:
        """Choose how many pages are sampled; return why none is, or nothing."""
        size = await ask("query-memory-size-summary")
        memory = int(size["base-memory"]) + int(size.get("plugged-memory", 0))
        if memory > MAX_SAMPLED_MEMORY_BYTES:
            return f"a guest of more than {MAX_SAMPLED_MEMORY_BYTES >> 30} GiB is not sampled: QEMU would read too much"
        wanted = _SAMPLED_PAGES * (1 << 30) // max(memory, 1)
        self._sample_pages = min(max(wanted, _MIN_SAMPLE_PAGES), _MAX_SAMPLE_PAGES)
        await ask("query-dirty-rate")
        return ""

    async def _query_dirty_rate(self) -> Any:
        """Collect a finished sampling, and begin the next one; another client's is waited for, and not read."""
        ask = self._ask
        if ask is None:
            return None
        state = await ask("query-dirty-rate")
        if state["status"] == "measuring":
            return True
        if self._is_measuring and state["status"] == "measured" and int(state["dirty-rate"]) >= 0:  # -1: it failed
            self._dirty_rate, self._dirty_ns = int(state["dirty-rate"]) << 20, self._clock.mono_ns()
        self._is_measuring = False
        await ask(
            "calc-dirty-rate",
            **{"calc-time": _SAMPLING_S, "mode": "page-sampling", "sample-pages": self._sample_pages},
        )
        self._is_measuring = True
        return True

    # ---- KVM

    async def _find_kvm_stats(self, ask: MonitorAsker) -> str:
        return "" if await self._ask_kvm(ask) else "only KVM counts it"

    async def _ask_kvm(self, ask: MonitorAsker) -> Any:
        providers = [{"provider": "kvm", "names": list(_KVM_STATS)}]
        return await ask("query-stats", target="vcpu", providers=providers)

    async def _query_kvm(self) -> Any:
        return None if self._ask is None else await self._ask_kvm(self._ask)

    def _convert_kvm(self) -> tuple[int | None, ...]:
        answer = self._kvm_query.answer
        if not answer or answer is NOT_ASKED:
            return (None,) * len(KVM_FIELDS)
        try:
            vcpus: dict[Hashable, dict[str, int]] = {
                vcpu["qom-path"]: {s["name"]: s["value"] for s in vcpu["stats"] if isinstance(s["value"], int)}
                for vcpu in answer
            }
        except (KeyError, TypeError):
            self._kvm_query.refuse("an answer of an unknown shape")
            return (None,) * len(KVM_FIELDS)
        names = (("exits",), ("io_exits", "mmio_exits"), ("halt_exits",), ("halt_attempted_poll",))
        values: list[int | None] = []
        for total, wanted in zip(self._kvm_sums, names, strict=True):
            readings = {
                path: (sum(stats.get(name, 0) for name in wanted),)
                for path, stats in vcpus.items()
                if any(name in stats for name in wanted)
            }
            values.append(total.add(readings, 1)[0] if len(readings) == len(vcpus) else None)
        return tuple(values)
