"""Progress of long tasks on standard error: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from phasewatch.cli.logs import is_quiet
from phasewatch.cli.streams import escape_for_terminal
from phasewatch.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["show_progress"]

_LINE_INTERVAL_S = 20.0  # between two lines of one task where there is no terminal
_MAX_DETAIL_CHARS = 100


@contextmanager
def show_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Yield a `Progress` that draws on standard error; one that does nothing if `quiet` or with ``-q``."""
    if quiet or is_quiet():
        yield NO_PROGRESS
        return
    # Here, because `watch` starts faster and stays smaller without it.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True, markup=False, highlight=False)
    columns = (
        TextColumn("{task.fields[task]:<9}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with RichProgress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield _TerminalProgress(bars)


class _TerminalProgress:
    """Draws one bar per running task, or prints a line per task every `_LINE_INTERVAL_S` seconds."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._printed_s: dict[str, float] = {}

    def update(self, task: str, done: int, total: int, detail: str = "") -> None:
        """Draw the state of a task; its bar disappears when it is finished."""
        text = escape_for_terminal(detail)
        if self._bars.console.is_terminal:
            self._draw(task, done, total, text[:_MAX_DETAIL_CHARS])
        else:
            self._print(task, done, total, text)

    def _draw(self, task: str, done: int, total: int, text: str) -> None:
        if 0 < total <= done:
            if task in self._tasks:
                self._bars.remove_task(self._tasks.pop(task))
            return
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task("", task=task)
        self._bars.update(self._tasks[task], completed=done, total=total or None, description=text)

    def _print(self, task: str, done: int, total: int, text: str) -> None:
        now_s = time.monotonic()
        if now_s - self._printed_s.setdefault(task, now_s) > _LINE_INTERVAL_S:
            self._printed_s[task] = now_s
            share = f"{done:,}/{total:,}" if total else f"{done:,}"
            self._bars.console.print(f"{task:<9} {share}  {text}".rstrip(), soft_wrap=True)
