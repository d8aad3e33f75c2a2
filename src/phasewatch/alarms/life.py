"""The life of an alarm as a state machine (pure): raised, acknowledged, silenced, resolved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from fnmatch import fnmatchcase

from phasewatch.events.schema import PhaseEvent
from phasewatch.models.alarm import AlarmKind
from phasewatch.types import PHASES

__all__ = [
    "MAX_OPEN_ALARMS",
    "RESTART_GRACE_NS",
    "Alarm",
    "AlarmBook",
    "AlarmChange",
    "AlarmChangeKind",
    "AlarmResolution",
    "AlarmStatus",
    "Silence",
    "compute_alarm_id",
    "find_silence",
    "find_vm_id",
    "render_time",
]

RESTART_GRACE_NS = 30_000_000_000  # an alarm of before a restart ends only after being off for this long
MAX_OPEN_ALARMS = 4096
_MAX_ANNOTATION_CHARS = 1000  # of a note, a reason or a name that a person gives


class AlarmStatus(StrEnum):
    """Where an alarm is in its life. A silence is separate: it has a time of its own and covers several alarms."""

    RAISED = "raised"
    ACKNOWLEDGED = "acknowledged"
    RESOLVED = "resolved"


class AlarmChangeKind(StrEnum):
    """What happened to an alarm."""

    RAISED = "raised"
    ACKNOWLEDGED = "acknowledged"
    SILENCED = "silenced"
    UNSILENCED = "unsilenced"
    RESOLVED = "resolved"


class AlarmResolution(StrEnum):
    """Why an alarm is resolved."""

    PROBABILITY = "probability"  # the model no longer raises it
    VM_GONE = "vm-gone"  # the VM ended
    STALE = "stale"  # nobody watched the VM for a long time


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One alarm of one VM.

    Attributes:
        id: Eight hexadecimal digits, from VM, kind and time.
        vm_id: Identity of the VM, unique on its hypervisor.
        vm: Name of the VM.
        kind: What it announces.
        status: Where it is in its life.
        raised_ns: Wall time at which it was raised.
        seen_ns: Wall time of the last window with the alarm on.
        resolved_ns: Wall time at which it was resolved; None while it is open.
        resolution: Why it was resolved; None while it is open.
        acknowledged_ns, acknowledged_by, note: When and by whom it was acknowledged, and their note.
        p: Probabilities of clean, armed, infecting, active, dormant when it was raised.
        decision: Phase that was predicted when it was raised.
        model, threat: Model and channel set.
        caveat: What limited the quality of the readings; empty if nothing did.
        is_notified: Whether people were told that it is raised, so that they are told its end, too.
    """

    id: str
    vm_id: str
    vm: str
    kind: AlarmKind
    status: AlarmStatus
    raised_ns: int
    seen_ns: int
    resolved_ns: int | None = None
    resolution: AlarmResolution | None = None
    acknowledged_ns: int | None = None
    acknowledged_by: str = ""
    note: str = ""
    p: tuple[float, ...] = ()
    decision: str = ""
    model: str = ""
    threat: str = ""
    caveat: str = ""
    is_notified: bool = False

    @property
    def key(self) -> tuple[str, AlarmKind]:
        """VM and kind; at most one alarm of a key is open."""
        return self.vm_id, self.kind

    @property
    def is_open(self) -> bool:
        """Whether it is not resolved."""
        return self.status is not AlarmStatus.RESOLVED

    @property
    def probabilities(self) -> Mapping[str, float]:
        """Probability of each phase when it was raised."""
        return dict(zip(map(str, PHASES), self.p, strict=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """A time in which the alarms of some VMs are recorded and not sent to people.

    Attributes:
        id: Eight hexadecimal digits.
        vm: Glob that the name or the identity of a VM must match.
        kind: Kind of alarm; None for all.
        from_ns, until_ns: Wall time of its start and end.
        reason, by: Why, and who made it.
    """

    id: str
    vm: str
    kind: AlarmKind | None
    from_ns: int
    until_ns: int
    reason: str
    by: str

    def covers(self, alarm: Alarm, now_ns: int) -> bool:
        """Whether it applies to an alarm at a time."""
        is_due = self.from_ns <= now_ns < self.until_ns
        is_kind = self.kind is None or self.kind is alarm.kind
        return is_due and is_kind and (fnmatchcase(alarm.vm, self.vm) or fnmatchcase(alarm.vm_id, self.vm))


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmChange:
    """One step in the life of an alarm.

    Attributes:
        alarm: The alarm after it.
        kind: What happened.
        at_ns: Wall time.
        by, note: Who did it and their words; empty if the watch did.
        is_silenced: Whether a silence covers the alarm.
        is_announced: Whether people are to be told: that it is raised, or the end of an alarm that they know of.
    """

    alarm: Alarm
    kind: AlarmChangeKind
    at_ns: int
    by: str = ""
    note: str = ""
    is_silenced: bool = False
    is_announced: bool = False


def find_vm_id(event_vm: str, event_host: str | None) -> str:
    """Return the identity of the VM of an event: its host id, or its name if it has none."""
    return event_host or event_vm


def compute_alarm_id(vm_id: str, kind: AlarmKind, raised_ns: int) -> str:
    """Return the id of an alarm, which needs no counter: eight hexadecimal digits."""
    return hashlib.sha256(f"{vm_id}\0{kind}\0{raised_ns}".encode("utf-8", "surrogatepass")).hexdigest()[:8]


def find_silence(alarm: Alarm, silences: Iterable[Silence], now_ns: int) -> Silence | None:
    """Return the silence that covers an alarm and ends last; None if none does."""
    covering = [silence for silence in silences if silence.covers(alarm, now_ns)]
    return max(covering, key=lambda silence: silence.until_ns, default=None)


def render_time(time_ns: int) -> str:
    """Return a time as RFC 3339 in UTC with milliseconds.

    >>> render_time(1_800_000_000_123_000_000)
    '2027-01-15T08:00:00.123Z'
    """
    seconds, rest_ns = divmod(time_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest_ns // 1_000_000:03d}Z"


class AlarmBook:
    """The open alarms of all VMs.

    Every method takes the wall time and returns what changed, in order. An alarm is announced once: when it is raised,
    or, if a silence covers it then, when the silence ends before the alarm does.

    Args:
        open_alarms: Alarms that an earlier watch left open; they continue.
        silences: Silences of before; alarms that they cover at `now_ns` are silenced already.
        now_ns: Wall time.

    Attributes:
        dropped: Alarms that were not recorded because `MAX_OPEN_ALARMS` were open.
    """

    def __init__(self, open_alarms: Iterable[Alarm] = (), silences: Sequence[Silence] = (), *, now_ns: int = 0) -> None:
        self._open = {alarm.key: alarm for alarm in open_alarms if alarm.is_open}
        self._grace_until_ns: dict[tuple[str, AlarmKind], int | None] = dict.fromkeys(self._open)
        self._silences = tuple(silences)
        self._silenced = {key for key, alarm in self._open.items() if find_silence(alarm, silences, now_ns)}
        self.dropped = 0

    @property
    def open_alarms(self) -> tuple[Alarm, ...]:
        """The open alarms, oldest first."""
        return tuple(sorted(self._open.values(), key=lambda alarm: alarm.raised_ns))

    def is_silenced(self, alarm: Alarm) -> bool:
        """Whether a silence covers an open alarm."""
        return alarm.key in self._silenced

    def add_window(self, event: PhaseEvent, now_ns: int) -> list[AlarmChange]:
        """Raise, continue or resolve the alarms of a VM after one window."""
        vm_id = find_vm_id(event.vm, event.host)
        changes: list[AlarmChange] = []
        for kind, is_on, since_ns in (
            (AlarmKind.INFECTION, event.alarm, event.alarm_since_ns),
            (AlarmKind.ACTIVITY, event.activity_alarm, event.activity_alarm_since_ns),
        ):
            known = self._open.get((vm_id, kind))
            if is_on and known is None:
                changes += self._raise(event, kind, vm_id, since_ns or event.t_end_ns, now_ns)
            elif is_on and known is not None:
                self._open[known.key] = replace(known, seen_ns=max(known.seen_ns, event.t_end_ns))
                self._grace_until_ns.pop(known.key, None)
            elif is_on is False and known is not None and self._is_grace_over(known.key, event.t_end_ns):
                changes.append(self._resolve(known, now_ns, AlarmResolution.PROBABILITY))
        return changes

    def end_vm(self, vm_id: str, now_ns: int) -> list[AlarmChange]:
        """Resolve the alarms of a VM that ended."""
        known = [alarm for alarm in self.open_alarms if alarm.vm_id == vm_id]
        return [self._resolve(alarm, now_ns, AlarmResolution.VM_GONE) for alarm in known]

    def end_stale(self, now_ns: int, *, older_than_ns: int) -> list[AlarmChange]:
        """Resolve the alarms of VMs that nobody has watched for a long time."""
        stale = [alarm for alarm in self.open_alarms if alarm.seen_ns < now_ns - older_than_ns]
        return [self._resolve(alarm, now_ns, AlarmResolution.STALE) for alarm in stale]

    def acknowledge(self, alarm_id: str, now_ns: int, *, by: str, note: str = "") -> list[AlarmChange]:
        """Mark an open alarm as seen by a person; a resolved or unknown one stays as it is."""
        for alarm in self.open_alarms:
            if alarm.id == alarm_id and alarm.status is AlarmStatus.RAISED:
                known = replace(
                    alarm,
                    status=AlarmStatus.ACKNOWLEDGED,
                    acknowledged_ns=now_ns,
                    acknowledged_by=by[:_MAX_ANNOTATION_CHARS],
                    note=note[:_MAX_ANNOTATION_CHARS],
                )
                self._open[alarm.key] = known
                return [self._build_change(known, AlarmChangeKind.ACKNOWLEDGED, now_ns, by=by, note=note)]
        return []

    def apply_silences(self, silences: Sequence[Silence], now_ns: int) -> list[AlarmChange]:
        """Silence and unsilence open alarms; an alarm that was never announced is announced when its silence ends."""
        self._silences = tuple(silences)
        changes: list[AlarmChange] = []
        for alarm in self.open_alarms:
            silence = find_silence(alarm, silences, now_ns)
            if silence is not None and alarm.key not in self._silenced:
                self._silenced.add(alarm.key)
                changes.append(
                    self._build_change(
                        alarm, AlarmChangeKind.SILENCED, now_ns, by=silence.by, note=f"until {_until(silence)}"
                    )
                )
            is_news = alarm.status is AlarmStatus.RAISED and not alarm.is_notified
            if silence is None and (alarm.key in self._silenced or is_news):
                self._silenced.discard(alarm.key)
                known = replace(alarm, is_notified=alarm.is_notified or is_news)
                self._open[alarm.key] = known
                changes.append(self._build_change(known, AlarmChangeKind.UNSILENCED, now_ns, is_announced=is_news))
        return changes

    def _raise(self, event: PhaseEvent, kind: AlarmKind, vm_id: str, since_ns: int, now_ns: int) -> list[AlarmChange]:
        if len(self._open) >= MAX_OPEN_ALARMS:
            self.dropped += 1
            return []
        alarm = Alarm(
            id=compute_alarm_id(vm_id, kind, since_ns),
            vm_id=vm_id,
            vm=event.vm,
            kind=kind,
            status=AlarmStatus.RAISED,
            raised_ns=since_ns,
            seen_ns=event.t_end_ns,
            p=event.p,
            decision=event.decision,
            model=event.model,
            threat=event.threat,
            caveat=event.caveat or "",
        )
        silence = find_silence(alarm, self._silences, now_ns)
        alarm = replace(alarm, is_notified=silence is None)
        self._open[alarm.key] = alarm
        if silence is not None:
            self._silenced.add(alarm.key)
        return [self._build_change(alarm, AlarmChangeKind.RAISED, now_ns, is_announced=alarm.is_notified)]

    def _resolve(self, alarm: Alarm, now_ns: int, resolution: AlarmResolution) -> AlarmChange:
        known = replace(alarm, status=AlarmStatus.RESOLVED, resolved_ns=now_ns, resolution=resolution)
        change = self._build_change(known, AlarmChangeKind.RESOLVED, now_ns, is_announced=alarm.is_notified)
        del self._open[alarm.key]
        self._grace_until_ns.pop(alarm.key, None)
        self._silenced.discard(alarm.key)
        return change

    def _build_change(
        self,
        alarm: Alarm,
        kind: AlarmChangeKind,
        now_ns: int,
        *,
        by: str = "",
        note: str = "",
        is_announced: bool = False,
    ) -> AlarmChange:
        return AlarmChange(
            alarm=alarm,
            kind=kind,
            at_ns=now_ns,
            by=by[:_MAX_ANNOTATION_CHARS],
            note=note[:_MAX_ANNOTATION_CHARS],
            is_silenced=self.is_silenced(alarm),
            is_announced=is_announced,
        )

    def _is_grace_over(self, key: tuple[str, AlarmKind], end_ns: int) -> bool:
        """Whether an alarm may end: at once, but after a restart only when it was off for `RESTART_GRACE_NS`."""
        if key not in self._grace_until_ns:
            return True
        until_ns = self._grace_until_ns[key]
        if until_ns is None:
            self._grace_until_ns[key] = end_ns + RESTART_GRACE_NS
            return False
        return end_ns >= until_ns


def _until(silence: Silence) -> str:
    return f"{render_time(silence.until_ns)}{f': {silence.reason}' if silence.reason else ''}"
