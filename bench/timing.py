"""What every part of the bench shares: timed repeats in turns, rows of results, and figures beside what they must be."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way of doing one thing.

    Attributes:
        min_s, median_s: CPU seconds of this process, one thread.
        per: What a time is for, in words: ``episode``, ``window``.
        score: What it scored, where that is the point.
        note: What must be known to read the number.
    """

    what: str
    min_s: float
    median_s: float
    repeats: int
    per: str
    is_ours: bool = False
    score: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One step over so many bundles with so many workers: wall and CPU seconds, and memory of its largest process.

    Attributes:
        load: Of the machine when the step began; None where that was not kept.
        machine: What it was measured on: whole corpora take long, and are not measured again on every machine.
    """

    step: str
    bundles: int
    workers: int
    wall_s: float
    cpu_s: float
    peak_mib: float
    load: float | None = None
    machine: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A ratio or an amount beside its bounds.

    Attributes:
        must, aim: `≤` or `≥` and a number; empty for none. Ratios are of CPU time in one process and run.
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
        limit = float(bound[1:].replace(",", ""))
        return self.measured <= limit if bound[0] == "≤" else self.measured >= limit

    def fate(self) -> str:
        """Say how far it reaches: `missed`, `must` or `aim`."""
        return "**missed**" if not self.meets(self.must) else "aim" if self.aim and self.meets(self.aim) else "must"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One comparison: its rows are equal in what they compute unless a note says otherwise."""

    title: str
    about: str
    rows: tuple[Row, ...] = ()
    figures: tuple[Figure, ...] = ()
    points: tuple[Point, ...] = ()


def cpu_s(work: Callable[[], object]) -> float:
    """Give the CPU seconds of this process that some work takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def in_turns(works: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, tuple[float, float]]:
    """Time each work so many times, one after the other in turns, so that a busy moment hits all alike.

    Returns:
        Name → (least, median) CPU seconds.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()  # imports, caches, compilers
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(cpu_s(work))
    return {name: (min(t), statistics.median(t)) for name, t in taken.items()}


def rows_of(
    times: Mapping[str, tuple[float, float]], *, repeats: int, per: str, over: Mapping[str, int] | int = 1,
    notes: Mapping[str, str] | None = None,
) -> tuple[Row, ...]:  # fmt: skip
    """Make rows of what `in_turns` gave; ours are those whose name begins so.

    Args:
        over: By how many a time is divided, for all alike or by name.
    """
    found = []
    for name, (low, mid) in times.items():
        n = over if isinstance(over, int) else over[name]
        note = (notes or {}).get(name, "")
        found.append(Row(what=name, min_s=low / n, median_s=mid / n, repeats=repeats, per=per, is_ours=name.startswith("phasewatch"), note=note))  # fmt: skip
    return tuple(found)
