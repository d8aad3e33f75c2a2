"""What the watch of many VMs shows: a table once, then changes, a summary a minute, and VMs that ended for good."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from phasewatch.cli.fleet_view import EndedVms, FleetView
from phasewatch.events.schema import EventEnvelope, PhaseEvent
from phasewatch.live.fleet_member import MemberStatus, MemberStatusKind

K = MemberStatusKind


@dataclass
class Screen:
    """The printed lines, and a clock that a test sets."""

    now_s: float = 0.0
    lines: list[str] = field(default_factory=list)

    def read(self) -> float:
        return self.now_s

    def take(self) -> str:
        text = "\n".join(self.lines)
        self.lines.clear()
        return text


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def view(screen: Screen) -> FleetView:
    return FleetView(screen.lines.append, screen.read)


def status(name: str, kind: MemberStatusKind, **changes: object) -> MemberStatus:
    fields = {"name": name, "host": name, "pid": sum(name.encode()), "kind": kind}
    return MemberStatus(**{**fields, **changes})  # type: ignore[arg-type]


def phase(vm: str, decision: str = "clean", *, alarm: bool = False, changes: tuple[str, ...] = ()) -> EventEnvelope:
    data = PhaseEvent(
        vm=vm,
        host=vm,
        t_start_ns=10**18,
        t_end_ns=10**18 + 10**10,
        p=(1.0, 0.0, 0.0, 0.0, 0.0),
        decision=decision,
        alarm=alarm,
        alarm_changes=changes,
        model="gbt",
        threat="proc",
        table="raw",
        filter="none",
        latency_ms=1.0,
    )
    return EventEnvelope(id=f"{vm}/1", t_wall_ns=1, run="live", data=data)


def test_the_table_comes_when_all_vms_are_attached_or_refused(view: FleetView, screen: Screen) -> None:
    view.add_status(status("a", K.ATTACHING))
    view.add_status(status("b", K.ATTACHING))
    view.add_status(status("a", K.WATCHED, threat="portable"))
    assert screen.lines == []

    view.add_status(status("b", K.NOT_WATCHED, reason="no permission"))
    shown = screen.take()

    assert "portable" in shown
    assert "no permission" in shown
    assert "1 of 2 VMs watched" in shown


def test_a_vm_that_cannot_be_attached_does_not_hold_the_table_up(view: FleetView, screen: Screen) -> None:
    view.add_status(status("a", K.WATCHED))
    screen.take()
    view = FleetView(screen.lines.append, screen.read)
    view.add_status(status("hung", K.ATTACHING))
    view.add_status(status("a", K.ATTACHING))
    view.add_status(status("a", K.WATCHED))
    screen.now_s = 6.0
    view.add_event(phase("a"), False)

    assert "hung" in screen.take()


def test_changes_are_shown_once_each(view: FleetView, screen: Screen) -> None:
    view.add_status(status("a", K.WATCHED))
    screen.take()
    view.add_status(status("a", K.WATCHED))
    view.add_status(status("a", K.NOT_WATCHED, reason="it broke"))
    view.add_status(status("a", K.GONE))
    view.add_event(phase("b", alarm=True, changes=("infection",)), True)

    lines = screen.take().splitlines()
    assert len(lines) == 3
    assert "it broke" in lines[0]
    assert "infection" in lines[2]


def test_a_summary_comes_each_minute_and_names_the_alarms(view: FleetView, screen: Screen) -> None:
    view.add_status(status("a", K.WATCHED))
    screen.take()
    view.add_event(phase("a", "infecting", alarm=True), False)
    assert screen.lines == []

    screen.now_s = 61.0
    view.add_event(phase("a", "infecting", alarm=True), False)

    shown = screen.take()
    assert "1 infecting" in shown
    assert "alarm: a" in shown


def test_a_vm_has_ended_when_it_has_not_come_back_for_a_minute(screen: Screen) -> None:
    ended = EndedVms(screen.lines.append, screen.read)
    ended.add_status(status("stays away", K.GONE))
    ended.add_status(status("restarts", K.GONE))
    screen.now_s = 30.0
    ended.add_status(replace(status("restarts", K.ATTACHING), pid=5))
    ended.report_due()
    assert screen.lines == []

    screen.now_s = 61.0
    ended.report_due()
    ended.report_due()

    assert screen.lines == ["stays away"]
