"""The monitors of a QEMU process: which of them listens where a second program may connect, and what the others are.

The command line says what was asked for, the kernel what became of it: only a socket that the process listens on is a
door. One that QEMU connects to belongs to another program, and one that was handed over to who handed it over.
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

QemuOptions = Sequence[tuple[str, Mapping[str, str]]]
_LISTENING_FLAG = 0x10000  # __SO_ACCEPTCON, of the flags in /proc/net/unix
_PIDFD_GETFD = 438  # a system call that Python has no name for; the number is the same on every architecture
_SIOCUNIXFILE = 0x89E0  # opens the file that a socket is bound to
_NETWORK_KINDS = ("tcp", "telnet", "tn3270", "websocket", "wss")
_TRUE_VALUES = frozenset({"on", "yes", "true", "y"})
_LIBVIRT_MONITOR_ID = "charmonitor"  # how libvirt calls the monitor that it keeps for itself


class MonitorEndpointKind(StrEnum):
    """What a monitor in control mode turned out to be."""

    LISTENING = "listening"
    HANDED_OVER = "handed-over"
    CLIENT = "client"
    NETWORK = "network"
    ELSEWHERE = "elsewhere"
    SILENT = "silent"


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorEndpoint:
    """One monitor.

    Attributes:
        kind: What it is.
        address: Where it is, for people.
        path: Of the socket, as this process reaches it; None where there is none to connect to.
    """

    kind: MonitorEndpointKind
    address: str
    path: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListeningSocket:
    """A Unix socket that somebody listens on: its name as it was bound, and its descriptor in the process; None elsewhere."""

    name: str
    fd: int | None


def find_monitor_endpoints(arguments: QemuOptions, folder: Path) -> tuple[MonitorEndpoint, ...]:
    """Return the monitors in control mode of a command line, in its order.

    Args:
        arguments: From `find.parse_arguments`.
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


def explain_no_usable_monitor(doors: Sequence[MonitorEndpoint]) -> str:
    """Return why none of these monitors can be used: the first one's reason, or that of the first added to libvirt's own."""
    if not doors:
        return "QEMU was started without a QMP socket: its command line has neither -qmp nor -mon with mode=control"
    door = select_reported_endpoint(doors)
    if door.kind is MonitorEndpointKind.HANDED_OVER:
        where = f" ({door.address})" if door.address else ""
        return f"its QMP socket{where} belongs to who started it (libvirt); only /proc and a tap's counters are left"
    if door.kind is MonitorEndpointKind.CLIENT:
        return f"its QMP monitor connects to another program's socket, {door.address}, and lets nobody in"
    if door.kind is MonitorEndpointKind.NETWORK:
        return (
            f"its QMP monitor listens on the network, {door.address}, where a Unix socket's permissions do not guard it; "
            "phasewatch connects to Unix sockets alone: start QEMU with -qmp unix:PATH,server=on,wait=off beside it"
        )
    if door.kind is MonitorEndpointKind.SILENT:
        return f"its command line names the QMP socket {door.address}, and the process does not listen on it"
    return f"its QMP monitor is {door.address}, which no second program can use"


def select_reported_endpoint(doors: Sequence[MonitorEndpoint]) -> MonitorEndpoint:
    """Return the monitor whose kind says most: one that somebody added, before the one that libvirt keeps."""
    return next((door for door in doors if door.kind is not MonitorEndpointKind.HANDED_OVER), doors[0])


def _read_listeners(folder: Path) -> tuple[ListeningSocket, ...] | None:
    """Return the Unix sockets that are listened on in a process's network namespace; None if this user may not know.

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
    """Return whether two paths lead to one file, through whatever links, dots or mounts."""
    try:
        return os.path.samestat(one.stat(), other.stat())
    except OSError:
        return False


def _resolve_address(
    head: str, keys: Mapping[str, str], folder: Path, listeners: tuple[ListeningSocket, ...] | None
) -> MonitorEndpoint:
    """Look at ``-qmp KIND:REST,…``."""
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
    """Look at ``-chardev KIND,…`` of a monitor."""
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
    # Held by another process alone, it may be another machine's by now: whoever connects asks for its threads.
    return MonitorEndpoint(
        kind=MonitorEndpointKind.LISTENING, address=name, path=_find_reachable_path(name, folder, named[0])
    )


def _find_reachable_path(name: str, folder: Path, own: ListeningSocket | None) -> Path:
    """Return the path by which this process reaches a socket of another, whose folders and root may be others."""
    asked = Path(name) if name.startswith("/") else Path(_read_link(folder / "cwd") or "/", name)
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
    """Return the file that a process's socket is bound to, as the kernel tells root; not every kernel does.

    A QEMU that was started with ``-daemonize`` and a relative path has left the folder that the path began in.
    """
    with suppress(OSError, AttributeError), _DescriptorCloser() as opened:
        process = opened.add(os.pidfd_open(pid))
        taken = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, fd, 0)
        if taken < 0:
            return None
        file = opened.add(fcntl.ioctl(opened.add(taken), _SIOCUNIXFILE))
        path = Path(f"/proc/self/fd/{file}").readlink()
        return path if os.path.samestat(path.stat(), os.fstat(file)) else None
    return None


class _DescriptorCloser:
    """Closes descriptors."""

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
    """Return whether a socket waits for others; without ``server`` QEMU is the one that connects."""
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
        match = re.fullmatch(r"socket:\[(\d+)\]", _read_link(entry))
        if match:
            yield int(match[1]), int(entry.name)


def _read_link(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""
