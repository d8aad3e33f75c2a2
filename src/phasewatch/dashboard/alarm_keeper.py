"""The alarm history of a state folder, as the page shows and changes it."""

from __future__ import annotations

import asyncio
import glob
import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from phasewatch.alarms.history import AlarmHistory, read_alarms, read_silences
from phasewatch.alarms.life import Alarm, Silence, find_silence
from phasewatch.dashboard.alarm_log import MAX_ALARMS, LoggedAlarm
from phasewatch.dashboard.history import LIVE_RUN, MachineKey
from phasewatch.dashboard.intake import AlarmChangeRequest, EventIntake
from phasewatch.errors import PhasewatchError
from phasewatch.models.alarm import AlarmKind

__all__ = ["StateFolderAlarms", "follow_state_folder"]

logger = logging.getLogger(__name__)

_READ_INTERVAL_S = 1.0


class StateFolderAlarms:
    """Reads and changes the alarms of a state folder beside the watch that writes them.

    Args:
        state: State folder.
        now_ns: Wall clock, nanoseconds since the epoch.
    """

    def __init__(self, state: Path, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._state, self._now_ns = state, now_ns

    def read(self) -> tuple[LoggedAlarm, ...]:
        """Return the newest alarms with the silences that cover them, newest first.

        Raises:
            AlarmStoreError: If the history is damaged.
        """
        now_ns = self._now_ns()
        silences = read_silences(self._state, now_ns=now_ns)
        alarms = read_alarms(self._state, limit=MAX_ALARMS)
        return tuple(_convert_alarm(alarm, find_silence(alarm, silences, now_ns)) for alarm in alarms)

    def change(self, request: AlarmChangeRequest, alarm: LoggedAlarm) -> None:
        """Acknowledge or silence one of the alarms.

        Raises:
            UsageError: If it is not open any more.
            AlarmStoreError: If the history cannot be written.
        """
        now_ns = self._now_ns()
        with AlarmHistory(self._state) as history:
            if not request.silence_minutes:
                history.acknowledge(alarm.id, now_ns, by=request.by, note=request.note)
                return
            silence = Silence(
                id=secrets.token_hex(4),
                vm=glob.escape(alarm.key.host or alarm.key.vm),
                kind=alarm.kind,
                from_ns=now_ns,
                until_ns=now_ns + request.silence_minutes * 60_000_000_000,
                reason=request.note,
                by=request.by,
            )
            history.add_silence(silence)


async def follow_state_folder(intake: EventIntake) -> None:
    """Show the pages what changes in the state folder, until this task is cancelled."""
    failure = ""
    while True:
        try:
            await intake.refresh_kept()
            failure = ""
        except PhasewatchError as exc:
            if str(exc) != failure:
                failure = str(exc)
                logger.warning("%s", exc)
        await asyncio.sleep(_READ_INTERVAL_S)


def _convert_alarm(alarm: Alarm, silence: Silence | None) -> LoggedAlarm:
    p_infecting, p_active = (alarm.p[2], alarm.p[3]) if len(alarm.p) == 5 else (0.0, 0.0)
    return LoggedAlarm(
        id=alarm.id,
        key=MachineKey(run=LIVE_RUN, vm=alarm.vm, host=alarm.vm_id),
        kind=alarm.kind,
        raised_ns=alarm.raised_ns,
        resolved_ns=alarm.resolved_ns,
        resolution=str(alarm.resolution or ""),
        acknowledged_ns=alarm.acknowledged_ns,
        acknowledged_by=alarm.acknowledged_by,
        note=alarm.note,
        silenced_until_ns=silence.until_ns if silence is not None else None,
        silence_reason=silence.reason if silence is not None else "",
        p=p_infecting if alarm.kind is AlarmKind.INFECTION else p_infecting + p_active,
        decision=alarm.decision,
        is_kept=True,
    )
