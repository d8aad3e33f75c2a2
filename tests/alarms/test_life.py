"""The life of an alarm: raised once, acknowledged, silenced for a time, resolved; continued over a restart."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasewatch.alarms.life import (
    MAX_OPEN_ALARMS,
    Alarm,
    AlarmBook,
    AlarmChange,
    AlarmResolution,
    AlarmStatus,
    Silence,
    find_silence,
)
from phasewatch.events.schema import PhaseEvent
from phasewatch.models.alarm import AlarmKind

S = 1_000_000_000


def window(at_s: float, *, alarm: bool | None = False, activity: bool | None = False, **changes: Any) -> PhaseEvent:
    fields: dict[str, Any] = {
        "vm": "web01",
        "host": "web01",
        "t_start_ns": round((at_s - 10) * S),
        "t_end_ns": round(at_s * S),
        "p": (0.1, 0.0, 0.8, 0.1, 0.0),
        "decision": "infecting",
        "alarm": alarm,
        "activity_alarm": activity,
        "model": "gbt",
        "threat": "realistic",
    }
    return PhaseEvent(**fields | changes)


def silence(*, vm: str = "web*", kind: AlarmKind | None = None, from_s: float = 0, until_s: float = 1000) -> Silence:
    return Silence(
        id="5", vm=vm, kind=kind, from_ns=round(from_s * S), until_ns=round(until_s * S), reason="backup", by="ann"
    )


def follow(book: AlarmBook, states: str, *, from_s: int = 100, vm: str = "web01") -> list[AlarmChange]:
    """Pass one window a second: ``!`` with the infection alarm on, ``.`` with it off, ``?`` with none."""
    meaning = {"!": True, ".": False, "?": None}
    return [
        change
        for second, state in enumerate(states, from_s)
        for change in book.add_window(window(second, alarm=meaning[state], vm=vm, host=vm), second * S)
    ]


def kinds_of(changes: list[AlarmChange]) -> list[str]:
    return [str(change.kind) for change in changes]


def test_an_alarm_is_raised_once_and_resolved_once() -> None:
    changes = follow(AlarmBook(), "..!!!!..")

    assert kinds_of(changes) == ["raised", "resolved"]
    assert changes[1].alarm.resolution is AlarmResolution.PROBABILITY
    assert (changes[0].alarm.raised_ns, changes[1].alarm.seen_ns) == (102 * S, 105 * S)


def test_both_kinds_of_a_vm_and_each_vm_have_an_alarm_of_their_own() -> None:
    book = AlarmBook()

    book.add_window(window(100, alarm=True, activity=True), 100 * S)
    follow(book, "!", vm="db01")

    assert [(a.vm, a.kind) for a in book.open_alarms] == [
        ("web01", AlarmKind.INFECTION),
        ("web01", AlarmKind.ACTIVITY),
        ("db01", AlarmKind.INFECTION),
    ]


def test_two_vms_with_one_name_are_told_apart_by_their_identity() -> None:
    book = AlarmBook()

    for host in ("web01-aa", "web01-bb"):
        book.add_window(window(100, alarm=True, host=host), 100 * S)

    assert len({alarm.id for alarm in book.open_alarms}) == 2


def test_a_model_without_an_alarm_neither_raises_nor_resolves() -> None:
    book = AlarmBook()

    assert kinds_of(follow(book, "?!??")) == ["raised"]
    assert len(book.open_alarms) == 1


def test_an_acknowledged_alarm_stays_open_and_is_acknowledged_once() -> None:
    book = AlarmBook()
    (raised,) = follow(book, "!")

    first = book.acknowledge(raised.alarm.id, 101 * S, by="ann", note="looking")
    again = book.acknowledge(raised.alarm.id, 102 * S, by="bob")

    assert (kinds_of(first), again) == (["acknowledged"], [])
    assert [(a.status, a.acknowledged_by, a.note) for a in book.open_alarms] == [
        (AlarmStatus.ACKNOWLEDGED, "ann", "looking")
    ]
    assert kinds_of(follow(book, ".")) == ["resolved"]


def test_an_alarm_under_a_silence_is_recorded_and_not_announced() -> None:
    book = AlarmBook()
    book.apply_silences([silence()], 0)

    changes = follow(book, "!.")

    assert [(c.kind, c.is_silenced, c.is_announced) for c in changes] == [
        ("raised", True, False),
        ("resolved", True, False),
    ]


def test_an_alarm_that_outlives_its_silence_is_announced_then() -> None:
    book, quiet = AlarmBook(), silence(until_s=200)
    book.apply_silences([quiet], 0)
    follow(book, "!")

    before, after = book.apply_silences([quiet], 199 * S), book.apply_silences([quiet], 200 * S)

    assert before == []
    assert [(str(c.kind), c.is_announced) for c in after] == [("unsilenced", True)]
    assert [c.is_announced for c in follow(book, ".", from_s=201)] == [True]


def test_a_silence_after_the_announcement_announces_nothing_a_second_time() -> None:
    book = AlarmBook()
    follow(book, "!")

    silenced = book.apply_silences([silence(until_s=200)], 101 * S)
    unsilenced = book.apply_silences([], 102 * S)

    assert [(str(c.kind), c.is_announced) for c in silenced + unsilenced] == [
        ("silenced", False),
        ("unsilenced", False),
    ]


def test_a_silence_covers_a_glob_of_names_one_kind_and_its_time() -> None:
    (raised,) = follow(AlarmBook(), "!")
    alarm = raised.alarm

    assert silence(vm="web0?").covers(alarm, 100 * S)
    assert not silence(vm="db*").covers(alarm, 100 * S)
    assert not silence(kind=AlarmKind.ACTIVITY).covers(alarm, 100 * S)
    assert not silence(from_s=101).covers(alarm, 100 * S)
    assert not silence(until_s=100).covers(alarm, 100 * S)
    assert find_silence(alarm, [silence(until_s=300), silence(until_s=500)], 100 * S) == silence(until_s=500)


def test_a_restarted_watch_continues_an_open_alarm() -> None:
    first = AlarmBook()
    (raised,) = follow(first, "!")

    second = AlarmBook(first.open_alarms, now_ns=200 * S)

    assert follow(second, "........!!!", from_s=200) == []
    assert [alarm.id for alarm in second.open_alarms] == [raised.alarm.id]


def test_after_a_restart_an_alarm_ends_when_it_was_off_for_half_a_minute() -> None:
    first = AlarmBook()
    follow(first, "!")
    second = AlarmBook(first.open_alarms, now_ns=200 * S)

    changes = follow(second, "." * 40, from_s=200)

    assert [(str(c.kind), c.at_ns // S, c.is_announced) for c in changes] == [("resolved", 230, True)]


def test_an_alarm_whose_silence_ended_between_two_watches_is_announced_by_the_second() -> None:
    first = AlarmBook()
    first.apply_silences([silence(until_s=150)], 0)
    follow(first, "!")
    second = AlarmBook(first.open_alarms, (), now_ns=200 * S)

    assert [(str(c.kind), c.is_announced) for c in second.apply_silences([], 200 * S)] == [("unsilenced", True)]


def test_the_alarms_of_a_vm_that_ended_are_resolved_as_such() -> None:
    book = AlarmBook()
    follow(book, "!")
    follow(book, "!", vm="db01")

    changes = book.end_vm("web01", 101 * S)

    assert [(c.alarm.vm, c.alarm.resolution) for c in changes] == [("web01", AlarmResolution.VM_GONE)]
    assert [alarm.vm for alarm in book.open_alarms] == ["db01"]


def test_an_alarm_that_nobody_watches_any_more_is_resolved_as_stale() -> None:
    book = AlarmBook()
    follow(book, "!")

    assert book.end_stale(160 * S, older_than_ns=60 * S) == []
    assert [c.alarm.resolution for c in book.end_stale(161 * S, older_than_ns=60 * S)] == [AlarmResolution.STALE]


def test_the_number_of_open_alarms_is_bounded_and_the_rest_counted() -> None:
    book = AlarmBook()

    for number in range(MAX_OPEN_ALARMS + 3):
        book.add_window(window(100, alarm=True, host=f"vm{number}"), 100 * S)

    assert (len(book.open_alarms), book.dropped) == (MAX_OPEN_ALARMS, 3)


@pytest.mark.parametrize("restart_at", [None, 5, 20])
@given(states=st.text("!.?", max_size=80))
def test_raised_and_resolved_alternate_for_any_sequence(restart_at: int | None, states: str) -> None:
    book, changes = AlarmBook(), []
    for second, state in enumerate(states):
        if second == restart_at:
            book = AlarmBook(book.open_alarms, now_ns=second * S)
        changes += follow(book, state, from_s=second + 100)

    kinds = kinds_of(changes)
    assert kinds == ["raised", "resolved"] * (len(kinds) // 2) + ["raised"] * (len(kinds) % 2)
    assert [alarm.is_open for alarm in book.open_alarms] == [True] * (len(kinds) % 2)
    assert all(isinstance(change.alarm, Alarm) and change.is_announced for change in changes)
