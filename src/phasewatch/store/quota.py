"""Limits of a receiver: reservations of running uploads, quotas of hosts, and minimum free space and files."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from phasewatch.bundle import limits

__all__ = [
    "MIN_CHARGE_BYTES",
    "QUOTA_PERIOD_S",
    "FreeFiles",
    "QuotaRefusal",
    "ReceiverLimits",
    "UploadQuota",
]

QUOTA_PERIOD_S = 86_400.0
MIN_CHARGE_BYTES = 8 << 10  # disk space of the smallest bundle: its block and that of its receipt
MAX_FILES_PER_UPLOAD = 4  # bundle, receipt, verdict, and the folder of the host

_QUOTA_SLOTS = 1440  # time slots of a quota, whatever the number of bundles
_REFUSED_BURST, _REFUSED_S = 64.0, 10.0  # refused bundles per host: at once, then one per interval


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeFiles:
    """How many more files a disk can hold, and how many it can hold in all."""

    free: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverLimits:
    """The limits of a receiver.

    Attributes:
        max_bundle_bytes: Maximum size of a bundle.
        min_bundle_bytes: Minimum size of a bundle.
        quota_bytes: New bytes per host within `quota_s`, at least `MIN_CHARGE_BYTES` per bundle; 0 means no limit.
        quota_bundles: New bundles per host within `quota_s`; 0 means no limit.
        quota_s: Period of the quotas.
        min_free_bytes: Free space that uploads leave.
        min_free_files: Free files (inodes) that uploads leave; at most a twentieth of all files of the disk.
        in_flight, in_flight_per_host: Maximum number of parallel uploads.
        read_timeout_s: Maximum pause within a body.
        min_bytes_per_s: Minimum mean rate of a body.
        grace_s: Additional time of every body, and time for running uploads when the receiver stops.
    """

    max_bundle_bytes: int = limits.MAX_COMPRESSED_BYTES
    min_bundle_bytes: int = limits.MIN_ZSTD_FRAME_BYTES
    quota_bytes: int = 0
    quota_bundles: int = 100_000
    quota_s: float = QUOTA_PERIOD_S
    min_free_bytes: int = 512 << 20
    min_free_files: int = 4096
    in_flight: int = 64
    in_flight_per_host: int = 8
    read_timeout_s: float = 15.0
    min_bytes_per_s: int = 16 << 10
    grace_s: float = 30.0

    def compute_deadline_s(self, size: int) -> float:
        """Return the maximum duration of a body of a size in bytes."""
        return self.grace_s + size / self.min_bytes_per_s

    def has_room(self, free_bytes: int | None, files: FreeFiles | None) -> bool:
        """Whether a disk has the minimum of free space and files; None means unknown."""
        has_bytes = free_bytes is None or free_bytes >= self.min_free_bytes
        return has_bytes and (files is None or files.free >= self.compute_min_free_files(files))

    def compute_min_free_files(self, files: FreeFiles) -> int:
        """Return the minimum number of free files on a disk."""
        return min(self.min_free_files, files.total // 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaRefusal:
    """Why an upload cannot begin: HTTP status, reason, and time until the next attempt."""

    status: int
    words: str
    retry_after_s: int


@dataclass(slots=True)
class _QuotaSlot:
    """Bundles and bytes of one time slot of a quota."""

    began_s: float
    last_s: float
    charge: int
    bundles: int


class UploadQuota:
    """The reservations of one receiver; every successful `reserve` is followed by one `release`."""

    def __init__(self, bounds: ReceiverLimits) -> None:
        """Start without reservations."""
        self._bounds = bounds
        self._reserved: Counter[str] = Counter()
        self._uploads: Counter[str] = Counter()
        self._recent: dict[str, deque[_QuotaSlot]] = {}
        self._refused: dict[str, tuple[float, float]] = {}  # remaining refusals of a host, and the time of that count

    @property
    def in_flight(self) -> int:
        """Number of running uploads."""
        return self._uploads.total()

    def needs_history(self, host_id: str) -> bool:
        """Whether a host's quota needs the bundles that it sent before this process started."""
        return bool(self._bounds.quota_bytes or self._bounds.quota_bundles) and host_id not in self._recent

    def load_history(self, host_id: str, held: Iterable[tuple[float, int]]) -> None:
        """Load the earlier bundles of a host, so that its quota survives a restart; later calls do nothing.

        Args:
            host_id: The host.
            held: Arrival time (Unix seconds) and size (bytes) of each bundle.
        """
        if host_id not in self._recent:
            self._recent[host_id] = deque()
            for stored_s, size in sorted(held):
                self._charge(host_id, size, stored_s)

    def reserve(
        self,
        host_id: str,
        size: int,
        *,
        now_s: float,
        free_bytes: int | None,
        files: FreeFiles | None = None,
        is_known: bool = False,
    ) -> QuotaRefusal | None:
        """Reserve space for an upload before its body is read.

        Args:
            host_id: The host whose quota is charged.
            size: Size of the body in bytes.
            now_s: Unix seconds.
            free_bytes: Free space of the store's disk; None if unknown.
            files: Free files of the store's disk; None if unknown.
            is_known: The store holds the same bytes under this id, so they cost no quota.

        Returns:
            The reason against the upload; None if the space is reserved.
        """
        bounds, charge = self._bounds, _compute_charge(size)
        if self.in_flight >= bounds.in_flight:
            return QuotaRefusal(status=503, words=f"{bounds.in_flight} uploads are running", retry_after_s=2)
        if self._uploads[host_id] >= bounds.in_flight_per_host:
            words = f"{bounds.in_flight_per_host} uploads of this host are running"
            return QuotaRefusal(status=429, words=words, retry_after_s=2)
        refusal = None if is_known else self._over_quota(host_id, charge, now_s)
        refusal = refusal or self._over_refusals(host_id, now_s)
        if refusal:
            return refusal
        if free_bytes is not None and free_bytes - self._reserved.total() - charge < bounds.min_free_bytes:
            words = f"no room: {free_bytes:,} bytes are free, {bounds.min_free_bytes:,} must stay free"
            return QuotaRefusal(status=507, words=words, retry_after_s=60)
        if files is not None:
            least, planned = bounds.compute_min_free_files(files), (self.in_flight + 1) * MAX_FILES_PER_UPLOAD
            if files.free - planned < least:
                words = f"no room: {files.free:,} files (inodes) are free, {least:,} must stay free"
                return QuotaRefusal(status=507, words=words, retry_after_s=60)
        self._uploads[host_id] += 1
        self._reserved[host_id] += charge
        return None

    def release(self, host_id: str, size: int, *, stored_s: float | None, refused_s: float | None = None) -> None:
        """End an upload.

        Args:
            host_id: As in `reserve`.
            size: As in `reserve`.
            stored_s: When the bundle was stored as a new one; None if it was not.
            refused_s: When the bundle was read completely and refused for its content; None if it was not. It is
                charged like a stored one, because it cost as much work.
        """
        self._uploads[host_id] -= 1
        self._reserved[host_id] -= _compute_charge(size)
        charged_s = stored_s if stored_s is not None else refused_s
        if charged_s is not None and host_id in self._recent:
            self._charge(host_id, size, charged_s)
        if refused_s is not None:
            self._refused[host_id] = self._refusals_left(host_id, refused_s) - 1, refused_s

    def _charge(self, host_id: str, size: int, at_s: float) -> None:
        recent, width_s = self._recent[host_id], self._bounds.quota_s / _QUOTA_SLOTS
        if not recent or at_s - recent[-1].began_s >= width_s:
            recent.append(_QuotaSlot(at_s, at_s, 0, 0))
        recent[-1].last_s = max(recent[-1].last_s, at_s)
        recent[-1].charge += _compute_charge(size)
        recent[-1].bundles += 1

    def _over_quota(self, host_id: str, charge: int, now_s: float) -> QuotaRefusal | None:
        bounds = self._bounds
        recent = self._recent.setdefault(host_id, deque())
        while recent and recent[0].last_s <= now_s - bounds.quota_s:
            recent.popleft()
        used = sum(slot.charge for slot in recent) + self._reserved[host_id]
        bundles = sum(slot.bundles for slot in recent) + self._uploads[host_id]
        if bounds.quota_bytes and used + charge > bounds.quota_bytes:
            words = f"the host's quota is {bounds.quota_bytes:,} bytes in {bounds.quota_s:g} s, {used:,} are used"
        elif bounds.quota_bundles and bundles >= bounds.quota_bundles:
            words = (
                f"the host's quota is {bounds.quota_bundles:,} bundles in {bounds.quota_s:g} s, {bundles:,} are used"
            )
        else:
            return None
        oldest_s = recent[0].last_s if recent else now_s
        return QuotaRefusal(status=429, words=words, retry_after_s=max(1, int(oldest_s + bounds.quota_s - now_s)))

    def _refusals_left(self, host_id: str, now_s: float) -> float:
        left, as_of_s = self._refused.get(host_id, (_REFUSED_BURST, now_s))
        return min(_REFUSED_BURST, left + max(0.0, now_s - as_of_s) / _REFUSED_S)

    def _over_refusals(self, host_id: str, now_s: float) -> QuotaRefusal | None:
        left = self._refusals_left(host_id, now_s) - self._uploads[host_id] * (host_id in self._refused)
        if left >= 1:
            return None
        words = f"too many bundles of this host were refused; one more is accepted every {_REFUSED_S:g} s"
        return QuotaRefusal(status=429, words=words, retry_after_s=max(1, math.ceil((1 - left) * _REFUSED_S)))


def _compute_charge(size: int) -> int:
    """Return the charge of a bundle of a size to its host's quota, in bytes."""
    return max(size, MIN_CHARGE_BYTES)
