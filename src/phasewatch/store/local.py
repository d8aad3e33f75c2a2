"""A store in a folder: `<host_id>/<episode_id>.tar.zst`, beside each its receipt; written once, walked in one order."""

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


@contextmanager
def hold_path(path: Path) -> Iterator[None]:
    """Hold a path alone on this machine; the hold ends with the process, however that ends.

    Held by an abstract socket address (Linux), which lies on no disk; elsewhere nothing is held.

    Raises:
        BusyError: If another process (or another block of this one) holds the path.
    """
    if sys.platform != "linux":
        yield
        return
    with ExitStack() as stack:
        for each in sorted({path.absolute(), path.resolve()}):  # a link may be turned to another disk
            holder = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            try:
                holder.bind(_socket_name(each))
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
                raise BusyError(f"{path}: another process is receiving here; wait for it, or end it") from None
        yield


def _socket_name(path: Path) -> bytes:
    """Name a path: containers that share a network have roots of their own, and the same path there is another place."""
    root = Path("/").stat()
    return b"\0phasewatch/" + sha256(f"{root.st_dev}:{root.st_ino}:".encode() + os.fsencode(path)).hexdigest().encode()


BUNDLE_SUFFIX = ".tar.zst"
RECEIPT_SUFFIX = ".sha256"
STATUS_SUFFIX = ".status.json"
MALFORMED_RECEIPT = "malformed"
UNREADABLE_RECEIPT = "unreadable"
INVALID_RECEIPTS = frozenset({None, MALFORMED_RECEIPT, UNREADABLE_RECEIPT})  # receipts that vouch for nothing
SENT_FOLDER, REFUSED_FOLDER = "sent", "refused"  # where a shipper moves the bundles of an outbox
FILE_SYSTEM_FOLDERS = frozenset({"lost+found", "System Volume Information", "$RECYCLE.BIN"})  # no folder of any host
INCOMING_FOLDER = ".incoming"  # where a receiver's unfinished bundles lie, so that a restart knows whose they were

_RECEIPT_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\n/]+)\n?")
MAX_RECEIPT_BYTES = 1024
MAX_STATUS_BYTES = 64 << 10  # of admission's word on a bundle, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreItem:
    """One thing that lies where a bundle should be.

    Attributes:
        path: Relative to the store, with forward slashes.
        host_id, episode_id: What the place says; None where folder or file name is not of the format.
        bytes: Its size; 0 if a receipt stands alone.
        mtime_ns: When it was last written, Unix ns.
        receipt: The digest that its receipt vouches for, None without one, ``malformed`` if it is none, ``unreadable`` if
            it could not be got at: that says nothing of the bundle.
        is_missing: A receipt stands here, and its bundle is gone.
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
        """Name the store; nothing is touched yet.

        Args:
            path: The store's folder.
            durable: Wait for the medium at each `put`; the simulator does not, what it makes can be made again.
        """
        self.path = Path(path)
        self._durable = durable
        self._synced_folders: set[Path] = set()  # folders of hosts whose names the disk has
        self._lock_identity: tuple[int, int] | None = None  # device and inode of the lock that a receiver holds

    def put(self, host_id: str, episode_id: str, data: bytes) -> Path:
        """Store a bundle, then its receipt.

        Putting the same bytes again completes what a crash left half done.

        Raises:
            StoreError: If the ids are malformed; a TakenError, if other bytes already stand under them.
        """
        incoming = self._begin_bundle(host_id, episode_id, folder=None)
        try:
            incoming.write(data)
            incoming.publish(sha256(data).hexdigest())
        finally:
            incoming.drop()
        return incoming.target

    def receive(self, host_id: str, episode_id: str) -> _LocalIncoming:
        """Begin a bundle in the receiver's own folder; see `Store`.

        Raises:
            StoreError: If the ids are malformed; a LostStoreError, if the store is not in its place.
        """
        self.check_location()
        return self._begin_bundle(host_id, episode_id, folder=self.path / INCOMING_FOLDER)

    def _begin_bundle(self, host_id: str, episode_id: str, *, folder: Path | None) -> _LocalIncoming:
        target = self._build_path(host_id, episode_id)
        if not target.parent.is_dir():
            make_folder(target.parent)
        elif self._durable and target.parent not in self._synced_folders:
            atomic.sync_folder(self.path)  # whoever made it may have died, or failed, before the disk had its name
        self._synced_folders.add(target.parent)
        return _LocalIncoming(target, durable=self._durable, folder=folder)

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Hold the store for one receiver, and remove what an earlier one left half done.

        Raises:
            BusyError: If another receiver holds it.
        """
        with hold_path(self.path), atomic.lock(self.path / INCOMING_FOLDER):
            atomic.sweep_temporaries(self.path / INCOMING_FOLDER)
            self._lock_identity = self._find_lock()
            try:
                yield
            finally:
                self._lock_identity = None

    def check_location(self) -> None:
        """Check that the store is still the one that `receiving` holds; see `Store`.

        The lock is open as long as it is held, so no other file has its inode meanwhile.

        Raises:
            LostStoreError: If it is gone, or another folder stands in its place.
        """
        if self._lock_identity is not None and self._find_lock() != self._lock_identity:
            raise StoreReplacedError(
                f"{self.path}: not the folder that this receiver opened; mount its disk again, or start the receiver anew"
            )

    def _find_lock(self) -> tuple[int, int] | None:
        try:
            found = atomic.lock_path(self.path / INCOMING_FOLDER).stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def remove_leftovers(self, *, older_than_s: float) -> int:
        """Remove unfinished writes of that age, wherever they lie; their writers are dead, or hang for good."""
        swept = 0
        for folder in (self.path, self.path / INCOMING_FOLDER, *self._list_host_folders()):
            with suppress(OSError):  # one folder that cannot be read or written leaves the others to be tidied
                swept += atomic.sweep_temporaries(folder, older_than_s=older_than_s)
        return swept

    def find(self, host_id: str, episode_id: str) -> StoreItem | None:
        """Give what stands under an id; None if neither bundle nor receipt does."""
        target = self.path / host_id / f"{episode_id}{BUNDLE_SUFFIX}"
        item = self.describe_item(target)
        return item if item.receipt is not None or target.exists() else None

    def write_status(self, host_id: str, episode_id: str, text: bytes) -> None:
        """Write what admission said of a bundle beside it."""
        self.check_location()
        target = self._build_path(host_id, episode_id).with_name(f"{episode_id}{STATUS_SUFFIX}")
        _write_in_folder(target, text, durable=self._durable, folder=self.path / INCOMING_FOLDER)

    def has_status(self, host_id: str, episode_id: str) -> bool:
        """Whether admission's word on a bundle stands beside it."""
        return (self.path / host_id / f"{episode_id}{STATUS_SUFFIX}").is_file()

    def read_status(self, host_id: str, episode_id: str) -> bytes | None:
        """Read admission's word on a bundle; None if there is none, or it cannot be read."""
        try:
            with (self.path / host_id / f"{episode_id}{STATUS_SUFFIX}").open("rb") as file:
                return file.read(MAX_STATUS_BYTES)
        except OSError:
            return None

    def free_bytes(self) -> int:
        """Give the room on the store's disk that is free to this user, in bytes."""
        return shutil.disk_usage(self.path).free

    def free_files(self) -> FreeFiles | None:
        """Return how many more files the store's disk can hold; None where its file system sets no bound."""
        found = os.statvfs(self.path)
        return FreeFiles(free=found.f_favail, total=found.f_files) if found.f_files else None

    def list_arrivals(self, host_id: str) -> list[tuple[float, int]]:
        """Give when (Unix seconds) each bundle of a host came, and its size in bytes."""
        found = []
        with suppress(FileNotFoundError), os.scandir(self.path / host_id) as entries:
            for entry in entries:
                if entry.name.endswith(BUNDLE_SUFFIX):
                    seen = entry.stat(follow_symlinks=False)
                    found.append((seen.st_mtime, seen.st_size))
        return found

    def _build_path(self, host_id: str, episode_id: str) -> Path:
        check_ids(host_id, episode_id, store=str(self.path))
        return self.path / host_id / f"{episode_id}{BUNDLE_SUFFIX}"

    def walk(self) -> Iterator[StoreItem]:
        """Give everything that lies where a bundle should be, by folder, then by file name.

        Files of a wrong name are given too, so that the caller can count them; so are receipts whose bundle is gone,
        and a folder that cannot be read: it is one item, which fails when it is read. Receipts themselves, hidden files,
        unfinished writes (see `temporaries`) and what belongs to the file system are not.

        Raises:
            StoreError: If there is no such folder.
        """
        for entry in self._list_entries():
            try:
                names = _list_names(entry.path) if entry.is_dir() else None
            except OSError:  # another user's folder, a link to itself: counted, and the walk goes on
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
        """Give one thing ``<store>/<folder>/<name>`` as `walk` would, without looking at the rest of the store."""
        has_receipt = path.with_name(path.name + RECEIPT_SUFFIX).exists()
        return _describe_item(f"{path.parent.name}/{path.name}", path, host=path.parent.name, has_receipt=has_receipt)

    def list_temporaries(self) -> tuple[str, ...]:
        """Give the unfinished writes that lie in the store's folders, so that they can be reported.

        Raises:
            StoreError: If there is no such folder.
        """
        found: list[str] = []
        for folder in (*self._list_host_folders(), self.path / INCOMING_FOLDER):
            with suppress(OSError):  # what cannot be read is an item of `walk`
                found += [f"{folder.name}/{name}" for name in sorted(_list_names(folder)) if is_temporary(name)]
        return tuple(found)

    def _list_host_folders(self) -> list[Path]:
        """Return the folders that hosts may have, readable or not."""
        found = []
        for entry in self._list_entries():
            with suppress(OSError):
                if entry.is_dir():
                    found.append(Path(entry.path))
        return found

    def read(self, item: StoreItem) -> bytes:
        """Read one bundle, never more than a bundle may hold.

        Raises:
            BundleError: If it is gone, no plain file, too large or cannot be read.
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
            raise refuse("bundle-missing", "the bundle is gone" if item.is_missing else "it is not there") from None
        except OSError as exc:
            raise refuse("bundle-unreadable", exc.strerror or str(exc)) from None

    def _list_entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.path) as entries:
                shown = (e for e in entries if not e.name.startswith(".") and e.name not in FILE_SYSTEM_FOLDERS)
                return sorted(shown, key=lambda e: e.name)
        except (FileNotFoundError, NotADirectoryError):
            words = "there is no such folder; make one with `phasewatch simulate --out` or `phasewatch record`"
            raise StoreError(f"{self.path}: {words}, or check the path") from None
        except OSError as exc:
            raise StoreError(f"{self.path}: {exc.strerror}; the store must be readable") from exc


class _LocalIncoming:
    """A bundle on its way into a folder; see `phasewatch.store.base.IncomingBundle`."""

    def __init__(self, target: Path, *, durable: bool, folder: Path | None) -> None:
        self.target = target
        self._durable, self._folder = durable, folder
        self._file = atomic.AtomicFile(target, folder=folder)

    def write(self, data: bytes) -> None:
        """Take the next bytes."""
        self._file.file.write(data)

    def content(self) -> bytes:
        """Give all bytes written so far."""
        return self._file.content()

    def publish(self, digest: str) -> bool:
        """Put the bundle, then its receipt; give whether it is new."""
        try:
            self._file.publish(durable=self._durable, new=True)
            is_new = True
        except FileExistsError:
            if _file_sha256(self.target) != digest:
                raise IdConflictError(
                    f"{self.target}: other bytes already stand under this id; bundles are written once"
                ) from None
            is_new = False
            if self._durable:
                atomic.sync_file(self.target)  # whoever wrote it may have died before the disk had it
        receipt = self.target.with_name(self.target.name + RECEIPT_SUFFIX)
        line = render_receipt(digest, self.target.name)
        if is_new or _read_receipt(self.target) != digest:
            _write_in_folder(receipt, line, durable=self._durable, folder=self._folder)
        elif self._durable:
            atomic.sync_file(receipt)
        return is_new

    def drop(self) -> None:
        """Forget what was not published."""
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
    """Refuse ids that are not of the format, and so could lead elsewhere.

    Raises:
        StoreError: If one is not.
    """
    if not HOST_ID_PATTERN.fullmatch(host_id) or not EPISODE_ID_PATTERN.fullmatch(episode_id):
        raise StoreError(f"{store}: {host_id!r}/{episode_id!r} is no host_id/episode_id of a bundle")


def list_bundle_names(names: Set[str]) -> list[str]:
    """Give, in order, the names in a host's folder that stand for a bundle: not its receipt, status or hidden files."""
    shown = {name for name in names if not name.startswith(".")}
    bundles = {name for name in shown if not name.endswith(RECEIPT_SUFFIX) and not _is_status(name)}
    alone = {name.removesuffix(RECEIPT_SUFFIX) for name in shown if name.endswith(BUNDLE_SUFFIX + RECEIPT_SUFFIX)}
    return sorted(bundles | alone)


def _is_status(name: str) -> bool:
    return name.endswith(STATUS_SUFFIX) and EPISODE_ID_PATTERN.fullmatch(name.removesuffix(STATUS_SUFFIX)) is not None


def render_receipt(digest: str, name: str) -> bytes:
    """Spell a receipt as `sha256sum` does, so that ``sha256sum -c`` checks it."""
    return f"{digest}  {name}\n".encode()


def _describe_item(relative: str, path: Path, *, host: str | None, has_receipt: bool) -> StoreItem:
    """Describe one thing in the store; what cannot even be looked at is described as empty and fails when read."""
    stem = path.name.removesuffix(BUNDLE_SUFFIX)
    is_named = path.name.endswith(BUNDLE_SUFFIX) and EPISODE_ID_PATTERN.fullmatch(stem) is not None
    try:
        found, is_missing = path.stat(), False
    except OSError:
        found, is_missing = None, has_receipt
    return StoreItem(
        path=relative,
        host_id=HostId(host) if host is not None and HOST_ID_PATTERN.fullmatch(host) else None,
        episode_id=EpisodeId(stem) if is_named else None,
        bytes=found.st_size if found else 0,
        mtime_ns=found.st_mtime_ns if found else 0,
        receipt=_read_receipt(path) if has_receipt else None,
        is_missing=is_missing,
    )


def _read_receipt(path: Path) -> str:
    """Read the digest that a receipt vouches for."""
    try:
        with atomic.open_regular(path.with_name(path.name + RECEIPT_SUFFIX)) as file:
            return parse_receipt(file.read(MAX_RECEIPT_BYTES), path.name)
    except OSError:
        return UNREADABLE_RECEIPT


def parse_receipt(text: bytes, name: str) -> str:
    """Give the digest that a receipt vouches for; ``malformed`` if it is none, or another file's."""
    line = _RECEIPT_LINE.fullmatch(text.decode("ascii", "replace"))
    return line[1] if line and line[2] == name else MALFORMED_RECEIPT
