"""One measured figure beside what it must and should be; the benches print them as JSON lines, `features.py` as a table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A ratio or an amount.

    Attributes:
        must, aim: As they are written down, `≤` or `≥` and a number; ratios are of CPU time in one process and run.
    """

    what: str
    must: str
    aim: str
    measured: float
    unit: str = "×"
    note: str = ""

    def meets(self, bound: str) -> bool:
        """Whether the measured figure keeps a bound; one without a bound does."""
        if not bound:
            return True
        limit = float(bound[1:].split()[0].replace(",", ""))
        return self.measured <= limit if bound[0] == "≤" else self.measured >= limit


def say(figure: Figure) -> None:
    """Print a figure for `features.py`."""
    print(json.dumps(asdict(figure)), flush=True)


def cpu_s(work: Callable[[], object]) -> float:
    """Give the CPU seconds of this process that some work takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def best_of(cases: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Give each case's least CPU time over rounds that interleave them, so that a loaded moment hits all alike."""
    least = dict.fromkeys(cases, float("inf"))
    for _ in range(rounds):
        for name, work in cases.items():
            least[name] = min(least[name], cpu_s(work))
    return least


def render(figures: Sequence[Figure]) -> str:
    """Set figures as a Markdown table."""
    lines = ["| what | must | aim | measured | |", "|---|---|---|---|---|"]
    for f in figures:
        fate = "missed" if not f.meets(f.must) else "aim" if f.aim and f.meets(f.aim) else "must"
        lines.append(f"| {f.what} | {f.must} | {f.aim} | {f.measured:,.3g} {f.unit} {f.note} | {fate} |")
    return "\n".join(lines)
