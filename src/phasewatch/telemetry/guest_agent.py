"""Read the rows that the agent inside the guest reports on the port `tel`: the untrusted `guest` source.

Rows are stamped at receipt; the guest's own clock is part of the row. The guest may send anything: the length and
number of lines are bounded and decoding is strict, so that a flood costs only the guest's own rows.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from phasewatch.channels import list_raw_fields
from phasewatch.telemetry.base import ReadingValues, RowLog, close_guest_connection
from phasewatch.types import SourceKind

__all__ = ["GUEST_NOMINAL_HZ", "MAX_AGENT_LINES", "MAX_BURST_ROWS", "GuestReader", "parse_agent_line"]

_MAX_LINE_BYTES = 1024  # a valid row has about 300
GUEST_NOMINAL_HZ = 1.0
MAX_BURST_ROWS = 5  # rows above the nominal rate that are accepted after a stall of the port
MAX_AGENT_LINES = 10_000  # more than twice the number of rows in the longest episode
_FIELDS = tuple(spec.field for spec in list_raw_fields(SourceKind.GUEST))
_INT64 = 2**63


def parse_agent_line(line: bytes) -> ReadingValues | None:
    """Parse one row; None unless it is exactly one JSON object with the guest's raw fields, each an int64 ≥ 0."""
    try:
        row = _DECODER.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    # msgspec keeps the last of two equal keys, so the number of quotes is checked as well.
    if row.keys() != set(_FIELDS) or line.count(b'"') != 2 * len(_FIELDS):
        return None
    values = tuple(row[field] for field in _FIELDS)
    return values if all(0 <= value < _INT64 for value in values) else None


_DECODER = msgspec.json.Decoder(dict[str, int])


class GuestReader:
    """Reads the agent's rows from a VM's `tel` socket into a log, from `start` on.

    It must be open before the agent starts, because QEMU buffers unread lines and delivers them later all at once.

    Args:
        path: The Unix socket.
        log: Receives the rows.

    Attributes:
        bad: Number of malformed lines.
        dropped: Number of rows above the nominal rate.
    """

    def __init__(self, *, path: Path, log: RowLog) -> None:
        self._path, self._log = path, log
        self._task: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._began_ns: int | None = None
        self._accepted = 0
        self.bad = 0
        self.dropped = 0

    async def open(self) -> None:
        """Connect to the socket.

        Raises:
            OSError: If QEMU does not listen on it.
        """
        reader, self._writer = await asyncio.open_unix_connection(str(self._path), limit=_MAX_LINE_BYTES)
        self._task = asyncio.create_task(self._read_lines(reader))

    def start(self) -> None:
        """Accept rows from now on."""
        self._began_ns = self._log.clock.mono_ns()

    async def close(self) -> None:
        """Disconnect; may be called twice."""
        task, self._task = self._task, None
        await close_guest_connection(task, self._writer)

    def handle_line(self, line: bytes) -> None:
        """Add the row of one line to the log, or count it as malformed or dropped."""
        if self._began_ns is None:
            return
        values = parse_agent_line(line)
        if values is None:
            self.bad += 1
            return
        elapsed_s = (self._log.clock.mono_ns() - self._began_ns) / 1e9
        if self._accepted >= elapsed_s * GUEST_NOMINAL_HZ + MAX_BURST_ROWS:
            self.dropped += 1
            return
        self._accepted += 1
        self._log.add(values)

    async def _read_lines(self, reader: asyncio.StreamReader) -> None:
        # The event loop reads other sources, too: a guest that sends endless empty lines blocked it for seconds.
        for _ in range(MAX_AGENT_LINES):
            try:
                line = await reader.readuntil(b"\n")
            except asyncio.LimitOverrunError as exc:
                self.bad += 1
                await reader.readexactly(max(1, exc.consumed))
                continue
            except (asyncio.IncompleteReadError, OSError):
                return  # the VM is gone; its owner reports that
            self.handle_line(line)
