"""A disk that fails at the n-th call: every open, write, fsync, close, rename, link, unlink, mkdir and rmdir of
`atomic` is one."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from phasewatch import atomic

ANYWHERE = ("kill", "power cut", "ENOSPC", "EIO")
WRITING = (*ANYWHERE, "short write", "torn write")


class Killed(BaseException):
    """The process ended here; nothing that it would have done afterwards happens."""


@dataclass
class _Pending:
    """A change of a folder's names that the medium may not have yet."""

    folder: Path
    undo: Callable[[], None]


@dataclass
class FaultyDisk(atomic.DiskOperations):
    """Counts calls; at call `at` (from 0) does `fault`. Without one it only counts.

    After a kill each further call does nothing but raise, as clean-up code does not run in a dead process. A power cut
    also takes what was not fsynced: written bytes go, and names of files go back to what they were. `spare` is a folder
    on the same disk, for what a power cut may bring back.
    """

    spare: Path
    at: int = -1
    fault: str = ""
    calls: list[str] = field(default_factory=list)
    is_dead: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _unsynced: dict[int, Path] = field(default_factory=dict)  # descriptor → file with bytes that only the cache has
    _lost: set[tuple[int, int]] = field(default_factory=set)  # device and inode of closed files like that
    _pending: list[_Pending] = field(default_factory=list)
    _kept: int = 0

    def _enter(self, call: str) -> bool:
        """Count a call; raise what the fault is, give whether a write is to be cut short."""
        if self.is_dead:
            raise Killed
        number = len(self.calls)
        self.calls.append(call)
        if number != self.at:
            return False
        if self.fault in ("short write", "torn write") or (call == "write" and self.fault in ("ENOSPC", "EIO")):
            return True
        self._strike()
        return False

    def _strike(self) -> None:
        if self.fault in ("ENOSPC", "EIO"):
            raise OSError(getattr(errno, self.fault), "injected")
        self.is_dead = True
        if self.fault == "power cut":
            self._lose()
        raise Killed

    def _lose(self) -> None:
        """Undo what no fsync vouches for."""
        for path in self._unsynced.values():
            with suppress(OSError):
                os.truncate(path, 0)
        for pending in reversed(self._pending):
            with suppress(OSError):
                pending.undo()
        for root, _, names in os.walk(self.spare.parent):
            for name in names:
                path = Path(root) / name
                with suppress(OSError):
                    found = path.lstat()
                    if (found.st_dev, found.st_ino) in self._lost:
                        os.truncate(path, 0)

    def _keep(self, path: Path) -> Path:
        """Return a file another name, so that it can come back."""
        self._kept += 1
        kept = self.spare / f"{self._kept}"
        kept.hardlink_to(path)
        return kept

    def open(self, path: Path) -> int:
        with self._lock:
            self._enter("open")
            fd = super().open(path)
            self._unsynced[fd] = path
            self._pending.append(_Pending(path.parent, lambda: path.unlink()))
            return fd

    def write(self, fd: int, data: bytes | memoryview) -> int:
        with self._lock:
            if not self._enter("write"):
                return super().write(fd, data)
            written = super().write(fd, data[: max(1, len(data) // 2)])
            if self.fault != "short write":
                self._strike()
            return written

    def fsync(self, fd: int) -> None:
        """Build durable, in the model; the real medium is not waited for."""
        with self._lock:
            self._enter("fsync")
            self._unsynced.pop(fd, None)
            found = os.fstat(fd)
            self._lost.discard((found.st_dev, found.st_ino))
            folder = Path(f"/proc/self/fd/{fd}").readlink()
            self._pending = [p for p in self._pending if p.folder.resolve() != folder]

    def close(self, fd: int) -> None:
        with self._lock:
            if fd in self._unsynced:
                del self._unsynced[fd]
                found = os.fstat(fd)
                self._lost.add((found.st_dev, found.st_ino))
            super().close(fd)  # a dead process's files are closed, too
            if not self.is_dead:
                self._enter("close")

    def rename(self, source: Path, target: Path) -> None:
        with self._lock:
            self._enter("rename")
            old = self._keep(target) if target.exists() else None

            def undo() -> None:
                target.rename(source)
                if old is not None:
                    target.hardlink_to(old)

            super().rename(source, target)
            self._pending.append(_Pending(target.parent, undo))

    def link(self, source: Path, target: Path) -> None:
        with self._lock:
            self._enter("link")
            super().link(source, target)
            self._pending.append(_Pending(target.parent, lambda: target.unlink()))

    def unlink(self, path: Path) -> None:
        with self._lock:
            self._enter("unlink")
            kept = self._keep(path) if path.exists() else None
            super().unlink(path)
            if kept is not None:
                self._pending.append(_Pending(path.parent, lambda: path.hardlink_to(kept)))

    def rmdir(self, path: Path) -> None:
        with self._lock:
            self._enter("rmdir")
            super().rmdir(path)
            self._pending.append(_Pending(path.parent, lambda: path.mkdir()))

    def mkdir(self, path: Path) -> None:
        with self._lock:
            self._enter("mkdir")
            super().mkdir(path)
            self._pending.append(_Pending(path.parent, lambda: shutil.rmtree(path)))
