"""How long tasks report how far they are; messages for people go through `logging` instead."""

from __future__ import annotations

from typing import Protocol

__all__ = ["NO_PROGRESS", "NoProgress", "Progress"]


class Progress(Protocol):
    """Receives the progress of long tasks; `cli` draws it, tests record it."""

    def update(self, task: str, done: int, total: int, detail: str = "") -> None:
        """Report that `done` of `total` items of a task are finished.

        Args:
            task: The task's name, such as ``train``.
            done: Finished items.
            total: Items in all; 0 where nobody knows yet.
            detail: The item that was finished last, in words.
        """


class NoProgress:
    """Progress that nobody looks at."""

    def update(self, task: str, done: int, total: int, detail: str = "") -> None:
        """Do nothing."""


NO_PROGRESS = NoProgress()
