"""A store in a folder: `<host_id>/<episode_id>.tar.zst`, each with a receipt beside it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path

from phasewatch import atomic
from phasewatch.atomic import is_temporary, make_folder
from phasewatch.bundle import limits
from phasewatch.errors import BundleError, BusyError, IdConflictError, StoreError, StoreReplacedError
from phasewatch.store.quota import FreeFiles
from phasewatch.types import EPISODE_ID_PATTERN, HOST_ID_PATTERN, EpisodeId, HostId

__all__ = [
    "BUNDLE_SUFFIX",
    "FILE_SYSTEM_FOLDERS",
    "INVALID_RECEIPTS",
    "MALFORMED_RECEIPT",
    "MAX_RECEIPT_BYTES",
    "MAX_STATUS_BYTES",
    "RECEIPT_SUFFIX",
    "REFUSED_FOLDER",
    "SENT_FOLDER",
    "STATUS_SUFFIX",
    "UNREADABLE_RECEIPT",
    "DiskStore",
    "StoreItem",
    "check_ids",
    "list_bundle_names",
    "parse_receipt",
    "render_receipt",
]


@contextmanager
def _hold_path(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a path on this machine; it ends with the process at the latest.

    The lock is an abstract socket address (Linux), so it survives an unmounted disk; elsewhere there is no lock.

    Raises:
        BusyError: If another process or another block of this process holds the path.
    """
    if sys.platform != "linux":
        yield
        return
    with ExitStack() as stack:
        for each in sorted({path.absolute(), path.resolve()}):  # a link may be redirected
            holder = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            try:
                holder.bind(_socket_name(each))
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
                raise BusyError(f"{path}: another process is receiving here; wait for it, or end it") from None
        yield


def _socket_name(path: Path) -> bytes:
    """Return the socket address of a path; it includes the root, because containers can share a network."""
    root = Path("/").stat()
    return b"\0phasewatch/" + sha256(f"{root.st_dev}:{root.st_ino}:".encode() + os.fsencode(path)).hexdigest().encode()


BUNDLE_SUFFIX = ".tar.zst"
RECEIPT_SUFFIX = ".sha256"
STATUS_SUFFIX = ".status.json"
MALFORMED_RECEIPT = "malformed"
UNREADABLE_RECEIPT = "unreadable"
INVALID_RECEIPTS = frozenset({None, MALFORMED_RECEIPT, UNREADABLE_RECEIPT})  # without a digest
SENT_FOLDER, REFUSED_FOLDER = "sent", "refused"  # folders of an outbox for shipped bundles
FILE_SYSTEM_FOLDERS = frozenset({"lost+found", "System Volume Information", "$RECYCLE.BIN"})  # not folders of hosts
_INCOMING_FOLDER = ".incoming"  # folder of a receiver's unfinished bundles, which a restart removes

_RECEIPT_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\n/]+)\n?")
MAX_RECEIPT_BYTES = 1024
MAX_STATUS_BYTES = 64 << 10  # of the receiver's verdict on a bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreItem:
    """A file or object that lies where a bundle should be.

    Attributes:
        path: Path in the store, with forward slashes.
        host_id, episode_id: From the path; None if they are malformed.
        bytes: Its size; 0 if there is only a receipt.
        mtime_ns: Time of the last write, Unix ns.
        receipt: SHA-256 in its receipt; None without one, ``malformed`` if it has none, ``unreadable`` if the receipt
            could not be read, which says nothing about the bundle.
        is_missing: There is a receipt, but no bundle.
    """

    path: str
    host_id: HostId | None
    episode_id: EpisodeId | None
    bytes: int
    mtime_ns: int
    receipt: str | None
    is_missing: bool = False


class DiskStore:
    """A store in a folder of this machine."""

    def __init__(self, path: Path | str, *, durable: bool = True) -> None:
        """Remember the folder, without accessing it.

        Args:
            path: The store's folder.
            durable: Wait for the medium at each `put`; the simulator does not, because its episodes can be repeated.
        """
        self.path = Path(path)
        self._durable = durable
        self._synced_folders: set[Path] = set()  # folders of hosts whose names are on the disk
        self._lock_identity: tuple[int, int] | None = None  # device and inode of the lock that a receiver holds

    def put(self, host_id: str, episode_id: str, data: bytes) -> Path:
        """Store a bundle, then its receipt.

        Storing the same bytes again completes what a crash interrupted.

        Raises:
            StoreError: If the ids are malformed.
            IdConflictError: If the store holds other bytes under them.
        """
        incoming = self._begin_bundle(host_id, episode_id, folder=None)
        try:
            incoming.write(data)
            incoming.publish(sha256(data).hexdigest())
        finally:
            incoming.drop()
        return incoming.target

    def remove(self, host_id: str, episode_id: str) -> None:
        """Remove a bundle: its receipt and verdict first, so that a crash leaves no receipt without a bundle.

        Raises:
            StoreError: If the ids are malformed.
        """
        target = self._build_path(host_id, episode_id)
        atomic.remove(target.with_name(f"{episode_id}{STATUS_SUFFIX}"))
        atomic.remove(target.with_name(target.name + RECEIPT_SUFFIX))
        atomic.remove(target)

    def receive(self, host_id: str, episode_id: str) -> _LocalIncoming:
        """Begin to write a bundle in the receiver's folder; see `BundleStore`.

        Raises:
            StoreError: If the ids are malformed.
            StoreReplacedError: If the store is not in its place.
        """
        self.check_location()
        return self._begin_bundle(host_id, episode_id, folder=self.path / _INCOMING_FOLDER)

    def _begin_bundle(self, host_id: str, episode_id: str, *, folder: Path | None) -> _LocalIncoming:
        target = self._build_path(host_id, episode_id)
        if not target.parent.is_dir():
            make_folder(target.parent)
        elif self._durable and target.parent not in self._synced_folders:
            atomic.sync_folder(self.path)  # its creator may have died before its name was on the disk
        self._synced_folders.add(target.parent)
        return _LocalIncoming(target, durable=self._durable, folder=folder)

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Lock the store for one receiver, and remove the unfinished bundles of an earlier one.

        Raises:
            BusyError: If another receiver holds the lock.
        """
        with _hold_path(self.path), atomic.lock(self.path / _INCOMING_FOLDER):
            atomic.sweep_temporaries(self.path / _INCOMING_FOLDER)
            self._lock_identity = self._find_lock()
            try:
                yield
            finally:
                self._lock_identity = None

    def check_location(self) -> None:
        """Check that the store is still the one that `receiving` holds; see `BundleStore`.

        The lock file is open while it is held, so no other file has its inode.

        Raises:
            StoreReplacedError: If it is gone, or another folder is in its place.
        """
        if self._lock_identity is not None and self._find_lock() != self._lock_identity:
            raise StoreReplacedError(
                f"{self.path}: not the folder that this receiver opened; mount its disk again, or restart the receiver"
            )

    def _find_lock(self) -> tuple[int, int] | None:
        try:
            status = atomic.lock_path(self.path / _INCOMING_FOLDER).stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def remove_leftovers(self, *, older_than_s: float) -> int:
        """Remove unfinished files of that age in all folders, and return their number."""
        removed = 0
        for folder in (self.path, self.path / _INCOMING_FOLDER, *self._list_host_folders()):
            with suppress(OSError):  # continue with the other folders
                removed += atomic.sweep_temporaries(folder, older_than_s=older_than_s)
        return removed

    def find(self, host_id: str, episode_id: str) -> StoreItem | None:
        """Return the bundle or receipt with an id; None if there is neither."""
        target = self.path / host_id / f"{episode_id}{BUNDLE_SUFFIX}"
        item = self.describe_item(target)
        return item if item.receipt is not None or target.exists() else None

    def write_status(self, host_id: str, episode_id: str, text: bytes) -> None:
        """Write the receiver's verdict on a bundle beside it."""
        self.check_location()
        target = self._build_path(host_id, episode_id).with_name(f"{episode_id}{STATUS_SUFFIX}")
        _write_in_folder(target, text, durable=self._durable, folder=self.path / _INCOMING_FOLDER)

    def has_status(self, host_id: str, episode_id: str) -> bool:
        """Whether the receiver's verdict on a bundle is stored."""
        return (self.path / host_id / f"{episode_id}{STATUS_SUFFIX}").is_file()

    def read_status(self, host_id: str, episode_id: str) -> bytes | None:
        """Read the receiver's verdict on a bundle; None if there is no readable one."""
        try:
            with (self.path / host_id / f"{episode_id}{STATUS_SUFFIX}").open("rb") as file:
                return file.read(MAX_STATUS_BYTES)
        except OSError:
            return None

    def free_bytes(self) -> int:
        """Return the space on the store's disk that is free to this user, in bytes."""
        return shutil.disk_usage(self.path).free

    def free_files(self) -> FreeFiles | None:
        """Return how many more files the store's disk can hold; None if its file system has no limit."""
        status = os.statvfs(self.path)
        return FreeFiles(free=status.f_favail, total=status.f_files) if status.f_files else None

    def list_arrivals(self, host_id: str) -> list[tuple[float, int]]:
        """Return arrival time (Unix seconds) and size (bytes) of each bundle of a host."""
        arrivals = []
        with suppress(FileNotFoundError), os.scandir(self.path / host_id) as entries:
            for entry in entries:
                if entry.name.endswith(BUNDLE_SUFFIX):
                    status = entry.stat(follow_symlinks=False)
                    arrivals.append((status.st_mtime, status.st_size))
        return arrivals

    def _build_path(self, host_id: str, episode_id: str) -> Path:
        check_ids(host_id, episode_id, store=str(self.path))
        return self.path / host_id / f"{episode_id}{BUNDLE_SUFFIX}"

    def walk(self) -> Iterator[StoreItem]:
        """Yield everything that lies where a bundle should be, by folder, then by file name.

        This includes files with wrong names, so that the caller can count them, receipts whose bundle is gone, and
        unreadable folders (one item, which fails when it is read). It excludes other receipts, hidden files, unfinished
        files (see `list_temporaries`) and folders of the file system.

        Raises:
            StoreError: If there is no such folder.
        """
        for entry in self._list_entries():
            try:
                names = _list_names(entry.path) if entry.is_dir() else None
            except OSError:  # such as another user's folder, or a link to itself
                yield _describe_item(entry.name, Path(entry.path), host=entry.name, has_receipt=False)
                continue
            if names is None:
                if entry.name.endswith(BUNDLE_SUFFIX):  # a bundle outside any host's folder
                    yield _describe_item(
                        entry.name, Path(entry.path), host=None, has_receipt=Path(entry.path + RECEIPT_SUFFIX).exists()
                    )
                continue
            for name in list_bundle_names(names):
                path = Path(entry.path) / name
                yield _describe_item(
                    f"{entry.name}/{name}", path, host=entry.name, has_receipt=name + RECEIPT_SUFFIX in names
                )

    def describe_item(self, path: Path) -> StoreItem:
        """Return the item of ``<store>/<folder>/<name>`` as `walk` does, without listing the store."""
        has_receipt = path.with_name(path.name + RECEIPT_SUFFIX).exists()
        return _describe_item(f"{path.parent.name}/{path.name}", path, host=path.parent.name, has_receipt=has_receipt)

    def list_temporaries(self) -> tuple[str, ...]:
        """Return the unfinished files in the store's folders.

        Raises:
            StoreError: If there is no such folder.
        """
        names: list[str] = []
        for folder in (*self._list_host_folders(), self.path / _INCOMING_FOLDER):
            with suppress(OSError):  # `walk` yields unreadable folders
                names += [f"{folder.name}/{name}" for name in sorted(_list_names(folder)) if is_temporary(name)]
        return tuple(names)

    def _list_host_folders(self) -> list[Path]:
        """Return the folders of hosts, readable or not."""
        folders = []
        for entry in self._list_entries():
            with suppress(OSError):
                if entry.is_dir():
                    folders.append(Path(entry.path))
        return folders

    def read(self, item: StoreItem) -> bytes:
        """Read one bundle, at most as many bytes as a bundle may have.

        Raises:
            BundleError: If it is gone, not a regular file, too large or unreadable.
        """

        def refuse(code: str, words: str) -> BundleError:
            return BundleError(code=code, words=words, file=item.path)

        path = self.path / item.path
        try:
            if path.is_dir():
                os.scandir(path).close()
            with atomic.open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size > limits.MAX_COMPRESSED_BYTES:
                    words = f"{size:,} bytes; at most {limits.MAX_COMPRESSED_BYTES:,} are allowed"
                    raise refuse("compressed-size", words)
                return file.read(limits.MAX_COMPRESSED_BYTES + 1)
        except FileNotFoundError:
            raise refuse("bundle-missing", "the bundle is gone" if item.is_missing else "it does not exist") from None
        except OSError as exc:
            raise refuse("bundle-unreadable", exc.strerror or str(exc)) from None

    def _list_entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.path) as entries:
                shown = (e for e in entries if not e.name.startswith(".") and e.name not in FILE_SYSTEM_FOLDERS)
                return sorted(shown, key=lambda e: e.name)
        except NotADirectoryError:
            remedy = "name the folder that holds the hosts' folders"
            raise StoreError(f"{self.path}: not a store: it is a file; {remedy}") from None
        except FileNotFoundError:
            remedy = "make one with `phasewatch simulate --out` or `phasewatch record`, or check the path"
            raise StoreError(f"{self.path}: there is no such folder; {remedy}") from None
        except OSError as exc:
            raise StoreError(f"{self.path}: {exc.strerror}; the store must be readable") from exc


class _LocalIncoming:
    """A bundle that is being written to a folder; see `phasewatch.store.base.IncomingBundle`."""

    def __init__(self, target: Path, *, durable: bool, folder: Path | None) -> None:
        self.target = target
        self._durable, self._folder = durable, folder
        self._file = atomic.AtomicFile(target, folder=folder)

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._file.file.write(data)

    def content(self) -> bytes:
        """Return all bytes written so far."""
        return self._file.content()

    def publish(self, digest: str) -> bool:
        """Store the bundle, then its receipt; return whether the bundle is new."""
        try:
            self._file.publish(durable=self._durable, new=True)
            is_new = True
        except FileExistsError:
            if _file_sha256(self.target) != digest:
                raise IdConflictError(
                    f"{self.target}: the store holds other bytes under this id; bundles are never replaced"
                ) from None
            is_new = False
            if self._durable:
                atomic.sync_file(self.target)  # its writer may have died before it was on the disk
        receipt = self.target.with_name(self.target.name + RECEIPT_SUFFIX)
        line = render_receipt(digest, self.target.name)
        if is_new or _read_receipt(self.target) != digest:
            _write_in_folder(receipt, line, durable=self._durable, folder=self._folder)
        elif self._durable:
            atomic.sync_file(receipt)
        return is_new

    def drop(self) -> None:
        """Remove what was not published."""
        self._file.drop()


def _write_in_folder(path: Path, data: bytes, *, durable: bool, folder: Path | None) -> None:
    with atomic.open_atomic(path, durable=durable, folder=folder) as file:
        file.write(data)


def _file_sha256(path: Path) -> str:
    with atomic.open_regular(path) as file:
        return file_digest(file, "sha256").hexdigest()


def _list_names(folder: Path | str) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}


def check_ids(host_id: str, episode_id: str, *, store: str) -> None:
    """Raise if an id is malformed; it could otherwise lead to another path.

    Raises:
        StoreError: If it is.
    """
    if not HOST_ID_PATTERN.fullmatch(host_id) or not EPISODE_ID_PATTERN.fullmatch(episode_id):
        raise StoreError(f"{store}: {host_id!r}/{episode_id!r} is not a valid host_id/episode_id")


def list_bundle_names(names: Set[str]) -> list[str]:
    """Return the sorted bundle names in a host's folder, without receipts, verdicts and hidden files."""
    shown = {name for name in names if not name.startswith(".")}
    bundles = {name for name in shown if not name.endswith(RECEIPT_SUFFIX) and not _is_status(name)}
    alone = {name.removesuffix(RECEIPT_SUFFIX) for name in shown if name.endswith(BUNDLE_SUFFIX + RECEIPT_SUFFIX)}
    return sorted(bundles | alone)


def _is_status(name: str) -> bool:
    return name.endswith(STATUS_SUFFIX) and EPISODE_ID_PATTERN.fullmatch(name.removesuffix(STATUS_SUFFIX)) is not None


def render_receipt(digest: str, name: str) -> bytes:
    """Return a receipt in the format of `sha256sum`, so that ``sha256sum -c`` can check it."""
    return f"{digest}  {name}\n".encode()


def _describe_item(relative: str, path: Path, *, host: str | None, has_receipt: bool) -> StoreItem:
    """Return the item of a path; one without access has size 0 and fails when it is read."""
    stem = path.name.removesuffix(BUNDLE_SUFFIX)
    is_named = path.name.endswith(BUNDLE_SUFFIX) and EPISODE_ID_PATTERN.fullmatch(stem) is not None
    try:
        status, is_missing = path.stat(), False
    except OSError:
        status, is_missing = None, has_receipt
    return StoreItem(
        path=relative,
        host_id=HostId(host) if host is not None and HOST_ID_PATTERN.fullmatch(host) else None,
        episode_id=EpisodeId(stem) if is_named else None,
        bytes=status.st_size if status else 0,
        mtime_ns=status.st_mtime_ns if status else 0,
        receipt=_read_receipt(path) if has_receipt else None,
        is_missing=is_missing,
    )


def _read_receipt(path: Path) -> str:
    """Read the digest in a receipt; see `StoreItem.receipt`."""
    try:
        with atomic.open_regular(path.with_name(path.name + RECEIPT_SUFFIX)) as file:
            return parse_receipt(file.read(MAX_RECEIPT_BYTES), path.name)
    except OSError:
        return UNREADABLE_RECEIPT


def parse_receipt(text: bytes, name: str) -> str:
    """Return the digest in a receipt; ``malformed`` if it has none, or names another file."""
    line = _RECEIPT_LINE.fullmatch(text.decode("ascii", "replace"))
    return line[1] if line and line[2] == name else MALFORMED_RECEIPT
