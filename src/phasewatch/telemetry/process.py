"""Identify processes across reuse of process ids and across PID namespaces, and parse QEMU command lines."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

__all__ = [
    "PROC_ROOT",
    "ProcessHandle",
    "ProcessIdentity",
    "is_running",
    "list_pids",
    "owns_threads",
    "parse_qemu_options",
    "read_link",
    "read_own_identity",
    "read_own_namespace",
    "read_start_ticks",
    "translate_threads",
]

PROC_ROOT = Path("/proc")
_START_TIME_FIELD = 19  # index in /proc/PID/stat behind the command name; field 22 of proc(5)
_INITIAL_NAMESPACE = 0xEFFFFFFC  # inode of the initial PID namespace (PROC_PID_INIT_INO), which sees every process
_NSPID_PATTERN = re.compile(r"^NSpid:\s*(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """Identity of one process, which a later process with the same pid does not share.

    Attributes:
        pid: Process id in its namespace.
        start_ticks: Start time in clock ticks since boot.
        namespace: Inode of the PID namespace; 0 if unknown.
    """

    pid: int
    start_ticks: int
    namespace: int


def read_own_identity(proc: Path = PROC_ROOT) -> ProcessIdentity:
    """Return the identity of this process."""
    pid = os.getpid()
    return ProcessIdentity(pid=pid, start_ticks=read_start_ticks(pid, proc) or 0, namespace=read_own_namespace(proc))


def read_own_namespace(proc: Path = PROC_ROOT) -> int:
    """Return the inode of this process's PID namespace (``/proc/self/ns/pid``); 0 if it cannot be read."""
    with suppress(OSError):
        return (proc / "self" / "ns" / "pid").stat().st_ino
    return 0


def read_start_ticks(pid: int, proc: Path = PROC_ROOT) -> int | None:
    """Return a process's start time in clock ticks since boot; None if it is gone or a zombie.

    Source: ``/proc/PID/stat``, fields 3 (state) and 22 (starttime).
    """
    try:
        fields = (proc / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[_START_TIME_FIELD])
    except (OSError, ValueError, IndexError):
        return None


class ProcessHandle:
    """Holds one process by a descriptor of the kernel, which never means a later process with the same id.

    Where the kernel has no such descriptors (before Linux 5.3), and in a /proc that is not the kernel's, the start time
    tells the process from later ones.

    Args:
        pid: Process id.
        start_ticks: Its start time in clock ticks since boot.
        proc: Path of /proc.
    """

    def __init__(self, pid: int, start_ticks: int, proc: Path = PROC_ROOT) -> None:
        self._pid, self._start_ticks, self._proc = pid, start_ticks, proc
        self._fd: int | None = None
        if proc != PROC_ROOT:
            return
        with suppress(OSError, AttributeError):
            self._fd = os.pidfd_open(pid)
        if read_start_ticks(pid, proc) != start_ticks:  # the descriptor may be of a later process
            self.close()

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs; a zombie does not.

        Source: ``poll(2)`` of a descriptor from ``pidfd_open(2)``, or ``/proc/PID/stat``.
        """
        if self._fd is None:
            return read_start_ticks(self._pid, self._proc) == self._start_ticks
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Close the descriptor; may be called twice."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def is_running(process: ProcessIdentity, proc: Path = PROC_ROOT) -> bool | None:
    """Return whether a process still runs; None if its namespace cannot be seen from here.

    A process of another namespace is found by its start time and by its pid in that namespace.
    """
    here = read_own_namespace(proc)
    if process.namespace in (0, here):
        start_ticks = read_start_ticks(process.pid, proc)
        return start_ticks is not None and start_ticks == process.start_ticks
    for pid in list_pids(proc):
        if read_start_ticks(pid, proc) == process.start_ticks and _read_namespace_pids(proc / str(pid))[-1:] == (
            process.pid,
        ):
            return True
    return False if here == _INITIAL_NAMESPACE else None


def list_pids(proc: Path = PROC_ROOT) -> list[int]:
    """Return the ids of the processes that this user can see, in ascending order."""
    try:
        return sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal() and entry.name.isascii())
    except OSError:
        return []


def _read_namespace_pids(folder: Path) -> tuple[int, ...]:
    """Return the ids of a process or thread from this namespace inwards; empty if the kernel does not list them.

    Source: ``/proc/PID/status``, line ``NSpid``.

    Args:
        folder: ``/proc/PID`` or ``/proc/PID/task/TID``.
    """
    with suppress(OSError, ValueError):
        match = _NSPID_PATTERN.search((folder / "status").read_text("utf-8", "replace"))
        return tuple(int(word) for word in match[1].split()) if match else ()
    return ()


def translate_threads(pid: int, tids: Sequence[int], proc: Path = PROC_ROOT) -> tuple[int, ...]:
    """Translate thread ids that a process reports to thread ids of this host's /proc; omit those that it does not have.

    A QEMU in a container reports ids of its own PID namespace, which belong to other threads on the host.

    Args:
        pid: Process id on this host.
        tids: Thread ids as the process itself reports them; an id may occur several times.
        proc: Path of /proc.
    """
    threads = dict(_list_threads(proc / str(pid)))
    return tuple(threads[tid] for tid in tids if tid in threads)


def owns_threads(pid: int, tids: Sequence[int], proc: Path = PROC_ROOT) -> bool:
    """Return whether a process has all of the threads with these ids, in its own PID namespace."""
    return len(translate_threads(pid, tids, proc)) == len(tids)


def read_link(link: Path) -> str:
    """Return the target of a symbolic link; empty if it cannot be read."""
    try:
        return str(link.readlink())
    except OSError:
        return ""


def _list_threads(folder: Path) -> Iterator[tuple[int, int]]:
    """Yield (id in the process's namespace, id on this host) of every thread."""
    with suppress(OSError):
        for entry in (folder / "task").iterdir():
            with suppress(ValueError):
                here = int(entry.name)
                yield (_read_namespace_pids(entry) or (here,))[-1], here


def parse_qemu_options(words: Sequence[str]) -> tuple[tuple[str, Mapping[str, str]], ...]:
    """Parse a QEMU command line into (option, its keys), for ``-netdev tap,id=n0`` as well as for JSON.

    A value without a key is stored under ``""``.

    Args:
        words: The arguments behind the program's name.
    """
    options: list[tuple[str, Mapping[str, str]]] = []
    at = 0
    while at < len(words):
        option = words[at]
        at += 1
        if not option.startswith("-"):
            continue
        value = ""
        if at < len(words) and not words[at].startswith("-"):
            value = words[at]
            at += 1
        options.append((option.lstrip("-"), _parse_option_keys(value)))
    return tuple(options)


def _parse_option_keys(value: str) -> Mapping[str, str]:
    if value.startswith("{"):
        try:
            plain = msgspec.json.decode(value.encode(), type=dict[str, object])
        except msgspec.DecodeError:
            return {"": value}
        return {str(k): ("on" if v else "off") if isinstance(v, bool) else str(v) for k, v in plain.items()}
    keys: dict[str, str] = {}
    for at, part in enumerate(_split_commas(value)):
        key, equals, rest = part.partition("=")
        if equals:
            keys[key] = rest
        elif at == 0:
            keys[""] = key
        else:  # `server,nowait`, the spelling before QEMU 6
            keys[key] = "on"
            if key.startswith("no"):
                keys[key.removeprefix("no")] = "off"
    return keys


def _split_commas(value: str) -> list[str]:
    """Split at commas; a doubled comma stands for one comma in the value."""
    return [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]
