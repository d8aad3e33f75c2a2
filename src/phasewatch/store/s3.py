"""A store in a bucket (`s3://bucket/prefix`): the keys are the paths of a folder, and each is put only if absent."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from phasewatch.bundle import limits
from phasewatch.errors import BundleError, IdConflictError, StoreError
from phasewatch.http_client import is_loopback
from phasewatch.store.local import (
    BUNDLE_SUFFIX,
    MALFORMED_RECEIPT,
    MAX_RECEIPT_BYTES,
    MAX_STATUS_BYTES,
    RECEIPT_SUFFIX,
    STATUS_SUFFIX,
    UNREADABLE_RECEIPT,
    StoreItem,
    check_ids,
    list_bundle_names,
    parse_receipt,
    render_receipt,
)
from phasewatch.types import EPISODE_ID_PATTERN, HOST_ID_PATTERN, EpisodeId, HostId

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from obstore import ObjectMeta
    from obstore.store import ClientConfig, RetryConfig

__all__ = [
    "ObjectStore",
]

_PARALLEL_RECEIPTS = 16  # parallel requests; one at a time, a store of thousands takes minutes
_RETRIES: RetryConfig = {"max_retries": 4}
# obstore cannot ignore the proxies of the environment (ADR 0051). This proxy replaces them, and every host is excluded
# from it: `*` covers names, the networks cover addresses.
_NO_PROXY: ClientConfig = {"proxy_url": "http://127.0.0.1:9", "proxy_excludes": "*,0.0.0.0/0,::/0"}


class ObjectStore:
    """A store in a bucket; credentials, region and endpoint come from the usual ``AWS_…`` variables.

    A put is atomic and durable once it is acknowledged, so there are no temporary files.
    """

    def __init__(self, uri: str) -> None:
        """Remember the URI, without accessing the bucket.

        Args:
            uri: ``s3://bucket/prefix``.

        Raises:
            StoreError: If the URI names no bucket.
        """
        self.uri = uri.rstrip("/")
        if not urlsplit(self.uri).netloc:
            raise StoreError(f"{uri}: the URI names no bucket; write s3://bucket/prefix")

    def __reduce__(self) -> tuple[object, ...]:
        return ObjectStore, (self.uri,)  # a worker process creates its own client

    @cached_property
    def _client(self) -> Any:
        from obstore.store import S3Store

        plain_http = is_loopback(urlsplit(os.environ.get("AWS_ENDPOINT_URL", "")).hostname or "")
        with self._convert_errors():
            options: ClientConfig = {"allow_http": plain_http, **_NO_PROXY}
            return S3Store.from_url(self.uri, client_options=options, retry_config=_RETRIES)

    def put(self, host_id: str, episode_id: str, data: bytes) -> str:
        """Store a bundle, then its receipt; return its key.

        Raises:
            StoreError: If the ids are malformed.
            IdConflictError: If the store holds other bytes under them.
        """
        incoming = self.receive(host_id, episode_id)
        incoming.write(data)
        incoming.publish(sha256(data).hexdigest())
        return incoming.key

    def receive(self, host_id: str, episode_id: str) -> _ObjectIncoming:
        """Begin to write a bundle; it is held in memory, at most `limits.MAX_COMPRESSED_BYTES`, until published."""
        check_ids(host_id, episode_id, store=self.uri)
        return _ObjectIncoming(self, f"{host_id}/{episode_id}{BUNDLE_SUFFIX}")

    def receiving(self) -> AbstractContextManager[None]:
        """Do nothing: no lock is needed, because a put is atomic and only creates absent keys."""
        return nullcontext()

    def remove_leftovers(self, *, older_than_s: float) -> int:
        """Return 0: there are no unfinished objects."""
        return 0

    def walk(self) -> Iterator[StoreItem]:
        """Yield everything that lies where a bundle should be, as `DiskStore.walk` does.

        Raises:
            StoreError: If the bucket cannot be listed.
        """
        with ThreadPoolExecutor(_PARALLEL_RECEIPTS) as threads:
            yield from threads.map(lambda each: self._describe_item(*each), self._list_bundle_keys())

    def _list_bundle_keys(self) -> Iterator[tuple[str, ObjectMeta | None, bool]]:
        """Yield each key where a bundle should be, its metadata if it exists, and whether it has a receipt."""
        tree: dict[str, dict[str, ObjectMeta | None]] = defaultdict(dict)
        for meta in self._list(""):
            top, _, rest = meta["path"].partition("/")
            name, _, below = rest.partition("/")
            tree[top][name] = tree[top].get(name) if below else meta
        for top in sorted(key for key in tree if not key.startswith(".")):
            names = tree[top]
            alone = names.pop("", None)
            if alone and top.endswith(BUNDLE_SUFFIX):  # a bundle outside any host's folder
                yield top, alone, top + RECEIPT_SUFFIX in tree
            for name in list_bundle_names(names.keys()):
                yield f"{top}/{name}", names.get(name), name + RECEIPT_SUFFIX in names

    def find(self, host_id: str, episode_id: str) -> StoreItem | None:
        """Return the bundle or receipt with an id; None if there is neither."""
        key = f"{host_id}/{episode_id}{BUNDLE_SUFFIX}"
        meta, receipt = self._head(key), self._head(key + RECEIPT_SUFFIX)
        return self._describe_item(key, meta, receipt is not None) if meta or receipt else None

    def read(self, item: StoreItem) -> bytes:
        """Read one bundle, at most as many bytes as a bundle may have.

        Raises:
            BundleError: If it is gone, too large or unreadable.
        """
        try:
            return self._get(item.path, limits.MAX_COMPRESSED_BYTES)
        except FileNotFoundError:
            words = "the bundle is gone" if item.is_missing else "it does not exist"
            raise BundleError(code="bundle-missing", words=words, file=item.path) from None
        except _ObjectTooLargeError as large:
            words = f"{large.size:,} bytes; at most {limits.MAX_COMPRESSED_BYTES:,} are allowed"
            raise BundleError(code="compressed-size", words=words, file=item.path) from None
        except StoreError as error:
            raise BundleError(code="bundle-unreadable", words=str(error), file=item.path) from None

    def write_status(self, host_id: str, episode_id: str, text: bytes) -> None:
        """Write the receiver's verdict on a bundle beside it."""
        check_ids(host_id, episode_id, store=self.uri)
        self.put_key(f"{host_id}/{episode_id}{STATUS_SUFFIX}", text)

    def has_status(self, host_id: str, episode_id: str) -> bool:
        """Whether the receiver's verdict on a bundle is stored."""
        return self._head(f"{host_id}/{episode_id}{STATUS_SUFFIX}") is not None

    def read_status(self, host_id: str, episode_id: str) -> bytes | None:
        """Read the receiver's verdict on a bundle; None if there is no readable one."""
        try:
            return self._get(f"{host_id}/{episode_id}{STATUS_SUFFIX}", MAX_STATUS_BYTES)
        except (FileNotFoundError, StoreError, _ObjectTooLargeError):
            return None

    def free_bytes(self) -> None:
        """Return None: buckets have no free-space limit."""
        return

    def free_files(self) -> None:
        """Return None: buckets have no limit of objects."""
        return

    def check_location(self) -> None:
        """Do nothing: a bucket's name always refers to the same bucket."""

    def list_arrivals(self, host_id: str) -> list[tuple[float, int]]:
        """Return arrival time (Unix seconds) and size (bytes) of each bundle of a host."""
        return [
            (meta["last_modified"].timestamp(), meta["size"])
            for meta in self._list(host_id)
            if meta["path"].endswith(BUNDLE_SUFFIX)
        ]

    def put_key(self, key: str, data: bytes, *, new: bool = False) -> bool:
        """Write one object, with ``new`` only if it is absent; return whether it was written."""
        import obstore

        with self._convert_errors():
            try:
                obstore.put(self._client, key, data, mode="create" if new else "overwrite", use_multipart=False)
            except obstore.exceptions.AlreadyExistsError:
                return False
            except FileNotFoundError as exc:
                raise StoreError(f"{self.uri}: there is no such bucket; make it, or check the name") from exc
        return True

    def put_file(self, key: str, path: Path) -> None:
        """Upload a file of any size; the object appears complete."""
        import obstore

        with self._convert_errors():
            try:
                obstore.put(self._client, key, path, mode="overwrite")
            except FileNotFoundError as exc:
                raise StoreError(f"{self.uri}: there is no such bucket; make it, or check the name") from exc

    def remove_key(self, key: str) -> None:
        """Remove an object if it exists."""
        import obstore

        if self._head(key) is not None:  # without the permission to delete, new keys can still be put
            with self._convert_errors():
                obstore.delete(self._client, key)

    def get_receipt(self, key: str) -> str | None:
        """Return the digest in a key's receipt, None without one; see `StoreItem.receipt`."""
        try:
            return parse_receipt(self._get(key + RECEIPT_SUFFIX, MAX_RECEIPT_BYTES), key.rpartition("/")[2])
        except FileNotFoundError:
            return None
        except _ObjectTooLargeError:
            return MALFORMED_RECEIPT
        except StoreError:
            return UNREADABLE_RECEIPT

    def get(self, key: str) -> bytes:
        """Read one object of at most the size of a bundle."""
        return self._get(key, limits.MAX_COMPRESSED_BYTES)

    def _get(self, key: str, limit: int) -> bytes:
        import obstore

        with self._convert_errors():
            result = obstore.get(self._client, key)
            if result.meta["size"] > limit:
                raise _ObjectTooLargeError(result.meta["size"])
            return bytes(result.bytes())

    def _head(self, key: str) -> ObjectMeta | None:
        import obstore

        try:
            with self._convert_errors():
                return obstore.head(self._client, key)
        except FileNotFoundError:
            return None

    def _list(self, prefix: str) -> Iterator[ObjectMeta]:
        import obstore

        with self._convert_errors():
            try:
                listed = [meta for page in obstore.list(self._client, prefix or None) for meta in page]
            except obstore.exceptions.InvalidPathError:
                # A key such as `a//b` or `./c`, which consoles and sync tools create, fails the whole listing.
                listed = self._list_all_keys(prefix)
        yield from listed

    def _list_all_keys(self, prefix: str) -> list[ObjectMeta]:
        """List all keys with pyarrow's client, which accepts keys that are not paths."""
        from pyarrow.fs import FileSelector, FileType, S3FileSystem

        endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
        files = S3FileSystem(
            access_key=os.environ.get("AWS_ACCESS_KEY_ID"),
            secret_key=os.environ.get("AWS_SECRET_ACCESS_KEY"),
            session_token=os.environ.get("AWS_SESSION_TOKEN"),
            region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
            endpoint_override=endpoint.netloc or None,
            scheme=endpoint.scheme or "https",
        )
        parts = urlsplit(self.uri)
        base = parts.netloc + parts.path
        below = "/".join(part for part in (base, prefix) if part)
        found = files.get_file_info(FileSelector(below, recursive=True, allow_not_found=True))
        return [
            {
                "path": info.path.removeprefix(base).removeprefix("/"),
                "size": info.size,
                "last_modified": info.mtime,
                "e_tag": None,
                "version": None,
            }
            for info in sorted(found, key=lambda each: each.path)
            if info.type == FileType.File
        ]

    def _describe_item(self, key: str, meta: ObjectMeta | None, has_receipt: bool) -> StoreItem:
        host, _, name = key.rpartition("/")
        stem = name.removesuffix(BUNDLE_SUFFIX)
        is_named = name.endswith(BUNDLE_SUFFIX) and EPISODE_ID_PATTERN.fullmatch(stem) is not None
        return StoreItem(
            path=key,
            host_id=HostId(host) if HOST_ID_PATTERN.fullmatch(host) else None,
            episode_id=EpisodeId(stem) if is_named else None,
            bytes=meta["size"] if meta else 0,
            mtime_ns=int(meta["last_modified"].timestamp() * 1e6) * 1000 if meta else 0,
            receipt=self.get_receipt(key) if has_receipt else None,
            is_missing=has_receipt and not meta,
        )

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        """Convert the library's errors to StoreError; a missing object stays a FileNotFoundError."""
        import obstore

        try:
            yield
        except FileNotFoundError:
            raise
        except (obstore.exceptions.BaseError, OSError) as exc:
            line = str(exc).splitlines()[0][:300]
            raise StoreError(
                f"{self.uri}: {line}; check the bucket's name, AWS_ENDPOINT_URL, AWS_REGION and the credentials"
            ) from exc


class _ObjectTooLargeError(Exception):
    """An object is larger than allowed."""

    def __init__(self, size: int) -> None:
        self.size = size
        super().__init__(size)


class _ObjectIncoming:
    """A bundle that is being written to a bucket; see `phasewatch.store.base.IncomingBundle`."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self.key = key
        self._store, self._buffer = store, bytearray()

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._buffer += data

    def content(self) -> bytes:
        """Return all bytes written so far."""
        return bytes(self._buffer)

    def publish(self, digest: str) -> bool:
        """Store the bundle, then its receipt; return whether the bundle is new."""
        is_new = self._store.put_key(self.key, bytes(self._buffer), new=True)
        if not is_new and sha256(self._store.get(self.key)).hexdigest() != digest:
            raise IdConflictError(
                f"{self._store.uri}/{self.key}: the store holds other bytes under this id; bundles are never replaced"
            )
        if is_new or self._store.get_receipt(self.key) != digest:
            self._store.put_key(self.key + RECEIPT_SUFFIX, render_receipt(digest, self.key.rpartition("/")[2]))
        return is_new

    def drop(self) -> None:
        """Discard what was not published."""
        self._buffer.clear()
