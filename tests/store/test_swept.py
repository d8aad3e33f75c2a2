"""A store in a bucket is swept to the bytes of the same store in a folder, and a finished run is published whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.factories.stores import put_bytes, write_store
from tests.validate.test_sweep import products
from typer.testing import CliRunner

from phasewatch.cli import app
from phasewatch.errors import RunError, StoreError
from phasewatch.pipeline.publish import publish_run
from phasewatch.pipeline.stages import RunSettings, validate
from phasewatch.store.base import open_store, parse_store_location
from phasewatch.store.s3 import ObjectStore


def copy_store(folder: Path, uri: str) -> None:
    """Lay a folder's bundles and receipts into a bucket, as they are."""
    store = open_store(uri)
    assert isinstance(store, ObjectStore)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        store.put_key(path.relative_to(folder).as_posix(), path.read_bytes())


def test_a_bucket_is_swept_to_the_same_bytes_as_a_folder(new_bucket: Callable[[], str], tmp_path: Path) -> None:
    folder, uri = write_store(tmp_path / "store", hosts=1, sessions=2, seconds=8.0), new_bucket()
    put_bytes(min(folder.glob("*/*.zst")), b"no bundle")
    copy_store(folder, uri)

    here = validate(RunSettings(store=folder, run=tmp_path / "here", workers=1))
    there = validate(RunSettings(store=parse_store_location(uri), run=tmp_path / "there", workers=1, limit=0))
    again = validate(RunSettings(store=parse_store_location(uri), run=tmp_path / "there", workers=1))

    assert [v.status for v in there.verdicts] == [v.status for v in here.verdicts]
    assert products(tmp_path / "there") == products(tmp_path / "here")
    assert (there.kept, again.kept) == (0, 4)


def test_a_bucket_is_scored_and_a_bundle_of_it_shown_as_from_a_folder(
    new_bucket: Callable[[], str], tmp_path: Path
) -> None:
    folder, uri = write_store(tmp_path / "store", hosts=1, sessions=1), new_bucket()
    copy_store(folder, uri)
    bundle = min(folder.glob("*/*.zst")).relative_to(folder).as_posix()

    def call(*arguments: object) -> str:
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    for name, here, there in (("all", folder, uri), ("one", folder / bundle, f"{uri}/{bundle}")):
        call("predict", here, "--out", tmp_path / f"{name}-here.parquet")
        call("predict", there, "--out", tmp_path / f"{name}-there.parquet")

        assert (tmp_path / f"{name}-there.parquet").read_bytes() == (tmp_path / f"{name}-here.parquet").read_bytes()

    assert call("inspect", f"{uri}/{bundle}") == call("inspect", folder / bundle)


def test_a_bundle_that_is_not_in_the_bucket_is_one_clear_line(new_bucket: Callable[[], str], tmp_path: Path) -> None:
    name = f"{new_bucket()}/h0/01a0c450-6c01-7000-8000-000000000001.tar.zst"
    for command in (("inspect", name), ("predict", name, "--out", str(tmp_path / "x.parquet"))):
        done = CliRunner().invoke(app, command)

        assert done.exit_code == 3
        assert name in done.stderr


@pytest.mark.parametrize("kind", ["s3", "a folder"])
def test_a_finished_run_is_published_with_its_last_word_last(
    kind: str, new_bucket: Callable[[], str], tmp_path: Path
) -> None:
    run, target = tmp_path / "run", new_bucket() if kind == "s3" else f"{tmp_path}/copy"
    (run / "grids").mkdir(parents=True)
    contents = {"grids/grids.npy": bytes(range(256)) * 50_000, "report.html": b"<p>", "run.json": b"{}\n"}
    for name, content in contents.items():
        (run / name).write_bytes(content)
    (run / ".sweep.json").write_bytes(b"notes")

    copied = publish_run(run, target)

    assert copied == 3
    if kind == "s3":
        store = open_store(target)
        assert isinstance(store, ObjectStore)
        assert {name: store.get(name) for name in contents} == contents
    else:
        assert {str(p.relative_to(target)): p.read_bytes() for p in Path(target).rglob("*") if p.is_file()} == contents


@pytest.mark.parametrize("kind", ["s3", "a folder"])
def test_publishing_over_an_older_run_that_is_cut_leaves_no_last_word_to_vouch_for_a_mixture(
    kind: str, new_bucket: Callable[[], str], tmp_path: Path
) -> None:
    run, target = tmp_path / "run", new_bucket() if kind == "s3" else f"{tmp_path}/copy"
    run.mkdir()
    for name in ("a.html", "b.html", "run.json"):
        (run / name).write_bytes(b"old")
    publish_run(run, target)
    (run / "a.html").write_bytes(b"new")
    (run / "b.html").unlink()
    (run / "b.html").symlink_to("/proc/self/mem")  # a file that cannot be read

    with pytest.raises((OSError, StoreError)):
        publish_run(run, target)

    store = open_store(target)
    if isinstance(store, ObjectStore):
        assert store.get("a.html") == b"new"
        with pytest.raises(FileNotFoundError):
            store.get("run.json")
    else:
        assert sorted(p.name for p in Path(target).iterdir()) == ["a.html", "b.html"]


@pytest.mark.parametrize("store", ["/home/alice/store", "s3://corpus/lab"])
def test_a_published_run_names_no_folder_and_no_machine_of_its_maker(store: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    told = {
        "store": store,
        "run": "/home/alice/runs/a",
        "ray_address": "ray://head.example:10001",
        "address": "ray://old",
        "limit": 3,
    }
    notes = {"configuration": told, "host": {"machine": "x86_64", "name": "alices-laptop"}, "stages": {}}
    (run / "run.json").write_text(json.dumps(notes))

    publish_run(run, f"{tmp_path}/copy")

    public = json.loads((tmp_path / "copy" / "run.json").read_bytes())
    assert public["host"] == {"machine": "x86_64"}
    assert public["configuration"] == {"limit": 3} | ({"store": store} if store.startswith("s3:") else {})


def test_an_unfinished_run_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="phasewatch run"):
        publish_run(tmp_path, f"{tmp_path}/copy")
