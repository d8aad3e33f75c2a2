"""Which process is meant: a number alone is given out again, so a start time and a namespace belong to it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

PROC_ROOT = Path("/proc")
_START_TIME_FIELD = 19  # of the fields behind the command name; the whole line's field 22
_NSPID_PATTERN = re.compile(r"^NSpid:\s*(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """One process, told apart from a later one that gets the same number.

    Attributes:
        pid: Its number, as counted in the namespace.
        start_ticks: When it started, in clock ticks since the machine booted.
        namespace: Inode of the PID namespace in which the number counts; 0 where that is not known.
    """

    pid: int
    start_ticks: int
    namespace: int


def read_own_identity(proc: Path = PROC_ROOT) -> ProcessIdentity:
    """Return the identity of this process."""
    pid = os.getpid()
    return ProcessIdentity(pid=pid, start_ticks=read_start_ticks(pid, proc) or 0, namespace=read_own_namespace(proc))


def read_own_namespace(proc: Path = PROC_ROOT) -> int:
    """Return the inode of the PID namespace that this process counts in; 0 where it cannot be read."""
    with suppress(OSError):
        return (proc / "self" / "ns" / "pid").stat().st_ino
    return 0


def read_start_ticks(pid: int, proc: Path = PROC_ROOT) -> int | None:
    """Return when a process started, in clock ticks since boot; None if it is gone or only waits to be reaped."""
    try:
        fields = (proc / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[_START_TIME_FIELD])
    except (OSError, ValueError, IndexError):
        return None


def is_running(process: ProcessIdentity, proc: Path = PROC_ROOT) -> bool | None:
    """Return whether a process still runs; None if it counts in a namespace that cannot be seen from here.

    A process of another namespace is looked for by its start time and by the number that it has in there.
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


_INITIAL_NAMESPACE = 0xEFFFFFFC  # the kernel's fixed inode of the namespace from which every process is seen


def list_pids(proc: Path = PROC_ROOT) -> list[int]:
    """Return the numbers of the processes that can be seen, in rising order; one that is hidden cannot."""
    try:
        return sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal() and entry.name.isascii())
    except OSError:
        return []


def _read_namespace_pids(folder: Path) -> tuple[int, ...]:
    """Return the numbers of a process or thread from this namespace inwards; empty where the kernel does not list them.

    Args:
        folder: ``/proc/PID`` or ``/proc/PID/task/TID``.
    """
    with suppress(OSError, ValueError):
        found = _NSPID_PATTERN.search((folder / "status").read_text("utf-8", "replace"))
        return tuple(int(word) for word in found[1].split()) if found else ()
    return ()


def translate_threads(pid: int, tids: Sequence[int], proc: Path = PROC_ROOT) -> tuple[int, ...] | None:
    """Return the numbers that a process's own thread numbers have here; None if one of them is no thread of it.

    A QEMU in a container reports the numbers of its own namespace, under which /proc of the host knows other threads.

    Args:
        pid: The process, as counted here.
        tids: As the process itself reports them.
    """
    threads = dict(list_threads(proc / str(pid)))
    if not all(tid in threads for tid in tids):
        return None
    return tuple(threads[tid] for tid in tids)


def list_threads(folder: Path) -> Iterator[tuple[int, int]]:
    """Yield (number as the process knows it, number here) of every thread."""
    with suppress(OSError):
        for entry in (folder / "task").iterdir():
            with suppress(ValueError):
                here = int(entry.name)
                yield (_read_namespace_pids(entry) or (here,))[-1], here


def parse_qemu_options(words: Sequence[str]) -> tuple[tuple[str, Mapping[str, str]], ...]:
    """Give a command line as (option, its keys): ``-netdev tap,id=n0`` and JSON alike; what has no key is under ""."""
    found: list[tuple[str, Mapping[str, str]]] = []
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
        found.append((option.lstrip("-"), _parse_option_keys(value)))
    return tuple(found)


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
        else:  # `server,nowait`, as it was written before QEMU 6
            keys[key] = "on"
            if key.startswith("no"):
                keys[key.removeprefix("no")] = "off"
    return keys


def _split_commas(value: str) -> list[str]:
    """Split at commas; a doubled one is a comma of the value."""
    return [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]
