"""A watcher in a process of its own, whose lines become events of this dashboard."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from phasewatch.dashboard.hub import Hub
from phasewatch.errors import EventError, MachineError
from phasewatch.live.envelope import MAX_BYTES, parse_event

END_S = 5.0  # a watcher has so long to leave its machine as it was


async def relay(command: Sequence[str], hub: Hub, name: str) -> None:
    """Start a watcher and publish what it says, until it ends or this is cancelled.

    Args:
        command: Prints one event a line.
        hub: Takes the events.
        name: What is watched, for messages.

    Raises:
        MachineError: If the watcher failed; has its last words.
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, limit=2 * MAX_BYTES)
    if process.stdout is None or process.stderr is None:
        raise RuntimeError("a process without pipes")
    words = asyncio.create_task(_last_line(process.stderr))
    try:
        async for line in process.stdout:
            with suppress(EventError):  # its last line is its result, no event
                hub.publish(parse_event(line))
        code = await process.wait()
        said = await words
    finally:
        words.cancel()
        if process.returncode is None:
            process.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(END_S):
                    await process.wait()
    if code:
        raise MachineError(f"{name}: its watcher ended ({code}): {said.removeprefix('error: ')}")


async def _last_line(stream: asyncio.StreamReader) -> str:
    last = ""
    async for line in stream:
        last = line.decode("utf-8", "replace").strip()[:500] or last
    return last
