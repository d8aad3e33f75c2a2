"""Talk to the driver inside the guest.

The protocol is text lines over a virtio port: numbered commands, each acknowledged before it is carried out. It is
described in `lab/guest/README.md`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from phasewatch.errors import VmError
from phasewatch.telemetry.base import AsyncClock, close_guest_connection

__all__ = ["ACK_TIMEOUT_S", "CommandAck", "GuestDriver", "ReadyMessage"]

_T = TypeVar("_T")

_MAX_LINE_BYTES = 4096
ACK_TIMEOUT_S = 10.0  # measured: 2 to 50 ms, 200 ms on a crowded machine


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyMessage:
    """The first message of the guest: its uptime and its kernel."""

    uptime_ms: int
    kernel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandAck:
    """The acknowledgement of command `id`, stamped with the clocks of the host. The guest acts after it."""

    id: int
    t_wall_ns: int
    t_mono_ns: int
    uptime_ms: int


class GuestDriver:
    """Sends commands and matches the answers to them.

    A broken connection or a refused command raises `VmError` in every pending wait and in the next `send`.

    Args:
        clock: Stamps each answer as it arrives.
        name: Name of the VM, for error messages.
    """

    def __init__(self, *, clock: AsyncClock, name: str) -> None:
        self._clock, self._name = clock, name
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._next_id = 1
        self._ready: asyncio.Future[ReadyMessage] = asyncio.get_running_loop().create_future()
        self._acks: dict[int, asyncio.Future[CommandAck]] = {}
        self._finished: dict[int, asyncio.Future[int]] = {}
        self._verbs: dict[int, str] = {}
        self._failure: str | None = None  # why no command can be sent any more

    async def open(self, path: Path) -> None:
        """Connect to QEMU's end of the port `ctl`.

        Raises:
            OSError: If QEMU does not serve it.
        """
        reader, self._writer = await asyncio.open_unix_connection(str(path), limit=_MAX_LINE_BYTES)
        self._task = asyncio.create_task(self._listen(reader))

    async def close(self) -> None:
        """Close the connection; every pending wait raises VmError."""
        task, self._task = self._task, None
        await close_guest_connection(task, self._writer)
        self._fail(f"{self._name}: the driver's line was closed")

    async def wait_ready(self) -> ReadyMessage:
        """Wait for the ready message of the guest."""
        return await asyncio.shield(self._ready)

    async def send(self, verb: str, *arguments: str) -> CommandAck:
        """Send one command and wait for its acknowledgement.

        Raises:
            VmError: If the guest refuses this or an earlier command, if the connection breaks, or if no answer comes
                within `ACK_TIMEOUT_S`.
        """
        if self._failure is not None or self._writer is None:
            raise VmError(self._failure or f"{self._name}: {verb}: the driver's line is not open")
        number, self._next_id = self._next_id, self._next_id + 1
        loop = asyncio.get_running_loop()
        ack: asyncio.Future[CommandAck] = loop.create_future()
        self._acks[number] = ack
        self._finished[number] = loop.create_future()
        self._verbs[number] = verb
        self._writer.write(" ".join((str(number), verb, *arguments)).encode("ascii") + b"\n")
        try:
            async with asyncio.timeout(ACK_TIMEOUT_S):
                return await ack
        except TimeoutError as exc:
            raise VmError(f"{self._name}: {verb}: the guest did not acknowledge within {ACK_TIMEOUT_S:g} s") from exc

    async def wait_finished(self, number: int, *, timeout_s: float) -> int:
        """Wait until the work of command `number` ends by itself, and return its exit code.

        Raises:
            VmError: If the connection breaks, or if the work does not end within `timeout_s` seconds.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._finished[number])
        except TimeoutError as exc:
            verb = self._verbs[number]
            raise VmError(f"{self._name}: {verb}: the guest did not finish within {timeout_s:g} s") from exc

    def has_finished(self, number: int) -> bool:
        """Return whether the work of command `number` has ended by itself."""
        return self._finished[number].done()

    def handle_line(self, line: str) -> None:
        """Handle one line from the guest.

        Raises:
            ValueError: If the line is not part of the protocol.
        """
        word, _, rest = line.partition(" ")
        match word:
            case "ready":
                uptime, _, kernel = rest.partition(" ")
                if self._ready.done():
                    raise ValueError("the guest said `ready` again: it must have restarted")
                self._ready.set_result(ReadyMessage(uptime_ms=int(uptime), kernel=_printable(kernel)))
            case "ack":
                t_wall_ns, t_mono_ns = self._clock.wall_ns(), self._clock.mono_ns()
                number, up_ms = (int(part) for part in rest.split())
                answer = CommandAck(id=number, t_wall_ns=t_wall_ns, t_mono_ns=t_mono_ns, uptime_ms=up_ms)
                self._answer(self._acks, number, answer)
            case "finished":
                number, code = (int(part) for part in rest.split())
                self._answer(self._finished, number, code)
            case "err":
                number_text, _, reason = rest.partition(" ")
                self._refuse(int(number_text), reason)
            case _:
                raise ValueError(f"unknown word {_printable(word)!r}")

    def _answer(self, waiting: dict[int, asyncio.Future[_T]], number: int, value: _T) -> None:
        """Set the result of the wait for an answer. A second answer is an error, so a flood ends at its second line."""
        future = waiting.get(number)
        if future is not None and future.cancelled():
            return  # the caller has given up
        if future is None or future.done():
            raise ValueError(f"an answer to command {number}, which was not sent or was answered before")
        future.set_result(value)

    def _refuse(self, number: int, reason: str) -> None:
        futures = (self._acks.get(number), self._finished.get(number))
        waiting = [future for future in futures if future is not None and not future.done()]
        if not waiting:
            raise ValueError(f"an error to command {number}, which was not sent or was answered before")
        # The recorder does not wait for the end of most phases, so a refusal after the acknowledgement must be kept.
        self._failure = f"{self._name}: {self._verbs[number]}: the guest says: {_printable(reason)}"
        for future in waiting:
            future.set_exception(VmError(self._failure))
            future.exception()  # marks it as retrieved, because no task may be waiting for it

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        reason = "the guest's driver closed the connection"
        try:
            while line := await reader.readuntil(b"\n"):
                self.handle_line(line.decode("ascii", "replace").strip())
        except (asyncio.IncompleteReadError, OSError):
            pass
        except asyncio.LimitOverrunError:
            reason = f"the driver sent a line of more than {_MAX_LINE_BYTES} bytes"
        except ValueError as exc:
            reason = f"the driver does not keep to the protocol: {exc}"
        self._fail(f"{self._name}: {reason}")

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        waiting: list[asyncio.Future[ReadyMessage] | asyncio.Future[CommandAck] | asyncio.Future[int]] = [self._ready]
        waiting += [*self._acks.values(), *self._finished.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(VmError(reason))
                future.exception()  # marks it as retrieved, because no task may be waiting for it


def _printable(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:200]
