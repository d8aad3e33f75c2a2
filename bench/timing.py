"""Shared parts of the benchmark: timed repeats in turns, rows of results, and figures with their targets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The measured time of one implementation.

    Attributes:
        min_s, median_s: CPU seconds of this process, one thread.
        per: Unit of work of a time: ``episode``, ``window``.
        score: Macro-F1, where it is compared.
        note: Caveat of the number.
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
    """One step over a corpus: wall and CPU seconds, and memory of its largest process.

    Attributes:
        load: Load average when the step began; None if unknown.
        machine: Machine of the measurement; whole corpora take long and are not measured on every machine.
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
    """A ratio or an amount with its targets.

    Attributes:
        must, aim: `≤` or `≥` and a number; empty for no target. Ratios are of CPU time in one process and run.
    """

    what: str
    must: str
    aim: str
    measured: float
    unit: str = "×"
    note: str = ""

    def meets(self, bound: str) -> bool:
        """Whether the measured figure keeps a bound; an empty bound is kept."""
        if not bound:
            return True
        limit = float(bound[1:].replace(",", ""))
        return self.measured <= limit if bound[0] == "≤" else self.measured >= limit

    def target(self) -> str:
        """Return the best target that is reached: `aim`, `must`, or **missed**."""
        return "**missed**" if not self.meets(self.must) else "aim" if self.aim and self.meets(self.aim) else "must"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One comparison; its rows compute the same unless a note says otherwise."""

    title: str
    about: str
    rows: tuple[Row, ...] = ()
    figures: tuple[Figure, ...] = ()
    points: tuple[Point, ...] = ()


def cpu_s(work: Callable[[], object]) -> float:
    """Measure the CPU seconds of this process for some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def in_turns(works: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, tuple[float, float]]:
    """Time each work several times in turns, so that a busy moment affects all equally.

    Returns:
        Name → (minimum, median) CPU seconds.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()  # imports, caches, compilers
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(cpu_s(work))
    return {name: (min(t), statistics.median(t)) for name, t in taken.items()}


def rows_of(
    times: Mapping[str, tuple[float, float]],
    *,
    repeats: int,
    per: str,
    over: Mapping[str, int] | int = 1,
    notes: Mapping[str, str] | None = None,
) -> tuple[Row, ...]:
    """Build rows from the result of `in_turns`; names that begin with `phasewatch` are ours.

    Args:
        over: Number of units per time, for all or by name.
    """
    found = []
    for name, (low, mid) in times.items():
        n = over if isinstance(over, int) else over[name]
        note = (notes or {}).get(name, "")
        found.append(
            Row(
                what=name,
                min_s=low / n,
                median_s=mid / n,
                repeats=repeats,
                per=per,
                is_ours=name.startswith("phasewatch"),
                note=note,
            )
        )
    return tuple(found)
