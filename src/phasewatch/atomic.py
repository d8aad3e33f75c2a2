"""The one module under every write: aside, fsynced, then renamed, so that a file is there whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedIOBase, RawIOBase
from pathlib import Path
from typing import BinaryIO, cast

from phasewatch.errors import BusyError

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_LOCK_NAME = ".lock"


class Disk:
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

    def rename(self, source: Path, target: Path) -> None:
        """Put a file in place of another, in one step."""
        source.rename(target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; fails if the name is taken."""
        target.hardlink_to(source)

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        path.unlink()


_disk = Disk()


@contextmanager
def on_disk(disk: Disk) -> Iterator[None]:
    """Send every write through another disk, for tests of what a crash or a full disk leaves behind."""
    global _disk
    before, _disk = _disk, disk
    try:
        yield
    finally:
        _disk = before


class _File(RawIOBase):
    """A new file whose writes go through the disk in use."""

    def __init__(self, path: Path) -> None:
        self._fd = _disk.open(path)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        written = 0
        while written < len(view):
            written += _disk.write(self._fd, view[written:])
        return written

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._fd, offset, whence)

    def tell(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_CUR)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._fd)


@contextmanager
def writer(path: Path, *, durable: bool = True, new: bool = False) -> Iterator[BinaryIO]:
    """Give a binary file that takes ``path``'s place when the block ends well, and vanishes when it does not.

    Args:
        path: Where the file shall stand; its folder must exist.
        durable: Wait for the medium; without, a power cut may lose the file (never leave half of one to a reader).
        new: Publish only if nothing stands there yet.

    Raises:
        FileExistsError: With ``new``, if something does; what stands there is untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    file = _File(temporary)
    try:
        buffered = _Buffered(file)
        yield cast(BinaryIO, buffered)
        buffered.flush()
        if durable:
            _disk.fsync(file.fileno())
        file.close()
        if new:
            _disk.link(temporary, path)
            _disk.unlink(temporary)
        else:
            _disk.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            _disk.unlink(temporary)
        raise
    if durable:
        sync_folder(path.parent)


class _Buffered(BufferedIOBase):
    """A buffer that owns no file: closing it publishes nothing, so a library that closes what it wrote does no harm."""

    def __init__(self, raw: _File) -> None:
        self._raw, self._held, self._size = raw, [], 0  # type: tuple[_File, list[bytes], int]

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


def write_whole(path: Path, data: bytes, *, durable: bool = True, new: bool = False) -> None:
    """Write a file whole: beside it, fsync, rename, fsync of the folder. See `writer`."""
    with writer(path, durable=durable, new=new) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Wait until the medium has the folder's names."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _disk.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, each durable."""
    missing = [folder, *folder.parents]
    missing = [each for each in missing if not each.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):
        sync_folder(each.parent)


def is_temporary(name: str) -> bool:
    """Whether a file name is one of our unfinished writes."""
    return TEMPORARY.fullmatch(name) is not None


def sweep_temporaries(folder: Path) -> int:
    """Remove what killed writers left in one folder, and say how many; call it only while holding the folder's lock."""
    stray = [entry for entry in sorted(folder.iterdir()) if is_temporary(entry.name)]
    for entry in stray:
        with suppress(FileNotFoundError):
            _disk.unlink(entry)
    return len(stray)


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder alone; the lock dies with the process, however it dies.

    Raises:
        BusyError: If another process (or another block of this one) holds it, unless told to wait.
    """
    make_folder(folder)
    fd = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(f"{folder}: another process is writing here; wait for it, or end it") from None
        yield
    finally:
        os.close(fd)
