"""Which threads of a QEMU process run its vCPUs: found again when the threads change, and across process-id namespaces."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from phasewatch.errors import VmError
from phasewatch.telemetry.process import list_threads

LOOKUP_INTERVAL_READINGS = (
    4  # between two questions for the vCPUs: two seconds at 2 Hz; worker threads come and go all the time
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuThreads:
    """The vCPUs of a VM.

    Attributes:
        tids: The threads that run them, as /proc of this host numbers them; one thread may run several.
        numbers: The vCPUs as QEMU numbers them; empty where only their threads are known.
    """

    tids: frozenset[int]
    numbers: tuple[int, ...] = ()


class VcpuFinder:
    """The vCPUs of one VM, found anew when the threads of its process are not what they were.

    Args:
        current: What is known.
        find: Return the vCPUs; None if they never change. May raise VmError or OSError: then what is known stays.
    """

    def __init__(self, now: VcpuThreads, find: Callable[[], Awaitable[VcpuThreads]] | None = None) -> None:
        self.current, self._find = now, find
        self._threads: frozenset[int] | None = None
        self._is_stale = False
        self._rest = 0
        self._finding: asyncio.Task[None] | None = None
        self._notes: list[str] = []

    def update_threads(self, threads: Collection[int]) -> None:
        """Compare the threads that there are with those before; ask for the vCPUs beside the readings if they differ."""
        threads = frozenset(threads)
        self._is_stale |= self._threads is not None and threads != self._threads
        self._threads = threads
        self._rest = max(0, self._rest - 1)
        if self._find is None or not self._is_stale or self._rest or self._finding is not None:
            return
        self._is_stale, self._rest = False, LOOKUP_INTERVAL_READINGS
        self._finding = asyncio.ensure_future(self._update(self._find))

    def pop_notes(self) -> list[str]:
        """Return what people must know since the last call."""
        notes, self._notes = self._notes, []
        return notes

    async def close(self) -> None:
        """Stop asking."""
        finding, self._finding = self._finding, None
        if finding is not None:
            finding.cancel()
            await asyncio.gather(finding, return_exceptions=True)

    async def _update(self, find: Callable[[], Awaitable[VcpuThreads]]) -> None:
        try:
            found = await find()
            if found.tids and found != self.current:
                before = len(self.current.numbers or self.current.tids)
                self._notes.append(f"it has {len(found.numbers or found.tids)} vCPU now, before {before}")
                self.current = found
        except (VmError, OSError, KeyError, TypeError):
            self._is_stale = True
        finally:
            self._finding = None


def map_threads(pid: int, inner: Collection[int], proc: Path) -> frozenset[int]:
    """Return the threads of a process that have these numbers in the process's own namespace.

    QEMU in a container tells the numbers that the container's namespace gives its threads.

    Args:
        pid: The process, as `proc` numbers it.
        inner: What the process itself calls its threads.
        proc: Where /proc is.

    Returns:
        Their numbers in `proc`; threads that are not there are left out.
    """
    wanted = set(inner)
    return frozenset(here for number, here in list_threads(proc / str(pid)) if number in wanted)
