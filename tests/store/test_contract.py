"""What every store promises, whatever it lies on: written once, whole, with a receipt, walked in one order."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from phasewatch.bundle import limits
from phasewatch.errors import BundleError, IdConflictError, StoreError
from phasewatch.store.base import BundleStore, StoreItem, find_bundle, open_store, parse_store_location
from phasewatch.store.local import MALFORMED_RECEIPT, UNREADABLE_RECEIPT, DiskStore
from phasewatch.store.s3 import ObjectStore

IDS = [f"0199c82c-c000-7000-8000-00000000000{i}" for i in range(5)]


def digest(data: bytes) -> str:
    return sha256(data).hexdigest()


def lay(store: BundleStore, name: str, data: bytes) -> None:
    """Write something into a store behind its back."""
    if isinstance(store, DiskStore):
        path = store.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    else:
        assert isinstance(store, ObjectStore)
        store.put_key(name, data)


def test_a_bundle_is_found_walked_and_read_with_its_receipt(store: BundleStore) -> None:
    store.put("pc-a", IDS[0], b"data")

    (item,) = store.walk()

    assert item == store.find("pc-a", IDS[0])
    assert (item.path, item.host_id, item.episode_id) == (f"pc-a/{IDS[0]}.tar.zst", "pc-a", IDS[0])
    assert (item.bytes, item.receipt, item.is_missing) == (4, digest(b"data"), False)
    assert abs(item.mtime_ns / 1e9 - time.time()) < 3600
    assert store.read(item) == b"data"


def test_a_bundle_is_found_by_its_own_name_with_the_store_that_it_lies_in(place: str) -> None:
    open_store(place).put("pc-a", IDS[0], b"data")

    found = find_bundle(parse_store_location(f"{place}/pc-a/{IDS[0]}.tar.zst"))

    assert found is not None
    store, item = found
    assert [item] == list(open_store(place).walk())
    assert store.read(item) == b"data"
    for name in (f"pc-a/{IDS[1]}.tar.zst", f"{IDS[0]}.tar.zst", "pc-a", ""):
        assert find_bundle(parse_store_location(f"{place}/{name}")) is None


def test_what_is_not_there_is_not_found(store: BundleStore) -> None:
    store.put("pc-a", IDS[0], b"data")

    assert store.find("pc-a", IDS[1]) is None
    assert store.find("pc-b", IDS[0]) is None
    assert store.list_arrivals("pc-b") == []


def test_the_same_bytes_may_come_again_and_other_bytes_may_not(store: BundleStore) -> None:
    store.put("pc-a", IDS[0], b"data")
    store.put("pc-a", IDS[0], b"data")

    with pytest.raises(IdConflictError, match="the store holds other bytes under this id"):
        store.put("pc-a", IDS[0], b"DATA")

    assert [store.read(item) for item in store.walk()] == [b"data"]


def test_a_bundle_is_seen_only_when_it_is_published(store: BundleStore) -> None:
    with store.receiving():
        incoming = store.receive("pc-a", IDS[0])
        incoming.write(b"da")
        incoming.write(b"ta")

        assert incoming.content() == b"data"
        assert store.find("pc-a", IDS[0]) is None
        assert incoming.publish(digest(b"data"))
        incoming.drop()
        assert [store.read(item) for item in store.walk()] == [b"data"]


def test_what_is_dropped_leaves_nothing(store: BundleStore) -> None:
    with store.receiving():
        incoming = store.receive("pc-a", IDS[0])
        incoming.write(b"data")
        incoming.drop()

    assert list(store.walk()) == []
    assert not isinstance(store, DiskStore) or store.list_temporaries() == ()


def test_of_many_writers_of_one_id_one_wins_and_the_others_are_told(place: str) -> None:
    candidates = [b"%d" % (n % 4) * 1000 for n in range(16)]
    with open_store(place).receiving(), ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda data: write_one(open_store(place), data), candidates))

    (item,) = open_store(place).walk()
    winner = open_store(place).read(item)
    assert winner in candidates
    assert item.receipt == digest(winner)
    assert answers.count("new") == 1
    assert [answer != "taken" for answer in answers] == [data == winner for data in candidates]


def write_one(store: BundleStore, data: bytes) -> str:
    incoming = store.receive("pc-a", IDS[0])
    try:
        incoming.write(data)
        return "new" if incoming.publish(digest(data)) else "same"
    except IdConflictError:
        return "taken"
    finally:
        incoming.drop()


def test_writers_of_many_ids_do_not_meet(store: BundleStore) -> None:
    names = [(f"h{n % 3}", f"0199c82c-c000-7000-8000-0000000001{n:02d}") for n in range(24)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: store.put(*name, name[1].encode()), names))

    assert sorted((item.host_id, item.episode_id) for item in store.walk()) == sorted(names)
    assert all(item.receipt == digest(str(item.episode_id).encode()) for item in store.walk())


def test_putting_again_finishes_what_a_crash_left_without_a_receipt(store: BundleStore) -> None:
    lay(store, f"pc-a/{IDS[0]}.tar.zst", b"data")
    assert [item.receipt for item in store.walk()] == [None]

    store.put("pc-a", IDS[0], b"data")

    assert [item.receipt for item in store.walk()] == [digest(b"data")]


def test_a_receipt_that_is_none_is_malformed_and_putting_again_mends_it(store: BundleStore) -> None:
    store.put("pc-a", IDS[0], b"data")
    lay(store, f"pc-a/{IDS[0]}.tar.zst.sha256", b"no digest" * 1000)
    assert [item.receipt for item in store.walk()] == [MALFORMED_RECEIPT]

    store.put("pc-a", IDS[0], b"data")

    assert [item.receipt for item in store.walk()] == [digest(b"data")]


def test_a_receipt_that_could_not_be_fetched_is_unreadable_and_not_malformed(new_bucket: Callable[[], str]) -> None:
    class Busy(ObjectStore):
        def _get(self, key: str, limit: int) -> bytes:
            raise StoreError("503 Slow Down")

    uri = new_bucket()
    ObjectStore(uri).put("pc-a", IDS[0], b"data")

    assert [item.receipt for item in Busy(uri).walk()] == [UNREADABLE_RECEIPT]


def test_a_receipt_whose_bundle_is_gone_is_given_so_that_the_loss_is_counted(store: BundleStore) -> None:
    lay(store, f"pc-a/{IDS[0]}.tar.zst.sha256", f"{digest(b'x')}  {IDS[0]}.tar.zst\n".encode())

    (item,) = store.walk()

    assert (item.is_missing, item.receipt, item.bytes) == (True, digest(b"x"), 0)
    assert store.find("pc-a", IDS[0]) == item
    with pytest.raises(BundleError, match="bundle-missing"):
        store.read(item)


def test_items_come_by_host_and_then_by_name_with_all_that_lies_there(store: BundleStore) -> None:
    for name in (
        f"pc/{IDS[1]}.tar.zst", f"pc/{IDS[0]}.tar.zst", "pc/notes.txt", "pc/.hidden", f"pc-a/{IDS[2]}.tar.zst",
        f"Wrong Host/{IDS[3]}.tar.zst", f"{IDS[4]}.tar.zst", "README", ".git/config", "pc/folder/deep/x",
        f"pc/{IDS[0]}.status.json", "pc/x.status.json",
    ):  # fmt: skip
        lay(store, name, b"?")

    assert [(i.path, i.host_id, i.episode_id) for i in store.walk()] == [
        (f"{IDS[4]}.tar.zst", None, IDS[4]),
        (f"Wrong Host/{IDS[3]}.tar.zst", None, IDS[3]),
        (f"pc/{IDS[0]}.tar.zst", "pc", IDS[0]),
        (f"pc/{IDS[1]}.tar.zst", "pc", IDS[1]),
        ("pc/folder", "pc", None),
        ("pc/notes.txt", "pc", None),
        ("pc/x.status.json", "pc", None),
        (f"pc-a/{IDS[2]}.tar.zst", "pc-a", IDS[2]),
    ]


def test_reading_never_takes_more_than_a_bundle_may_hold(store: BundleStore) -> None:
    lay(store, "pc-a/large", bytes(limits.MAX_COMPRESSED_BYTES + 1))
    (item,) = store.walk()

    with pytest.raises(BundleError, match="compressed-size"):
        store.read(item)


def test_the_word_of_admission_lies_beside_the_bundle_and_is_no_item(store: BundleStore) -> None:
    store.put("pc-a", IDS[0], b"data")
    with store.receiving():
        assert not store.has_status("pc-a", IDS[0])
        store.write_status("pc-a", IDS[0], b"{}")

    assert store.has_status("pc-a", IDS[0])
    assert len(list(store.walk())) == 1


def test_a_store_knows_what_a_host_sent_and_when(store: BundleStore) -> None:
    store.put("pc-a", IDS[0], b"data")
    store.put("pc-a", IDS[1], b"more data")
    store.put("pc-ab", IDS[1], b"another's")

    held = store.list_arrivals("pc-a")

    assert sorted(size for _, size in held) == [4, 9]
    assert all(abs(at_s - time.time()) < 3600 for at_s, _ in held)


def test_a_store_goes_to_a_worker_as_its_name(store: BundleStore) -> None:
    store.put("pc-a", IDS[0], b"data")

    there = pickle.loads(pickle.dumps(store))  # noqa: S301

    assert list(there.walk()) == list(store.walk())


@pytest.mark.parametrize(
    ("host_id", "episode_id"),
    [("../x", IDS[0]), ("a", "../x"), ("a", "7"), ("A", IDS[0]), ("", IDS[0]), ("a\n", IDS[0])],
)
def test_ids_that_could_lead_elsewhere_are_refused(store: BundleStore, host_id: str, episode_id: str) -> None:
    for act in (store.receive, lambda h, e: store.put(h, e, b"x"), lambda h, e: store.write_status(h, e, b"x")):
        with pytest.raises(StoreError, match="is not a valid host_id/episode_id"):
            act(host_id, episode_id)


def test_a_bucket_that_is_not_there_is_one_clear_line(new_bucket: Callable[[], str]) -> None:
    new_bucket()
    store = open_store("s3://no-such-bucket/x")

    for act in (lambda: list(store.walk()), lambda: store.put("pc-a", IDS[0], b"x")):
        with pytest.raises(StoreError, match=r"s3://no-such-bucket/x: .*(check the bucket's name|no such bucket)"):
            act()


def test_a_place_is_a_folder_or_a_uri_of_a_known_kind(tmp_path: Path) -> None:
    assert isinstance(open_store(tmp_path), DiskStore)
    assert open_store(f"file://{tmp_path}").put("pc-a", IDS[0], b"x") == tmp_path / "pc-a" / f"{IDS[0]}.tar.zst"
    with pytest.raises(StoreError, match=r"name a folder, file:///folder or s3://bucket/prefix"):
        open_store("ftp://somewhere")
    with pytest.raises(StoreError, match="names no bucket"):
        open_store("s3://")


def test_a_folder_has_one_receiver_which_removes_what_an_earlier_one_left(tmp_path: Path) -> None:
    from phasewatch.errors import BusyError

    store = DiskStore(tmp_path)
    with store.receiving():
        store.receive("pc-a", IDS[0]).write(b"half")
        with pytest.raises(BusyError), DiskStore(tmp_path).receiving():
            pass
    assert len(store.list_temporaries()) == 1

    with store.receiving():
        assert store.list_temporaries() == ()


def test_old_leftovers_of_other_writers_go_and_young_ones_stay(tmp_path: Path) -> None:
    import os

    store = DiskStore(tmp_path)
    store.put("pc-a", IDS[0], b"data")
    for name, age_s in (("young", 10), ("old", 10_000)):
        path = tmp_path / "pc-a" / f".{name}.0123456789ab.tmp"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age_s,) * 2)

    assert store.remove_leftovers(older_than_s=3600) == 1
    assert store.list_temporaries() == ("pc-a/.young.0123456789ab.tmp",)


def test_items_of_both_kinds_are_one_type(store: BundleStore) -> None:
    store.put("pc-a", IDS[0], b"data")

    assert all(isinstance(item, StoreItem) for item in store.walk())
