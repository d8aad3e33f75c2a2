"""The shipper: nothing leaves the outbox without a receipt for its very bytes, and nothing is lost on the way."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from tests.factories.progress import RecordedProgress
from tests.factories.receivers import IDS, TOKENS, Desk, headers_of, path_of

from phasewatch import atomic
from phasewatch.errors import BusyError, StoreError
from phasewatch.store.local import DiskStore, render_receipt
from phasewatch.transfer.shipper import (
    MAX_RETRY_WAIT_S,
    MIN_RETRY_WAIT_S,
    BundleShipper,
    ShipmentSummary,
    UploadOutcome,
    classify_status,
    parse_retry_after,
)

DATA = b"a bundle's bytes" * 100


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    for n in range(5):
        DiskStore(tmp_path / "outbox").put("pc-a" if n < 3 else "pc-b", IDS[n], DATA + b"%d" % n)
    return tmp_path / "outbox"


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


class Waits:
    """A clock that runs only while somebody sleeps."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)

    def now_s(self) -> float:
        return sum(self.slept)


def reply(status: int, content: bytes = b"", **headers: str) -> httpx.Response:
    return httpx.Response(status, headers=headers, stream=httpx.ByteStream(content))


Answer = Callable[[httpx.Request], httpx.Response]


def ship(
    outbox: Path, answer: Answer | Desk, *, patience_s: float = 100.0, waits: Waits | None = None, **options: object
) -> ShipmentSummary:
    transport = httpx.ASGITransport(answer.receiver.app) if isinstance(answer, Desk) else httpx.MockTransport(answer)
    clock = waits or Waits()

    async def run() -> ShipmentSummary:
        async with httpx.AsyncClient(transport=transport, base_url="http://store") as client:
            shipper = BundleShipper(
                outbox,
                client,
                TOKENS,
                patience_s=patience_s,
                rng=random.Random(0),
                sleep=clock.sleep,
                now_s=clock.now_s,
                **options,  # type: ignore[arg-type]
            )
            return await shipper.run()

    return asyncio.run(run())


def test_all_of_an_outbox_goes_to_the_store_and_then_to_sent(outbox: Path, tmp_path: Path) -> None:
    before, progress = names(outbox), RecordedProgress()

    done = ship(outbox, Desk(tmp_path / "store"), progress=progress)

    assert (done.sent, done.refused, done.left, done.blocked) == (5, [], [], {})
    assert names(outbox) == [f"sent/{name}" for name in before]
    assert names(tmp_path / "store") == before
    assert progress.updates[-1][:3] == ("ship", 5, 5)
    assert ship(outbox, Desk(tmp_path / "store")).sent == 0


@pytest.mark.parametrize(
    ("statuses", "fate"),
    [
        ((200, 201), UploadOutcome.ACKNOWLEDGED),
        ((400, 409, 411, 413, 415, 418, 422, 431), UploadOutcome.REFUSED),
        ((408, 425, 429, 500, 502, 503, 504, 507), UploadOutcome.RETRY),
        ((401, 403, 404, 405, 302, 204), UploadOutcome.BLOCKED),
    ],
)
def test_an_answer_says_what_becomes_of_the_bundle(statuses: tuple[int, ...], fate: UploadOutcome) -> None:
    assert {classify_status(status) for status in statuses} == {fate}


def test_a_poisoned_bundle_goes_to_refused_with_the_reason(outbox: Path, tmp_path: Path) -> None:
    desk = Desk(tmp_path / "store")
    desk.put(b"other bytes", 1)

    done = ship(outbox, desk)

    assert done.sent == 4
    assert done.refused == [(f"pc-a/{IDS[1]}.tar.zst", "409 the store holds other bytes under this id")]
    reason = outbox / "refused" / "pc-a" / f"{IDS[1]}.tar.zst.reason.json"
    assert json.loads(reason.read_text())["code"] == "409"
    assert (reason.with_name(f"{IDS[1]}.tar.zst")).read_bytes() == DATA + b"1"


def test_what_its_own_receipt_disowns_is_never_sent(outbox: Path, tmp_path: Path) -> None:
    (outbox / "pc-a" / f"{IDS[0]}.tar.zst").write_bytes(b"rotten")

    done = ship(outbox, Desk(tmp_path / "store"))

    assert (done.sent, [path for path, _ in done.refused]) == (4, [f"pc-a/{IDS[0]}.tar.zst"])
    assert (outbox / "refused" / "pc-a" / f"{IDS[0]}.tar.zst.sha256").exists()


def test_what_is_larger_than_a_bundle_is_refused_unread(outbox: Path, tmp_path: Path) -> None:
    path = outbox / "pc-a" / f"{IDS[0]}.tar.zst"
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    path.with_name(path.name + ".sha256").unlink()

    assert [path for path, _ in ship(outbox, Desk(tmp_path / "store")).refused] == [f"pc-a/{IDS[0]}.tar.zst"]


@pytest.mark.parametrize("odd", ["bundle", "receipt"])
def test_what_cannot_be_read_now_stays_in_the_outbox_and_holds_up_nobody(
    outbox: Path, tmp_path: Path, odd: str
) -> None:
    path = outbox / "pc-a" / f"{IDS[0]}.tar.zst"
    path = path if odd == "bundle" else path.with_name(path.name + ".sha256")
    path.unlink()
    path.mkdir()

    done = ship(outbox, Desk(tmp_path / "store"))

    assert (done.sent, done.refused, done.left) == (4, [], [f"pc-a/{IDS[0]}.tar.zst"])
    assert done.last_trouble


def test_a_receipt_for_other_bytes_is_no_acknowledgement(outbox: Path) -> None:
    before = names(outbox)

    def liar(request: httpx.Request) -> httpx.Response:
        name = request.url.path.rpartition("/")[2] + ".tar.zst"
        return reply(201, render_receipt("0" * 64, name))

    done = ship(outbox, liar)

    assert (done.sent, len(done.left)) == (0, 5)
    assert "names other bytes" in done.last_trouble
    assert names(outbox) == before


@pytest.mark.parametrize("text", [b"", b"\xff" * 200_000, b"OK", b"<html>"])
def test_what_is_no_receipt_is_no_acknowledgement(outbox: Path, text: bytes) -> None:
    assert ship(outbox, lambda request: reply(200, text)).sent == 0


@pytest.mark.parametrize(
    "text",
    [b"[" * 60_000, b"[]", b'"text"', b'{"detail": [', b"\xff\xfe", b'{"detail": "' + b"x" * 60_000 + b'"}'],
    ids=["brackets without end", "a list", "text", "half an object", "no text", "a novel"],
)
def test_a_refusal_in_any_words_stops_no_shipper_and_its_words_are_short(outbox: Path, text: bytes) -> None:
    done = ship(outbox, lambda request: reply(503, text), patience_s=10.0)

    assert (done.sent, len(done.left)) == (0, 5)
    assert done.last_trouble.startswith("503 ")
    assert len(done.last_trouble) <= 310


def test_a_wrong_token_or_address_moves_nothing_and_is_told_for_its_host(outbox: Path, tmp_path: Path) -> None:
    before = names(outbox)
    desk = Desk(tmp_path / "store", tokens={"pc-b": TOKENS["pc-b"], "pc-a": "another-token-than-ours"})

    done = ship(outbox, desk)

    assert (done.sent, done.blocked) == (2, {"pc-a": "401 no token, or an unknown one"})
    assert len(done.left) == 3
    assert [name for name in names(outbox) if name.startswith("pc-a")] == [n for n in before if n.startswith("pc-a")]


def test_a_host_without_a_token_waits_for_one(outbox: Path, tmp_path: Path) -> None:
    DiskStore(outbox).put("pc-c", IDS[9], DATA)

    done = ship(outbox, Desk(tmp_path / "store"))

    assert (done.sent, done.left) == (5, [f"pc-c/{IDS[9]}.tar.zst"])
    assert "add a line `pc-c: token`" in done.blocked["pc-c"]


def test_trouble_is_met_with_longer_and_longer_waits_spread_at_random(outbox: Path, tmp_path: Path) -> None:
    desk, waits = Desk(tmp_path / "store"), Waits()
    fails = 12

    def shaky(request: httpx.Request) -> httpx.Response:
        nonlocal fails
        if request.method == "PUT" and fails:
            fails -= 1
            if fails % 2:
                raise httpx.ConnectError("refused", request=request)
            return reply(503)
        answer = desk.ask(request.method, request.url.path, content=request.read(), headers=request.headers)
        return reply(answer.status_code, answer.content)

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:  # the desk runs a loop of its own
        done = ship(
            outbox, lambda request: thread.submit(shaky, request).result(), waits=waits, parallel=1, patience_s=1e6
        )

    assert done.sent == 5
    assert len(waits.slept) == 12
    assert all(0 <= s <= min(MAX_RETRY_WAIT_S, MIN_RETRY_WAIT_S * 2**n) for n, s in enumerate(waits.slept))
    assert len(set(waits.slept)) == 12


def test_the_receiver_may_ask_for_a_longer_wait(outbox: Path) -> None:
    waits = Waits()

    ship(outbox, lambda r: reply(429, **{"Retry-After": "40"}), waits=waits, parallel=1)

    assert min(waits.slept) >= 40


def test_an_answer_that_was_lost_is_asked_for_before_the_bundle_goes_again(outbox: Path) -> None:
    asked: list[str] = []
    kept: dict[str, str] = {}

    def forgetful(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        name = request.url.path.rpartition("/")[2] + ".tar.zst"
        if request.method == "PUT":
            kept[name] = sha256(request.read()).hexdigest()
            raise httpx.ReadError("cut", request=request)
        return reply(200, render_receipt(kept[name], name))

    assert ship(outbox, forgetful, parallel=1).sent == 5
    assert asked == ["PUT", "GET"] * 5


def test_patience_has_an_end_and_what_is_left_is_named(outbox: Path) -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("nobody listens", request=request)

    done = ship(outbox, away, patience_s=30.0)

    assert (done.sent, len(done.left), done.last_trouble) == (0, 5, "nobody listens")


def test_a_disk_that_fails_here_leaves_the_bundle_in_the_outbox(outbox: Path, tmp_path: Path) -> None:
    desk = Desk(tmp_path / "store")

    class Full(atomic.DiskOperations):
        def rename(self, source: Path, target: Path) -> None:
            if "sent" in target.parts:
                raise OSError(28, "No space left on device")
            super().rename(source, target)

    with atomic.use_disk_operations(Full()):
        done = ship(outbox, desk)

    assert (done.sent, len(done.left)) == (0, 5)
    assert ship(outbox, desk).sent == 5


def test_strange_things_are_told_and_left_alone(outbox: Path, tmp_path: Path) -> None:
    for name in ("pc-a/notes.txt", "Wrong Host/x.tar.zst", f"sent/{IDS[7]}.tar.zst", f"pc-a/{IDS[8]}.tar.zst.sha256"):
        (outbox / name).parent.mkdir(exist_ok=True)
        (outbox / name).write_bytes(b"?")

    done = ship(outbox, Desk(tmp_path / "store"))

    assert done.sent == 5
    assert sorted(done.strange) == [
        "Wrong Host/x.tar.zst",
        f"pc-a/{IDS[8]}.tar.zst",
        "pc-a/notes.txt",
        f"sent/{IDS[7]}.tar.zst",
    ]
    assert (outbox / "pc-a" / "notes.txt").exists()


def test_an_outbox_has_one_shipper_and_must_be_there(outbox: Path, tmp_path: Path) -> None:
    with atomic.lock(outbox / "sent"), pytest.raises(BusyError):
        ship(outbox, Desk(tmp_path / "store"))
    with pytest.raises(StoreError, match="no such outbox"):
        ship(tmp_path / "nowhere", Desk(tmp_path / "store"))


def test_a_recorder_is_followed_until_told_to_stop(outbox: Path, tmp_path: Path) -> None:
    desk, waits = Desk(tmp_path / "store"), Waits()

    async def run() -> ShipmentSummary:
        async with desk.client() as client:
            shipper = BundleShipper(outbox, client, TOKENS)
            task = asyncio.create_task(shipper.run(watch=True))
            await until(lambda: shipper.summary.sent == 5)
            await asyncio.to_thread(DiskStore(outbox).put, "pc-a", IDS[20], DATA)
            await until(lambda: shipper.summary.sent == 6)
            shipper.stop()
            return await task

    assert asyncio.run(run()).sent == 6
    assert waits.slept == []
    assert desk.ask("GET", path_of(20), headers=headers_of(b"")).status_code == 200


async def until(claim: Callable[[], bool]) -> None:
    for _ in range(2000):
        if claim():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


def watch_for(outbox: Path, answer: Answer, seconds: float) -> tuple[BundleShipper, list[str]]:
    """Follow an outbox for some time by a fake clock; return the shipper and the requests."""
    asked: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url}")
        return answer(request)

    async def run() -> BundleShipper:
        now_s = 0.0
        async with httpx.AsyncClient(transport=httpx.MockTransport(note), base_url="http://store") as client:

            async def poll(seconds: float) -> None:
                nonlocal now_s
                now_s += max(seconds, 20.0)  # few rounds, so that an hour is soon over
                if now_s > until_s:
                    shipper.stop()
                await asyncio.sleep(0)

            shipper = BundleShipper(
                outbox,
                client,
                TOKENS,
                rng=random.Random(0),
                sleep=poll,
                now_s=lambda: now_s,
            )
            await shipper.run(watch=True)
            return shipper

    until_s = seconds
    return asyncio.run(run()), asked


@pytest.mark.parametrize("status", [401, 403, 404, 405, 302, 307])
def test_a_wrong_token_or_address_is_retried_more_rarely_and_reported_once(
    outbox: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = names(outbox)
    location = {"Location": "http://elsewhere.example/"}

    shipper, asked = watch_for(outbox, lambda request: reply(status, **location), 3600.0)

    assert 2 < len(asked) < 100
    assert len(caplog.records) == 2
    assert [name for name in names(outbox) if name != "sent/.lock"] == before
    assert not any("elsewhere" in each for each in asked)
    assert len(shipper.summary.left) == 5


def test_a_token_that_becomes_good_again_ships_everything(outbox: Path) -> None:
    refusals = iter([401] * 4)

    def answer(request: httpx.Request) -> httpx.Response:
        if status := next(refusals, None):
            return reply(status)
        name = request.url.path.rpartition("/")[2] + ".tar.zst"
        if request.method == "GET":
            return reply(404)
        return reply(201, render_receipt(sha256(request.read()).hexdigest(), name))

    shipper, _ = watch_for(outbox, answer, 600.0)

    assert (shipper.summary.sent, shipper.summary.blocked) == (5, {})


def test_a_receiver_that_asks_for_an_hour_is_not_asked_within_it(outbox: Path) -> None:
    _, asked = watch_for(outbox, lambda request: reply(429, **{"Retry-After": "3600"}), 3000.0)

    assert len(asked) <= 2 * 4


def test_a_host_that_has_to_wait_holds_up_no_other(outbox: Path, tmp_path: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if "pc-a" in request.url.path:
            return reply(429, **{"Retry-After": "3600"})
        name = request.url.path.rpartition("/")[2] + ".tar.zst"
        return reply(201, render_receipt(sha256(request.read()).hexdigest(), name))

    done = ship(outbox, answer, parallel=1)

    assert (done.sent, len(done.left)) == (2, 3)
    assert done.last_trouble.startswith("429")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "9" * 400}, 86_400.0),
        ({"retry-after": "-7"}, 0.0),
        ({"retry-after": "soon"}, 0.0),
        ({}, 0.0),
        ({"retry-after": "٣"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT", "date": "Wed, 21 Oct 2015 07:27:00 GMT"}, 60.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT", "date": "Wed, 21 Oct 2015 07:29:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00", "date": "Wed, 21 Oct 2015 07:27:00 GMT"}, 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers: dict[str, str], seconds: float) -> None:
    assert parse_retry_after(headers) == seconds


def test_a_token_that_is_refused_on_asking_costs_no_upload(outbox: Path) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        if len(asked) == 1:
            raise httpx.ReadError("cut", request=request)
        return reply(401)

    done = ship(outbox, answer, parallel=1)

    assert done.blocked.keys() == {"pc-a", "pc-b"}
    assert asked == ["PUT", "GET", "PUT"]


def test_what_is_moved_away_is_written_in_a_thread(outbox: Path) -> None:
    loop_thread = threading.get_ident()

    class Here(atomic.DiskOperations):
        def rename(self, source: Path, target: Path) -> None:
            threads.add(threading.get_ident())
            super().rename(source, target)

    threads: set[int] = set()
    with atomic.use_disk_operations(Here()):
        done = ship(outbox, lambda request: reply(422))

    assert len(done.refused) == 5
    assert threads
    assert loop_thread not in threads
