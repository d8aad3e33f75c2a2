"""The interface of stores, and how a folder or a URI is opened as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from phasewatch.errors import StoreError
from phasewatch.http_client import is_loopback
from phasewatch.store.local import BUNDLE_SUFFIX, DiskStore, StoreItem
from phasewatch.store.quota import FreeFiles

__all__ = [
    "BundleStore",
    "IncomingBundle",
    "StoreItem",
    "StoreLocation",
    "check_store",
    "find_bundle",
    "has_bundle",
    "is_loopback",
    "open_store",
    "parse_store_location",
]

StoreLocation = Path | str  # a folder, or a URI


class IncomingBundle(Protocol):
    """A bundle that is being written: invisible before `publish`, removed by `drop`."""

    def write(self, data: bytes) -> None:
        """Append bytes."""

    def content(self) -> bytes:
        """Return all bytes written so far."""

    def publish(self, digest: str) -> bool:
        """Store the bundle and then its receipt, both durably.

        Args:
            digest: SHA-256 of the written bytes, in hex.

        Returns:
            Whether the bundle is new; False if the store holds the same bytes already.

        Raises:
            IdConflictError: If the store holds other bytes under the id.
        """

    def drop(self) -> None:
        """Remove what was not published."""


class BundleStore(Protocol):
    """A store of bundles: each is written once, with a receipt, and they are listed in a fixed order."""

    def put(self, host_id: str, episode_id: str, data: bytes) -> object:
        """Store a bundle, then its receipt; storing the same bytes again is allowed."""

    def walk(self) -> Iterator[StoreItem]:
        """Yield everything that lies where a bundle should be, by folder, then by file name."""

    def read(self, item: StoreItem) -> bytes:
        """Read one bundle, at most as many bytes as a bundle may have."""

    def find(self, host_id: str, episode_id: str) -> StoreItem | None:
        """Return the bundle or receipt with an id; None if there is neither."""

    def receive(self, host_id: str, episode_id: str) -> IncomingBundle:
        """Begin to write a bundle; only inside `receiving`."""

    def receiving(self) -> AbstractContextManager[None]:
        """Lock the store for one receiver, and remove the unfinished bundles of an earlier one."""

    def remove_leftovers(self, *, older_than_s: float) -> int:
        """Remove unfinished files of that age, and return their number."""

    def write_status(self, host_id: str, episode_id: str, text: bytes) -> None:
        """Write the receiver's verdict on a bundle beside it."""

    def has_status(self, host_id: str, episode_id: str) -> bool:
        """Whether the receiver's verdict on a bundle is stored."""

    def read_status(self, host_id: str, episode_id: str) -> bytes | None:
        """Read the receiver's verdict on a bundle; None if there is no readable one."""

    def free_bytes(self) -> int | None:
        """Return the free space in bytes; None if it is unknown."""

    def free_files(self) -> FreeFiles | None:
        """Return how many more files fit; None if there is no known limit."""

    def check_location(self) -> None:
        """Check that the store is still the one that `receiving` holds.

        Raises:
            StoreReplacedError: If it is gone, or another one is in its place.
        """

    def list_arrivals(self, host_id: str) -> list[tuple[float, int]]:
        """Return arrival time (Unix seconds) and size (bytes) of each bundle of a host."""


def parse_store_location(text: str) -> StoreLocation:
    """Parse the location of a store; a URI stays text, because a path would merge its slashes."""
    return text if "://" in text else Path(text)


def open_store(place: StoreLocation) -> BundleStore:
    """Return the store at a folder, ``file://`` or ``s3://bucket/prefix`` URI, without accessing it.

    Raises:
        StoreError: If the URI has another scheme.
    """
    scheme, separator, rest = str(place).partition("://")
    if not separator:
        return DiskStore(place)
    if scheme == "file":
        return DiskStore(Path(rest))
    if scheme == "s3":
        from phasewatch.store.s3 import ObjectStore

        return ObjectStore(str(place))
    raise StoreError(f"{place}: {scheme}:// is not supported; name a folder, file:///folder or s3://bucket/prefix")


def has_bundle(place: StoreLocation) -> bool:
    """Whether a store holds a file that is named as a bundle.

    Raises:
        StoreError: If there is no such folder, or the bucket cannot be reached.
    """
    return any(item.path.endswith(BUNDLE_SUFFIX) for item in open_store(place).walk())


def check_store(place: StoreLocation) -> None:
    """Raise if a location is not a store with bundles.

    Raises:
        StoreError: If it is absent or holds no bundle.
    """
    if has_bundle(place):
        return
    store = open_store(place)
    other = next((item.path for item in store.walk()), None)
    if isinstance(store, DiskStore):
        from phasewatch.artifacts import RUN_FILES  # loads numpy, and only an error needs it

        if any((store.path / name).is_file() for name in RUN_FILES):
            raise StoreError(f"{place}: not a store: it is a run and holds no bundles; name the store of its bundles")
        names = sorted(path.name for path in store.path.iterdir() if not path.name.startswith("."))
        other = other or next(iter(names), None)
    if other is None:
        raise StoreError(f"{place}: the store is empty; record into it with `phasewatch record --out {place}`")
    raise StoreError(
        f"{place}: not a store: it holds files such as {other}, but no <host_id>/<episode_id>{BUNDLE_SUFFIX}; "
        "name the folder that holds the hosts' folders"
    )


def find_bundle(place: StoreLocation) -> tuple[BundleStore, StoreItem] | None:
    """Return one bundle by its file or URI, ``<store>/<host_id>/<episode_id>.tar.zst``, and its store.

    Returns:
        None if there is no such file or object.

    Raises:
        StoreError: If the URI has another scheme, or the bucket cannot be reached.
    """
    scheme, separator, rest = str(place).partition("://")
    if not separator or scheme == "file":
        path = Path(rest if separator else place).absolute()
        folder = DiskStore(path.parent.parent)
        return (folder, folder.describe_item(path)) if path.is_file() else None
    where, *names = str(place).rsplit("/", 2)
    if len(names) != 2 or not names[1].endswith(BUNDLE_SUFFIX) or "://" not in where:
        return None
    store = open_store(where)
    item = store.find(names[0], names[1].removesuffix(BUNDLE_SUFFIX))
    return None if item is None or item.is_missing else (store, item)
