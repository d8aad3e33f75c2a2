"""Atomic writes: a file is written under a temporary name, fsynced and renamed, so that it is complete or absent."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import BinaryIO, cast

from phasewatch.errors import BusyError, MachineError

__all__ = [
    "DISK_FULL_ERRNOS",
    "AtomicFile",
    "DiskOperations",
    "is_temporary",
    "lock",
    "lock_path",
    "make_folder",
    "move",
    "open_atomic",
    "open_regular",
    "publish_folder",
    "read_regular",
    "remove",
    "remove_folder",
    "sweep_temporaries",
    "sync_file",
    "sync_folder",
    "use_disk_operations",
    "write_atomic",
]

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})

_TEMPORARY_PATTERN = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_BUFFER_BYTES = 1 << 20
_LOCK_NAME = ".lock"
_PUBLISH_LOCK = ".publish.lock"
# Errors of exFAT, SMB, FUSE and others, which have no hard links.
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL})
# Errors of SMB and FUSE, which cannot fsync a folder.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})


class DiskOperations:
    """The system calls that every write goes through.

    Tests replace them by ones that fail at a chosen call (`use_disk_operations`), which shows what a crash, a power
    cut or a full disk leaves behind.
    """

    def open(self, path: Path) -> int:
        """Create a new file for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        """Write some of the data; return the number of bytes written."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        """Wait until the data is on the medium."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close a file; some file systems report a failed write only here."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Replace a file by another in one step."""
        source.rename(target)

    def link(self, source: Path, target: Path) -> None:
        """Create a hard link; fail if the name exists."""
        target.hardlink_to(source)

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        path.unlink()

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def mkdir(self, path: Path) -> None:
        """Create one folder unless it exists."""
        path.mkdir(exist_ok=True)


_operations = DiskOperations()


@contextmanager
def use_disk_operations(operations: DiskOperations) -> Iterator[None]:
    """Use other disk operations for every write of this process; for tests of crashes and full disks."""
    global _operations
    previous, _operations = _operations, operations
    try:
        yield
    finally:
        _operations = previous


@contextmanager
def _name_file_in_errors(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError without one; errors of write and fsync have none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


class _UnpublishedFile(BufferedIOBase):
    """A new file, written through the disk operations in use; errors name the path that it is meant for.

    `close` only flushes: a library that closes the file publishes nothing. `release` closes the descriptor. A write
    that is flushed after that raises, because the descriptor's number may belong to another file by then (an
    interrupted library flushes when it is garbage-collected).
    """

    def __init__(self, path: Path, target: Path) -> None:
        self._target = target
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._fd: int | None = None  # set before `open`, which may raise: the destructor flushes
        self._fd = _operations.open(path)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        chunk = bytes(data)  # type: ignore[call-overload]
        self._pending.append(chunk)
        self._pending_bytes += len(chunk)
        if self._pending_bytes >= _BUFFER_BYTES:
            self.flush()
        return len(chunk)

    def flush(self) -> None:
        if not self._pending:
            return
        data, self._pending, self._pending_bytes = memoryview(b"".join(self._pending)), [], 0
        fd, written = self._open_fd(), 0
        with _name_file_in_errors(self._target):
            while written < len(data):
                written += _operations.write(fd, data[written:])

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.flush()
        return os.lseek(self._open_fd(), offset, whence)

    def tell(self) -> int:
        return os.lseek(self._open_fd(), 0, os.SEEK_CUR) + self._pending_bytes

    def sync(self) -> None:
        self.flush()
        with _name_file_in_errors(self._target):
            _operations.fsync(self._open_fd())

    def close(self) -> None:
        self.flush()

    def release(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with _name_file_in_errors(self._target):
                _operations.close(fd)

    def _open_fd(self) -> int:
        if self._fd is None:
            raise ValueError("the file is closed")
        return self._fd


class AtomicFile:
    """A file that is written under a temporary name and published when complete; see `open_atomic`."""

    def __init__(self, path: Path, *, folder: Path | None = None) -> None:
        """Open the temporary file.

        Args:
            path: Final path; its folder must exist.
            folder: Folder of the temporary file, on the same disk; by default that of `path`.
        """
        self.path = path
        self._temporary = (folder or path.parent) / f".{path.name}.{secrets.token_hex(6)}.tmp"
        self._unpublished = _UnpublishedFile(self._temporary, path)
        self.file = cast(BinaryIO, self._unpublished)

    def content(self) -> bytes:
        """Return all bytes written so far."""
        self._unpublished.flush()
        return self._temporary.read_bytes()

    def publish(self, *, durable: bool = True, new: bool = False) -> None:
        """Move the file to its final path; the caller calls `drop` if that fails.

        Args:
            durable: Wait for the medium.
            new: Do not replace an existing file.

        Raises:
            FileExistsError: With ``new``, if the path exists; it is left unchanged.
        """
        self._unpublished.flush()
        if durable:
            self._unpublished.sync()
        self._unpublished.release()
        if new:
            _publish_if_absent(self._temporary, self.path)
        else:
            _operations.rename(self._temporary, self.path)
        if durable:
            sync_folder(self.path.parent)

    def drop(self) -> None:
        """Remove the temporary file, if there is one; `sweep_temporaries` removes it later if this fails."""
        with suppress(OSError):
            self._unpublished.release()
        with suppress(OSError):
            _operations.unlink(self._temporary)


def _publish_if_absent(source: Path, target: Path) -> None:
    """Move a complete file to a path that does not exist yet.

    A hard link checks and creates the name in one step. On file systems without hard links, writers check first, one at
    a time under a lock in the target's folder.

    Raises:
        FileExistsError: If the path exists; it is left unchanged.
    """
    try:
        _operations.link(source, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        with _hold_lock(target.parent / _PUBLISH_LOCK, wait=True):
            if target.exists() or target.is_symlink():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            _operations.rename(source, target)
        return
    _operations.unlink(source)


@contextmanager
def open_atomic(
    path: Path, *, durable: bool = True, new: bool = False, folder: Path | None = None
) -> Iterator[BinaryIO]:
    """Yield a binary file that is published at ``path`` when the block succeeds and removed when it raises.

    Args:
        path: Final path; its folder must exist.
        durable: Wait for the medium; without, a power cut may lose the file, but readers never see half of it.
        new: Do not replace an existing file.
        folder: Folder of the temporary file, on the same disk; by default that of `path`.

    Raises:
        FileExistsError: With ``new``, if the path exists; it is left unchanged.
    """
    pending = AtomicFile(path, folder=folder)
    try:
        yield pending.file
        pending.publish(durable=durable, new=new)
    except BaseException:
        pending.drop()
        raise


def write_atomic(path: Path, data: bytes, *, durable: bool = True, new: bool = False) -> None:
    """Write a complete file: temporary file, fsync, rename, fsync of the folder; see `open_atomic`."""
    with open_atomic(path, durable=durable, new=new) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Wait until the folder's entries are on the medium."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _name_file_in_errors(folder):
            _operations.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Wait until a file that another writer published, and its name, are on the medium."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _name_file_in_errors(path):
            _operations.fsync(fd)
    finally:
        os.close(fd)
    sync_folder(path.parent)


def move(source: Path, target: Path) -> None:
    """Move a file or folder on the same disk in one step, durably; the target's folder must exist."""
    _operations.rename(source, target)
    sync_folder(target.parent)
    sync_folder(source.parent)


def publish_folder(source: Path, target: Path) -> None:
    """Move a finished folder to its final path on the same disk; a power cut leaves all of it there, or nothing.

    Its files and their names reach the medium before the folder gets its name.
    """
    for path in sorted(source.rglob("*"), reverse=True):
        if path.is_file() and not path.is_symlink():
            sync_file(path)
    sync_folder(source)
    move(source, target)


def remove(path: Path) -> None:
    """Remove a file durably, if it exists."""
    with suppress(FileNotFoundError):
        _operations.unlink(path)
        sync_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder and its content, files first, without following links; a kill leaves some of the content."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            remove_folder(entry)
        else:
            _operations.unlink(entry)
    _operations.rmdir(folder)
    sync_folder(folder.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, each durably, where they do not exist."""
    missing = [each for each in (folder, *folder.parents) if not each.is_dir()]
    for each in reversed(missing):
        _operations.mkdir(each)
        sync_folder(each.parent)


def is_temporary(name: str) -> bool:
    """Whether a file name is that of an unfinished write of this module."""
    return _TEMPORARY_PATTERN.fullmatch(name) is not None


def sweep_temporaries(folder: Path, *, older_than_s: float = 0.0) -> int:
    """Remove the temporary files that killed writers left in a folder.

    Args:
        folder: The folder; those below it are not searched.
        older_than_s: Keep files that were written within that time. With 0 the caller must hold the folder's lock, or
            a running writer loses its file.

    Returns:
        The number of removed files.
    """
    latest_s = time.time() - older_than_s
    entries = [entry for entry in sorted(folder.iterdir()) if is_temporary(entry.name)]
    removed = 0
    for entry in entries:
        with suppress(FileNotFoundError):
            if not older_than_s or entry.lstat().st_mtime < latest_s:
                _operations.unlink(entry)
                removed += 1
    return removed


def lock_path(folder: Path) -> Path:
    """Return the path of the file that `lock` locks."""
    return folder / _LOCK_NAME


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on a folder; it ends with the process at the latest.

    Args:
        folder: Created if it does not exist.
        wait: Wait for the lock.

    Raises:
        BusyError: Without ``wait``, if another process or another block of this process holds the lock.
        MachineError: If the file system has no locks.
    """
    make_folder(folder)
    with _hold_lock(lock_path(folder), wait=wait):
        yield


@contextmanager
def _hold_lock(path: Path, *, wait: bool) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(f"{path.parent}: another process is writing here; wait for it, or end it") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            problem = "this file system has no locks, so two writers would damage each other's files"
            raise MachineError(f"{path.parent}: {problem}; use a folder on a local disk") from None
        yield
    finally:
        os.close(fd)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; pipes and devices are refused without blocking on them.

    Raises:
        OSError: If it cannot be opened, or is not a regular file.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def read_regular(path: Path, limit: int) -> bytes:
    """Read at most ``limit + 1`` bytes of a regular file, so that the caller sees whether it is too large.

    Raises:
        OSError: If it cannot be opened, or is not a regular file.
    """
    with open_regular(path) as file:
        return file.read(limit + 1)
