"""The protocol by which long tasks report progress; messages for people go through `logging`."""

from __future__ import annotations

from typing import Protocol

__all__ = ["NO_PROGRESS", "NoProgress", "Progress"]


class Progress(Protocol):
    """Receives the progress of long tasks; the command line draws it, tests record it."""

    def update(self, task: str, done: int, total: int, detail: str = "") -> None:
        """Report that `done` of `total` items of a task are finished.

        Args:
            task: The task's name, such as ``train``.
            done: Finished items.
            total: Number of items; 0 if unknown.
            detail: One line for people, such as the last item or the rate.
        """


class NoProgress:
    """A `Progress` that does nothing."""

    def update(self, task: str, done: int, total: int, detail: str = "") -> None:
        """Do nothing."""


NO_PROGRESS = NoProgress()
