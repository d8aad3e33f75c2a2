"""How much may come in: what is promised to uploads under way, each host's quota, and the floor of free space and files."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from phasewatch.bundle import limits

QUOTA_PERIOD_S = 86_400.0
MIN_CHARGE_BYTES = 8 << 10  # what the least bundle takes of a disk: its own block, and its receipt's
MAX_FILES_PER_UPLOAD = 4  # that an upload makes at most: bundle, receipt, word on it, the folder of its host

_QUOTA_SLOTS = 1440  # a quota is remembered in so many pieces, whatever the number of bundles
_REFUSED_BURST, _REFUSED_S = 64.0, 10.0  # bundles of one host that are read and refused: at once, and one each so often


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeFiles:
    """How many more files a disk can hold, and how many it can hold in all."""

    free: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverLimits:
    """What a receiver takes.

    Attributes:
        max_bundle_bytes: Of one bundle.
        min_bundle_bytes: Of one bundle; nothing shorter is a frame.
        quota_bytes: New bytes of one host within `quota_s`, each bundle at least `MIN_CHARGE_BYTES`; 0 sets no bound.
        quota_bundles: New bundles of one host within `quota_s`; 0 sets no bound.
        min_free_bytes: Free space that uploads never use up.
        min_free_files: Free files (inodes) that uploads never use up; on a small disk a twentieth of all, if that is less.
        in_flight, in_flight_per_host: Uploads at a time.
        read_timeout_s: How long a body may say nothing.
        min_bytes_per_s: A body slower than this on the whole is cut.
        grace_s: What every body has on top of that, and a stopping receiver gives to what is under way.
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
        """Give how long a body of a size may take in all."""
        return self.grace_s + size / self.min_bytes_per_s

    def has_room(self, free_bytes: int | None, files: FreeFiles | None) -> bool:
        """Whether a disk is above both floors; None stands for what nobody can tell."""
        has_bytes = free_bytes is None or free_bytes >= self.min_free_bytes
        return has_bytes and (files is None or files.free >= self.compute_min_free_files(files))

    def compute_min_free_files(self, files: FreeFiles) -> int:
        """Return how many files of a disk stay free."""
        return min(self.min_free_files, files.total // 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaRefusal:
    """Why an upload cannot begin: the status to answer with, the words, and when to ask again."""

    status: int
    words: str
    retry_after_s: int


@dataclass(slots=True)
class _QuotaSlot:
    """What came within one piece of a quota's time."""

    began_s: float
    last_s: float
    charge: int
    bundles: int


class UploadQuota:
    """The reservations of one receiver; each `reserve` that went well is followed by one `release`."""

    def __init__(self, bounds: ReceiverLimits) -> None:
        """Begin with nothing reserved."""
        self._bounds = bounds
        self._reserved: Counter[str] = Counter()
        self._uploads: Counter[str] = Counter()
        self._recent: dict[str, deque[_QuotaSlot]] = {}
        self._refused: dict[str, tuple[float, float]] = {}  # what is left of a host's refusals, and as of when

    @property
    def in_flight(self) -> int:
        """How many uploads are under way."""
        return self._uploads.total()

    def needs_history(self, host_id: str) -> bool:
        """Whether a host's quota needs what it sent before this process began."""
        return bool(self._bounds.quota_bytes or self._bounds.quota_bundles) and host_id not in self._recent

    def load_history(self, host_id: str, held: Iterable[tuple[float, int]]) -> None:
        """Take in when (Unix seconds) each bundle of a host came, and its size: so a quota outlives the process.

        Once: of two uploads that looked at the same time, the later one may not know what the other stored since.
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
        """Reserve room for an upload, before its body; say why not where there is none.

        Args:
            host_id: Whose quota pays.
            size: The body's, in bytes.
            now_s: Unix seconds.
            free_bytes: On the store's disk; None if nobody can tell.
            files: The same of files.
            is_known: The store has these very bytes under this id: they come again, and cost no quota.
        """
        bounds, charge = self._bounds, _compute_charge(size)
        if self.in_flight >= bounds.in_flight:
            return QuotaRefusal(status=503, words=f"{bounds.in_flight} uploads are under way", retry_after_s=2)
        if self._uploads[host_id] >= bounds.in_flight_per_host:
            words = f"{bounds.in_flight_per_host} uploads of this host are under way"
            return QuotaRefusal(status=429, words=words, retry_after_s=2)
        refusal = None if is_known else self._over_quota(host_id, charge, now_s)
        refusal = refusal or self._over_refusals(host_id, now_s)
        if refusal:
            return refusal
        if free_bytes is not None and free_bytes - self._reserved.total() - charge < bounds.min_free_bytes:
            words = f"no room: {free_bytes:,} bytes are free, {bounds.min_free_bytes:,} stay so"
            return QuotaRefusal(status=507, words=words, retry_after_s=60)
        if files is not None and files.free - (
            self.in_flight + 1
        ) * MAX_FILES_PER_UPLOAD < bounds.compute_min_free_files(files):
            words = f"no room: {files.free:,} more files (inodes) are free, {bounds.compute_min_free_files(files):,} stay so"
            return QuotaRefusal(status=507, words=words, retry_after_s=60)
        self._uploads[host_id] += 1
        self._reserved[host_id] += charge
        return None

    def release(self, host_id: str, size: int, *, stored_s: float | None, refused_s: float | None = None) -> None:
        """End an upload.

        Args:
            host_id: As in `take`.
            size: As in `take`.
            stored_s: When its bundle was stored as a new one, None if it was not.
            refused_s: When its bundle was read whole and refused for what it is: that is charged as if it were stored,
                for it cost as much work; None if it was not.
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
        words = f"too many bundles of this host were refused; one more is looked at every {_REFUSED_S:g} s"
        return QuotaRefusal(status=429, words=words, retry_after_s=max(1, math.ceil((1 - left) * _REFUSED_S)))


def _compute_charge(size: int) -> int:
    """Return the bytes that a bundle of a size costs its host's quota."""
    return max(size, MIN_CHARGE_BYTES)
