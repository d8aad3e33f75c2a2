"""What the agent inside the guest reports on the port `tel`: the `guest` source, and the one that is not believed.

Rows are stamped at receipt; the guest's own clock travels in the row. The guest may send anything: lines are bounded,
decoded strictly, and a flood costs it its rows, not the host its memory, nor the readings of the machine beside it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from phasewatch.channels import list_raw_fields
from phasewatch.telemetry.base import ReadingValues, RowLog, close_guest_connection
from phasewatch.types import SourceKind

MAX_AGENT_LINE_BYTES = 1024  # a row of ours has 300
GUEST_NOMINAL_HZ = 1.0
MAX_BURST_ROWS = 5  # rows above the nominal pace that are still taken, after a stall of the port
MAX_AGENT_LINES = 10_000  # more than twice as many as the longest episode has: what is beyond is a flood
_FIELDS = tuple(spec.field for spec in list_raw_fields(SourceKind.GUEST))
_INT64 = 2**63


def parse_agent_line(line: bytes) -> ReadingValues | None:
    """Read one report; None unless it is exactly one object with exactly the guest's fields, each an int64 ≥ 0."""
    try:
        found = _DECODER.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    # msgspec keeps the last of two equal keys: as many quotes as the fields need, and no more.
    if found.keys() != set(_FIELDS) or line.count(b'"') != 2 * len(_FIELDS):
        return None
    values = tuple(found[field] for field in _FIELDS)
    return values if all(0 <= value < _INT64 for value in values) else None


_DECODER = msgspec.json.Decoder(dict[str, int])


class GuestReader:
    """Takes the agent's lines from a VM's `tel` socket into a log, from `start` on.

    It must be open before the agent begins: QEMU keeps what nobody takes, and gives it later all at once.

    Attributes:
        bad: Lines that were refused.
        dropped: Rows beyond the pace that was agreed.
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
        """Connect; raises OSError if QEMU does not serve the socket."""
        reader, self._writer = await asyncio.open_unix_connection(str(self._path), limit=MAX_AGENT_LINE_BYTES)
        self._task = asyncio.create_task(self._read_lines(reader))

    def start(self) -> None:
        """Keep what comes from now on."""
        self._began_ns = self._log.clock.mono_ns()

    async def close(self) -> None:
        """Hang up; may be called twice."""
        task, self._task = self._task, None
        await close_guest_connection(task, self._writer)

    def handle_line(self, line: bytes) -> None:
        """Keep one line's row, or count why not."""
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
        # The loop reads the other sources, too: a guest that sends empty lines for ever held it up for seconds.
        for _ in range(MAX_AGENT_LINES):
            try:
                line = await reader.readuntil(b"\n")
            except asyncio.LimitOverrunError as exc:
                self.bad += 1
                await reader.readexactly(max(1, exc.consumed))
                continue
            except (asyncio.IncompleteReadError, OSError):
                return  # the VM is gone; whoever runs it knows better than we
            self.handle_line(line)
