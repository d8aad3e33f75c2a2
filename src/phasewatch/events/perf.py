"""What the running process costs and how fast it is, measured on itself: nothing here is assumed or carried over."""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable

from phasewatch.events.schema import PerfEvent

REPLAY_LATENCY_EDGES_MS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
PERF_WINDOW_S = 60.0  # rates and latencies speak of the last minute
_MAX_LATENCIES = 10_000


class ProcessMeter:
    """Collects latencies and late ticks, and reads this process's own time and memory when asked.

    Args:
        process: What the process does, such as ``watch``.
        monotonic: Seconds.
        cpu_s: CPU seconds of this process so far.
        rss_bytes: Resident memory of this process now.
    """

    def __init__(
        self,
        process: str,
        *,
        vm: str | None = None,
        about: str | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        cpu_s: Callable[[], float] = time.process_time,
        rss_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._process, self._vm, self._about = process, vm, about
        self._monotonic, self._cpu_s, self._rss_bytes = monotonic, cpu_s, rss_bytes or read_own_rss_bytes
        self._seen: deque[tuple[float, float]] = deque(maxlen=_MAX_LATENCIES)  # (when, latency in ms)
        self._marks: deque[tuple[float, float]] = deque([(monotonic(), cpu_s())])
        self._late = 0

    def add_window(self, latency_ms: float) -> None:
        """Count a window that was judged and sent, so long after it was due."""
        self._seen.append((self._monotonic(), max(0.0, latency_ms)))

    def add_late_ticks(self, ticks: int = 1) -> None:
        """Count readings that came after their bin was closed."""
        self._late += ticks

    def read(self, *, backlog: int = 0) -> PerfEvent:
        """Say what the last minute was like.

        Args:
            backlog: Events that wait to be sent.
        """
        now, cpu = self._monotonic(), self._cpu_s()
        while self._seen and self._seen[0][0] < now - PERF_WINDOW_S:
            self._seen.popleft()
        while len(self._marks) > 1 and self._marks[1][0] <= now - PERF_WINDOW_S:
            self._marks.popleft()
        since, cpu_then = self._marks[0]
        self._marks.append((now, cpu))
        took_s = now - since
        latencies = sorted(ms for _, ms in self._seen)
        counts = [0] * (len(REPLAY_LATENCY_EDGES_MS) + 1)
        for ms in latencies:
            counts[bisect_right(REPLAY_LATENCY_EDGES_MS, ms)] += 1
        return PerfEvent(
            process=self._process, vm=self._vm, measured_s=round(took_s, 3), windows=len(latencies),
            windows_per_s=round(len(latencies) / took_s, 4) if took_s > 0 else 0.0, latency_edges_ms=REPLAY_LATENCY_EDGES_MS,
            latency_counts=tuple(counts), p50_ms=_compute_quantile(latencies, 0.5), p99_ms=_compute_quantile(latencies, 0.99),
            rss_bytes=self._rss_bytes(), cpu_cores=round((cpu - cpu_then) / took_s, 4) if took_s > 0 else 0.0,
            late_ticks=self._late, backlog=backlog, about=self._about,
        )  # fmt: skip


def read_own_rss_bytes() -> int:
    """Give this process's resident memory in bytes; field 2 of /proc/self/statm, 0 where there is none."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _compute_quantile(ordered: list[float], q: float) -> float | None:
    """Give the smallest value that a share q of them does not exceed."""
    if not ordered:
        return None
    rank = min(len(ordered) - 1, max(0, -(-int(q * 1000) * len(ordered) // 1000) - 1))
    return round(ordered[rank], 4)
