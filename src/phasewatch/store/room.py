"""How much may come in: what is promised to uploads under way, each host's quota, and the floor of free space."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from phasewatch.episode import limits

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a receiver takes.

    Attributes:
        bundle_bytes: Of one bundle.
        quota_bytes: New bytes of one host within `quota_s`; 0 sets no bound.
        floor_bytes: Free space that uploads never use up.
        in_flight, in_flight_per_host: Uploads at a time.
        silence_s: How long a body may say nothing.
        slowest_bytes_per_s: A body slower than this on the whole is cut.
        grace_s: What every body has on top of that, and a stopping receiver gives to what is under way.
    """

    bundle_bytes: int = limits.COMPRESSED_BYTES
    quota_bytes: int = 0
    quota_s: float = DAY_S
    floor_bytes: int = 512 << 20
    in_flight: int = 64
    in_flight_per_host: int = 8
    silence_s: float = 15.0
    slowest_bytes_per_s: int = 16 << 10
    grace_s: float = 30.0

    def deadline_s(self, size: int) -> float:
        """Give how long a body of a size may take in all."""
        return self.grace_s + size / self.slowest_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRoom:
    """Why an upload cannot begin: the status to answer with, the words, and when to ask again."""

    status: int
    words: str
    retry_after_s: int


class Room:
    """The reservations of one receiver; each `take` that went well is followed by one `give_back`."""

    def __init__(self, bounds: Bounds) -> None:
        """Begin with nothing reserved."""
        self._bounds = bounds
        self._reserved: Counter[str] = Counter()
        self._uploads: Counter[str] = Counter()
        self._recent: dict[str, deque[tuple[float, int]]] = {}

    @property
    def in_flight(self) -> int:
        """How many uploads are under way."""
        return self._uploads.total()

    def must_learn(self, host_id: str) -> bool:
        """Whether a host's quota needs what it sent before this process began."""
        return bool(self._bounds.quota_bytes) and host_id not in self._recent

    def learn(self, host_id: str, held: Iterable[tuple[float, int]]) -> None:
        """Take in when (Unix seconds) each bundle of a host came, and its size: so a quota outlives the process.

        Once: of two uploads that looked at the same time, the later one may not know what the other stored since.
        """
        self._recent.setdefault(host_id, deque(sorted(held)))

    def take(self, host_id: str, size: int, *, now_s: float, free_bytes: int | None) -> NoRoom | None:
        """Reserve room for an upload, before its body; say why not where there is none."""
        bounds = self._bounds
        if self.in_flight >= bounds.in_flight:
            return NoRoom(status=503, words=f"{bounds.in_flight} uploads are under way", retry_after_s=2)
        if self._uploads[host_id] >= bounds.in_flight_per_host:
            words = f"{bounds.in_flight_per_host} uploads of this host are under way"
            return NoRoom(status=429, words=words, retry_after_s=2)
        if bounds.quota_bytes:
            recent = self._within_quota(host_id, now_s)
            used = sum(size for _, size in recent) + self._reserved[host_id]
            if used + size > bounds.quota_bytes:
                words = f"the host's quota is {bounds.quota_bytes:,} bytes in {bounds.quota_s:g} s, {used:,} are used"
                oldest_s = recent[0][0] if recent else now_s
                return NoRoom(status=429, words=words, retry_after_s=max(1, int(oldest_s + bounds.quota_s - now_s)))
        if free_bytes is not None and free_bytes - self._reserved.total() - size < bounds.floor_bytes:
            words = f"no room: {free_bytes:,} bytes are free, {bounds.floor_bytes:,} stay so"
            return NoRoom(status=507, words=words, retry_after_s=60)
        self._uploads[host_id] += 1
        self._reserved[host_id] += size
        return None

    def give_back(self, host_id: str, size: int, *, stored_s: float | None) -> None:
        """End an upload; `stored_s` is when its bundle was stored as a new one, None if it was not."""
        self._uploads[host_id] -= 1
        self._reserved[host_id] -= size
        if stored_s is not None and host_id in self._recent:
            self._recent[host_id].append((stored_s, size))

    def _within_quota(self, host_id: str, now_s: float) -> deque[tuple[float, int]]:
        recent = self._recent.setdefault(host_id, deque())
        while recent and recent[0][0] <= now_s - self._bounds.quota_s:
            recent.popleft()
        return recent
