"""A store in a folder: written once, walked whole and in order, read within bounds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from tests.crash.faults import FaultyDisk, Killed

from phasewatch import atomic
from phasewatch.bundle import limits
from phasewatch.errors import BundleError, StoreError
from phasewatch.store.local import MALFORMED_RECEIPT, UNREADABLE_RECEIPT, DiskStore, StoreItem

IDS = [f"0199c82c-c000-7000-8000-00000000000{i}" for i in range(5)]


def walk(path: Path) -> list[StoreItem]:
    return list(DiskStore(path).walk())


def test_a_bundle_lies_under_its_host_with_a_receipt_that_sha256sum_checks(tmp_path: Path) -> None:
    path = DiskStore(tmp_path).put("pc-a", IDS[0], b"data")

    assert path == tmp_path / "pc-a" / f"{IDS[0]}.tar.zst"
    assert path.with_name(path.name + ".sha256").read_text() == f"{sha256(b'data').hexdigest()}  {path.name}\n"
    subprocess.run(
        ["sha256sum", "--check", "--strict", path.name + ".sha256"], cwd=path.parent, check=True, capture_output=True
    )


def test_the_same_bytes_may_come_again_and_other_bytes_may_not(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    path = store.put("pc-a", IDS[0], b"data")

    assert store.put("pc-a", IDS[0], b"data") == path
    with pytest.raises(StoreError, match="the store holds other bytes under this id"):
        store.put("pc-a", IDS[0], b"DATA")
    assert path.read_bytes() == b"data"


def test_putting_again_finishes_what_a_crash_left_without_a_receipt(tmp_path: Path) -> None:
    path = DiskStore(tmp_path).put("pc-a", IDS[0], b"data")
    path.with_name(path.name + ".sha256").unlink()

    DiskStore(tmp_path).put("pc-a", IDS[0], b"data")

    assert [item.receipt for item in walk(tmp_path)] == [sha256(b"data").hexdigest()]


@pytest.mark.parametrize(
    ("host_id", "episode_id"), [("../x", IDS[0]), ("a", "../x"), ("a", "7"), ("A", IDS[0]), ("", IDS[0])]
)
def test_ids_that_could_lead_elsewhere_are_refused(tmp_path: Path, host_id: str, episode_id: str) -> None:
    with pytest.raises(StoreError, match="is not a valid host_id/episode_id"):
        DiskStore(tmp_path).put(host_id, episode_id, b"data")


def test_the_bundle_is_durable_before_its_receipt_exists(tmp_path: Path) -> None:
    class Full(atomic.DiskOperations):
        def rename(self, source: Path, target: Path) -> None:
            raise OSError("power cut")

    with atomic.use_disk_operations(Full()), pytest.raises(OSError, match="power cut"):
        DiskStore(tmp_path).put("pc-a", IDS[0], b"data")

    assert [(item.bytes, item.receipt) for item in walk(tmp_path)] == [(4, None)]


def test_a_bundle_is_in_the_store_only_when_its_folders_name_is_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "spare").mkdir()
    (tmp_path / "store").mkdir()
    store = DiskStore(tmp_path / "store")
    with atomic.use_disk_operations(disk := FaultyDisk(tmp_path / "spare", at=1, fault="EIO")):
        with pytest.raises(OSError, match="injected"):
            store.put("pc-a", IDS[0], b"data")
        assert disk.calls[:2] == ["mkdir", "fsync"]  # the folder is there, and the disk did not take its name

        store.put("pc-a", IDS[0], b"data")
        disk.at, disk.fault = len(disk.calls), "power cut"
        with pytest.raises(Killed):
            store.put("pc-b", IDS[1], b"data")

    assert [(item.path, item.bytes) for item in walk(tmp_path / "store")] == [(f"pc-a/{IDS[0]}.tar.zst", 4)]


def test_items_come_by_host_and_then_by_name(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for host_id, number in (("b", 1), ("a", 2), ("b", 0), ("a", 1)):
        store.put(host_id, IDS[number], b"x")

    assert [(i.host_id, i.episode_id) for i in walk(tmp_path)] == [
        ("a", IDS[1]),
        ("a", IDS[2]),
        ("b", IDS[0]),
        ("b", IDS[1]),
    ]


def test_everything_that_lies_where_a_bundle_should_be_is_given(tmp_path: Path) -> None:
    (tmp_path / "pc-a" / "folder").mkdir(parents=True)
    for name in ("notes.txt", "x.tar.zst", f"{IDS[0]}.tar.gz", f"{IDS[1]}.tar.zst.bak"):
        (tmp_path / "pc-a" / name).write_bytes(b"?")
    (tmp_path / "Wrong Host").mkdir()
    (tmp_path / "Wrong Host" / f"{IDS[2]}.tar.zst").write_bytes(b"?")
    (tmp_path / f"{IDS[3]}.tar.zst").write_bytes(b"?")
    (tmp_path / "README").write_bytes(b"not under a host")
    os.mkfifo(tmp_path / "pc-a" / f"{IDS[4]}.tar.zst")

    assert [(i.path, i.host_id, i.episode_id) for i in walk(tmp_path)] == [
        (f"{IDS[3]}.tar.zst", None, IDS[3]),
        (f"Wrong Host/{IDS[2]}.tar.zst", None, IDS[2]),
        (f"pc-a/{IDS[0]}.tar.gz", "pc-a", None),
        (f"pc-a/{IDS[1]}.tar.zst.bak", "pc-a", None),
        (f"pc-a/{IDS[4]}.tar.zst", "pc-a", IDS[4]),
        ("pc-a/folder", "pc-a", None),
        ("pc-a/notes.txt", "pc-a", None),
        ("pc-a/x.tar.zst", "pc-a", None),
    ]


def test_receipts_hidden_files_and_unfinished_writes_are_no_items_but_the_last_are_told(tmp_path: Path) -> None:
    DiskStore(tmp_path).put("pc-a", IDS[0], b"data")
    (tmp_path / "pc-a" / ".x.0123456789ab.tmp").write_bytes(b"half")
    (tmp_path / "pc-a" / ".lock").touch()
    (tmp_path / ".git").mkdir()

    assert len(walk(tmp_path)) == 1
    assert DiskStore(tmp_path).list_temporaries() == ("pc-a/.x.0123456789ab.tmp",)


@pytest.mark.parametrize(
    "line",
    [b"", b"no digest", b"0" * 64 + b"  other.tar.zst\n", b"\xff" * 80, b"0" * 63 + b"  x\n"],
    ids=["empty", "words", "another file's", "no text", "too short"],
)
def test_a_receipt_that_is_none_is_malformed(tmp_path: Path, line: bytes) -> None:
    path = DiskStore(tmp_path).put("pc-a", IDS[0], b"data")
    path.with_name(path.name + ".sha256").write_bytes(line)

    assert [item.receipt for item in walk(tmp_path)] == [MALFORMED_RECEIPT]


def test_a_receipt_that_cannot_be_read_is_unreadable(tmp_path: Path) -> None:
    path = DiskStore(tmp_path).put("pc-a", IDS[0], b"data")
    path.with_name(path.name + ".sha256").unlink()
    path.with_name(path.name + ".sha256").mkdir()

    assert [item.receipt for item in walk(tmp_path)] == [UNREADABLE_RECEIPT]


def test_a_receipt_whose_bundle_is_gone_is_given_so_that_the_loss_is_counted(tmp_path: Path) -> None:
    DiskStore(tmp_path).put("pc-a", IDS[0], b"data").unlink()

    (item,) = walk(tmp_path)
    with pytest.raises(BundleError, match="bundle-missing"):
        DiskStore(tmp_path).read(item)

    assert (item.is_missing, item.bytes, item.receipt) == (True, 0, sha256(b"data").hexdigest())


def test_a_store_that_is_not_there_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no such folder; make one with `phasewatch simulate --out`"):
        walk(tmp_path / "nowhere")


def test_an_empty_store_has_no_items(tmp_path: Path) -> None:
    assert walk(tmp_path) == []


def test_reading_gives_the_bytes(tmp_path: Path) -> None:
    DiskStore(tmp_path).put("pc-a", IDS[0], b"data")

    assert [DiskStore(tmp_path).read(item) for item in walk(tmp_path)] == [b"data"]


def test_reading_refuses_what_is_too_large_no_file_or_out_of_reach(tmp_path: Path) -> None:
    folder = tmp_path / "pc-a"
    (folder / "folder").mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    (folder / "broken").symlink_to("nowhere")
    with (folder / "large").open("wb") as file:
        file.truncate(limits.MAX_COMPRESSED_BYTES + 1)
    codes = {}
    for item in walk(tmp_path):
        with pytest.raises(BundleError) as refused:
            DiskStore(tmp_path).read(item)
        codes[item.path] = refused.value.code

    assert codes == {
        "pc-a/broken": "bundle-missing", "pc-a/folder": "bundle-unreadable", "pc-a/large": "compressed-size",
        "pc-a/pipe": "bundle-unreadable",
    }  # fmt: skip


def as_nobody(ask: Callable[[], list[str]]) -> list[str]:
    """Ask as a user who owns nothing here: root may read every folder, whatever its mode says."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(54321)
                os.setuid(54321)
            os.write(write_end, "\n".join(ask()).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as answer:
        told = answer.read()
    os.waitpid(child, 0)
    return told.splitlines()


def test_a_folder_that_cannot_be_read_is_one_item_and_the_others_are_walked(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)  # noqa: PTH101
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    store = tmp_path / "store"
    for host in ("pc-a", "pc-b", "pc-c"):
        DiskStore(store).put(host, IDS[0], b"data")
    (store / "pc-b").chmod(0o000)

    def ask() -> list[str]:
        told = []
        for item in DiskStore(store).walk():
            try:
                DiskStore(store).read(item)
                told.append(f"{item.host_id} read")
            except BundleError as error:
                told.append(f"{item.host_id} {error.code}")
        return [
            *told,
            f"{len(DiskStore(store).list_temporaries())} temporaries",
            f"{DiskStore(store).remove_leftovers(older_than_s=1)}",
        ]

    try:
        assert as_nobody(ask) == ["pc-a read", "pc-b bundle-unreadable", "pc-c read", "0 temporaries", "0"]
    finally:
        (store / "pc-b").chmod(0o755)


def test_a_link_that_leads_to_itself_ends_no_walk(tmp_path: Path) -> None:
    DiskStore(tmp_path).put("pc-a", IDS[0], b"data")
    (tmp_path / "pc-b").symlink_to("pc-b")

    stray, sound = sorted(walk(tmp_path), key=lambda item: item.path, reverse=True)

    assert (sound.host_id, stray.path, stray.episode_id) == ("pc-a", "pc-b", None)
    with pytest.raises(BundleError) as caught:
        DiskStore(tmp_path).read(stray)
    assert caught.value.code == "bundle-unreadable"
    assert DiskStore(tmp_path).list_temporaries() == ()
    assert DiskStore(tmp_path).remove_leftovers(older_than_s=0) == 0


@pytest.mark.parametrize("name", ["lost+found", "System Volume Information", "$RECYCLE.BIN"])
def test_what_belongs_to_the_file_system_is_no_folder_of_a_host(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()

    assert walk(tmp_path) == []


def test_a_pipe_in_a_bundles_or_a_receipts_place_holds_nobody_up(tmp_path: Path) -> None:
    path = DiskStore(tmp_path).put("pc-a", IDS[0], b"data")
    receipt = path.with_name(path.name + ".sha256")
    receipt.unlink()
    os.mkfifo(receipt)
    os.mkfifo(path.with_name(f"{IDS[1]}.tar.zst"))

    sound, pipe = walk(tmp_path)

    assert (sound.receipt, DiskStore(tmp_path).read(sound)) == (UNREADABLE_RECEIPT, b"data")
    with pytest.raises(BundleError) as caught:
        DiskStore(tmp_path).read(pipe)
    assert caught.value.code == "bundle-unreadable"
