"""Recompression of a corpus: the same content in fewer bytes, with receipts that match."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.recompress import recompress_store

from phasewatch.bundle.container import decompress_frame
from phasewatch.errors import PhasewatchError
from phasewatch.simulate import simulate
from phasewatch.store.local import DiskStore


def read_contents(folder: Path) -> dict[str, bytes]:
    store = DiskStore(folder)
    return {item.path: decompress_frame(store.read(item), file=item.path) for item in store.walk()}


def test_content_and_receipts_stay_right_and_the_bundles_become_smaller(tmp_path: Path) -> None:
    simulate(tmp_path / "store", episodes=3, hosts=1, seed=1)
    contents = read_contents(tmp_path / "store")

    before, after = recompress_store(tmp_path / "store")

    assert after < before
    assert read_contents(tmp_path / "store") == contents  # `read` checks each receipt
    assert all(item.receipt for item in DiskStore(tmp_path / "store").walk())
    assert after == sum(len(DiskStore(tmp_path / "store").read(item)) for item in DiskStore(tmp_path / "store").walk())


def test_a_second_time_changes_no_file(tmp_path: Path) -> None:
    simulate(tmp_path / "store", episodes=2, hosts=1, seed=1)
    recompress_store(tmp_path / "store")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()}

    before, after = recompress_store(tmp_path / "store")

    assert after == before
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_bundle_that_does_not_match_its_receipt_is_refused_and_stays(tmp_path: Path) -> None:
    simulate(tmp_path / "store", episodes=1, hosts=1, seed=1)
    (bundle,) = (tmp_path / "store").rglob("*.tar.zst")
    damaged = bundle.read_bytes()[:-1] + b"\0"
    bundle.write_bytes(damaged)

    with pytest.raises(PhasewatchError):
        recompress_store(tmp_path / "store")

    assert bundle.read_bytes() == damaged
