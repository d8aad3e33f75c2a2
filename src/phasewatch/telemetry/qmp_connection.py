"""Speak QMP over a Unix socket: several commands in one write, answers matched by their id, every size bounded.

The watcher sends about twenty commands a second to each VM, so this is its most frequent work. One write carries all
commands of a round, one buffer serves all connections, and an answer is decoded only by the caller that wants it.

A monitor may belong to a QEMU that malware took over. A line is at most `MAX_LINE_BYTES` long, a connection reads at
most `_MAX_UNASKED_BYTES` between two commands, and a line that is not QMP ends the connection.

Source: QEMU's "QEMU Machine Protocol Specification".
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from phasewatch.errors import VmError

__all__ = ["MAX_LINE_BYTES", "AnswerWaiter", "MonitorCommand", "PendingAnswer", "QmpConnection", "open_connection"]

MAX_LINE_BYTES = 1 << 20
_MAX_UNASKED_BYTES = 4 * MAX_LINE_BYTES  # read between two commands; more waits in the socket, and QEMU waits with it
_MAX_UNSENT_BYTES = 1 << 16  # commands that QEMU does not read
_MAX_PENDING = 1024  # commands without an answer
_MAX_EVENT_NAMES = 256
_OTHER_EVENTS = "other events"  # stands for all names beyond the limit
_CHUNK_BYTES = 1 << 16

_ABSENT = msgspec.Raw(b"")
# One buffer for all connections: the event loop fills it and hands it over in one step, without a turn between.
_buffer = bytearray(_CHUNK_BYTES)
_view = memoryview(_buffer)


class _QmpError(msgspec.Struct, frozen=True):
    desc: str = ""


class _QmpLine(msgspec.Struct, frozen=True):
    """One line from QEMU: a greeting, an event, or the answer to a command."""

    id: int | None = None
    event: str | None = None
    result: msgspec.Raw = msgspec.field(default=_ABSENT, name="return")
    error: _QmpError | None = None
    greeting: msgspec.Raw = msgspec.field(default=_ABSENT, name="QMP")


AnswerWaiter = Callable[["PendingAnswer"], None]
_decode_line = msgspec.json.Decoder(_QmpLine).decode
_decode_value = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class MonitorCommand:
    """A QMP command that is encoded once and sent many times.

    Args:
        name: Name of the command.
        arguments: Its arguments.
    """

    __slots__ = ("arguments", "head", "name")

    def __init__(self, name: str, arguments: Mapping[str, object] | None = None) -> None:
        self.name, self.arguments = name, dict(arguments or {})
        plain: dict[str, object] = {"execute": name}
        if self.arguments:
            plain["arguments"] = self.arguments
        self.head = _encode(plain)[:-1] + b',"id":'


class PendingAnswer:
    """The answer to one command, when it has come.

    Attributes:
        command: The command.
        is_done: Whether QEMU answered, or the connection ended.
        failure: QEMU's refusal, or the end of the connection; empty if there is a result.
        done_ns: Time at which it was done, where the waiter notes it.
    """

    __slots__ = ("_raw", "_waiter", "command", "done_ns", "failure", "is_done")

    def __init__(self, command: MonitorCommand, waiter: AnswerWaiter) -> None:
        self.command, self._waiter = command, waiter
        self._raw = _ABSENT
        self.is_done, self.failure, self.done_ns = False, "", 0

    def decode(self) -> Any:
        """Return the decoded result.

        Raises:
            VmError: If QEMU refused the command, the connection ended, or the result is not valid JSON.
        """
        if self.failure or self._raw is _ABSENT:
            raise VmError(self.failure or "no answer")
        try:
            return _decode_value(self._raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise VmError(f"an answer that is not valid JSON: {exc}") from exc

    def settle(self, raw: msgspec.Raw = _ABSENT, failure: str = "") -> None:
        """Store the outcome and call the waiter."""
        self._raw, self.failure, self.is_done = raw, failure, True
        self._waiter(self)


class QmpConnection(asyncio.BufferedProtocol):
    """One connection to a QEMU monitor.

    Args:
        events: Counts the events that QEMU sends, by name.

    Attributes:
        is_open: Whether commands can be sent.
        failure: Why the connection ended; empty while it is open.
    """

    def __init__(self, events: Counter[str]) -> None:
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._tail = bytearray()  # the start of a line whose end has not come
        self._pending: dict[int, PendingAnswer] = {}
        self._next_id = 0
        self._unasked_bytes = 0
        self._is_paused = False
        self._greeted: asyncio.Future[None] = self._loop.create_future()
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self.is_open, self.failure = False, ""

    def post(self, commands: Sequence[MonitorCommand], waiter: AnswerWaiter) -> list[PendingAnswer]:
        """Send commands in one write; QEMU answers them in this order.

        Args:
            commands: The commands.
            waiter: Called with each answer as soon as it has come; it must not block.

        Raises:
            VmError: If the connection ended, or QEMU does not read its commands.
        """
        transport = self._transport
        if transport is None or self.failure:
            raise VmError(self.failure or "not connected to the QEMU monitor")
        if transport.get_write_buffer_size() > _MAX_UNSENT_BYTES or len(self._pending) >= _MAX_PENDING:
            raise VmError("QEMU does not read its monitor's commands")
        answers, lines = [], []
        for command in commands:
            number = self._next_id = self._next_id + 1
            answer = self._pending[number] = PendingAnswer(command, waiter)
            answers.append(answer)
            lines.append(b"%b%d}\n" % (command.head, number))
        self._unasked_bytes = 0
        if self._is_paused:
            self._is_paused = False
            transport.resume_reading()
        transport.write(b"".join(lines))
        return answers

    async def ask(self, command: MonitorCommand, timeout_s: float) -> Any:
        """Execute one command and return its decoded result.

        Raises:
            VmError: If QEMU refuses it, is gone, or does not answer before the deadline.
        """
        done: asyncio.Future[None] = self._loop.create_future()

        def wake(_: object = None) -> None:
            if not done.done():
                done.set_result(None)

        (answer,) = self.post([command], wake)
        deadline = self._loop.call_later(timeout_s, wake)
        try:
            await done
        finally:
            deadline.cancel()
        if not answer.is_done:
            raise VmError(f"no answer within {timeout_s:g} s")
        return answer.decode()

    async def negotiate(self) -> None:
        """Wait for the greeting and leave negotiation mode; the caller sets the deadline."""
        await self._greeted
        await self.ask(MonitorCommand("qmp_capabilities"), 1e6)
        self.is_open = True

    def abort(self, reason: str) -> None:
        """End the connection; every outstanding command fails with the reason."""
        if not self.failure:
            self.failure = reason or "the connection to the QEMU monitor ended"
        self.is_open = False
        pending, self._pending = self._pending, {}
        for answer in pending.values():
            answer.settle(failure=self.failure)
        if not self._greeted.done():
            self._greeted.set_exception(VmError(self.failure))
            self._greeted.exception()  # not reported by the event loop if nobody waits for the greeting any more
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Wait until the socket is closed."""
        if self._transport is not None:
            await self._closed

    # ---- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail every outstanding command."""
        self.abort(str(exc) if exc is not None else "QEMU closed its monitor")
        if not self._closed.done():
            self._closed.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer that all connections share."""
        return _view

    def buffer_updated(self, nbytes: int) -> None:
        """Handle the lines in the buffer."""
        self._unasked_bytes += nbytes
        if self._unasked_bytes > _MAX_UNASKED_BYTES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        data = bytes(_view[:nbytes])
        at = data.rfind(b"\n")
        if at < 0:
            self._tail += data
        else:
            if self._tail:
                data, at = bytes(self._tail) + data, at + len(self._tail)
                self._tail.clear()
            self._tail += data[at + 1 :]
            for line in data[:at].split(b"\n"):
                if not self._handle_line(line):
                    return
        if len(self._tail) > MAX_LINE_BYTES:
            self.abort(f"a line from QEMU's monitor is longer than {MAX_LINE_BYTES >> 20} MiB")

    def _handle_line(self, data: bytes) -> bool:
        """Handle one line; return whether the connection goes on."""
        if len(data) <= 1:  # QEMU ends lines with CR and LF
            return True
        try:
            line = _decode_line(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.abort("QEMU's monitor sent a line that is not QMP")
            return False
        if line.event is not None:
            known = line.event in self._events or len(self._events) < _MAX_EVENT_NAMES
            self._events[line.event if known else _OTHER_EVENTS] += 1
        elif line.id is not None:
            answer = self._pending.pop(line.id, None)
            if answer is not None:
                failure = "" if line.result is not _ABSENT else (line.error and line.error.desc) or "refused"
                answer.settle(line.result, failure)
        elif line.greeting is not _ABSENT:
            if not self._greeted.done():
                self._greeted.set_result(None)
        else:
            self.abort("QEMU's monitor could not parse a command")
            return False
        return True


async def open_connection(path: Path, events: Counter[str], timeout_s: float) -> QmpConnection:
    """Connect to a monitor and leave negotiation mode.

    Raises:
        TimeoutError: If QEMU does not answer before the deadline.
        OSError: If the socket cannot be opened.
        VmError: If the connection ends, or it is not a QMP monitor.
    """
    loop = asyncio.get_running_loop()
    connection: QmpConnection | None = None
    try:
        async with asyncio.timeout(timeout_s):
            _, connection = await loop.create_unix_connection(lambda: QmpConnection(events), str(path))
            await connection.negotiate()
    except BaseException:
        if connection is not None:
            connection.abort("the connection was not established")
        raise
    return connection
