"""Sums of counters whose members come, go and restart, such as the disks and the virtqueues of a VM (pure).

A member that goes, or starts again from 0, makes the sum unknown for that interval. The sum then starts again from 0:
a counter that falls gives no rate in the bin that holds the fall, live and in a saved bundle alike.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_RING_WRAP = 1 << 16  # a virtqueue's used index has 16 bits
_MAX_UNCHECKED_REQUESTS = 4096  # requests in one interval that are believed without the disks' statistics
_REQUEST_SLACK = 64  # requests that block statistics do not count, or not at the same moment
_BLOCK_KEYS = (
    "rd_bytes", "wr_bytes", "rd_operations", "wr_operations", "flush_operations", "wr_total_time_ns",
)  # fmt: skip
_REQUEST_KEYS = tuple(
    f"{prefix}{kind}_operations"
    for prefix in ("", "failed_", "invalid_")
    for kind in ("rd", "wr", "flush", "unmap", "zone_append")
)


class CounterSum:
    """Sum ``k`` counters over a set of members that may change."""

    def __init__(self) -> None:
        self._before: dict[Hashable, tuple[int, ...]] | None = None
        self._total: tuple[int, ...] = ()

    def add(self, readings: Mapping[Hashable, tuple[int, ...]], width: int) -> tuple[int, ...]:
        """Return the sums after one reading of all members.

        Args:
            readings: Member → its ``width`` counters.
            width: How many counters a member has.

        Returns:
            At first the sum of the counters themselves, then that sum plus all growth. A new member counts from
            its first reading on. When a member is gone, or one of its counters fell, all sums start again from 0.
        """
        before, self._before = self._before, dict(readings)
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
    """What `query-blockstats` shows of the disks together.

    Attributes:
        sums: Bytes read, bytes written, reads, writes, flushes, nanoseconds in writes.
        highest: Sum of the highest offsets ever written, bytes.
        requests: Requests of every kind that completed since the reading before; None where that is not known.
        members: The disks.
    """

    sums: tuple[int, ...]
    highest: int
    requests: int | None
    members: frozenset[Hashable]


class BlockSum:
    """Sum `query-blockstats` over the disks that are there."""

    def __init__(self) -> None:
        self._counters, self._requests = CounterSum(), CounterSum()
        self._requests_before: int | None = None

    def add(self, devices: Sequence[Mapping[str, Any]]) -> BlockReading:
        """Return the sums after one answer.

        Raises:
            KeyError, TypeError, ValueError: If the answer is not one of `query-blockstats`.
        """
        stats: dict[tuple[str, int], Mapping[str, Any]] = {}
        for device in devices:
            name = device.get("qdev") or device.get("device")
            if name:
                stats[name, len(stats) if name in {member[0] for member in stats} else 0] = device["stats"]
        sums = self._counters.add(
            {member: tuple(int(stat[key]) for key in _BLOCK_KEYS) for member, stat in stats.items()}, len(_BLOCK_KEYS)
        )
        (total,) = self._requests.add(
            {member: (sum(int(stat.get(key, 0)) for key in _REQUEST_KEYS),) for member, stat in stats.items()}, 1
        )
        before, self._requests_before = self._requests_before, total
        return BlockReading(
            sums=sums, highest=sum(int(stat["wr_highest_offset"]) for stat in stats.values()),
            requests=total - before if before is not None and total >= before else None, members=frozenset(stats),
        )  # fmt: skip


class VirtqueueSum:
    """Sum the requests that virtqueues completed, from their used indices, which are 16-bit counters that wrap."""

    def __init__(self) -> None:
        self._before: dict[Hashable, int] = {}
        self._total = 0

    def add(self, used: Mapping[Hashable, int], *, requests: int | None, restarted: bool) -> int | None:
        """Return how many requests all queues completed since the first reading or the last restart.

        A growth is believed if the disks' own statistics allow it. Otherwise the index was not wrapped but set back
        (reset, reboot, another driver, a restored snapshot), and the sum starts again from 0.

        Args:
            used: Queue → its used index, of the queues that are there.
            requests: Requests that the disks completed in this interval; None if that is not known. Then an index
                that fell, or grew by thousands, is a restart.
            restarted: Whether the machine is known to have been reset or restored in this interval.

        Returns:
            The sum; None where a restart cannot be shown, because the sum was 0 already.
        """
        before, self._before = self._before, dict(used)
        grown = {queue: (used[queue] - index) % _RING_WRAP for queue, index in before.items() if queue in used}
        if requests is None:
            is_fall = any(used[queue] < before[queue] for queue in grown)
            is_credible = not is_fall and sum(grown.values()) <= _MAX_UNCHECKED_REQUESTS
        else:
            is_credible = sum(grown.values()) <= 2 * requests + _REQUEST_SLACK
        if restarted or len(grown) < len(before) or not is_credible:
            had, self._total = self._total, 0
            return 0 if had else None
        self._total += sum(grown.values())
        return self._total
