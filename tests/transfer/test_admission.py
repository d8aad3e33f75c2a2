"""Looking at what arrives: the same gates as in a sweep, in processes that a hostile bundle can only take with it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from tests.factories.bundles import episode, episode_id, members_of
from tests.factories.receivers import Desk, headers_of

from phasewatch.bundle.archive import pack_bundle, unpack_members
from phasewatch.bundle.container import compress_frame, join_members
from phasewatch.errors import MachineError
from phasewatch.parallel.pool import map_ordered
from phasewatch.store.local import DiskStore
from phasewatch.transfer.admission import (
    AdmissionQueue,
    AdmissionVerdict,
    ArrivalValidator,
    BundleArrival,
    validate_arrivals,
)
from phasewatch.types import BundleStatus
from phasewatch.validate.sweep import sweep


def bundle(number: int = 1) -> bytes:
    whole = episode(number=number, host_id="pc-a")
    return pack_bundle(whole.manifest, members_of(whole), level=3)


def put(desk: Desk, data: bytes, number: int = 1) -> int:
    path = f"/v1/episodes/pc-a/{episode_id(number)}"
    return desk.ask("PUT", path, content=data, headers=headers_of(data)).status_code


def said(store: Path, number: int = 1) -> dict[str, object]:
    return dict(json.loads((store / "pc-a" / f"{episode_id(number)}.status.json").read_text()))


def test_a_sound_a_foreign_and_a_hostile_bundle_get_the_words_that_a_sweep_would_say(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "store", judge=validate_arrivals)

    assert [put(desk, bundle(1), 1), put(desk, bundle(3), 2), put(desk, b"(\xb5/\xfd" + os.urandom(500), 3)] == [
        201
    ] * 3
    assert (said(tmp_path / "store", 1)["status"], said(tmp_path / "store", 1)["reasons"]) == ("accepted", [])
    assert (said(tmp_path / "store", 2)["status"], said(tmp_path / "store", 2)["reasons"]) == ("rejected", ["identity"])
    assert said(tmp_path / "store", 3)["status"] == "errored"


def kill_judge(arrival: BundleArrival) -> AdmissionVerdict:
    """Stand for a bundle that breaks its reader; runs in a worker."""
    if arrival.data == b"hostile bundle":
        os.kill(os.getpid(), signal.SIGKILL)
    return AdmissionVerdict(status="accepted", reasons=(), detail="")


def judge_with_casualties(arrivals: Sequence[BundleArrival]) -> Iterator[AdmissionVerdict]:
    for result in map_ordered(kill_judge, arrivals, workers=1, timeout_s=60):
        yield result.value or AdmissionVerdict(status="errored", reasons=("worker-lost",), detail=result.error or "")


def test_a_bundle_that_kills_its_judge_costs_itself_alone(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "store", judge=judge_with_casualties, refuse=["errored"])

    assert [put(desk, b"hostile bundle", 1), put(desk, b"sound bundle", 2)] == [422, 201]
    assert [item.episode_id for item in desk.store.walk()] == [episode_id(2)]


def stolen(number: int, host_id: str) -> bytes:
    """The telemetry of bundle 1 under another id and host."""
    original, claimed = episode(number=1, host_id="pc-a"), episode(number=number, host_id=host_id).manifest
    return pack_bundle(claimed, members_of(original), level=3)


def arrival(data: bytes, number: int, host_id: str = "pc-a") -> BundleArrival:
    return BundleArrival(host_id=host_id, episode_id=episode_id(number), sha256=sha256(data).hexdigest(), data=data)


def keep(store: DiskStore, came: BundleArrival, judgement: AdmissionVerdict) -> None:
    store.put(came.host_id, came.episode_id, came.data)
    with store.receiving():
        store.write_status(came.host_id, came.episode_id, judgement.render(digest=came.sha256))


def test_telemetry_that_came_before_is_refused_under_another_host(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    store.path.mkdir()
    honest, thief = arrival(bundle(1), 1), arrival(stolen(2, "a-evil"), 2, "a-evil")
    judging = ArrivalValidator(store)

    first, copy = judging([honest, thief])
    (again,) = judging([honest])

    assert (first.status, again.status) == ("accepted", "accepted")
    assert (copy.status, copy.reasons[0]) == ("rejected", "contested")
    keep(store, honest, first)
    (after_a_restart,) = ArrivalValidator(store)([thief])
    assert (after_a_restart.status, after_a_restart.reasons) == (copy.status, copy.reasons)


def test_a_copy_of_the_same_host_is_a_duplicate(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    store.path.mkdir()

    _, copy = ArrivalValidator(store)([arrival(bundle(1), 1), arrival(stolen(2, "pc-a"), 2)])

    assert (copy.status, copy.reasons) == ("rejected", ("duplicate",))


def test_what_the_receiver_accepted_first_is_what_a_sweep_keeps(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    store.path.mkdir()
    came = [arrival(bundle(1), 1), arrival(stolen(2, "a-evil"), 2, "a-evil")]
    for each, judgement in zip(came, ArrivalValidator(store)(came), strict=True):
        keep(store, each, judgement)

    verdicts = {v.host_id: v.status for v in sweep(store.path, tmp_path / "run", workers=1).verdicts}

    assert verdicts == {"pc-a": BundleStatus.ACCEPTED, "a-evil": BundleStatus.REJECTED}


def test_no_control_character_of_a_bundle_reaches_an_answer_or_a_status(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "store", judge=validate_arrivals, refuse=["rejected"])
    members = {name: bytes(view) for name, view in unpack_members(bundle(1), file="").items()}
    evil = members["manifest.json"].replace(b'"profile"', b'"\\u001b]0;owned\\u0007\\n\\u0000":1,"profile"', 1)
    data = compress_frame(join_members({**members, "manifest.json": evil}), level=3)

    refused = desk.ask("PUT", f"/v1/episodes/pc-a/{episode_id(1)}", content=data, headers=headers_of(data))
    judgement = next(validate_arrivals([arrival(data, 1)]))

    assert refused.status_code == 422
    assert refused.json()["detail"].isprintable()
    assert judgement.reasons[0] == "manifest-schema"
    assert judgement.detail.isprintable()
    assert "owned" in judgement.detail


def offer(host_id: str, number: int = 1) -> Callable[[], BundleArrival]:
    return lambda: BundleArrival(host_id=host_id, episode_id=episode_id(number), sha256="", data=b"a bundle")


class Blocked:
    """A judge that is held up by the bundles of one host until it is let go."""

    def __init__(self, host_id: str) -> None:
        self.host_id, self.go, self.judged = host_id, threading.Event(), 0

    def __call__(self, arrivals: Sequence[BundleArrival]) -> Iterator[AdmissionVerdict]:
        for each in arrivals:
            if each.host_id == self.host_id:
                self.go.wait(20)
            self.judged += 1
            yield AdmissionVerdict(status="accepted", reasons=(), detail=each.host_id)


def test_bundles_of_one_host_that_are_slow_to_judge_hold_up_no_other(tmp_path: Path) -> None:
    judge = Blocked("pc-bad")

    async def crowd() -> list[str]:
        gate = AdmissionQueue(judge)
        slow = [asyncio.create_task(gate.check_bundle("pc-bad", offer("pc-bad", n))) for n in range(1, 9)]
        await asyncio.sleep(0)
        honest = [await asyncio.wait_for(gate.check_bundle("pc-good", offer("pc-good", n)), 20) for n in range(1, 4)]
        assert not any(task.done() for task in slow)
        judge.go.set()
        await asyncio.gather(*slow)
        return [judgement.detail for judgement in honest]

    assert asyncio.run(crowd()) == ["pc-good"] * 3
    assert judge.judged == 11


def test_an_upload_that_is_cancelled_while_it_is_judged_leaves_the_others_their_answers() -> None:
    judge = Blocked("pc-a")

    async def crowd() -> list[str]:
        gate = AdmissionQueue(judge)
        tasks = [asyncio.create_task(gate.check_bundle("pc-a", offer("pc-a", n))) for n in range(1, 7)]
        while not gate.waiting:
            await asyncio.sleep(0.001)
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.sleep(0)
        judge.go.set()
        rest = await asyncio.wait_for(asyncio.gather(*tasks[2:]), 20)
        return [judgement.status for judgement in rest]

    assert asyncio.run(crowd()) == ["accepted"] * 4


def test_a_judge_that_fails_in_the_middle_fails_those_whom_it_did_not_answer() -> None:
    def judge(arrivals: Sequence[BundleArrival]) -> Iterator[AdmissionVerdict]:
        if len(arrivals) == 1:
            time.sleep(0.2)  # until the others wait together
            yield AdmissionVerdict(status="accepted", reasons=(), detail="")
            return
        yield AdmissionVerdict(status="degraded", reasons=(), detail="")
        raise MachineError("no process could be started")

    async def crowd() -> list[object]:
        gate = AdmissionQueue(judge)
        tasks = [gate.check_bundle("pc-a", offer("pc-a", n)) for n in range(1, 4)]
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)

    answers = asyncio.run(crowd())

    assert all(isinstance(each, AdmissionVerdict | MachineError) for each in answers)
