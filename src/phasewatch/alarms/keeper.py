"""Write the history of a running watch: what cannot be written now is written later, and nothing stops the watch."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phasewatch.alarms.delivery import OutputCounters
from phasewatch.alarms.history import AlarmHistory
from phasewatch.alarms.life import MAX_OPEN_ALARMS, Alarm, AlarmChange, AlarmStatus, Silence
from phasewatch.errors import PhasewatchError, describe_os_error

__all__ = ["HistoryKeeper", "HistoryNews"]

logger = logging.getLogger(__name__)

_MAX_PENDING = 4096  # changes that wait for a disk
_RETRY_NS = 5_000_000_000
_UPDATE_NS = 30_000_000_000  # between two writes of the time at which open alarms were last seen


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryNews:
    """What people have changed since the last look.

    Attributes:
        acknowledged: Alarms of the history that are acknowledged.
        silences: The silences that have not ended.
    """

    acknowledged: tuple[Alarm, ...] = ()
    silences: tuple[Silence, ...] = ()


class HistoryKeeper:
    """The history of a watch. `step` and `close` block while the disk does; no method raises an error of the disk.

    Args:
        state: State folder; None keeps nothing.
        now_ns: Wall time.

    Attributes:
        open_alarms: Alarms that an earlier watch left open.
        silences: The silences at the start.
    """

    def __init__(self, state: Path | None, now_ns: int) -> None:
        self._state = state
        self._history: AlarmHistory | None = None
        self._pending: deque[AlarmChange] = deque()
        self._lock = threading.Lock()  # of `_pending`
        self._disk_lock = threading.Lock()
        self._version = -1
        self._retry_ns = self._updated_ns = now_ns
        self._is_failing = False
        self._sent = self._lost = 0
        self._news: HistoryNews | None = None
        self.open_alarms: tuple[Alarm, ...] = ()
        self.silences: tuple[Silence, ...] = ()
        if state is not None and self._open(now_ns) and self._history is not None:
            try:
                self.open_alarms = self._history.read_alarms(limit=MAX_OPEN_ALARMS, is_open=True)
                self.silences = self._history.read_silences(now_ns)
            except PhasewatchError as exc:
                self._report_failure(str(exc), now_ns)

    @property
    def counters(self) -> tuple[OutputCounters, ...]:
        """The counts so far; empty without a state folder."""
        if self._state is None:
            return ()
        return (
            OutputCounters(
                name="history",
                sent=self._sent,
                lost=self._lost,
                backlog=len(self._pending),
                is_failing=self._is_failing,
            ),
        )

    def add(self, changes: Sequence[AlarmChange]) -> None:
        """Queue changes for `step`; the oldest are dropped and counted if too many wait."""
        if self._state is None:
            return
        with self._lock:
            self._pending.extend(changes)
            self._bound_pending()

    def step(self, open_alarms: Sequence[Alarm], now_ns: int) -> HistoryNews | None:
        """Write what waits, and return what people have changed; None if nothing changed or the file cannot be read.

        Args:
            open_alarms: The open alarms, whose last time is written now and then.
            now_ns: Wall time.
        """
        with self._disk_lock:
            if self._state is None or (self._is_failing and now_ns < self._retry_ns):
                return None
            if self._history is None and not self._open(now_ns):
                return None
            try:
                return self._exchange(open_alarms, now_ns)
            except PhasewatchError as exc:
                self._report_failure(str(exc), now_ns)
                return None

    def close(self, open_alarms: Sequence[Alarm], now_ns: int) -> None:
        """Write the rest and close the file; what cannot be written is lost and counted."""
        self._retry_ns, self._updated_ns = now_ns, now_ns - _UPDATE_NS
        self.step(open_alarms, now_ns)
        if self._pending:
            logger.warning("history of alarms: %d changes were not written", len(self._pending))
        self._lost += len(self._pending)
        self._pending.clear()
        if self._history is not None:
            self._history.close()

    def _exchange(self, open_alarms: Sequence[Alarm], now_ns: int) -> HistoryNews | None:
        history = self._history
        if history is None:
            raise RuntimeError("the history is not open")
        self._write_pending(history)
        if now_ns - self._updated_ns >= _UPDATE_NS:
            history.update(open_alarms)
            self._updated_ns = now_ns
        version = history.read_version()
        news = None
        if version != self._version:
            known = history.read_alarms(limit=MAX_OPEN_ALARMS, is_open=True)
            acknowledged = tuple(alarm for alarm in known if alarm.status is AlarmStatus.ACKNOWLEDGED)
            news = HistoryNews(acknowledged=acknowledged, silences=history.read_silences(now_ns))
            self._version = version
        if self._is_failing:
            logger.warning("history of alarms: written again; %d changes were lost", self._lost)
            self._is_failing = False
        return news

    def _write_pending(self, history: AlarmHistory) -> None:
        with self._lock:
            batch, self._pending = self._pending, deque()
        if not batch:
            return
        try:
            history.record(batch)
        except BaseException:
            with self._lock:
                self._pending.extendleft(reversed(batch))
                self._bound_pending()
            raise
        self._sent += len(batch)

    def _bound_pending(self) -> None:
        while len(self._pending) > _MAX_PENDING:
            self._pending.popleft()
            self._lost += 1

    def _open(self, now_ns: int) -> bool:
        if self._state is None:
            return False
        try:
            self._history = AlarmHistory(self._state)
        except PhasewatchError as exc:
            self._report_failure(str(exc), now_ns)
        except OSError as exc:
            self._report_failure(describe_os_error(exc), now_ns)
        else:
            self._version = -1
            return True
        return False

    def _report_failure(self, words: str, now_ns: int) -> None:
        if not self._is_failing:
            logger.error("history of alarms: %s; alarms still go out, and up to %d wait for it", words, _MAX_PENDING)
        self._is_failing = True
        self._retry_ns = now_ns + _RETRY_NS
        if self._history is not None:
            self._history.close()  # opened again: the file may have been moved away
            self._history = None
