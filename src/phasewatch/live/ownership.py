"""Record which watcher added what to a VM, so that a later watcher can remove what a killed one left behind.

The names of QEMU objects, files and folders contain the identity of their watcher. A watcher that is killed together
with its cleanup process leaves objects in the VM, a private folder in memory and a changed balloon polling interval.
The next watcher finds them by name, and the original interval in the record inside the folder. It acts on a record only
if the record agrees with what is found.
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
from phasewatch.telemetry.qmp import BALLOON_POLL_INTERVAL_S

__all__ = [
    "WATCH_RECORD_FILE",
    "WATCH_RECORD_FORMAT",
    "WatchFolder",
    "WatchRecord",
    "build_name_prefix",
    "find_original_interval",
    "find_other_watchers",
    "find_watch_folders",
    "is_abandoned",
    "make_private_folder",
    "remove_abandoned_folders",
    "remove_watch_record",
    "write_watch_record",
]

MEMORY_DIRS = (Path("/dev/shm"), Path("/run"))
WATCH_RECORD_FORMAT = "phasewatch-watch-1"
WATCH_RECORD_FILE = "watch.json"
_MAX_RECORD_BYTES = 16 << 10
_MAX_POLL_INTERVAL_S = 7 * 24 * 3600
# phasewatch-<pid>-<start>-<namespace>-<rest>; before version 2 names had the process id alone.
_OWNED_NAME_PATTERN = re.compile(
    r"phasewatch-(?P<pid>[1-9]\d{0,9})(?:-(?P<start>\d{1,20})-(?P<space>\d{1,20}))?-(?P<rest>[A-Za-z0-9_.-]+)"
)


class WatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a watcher writes down before it changes a VM.

    Attributes:
        format: `WATCH_RECORD_FORMAT`.
        vm_pid, vm_start_ticks: The QEMU process.
        vm_name: Name of the VM, for people.
        balloon: Path of the balloon device in QEMU's object tree; empty if there is none.
        interval_s: The balloon's original polling interval.
    """

    format: str
    vm_pid: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    vm_start_ticks: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    vm_name: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    balloon: Annotated[str, msgspec.Meta(max_length=512)] = ""
    interval_s: Annotated[int, msgspec.Meta(ge=0, le=_MAX_POLL_INTERVAL_S)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchFolder:
    """The private folder of a watcher.

    Attributes:
        path: The folder.
        owner: The watcher's process.
        is_alive: Whether the watcher still runs; None if it cannot be seen from here, so that it must be left alone.
        record: What the watcher wrote down; None if there is no record that can be trusted.
    """

    path: Path
    owner: ProcessIdentity
    is_alive: bool | None
    record: WatchRecord | None

    def concerns(self, vm_pid: int, vm_start_ticks: int) -> bool:
        """Return whether the folder belongs to a watch of this QEMU process."""
        record = self.record
        return record is not None and (record.vm_pid, record.vm_start_ticks) == (vm_pid, vm_start_ticks)


def build_name_prefix(owner: ProcessIdentity | None = None) -> str:
    """Return the prefix of all names that a watcher creates.

    Args:
        owner: The watcher's process; None for this process.
    """
    owner = owner or read_own_identity()
    return f"phasewatch-{owner.pid}-{owner.start_ticks}-{owner.namespace}"


def _parse_owner(name: str, proc: Path = PROC_ROOT) -> ProcessIdentity | None:
    """Return the watcher that a name belongs to; None if it is not a watcher's name.

    A name from before version 2 has no start time: its process counts as the owner if it is a phasewatch.
    """
    match = _OWNED_NAME_PATTERN.fullmatch(name)
    if match is None:
        return None
    pid = int(match["pid"])
    if match["start"] is not None:
        return ProcessIdentity(pid=pid, start_ticks=int(match["start"]), namespace=int(match["space"]))
    start_ticks = (read_start_ticks(pid, proc) if _is_phasewatch(pid, proc) else None) or 0
    return ProcessIdentity(pid=pid, start_ticks=start_ticks, namespace=read_own_namespace(proc))


def is_abandoned(name: str, proc: Path = PROC_ROOT) -> bool:
    """Return whether a name belongs to a watcher that is certainly dead."""
    owner = _parse_owner(name, proc)
    return owner is not None and is_running(owner, proc) is False


def make_private_folder(vm_uid: int) -> Path | None:
    """Create a folder in memory that only one user may read; None if no memory file system is writable.

    Args:
        vm_uid: User of the QEMU process; gets the folder if this process runs as root.
    """
    for parent in MEMORY_DIRS:
        if os.access(parent, os.W_OK):
            folder = Path(tempfile.mkdtemp(prefix=f"{build_name_prefix()}-", dir=parent))
            with suppress(OSError):
                if os.geteuid() == 0 and vm_uid != 0:
                    os.chown(folder, vm_uid, -1)
            return folder
    return None


def write_watch_record(folder: str, record: WatchRecord) -> None:
    """Write the record of a watch into its private folder atomically; do nothing without a folder."""
    if not folder:
        return
    target = Path(folder, WATCH_RECORD_FILE)
    temporary = target.with_suffix(".tmp")
    with suppress(OSError):  # memory is full: the cleanup process knows all this as well
        temporary.write_bytes(msgspec.json.encode(record))
        temporary.replace(target)


def remove_watch_record(folder: str) -> None:
    """Remove the record of a watch whose changes are undone."""
    if folder:
        with suppress(OSError):
            Path(folder, WATCH_RECORD_FILE).unlink(missing_ok=True)


def find_watch_folders(proc: Path = PROC_ROOT) -> tuple[WatchFolder, ...]:
    """Return the private folders of all watchers that this user can see, in order of name."""
    folders = []
    for parent in MEMORY_DIRS:
        with suppress(OSError):
            for entry in sorted(parent.glob("phasewatch-*")):
                owner = _find_folder_owner(entry, proc)
                if owner is not None and entry.is_dir() and not entry.is_symlink():
                    folders.append(
                        WatchFolder(
                            path=entry,
                            owner=owner,
                            is_alive=is_running(owner, proc),
                            record=_read_watch_record(entry, proc),
                        )
                    )
    return tuple(folders)


def find_other_watchers(vm_pid: int, vm_start_ticks: int, proc: Path = PROC_ROOT) -> tuple[WatchFolder, ...]:
    """Return the folders of other watchers of a VM that run, or may run."""
    own = read_own_identity()
    return tuple(
        folder
        for folder in find_watch_folders(proc)
        if folder.concerns(vm_pid, vm_start_ticks) and folder.is_alive is not False and folder.owner != own
    )


def find_original_interval(
    now_s: int, folders: Sequence[WatchFolder], *, is_marked: bool, vm_pid: int, vm_start_ticks: int
) -> int:
    """Return the balloon polling interval (s) that a VM had before it was watched.

    Args:
        now_s: The present interval.
        folders: Folders of all watchers.
        is_marked: Whether the VM contains an object of a dead watcher.
        vm_pid, vm_start_ticks: The QEMU process.
    """
    if now_s != BALLOON_POLL_INTERVAL_S:  # it was set after the dead watcher set it, or was never changed
        return now_s
    for folder in folders:
        if folder.record is not None and folder.record.balloon and folder.concerns(vm_pid, vm_start_ticks):
            return folder.record.interval_s
    return 0 if is_marked else now_s  # 0 is QEMU's default


def remove_abandoned_folders(vm_pid: int, vm_start_ticks: int, proc: Path = PROC_ROOT) -> tuple[Path, ...]:
    """Remove the folders of dead watchers of this VM and of VMs that are gone; return their paths.

    The folder of a dead watcher of another running VM stays: QEMU may still write into it, and nothing could truncate a
    file without a name.
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
    prefix = f"{folder.path}/"
    return any(target.startswith(prefix) for pid in list_pids(proc) for target in _list_open_files(proc / str(pid)))


def _list_open_files(folder: Path) -> Iterator[str]:
    with suppress(OSError):
        for entry in (folder / "fd").iterdir():
            with suppress(OSError):
                yield str(entry.readlink())


def _find_folder_owner(path: Path, proc: Path) -> ProcessIdentity | None:
    """Return the watcher of a folder, by its name or, from before version 2, by the name of a file in it."""
    match = _OWNED_NAME_PATTERN.fullmatch(path.name)
    if match is not None and match["start"] is not None:
        return _parse_owner(path.name, proc)
    with suppress(OSError):
        for entry in path.iterdir():
            owner = _parse_owner(entry.name, proc)
            if owner is not None:
                return owner
    return None


def _read_watch_record(folder: Path, proc: Path) -> WatchRecord | None:
    """Read the record in a folder; None unless it is well formed and owned by root, this user or the VM's user."""
    try:
        fd = os.open(folder / WATCH_RECORD_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        file_stat, folder_stat = os.fstat(fd), folder.lstat()
        if not stat.S_ISREG(file_stat.st_mode) or file_stat.st_size > _MAX_RECORD_BYTES or folder_stat.st_mode & 0o022:
            return None  # not a regular file, or other users may write into the folder
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
    return record if {file_stat.st_uid, folder_stat.st_uid} <= trusted else None


def _is_phasewatch(pid: int, proc: Path) -> bool:
    with suppress(OSError):
        return b"phasewatch" in (proc / str(pid) / "cmdline").read_bytes()
    return False
