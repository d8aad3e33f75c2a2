"""Who put what into a VM: names that carry their watcher's identity, and a small record of how the VM was before.

A watcher that is killed together with its guard leaves objects in the VM, a private folder in memory and the balloon's
polling interval changed. The next watcher finds them by their names, and what the interval was in the record that lies
in the folder. Nothing that a record says is done unless it fits what is found.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from phasewatch.telemetry.process import (
    PROC_ROOT,
    ProcessIdentity,
    is_running,
    list_pids,
    read_own_identity,
    read_own_namespace,
    read_start_ticks,
)

MEMORY_DIRS = (Path("/dev/shm"), Path("/run"))
WATCH_RECORD_FILE = "watch.json"
WATCH_RECORD_FORMAT = "phasewatch-watch-1"
WATCHER_POLL_INTERVAL_S = 1  # the interval that a watcher sets
_MAX_RECORD_BYTES = 16 << 10
_MAX_POLL_INTERVAL_S = 7 * 24 * 3600
# phasewatch-<pid>-<start>-<namespace>-<which>; before version 2 there was the number alone.
_OWNED_NAME_PATTERN = re.compile(
    r"phasewatch-(?P<pid>[1-9]\d{0,9})(?:-(?P<start>\d{1,20})-(?P<space>\d{1,20}))?-(?P<rest>[A-Za-z0-9_.-]+)"
)


class WatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a watcher writes down before it touches a VM.

    Attributes:
        format: `WATCH_RECORD_FORMAT`.
        vm_pid, vm_start_ticks: Which QEMU process.
        vm_name: Its name, for people.
        balloon: The balloon's path in QEMU's tree; empty where there is none.
        interval_s: The polling interval that the balloon had.
    """

    format: str
    vm_pid: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    vm_start_ticks: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    vm_name: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    balloon: Annotated[str, msgspec.Meta(max_length=512)] = ""
    interval_s: Annotated[int, msgspec.Meta(ge=0, le=_MAX_POLL_INTERVAL_S)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchFolder:
    """A private folder of some watcher.

    Attributes:
        path: The folder.
        owner: Its watcher.
        is_alive: Whether that still runs; None if it cannot be seen from here, so that it must be left alone.
        record: What it wrote down; None where there is nothing that can be believed.
    """

    path: Path
    owner: ProcessIdentity
    is_alive: bool | None
    record: WatchRecord | None

    def concerns(self, vm_pid: int, vm_start_ticks: int) -> bool:
        """Return whether it belongs to the watch of this QEMU process."""
        found = self.record
        return found is not None and (found.vm_pid, found.vm_start_ticks) == (vm_pid, vm_start_ticks)


def build_name_prefix(owner: ProcessIdentity | None = None) -> str:
    """Return what the names of everything that a watcher makes begin with; this process's if none is given."""
    owner = owner or read_own_identity()
    return f"phasewatch-{owner.pid}-{owner.start_ticks}-{owner.namespace}"


def _parse_owner(name: str, proc: Path = PROC_ROOT) -> ProcessIdentity | None:
    """Return whose an object, file or folder is, by its name; None if it is not a watcher's.

    A name of the older kind holds no start time: its process counts as the owner while it is a phasewatch.
    """
    found = _OWNED_NAME_PATTERN.fullmatch(name)
    if found is None:
        return None
    pid = int(found["pid"])
    if found["start"] is not None:
        return ProcessIdentity(pid=pid, start_ticks=int(found["start"]), namespace=int(found["space"]))
    start_ticks = (read_start_ticks(pid, proc) if _is_phasewatch(pid, proc) else None) or 0
    return ProcessIdentity(pid=pid, start_ticks=start_ticks, namespace=read_own_namespace(proc))


def is_abandoned(name: str, proc: Path = PROC_ROOT) -> bool:
    """Return whether a name is a watcher's that is dead for certain."""
    owner = _parse_owner(name, proc)
    return owner is not None and is_running(owner, proc) is False


def make_private_folder(vm_uid: int) -> str:
    """Create a folder in memory that only this user (under root: the VM's user) may read; return an empty path if none can be."""
    for parent in MEMORY_DIRS:
        if os.access(parent, os.W_OK):
            folder = tempfile.mkdtemp(prefix=f"{build_name_prefix()}-", dir=parent)
            with suppress(OSError):
                if os.geteuid() == 0 and vm_uid != 0:
                    os.chown(folder, vm_uid, -1)
            return folder
    return ""


def write_watch_record(folder: str, record: WatchRecord) -> None:
    """Write the record of a watch into its private folder, whole or not at all."""
    if not folder:
        return
    target = Path(folder, WATCH_RECORD_FILE)
    half = target.with_suffix(".tmp")
    with suppress(OSError):  # a full memory: the guard knows all this too
        half.write_bytes(msgspec.json.encode(record))
        half.replace(target)


def remove_watch_record(folder: str) -> None:
    """Remove the record of a watch: its VM is as it was, or about to be."""
    if folder:
        with suppress(OSError):
            Path(folder, WATCH_RECORD_FILE).unlink(missing_ok=True)


def find_watch_folders(proc: Path = PROC_ROOT) -> tuple[WatchFolder, ...]:
    """Return the private folders of all watchers that can be seen, in the order of their names."""
    found = []
    for parent in MEMORY_DIRS:
        with suppress(OSError):
            for entry in sorted(parent.glob("phasewatch-*")):
                owner = _find_folder_owner(entry, proc)
                if owner is not None and entry.is_dir() and not entry.is_symlink():
                    found.append(
                        WatchFolder(
                            path=entry,
                            owner=owner,
                            is_alive=is_running(owner, proc),
                            record=_read_watch_record(entry, proc),
                        )
                    )
    return tuple(found)


def find_other_watchers(vm_pid: int, vm_start_ticks: int, proc: Path = PROC_ROOT) -> tuple[WatchFolder, ...]:
    """Return the folders of other watchers of a VM that are alive, or may be."""
    me = read_own_identity()
    return tuple(
        folder
        for folder in find_watch_folders(proc)
        if folder.concerns(vm_pid, vm_start_ticks) and folder.is_alive is not False and folder.owner != me
    )


def find_original_interval(
    now_s: int, folders: Sequence[WatchFolder], *, is_marked: bool, vm_pid: int, vm_start_ticks: int
) -> int:
    """Return the polling interval that a VM had before anybody watched it.

    Args:
        now_s: What it is.
        folders: Of all watchers.
        is_marked: Whether an object of a dead watcher stands in the VM.
        vm_pid, vm_start_ticks: The QEMU process.
    """
    if now_s != WATCHER_POLL_INTERVAL_S:  # somebody set it after the dead watcher did, or nobody ever did
        return now_s
    for folder in folders:
        if folder.record is not None and folder.record.balloon and folder.concerns(vm_pid, vm_start_ticks):
            return folder.record.interval_s
    return 0 if is_marked else now_s  # 0 is what QEMU starts with


def remove_abandoned_folders(vm_pid: int, vm_start_ticks: int, proc: Path = PROC_ROOT) -> tuple[Path, ...]:
    """Remove the folders of dead watchers of this VM and of VMs that are gone; return them.

    The folder of a dead watcher whose VM still runs stays, unless it is this one: QEMU may be writing into it, and a
    file without a name is bounded by nobody.
    """
    removed = []
    for folder in find_watch_folders(proc):
        if folder.is_alive is False and (folder.concerns(vm_pid, vm_start_ticks) or not _is_in_use(folder, proc)):
            shutil.rmtree(folder.path, ignore_errors=True)
            if not folder.path.exists():
                removed.append(folder.path)
    return tuple(removed)


def _is_in_use(folder: WatchFolder, proc: Path = PROC_ROOT) -> bool:
    """Return whether the VM of a folder still runs, or some process holds a file in it open."""
    if folder.record is not None and folder.owner.namespace == read_own_namespace(proc):
        start_ticks = read_start_ticks(folder.record.vm_pid, proc)
        if start_ticks is not None and start_ticks == folder.record.vm_start_ticks:
            return True
    beginning = f"{folder.path}/"
    return any(target.startswith(beginning) for pid in list_pids(proc) for target in _list_open_files(proc / str(pid)))


def _list_open_files(folder: Path) -> Iterator[str]:
    with suppress(OSError):
        for entry in (folder / "fd").iterdir():
            with suppress(OSError):
                yield str(entry.readlink())


def _find_folder_owner(path: Path, proc: Path) -> ProcessIdentity | None:
    """Return whose a folder is: by its own name, or by that of a file in it, as the older kind needs."""
    found = _OWNED_NAME_PATTERN.fullmatch(path.name)
    if found is not None and found["start"] is not None:
        return _parse_owner(path.name, proc)
    with suppress(OSError):
        for entry in path.iterdir():
            owner = _parse_owner(entry.name, proc)
            if owner is not None:
                return owner
    return None


def _read_watch_record(folder: Path, proc: Path) -> WatchRecord | None:
    """Read a record if it is of root, of this user or of the VM's, and says what can be."""
    try:
        fd = os.open(folder / WATCH_RECORD_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        seen, around = os.fstat(fd), folder.lstat()
        if not stat.S_ISREG(seen.st_mode) or seen.st_size > _MAX_RECORD_BYTES or around.st_mode & 0o022:
            return None  # no plain file, or others may write in the folder
        record = msgspec.json.decode(os.read(fd, _MAX_RECORD_BYTES + 1), type=WatchRecord)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    finally:
        os.close(fd)
    if record.format != WATCH_RECORD_FORMAT or (record.balloon and not record.balloon.startswith("/machine/")):
        return None
    trusted = {0, os.geteuid()}
    with suppress(OSError):
        trusted.add((proc / str(record.vm_pid)).stat().st_uid)
    return record if {seen.st_uid, around.st_uid} <= trusted else None


def _is_phasewatch(pid: int, proc: Path) -> bool:
    with suppress(OSError):
        return b"phasewatch" in (proc / str(pid) / "cmdline").read_bytes()
    return False


__all__ = [
    "WatchFolder",
    "WatchRecord",
    "_is_in_use",
    "_parse_owner",
    "build_name_prefix",
    "find_original_interval",
    "find_other_watchers",
    "find_watch_folders",
    "is_abandoned",
    "make_private_folder",
    "remove_abandoned_folders",
    "remove_watch_record",
    "write_watch_record",
]  # fmt: skip
