"""A store in an object store (`s3://bucket/prefix`): the same keys as a folder's paths, each put only if absent."""

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

_PARALLEL_RECEIPTS = 16  # receipts are fetched side by side: one after the other, a store of thousands takes minutes
_RETRIES: RetryConfig = {"max_retries": 4}
# obstore cannot be told to ignore the environment's proxies (ADR 0051); a proxy of our own takes their place, and every
# host is excluded from it: `*` covers names, the networks cover addresses.
_NO_PROXY: ClientConfig = {"proxy_url": "http://127.0.0.1:9", "proxy_excludes": "*,0.0.0.0/0,::/0"}


class ObjectStore:
    """A store in a bucket; credentials, region and endpoint come from the usual ``AWS_…`` variables.

    A put of one key is whole or not there, and durable when it is answered, so there are no temporaries.
    """

    def __init__(self, uri: str) -> None:
        """Name the store; nothing is asked yet.

        Args:
            uri: ``s3://bucket/prefix``.

        Raises:
            StoreError: If the URI has no bucket.
        """
        self.uri = uri.rstrip("/")
        if not urlsplit(self.uri).netloc:
            raise StoreError(f"{uri}: no bucket is named; write s3://bucket/prefix")

    def __reduce__(self) -> tuple[object, ...]:
        return ObjectStore, (self.uri,)  # a worker makes a client of its own

    @cached_property
    def _client(self) -> Any:
        from obstore.store import S3Store

        plain_http = is_loopback(urlsplit(os.environ.get("AWS_ENDPOINT_URL", "")).hostname or "")
        with self._convert_errors():
            options: ClientConfig = {"allow_http": plain_http, **_NO_PROXY}
            return S3Store.from_url(self.uri, client_options=options, retry_config=_RETRIES)

    def put(self, host_id: str, episode_id: str, data: bytes) -> str:
        """Store a bundle, then its receipt; give its key.

        Raises:
            StoreError: If the ids are malformed; a TakenError, if other bytes already stand under them.
        """
        incoming = self.receive(host_id, episode_id)
        incoming.write(data)
        incoming.publish(sha256(data).hexdigest())
        return incoming.key

    def receive(self, host_id: str, episode_id: str) -> _ObjectIncoming:
        """Begin a bundle; it is held in memory until it is published, at most `limits.COMPRESSED_BYTES`."""
        check_ids(host_id, episode_id, store=self.uri)
        return _ObjectIncoming(self, f"{host_id}/{episode_id}{BUNDLE_SUFFIX}")

    def receiving(self) -> AbstractContextManager[None]:
        """Need no lock: a key is put whole, and only if it is absent."""
        return nullcontext()

    def remove_leftovers(self, *, older_than_s: float) -> int:
        """Find nothing: what was not published was never there."""
        return 0

    def walk(self) -> Iterator[StoreItem]:
        """Give everything that lies where a bundle should be, by folder, then by name, as `DiskStore.walk` does.

        Raises:
            StoreError: If the bucket cannot be listed.
        """
        with ThreadPoolExecutor(_PARALLEL_RECEIPTS) as threads:
            yield from threads.map(lambda each: self._describe_item(*each), self._list_bundle_keys())

    def _list_bundle_keys(self) -> Iterator[tuple[str, ObjectMeta | None, bool]]:
        """Give, in a folder's order, each key where a bundle should be: what is listed of it, whether a receipt is."""
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
        """Give what stands under an id; None if neither bundle nor receipt does."""
        key = f"{host_id}/{episode_id}{BUNDLE_SUFFIX}"
        meta, receipt = self._head(key), self._head(key + RECEIPT_SUFFIX)
        return self._describe_item(key, meta, receipt is not None) if meta or receipt else None

    def read(self, item: StoreItem) -> bytes:
        """Read one bundle, never more than a bundle may hold.

        Raises:
            BundleError: If it is gone, too large or cannot be read.
        """
        try:
            return self._get(item.path, limits.MAX_COMPRESSED_BYTES)
        except FileNotFoundError:
            words = "the bundle is gone" if item.is_missing else "it is not there"
            raise BundleError(code="bundle-missing", words=words, file=item.path) from None
        except _ObjectTooLargeError as large:
            words = f"{large.size:,} bytes; at most {limits.MAX_COMPRESSED_BYTES:,} are allowed"
            raise BundleError(code="compressed-size", words=words, file=item.path) from None
        except StoreError as error:
            raise BundleError(code="bundle-unreadable", words=str(error), file=item.path) from None

    def write_status(self, host_id: str, episode_id: str, text: bytes) -> None:
        """Write what admission said of a bundle beside it."""
        check_ids(host_id, episode_id, store=self.uri)
        self.put_key(f"{host_id}/{episode_id}{STATUS_SUFFIX}", text)

    def has_status(self, host_id: str, episode_id: str) -> bool:
        """Whether admission's word on a bundle stands beside it."""
        return self._head(f"{host_id}/{episode_id}{STATUS_SUFFIX}") is not None

    def read_status(self, host_id: str, episode_id: str) -> bytes | None:
        """Read admission's word on a bundle; None if there is none, or it cannot be read."""
        try:
            return self._get(f"{host_id}/{episode_id}{STATUS_SUFFIX}", MAX_STATUS_BYTES)
        except (FileNotFoundError, StoreError, _ObjectTooLargeError):
            return None

    def free_bytes(self) -> None:
        """Say that nobody can say: a bucket has no size."""
        return

    def free_files(self) -> None:
        """Return None: a bucket holds any number of objects."""
        return

    def check_location(self) -> None:
        """Do nothing: a bucket's name always leads to the same bucket."""

    def list_arrivals(self, host_id: str) -> list[tuple[float, int]]:
        """Give when (Unix seconds) each bundle of a host came, and its size in bytes."""
        return [
            (meta["last_modified"].timestamp(), meta["size"])
            for meta in self._list(host_id)
            if meta["path"].endswith(BUNDLE_SUFFIX)
        ]

    def put_key(self, key: str, data: bytes, *, new: bool = False) -> bool:
        """Put one object whole; with ``new`` only if it is absent. Give whether it was put."""
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
        """Put a file of any size, in pieces; it appears whole."""
        import obstore

        with self._convert_errors():
            try:
                obstore.put(self._client, key, path, mode="overwrite")
            except FileNotFoundError as exc:
                raise StoreError(f"{self.uri}: there is no such bucket; make it, or check the name") from exc

    def remove_key(self, key: str) -> None:
        """Remove an object; one that is not there is as good as removed."""
        import obstore

        if self._head(key) is not None:  # who may not delete can still put where nothing stands
            with self._convert_errors():
                obstore.delete(self._client, key)

    def get_receipt(self, key: str) -> str | None:
        """Give the digest that a key's receipt vouches for, None without one; see `StoreItem` for what is no digest."""
        try:
            return parse_receipt(self._get(key + RECEIPT_SUFFIX, MAX_RECEIPT_BYTES), key.rpartition("/")[2])
        except FileNotFoundError:
            return None
        except _ObjectTooLargeError:
            return MALFORMED_RECEIPT
        except StoreError:
            return UNREADABLE_RECEIPT

    def get(self, key: str) -> bytes:
        """Read one object of a bundle's size."""
        return self._get(key, limits.MAX_COMPRESSED_BYTES)

    def _get(self, key: str, limit: int) -> bytes:
        import obstore

        with self._convert_errors():
            answer = obstore.get(self._client, key)
            if answer.meta["size"] > limit:
                raise _ObjectTooLargeError(answer.meta["size"])
            return bytes(answer.bytes())

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
                # One key such as `a//b` or `./c`, which consoles and sync tools leave, ends the whole listing.
                listed = self._list_all_keys(prefix)
        yield from listed

    def _list_all_keys(self, prefix: str) -> list[ObjectMeta]:
        """List all keys, also those that are no path, by pyarrow's client."""
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
                "path": info.path.removeprefix(base).removeprefix("/"), "size": info.size, "last_modified": info.mtime,
                "e_tag": None, "version": None,
            }
            for info in sorted(found, key=lambda each: each.path)
            if info.type == FileType.File
        ]  # fmt: skip

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
        """Turn the library's errors into one clear line; what is not there stays a FileNotFoundError."""
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
    """An object is larger than what it stands for may be."""

    def __init__(self, size: int) -> None:
        self.size = size
        super().__init__(size)


class _ObjectIncoming:
    """A bundle on its way into a bucket; see `phasewatch.store.base.IncomingBundle`."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self.key = key
        self._store, self._buffer = store, bytearray()

    def write(self, data: bytes) -> None:
        """Take the next bytes."""
        self._buffer += data

    def content(self) -> bytes:
        """Give all bytes written so far."""
        return bytes(self._buffer)

    def publish(self, digest: str) -> bool:
        """Put the bundle, then its receipt; give whether it is new."""
        is_new = self._store.put_key(self.key, bytes(self._buffer), new=True)
        if not is_new and sha256(self._store.get(self.key)).hexdigest() != digest:
            raise IdConflictError(
                f"{self._store.uri}/{self.key}: other bytes already stand under this id; bundles are written once"
            )
        if is_new or self._store.get_receipt(self.key) != digest:
            self._store.put_key(self.key + RECEIPT_SUFFIX, render_receipt(digest, self.key.rpartition("/")[2]))
        return is_new

    def drop(self) -> None:
        """Forget it."""
        self._buffer.clear()
