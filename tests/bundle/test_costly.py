"""Bundles of a few KiB that were made to cost: each is refused with its code before it costs a second or a large
memory."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from tests.factories.small_bundles import listed, members_of, seal, small_bundle

from phasewatch.bundle import limits
from phasewatch.bundle.archive import unpack_bundle
from phasewatch.errors import BundleError


def refuse(data: bytes) -> BundleError:
    with pytest.raises(BundleError) as refused:
        unpack_bundle(data, file="small")
    return refused.value


def test_a_key_that_stands_twice_is_found_at_once_among_as_many_as_a_manifest_can_hold() -> None:
    keys = [b'"%x":1' % i for i in range(limits.MAX_MANIFEST_BYTES // 10)]
    text = b"{" + b",".join((*keys, keys[-1])) + b"}"
    data = seal({**members_of(small_bundle()), "manifest.json": text})

    began_s = time.process_time()
    refused = refuse(data)

    assert refused.code == "manifest-key-twice"
    assert f"'{len(keys) - 1:x}'" in refused.words
    assert time.process_time() - began_s < 1.0


@pytest.mark.parametrize(("name", "code"), [("labels.jsonl", "labels-many"), ("proc.jsonl", "rows-many")])
def test_lines_are_counted_before_memory_is_spent_on_them(name: str, code: str) -> None:
    size = limits.MAX_DECOMPRESSED_BYTES - (1 << 20)
    data = seal(listed({**members_of(small_bundle()), name: b"\n" * size}))

    tracemalloc.start()
    try:
        refused = refuse(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert refused.code == code
    assert peak_bytes < 4 * limits.MAX_DECOMPRESSED_BYTES
