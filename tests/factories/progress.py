"""Progress that remembers what it was told, and can end a task in the middle."""

from __future__ import annotations


class Killed(BaseException):
    """Ends a task as a signal would: nothing catches it."""


class RecordedProgress:
    """Records updates; with `killed_at`, raises when that many items are done."""

    def __init__(self, *, killed_at: int | None = None) -> None:
        self.updates: list[tuple[str, int, int, str]] = []
        self._killed_at = killed_at

    def update(self, task: str, done: int, total: int, detail: str = "") -> None:
        self.updates.append((task, done, total, detail))
        if done == self._killed_at:
            raise Killed
