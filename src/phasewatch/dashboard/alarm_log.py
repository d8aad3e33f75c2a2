"""Follow the last alarms: raised, acknowledged, silenced, resolved (pure)."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace

from phasewatch.dashboard.history import LIVE_RUN, MachineKey
from phasewatch.errors import UsageError
from phasewatch.events.schema import AlarmEvidence, PhaseEvent
from phasewatch.models.alarm import AlarmKind

__all__ = ["MAX_ALARMS", "AlarmLog", "LoggedAlarm"]

MAX_ALARMS = 500
_REPLACED = "raised again"
_ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedAlarm:
    """One alarm as the page gets it; times in nanoseconds since the epoch, of the host or of the recording.

    Attributes:
        id: Id of the alarm in its log.
        key: Its machine.
        kind: ``infection`` or ``activity``.
        raised_ns, resolved_ns: When it was raised, and when it ended; None while it is raised.
        resolution: Why it ended; empty while it is raised.
        acknowledged_ns, acknowledged_by, note: The acknowledgement; None and empty without one.
        silenced_until_ns, silence_reason: End and reason of the silence that covers it; None and empty without one.
        p: Largest probability of infecting (infection) or of infecting and active (activity) since it was raised.
        decision: Predicted phase when it was raised.
        evidence: Channels that moved most when it was raised.
        is_kept: Whether the alarm history of the state folder has it; the others end with this process.
        is_replay: Whether it was raised in a replay, where nothing can be acknowledged.
    """

    id: str
    key: MachineKey
    kind: AlarmKind
    raised_ns: int
    resolved_ns: int | None = None
    resolution: str = ""
    acknowledged_ns: int | None = None
    acknowledged_by: str = ""
    note: str = ""
    silenced_until_ns: int | None = None
    silence_reason: str = ""
    p: float = 0.0
    decision: str = ""
    evidence: tuple[AlarmEvidence, ...] = ()
    is_kept: bool = False
    is_replay: bool = False


class AlarmLog:
    """The alarms that the events of this process show, newest last, bounded."""

    def __init__(self, max_alarms: int = MAX_ALARMS) -> None:
        self._max_alarms = max_alarms
        self._alarms: OrderedDict[str, LoggedAlarm] = OrderedDict()
        self._open: dict[tuple[MachineKey, AlarmKind], str] = {}

    def list_alarms(self) -> tuple[LoggedAlarm, ...]:
        """Return all alarms, the oldest first."""
        return tuple(self._alarms.values())

    def get(self, alarm_id: str) -> LoggedAlarm | None:
        """Return an alarm, or None if it is not in the log."""
        return self._alarms.get(alarm_id)

    def find_open(self, key: MachineKey, kind: AlarmKind) -> LoggedAlarm | None:
        """Return the raised alarm of a machine, or None."""
        alarm_id = self._open.get((key, kind))
        return None if alarm_id is None else self._alarms.get(alarm_id)

    def add(self, key: MachineKey, data: PhaseEvent, *, is_replay: bool) -> tuple[LoggedAlarm, ...]:
        """Follow the alarms of a machine; return those that were raised or have ended with this event."""
        states = (
            (AlarmKind.INFECTION, data.alarm, data.alarm_since_ns, data.p[2]),
            (AlarmKind.ACTIVITY, data.activity_alarm, data.activity_alarm_since_ns, data.p[2] + data.p[3]),
        )
        changed: list[LoggedAlarm] = []
        for kind, is_raised, since_ns, p in states:
            known = self.find_open(key, kind)
            if known is not None and is_raised and since_ns in (None, known.raised_ns):
                self._alarms[known.id] = replace(known, p=max(known.p, p))
                continue
            if known is not None:
                changed.append(self._resolve(known, data.t_end_ns, _REPLACED if is_raised else _ENDED))
            if is_raised:
                changed.append(self._raise(key, kind, data, since_ns or data.t_end_ns, p, is_replay=is_replay))
        return tuple(changed)

    def acknowledge(self, alarm_id: str, *, now_ns: int, by: str, note: str) -> LoggedAlarm:
        """Acknowledge a raised alarm.

        Raises:
            UsageError: If the log has no such raised alarm.
        """
        return self._update(alarm_id, acknowledged_ns=now_ns, acknowledged_by=by, note=note)

    def silence(self, alarm_id: str, *, until_ns: int, reason: str) -> LoggedAlarm:
        """Silence a raised alarm until a time.

        Raises:
            UsageError: If the log has no such raised alarm.
        """
        return self._update(alarm_id, silenced_until_ns=until_ns, silence_reason=reason)

    def _update(self, alarm_id: str, **fields: object) -> LoggedAlarm:
        alarm = self._alarms.get(alarm_id)
        if alarm is None or alarm.resolved_ns is not None:
            raise UsageError(f"{alarm_id[:80]!r}: no raised alarm has this id; it may have ended")
        if alarm.is_replay:
            raise UsageError(f"{alarm_id[:80]!r}: an alarm of a replay; only alarms of watched machines can be changed")
        self._alarms[alarm_id] = replace(alarm, **fields)  # type: ignore[arg-type]
        return self._alarms[alarm_id]

    def _raise(
        self, key: MachineKey, kind: AlarmKind, data: PhaseEvent, since_ns: int, p: float, *, is_replay: bool
    ) -> LoggedAlarm:
        alarm = LoggedAlarm(
            id=_compute_alarm_id(key, kind, since_ns),
            key=key,
            kind=kind,
            raised_ns=since_ns,
            p=p,
            decision=data.decision,
            evidence=data.evidence or (),
            is_replay=is_replay,
        )
        self._alarms[alarm.id] = alarm
        self._alarms.move_to_end(alarm.id)  # a replay that begins again raises the same alarm again
        self._open[key, kind] = alarm.id
        if len(self._alarms) > self._max_alarms:  # of the ended alarms the oldest goes, else of all
            oldest = next((a for a in self._alarms.values() if a.resolved_ns is not None), None)
            oldest = oldest or next(iter(self._alarms.values()))
            del self._alarms[oldest.id]
            if self._open.get((oldest.key, oldest.kind)) == oldest.id:
                del self._open[oldest.key, oldest.kind]
        return alarm

    def _resolve(self, alarm: LoggedAlarm, now_ns: int, why: str) -> LoggedAlarm:
        self._open.pop((alarm.key, alarm.kind), None)
        self._alarms[alarm.id] = replace(alarm, resolved_ns=now_ns, resolution=why)
        return self._alarms[alarm.id]


def _compute_alarm_id(key: MachineKey, kind: AlarmKind, raised_ns: int) -> str:
    """Return the id of an alarm; of a watched machine it is the id that the alarm history gives it."""
    parts = [key.host or key.vm] if key.run == LIVE_RUN else [key.run, key.vm]
    text = "\0".join([*parts, str(kind), str(raised_ns)])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
