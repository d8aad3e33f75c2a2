"""Send the changes of alarms as syslog messages (RFC 5424) over UDP, TCP or a unix socket.

Source: RFC 5424 (format), RFC 5426 (UDP), RFC 6587 section 3.4.1 (octet counting over TCP).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Mapping

from phasewatch.alarms.config import (
    SYSLOG_FACILITIES,
    SyslogAddress,
    SyslogConfig,
    SyslogTransport,
    parse_syslog_address,
)
from phasewatch.alarms.delivery import DEFAULT_RETRY_POLICY, DeliveryFailure, DeliveryQueue, OutputCounters, RetryPolicy
from phasewatch.alarms.life import AlarmChange, AlarmChangeKind, render_time
from phasewatch.models.alarm import AlarmKind

__all__ = ["MAX_MESSAGE_BYTES", "SyslogOutput", "render_syslog_message"]

MAX_MESSAGE_BYTES = 2048  # every receiver should accept this much (RFC 5426, section 3.2)
_STRUCTURED_DATA_ID = "phasewatch@32473"  # the enterprise number for documentation; phasewatch has none of its own
_TIMEOUT_S = 5.0
_MAX_VALUE_CHARS = 200  # of one parameter
_BOM = "\ufeff"
_SEVERITIES = {  # of an infection alarm, and of an activity alarm
    AlarmChangeKind.RAISED: (2, 4),  # critical, warning
    AlarmChangeKind.UNSILENCED: (2, 4),
    AlarmChangeKind.ACKNOWLEDGED: (6, 6),  # informational
    AlarmChangeKind.SILENCED: (6, 6),
    AlarmChangeKind.RESOLVED: (5, 5),  # notice
}


def render_syslog_message(change: AlarmChange, *, facility: int, host: str, pid: int) -> bytes:
    """Return a change as one message of at most `MAX_MESSAGE_BYTES`.

    Args:
        change: The change.
        facility: Code of the facility.
        host: Name of the hypervisor.
        pid: Process id of the watcher.
    """
    alarm = change.alarm
    severity = _SEVERITIES[change.kind][alarm.kind is AlarmKind.ACTIVITY]
    parameters = {
        "vm": alarm.vm,
        "vmId": alarm.vm_id,
        "kind": str(alarm.kind),
        "change": str(change.kind),
        "status": str(alarm.status),
        "alarmId": alarm.id,
        "raisedAt": render_time(alarm.raised_ns),
        "phase": alarm.decision,
        **{f"p_{name}": f"{p:.3f}" for name, p in alarm.probabilities.items()},
        "model": alarm.model,
        "channels": alarm.threat,
        "silenced": "true" if change.is_silenced else "false",
    }
    parameters |= {"by": change.by} if change.by else {}
    parameters |= {"note": change.note} if change.note else {}
    parameters |= {"caveat": alarm.caveat} if alarm.caveat else {}
    head = (
        f"<{facility * 8 + severity}>1 {render_time(change.at_ns)} {_clean_name(host, 255)} phasewatch {pid} "
        f"alarm-{change.kind} [{_STRUCTURED_DATA_ID}{_render_parameters(parameters)}] "
    ).encode()
    words = f"{alarm.kind} alarm of VM {alarm.vm} {change.kind}: predicted phase {alarm.decision}"
    words += f" ({alarm.caveat})" if alarm.caveat else ""
    text = f"{_BOM}{_escape_controls(words)}".encode("utf-8", "replace")[: MAX_MESSAGE_BYTES - len(head)]
    return head + text.decode("utf-8", "ignore").encode()  # cut between two characters


class SyslogOutput:
    """Sends changes to one receiver, one after the other.

    Args:
        config: Settings.
        host: Name of the hypervisor.
        policy: Bounds of the queue.

    Raises:
        UsageError: If the address is malformed.
    """

    def __init__(self, config: SyslogConfig, *, host: str, policy: RetryPolicy = DEFAULT_RETRY_POLICY) -> None:
        self._address = parse_syslog_address(config.address)
        self._facility, self._host = SYSLOG_FACILITIES[config.facility], host
        self._sock: socket.socket | None = None
        self._queue: DeliveryQueue[bytes] = DeliveryQueue("syslog", self._send, policy=policy)

    @property
    def counters(self) -> OutputCounters:
        """The counts so far."""
        return self._queue.counters

    def put(self, change: AlarmChange) -> None:
        """Queue a change."""
        self._queue.put(render_syslog_message(change, facility=self._facility, host=self._host, pid=os.getpid()))

    async def close(self) -> None:
        """Wait a few seconds for queued messages, then stop."""
        await self._queue.close()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    async def _send(self, message: bytes) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._send_once(message)
        except OSError as exc:
            self._disconnect()
            reason = exc.strerror or str(exc) or "it did not answer in time"
            raise DeliveryFailure(reason, is_final=exc.errno == errno.EMSGSIZE) from exc
        except asyncio.CancelledError:
            self._disconnect()  # a part of the message may have been sent
            raise

    async def _send_once(self, message: bytes) -> None:
        loop = asyncio.get_running_loop()
        if self._sock is not None and self._address.transport is SyslogTransport.TCP and _is_closed(self._sock):
            self._disconnect()
        if self._sock is None:
            self._sock = await _connect(self._address)
        is_stream = self._sock.type == socket.SOCK_STREAM
        if not is_stream or self._address.transport is SyslogTransport.UNIX:
            data = message + b"\n" if is_stream else message
        else:
            data = b"%d %s" % (len(message), message)
        await loop.sock_sendall(self._sock, data)


def _render_parameters(parameters: Mapping[str, str]) -> str:
    parts = []
    for name, value in parameters.items():
        value = _escape_controls(value[:_MAX_VALUE_CHARS])
        for char in ("\\", '"', "]"):
            value = value.replace(char, f"\\{char}")
        parts.append(f' {name}="{value}"')
    return "".join(parts)


def _escape_controls(text: str) -> str:
    """Replace control characters and lone surrogates, which end or spoil a line in many receivers."""
    return "".join("\ufffd" if ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 else c for c in text)


def _clean_name(name: str, longest: int) -> str:
    """Return a name as printable ASCII without spaces; ``-``, the nil value, if nothing remains."""
    return "".join(c for c in name if "!" <= c <= "~")[:longest] or "-"


def _is_closed(sock: socket.socket) -> bool:
    """Whether the receiver has closed its end; the first message after that would be lost without an error."""
    try:
        return sock.recv(1) == b""  # a syslog receiver sends nothing
    except BlockingIOError:
        return False
    except OSError:
        return True


async def _connect(address: SyslogAddress) -> socket.socket:
    """Return a connected, non-blocking socket.

    Raises:
        OSError: If the receiver cannot be reached.
    """
    if address.transport is SyslogTransport.UNIX:
        return await _connect_unix(address.path)
    loop = asyncio.get_running_loop()
    kind = socket.SOCK_DGRAM if address.transport is SyslogTransport.UDP else socket.SOCK_STREAM
    failure: OSError = OSError(errno.EHOSTUNREACH, "the name has no address")
    for family, _, _, _, where in await loop.getaddrinfo(address.host, address.port, type=kind):
        sock = socket.socket(family, kind)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, where)
        except OSError as exc:
            failure = exc
            sock.close()
            continue
        except BaseException:
            sock.close()
            raise
        return sock
    raise failure


async def _connect_unix(path: str) -> socket.socket:
    loop = asyncio.get_running_loop()
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        sock = socket.socket(socket.AF_UNIX, kind)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, path)
        except OSError as exc:
            sock.close()
            if exc.errno != errno.EPROTOTYPE or kind is socket.SOCK_STREAM:
                raise
            continue
        return sock
    raise OSError(errno.EPROTOTYPE, "neither a datagram nor a stream socket")
