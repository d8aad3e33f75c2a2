"""Write the changes of alarms as lines of JSON in the Elastic Common Schema.

Source: ECS 8.11 field reference.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from phasewatch._version import __version__
from phasewatch.alarms.config import STANDARD_OUTPUT_PATH, EcsConfig
from phasewatch.alarms.delivery import DEFAULT_RETRY_POLICY, DeliveryFailure, DeliveryQueue, OutputCounters, RetryPolicy
from phasewatch.alarms.life import AlarmChange, AlarmChangeKind, render_time
from phasewatch.errors import UsageError
from phasewatch.models.alarm import AlarmKind

__all__ = ["ECS_VERSION", "EcsOutput", "render_ecs_line"]

ECS_VERSION = "8.11.0"
_SEVERITIES = {AlarmKind.INFECTION: 80, AlarmKind.ACTIVITY: 40}  # of 100
_ALERTS = frozenset({AlarmChangeKind.RAISED, AlarmChangeKind.UNSILENCED})


def render_ecs_line(change: AlarmChange, *, host: str) -> bytes:
    """Return a change as one line of JSON, with its newline.

    Fields outside of ECS are below ``phasewatch``. `host.name` is the VM, `observer` the hypervisor.

    Args:
        change: The change.
        host: Name of the hypervisor.
    """
    alarm = change.alarm
    event: dict[str, object] = {
        "kind": "alert" if change.kind in _ALERTS else "event",
        "category": ["malware"],
        "type": ["info"],
        "action": f"alarm-{change.kind}",
        "id": f"{alarm.id}-{change.kind}-{change.at_ns}",
        "module": "phasewatch",
        "dataset": "phasewatch.alarm",
        "provider": "phasewatch",
        "severity": _SEVERITIES[alarm.kind],
        "created": render_time(change.at_ns),
        "start": render_time(alarm.raised_ns),
    }
    if alarm.resolved_ns is not None:
        event |= {"end": render_time(alarm.resolved_ns), "duration": max(0, alarm.resolved_ns - alarm.raised_ns)}
    if alarm.caveat:
        event["reason"] = alarm.caveat
    own: dict[str, object] = {
        "alarm": {
            "id": alarm.id,
            "kind": str(alarm.kind),
            "status": str(alarm.status),
            "silenced": change.is_silenced,
            "by": change.by,
            "note": change.note,
        },
        "phase": {"predicted": alarm.decision, "probability": dict(alarm.probabilities)},
        "model": {"name": alarm.model, "channels": alarm.threat},
    }
    line = {
        "@timestamp": render_time(change.at_ns),
        "ecs": {"version": ECS_VERSION},
        "message": f"{alarm.kind} alarm of VM {alarm.vm} {change.kind}: predicted phase {alarm.decision}",
        "event": event,
        "host": {"name": alarm.vm, "id": alarm.vm_id},
        "observer": {
            "hostname": host,
            "product": "phasewatch",
            "type": "hypervisor-monitor",
            "vendor": "phasewatch",
            "version": __version__,
        },
        "rule": {
            "name": f"phasewatch-{alarm.kind}",
            "category": "malware phase",
            "ruleset": "phasewatch",
            "version": alarm.model,
        },
        "phasewatch": own,
    }
    return msgspec.json.encode(line) + b"\n"


class EcsOutput:
    """Appends lines to a file, or prints them.

    Args:
        config: Settings.
        host: Name of the hypervisor.
        write_line: Prints a line on standard output without blocking; needed if the file is ``-``.
        policy: Bounds of the queue.

    Raises:
        UsageError: If standard output is asked for and not available.
    """

    def __init__(
        self,
        config: EcsConfig,
        *,
        host: str,
        write_line: Callable[[str], None] | None = None,
        policy: RetryPolicy = DEFAULT_RETRY_POLICY,
    ) -> None:
        if config.file == STANDARD_OUTPUT_PATH and write_line is None:
            raise UsageError("outputs.ecs.file: standard output is not available here; name a file")
        self._path, self._host, self._write_line = Path(config.file), host, write_line
        self._is_printed = config.file == STANDARD_OUTPUT_PATH
        self._queue: DeliveryQueue[bytes] = DeliveryQueue("ecs", self._send, policy=policy)

    @property
    def counters(self) -> OutputCounters:
        """The counts so far."""
        return self._queue.counters

    def put(self, change: AlarmChange) -> None:
        """Queue a change."""
        self._queue.put(render_ecs_line(change, host=self._host))

    async def close(self) -> None:
        """Wait a few seconds for queued lines, then stop."""
        await self._queue.close()

    async def _send(self, line: bytes) -> None:
        try:
            if self._is_printed and self._write_line is not None:
                self._write_line(line.decode().rstrip("\n"))
            else:
                await asyncio.to_thread(_append, self._path, line)  # a network disk may hang
        except OSError as exc:
            raise DeliveryFailure(f"{self._path}: {exc.strerror or exc}") from exc


def _append(path: Path, line: bytes) -> None:
    """Append a whole line to a file, or nothing; it is opened each time, so that it may be rotated.

    Raises:
        OSError: If it cannot be written, or is not a regular file.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, flags, 0o640)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        written = 0
        try:
            while written < len(line):
                written += os.write(fd, line[written:])
        except OSError:
            if written:  # no half of a line stays
                with suppress(OSError):
                    os.ftruncate(fd, found.st_size)
            raise
    finally:
        os.close(fd)
