"""The life of the alarms that a page shows: raised, acknowledged, silenced, ended; and what the intake tells pages."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.dashboard.test_hub import hub_of, seen_by

from phasewatch.dashboard.alarm_log import AlarmLog
from phasewatch.dashboard.history import MachineKey
from phasewatch.dashboard.intake import AlarmChangeRequest, EventIntake
from phasewatch.errors import UsageError
from phasewatch.events.schema import AlarmEvidence, EventEnvelope, PhaseEvent, TelemetryEvent
from phasewatch.models.alarm import AlarmKind

S = 1_000_000_000
KEY = MachineKey(run="live", vm="web", host="uuid-1")


def phase(at_s: int, alarm: bool, since_s: int | None = None, **more: Any) -> PhaseEvent:
    fields: dict[str, Any] = {"p": (0.2, 0.0, 0.8, 0.0, 0.0), "vm": "web", "host": "uuid-1", "activity_alarm": False}
    return PhaseEvent(
        t_start_ns=(at_s - 10) * S,
        t_end_ns=at_s * S,
        decision="infecting",
        alarm=alarm,
        alarm_since_ns=None if since_s is None else since_s * S,
        model="gbt",
        threat="realistic",
        **(fields | more),
    )


def test_alarm_is_raised_once_and_ends_with_its_machine_below_the_threshold() -> None:
    log = AlarmLog()
    evidence = (AlarmEvidence(channel="proc.cpu_user", value=1.0, usual=0.1, z=9.0),)

    changes = [
        log.add(KEY, data, is_replay=False)
        for data in (
            phase(20, False),
            phase(21, True, 21, evidence=evidence),
            phase(22, True, 21, p=(0.0, 0.0, 1.0, 0.0, 0.0)),
            phase(23, False),
            phase(24, False),
        )
    ]

    assert [len(change) for change in changes] == [0, 1, 0, 1, 0]
    (alarm,) = log.list_alarms()
    assert (alarm.kind, alarm.raised_ns, alarm.resolved_ns) == (AlarmKind.INFECTION, 21 * S, 23 * S)
    assert alarm.evidence == evidence
    assert alarm.p == 1.0


def test_both_alarms_of_a_machine_are_separate() -> None:
    log = AlarmLog()

    log.add(KEY, phase(20, True, 20, activity_alarm=True, activity_alarm_since_ns=19 * S), is_replay=False)
    log.add(KEY, phase(21, False, activity_alarm=True, activity_alarm_since_ns=19 * S), is_replay=False)

    assert log.find_open(KEY, AlarmKind.INFECTION) is None
    activity = log.find_open(KEY, AlarmKind.ACTIVITY)
    assert activity is not None
    assert activity.raised_ns == 19 * S


def test_alarm_that_is_raised_anew_between_two_events_is_another_one() -> None:
    log = AlarmLog()
    log.add(KEY, phase(20, True, 20), is_replay=False)

    ended, raised = log.add(KEY, phase(60, True, 55), is_replay=False)

    assert (ended.resolved_ns, raised.raised_ns) == (60 * S, 55 * S)


def test_open_alarm_outlives_ended_ones_in_a_full_log() -> None:
    log = AlarmLog(max_alarms=3)
    log.add(KEY, phase(1, True, 1), is_replay=False)
    for i in range(10):
        other = MachineKey(run="live", vm=f"vm-{i}", host="")
        log.add(other, phase(10 * i, True, 10 * i), is_replay=False)
        log.add(other, phase(10 * i + 5, False), is_replay=False)

    assert len(log.list_alarms()) == 3
    assert log.find_open(KEY, AlarmKind.INFECTION) is not None


def test_only_a_raised_alarm_of_a_watched_machine_can_be_acknowledged() -> None:
    log = AlarmLog()
    replay = MachineKey(run="demo", vm="web", host="")
    (replayed,) = log.add(replay, phase(20, True, 20), is_replay=True)
    (alarm,) = log.add(KEY, phase(20, True, 20), is_replay=False)

    assert log.acknowledge(alarm.id, now_ns=30 * S, by="ada", note="known").acknowledged_by == "ada"
    assert log.silence(alarm.id, until_ns=90 * S, reason="patch night").silenced_until_ns == 90 * S
    log.add(KEY, phase(40, False), is_replay=False)
    for other in (alarm.id, replayed.id, "nothing"):
        with pytest.raises(UsageError):
            log.acknowledge(other, now_ns=50 * S, by="", note="")


def test_replay_that_begins_again_does_not_fill_the_log() -> None:
    log = AlarmLog()
    replay = MachineKey(run="demo", vm="pc", host="")
    for _ in range(5):
        log.add(replay, phase(20, True, 20), is_replay=True)
        log.add(replay, phase(30, False), is_replay=True)

    assert len(log.list_alarms()) == 1


def wrap(data: PhaseEvent | TelemetryEvent, run: str = "live") -> EventEnvelope:
    return EventEnvelope(id="1", t_wall_ns=S, run=run, data=data)


def telemetry(i: int) -> TelemetryEvent:
    return TelemetryEvent(
        vm="web",
        host="uuid-1",
        origin="live",
        t0_ns=i * S // 2,
        bin_s=0.5,
        channels=("proc.cpu_user",),
        values=((float(i),),),
        flags=(0,),
    )


def test_telemetry_is_kept_and_pages_only_hear_that_the_machine_is_there() -> None:
    intake = EventIntake(hub_of(), now_ns=lambda: 10 * S)

    for i in range(100):
        intake.publish(wrap(telemetry(i)))
    intake.publish(wrap(phase(60, True, 60)))

    found = seen_by(intake.hub, None, 3)
    assert [kind for kind, _, _ in found] == ["hello", "seen", "phase", "alarm"]
    assert found[1][2]["data"] == {"vm": "web", "host": "uuid-1", "origin": "live"}
    assert found[3][2]["alarm"]["raised_ms"] == 60_000  # type: ignore[index]


def test_state_for_a_new_page_has_machines_and_alarms() -> None:
    intake = EventIntake(hub_of(), now_ns=lambda: 10 * S)
    intake.publish(wrap(telemetry(0)))
    intake.publish(wrap(phase(60, True, 60)))
    (alarm,) = intake.alarms.list_alarms()

    asyncio.run(intake.change_alarm(AlarmChangeRequest(id=alarm.id, silence_minutes=2, note="known")))

    state = json.loads(intake.render_state())
    assert [entry["kind"] for entry in state["events"]] == ["seen", "phase"]
    assert [(a["vm"], a["silenced_until_ms"], a["silence_reason"]) for a in state["alarms"]] == [
        ("web", 130_000, "known")
    ]
    assert state["id"] == f"aa.{intake.hub.number}"
