"""Start a program of the user's when an alarm is raised or ends: no shell, bounded time, bounded number."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import deque
from contextlib import suppress

from phasewatch.alarms.config import CommandConfig, parse_command
from phasewatch.alarms.delivery import OutputCounters
from phasewatch.alarms.life import AlarmChange, render_time

__all__ = ["CommandOutput", "build_environment"]

logger = logging.getLogger(__name__)

_MAX_WAITING = 256
_MAX_VALUE_CHARS = 4096  # of one variable
_MAX_STDERR_BYTES = 500  # that a message about a failure shows
_TERMINATE_GRACE_S = 2.0
_FLUSH_S = 3.0
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "USER", "LOGNAME")


def build_environment(change: AlarmChange, *, host: str) -> dict[str, str]:
    """Return the facts of a change as environment variables.

    Args:
        change: The change.
        host: Name of the hypervisor.
    """
    alarm = change.alarm
    facts = {
        "VM": alarm.vm,
        "VM_ID": alarm.vm_id,
        "HOST": host,
        "KIND": str(alarm.kind),
        "STATE": "raised" if alarm.is_open else "resolved",
        "ALARM_ID": alarm.id,
        "RAISED_AT": render_time(alarm.raised_ns),
        "CHANGED_AT": render_time(change.at_ns),
        "PHASE": alarm.decision,
        "MODEL": alarm.model,
        "CHANNELS": alarm.threat,
        "CAVEAT": alarm.caveat,
        **{f"P_{name.upper()}": f"{p:.4f}" for name, p in alarm.probabilities.items()},
    }
    return {f"PHASEWATCH_{name}": value.replace("\0", "")[:_MAX_VALUE_CHARS] for name, value in facts.items()}


class CommandOutput:
    """Runs a program for each announced change; what comes too fast waits, and the oldest is dropped and counted.

    A run is not repeated: it may have done a part of its work. It counts as sent if it ends with status 0.

    Args:
        config: Settings.
        host: Name of the hypervisor.

    Raises:
        UsageError: If the program does not exist.
    """

    def __init__(self, config: CommandConfig, *, host: str) -> None:
        self._words, self._config, self._host = parse_command(config.command), config, host
        self._waiting: deque[AlarmChange] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._is_closed = self._is_failing = False
        self.sent = self.lost = 0

    @property
    def counters(self) -> OutputCounters:
        """The counts so far."""
        backlog = len(self._waiting) + len(self._running)
        return OutputCounters(
            name="command", sent=self.sent, lost=self.lost, backlog=backlog, is_failing=self._is_failing
        )

    def put(self, change: AlarmChange) -> None:
        """Start the program, or queue the change if too many run."""
        if self._is_closed:
            self.lost += 1
            return
        if len(self._waiting) >= _MAX_WAITING:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(change)
        self._start_due()

    async def close(self) -> None:
        """Wait a few seconds for programs, then kill those that still run and count them as lost."""
        self._is_closed = True
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                while self._running:
                    await asyncio.wait(self._running)
        self.lost += len(self._waiting)
        self._waiting.clear()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _start_due(self) -> None:
        while self._waiting and len(self._running) < self._config.max_running:
            task = asyncio.create_task(self._run(self._waiting.popleft()))
            self._running.add(task)
            task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start_due()

    async def _run(self, change: AlarmChange) -> None:
        failure = "interrupted by the end of the watch"
        try:
            failure = await self._run_once(change)
        except OSError as exc:
            failure = exc.strerror or str(exc)
        finally:
            self.sent += not failure
            self.lost += bool(failure)
            if failure:
                logger.warning("command %s for alarm %s: %s", self._words[0], change.alarm.id, failure)
            elif self._is_failing:
                logger.warning("command %s: it works again", self._words[0])
            self._is_failing = bool(failure)

    async def _run_once(self, change: AlarmChange) -> str:
        """Run the program to its end; return what went wrong, or an empty text."""
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        with _TailReader() as stderr:
            process = await asyncio.create_subprocess_exec(
                *self._words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stderr.fd,
                env={**kept, **build_environment(change, host=self._host)},
                cwd="/",
                start_new_session=True,
            )
            stderr.start()
            try:
                async with asyncio.timeout(self._config.timeout_s):
                    code = await process.wait()
            except TimeoutError:
                await _kill_group(process)
                return f"killed after {self._config.timeout_s:g} s"
            except asyncio.CancelledError:
                await _kill_group(process)
                raise
            stderr.read_some()  # what came with its last breath
        if code == 0:
            logger.info("command %s for alarm %s: exit status 0", self._words[0], change.alarm.id)
            return ""
        return f"exit status {code}{f': {stderr.last_line}' if stderr.last_line else ''}"


async def _kill_group(process: asyncio.subprocess.Process) -> int:
    """End a process and all that it started, first by SIGTERM; return its exit status."""
    for number in (signal.SIGTERM, signal.SIGKILL):  # the second also for children that outlived the process
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(TimeoutError):
            async with asyncio.timeout(_TERMINATE_GRACE_S):
                await process.wait()
    return process.returncode if process.returncode is not None else -int(signal.SIGKILL)


class _TailReader:
    """A pipe whose last line is kept; a child in the background that holds it open delays nothing."""

    def __init__(self) -> None:
        self._read_fd, self.fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self.fd, True)  # a program may not expect otherwise
        self._tail = b""

    def __enter__(self) -> _TailReader:
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.get_running_loop().remove_reader(self._read_fd)
        for fd in (self._read_fd, self.fd):
            if fd >= 0:
                os.close(fd)

    def start(self) -> None:
        """Read from now on; the program has the other end."""
        os.close(self.fd)
        self.fd = -1
        asyncio.get_running_loop().add_reader(self._read_fd, self.read_some)

    def read_some(self) -> None:
        """Read what is there."""
        with suppress(BlockingIOError):
            chunk = os.read(self._read_fd, 65_536)
            self._tail = (self._tail + chunk)[-_MAX_STDERR_BYTES:]
            if not chunk:
                asyncio.get_running_loop().remove_reader(self._read_fd)

    @property
    def last_line(self) -> str:
        """The last line, shortened."""
        lines = self._tail.decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip() if lines else ""
