"""Find the QMP monitors of a QEMU process, and which of them a second program can connect to.

The command line names the monitors; the kernel's list of sockets shows which of them QEMU listens on. A socket that
QEMU connects to belongs to another program; a socket that was passed to QEMU belongs to the program that passed it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from phasewatch.telemetry.process import read_link

__all__ = [
    "ListeningSocket",
    "MonitorEndpoint",
    "MonitorEndpointKind",
    "explain_no_usable_monitor",
    "find_monitor_endpoints",
    "is_same_file",
    "select_reported_endpoint",
]

_QemuOptions = Sequence[tuple[str, Mapping[str, str]]]
_LISTENING_FLAG = 0x10000  # __SO_ACCEPTCON among the flags in /proc/net/unix
_PIDFD_GETFD = 438  # system call number of pidfd_getfd, the same on every architecture; Python lacks it
_SIOCUNIXFILE = 0x89E0  # ioctl that opens the file that a socket is bound to
_NETWORK_KINDS = ("tcp", "telnet", "tn3270", "websocket", "wss")
_TRUE_VALUES = frozenset({"on", "yes", "true", "y"})
_LIBVIRT_MONITOR_ID = "charmonitor"  # chardev id of the monitor that libvirt uses itself


class MonitorEndpointKind(StrEnum):
    """How a QMP monitor can be reached.

    ``LISTENING``: QEMU listens on a Unix socket. ``HANDED_OVER``: the socket belongs to the program that started QEMU.
    ``CLIENT``: QEMU connects to another program. ``NETWORK``: QEMU listens on the network. ``ELSEWHERE``: another kind
    of character device. ``SILENT``: the command line names a socket that QEMU does not listen on.
    """

    LISTENING = "listening"
    HANDED_OVER = "handed-over"
    CLIENT = "client"
    NETWORK = "network"
    ELSEWHERE = "elsewhere"
    SILENT = "silent"


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorEndpoint:
    """One QMP monitor.

    Attributes:
        kind: How it can be reached.
        address: Its address, for people.
        path: Path of the socket as this process reaches it; None if it cannot be connected to.
    """

    kind: MonitorEndpointKind
    address: str
    path: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListeningSocket:
    """A listening Unix socket: the name it was bound to, and its descriptor in the process (None: held by another)."""

    name: str
    fd: int | None


def find_monitor_endpoints(arguments: _QemuOptions, folder: Path) -> tuple[MonitorEndpoint, ...]:
    """Return the QMP monitors of a command line, in its order.

    Args:
        arguments: From `parse_qemu_options`.
        folder: ``/proc/PID``.
    """
    listeners = _read_listeners(folder)
    backends = {keys.get("id", ""): keys for option, keys in arguments if option == "chardev"}
    found = []
    for option, keys in arguments:
        if option in ("qmp", "qmp-pretty"):
            head = keys.get("", "")
            if head.startswith("chardev:"):
                found.append(_resolve_backend(backends.get(head.removeprefix("chardev:"), {}), folder, listeners))
            else:
                found.append(_resolve_address(head, keys, folder, listeners))
        elif option == "mon" and keys.get("mode") == "control":
            found.append(_resolve_backend(backends.get(keys.get("chardev") or keys.get("", ""), {}), folder, listeners))
    return tuple(found)


def explain_no_usable_monitor(endpoints: Sequence[MonitorEndpoint]) -> str:
    """Return a message that explains why none of these monitors can be used."""
    if not endpoints:
        return "QEMU was started without a QMP socket: its command line has neither -qmp nor -mon with mode=control"
    endpoint = select_reported_endpoint(endpoints)
    if endpoint.kind is MonitorEndpointKind.HANDED_OVER:
        where = f" ({endpoint.address})" if endpoint.address else ""
        return (
            f"its QMP socket{where} belongs to the program that started it (libvirt); without libvirt's statistics "
            "only /proc and tap counters can be read"
        )
    if endpoint.kind is MonitorEndpointKind.CLIENT:
        return f"its QMP monitor connects to another program's socket, {endpoint.address}, and accepts no connection"
    if endpoint.kind is MonitorEndpointKind.NETWORK:
        return (
            f"its QMP monitor listens on the network, {endpoint.address}, where no file permission protects it; "
            "phasewatch uses Unix sockets only: start QEMU with -qmp unix:PATH,server=on,wait=off beside it"
        )
    if endpoint.kind is MonitorEndpointKind.SILENT:
        return f"its command line names the QMP socket {endpoint.address}, and the process does not listen on it"
    return f"its QMP monitor is {endpoint.address}, which no second program can use"


def select_reported_endpoint(endpoints: Sequence[MonitorEndpoint]) -> MonitorEndpoint:
    """Return the monitor to report: the first that an administrator added, else the one that libvirt uses."""
    return next((e for e in endpoints if e.kind is not MonitorEndpointKind.HANDED_OVER), endpoints[0])


def _read_listeners(folder: Path) -> tuple[ListeningSocket, ...] | None:
    """Return the listening Unix sockets of a process's network namespace; None if this user may not read them.

    Source: ``/proc/PID/net/unix`` (inode, flags, path) and ``/proc/PID/fd``.

    Args:
        folder: ``/proc/PID``.
    """
    try:
        held = dict(_list_sockets(folder / "fd"))
        lines = (folder / "net" / "unix").read_text("utf-8", "backslashreplace").splitlines()[1:]
    except OSError:
        return None
    found = []
    for line in lines:
        fields = line.split(maxsplit=7)
        with suppress(ValueError, IndexError):
            inode = int(fields[6])
            if int(fields[3], 16) & _LISTENING_FLAG:
                found.append(ListeningSocket(name=fields[7] if len(fields) > 7 else "", fd=held.get(inode)))
    return tuple(found)


def is_same_file(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same file."""
    try:
        return os.path.samestat(one.stat(), other.stat())
    except OSError:
        return False


def _resolve_address(
    head: str, keys: Mapping[str, str], folder: Path, listeners: tuple[ListeningSocket, ...] | None
) -> MonitorEndpoint:
    """Resolve ``-qmp KIND:REST,…``."""
    kind, _, rest = head.partition(":")
    if kind == "unix":
        return _resolve_path(rest, keys, folder, listeners)
    if kind in _NETWORK_KINDS:
        return MonitorEndpoint(
            kind=MonitorEndpointKind.NETWORK if _is_server(keys) else MonitorEndpointKind.CLIENT,
            address=f"{kind}:{rest}",
        )
    return MonitorEndpoint(kind=MonitorEndpointKind.ELSEWHERE, address=f"on {head or 'nothing'}")


def _resolve_backend(
    keys: Mapping[str, str], folder: Path, listeners: tuple[ListeningSocket, ...] | None
) -> MonitorEndpoint:
    """Resolve ``-chardev KIND,…`` of a monitor."""
    kind = keys.get("", keys.get("backend", ""))
    if kind != "socket" and "path" not in keys:
        return MonitorEndpoint(
            kind=MonitorEndpointKind.ELSEWHERE, address=f"on a character device of kind {kind or 'unknown'}"
        )
    if "fd" in keys:
        return MonitorEndpoint(kind=MonitorEndpointKind.HANDED_OVER, address=_find_socket_name(keys["fd"], listeners))
    if "path" not in keys:
        where = f"tcp:{keys.get('host', '')}:{keys.get('port', '')}"
        return MonitorEndpoint(
            kind=MonitorEndpointKind.NETWORK if _is_server(keys) else MonitorEndpointKind.CLIENT, address=where
        )
    if keys.get("id") == _LIBVIRT_MONITOR_ID:
        return MonitorEndpoint(kind=MonitorEndpointKind.HANDED_OVER, address=keys["path"])
    return _resolve_path(keys["path"], keys, folder, listeners)


def _resolve_path(
    name: str, keys: Mapping[str, str], folder: Path, listeners: tuple[ListeningSocket, ...] | None
) -> MonitorEndpoint:
    if not _is_server(keys):
        return MonitorEndpoint(kind=MonitorEndpointKind.CLIENT, address=name)
    if keys.get("abstract") in _TRUE_VALUES:
        return MonitorEndpoint(kind=MonitorEndpointKind.ELSEWHERE, address=f"an abstract socket, @{name}")
    if listeners is None:
        return MonitorEndpoint(
            kind=MonitorEndpointKind.LISTENING, address=name, path=_find_reachable_path(name, folder, None)
        )
    named = sorted((each for each in listeners if each.name == name), key=lambda each: each.fd is None)
    if not named:
        return MonitorEndpoint(kind=MonitorEndpointKind.SILENT, address=name)
    # A socket that only another process holds may belong to another VM: `connect_monitor` compares the vCPU threads.
    return MonitorEndpoint(
        kind=MonitorEndpointKind.LISTENING, address=name, path=_find_reachable_path(name, folder, named[0])
    )


def _find_reachable_path(name: str, folder: Path, own: ListeningSocket | None) -> Path:
    """Return the path by which this process reaches another one's socket; their root or working folder may differ."""
    asked = Path(name) if name.startswith("/") else Path(read_link(folder / "cwd") or "/", name)
    seen = folder / "root" / str(asked).lstrip("/")
    if _is_socket(seen):
        return asked if is_same_file(asked, seen) else seen
    if _is_socket(asked):  # the process's root may not be looked into by this user
        return asked
    bound = (
        _find_bound_file(int(folder.name), own.fd) if own and own.fd is not None and folder.name.isdecimal() else None
    )
    return bound or asked


def _find_bound_file(pid: int, fd: int) -> Path | None:
    """Return the file that a process's socket is bound to; None if the kernel does not tell, as it tells root only.

    Needed for a QEMU with ``-daemonize`` and a relative path, because it left the folder that the path is relative to.
    Source: ``pidfd_getfd(2)`` and the ioctl ``SIOCUNIXFILE``.
    """
    with suppress(OSError, AttributeError), _DescriptorCloser() as opened:
        process = opened.add(os.pidfd_open(pid))
        duplicate = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, fd, 0)
        if duplicate < 0:
            return None
        file = opened.add(fcntl.ioctl(opened.add(duplicate), _SIOCUNIXFILE))
        path = Path(f"/proc/self/fd/{file}").readlink()
        return path if os.path.samestat(path.stat(), os.fstat(file)) else None
    return None


class _DescriptorCloser:
    """A context manager that closes descriptors."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def add(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def __enter__(self) -> _DescriptorCloser:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)


def _is_server(keys: Mapping[str, str]) -> bool:
    """Return whether QEMU listens on the socket; without ``server`` it connects."""
    return keys.get("server", "off") in _TRUE_VALUES


def _find_socket_name(fd: str, listeners: tuple[ListeningSocket, ...] | None) -> str:
    return next((each.name for each in listeners or () if str(each.fd) == fd), "")


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


def _list_sockets(folder: Path) -> Iterator[tuple[int, int]]:
    """Yield (inode, descriptor) of each socket that a process holds."""
    for entry in folder.iterdir():
        match = re.fullmatch(r"socket:\[(\d+)\]", read_link(entry))
        if match:
            yield int(match[1]), int(entry.name)
