"""Receive the events of all producers: keep the history, follow the alarms, and stream the rest to the pages.

Telemetry is kept and not streamed, so a page costs the same for one machine and for hundreds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Annotated, Protocol

import msgspec

from phasewatch.dashboard.alarm_log import AlarmLog, LoggedAlarm
from phasewatch.dashboard.history import LIVE_RUN, MachineHistory, MachineKey, build_machine_key
from phasewatch.dashboard.hub import EventHub
from phasewatch.events.schema import EventEnvelope, PhaseEvent, TelemetryEvent

__all__ = ["AlarmChangeRequest", "AlarmKeeper", "EventIntake", "EventProducer", "describe_alarm"]

_SEEN_INTERVAL_NS = 2_000_000_000  # between two messages that a machine without predictions sends telemetry

_MAX_SILENCE_MINUTES = 7 * 24 * 60

ShortText = Annotated[str, msgspec.Meta(max_length=600)]


class AlarmChangeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a person does with an alarm on the page.

    Attributes:
        id: Id of the alarm.
        silence_minutes: How long its machine's alarms of this kind are silenced; 0 acknowledges the alarm instead.
        note: Note or reason.
        by: Name of the person, as they give it.
    """

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    silence_minutes: Annotated[int, msgspec.Meta(ge=0, le=_MAX_SILENCE_MINUTES)] = 0
    note: ShortText = ""
    by: Annotated[str, msgspec.Meta(max_length=80)] = ""


class AlarmKeeper(Protocol):
    """The alarm history of a state folder; its methods block and raise `PhasewatchError`."""

    def read(self) -> tuple[LoggedAlarm, ...]:
        """Return its alarms with the silences that cover them, newest first."""

    def change(self, request: AlarmChangeRequest, alarm: LoggedAlarm) -> None:
        """Acknowledge or silence one of its alarms."""


class EventIntake:
    """Receiver of the events; call its methods in the event loop of the hub.

    Args:
        hub: Streams to the pages.
        now_ns: Wall clock, nanoseconds since the epoch.
        keeper: Alarm history of a state folder; None without one.
    """

    def __init__(self, hub: EventHub, *, now_ns: Callable[[], int], keeper: AlarmKeeper | None = None) -> None:
        self.hub = hub
        self.history = MachineHistory()
        self.alarms = AlarmLog()
        self._keeper = keeper
        self._kept: dict[str, LoggedAlarm] = {}  # alarms of the state folder by id
        self._now_ns = now_ns
        self._told_ns: dict[MachineKey, int] = {}  # newest message about each machine

    @property
    def backlog(self) -> int:
        """Number of events that the slowest viewer has not received yet."""
        return self.hub.backlog

    def publish(self, event: EventEnvelope) -> None:
        """Publish an event."""
        key = build_machine_key(event)
        if key is None:
            self.hub.publish(event)
            return
        now_ns = self._now_ns()
        is_new = self.history.add(key, event, now_ns=now_ns)
        for gone in self.history.pop_forgotten():
            self._told_ns.pop(gone, None)
            self.hub.forget((kind, *_build_scene(gone)) for kind in ("seen", "phase"))
        if is_new or (
            isinstance(event.data, TelemetryEvent) and now_ns - self._told_ns.get(key, 0) > _SEEN_INTERVAL_NS
        ):
            self._told_ns[key] = now_ns
            origin = self.history.get_origin(key)
            fields = {"run": key.run, "data": {"vm": key.vm, "host": key.host, "origin": origin}}
            self.hub.publish_note("seen", fields, scene=_build_scene(key))
        if isinstance(event.data, PhaseEvent):
            self._told_ns[key] = now_ns
            self.hub.publish(event)
            for alarm in self.alarms.add(key, event.data, is_replay=self._is_replay(key)):
                if alarm.id not in self._kept:
                    self.publish_alarm(alarm)

    def publish_alarm(self, alarm: LoggedAlarm) -> None:
        """Notify the pages that an alarm has changed."""
        self.hub.publish_note("alarm", {"alarm": describe_alarm(alarm)})

    def list_alarms(self) -> list[LoggedAlarm]:
        """Return the alarms of this process and of the state folder, newest first.

        An alarm in the state folder has its whole life there, and its evidence here.
        """
        own = {alarm.id: alarm for alarm in self.alarms.list_alarms()}
        return sorted((own | self._kept).values(), key=lambda alarm: -alarm.raised_ns)

    async def change_alarm(self, request: AlarmChangeRequest) -> None:
        """Acknowledge or silence a raised alarm, in the state folder if that has it.

        Raises:
            PhasewatchError: If there is no such raised alarm, or the state folder cannot be written.
        """
        kept = self._kept.get(request.id)
        if kept is not None and self._keeper is not None:
            await asyncio.to_thread(self._keeper.change, request, kept)
            await self.refresh_kept()
            return
        now_ns = self._now_ns()
        if request.silence_minutes:
            until_ns = now_ns + request.silence_minutes * 60_000_000_000
            changed = self.alarms.silence(request.id, until_ns=until_ns, reason=request.note)
        else:
            changed = self.alarms.acknowledge(request.id, now_ns=now_ns, by=request.by, note=request.note)
        self.publish_alarm(changed)

    async def refresh_kept(self) -> None:
        """Read the alarm history of the state folder, and tell the pages what has changed.

        Raises:
            PhasewatchError: If it cannot be read.
        """
        if self._keeper is None:
            return
        read = await asyncio.to_thread(self._keeper.read)
        before, self._kept = self._kept, {}
        for alarm in read:
            own = self.alarms.get(alarm.id)
            kept = alarm if own is None else replace(alarm, evidence=own.evidence, p=max(own.p, alarm.p))
            self._kept[alarm.id] = kept
            if kept != before.get(alarm.id):
                self.publish_alarm(kept)

    def render_state(self) -> bytes:
        """Render what a page needs at its start: the newest event of each scene, and the alarms, as JSON."""
        newest_id, lines = self.hub.snapshot()
        state = {
            "id": newest_id,
            "t_wall_ns": self._now_ns(),
            "events": [
                {"kind": kind, "received_ms": received_ms, "event": msgspec.Raw(line)}
                for kind, received_ms, line in lines
            ],
            "alarms": [describe_alarm(alarm) for alarm in self.list_alarms()],
        }
        return msgspec.json.encode(state)

    def _is_replay(self, key: MachineKey) -> bool:
        origin = self.history.get_origin(key)
        return key.run != LIVE_RUN if origin is None else origin != LIVE_RUN


EventProducer = Callable[[EventIntake], Awaitable[None]]  # publishes until it is cancelled


def describe_alarm(alarm: LoggedAlarm) -> dict[str, object]:
    """Return an alarm as the page gets it."""
    return {
        "id": alarm.id,
        "run": alarm.key.run,
        "vm": alarm.key.vm,
        "host": alarm.key.host,
        "kind": str(alarm.kind),
        "raised_ms": alarm.raised_ns / 1e6,
        "resolved_ms": None if alarm.resolved_ns is None else alarm.resolved_ns / 1e6,
        "resolution": alarm.resolution,
        "acknowledged_ms": None if alarm.acknowledged_ns is None else alarm.acknowledged_ns / 1e6,
        "acknowledged_by": alarm.acknowledged_by,
        "note": alarm.note,
        "silenced_until_ms": None if alarm.silenced_until_ns is None else alarm.silenced_until_ns / 1e6,
        "silence_reason": alarm.silence_reason,
        "p": round(alarm.p, 4),
        "decision": alarm.decision,
        "evidence": alarm.evidence,
        "is_kept": alarm.is_kept,
        "is_replay": alarm.is_replay,
    }


def _build_scene(key: MachineKey) -> tuple[str, ...]:
    return key.run, key.vm, key.host
