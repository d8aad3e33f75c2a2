"""A store in a folder: `<host_id>/<episode_id>.tar.zst`, beside each its receipt; written once, walked in one order."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from phasewatch.atomic import is_temporary, make_folder, write_whole
from phasewatch.episode import limits
from phasewatch.errors import BundleError, StoreError
from phasewatch.vocab import EPISODE_ID, HOST_ID, EpisodeId, HostId

SUFFIX = ".tar.zst"
RECEIPT = ".sha256"
MALFORMED = "malformed"

_RECEIPT_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^\n/]+)\n?")
_RECEIPT_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreItem:
    """One thing that lies where a bundle should be.

    Attributes:
        path: Relative to the store, with forward slashes.
        host_id, episode_id: What the place says; None where folder or file name is not of the format.
        bytes: Its size; 0 if a receipt stands alone.
        mtime_ns: When it was last written, Unix ns.
        receipt: The digest that its receipt vouches for, None without one, ``malformed`` if it cannot be read.
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

    def put(self, host_id: str, episode_id: str, data: bytes) -> Path:
        """Store a bundle, then its receipt.

        Putting the same bytes again completes what a crash left half done.

        Raises:
            StoreError: If the ids are malformed, or other bytes already stand under them.
        """
        if not HOST_ID.fullmatch(host_id) or not EPISODE_ID.fullmatch(episode_id):
            raise StoreError(f"{self.path}: {host_id!r}/{episode_id!r} is no host_id/episode_id of a bundle")
        folder = self.path / host_id
        if not folder.is_dir():
            make_folder(folder)
        target = folder / f"{episode_id}{SUFFIX}"
        try:
            write_whole(target, data, durable=self._durable, new=True)
        except FileExistsError:
            if target.stat().st_size != len(data) or target.read_bytes() != data:
                raise StoreError(
                    f"{target}: other bytes already stand under this id; bundles are written once"
                ) from None
        receipt = target.with_name(target.name + RECEIPT)
        line = render_receipt(sha256(data).hexdigest(), target.name)
        if not receipt.exists() or receipt.read_bytes() != line:
            write_whole(receipt, line, durable=self._durable)
        return target

    def walk(self) -> Iterator[StoreItem]:
        """Give everything that lies where a bundle should be, by folder, then by file name.

        Files of a wrong name are given too, so that the caller can count them; so are receipts whose bundle is gone.
        Receipts themselves, hidden files and unfinished writes (see `temporaries`) are not.

        Raises:
            StoreError: If there is no such folder.
        """
        for entry in self._entries():
            if not entry.is_dir():
                if entry.name.endswith(SUFFIX):  # a bundle outside any host's folder
                    yield _item(
                        entry.name, Path(entry.path), host=None, has_receipt=Path(entry.path + RECEIPT).exists()
                    )
                continue
            names = _names(entry.path)
            bundles = {name for name in names if not name.startswith(".") and not name.endswith(RECEIPT)}
            alone = {
                bundle for name in names
                if name.endswith(SUFFIX + RECEIPT) and not name.startswith(".")
                and (bundle := name.removesuffix(RECEIPT)) not in names
            }  # fmt: skip
            for name in sorted(bundles | alone):
                path = Path(entry.path) / name
                yield _item(f"{entry.name}/{name}", path, host=entry.name, has_receipt=name + RECEIPT in names)

    def item(self, path: Path) -> StoreItem:
        """Give one thing ``<store>/<folder>/<name>`` as `walk` would, without looking at the rest of the store."""
        has_receipt = path.with_name(path.name + RECEIPT).exists()
        return _item(f"{path.parent.name}/{path.name}", path, host=path.parent.name, has_receipt=has_receipt)

    def temporaries(self) -> tuple[str, ...]:
        """Give the unfinished writes that lie in the store's folders, so that they can be reported.

        Raises:
            StoreError: If there is no such folder.
        """
        folders = [entry.name for entry in self._entries() if entry.is_dir()]
        return tuple(
            f"{folder}/{name}"
            for folder in folders
            for name in sorted(_names(self.path / folder))
            if is_temporary(name)
        )

    def read(self, item: StoreItem) -> bytes:
        """Read one bundle, never more than a bundle may hold.

        Raises:
            BundleError: If it is gone, no plain file, too large or cannot be read.
        """

        def refuse(code: str, words: str) -> BundleError:
            return BundleError(code=code, words=words, file=item.path)

        path = self.path / item.path
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise refuse("bundle-unreadable", "it is not a plain file")
            if found.st_size > limits.COMPRESSED_BYTES:
                words = f"{found.st_size:,} bytes; at most {limits.COMPRESSED_BYTES:,} are allowed"
                raise refuse("compressed-size", words)
            with path.open("rb") as file:
                return file.read(limits.COMPRESSED_BYTES + 1)
        except FileNotFoundError:
            raise refuse("bundle-missing", "the bundle is gone" if item.is_missing else "it is not there") from None
        except OSError as exc:
            raise refuse("bundle-unreadable", exc.strerror or str(exc)) from None

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.path) as entries:
                return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        except (FileNotFoundError, NotADirectoryError):
            words = "there is no such folder; make one with `phasewatch simulate --out` or `phasewatch record`"
            raise StoreError(f"{self.path}: {words}, or check the path") from None
        except OSError as exc:
            raise StoreError(f"{self.path}: {exc.strerror}; the store must be readable") from exc


def _names(folder: Path | str) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}


def render_receipt(digest: str, name: str) -> bytes:
    """Spell a receipt as `sha256sum` does, so that ``sha256sum -c`` checks it."""
    return f"{digest}  {name}\n".encode()


def _item(relative: str, path: Path, *, host: str | None, has_receipt: bool) -> StoreItem:
    """Describe one thing in the store; what cannot even be looked at is described as empty and fails when read."""
    stem = path.name.removesuffix(SUFFIX)
    is_named = path.name.endswith(SUFFIX) and EPISODE_ID.fullmatch(stem) is not None
    try:
        found, is_missing = path.stat(), False
    except OSError:
        found, is_missing = None, has_receipt
    return StoreItem(
        path=relative,
        host_id=HostId(host) if host is not None and HOST_ID.fullmatch(host) else None,
        episode_id=EpisodeId(stem) if is_named else None,
        bytes=found.st_size if found else 0,
        mtime_ns=found.st_mtime_ns if found else 0,
        receipt=_read_receipt(path) if has_receipt else None,
        is_missing=is_missing,
    )


def _read_receipt(path: Path) -> str:
    """Read the digest that a receipt vouches for."""
    try:
        with path.with_name(path.name + RECEIPT).open("rb") as file:
            line = _RECEIPT_LINE.fullmatch(file.read(_RECEIPT_BYTES).decode("ascii"))
    except (OSError, UnicodeDecodeError):
        return MALFORMED
    return line[1] if line and line[2] == path.name else MALFORMED
