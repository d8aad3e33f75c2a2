"""Follow which threads of a QEMU process run its vCPUs, as vCPUs are plugged in and out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from phasewatch.errors import VmError

__all__ = ["VcpuFinder", "VcpuThreads"]

_LOOKUP_INTERVAL_READINGS = 4  # between two lookups: 2 s at 2 Hz, because worker threads come and go all the time


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuThreads:
    """The vCPUs of a VM.

    Attributes:
        tids: Their threads in this host's /proc; one thread may run several vCPUs.
        numbers: QEMU's indices of the vCPUs; empty if only their threads are known.
    """

    tids: frozenset[int]
    numbers: tuple[int, ...] = ()


class VcpuFinder:
    """Keeps the vCPUs of one VM up to date: looks them up again when the threads of its process change.

    Args:
        current: The vCPUs at the start.
        find: Returns the present vCPUs; may raise VmError or OSError. None if they never change.

    Attributes:
        current: The vCPUs as last found.
    """

    def __init__(self, current: VcpuThreads, find: Callable[[], Awaitable[VcpuThreads]] | None = None) -> None:
        self.current, self._find = current, find
        self._threads: frozenset[int] | None = None
        self._is_stale = False
        self._rest = 0
        self._finding: asyncio.Task[None] | None = None
        self._notes: list[str] = []

    def update_threads(self, threads: Collection[int]) -> None:
        """Compare the present thread ids with those before; start a lookup in the background if they differ."""
        threads = frozenset(threads)
        self._is_stale |= self._threads is not None and threads != self._threads
        self._threads = threads
        self._rest = max(0, self._rest - 1)
        if self._find is None or not self._is_stale or self._rest or self._finding is not None:
            return
        self._is_stale, self._rest = False, _LOOKUP_INTERVAL_READINGS
        self._finding = asyncio.ensure_future(self._update(self._find))

    def pop_notes(self) -> list[str]:
        """Return and clear the messages since the last call."""
        notes, self._notes = self._notes, []
        return notes

    async def close(self) -> None:
        """Cancel a running lookup."""
        finding, self._finding = self._finding, None
        if finding is not None:
            finding.cancel()
            await asyncio.gather(finding, return_exceptions=True)

    async def _update(self, find: Callable[[], Awaitable[VcpuThreads]]) -> None:
        try:
            found = await find()
            if found.tids and found != self.current:
                before = len(self.current.numbers or self.current.tids)
                self._notes.append(f"{len(found.numbers or found.tids)} vCPUs now, {before} before")
                self.current = found
        except (VmError, OSError, KeyError, TypeError):
            self._is_stale = True
        finally:
            self._finding = None
