"""A sweep: every bundle judged, every row accounted for, the same bytes from any number of workers, nothing read
twice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tests.factories.bundles import episode, replace_manifest
from tests.factories.progress import Killed, RecordedProgress
from tests.factories.stores import put, put_bytes, write_store

from phasewatch.artifacts import ACCOUNTING_FILE, VALIDATION_FILE
from phasewatch.binning.storage import open_bins
from phasewatch.errors import RunError, StoreError
from phasewatch.parallel.pool import ItemResult
from phasewatch.simulate import simulate
from phasewatch.store.local import RECEIPT_SUFFIX
from phasewatch.types import BundleStatus, SourceKind
from phasewatch.validate.index import is_balanced, read_index, write_index
from phasewatch.validate.resume import SWEEP_PARTS_DIR, SWEEP_STATE_FILE
from phasewatch.validate.sweep import sample_stratified, sweep

SHORT = (100.0, 104.0)


def products(run: Path) -> dict[str, str]:
    """Digest all that a sweep makes; hidden files are its own notes."""
    return {
        str(p.relative_to(run)): sha256(p.read_bytes()).hexdigest()
        for p in sorted(run.rglob("*"))
        if p.is_file() and not p.name.startswith(".")
    }


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faulty")
    return simulate(folder / "store", hosts=2, episodes=30, seed=9, faults=0.5, between_s=SHORT).store


def test_any_number_of_workers_gives_the_same_bytes(faulty: Path, tmp_path: Path) -> None:
    sweep(faulty, tmp_path / "one", workers=1)
    sweep(faulty, tmp_path / "two", workers=2)

    assert products(tmp_path / "one") == products(tmp_path / "two")
    assert set(products(tmp_path / "one")) == {
        VALIDATION_FILE,
        ACCOUNTING_FILE,
        "grids/grids.npy",
        "grids/levels.npy",
        "grids/index.parquet",
    }


def test_an_unchanged_store_is_not_read_again_and_gives_the_same_bytes(faulty: Path, tmp_path: Path) -> None:
    first = sweep(faulty, tmp_path / "run", workers=1)
    before = products(tmp_path / "run")

    again = sweep(faulty, tmp_path / "run", workers=1)

    assert (first.kept, again.kept) == (0, 30)
    assert again.slowest is None
    assert [str(v) for v in again.verdicts] == [str(v) for v in first.verdicts]
    assert again.stage == first.stage
    assert products(tmp_path / "run") == before


@pytest.mark.parametrize("lost", [VALIDATION_FILE, ACCOUNTING_FILE, "grids/index.parquet", "grids/levels.npy"])
def test_a_product_that_was_lost_is_made_again(lost: str, faulty: Path, tmp_path: Path) -> None:
    sweep(faulty, tmp_path / "run", workers=1)
    before = products(tmp_path / "run")
    (tmp_path / "run" / lost).unlink()

    sweep(faulty, tmp_path / "run", workers=1)

    assert products(tmp_path / "run") == before


def test_a_new_bundle_is_read_and_the_others_are_not(tmp_path: Path) -> None:
    store, run = write_store(tmp_path / "store", hosts=1, sessions=2), tmp_path / "run"
    sweep(store, run, workers=1)
    put(store, episode(number=99, host_id="h0"))

    again = sweep(store, run, workers=1)
    afresh = sweep(store, tmp_path / "afresh", workers=1)

    assert (again.kept, len(again.verdicts)) == (4, 5)
    assert products(run) == products(tmp_path / "afresh")
    assert afresh.kept == 0


def test_a_sweep_that_died_leaves_the_old_products_whole_and_vouched_for(faulty: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sweep(faulty, run, workers=1)
    before = products(run)

    with pytest.raises(Killed):
        sweep(faulty, run, workers=1, full=True, progress=RecordedProgress(killed_at=12))

    assert products(run) == before
    assert sweep(faulty, run, workers=1).kept > 20


def test_a_sweep_that_died_takes_up_where_it_stood(faulty: Path, tmp_path: Path) -> None:
    sweep(faulty, tmp_path / "whole", workers=1)
    run = tmp_path / "run"
    with pytest.raises(Killed):
        sweep(faulty, run, workers=1, part=5, progress=RecordedProgress(killed_at=12))
    with pytest.raises(Killed):
        sweep(faulty, run, workers=1, part=5, progress=RecordedProgress(killed_at=23))

    last = sweep(faulty, run, workers=1, part=5)

    assert last.kept == 20
    assert products(run) == products(tmp_path / "whole")
    assert not (run / SWEEP_PARTS_DIR).exists()


def test_a_part_that_is_not_whole_or_of_another_version_is_read_again(faulty: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        sweep(faulty, run, workers=1, part=5, progress=RecordedProgress(killed_at=16))
    first, second, third = sorted((run / SWEEP_PARTS_DIR).iterdir())
    (first / "grids" / "grids.npy").write_bytes(b"")
    (second / SWEEP_STATE_FILE).write_text(
        json.dumps(json.loads((second / SWEEP_STATE_FILE).read_text()) | {"version": "0"})
    )
    (third / SWEEP_STATE_FILE).unlink()

    last = sweep(faulty, run, workers=1)
    sweep(faulty, tmp_path / "whole", workers=1)

    assert last.kept == 0
    assert products(run) == products(tmp_path / "whole")


def test_a_bundle_that_changed_since_the_kill_is_read_again(tmp_path: Path) -> None:
    store, run = write_store(tmp_path / "store", hosts=1, sessions=3), tmp_path / "run"
    with pytest.raises(Killed):
        sweep(store, run, workers=1, part=2, progress=RecordedProgress(killed_at=5))
    put_bytes(min(store.glob("*/*.zst")), b"other bytes")

    last = sweep(store, run, workers=1)

    assert last.kept == 3
    assert last.verdicts[0].status is BundleStatus.ERRORED


def test_rot_that_a_full_sweep_found_is_not_forgotten_when_it_is_killed(tmp_path: Path) -> None:
    store, run = write_store(tmp_path / "store", hosts=1, sessions=2), tmp_path / "run"
    sweep(store, run, workers=1)
    rotten = min(store.glob("*/*.zst"))
    before = rotten.stat()
    rotten.write_bytes(bytes(before.st_size))
    os.utime(rotten, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Killed):
        sweep(store, run, workers=1, full=True, part=1, progress=RecordedProgress(killed_at=3))

    last = sweep(store, run, workers=1)

    assert [v.status for v in last.verdicts] == [BundleStatus.ERRORED, *[BundleStatus.ACCEPTED] * 3]
    assert last.kept == 4
    assert len(open_bins(run / "grids").rows) == 3


def test_what_a_lost_worker_cost_is_tried_again(tmp_path: Path) -> None:
    store, run = write_store(tmp_path / "store", hosts=1, sessions=1), tmp_path / "run"

    def lossy(fn: Any, items: Iterable[Any], *, workers: int, timeout_s: float | None) -> Iterator[ItemResult[Any]]:
        for i, item in enumerate(items):
            yield ItemResult(
                index=i, value=None if i else fn(item), error="took longer than 30 s, 2 times" if i else None
            )

    first = sweep(store, run, workers=1, mapper=lossy)
    again = sweep(store, run, workers=1)

    assert [v.reasons for v in first.verdicts] == [(), ("worker-lost",)]
    assert "took longer than 30 s" in first.verdicts[1].detail
    assert again.kept == 1
    assert [v.status for v in again.verdicts] == [BundleStatus.ACCEPTED] * 2


def test_a_bundle_whose_receipt_cannot_be_read_is_not_condemned_and_tried_again(tmp_path: Path) -> None:
    path, run = put(tmp_path / "store", episode(number=1)), tmp_path / "run"
    receipt = path.with_name(path.name + RECEIPT_SUFFIX)
    line = receipt.read_bytes()
    receipt.unlink()
    receipt.mkdir()

    first = sweep(tmp_path / "store", run, workers=1)
    receipt.rmdir()
    receipt.write_bytes(line)
    again = sweep(tmp_path / "store", run, workers=1)

    assert [(v.status, v.reasons) for v in first.verdicts] == [(BundleStatus.ERRORED, ("bundle-unreadable",))]
    assert "its receipt could not be read" in first.verdicts[0].detail
    assert [v.status for v in again.verdicts] == [BundleStatus.ACCEPTED]


def test_the_ledger_balances_to_the_last_row(faulty: Path, tmp_path: Path) -> None:
    swept = sweep(faulty, tmp_path / "run", workers=1)
    stage = swept.stage

    assert stage["in"] == 30 == sum(stage[str(s)] for s in BundleStatus)  # type: ignore[misc]
    assert is_balanced(dict(stage))
    by_source = stage["rows_by_source"]
    assert sum(e["in"] for e in by_source.values()) == stage["rows_in"]  # type: ignore[attr-defined]
    assert all(e["in"] == e["used"] + e["lost"] for e in by_source.values())  # type: ignore[attr-defined]


def test_rows_of_a_rejected_bundle_are_lost_by_that_reason_and_named(tmp_path: Path) -> None:
    path = put(tmp_path / "store", episode(number=1))
    path.with_name(path.name + RECEIPT_SUFFIX).write_text(f"{'0' * 64}  {path.name}\n")

    swept = sweep(tmp_path / "store", tmp_path / "run", workers=1)
    (verdict,) = swept.verdicts

    assert swept.stage["rows_lost"] == {"rejected": sum(verdict.rows)}
    assert sum(verdict.rows) > 200


def test_rows_that_never_arrived_are_counted_by_source(tmp_path: Path) -> None:
    whole = episode(number=1)
    emitted = {**whole.manifest.rows_emitted, SourceKind.QMP: whole.manifest.rows_emitted[SourceKind.QMP] + 7}
    put(tmp_path / "store", replace_manifest(whole, rows_emitted=emitted))

    swept = sweep(tmp_path / "store", tmp_path / "run", workers=1)

    assert swept.stage["rows_lost"] == {"never arrived:qmp": 7}
    assert swept.verdicts[0].lost == (0, 7, 0, 0)


def test_the_index_reads_back_as_it_was_written(faulty: Path, tmp_path: Path) -> None:
    swept = sweep(faulty, tmp_path / "run", workers=1)
    write_index(tmp_path / "again.parquet", read_index(tmp_path / "run" / VALIDATION_FILE))

    found = read_index(tmp_path / "again.parquet")

    assert [v.path for v in found] == [v.path for v in swept.verdicts] == sorted(v.path for v in found)
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "run" / VALIDATION_FILE).read_bytes()
    assert all(math.isnan(a.vcpu_wait) == math.isnan(b.vcpu_wait) for a, b in zip(found, swept.verdicts, strict=True))


def test_an_index_that_is_read_in_many_pieces_keeps_its_order(faulty: Path, tmp_path: Path) -> None:
    some = sweep(faulty, tmp_path / "run", workers=1).verdicts
    many = [replace(v, path=f"{i:05d}-{v.path}", vcpu_wait=0.0) for i in range(90) for v in some]
    write_index(tmp_path / "many.parquet", many)

    assert list(read_index(tmp_path / "many.parquet")) == many


def test_the_index_has_exactly_the_columns_of_the_contract(faulty: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    sweep(faulty, tmp_path / "run", workers=1)

    assert pq.read_schema(tmp_path / "run" / VALIDATION_FILE).names == [
        "path",
        "episode_id",
        "host_id",
        "profile",
        "sample_name",
        "sample_kind",
        "origin",
        "role",
        "session",
        "plan_seed",
        "agent",
        "status",
        "reasons",
        "detail",
        "sha256",
        "telemetry_sha256",
        "proc_sketch",
        "bytes",
        "started_wall_ns",
        "duration_s",
        "rows_proc",
        "rows_qmp",
        "rows_netflow",
        "rows_guest",
        "lost_proc",
        "lost_qmp",
        "lost_netflow",
        "lost_guest",
        "s_clean",
        "s_armed",
        "s_infecting",
        "s_active",
        "s_dormant",
        "vcpu_wait",
        "duplicate_of",
        "flags",
        "neighbours",
        "background",
    ]


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / VALIDATION_FILE).write_bytes(b"PAR1")

    with pytest.raises(RunError, match="phasewatch validate"):
        read_index(tmp_path / VALIDATION_FILE)


def test_only_usable_bundles_have_a_grid(faulty: Path, tmp_path: Path) -> None:
    swept = sweep(faulty, tmp_path / "run", workers=1)

    usable = [
        (v.host_id, v.episode_id) for v in swept.verdicts if v.status in (BundleStatus.ACCEPTED, BundleStatus.DEGRADED)
    ]
    assert [(row.host_id, row.episode_id) for row in open_bins(tmp_path / "run" / "grids").rows] == usable


def test_a_copy_whose_original_is_gone_is_used_again(tmp_path: Path) -> None:
    from dataclasses import replace

    store, run = tmp_path / "store", tmp_path / "run"
    first = episode(number=1)
    original = put(store, first)
    put(store, replace(first, manifest=episode(number=2).manifest))
    before = sweep(store, run, workers=1)
    original.unlink()
    original.with_name(original.name + RECEIPT_SUFFIX).unlink()

    after = sweep(store, run, workers=1)

    assert [v.status for v in before.verdicts] == [BundleStatus.ACCEPTED, BundleStatus.REJECTED]
    assert before.verdicts[1].duplicate_of == f"h1/{before.verdicts[0].episode_id}"
    assert [v.status for v in after.verdicts] == [BundleStatus.ACCEPTED]


def test_an_empty_store_is_an_error_and_a_broken_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="empty"):
        sweep(tmp_path / "empty", tmp_path / "run", workers=1)
    put_bytes(put(tmp_path / "broken", episode()), b"x")

    assert sweep(tmp_path / "broken", tmp_path / "run", workers=1).verdicts[0].status is BundleStatus.ERRORED
    assert open_bins(tmp_path / "run" / "grids").rows == ()


def test_a_subset_is_even_over_the_strata_and_always_the_same() -> None:
    strata = ["a/x"] * 50 + ["a/y"] * 2 + ["b/x"] * 9
    names = [f"e{i}" for i in range(len(strata))]

    chosen = sample_stratified(strata, names, 6, seed=1)

    assert chosen == sorted(chosen) == sample_stratified(strata, names, 6, seed=1)
    assert sorted(strata[i] for i in chosen) == ["a/x", "a/x", "a/y", "a/y", "b/x", "b/x"]
    assert sample_stratified(strata, names, 6, seed=2) != chosen
    assert sample_stratified(strata, names, 999) == list(range(len(strata)))
