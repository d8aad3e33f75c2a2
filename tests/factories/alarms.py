"""Phase events, alarms and changes for tests of the outputs."""

from __future__ import annotations

from typing import Any

from phasewatch.alarms.life import Alarm, AlarmBook, AlarmChange, Silence
from phasewatch.events.schema import EventEnvelope, PhaseEvent

S = 1_000_000_000
T0_NS = 1_800_000_000 * S


def phase_event(at_s: float = 0, **changes: Any) -> PhaseEvent:
    """Build the event of a window that ends `at_s` seconds after `T0_NS`, with some fields changed."""
    fields: dict[str, Any] = {
        "vm": "web01",
        "host": "web01",
        "t_start_ns": T0_NS + round((at_s - 10) * S),
        "t_end_ns": T0_NS + round(at_s * S),
        "p": (0.1, 0.0, 0.8, 0.1, 0.0),
        "decision": "infecting",
        "alarm": True,
        "alarm_since_ns": None,
        "activity_alarm": False,
        "model": "gbt",
        "threat": "realistic",
        "latency_ms": 1004.0,
    }
    return PhaseEvent(**fields | changes)


def envelope(at_s: float = 0, **changes: Any) -> EventEnvelope:
    """Build such an event in its envelope."""
    data = phase_event(at_s, **changes)
    return EventEnvelope(id=f"{data.vm}/{round(at_s)}", t_wall_ns=data.t_end_ns, run="live", data=data)


def raised(**changes: Any) -> AlarmChange:
    """Build the change that raises an alarm."""
    (change,) = AlarmBook().add_window(phase_event(**changes), T0_NS)
    return change


def life(*, alarm: Alarm | None = None, **changes: Any) -> tuple[AlarmChange, AlarmChange]:
    """Build the two changes that raise and resolve an alarm."""
    book = AlarmBook()
    (first,) = book.add_window(phase_event(**changes), T0_NS)
    (last,) = book.add_window(phase_event(20, **changes | {"alarm": False}), T0_NS + 20 * S)
    return first, last


def silence_of(**changes: Any) -> Silence:
    """Build a silence of all alarms of ``web*`` for an hour, with some fields changed."""
    fields: dict[str, Any] = {
        "id": "51",
        "vm": "web*",
        "kind": None,
        "from_ns": T0_NS,
        "until_ns": T0_NS + 3600 * S,
        "reason": "backup",
        "by": "ann",
    }
    return Silence(**fields | changes)
