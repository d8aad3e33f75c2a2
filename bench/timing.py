"""What every part of the bench shares: timed repeats in turns, and rows of results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


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
class Part:
    """One comparison: its rows are equal in what they compute unless a note says otherwise."""

    title: str
    about: str
    rows: tuple[Row, ...]
    command: str
    claims: tuple[str, ...] = field(default=())


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
            start = time.process_time()
            work()
            taken[name].append(time.process_time() - start)
    return {name: (min(t), statistics.median(t)) for name, t in taken.items()}
