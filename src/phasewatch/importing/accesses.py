"""Turn a list of disk accesses into counters: bytes, requests of merged pieces, and clusters written before."""

from __future__ import annotations

from fractions import Fraction

from phasewatch.importing.mapping import AccessPlan
from phasewatch.importing.numbers import Number
from phasewatch.importing.problems import ImportCode, ImportRefusal

__all__ = ["CLUSTER_BYTES", "AccessCounter"]

CLUSTER_BYTES = 64 << 10
MAX_PIECE_BYTES = 1 << 30
MAX_ADDRESS = 1 << 56
MAX_CLUSTERS = 4_000_000  # remembered in an episode: 256 GiB that were accessed


class AccessCounter:
    """Counts the accesses of one list in one episode.

    A piece continues the request before it if it begins where that piece ended, comes at most `merge_within` later, and
    the request stays within `merge_up_to`. Only the piece directly before it in time is looked at.

    Args:
        plan: The checked rule of the map.
    """

    def __init__(self, plan: AccessPlan) -> None:
        self._plan = plan
        self._totals = dict.fromkeys(("bytes", "pieces", "requests", "sequential", "clusters", "rewritten"), 0)
        self._sums: list[Number] = [0] * len(plan.sums)
        self._end, self._last_ns, self._request_bytes = -1, 0, 0
        self._touched: set[int] = set()  # in the present half second
        self._ever: set[int] = set()
        self._counts_clusters = bool(plan.outputs.keys() & {"clusters", "rewritten"})
        self._is_full = False

    def add(self, stamp_ns: int, address: Number, size: Number, sums: list[Number | None]) -> None:
        """Count one piece.

        Args:
            stamp_ns: Its time.
            address, size: In the units of the map.
            sums: Values of the summed columns; None without a reading.

        Raises:
            ImportRefusal: If address or size is impossible.
        """
        plan, totals = self._plan, self._totals
        start, length = _to_bytes(address, plan.address_factor), _to_bytes(size, plan.size_factor)
        if not 0 <= length <= MAX_PIECE_BYTES:
            raise ImportRefusal(ImportCode.NUMBER_RANGE, f"an access of {length:,} bytes; 0 to 1 GiB is allowed")
        if not 0 <= start <= MAX_ADDRESS:
            raise ImportRefusal(ImportCode.NUMBER_RANGE, "the address of an access is negative or above 64 PiB")
        totals["bytes"] += length
        totals["pieces"] += 1
        is_next = start == self._end
        if (
            is_next
            and stamp_ns - self._last_ns <= plan.merge_within_ns
            and self._request_bytes + length <= plan.merge_up_to_bytes
        ):
            self._request_bytes += length
        else:
            totals["requests"] += 1
            totals["sequential"] += is_next
            self._request_bytes = length
        self._end, self._last_ns = start + length, stamp_ns
        if self._counts_clusters and length and not self._is_full:
            self._touched.update(range(start // CLUSTER_BYTES, (start + length - 1) // CLUSTER_BYTES + 1))
        for i, value in enumerate(sums):
            if value is not None:
                self._sums[i] += value * plan.sums[i].factor

    def snapshot(self) -> list[Number | None]:
        """Return the counters at the end of a half second, in the order of `TablePlan.specs`."""
        totals = self._totals
        if self._touched:
            totals["clusters"] += len(self._touched)
            totals["rewritten"] += len(self._touched & self._ever)
            self._ever |= self._touched
            self._touched.clear()
            if len(self._ever) > MAX_CLUSTERS:
                self._is_full = True
                self._ever.clear()
        values: list[Number | None] = [
            None if self._is_full and name in ("clusters", "rewritten") else totals[name] for name in self._plan.outputs
        ]
        return values + list(self._sums)


def _to_bytes(value: Number, factor: Fraction) -> int:
    exact = value * factor
    if exact.denominator != 1:
        raise ImportRefusal(ImportCode.NUMBER_RANGE, "an address or size is no whole number of bytes")
    return int(exact)
