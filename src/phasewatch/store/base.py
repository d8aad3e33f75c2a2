"""What every store can do, whatever it lies on, and the one place that turns a folder or a URI into a store."""

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
    """A bundle on its way in: seen by nobody before `publish`, gone after `drop`."""

    def write(self, data: bytes) -> None:
        """Take the next bytes."""

    def content(self) -> bytes:
        """Give all bytes written so far."""

    def publish(self, digest: str) -> bool:
        """Put the bundle and then its receipt into the store, both durable when this returns.

        Args:
            digest: The sha256 of what was written, in hex.

        Returns:
            Whether the bundle is new; False if the same bytes stood there already.

        Raises:
            TakenError: If other bytes stand under the id.
        """

    def drop(self) -> None:
        """Forget it; after `publish` there is nothing left to forget."""


class BundleStore(Protocol):
    """A place of bundles: written once, each with its receipt, walked in one order."""

    def put(self, host_id: str, episode_id: str, data: bytes) -> object:
        """Store a bundle, then its receipt; the same bytes may come again."""

    def walk(self) -> Iterator[StoreItem]:
        """Give everything that lies where a bundle should be, by folder, then by file name."""

    def read(self, item: StoreItem) -> bytes:
        """Read one bundle, never more than a bundle may hold."""

    def find(self, host_id: str, episode_id: str) -> StoreItem | None:
        """Give what stands under an id; None if neither bundle nor receipt does."""

    def receive(self, host_id: str, episode_id: str) -> IncomingBundle:
        """Begin a bundle; only inside `receiving`."""

    def receiving(self) -> AbstractContextManager[None]:
        """Hold the store for a receiver, alone; what an earlier one left half done is removed."""

    def remove_leftovers(self, *, older_than_s: float) -> int:
        """Remove what killed writers left that long ago, and say how much."""

    def write_status(self, host_id: str, episode_id: str, text: bytes) -> None:
        """Write what admission said of a bundle beside it."""

    def has_status(self, host_id: str, episode_id: str) -> bool:
        """Whether admission's word on a bundle stands beside it."""

    def read_status(self, host_id: str, episode_id: str) -> bytes | None:
        """Read admission's word on a bundle; None if there is none, or it cannot be read."""

    def free_bytes(self) -> int | None:
        """Give the room that is left; None where nobody can say."""

    def free_files(self) -> FreeFiles | None:
        """Return how many more files fit; None where nobody can tell."""

    def check_location(self) -> None:
        """Check that the store is still the one that `receiving` holds.

        Raises:
            LostStoreError: If it is gone, or another one stands in its place.
        """

    def list_arrivals(self, host_id: str) -> list[tuple[float, int]]:
        """Give when (Unix seconds) each bundle of a host came, and its size in bytes."""


def parse_store_location(text: str) -> StoreLocation:
    """Read where a store is: a URI stays text, for a path would fold its slashes."""
    return text if "://" in text else Path(text)


def open_store(place: StoreLocation) -> BundleStore:
    """Open a store by its folder, ``file://`` or ``s3://bucket/prefix``; nothing is touched yet.

    Raises:
        StoreError: If the URI is of another kind.
    """
    scheme, separator, rest = str(place).partition("://")
    if not separator:
        return DiskStore(place)
    if scheme == "file":
        return DiskStore(Path(rest))
    if scheme == "s3":
        from phasewatch.store.s3 import ObjectStore

        return ObjectStore(str(place))
    raise StoreError(
        f"{place}: no store can be of kind {scheme}://; name a folder, file:///folder or s3://bucket/prefix"
    )


def has_bundle(place: StoreLocation) -> bool:
    """Whether anything in a place is named as a bundle is; stops at the first.

    Raises:
        StoreError: If there is no such folder, or the bucket cannot be asked.
    """
    return any(item.path.endswith(BUNDLE_SUFFIX) for item in open_store(place).walk())


def check_store(place: StoreLocation) -> None:
    """Raise if a place is no store; a folder of other files is none, and nothing may be written for it.

    Raises:
        StoreError: If it is absent or holds not one bundle.
    """
    if has_bundle(place):
        return
    other = next((item.path for item in open_store(place).walk()), None)
    if other is None:
        raise StoreError(f"{place}: the store is empty; record into it with `phasewatch record --out {place}`")
    raise StoreError(
        f"{place}: no store: it holds files such as {other}, and not one <host_id>/<episode_id>{BUNDLE_SUFFIX}; name the folder "
        "of the hosts' folders"
    )


def find_bundle(place: StoreLocation) -> tuple[BundleStore, StoreItem] | None:
    """Find one bundle by its file or URI, ``<store>/<host_id>/<episode_id>.tar.zst``, and the store that it lies in.

    Returns:
        None if no such file or object is there; a store is none.

    Raises:
        StoreError: If the URI is of another kind, or the bucket cannot be asked.
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
