"""Show the watch of many VMs on a terminal: which are watched, which are not and why, phases and alarms."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from phasewatch.cli import common
from phasewatch.events.schema import EventEnvelope, PhaseEvent
from phasewatch.live.fleet_member import MemberStatus, MemberStatusKind

__all__ = ["EndedVms", "FleetView"]

_TABLE_DELAY_S = 5.0  # after this time the table does not wait for VMs that are still being attached
_RETURN_S = 60.0  # within this time a VM that ended may come back, as after a restart
_SUMMARY_INTERVAL_S = 60.0
_MAX_NAME_CHARS = 120
_MAX_NAMED = 5  # VMs named in one part of the summary


class EndedVms:
    """Reports that a VM has ended once it has not come back for a minute; a VM that restarts keeps its alarms.

    Args:
        report: Receives the host id of a VM that has ended.
        monotonic: Clock in seconds.
    """

    def __init__(self, report: Callable[[str], None], monotonic: Callable[[], float] = time.monotonic) -> None:
        self._report, self._monotonic = report, monotonic
        self._ended_s: dict[str, float] = {}

    def add_status(self, status: MemberStatus) -> None:
        """Follow the status of a VM."""
        self._ended_s.pop(status.host, None)
        if status.kind is MemberStatusKind.GONE:
            self._ended_s[status.host] = self._monotonic()
        self.report_due()

    def report_due(self) -> None:
        """Report the VMs that ended a minute ago; to be called often."""
        now_s = self._monotonic()
        while self._ended_s:
            host, ended_s = next(iter(self._ended_s.items()))
            if now_s - ended_s < _RETURN_S:
                return
            del self._ended_s[host]
            self._report(host)


class FleetView:
    """Prints a table once the VMs found at the start are attached, then changes and alarms, and a summary each minute.

    Args:
        write: Prints one line; may not block.
        monotonic: Clock in seconds.
    """

    def __init__(self, write: Callable[[str], None], monotonic: Callable[[], float] = time.monotonic) -> None:
        self._write, self._monotonic = write, monotonic
        self._statuses: dict[int, MemberStatus] = {}
        self._phases: dict[str, PhaseEvent] = {}
        self._begin_s = monotonic()
        self._summary_s = 0.0
        self._has_table = False

    def start(self, patterns: Sequence[str]) -> None:
        """Print what is looked for."""
        shown = "all VMs" if "*" in patterns else ", ".join(patterns)
        self._write(f"watching {shown}, also those that start later; Ctrl-C ends the watch")

    def add_status(self, status: MemberStatus) -> None:
        """Show that the status of a VM changed."""
        before = self._statuses.get(status.pid)
        if status.kind is MemberStatusKind.GONE:
            self._statuses.pop(status.pid, None)
            self._phases.pop(status.host, None)
        else:
            self._statuses[status.pid] = status
        if self._has_table:
            is_news = before is None or (before.kind, before.reason) != (status.kind, status.reason)
            if is_news and status.kind is not MemberStatusKind.ATTACHING:
                self._write(f"{_render_time()}  {status.name}: {_describe(status)}")
        elif all(each.kind is not MemberStatusKind.ATTACHING for each in self._statuses.values()):
            self._print_table()

    def add_event(self, event: EventEnvelope, is_alarm_change: bool) -> None:
        """Follow the phases, show a change of an alarm, and print what is due."""
        phase = event.data
        if isinstance(phase, PhaseEvent):
            self._phases[phase.host or phase.vm] = phase
            if is_alarm_change:
                self._write(f"{_render_time(phase.t_end_ns)}  {phase.vm}: {_describe_alarms(phase)}")
        now_s = self._monotonic()
        if not self._has_table and now_s - self._begin_s >= _TABLE_DELAY_S:
            self._print_table()
        elif self._has_table and now_s - self._summary_s >= _SUMMARY_INTERVAL_S:
            self._print_summary()

    def _print_table(self) -> None:
        self._has_table = True
        rows = [
            (str(status.pid), status.name, status.threat or "-", _describe(status))
            for status in sorted(self._statuses.values(), key=lambda each: (each.name, each.pid))
        ]
        for line in common.render_table(rows):
            self._write(line)
        self._print_summary()

    def _print_summary(self) -> None:
        self._summary_s = self._monotonic()
        watched = [each for each in self._statuses.values() if each.kind is MemberStatusKind.WATCHED]
        others = [each for each in self._statuses.values() if each.kind is not MemberStatusKind.WATCHED]
        parts = [f"{len(watched)} of {len(self._statuses)} VMs watched"]
        decisions = Counter(
            self._phases[status.host].decision for status in watched if status.host in self._phases
        ).most_common()
        if decisions:
            parts.append(", ".join(f"{count} {decision}" for decision, count in decisions))
        phases = self._phases.values()
        infected = [event.vm for event in phases if event.alarm]
        active = [event.vm for event in phases if event.activity_alarm]
        for title, names in (("infection alarm", infected), ("activity alarm", active)):
            if names:
                parts.append(f"{title}: {_render_names(names)}")
        if others:
            parts.append("not watched: " + _render_names([f"{each.name} ({_describe(each)})" for each in others]))
        self._write(f"{_render_time()}  " + "; ".join(parts))


def _describe(status: MemberStatus) -> str:
    if status.kind is not MemberStatusKind.WATCHED:
        return f"{status.kind}: {status.reason}" if status.reason else str(status.kind)
    text = f"watched, {status.masked} channels masked"
    return f"{text}, {status.vm_state}" if status.vm_state not in ("", "running") else text


def _describe_alarms(phase: PhaseEvent) -> str:
    active = {"infection": phase.alarm, "activity": phase.activity_alarm}
    return ", ".join(f"{kind} alarm {'on' if active.get(kind) else 'off'}" for kind in phase.alarm_changes)


def _render_names(names: Sequence[str]) -> str:
    n_more = len(names) - _MAX_NAMED
    return ", ".join(name[:_MAX_NAME_CHARS] for name in names[:_MAX_NAMED]) + (
        f" and {n_more} more" if n_more > 0 else ""
    )


def _render_time(unix_ns: int | None = None) -> str:
    at_s = time.time() if unix_ns is None else unix_ns / 1e9
    return datetime.fromtimestamp(at_s, UTC).strftime("%H:%M:%SZ")
