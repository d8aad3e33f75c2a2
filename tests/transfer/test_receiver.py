"""What the receiver answers, to whom, and what then stands in the store."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from tests.factories.receivers import IDS, ROOMY, TOKENS, Desk, headers_of, path_of, piece, scope_of

from phasewatch import atomic
from phasewatch.errors import BusyError, MachineError, StoreReplacedError
from phasewatch.store.base import BundleStore
from phasewatch.store.local import DiskStore
from phasewatch.store.quota import MIN_CHARGE_BYTES, FreeFiles
from phasewatch.transfer.admission import AdmissionVerdict, BundleArrival
from phasewatch.transfer.receiver import RECEIPT_HEADER, render_content_digest

DATA = b"a bundle's bytes" * 100
DIGEST = sha256(DATA).hexdigest()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "store")


def stored(desk: Desk) -> dict[str, bytes]:
    return {item.path: desk.store.read(item) for item in desk.store.walk()}


def test_a_bundle_is_acknowledged_with_the_receipt_that_stands_beside_it(store: BundleStore) -> None:
    desk = Desk(store)

    answer = desk.put(DATA)

    assert (answer.status_code, answer.text) == (201, f"{DIGEST}  {IDS[0]}.tar.zst\n")
    assert answer.headers[RECEIPT_HEADER] == render_content_digest(DIGEST)
    assert stored(desk) == {f"pc-a/{IDS[0]}.tar.zst": DATA}
    assert [item.receipt for item in store.walk()] == [DIGEST]


def test_the_same_bytes_again_are_200_and_other_bytes_409(store: BundleStore) -> None:
    desk = Desk(store)
    desk.put(DATA)

    assert desk.put(DATA).status_code == 200
    assert desk.put(b"other bytes").status_code == 409
    assert stored(desk) == {f"pc-a/{IDS[0]}.tar.zst": DATA}


def test_other_bytes_are_409_also_where_no_receipt_tells_it_beforehand(desk: Desk) -> None:
    desk.put(DATA)
    (desk.store.path / "pc-a" / f"{IDS[0]}.tar.zst.sha256").unlink()  # type: ignore[attr-defined]

    assert desk.put(b"other bytes").status_code == 409
    assert desk.put(DATA).status_code == 200
    assert [item.receipt for item in desk.store.walk()] == [DIGEST]


def test_a_large_bundle_goes_to_the_disk_in_pieces(desk: Desk) -> None:
    data = bytes(range(256)) * 4000

    assert desk.put(data).status_code == 201
    assert stored(desk) == {f"pc-a/{IDS[0]}.tar.zst": data}


def test_get_and_head_give_the_receipt_and_404_without_one(desk: Desk) -> None:
    mine = headers_of(b"")
    assert desk.ask("GET", path_of(), headers=mine).status_code == 404
    desk.put(DATA)

    got, head = (desk.ask(method, path_of(), headers=mine) for method in ("GET", "HEAD"))

    assert (got.status_code, got.text) == (200, f"{DIGEST}  {IDS[0]}.tar.zst\n")
    assert head.status_code == 200
    assert head.headers[RECEIPT_HEADER] == got.headers[RECEIPT_HEADER] == render_content_digest(DIGEST)


@pytest.mark.parametrize("spoil", ["receipt", "bundle"])
def test_what_is_not_whole_has_no_receipt_to_give(desk: Desk, spoil: str) -> None:
    desk.put(DATA)
    bundle = desk.store.path / "pc-a" / f"{IDS[0]}.tar.zst"  # type: ignore[attr-defined]
    if spoil == "bundle":
        bundle.unlink()
    else:
        bundle.with_name(bundle.name + ".sha256").write_text("nonsense")

    assert desk.ask("GET", path_of(), headers=headers_of(b"")).status_code == 404
    assert desk.put(DATA).status_code in (200, 201)
    assert desk.ask("GET", path_of(), headers=headers_of(b"")).status_code == 200


REFUSED: dict[str, tuple[str, str, dict[str, str | None], int]] = {
    "no token": ("PUT", path_of(), {"Authorization": None}, 401),
    "an unknown token": ("PUT", path_of(), {"Authorization": "Bearer token-of-nobody"}, 401),
    "a token in another scheme": ("PUT", path_of(), {"Authorization": f"Basic {TOKENS['pc-a']}"}, 401),
    "another host": ("PUT", path_of(0, "pc-b"), {}, 403),
    "another host's receipt": ("GET", path_of(0, "pc-b"), {}, 403),
    "a host_id that leads up": ("PUT", f"/v1/episodes/..%2f..%2fetc/{IDS[0]}", {}, 404),
    "a host_id of two dots": ("PUT", f"/v1/episodes/%2e%2e/{IDS[0]}", {}, 404),
    "an episode_id that leads up": ("PUT", "/v1/episodes/pc-a/..%2fx", {}, 404),
    "an episode_id with a newline": ("PUT", f"/v1/episodes/pc-a/{IDS[0]}%0a", {}, 404),
    "an episode_id that is none": ("PUT", "/v1/episodes/pc-a/7", {}, 404),
    "an unknown path": ("GET", "/v2/episodes", {}, 404),
    "a path with a slash too many": ("GET", "/healthz/", {}, 404),
    "another method": ("DELETE", path_of(), {}, 405),
    "no digest": ("PUT", path_of(), {"Content-Digest": None}, 400),
    "a digest of another kind": ("PUT", path_of(), {"Content-Digest": "md5=:xxx:"}, 400),
    "a digest that is no base64": ("PUT", path_of(), {"Content-Digest": "sha-256=:????:"}, 400),
    "two digests": ("PUT", path_of(), {"Content-Digest": ", ".join(2 * [render_content_digest(DIGEST)])}, 400),
    "a wrong digest": ("PUT", path_of(), {"Content-Digest": render_content_digest("0" * 64)}, 400),
    "no length": ("PUT", path_of(), {"Content-Length": None}, 411),
    "a length that is no number": ("PUT", path_of(), {"Content-Length": "-5"}, 411),
    "too large, by its header": ("PUT", path_of(), {"Content-Length": str((16 << 20) + 1)}, 413),
    "far too large": ("PUT", path_of(), {"Content-Length": "9" * 4000}, 413),
    "compressed on the way": ("PUT", path_of(), {"Content-Encoding": "gzip"}, 415),
}


@pytest.mark.parametrize(("method", "path", "headers", "status"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_taken_is_refused_in_words_and_leaves_nothing(
    desk: Desk, method: str, path: str, headers: dict[str, str | None], status: int
) -> None:
    given = {**headers_of(DATA), "Content-Length": str(len(DATA)), **headers}

    async def body() -> object:
        yield DATA

    answer = desk.ask(method, path, content=body(), headers={k: v for k, v in given.items() if v is not None})

    assert answer.status_code == status
    assert answer.json()["status"] == status
    assert answer.json()["detail"]
    assert list(desk.store.walk()) == []
    assert desk.store.list_temporaries() == ()  # type: ignore[attr-defined]
    assert [record["status"] for record in desk.log] == [status]


def test_other_digests_beside_the_sha256_are_passed_over(desk: Desk) -> None:
    digest = f"md5=:AAAA:, {render_content_digest(DIGEST)};x=1"

    assert desk.put(DATA, **{"Content-Digest": digest}).status_code == 201


def test_no_token_no_query_and_no_body_is_ever_logged(desk: Desk) -> None:
    desk.ask("PUT", path_of() + "?token=secret-in-a-query", content=DATA, headers=headers_of(DATA))
    desk.ask("GET", path_of(), headers={"Authorization": "Bearer secret-guess"})
    desk.ask("GET", "/nowhere?secret=1", headers=headers_of(b""))

    said = json.dumps(desk.log)
    assert [record["status"] for record in desk.log] == [201, 401, 404]
    assert {"host", "bytes", "path", "ms"} <= set(desk.log[0])
    assert not any(word in said for word in ("secret", *TOKENS.values(), "bundle's bytes"))


def test_a_server_that_hands_on_more_than_was_announced_is_cut(desk: Desk) -> None:
    scope = scope_of(**headers_of(DATA), **{"Content-Length": "10"})

    sent = desk.feed(scope, [piece(b"12345"), piece(b"678901")])

    assert sent[0]["status"] == 413
    assert desk.store.list_temporaries() == ()  # type: ignore[attr-defined]


def test_a_body_that_ends_early_is_refused(desk: Desk) -> None:
    sent = desk.feed(scope_of(**headers_of(DATA), **{"Content-Length": "10"}), [piece(b"12345", more=False)])

    assert sent[0]["status"] == 400


def test_a_client_that_goes_away_leaves_nothing_but_a_line_in_the_log(desk: Desk) -> None:
    desk.feed(scope_of(**headers_of(DATA), **{"Content-Length": "10"}), [piece(b"12345")])

    assert list(desk.store.walk()) == []
    assert desk.store.list_temporaries() == ()  # type: ignore[attr-defined]
    assert [(record["status"], record["why"]) for record in desk.log] == [(499, "the client closed the connection")]


@pytest.mark.parametrize(
    ("bounds", "messages"),
    [
        (replace(ROOMY, read_timeout_s=0.02), [piece(b"1"), 5.0]),
        (replace(ROOMY, grace_s=0.02, min_bytes_per_s=10**9), [piece(b"1"), 0.02, piece(b"2"), 0.02, piece(b"3")]),
    ],
    ids=["silent for too long", "too slow on the whole"],
)
def test_a_slow_body_is_timed_out(tmp_path: Path, bounds: object, messages: list[object]) -> None:
    desk = Desk(tmp_path / "store", bounds=bounds)  # type: ignore[arg-type]

    sent = desk.feed(scope_of(**headers_of(DATA), **{"Content-Length": "10"}), messages)  # type: ignore[arg-type]

    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert desk.store.list_temporaries() == ()  # type: ignore[attr-defined]


class Slow(atomic.DiskOperations):
    """A disk that takes longer over one of its calls than a body has."""

    def __init__(self, call: str) -> None:
        self._call = call
        self.done: list[str] = []

    def _dawdle(self, call: str) -> None:
        if call == self._call:
            time.sleep(0.5)
        self.done.append(call)

    def open(self, path: Path) -> int:
        fd = super().open(path)
        self._dawdle("open")
        return fd

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self._dawdle("write")
        return super().write(fd, data)

    def close(self, fd: int) -> None:
        self.done.append("close")
        super().close(fd)


@pytest.mark.parametrize("call", ["open", "write"])
def test_a_body_whose_time_is_up_while_the_disk_writes_it_is_dropped_only_then(tmp_path: Path, call: str) -> None:
    desk = Desk(tmp_path / "store", bounds=replace(ROOMY, grace_s=0.2, min_bytes_per_s=10**9))
    half = bytes(3 << 19)  # more than is held back before it is written
    scope = scope_of(**headers_of(half), **{"Content-Length": str(2 * len(half))})

    with atomic.use_disk_operations(disk := Slow(call)):
        sent = desk.feed(scope, [piece(half), piece(half)])

    assert sent[0]["status"] == 408
    assert disk.done == ["open", "write", "close"]
    assert desk.store.list_temporaries() == ()  # type: ignore[attr-defined]


def test_no_room_is_said_before_the_body(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "store", bounds=replace(ROOMY, min_free_bytes=1 << 62))

    sent = desk.feed(scope_of(**headers_of(DATA), **{"Content-Length": str(len(DATA))}), [])

    assert sent[0]["status"] == 507
    assert (b"retry-after", b"60") in sent[0]["headers"]
    assert desk.ask("GET", "/healthz").status_code == 503


def test_a_quota_outlives_the_process(tmp_path: Path) -> None:
    bounds = replace(ROOMY, quota_bytes=3 * MIN_CHARGE_BYTES)
    first = Desk(tmp_path / "store", bounds=bounds)
    assert [first.put(DATA, n).status_code for n in range(2)] == [201, 201]

    again = Desk(tmp_path / "store", bounds=bounds)

    assert [again.put(DATA, n).status_code for n in (0, 2, 3)] == [200, 201, 429]
    assert int(again.put(DATA, 4).headers["Retry-After"]) > 80_000


def test_an_upload_that_ends_while_another_looks_at_what_the_host_sent_counts_against_the_quota(tmp_path: Path) -> None:
    looks, stored_one = iter(range(9)), threading.Event()

    class Lagging(DiskStore):
        def held(self, host_id: str) -> list[tuple[float, int]]:
            found = super().list_arrivals(host_id)
            if next(looks) == 1:
                stored_one.wait(20)
            return found

    desk = Desk(Lagging(tmp_path / "store"), bounds=replace(ROOMY, quota_bytes=2 * MIN_CHARGE_BYTES))

    async def crowd() -> list[int]:
        async with desk.client() as client:

            async def put(number: int) -> int:
                answer = await client.put(path_of(number), content=DATA, headers=headers_of(DATA))
                stored_one.set()
                return answer.status_code

            return [*await asyncio.gather(put(0), put(1)), await put(2)]

    assert asyncio.run(crowd()) == [201, 201, 429]


def test_uploads_at_a_time_are_bounded_in_all_and_for_each_host(tmp_path: Path) -> None:
    async def crowd(desk: Desk, senders: Sequence[str]) -> list[int]:
        gate = asyncio.Event()

        async def slow_body() -> object:
            yield DATA[:10]
            await gate.wait()
            yield DATA[10:]

        async def put(client: object, number: int, host_id: str) -> int:
            headers = headers_of(DATA, token=TOKENS[host_id], **{"Content-Length": str(len(DATA))})
            answer = await client.put(path_of(number, host_id), content=slow_body(), headers=headers)  # type: ignore[attr-defined]
            return int(answer.status_code)

        async with desk.client() as client:
            tasks = [asyncio.create_task(put(client, n, host_id)) for n, host_id in enumerate(senders)]
            done, _ = await asyncio.wait(tasks, timeout=5, return_when=asyncio.FIRST_COMPLETED)
            assert done
            gate.set()
            return [await task for task in tasks]

    one_host = Desk(tmp_path / "one", bounds=replace(ROOMY, in_flight_per_host=2))
    in_all = Desk(tmp_path / "all", bounds=replace(ROOMY, in_flight=2))

    assert sorted(asyncio.run(crowd(one_host, ["pc-a", "pc-a", "pc-a", "pc-b"]))) == [201, 201, 201, 429]
    assert sorted(asyncio.run(crowd(in_all, ["pc-a", "pc-b", "pc-b"]))) == [201, 201, 503]


class Broken(atomic.DiskOperations):
    """A disk that fails at every fsync."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fsync(self, fd: int) -> None:
        raise OSError(self._number, "injected")


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EIO, 500)])
def test_a_disk_that_fails_acknowledges_nothing(desk: Desk, number: int, status: int) -> None:
    desk.put(DATA, 1)
    with atomic.use_disk_operations(Broken(number)):
        answer = desk.put(DATA, 0)

    assert answer.status_code == status
    assert desk.put(DATA, 0).status_code == 201


def test_a_store_that_is_out_of_reach_is_said_and_not_told_in_detail(desk: Desk) -> None:
    class Away(DiskStore):
        def find(self, host_id: str, episode_id: str) -> None:
            raise MachineError("s3://secret-bucket cannot be reached")

        def free_bytes(self) -> int:
            raise OSError(errno.EIO, "injected")

    away = Desk(Away(desk.store.path))  # type: ignore[attr-defined]

    answer = away.put(DATA)

    assert (answer.status_code, answer.json()["detail"]) == (500, "the store failed")
    assert "secret-bucket" in away.log[0]["detail"]
    assert away.ask("GET", "/healthz").json() == {"status": "the store is out of reach", "in_flight": 0}


def test_health_needs_no_token(desk: Desk) -> None:
    assert desk.ask("GET", "/healthz").json() == {"status": "ok", "in_flight": 0}


def says(status: str) -> Callable[[Sequence[BundleArrival]], Iterator[AdmissionVerdict]]:
    return lambda arrivals: iter(
        [
            AdmissionVerdict(status=status, reasons=("code",), detail=f"{a.host_id}: {len(a.data)} bytes")
            for a in arrivals
        ]
    )


def test_with_a_judge_each_bundle_gets_its_word_beside_it_and_a_bad_one_is_kept_as_evidence(store: BundleStore) -> None:
    desk = Desk(store, judge=says("errored"))

    assert desk.put(DATA).status_code == 201
    assert store.has_status("pc-a", IDS[0])
    assert len(stored(desk)) == 1
    assert desk.log[0]["judged"] == "errored"


def test_the_word_is_the_judges_in_json(tmp_path: Path) -> None:
    Desk(tmp_path / "store", judge=says("degraded")).put(DATA)

    said = json.loads((tmp_path / "store" / "pc-a" / f"{IDS[0]}.status.json").read_text())

    assert said == {
        "status": "degraded", "reasons": ["code"], "detail": f"pc-a: {len(DATA)} bytes", "sha256": DIGEST,
    }  # fmt: skip


def test_by_policy_a_bad_bundle_is_refused_and_not_stored(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "store", judge=says("errored"), refuse=["errored"])

    answer = desk.put(DATA)

    assert (answer.status_code, answer.json()["detail"]) == (422, f"errored: code: pc-a: {len(DATA)} bytes")
    assert list(desk.store.walk()) == []


def test_a_bundle_is_judged_once_also_if_it_came_before_there_was_a_judge(tmp_path: Path) -> None:
    Desk(tmp_path / "store").put(DATA)
    calls: list[int] = []

    def judge(arrivals: Sequence[BundleArrival]) -> Iterator[AdmissionVerdict]:
        calls.append(len(arrivals))
        return says("accepted")(arrivals)

    desk = Desk(tmp_path / "store", judge=judge)

    assert [desk.put(DATA).status_code for _ in range(3)] == [200, 200, 200]
    assert calls == [1]


def test_a_judge_that_cannot_work_loses_nothing_and_acknowledges_nothing(tmp_path: Path) -> None:
    def judge(arrivals: Sequence[BundleArrival]) -> Iterator[AdmissionVerdict]:
        raise MachineError("no process could be started")

    desk = Desk(tmp_path / "store", judge=judge)

    assert desk.put(DATA).status_code == 500
    assert list(desk.store.walk()) == []
    assert desk.store.list_temporaries() == ()  # type: ignore[attr-defined]


def test_bundles_that_come_together_are_judged_together(tmp_path: Path) -> None:
    sizes: list[int] = []

    def judge(arrivals: Sequence[BundleArrival]) -> Iterator[AdmissionVerdict]:
        sizes.append(len(arrivals))
        until = time.monotonic() + 20
        while len(sizes) == 1 and len(arrivals) + gate.waiting < 4 and time.monotonic() < until:
            time.sleep(0.001)  # the first takes its time, until as many wait as have a place
        return says("accepted")(arrivals)

    desk = Desk(tmp_path / "store", judge=judge)
    gate = desk.receiver._admission
    assert gate is not None

    async def crowd() -> list[int]:
        async with desk.client() as client:
            puts = [client.put(path_of(n), content=DATA, headers=headers_of(DATA)) for n in range(8)]
            return [answer.status_code for answer in await asyncio.gather(*puts)]

    assert asyncio.run(crowd()) == [201] * 8
    assert sum(sizes) == 8
    assert 1 < max(sizes) <= 4


def test_many_senders_of_one_id_get_one_201_and_one_bundle_stands(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "store")
    bodies = [b"%d" % (n % 3) * 5000 for n in range(12)]

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda data: desk.put(data).status_code, bodies))

    (winner,) = stored(desk).values()
    assert answers.count(201) == 1
    assert [status in (200, 201) for status in answers] == [data == winner for data in bodies]


def test_old_leftovers_go_while_it_runs_and_a_fault_in_that_stops_nothing(tmp_path: Path) -> None:
    import os

    looked = 0

    class Shaky(DiskStore):
        def remove_leftovers(self, *, older_than_s: float) -> int:
            nonlocal looked
            looked += 1
            if looked == 1:
                raise OSError(errno.EIO, "injected")
            return super().remove_leftovers(older_than_s=older_than_s)

    desk = Desk(Shaky(tmp_path / "store"), tidy_s=0.001)
    (tmp_path / "store" / "pc-a").mkdir()
    old = tmp_path / "store" / "pc-a" / ".x.0123456789ab.tmp"
    old.write_bytes(b"half")
    os.utime(old, (time.time() - 10**6,) * 2)

    async def live() -> None:
        messages: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        sent: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        app = asyncio.create_task(desk.receiver.app({"type": "lifespan"}, messages.get, sent.put))  # type: ignore[arg-type]
        await messages.put({"type": "lifespan.startup"})
        assert (await sent.get())["type"] == "lifespan.startup.complete"
        while looked < 3:
            await asyncio.sleep(0.001)
        await messages.put({"type": "lifespan.shutdown"})
        assert (await sent.get())["type"] == "lifespan.shutdown.complete"
        await app

    asyncio.run(asyncio.wait_for(live(), 30))

    assert not old.exists()


@pytest.mark.parametrize("size", [0, 1, 8])
def test_a_body_that_is_too_short_for_a_bundle_is_refused_and_nothing_is_kept(desk: Desk, size: int) -> None:
    answer = desk.put(b"x" * size)

    assert answer.status_code == 400
    assert not (desk.store.path / "pc-a").exists()  # type: ignore[attr-defined]


def test_a_small_bundle_costs_its_host_what_it_takes_of_the_disk(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "store", bounds=replace(ROOMY, quota_bytes=2 * MIN_CHARGE_BYTES))

    assert [desk.put(b"%09d" % n, n).status_code for n in range(3)] == [201, 201, 429]
    assert desk.put(b"%09d" % 0, 0).status_code == 200  # what stands there already costs nothing


def test_the_bundles_of_one_host_a_day_are_bounded_and_others_go_on(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "store", bounds=replace(ROOMY, quota_bundles=3))
    again = Desk(tmp_path / "store", bounds=replace(ROOMY, quota_bundles=3))

    assert [desk.put(DATA, n).status_code for n in range(4)] == [201, 201, 201, 429]
    assert again.put(DATA, 5).status_code == 429
    other = headers_of(DATA, token=TOKENS["pc-b"])
    assert again.ask("PUT", path_of(6, "pc-b"), content=DATA, headers=other).status_code == 201


class Crowded(DiskStore):
    """A store on a disk with few free inodes."""

    files: FreeFiles | None = FreeFiles(free=100, total=1_000_000)

    def free_files(self) -> FreeFiles | None:
        return self.files


def test_a_disk_with_few_free_inodes_takes_nothing_and_says_so(tmp_path: Path) -> None:
    desk = Desk(Crowded(tmp_path / "store"))

    answer, health = desk.put(DATA), desk.ask("GET", "/healthz")

    assert (answer.status_code, answer.headers["Retry-After"]) == (507, "60")
    assert (health.status_code, health.json()["status"]) == (503, "no room")


@pytest.mark.parametrize("files", [None, FreeFiles(free=100, total=1000)], ids=["unknown", "of a small disk"])
def test_free_inodes_that_nobody_knows_or_a_small_disk_still_has_are_room(
    tmp_path: Path, files: FreeFiles | None
) -> None:
    store = Crowded(tmp_path / "store")
    store.files = files

    assert Desk(store).put(DATA).status_code == 201


def put_elsewhere(store: Path, how: str) -> None:
    """Do to a store's folder what an unmounted disk does."""
    store.rename(store.with_name("away"))
    if how == "an empty folder":
        store.mkdir()
    if how == "another store":
        (store / ".incoming").mkdir(parents=True)
        (store / ".incoming" / ".lock").touch()


@pytest.mark.parametrize("how", ["an empty folder", "no folder", "another store"])
@pytest.mark.parametrize("size", [1600, 3 << 19], ids=["small", "large"])
def test_a_store_that_is_not_in_its_place_takes_nothing_and_says_so(tmp_path: Path, how: str, size: int) -> None:
    path, data = tmp_path / "store", bytes(size)
    desk = Desk(path)
    with desk.store.receiving():
        assert desk.put(data, 0).status_code == 201
        put_elsewhere(path, how)

        answers = [desk.put(data, 1), desk.ask("GET", path_of(0), headers=headers_of(b""))]
        health = desk.ask("GET", "/healthz")

        assert [answer.status_code for answer in answers] == [503, 503]
        assert health.status_code == 503
        assert health.json()["status"] != "ok"
        assert [each.name for each in path.glob("*") if each.name != ".incoming"] == []
        with pytest.raises(StoreReplacedError, match="mount its disk again"):
            desk.store.check_location()


def test_a_store_that_leaves_its_place_during_an_upload_acknowledges_nothing(tmp_path: Path) -> None:
    desk, half = Desk(tmp_path / "store"), bytes(3 << 19)

    class Leaving(list[object]):
        """Messages of a body, between which the store's disk is unmounted."""

        def __iter__(self) -> Iterator[object]:
            return iter([piece(half), 0.2, piece(half, more=False)])

    with desk.store.receiving():
        timer = threading.Timer(0.1, put_elsewhere, (tmp_path / "store", "an empty folder"))
        timer.start()
        sent = desk.feed(
            scope_of(**headers_of(2 * half), **{"Content-Length": str(2 * len(half))}),
            Leaving(),  # type: ignore[arg-type]
        )
        timer.join()

    assert sent[0]["status"] == 503
    assert list((tmp_path / "store").iterdir()) == []


def test_a_second_receiver_into_the_place_of_an_unmounted_store_is_refused(tmp_path: Path) -> None:
    path, link = tmp_path / "store", tmp_path / "link"
    path.mkdir()
    link.symlink_to(path)
    with DiskStore(link).receiving():
        put_elsewhere(path, "an empty folder")
        for place in (path, link):
            with pytest.raises(BusyError, match="another process is receiving here"), DiskStore(place).receiving():
                pass
    with DiskStore(path).receiving():
        pass


def test_refused_bundles_cost_their_host_quota_and_in_the_end_its_turn(tmp_path: Path) -> None:
    bounds = replace(ROOMY, quota_bytes=2 * MIN_CHARGE_BYTES)
    by_quota = Desk(tmp_path / "one", bounds=bounds, judge=says("errored"), refuse=["errored"])
    by_number = Desk(tmp_path / "two", judge=says("errored"), refuse=["errored"])

    assert [by_quota.put(DATA, n).status_code for n in range(3)] == [422, 422, 429]
    answers = [by_number.put(DATA, n % 60) for n in range(70)]
    assert [answer.status_code for answer in answers[:60]] == [422] * 60
    assert answers[-1].status_code == 429
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 60
    other = headers_of(DATA, token=TOKENS["pc-b"])
    assert by_number.ask("PUT", path_of(6, "pc-b"), content=DATA, headers=other).status_code == 422


def test_bodies_that_are_not_what_their_digest_says_count_as_refused(desk: Desk) -> None:
    wrong = {"Content-Digest": render_content_digest("0" * 64)}

    assert [desk.put(DATA, 0, **wrong).status_code for _ in range(70)][-1] == 429


def test_many_who_ask_for_health_ask_the_disk_once(tmp_path: Path) -> None:
    asked = 0

    class Counting(DiskStore):
        def free_bytes(self) -> int:
            nonlocal asked
            asked += 1
            time.sleep(0.05)
            return super().free_bytes()

    desk = Desk(Counting(tmp_path / "store"))

    async def crowd() -> list[int]:
        async with desk.client() as client:
            return [a.status_code for a in await asyncio.gather(*(client.get("/healthz") for _ in range(50)))]

    assert asyncio.run(crowd()) == [200] * 50
    assert asked < 5


def test_a_log_that_cannot_be_written_stops_no_upload(desk: Desk) -> None:
    def broken(record: dict[str, object]) -> None:
        raise OSError(errno.EPIPE, "injected")

    desk.receiver._log = broken

    assert desk.put(DATA).status_code == 201
