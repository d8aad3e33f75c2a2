"""The one module under every write: aside, fsynced, then renamed, so that a file is there whole or not at all."""

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
from io import BufferedIOBase, BufferedReader, RawIOBase
from pathlib import Path
from typing import BinaryIO, cast

from phasewatch.errors import BusyError, MachineError

TEMPORARY_PATTERN = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_LOCK_NAME = ".lock"
_PUBLISH_LOCK = ".publish.lock"
# What exFAT, SMB, FUSE and others answer where a file can have one name alone.
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL})
# What SMB and FUSE answer where folders are written at once, or never, and nobody can wait for it.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})


class DiskOperations:
    """The few system calls through which every write goes; a test hands in one that fails where it likes."""

    def open(self, path: Path) -> int:
        """Create a new file for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        """Write some of the data, give how much."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        """Wait until the medium has it."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """End a file; some file systems tell only now that they could not keep it."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Put a file in place of another, in one step."""
        source.rename(target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; fails if the name is taken."""
        target.hardlink_to(source)

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        path.unlink()

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def mkdir(self, path: Path) -> None:
        """Make one folder; one that is there already is as good."""
        path.mkdir(exist_ok=True)


_operations = DiskOperations()


@contextmanager
def use_disk_operations(disk: DiskOperations) -> Iterator[None]:
    """Send every write through another disk, for tests of what a crash or a full disk leaves behind."""
    global _operations
    before, _operations = _operations, disk
    try:
        yield
    finally:
        _operations = before


@contextmanager
def _name_file_in_errors(path: Path) -> Iterator[None]:
    """Name the file in an error that does not: the kernel's answer to a write or an fsync has no file name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


class _SyncedFile(RawIOBase):
    """A new file whose writes go through the disk in use; its errors name the place that it is meant for."""

    def __init__(self, path: Path, target: Path) -> None:
        self._target = target
        self._fd = _operations.open(path)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: object) -> int:
        self._check_open()
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        written = 0
        with _name_file_in_errors(self._target):
            while written < len(view):
                written += _operations.write(self._fd, view[written:])
        return written

    def sync(self) -> None:
        with _name_file_in_errors(self._target):
            _operations.fsync(self._fd)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check_open()
        return os.lseek(self._fd, offset, whence)

    def tell(self) -> int:
        self._check_open()
        return os.lseek(self._fd, 0, os.SEEK_CUR)

    def _check_open(self) -> None:
        """Refuse to touch a closed file: its descriptor's number may be another file's by now.

        A library that was interrupted writes its last words when it is collected, long after we gave up the file.
        """
        if self.closed:
            raise ValueError("the file is closed")

    def close(self) -> None:
        if not self.closed:
            super().close()
            with _name_file_in_errors(self._target):
                _operations.close(self._fd)


class AtomicFile:
    """A file that is written beside its place and takes it when it is whole; `open_atomic` is the same as a block."""

    def __init__(self, path: Path, *, folder: Path | None = None) -> None:
        """Open the file.

        Args:
            path: Where it shall stand; that folder must exist.
            folder: Where it lies until then, on the same disk; beside its place if left out.
        """
        self.path = path
        self._temporary = (folder or path.parent) / f".{path.name}.{secrets.token_hex(6)}.tmp"
        self._raw = _SyncedFile(self._temporary, path)
        self.file = cast(BinaryIO, _FileBuffer(self._raw))

    def content(self) -> bytes:
        """Give all that was written so far."""
        self.file.flush()
        return self._temporary.read_bytes()

    def publish(self, *, durable: bool = True, new: bool = False) -> None:
        """Put the file in its place. If that fails, `drop` it.

        Raises:
            FileExistsError: With ``new``, if something stands there; it is untouched.
        """
        self.file.flush()
        if durable:
            self._raw.sync()
        self._raw.close()
        if new:
            _publish_if_absent(self._temporary, self.path)
        else:
            _operations.rename(self._temporary, self.path)
        if durable:
            sync_folder(self.path.parent)

    def drop(self) -> None:
        """Let it vanish, whatever state it is in; what cannot be removed now is left to `sweep_temporaries`."""
        with suppress(OSError):
            self._raw.close()
        with suppress(OSError):
            _operations.unlink(self._temporary)


def _publish_if_absent(source: Path, target: Path) -> None:
    """Move a whole file to its place if nothing stands there.

    A link refuses a name that is taken, in one step. Where the file system has no hard links, writers take turns under
    a lock in the target's folder and look first.

    Raises:
        FileExistsError: If something stands there; it is untouched.
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
    """Give a binary file that takes ``path``'s place when the block ends well, and vanishes when it does not.

    Args:
        path: Where the file shall stand; its folder must exist.
        durable: Wait for the medium; without, a power cut may lose the file (never leave half of one to a reader).
        new: Publish only if nothing stands there yet.
        folder: Where the file lies until then; beside its place if left out.

    Raises:
        FileExistsError: With ``new``, if something does; what stands there is untouched.
    """
    aside = AtomicFile(path, folder=folder)
    try:
        yield aside.file
        aside.publish(durable=durable, new=new)
    except BaseException:
        aside.drop()
        raise


class _FileBuffer(BufferedIOBase):
    """A buffer that owns no file: closing it publishes nothing, so a library that closes what it wrote does no harm."""

    def __init__(self, raw: _SyncedFile) -> None:
        self._raw, self._held, self._size = raw, [], 0  # type: tuple[_SyncedFile, list[bytes], int]

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        piece = bytes(data)  # type: ignore[call-overload]
        self._held.append(piece)
        self._size += len(piece)
        if self._size >= 1 << 20:
            self.flush()
        return len(piece)

    def flush(self) -> None:
        if self._held:
            held, self._held, self._size = b"".join(self._held), [], 0
            self._raw.write(held)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.flush()
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell() + self._size

    def close(self) -> None:
        self.flush()


def write_atomic(path: Path, data: bytes, *, durable: bool = True, new: bool = False) -> None:
    """Write a file whole: beside it, fsync, rename, fsync of the folder. See `open_atomic`."""
    with open_atomic(path, durable=durable, new=new) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Wait until the medium has the folder's names."""
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
    """Wait until the medium has a file that another writer published, and its name."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _name_file_in_errors(path):
            _operations.fsync(fd)
    finally:
        os.close(fd)
    sync_folder(path.parent)


def move(source: Path, target: Path) -> None:
    """Give a file another place on the same disk, in one step; the target's folder must exist."""
    _operations.rename(source, target)
    sync_folder(target.parent)
    sync_folder(source.parent)


def publish_folder(source: Path, target: Path) -> None:
    """Move a finished folder to its place on the same disk, so that a power cut leaves all of it there or nothing.

    Every file and every name in it reaches the medium before the folder gets its name.
    """
    for path in sorted(source.rglob("*"), reverse=True):
        if path.is_file() and not path.is_symlink():
            sync_file(path)
    sync_folder(source)
    move(source, target)


def remove(path: Path) -> None:
    """Remove a file, durably; one that is not there is as good as removed."""
    with suppress(FileNotFoundError):
        _operations.unlink(path)
        sync_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder and all below it, its files first; a kill leaves some of them. A link is removed, not followed."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            remove_folder(entry)
        else:
            _operations.unlink(entry)
    _operations.rmdir(folder)
    sync_folder(folder.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, each durable."""
    missing = [each for each in (folder, *folder.parents) if not each.is_dir()]
    for each in reversed(missing):
        _operations.mkdir(each)
        sync_folder(each.parent)


def is_temporary(name: str) -> bool:
    """Whether a file name is one of our unfinished writes."""
    return TEMPORARY_PATTERN.fullmatch(name) is not None


def sweep_temporaries(folder: Path, *, older_than_s: float = 0.0) -> int:
    """Remove what killed writers left in one folder, and say how many.

    Args:
        folder: Where to look, not below it.
        older_than_s: Only what was last written that long ago. With 0 hold the folder's lock, or a living writer loses
            its file.
    """
    latest_s = time.time() - older_than_s
    stray = [entry for entry in sorted(folder.iterdir()) if is_temporary(entry.name)]
    swept = 0
    for entry in stray:
        with suppress(FileNotFoundError):
            if not older_than_s or entry.lstat().st_mtime < latest_s:
                _operations.unlink(entry)
                swept += 1
    return swept


def lock_path(folder: Path) -> Path:
    """Return the file that `lock` locks."""
    return folder / _LOCK_NAME


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder alone; the lock dies with the process, however it dies.

    Raises:
        BusyError: If another process (or another block of this one) holds it, unless told to wait.
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
            words = "this file system keeps no locks, so two writers could not be told apart"
            raise MachineError(f"{path.parent}: {words}; use a folder on a local disk") from None
        yield
    finally:
        os.close(fd)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file to read, without waiting for a pipe's other end or reading a device.

    Raises:
        OSError: If it cannot be opened, or is no regular file.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def read_regular(path: Path, limit: int) -> bytes:
    """Read a regular file, one byte more than `limit` at most; see `open_regular`.

    Raises:
        OSError: If it cannot be opened, or is no regular file.
    """
    with open_regular(path) as file:
        return file.read(limit + 1)
