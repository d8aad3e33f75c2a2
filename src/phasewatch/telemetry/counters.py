"""Sum counters over members that come, go and restart, such as the disks and virtqueues of a VM (pure).

When a member goes, or starts again from 0, the growth of that interval is unknown. The sum then starts again from 0,
because binning computes no rate across a falling counter, neither live nor from a saved bundle.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BlockReading", "BlockSum", "CounterSum", "VirtqueueSum"]

_INDEX_WRAP = 1 << 16  # a virtqueue's used index has 16 bits
_MAX_UNCHECKED_REQUESTS = 4096  # requests in one interval that are plausible without block statistics
_REQUEST_SLACK = 64  # requests that block statistics count later or not at all
_BLOCK_KEYS = (
    "rd_bytes",
    "wr_bytes",
    "rd_operations",
    "wr_operations",
    "flush_operations",
    "wr_total_time_ns",
)
_EXTENDED_BLOCK_KEYS = (("rd_total_time_ns",), ("rd_merged", "wr_merged"), ("flush_total_time_ns",))
_REQUEST_KEYS = tuple(
    f"{prefix}{kind}_operations"
    for prefix in ("", "failed_", "invalid_")
    for kind in ("rd", "wr", "flush", "unmap", "zone_append")
)


class CounterSum:
    """Sums ``k`` counters over a changing set of members."""

    def __init__(self) -> None:
        self._before: dict[Hashable, tuple[int, ...]] | None = None
        self._total: tuple[int, ...] = ()

    def add(self, readings: Mapping[Hashable, tuple[int, ...]], width: int) -> tuple[int, ...]:
        """Return the sums after one reading of all members.

        Args:
            readings: Member → its ``k`` counters.
            width: ``k``.

        Returns:
            ``k`` sums: first of the counters themselves, then plus their growth. A new member counts from its first
            reading on. When a member is gone, or one of its counters fell, all sums start again from 0.
        """
        before, self._before = self._before, dict(readings)
        if before == self._before:  # most disks are idle most of the time
            return self._total
        if before is None:
            self._total = tuple(sum(values[i] for values in readings.values()) for i in range(width))
        elif _has_restarted(before, readings):
            self._total = (0,) * width
        else:
            grown = [[now - then for now, then in zip(readings[m], before[m], strict=True)] for m in before]
            self._total = tuple(total + sum(g[i] for g in grown) for i, total in enumerate(self._total))
        return self._total


def _has_restarted(before: Mapping[Hashable, tuple[int, ...]], now: Mapping[Hashable, tuple[int, ...]]) -> bool:
    return any(
        member not in now or any(b > a for b, a in zip(values, now[member], strict=True))
        for member, values in before.items()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReading:
    """Sums over all disks of one answer of ``query-blockstats``.

    Attributes:
        sums: Bytes read, bytes written, reads, writes, flushes, nanoseconds in writes.
        extended: Nanoseconds in reads, merged requests, nanoseconds in flushes; None where QEMU does not count it.
        highest: Sum of the disks' highest written offsets, bytes.
        requests: Requests of every kind that completed since the last reading; None if unknown.
        members: The disks.
    """

    sums: tuple[int, ...]
    extended: tuple[int | None, ...]
    highest: int
    requests: int | None
    members: frozenset[Hashable]


class BlockSum:
    """Sums ``query-blockstats`` over the present disks."""

    def __init__(self) -> None:
        self._counters, self._requests = CounterSum(), CounterSum()
        self._extended = [CounterSum() for _ in _EXTENDED_BLOCK_KEYS]
        self._requests_before: int | None = None

    def add(self, devices: Sequence[Mapping[str, Any]]) -> BlockReading:
        """Return the sums after one answer.

        Args:
            devices: The answer of ``query-blockstats``.

        Raises:
            KeyError, TypeError, ValueError: If it has an unknown shape.
        """
        stats: dict[tuple[str, int], Mapping[str, Any]] = {}
        for device in devices:
            name = device.get("qdev") or device.get("device")
            if name:
                stats[name, len(stats) if name in {member[0] for member in stats} else 0] = device["stats"]
        sums = self._counters.add(
            {member: tuple([int(stat[key]) for key in _BLOCK_KEYS]) for member, stat in stats.items()}, len(_BLOCK_KEYS)
        )
        (total,) = self._requests.add({member: (_count_requests(stat),) for member, stat in stats.items()}, 1)
        extended: list[int | None] = []
        for counter, keys in zip(self._extended, _EXTENDED_BLOCK_KEYS, strict=True):
            counted: dict[Hashable, tuple[int, ...]] = {
                m: (sum([int(stat[key]) for key in keys]),)
                for m, stat in stats.items()
                if all(key in stat for key in keys)
            }
            extended.append(counter.add(counted, 1)[0] if len(counted) == len(stats) else None)
        before, self._requests_before = self._requests_before, total
        return BlockReading(
            sums=sums,
            extended=tuple(extended),
            highest=sum(int(stat["wr_highest_offset"]) for stat in stats.values()),
            requests=total - before if before is not None and total >= before else None,
            members=frozenset(stats),
        )


def _count_requests(stat: Mapping[str, Any]) -> int:
    return sum([int(stat[key]) for key in _REQUEST_KEYS if key in stat])


class VirtqueueSum:
    """Sums the requests that virtqueues completed, from their used indices: 16-bit counters that wrap (VIRTIO 1.x)."""

    def __init__(self) -> None:
        self._before: dict[Hashable, int] = {}
        self._total = 0

    def add(self, used: Mapping[Hashable, int], *, requests: int | None, is_restarted: bool) -> int | None:
        """Return how many requests all queues completed since the first reading or the last restart.

        Growth is accepted if block statistics agree with it. Otherwise the index did not wrap but was reset (reset,
        reboot, new driver, restored snapshot), and the sum starts again from 0.

        Args:
            used: Queue → its used index, for the present queues.
            requests: Requests that the disks completed in this interval. If None (unknown), an index that fell or grew
                by thousands counts as a restart.
            is_restarted: Whether the VM was certainly reset or restored in this interval.

        Returns:
            The sum; None if it was 0 before a restart, so that a fall to 0 could not show the restart.
        """
        before, self._before = self._before, dict(used)
        grown = {queue: (used[queue] - index) % _INDEX_WRAP for queue, index in before.items() if queue in used}
        if requests is None:
            is_fall = any(used[queue] < before[queue] for queue in grown)
            is_credible = not is_fall and sum(grown.values()) <= _MAX_UNCHECKED_REQUESTS
        else:
            is_credible = sum(grown.values()) <= 2 * requests + _REQUEST_SLACK
        if is_restarted or len(grown) < len(before) or not is_credible:
            total_before, self._total = self._total, 0
            return 0 if total_before else None
        self._total += sum(grown.values())
        return self._total
