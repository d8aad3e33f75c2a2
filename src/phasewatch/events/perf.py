"""Measure latency, CPU and memory of the running process over the last minute."""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable

from phasewatch.events.schema import PerfEvent

__all__ = ["REPLAY_LATENCY_EDGES_MS", "ProcessMeter", "read_own_rss_bytes"]

REPLAY_LATENCY_EDGES_MS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
_PERF_WINDOW_S = 60.0  # span of the rates and latencies
_MAX_LATENCIES = 10_000


class ProcessMeter:
    """Collect latencies and late readings, and build performance events of this process.

    Args:
        process: Kind of process, such as ``watch``.
        vm: Name of the watched machine; None without one.
        about: Note on what is measured.
        monotonic: Monotonic clock, seconds.
        cpu_s: Returns the CPU time of this process so far, seconds.
        rss_bytes: Returns the resident memory of this process, bytes.
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
        """Record the latency of a predicted window, in milliseconds after it was due."""
        self._seen.append((self._monotonic(), max(0.0, latency_ms)))

    def add_late_ticks(self, ticks: int = 1) -> None:
        """Count readings that arrived after their bin was closed."""
        self._late += ticks

    def read(self, *, backlog: int = 0) -> PerfEvent:
        """Build a performance event of the last minute.

        Args:
            backlog: Number of events that wait to be sent.
        """
        now, cpu = self._monotonic(), self._cpu_s()
        while self._seen and self._seen[0][0] < now - _PERF_WINDOW_S:
            self._seen.popleft()
        while len(self._marks) > 1 and self._marks[1][0] <= now - _PERF_WINDOW_S:
            self._marks.popleft()
        since, cpu_then = self._marks[0]
        self._marks.append((now, cpu))
        span_s = now - since
        latencies = sorted(ms for _, ms in self._seen)
        counts = [0] * (len(REPLAY_LATENCY_EDGES_MS) + 1)
        for ms in latencies:
            counts[bisect_right(REPLAY_LATENCY_EDGES_MS, ms)] += 1
        return PerfEvent(
            process=self._process,
            vm=self._vm,
            measured_s=round(span_s, 3),
            windows=len(latencies),
            windows_per_s=round(len(latencies) / span_s, 4) if span_s > 0 else 0.0,
            latency_edges_ms=REPLAY_LATENCY_EDGES_MS,
            latency_counts=tuple(counts),
            p50_ms=_compute_quantile(latencies, 0.5),
            p99_ms=_compute_quantile(latencies, 0.99),
            rss_bytes=self._rss_bytes(),
            cpu_cores=round((cpu - cpu_then) / span_s, 4) if span_s > 0 else 0.0,
            late_ticks=self._late,
            backlog=backlog,
            about=self._about,
        )


def read_own_rss_bytes() -> int:
    """Return the resident memory of this process in bytes (field 2 of /proc/self/statm, proc(5)); 0 if unavailable."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _compute_quantile(ordered: list[float], q: float) -> float | None:
    """Return the q-quantile of sorted values by the inverted CDF, or None without values."""
    if not ordered:
        return None
    rank = min(len(ordered) - 1, max(0, -(-int(q * 1000) * len(ordered) // 1000) - 1))
    return round(ordered[rank], 4)
