"""What consoles and sync tools leave in a bucket beside the bundles."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

import httpx
import pytest

from phasewatch.errors import BundleError
from phasewatch.store.base import BundleStore, StoreItem, open_store

ID = "0199c82c-c000-7000-8000-000000000000"
ODD = ("/stray", "pc-a//x", "./y", "pc-a/../z", "pc-a/..", "pc-a/a b.tar.zst", "pc-a/100%", "pc-a/café")


@pytest.mark.parametrize("key", ODD)
def test_a_key_that_is_no_path_hides_no_bundle(new_bucket: Callable[[], str], s3_endpoint: str, key: str) -> None:
    uri = new_bucket()
    store = open_store(uri)
    store.put("pc-a", ID, b"data")
    url = f"{s3_endpoint}/{uri.removeprefix('s3://')}/{quote(key, safe='')}"
    httpx.put(url, content=b"stray", trust_env=False, timeout=60).raise_for_status()

    items = list(store.walk())

    sound = next(item for item in items if item.episode_id == ID)
    assert store.read(sound) == b"data"
    assert sound.receipt not in (None, "malformed", "unreadable")
    assert len(store.list_arrivals("pc-a")) >= 1
    assert {code_of(store, item) for item in items if item is not sound} <= {"", "bundle-missing", "bundle-unreadable"}


def code_of(store: BundleStore, item: StoreItem) -> str:
    try:
        store.read(item)
    except BundleError as error:
        return error.code
    return ""
