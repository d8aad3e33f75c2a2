"""The alarm history of a state folder on the page: read beside the watch, acknowledged and silenced from the page."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tests.dashboard.test_alarm_log import phase, wrap
from tests.dashboard.test_hub import hub_of

from phasewatch.alarms.history import AlarmHistory, read_alarms, read_silences
from phasewatch.alarms.life import AlarmBook
from phasewatch.dashboard.alarm_keeper import StateFolderAlarms
from phasewatch.dashboard.intake import AlarmChangeRequest, EventIntake
from phasewatch.errors import UsageError
from phasewatch.events.schema import AlarmEvidence

S = 1_000_000_000
NOW_NS = 100 * S


def intake_of(state: Path) -> EventIntake:
    return EventIntake(hub_of(), now_ns=lambda: NOW_NS, keeper=StateFolderAlarms(state, now_ns=lambda: NOW_NS))


def watch_raises(state: Path, *, vm: str = "web") -> str:
    """Record a raised alarm as the watch does; return its id."""
    changes = AlarmBook().add_window(phase(60, True, 60, vm=vm), 60 * S)
    with AlarmHistory(state) as history:
        history.record(changes)
    return changes[0].alarm.id


def alarms_of(intake: EventIntake) -> list[dict[str, Any]]:
    return list(json.loads(intake.render_state())["alarms"])


def test_alarm_of_the_events_and_of_the_folder_is_one_and_keeps_its_evidence(tmp_path: Path) -> None:
    alarm_id = watch_raises(tmp_path)
    intake = intake_of(tmp_path)
    evidence = (AlarmEvidence(channel="proc.cpu_user", value=1.0, usual=0.1, z=9.0),)

    intake.publish(wrap(phase(60, True, 60, evidence=evidence)))
    asyncio.run(intake.refresh_kept())

    (alarm,) = alarms_of(intake)
    assert (alarm["id"], alarm["is_kept"]) == (alarm_id, True)
    assert [e["channel"] for e in alarm["evidence"]] == ["proc.cpu_user"]


def test_acknowledgement_on_the_page_is_kept_in_the_folder(tmp_path: Path) -> None:
    alarm_id = watch_raises(tmp_path)
    intake = intake_of(tmp_path)

    async def act() -> None:
        await intake.refresh_kept()
        await intake.change_alarm(AlarmChangeRequest(id=alarm_id, by="ada", note="known"))

    asyncio.run(act())

    assert [(a.acknowledged_by, a.note) for a in read_alarms(tmp_path)] == [("ada", "known")]
    assert alarms_of(intake)[0]["acknowledged_by"] == "ada"


def test_silence_on_the_page_covers_this_machine_alone_whatever_its_name(tmp_path: Path) -> None:
    alarm_id = watch_raises(tmp_path, vm="web*")
    intake = intake_of(tmp_path)

    async def act() -> None:
        await intake.refresh_kept()
        await intake.change_alarm(AlarmChangeRequest(id=alarm_id, silence_minutes=10, note="patch night"))

    asyncio.run(act())

    (silence,) = read_silences(tmp_path, now_ns=NOW_NS)
    assert silence.until_ns == NOW_NS + 600 * S
    assert alarms_of(intake)[0]["silence_reason"] == "patch night"
    other = AlarmBook().add_window(phase(60, True, 60, vm="web-2", host="uuid-2"), 60 * S)[0].alarm
    assert not silence.covers(other, NOW_NS)


def test_change_of_another_process_is_told_to_the_pages_once(tmp_path: Path) -> None:
    alarm_id = watch_raises(tmp_path)
    intake = intake_of(tmp_path)
    asyncio.run(intake.refresh_kept())
    before = intake.hub.number

    with AlarmHistory(tmp_path) as history:
        history.acknowledge(alarm_id, NOW_NS, by="ann")
    for _ in range(3):
        asyncio.run(intake.refresh_kept())

    assert intake.hub.number == before + 1
    assert alarms_of(intake)[0]["acknowledged_by"] == "ann"


def test_alarm_that_is_acknowledged_already_is_not_acknowledged_again(tmp_path: Path) -> None:
    alarm_id = watch_raises(tmp_path)
    intake = intake_of(tmp_path)

    async def act() -> None:
        await intake.refresh_kept()
        for _ in range(2):
            await intake.change_alarm(AlarmChangeRequest(id=alarm_id))

    with pytest.raises(UsageError):
        asyncio.run(act())


def test_folder_without_a_history_shows_the_alarms_of_the_events(tmp_path: Path) -> None:
    intake = intake_of(tmp_path)

    intake.publish(wrap(phase(60, True, 60)))
    asyncio.run(intake.refresh_kept())

    assert [alarm["is_kept"] for alarm in alarms_of(intake)] == [False]
    assert list(tmp_path.iterdir()) == []
