"""Looking at what arrives: the same gates as in a sweep, in processes that a hostile bundle can only take with it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.builders import episode, episode_id, members_of
from tests.store.desks import Desk, headers_of

from phasewatch.episode.bundle import pack
from phasewatch.store.admission import Arrival, Judgement
from phasewatch.validate.admission import judge
from phasewatch.workers import map_ordered


def bundle(number: int = 1) -> bytes:
    whole = episode(number=number, host_id="pc-a")
    return pack(whole.manifest, members_of(whole), level=3)


def put(desk: Desk, data: bytes, number: int = 1) -> int:
    path = f"/v1/episodes/pc-a/{episode_id(number)}"
    return desk.ask("PUT", path, content=data, headers=headers_of(data)).status_code


def said(store: Path, number: int = 1) -> dict[str, object]:
    return dict(json.loads((store / "pc-a" / f"{episode_id(number)}.status.json").read_text()))


def test_a_sound_a_foreign_and_a_hostile_bundle_get_the_words_that_a_sweep_would_say(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "store", judge=judge)

    assert [put(desk, bundle(1), 1), put(desk, bundle(3), 2), put(desk, b"(\xb5/\xfd" + os.urandom(500), 3)] == [
        201
    ] * 3
    assert (said(tmp_path / "store", 1)["status"], said(tmp_path / "store", 1)["reasons"]) == ("accepted", [])
    assert (said(tmp_path / "store", 2)["status"], said(tmp_path / "store", 2)["reasons"]) == ("rejected", ["identity"])
    assert said(tmp_path / "store", 3)["status"] == "errored"


def kill_judge(arrival: Arrival) -> Judgement:
    """Stand for a bundle that breaks its reader; runs in a worker."""
    if arrival.data == b"hostile":
        os.kill(os.getpid(), signal.SIGKILL)
    return Judgement(status="accepted", reasons=(), detail="")


def judge_with_casualties(arrivals: Sequence[Arrival]) -> Iterator[Judgement]:
    for result in map_ordered(kill_judge, arrivals, workers=1, timeout_s=60):
        yield result.value or Judgement(status="errored", reasons=("worker-lost",), detail=result.error or "")


def test_a_bundle_that_kills_its_judge_costs_itself_alone(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "store", judge=judge_with_casualties, refuse=["errored"])

    assert [put(desk, b"hostile", 1), put(desk, b"sound", 2)] == [422, 201]
    assert [item.episode_id for item in desk.store.walk()] == [episode_id(2)]
