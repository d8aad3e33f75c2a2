"""What a person wants to know while a sweep runs: how fast, how long yet, what went wrong and why."""

from __future__ import annotations

from collections import Counter

from phasewatch.validate.verdict import Verdict
from phasewatch.vocab import Status


class Tally:
    """Counts verdicts as they come; clocks are handed in."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self._statuses: Counter[Status] = Counter()
        self._reasons: Counter[str] = Counter()
        self._done = 0

    def add(self, verdict: Verdict) -> None:
        """Count one."""
        self._done += 1
        self._statuses[verdict.status] += 1
        if verdict.status in (Status.REJECTED, Status.ERRORED):
            self._reasons[verdict.reasons[0] if verdict.reasons else "?"] += 1

    def words(self, total: int, now_s: float) -> str:
        """Say where it stands: ``1,200/s, 40 s left; 3 rejected (receipt 2, label-end 1)``."""
        passed_s = max(now_s - self._began_s, 1e-3)
        rate = self._done / passed_s
        left_s = (total - self._done) / rate if rate else 0.0
        found = [
            f"{self._statuses[s]:,} {s}"
            for s in (Status.DEGRADED, Status.REJECTED, Status.ERRORED)
            if self._statuses[s]
        ]
        top = ", ".join(f"{code} {n:,}" for code, n in self._reasons.most_common(3))
        wrong = f"; {', '.join(found)}{f' ({top})' if top else ''}" if found else ""
        return f"{rate:,.0f}/s, {_spell(left_s)} left{wrong}"


def _spell(seconds: float) -> str:
    """Spell a time: ``45 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
