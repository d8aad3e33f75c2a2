"""What the recorder says on stderr while it works: one line an episode, and how much time is left."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol


class Progress(Protocol):
    """Hears what the recorder does."""

    def line(self, text: str) -> None:
        """Say something that stays on the screen."""

    def now(self, text: str, *, done: int, total: int, left_s: float) -> None:
        """Say what is going on, and how far it is."""


class Silence:
    """Hears everything and says nothing."""

    def line(self, text: str) -> None:
        """Do nothing."""

    def now(self, text: str, *, done: int, total: int, left_s: float) -> None:
        """Do nothing."""


class Bar(AbstractContextManager["Bar"]):
    """A bar on stderr; where that is no terminal, only the lines."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._console = Console(stderr=True, markup=False, highlight=False)
        self._bar = RichProgress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
            refresh_per_second=1,  # it shares the machine with what it measures
        )
        self._task = self._bar.add_task("", total=None, left="")

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def line(self, text: str) -> None:
        """Print one line above the bar."""
        self._bar.console.print(text, soft_wrap=True)

    def now(self, text: str, *, done: int, total: int, left_s: float) -> None:
        """Move the bar."""
        self._bar.update(self._task, description=text, completed=done, total=total, left=render_left(left_s))


def render_left(seconds: float) -> str:
    """Spell a time to go.

    >>> render_left(4000), render_left(95)
    ('1 h 07 min left', '2 min left')
    """
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min left" if minutes >= 60 else f"{minutes} min left"
