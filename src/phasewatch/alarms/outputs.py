"""Carry the alarms of a watch to people: history, webhook, Alertmanager, syslog, ECS, metrics and a command.

All outputs share one thread with an event loop of its own. The watch only appends to a bounded queue, so that a
receiver, a disk or a name server that hangs cannot delay a decision.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from phasewatch.alarms.alertmanager import AlertmanagerClient
from phasewatch.alarms.command import CommandOutput
from phasewatch.alarms.config import OutputConfig, find_output_faults, read_token_file
from phasewatch.alarms.delivery import OutputCounters
from phasewatch.alarms.ecs import EcsOutput
from phasewatch.alarms.keeper import HistoryKeeper, HistoryNews
from phasewatch.alarms.life import AlarmBook, AlarmChange, find_vm_id
from phasewatch.alarms.metrics import MetricsSnapshot, WatchFigures
from phasewatch.alarms.metrics_server import MetricsServer
from phasewatch.alarms.syslog import SyslogOutput
from phasewatch.alarms.webhook import Webhook
from phasewatch.errors import UsageError
from phasewatch.events.schema import EventEnvelope, PhaseEvent, TelemetryEvent
from phasewatch.models.alarm import AlarmKind

__all__ = ["AlarmOutputs", "open_outputs"]

logger = logging.getLogger(__name__)

_MAX_WAITING_EVENTS = 16_384  # of all VMs: four minutes of 64 VMs
_TICK_S = 1.0  # between two looks at events that change no alarm
_HISTORY_S = 1.0  # between two looks at the history
_STALE_NS = 24 * 3600 * 1_000_000_000  # an alarm of a VM that nobody has watched for so long ends
_CLOSE_TIMEOUT_S = 30.0


def open_outputs(
    config: OutputConfig, state: Path | None, *, write_line: Callable[[str], None] | None = None
) -> AlarmOutputs:
    """Open the outputs of a watch and start their thread.

    Args:
        config: Settings.
        state: Folder of the history; None keeps none, and silences and acknowledgements are not possible.
        write_line: Prints a line on standard output without blocking; only ECS lines use it.

    Raises:
        UsageError: If a setting cannot be used.
        MachineError: If the port of the metrics is in use.
    """
    if faults := find_output_faults(config):
        raise UsageError("; ".join(f"{fault.key}: {fault.words}" for fault in faults))
    outputs = AlarmOutputs(config, state, write_line=write_line)
    outputs.start()
    return outputs


class AlarmOutputs:
    """The outputs of one watch, of one or many VMs; see `open_outputs`.

    Args:
        config: Settings without faults.
        state: Folder of the history; None for none.
        write_line: Prints a line on standard output.
        wall_ns: The wall clock.

    Attributes:
        metrics_port: Port of the metrics; None without.
    """

    def __init__(
        self,
        config: OutputConfig,
        state: Path | None,
        *,
        write_line: Callable[[str], None] | None = None,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._config, self._wall_ns = config, wall_ns
        host = socket.gethostname()
        self._webhook = _open_webhook(config)
        self._command = CommandOutput(config.command, host=host) if config.command else None
        self._syslog = SyslogOutput(config.syslog, host=host) if config.syslog else None
        self._ecs = EcsOutput(config.ecs, host=host, write_line=write_line) if config.ecs else None
        urls = config.alertmanager.urls if config.alertmanager else ()
        self._alertmanagers = [
            AlertmanagerClient(url, config.alertmanager, host=host, wall_ns=wall_ns)
            for url in urls
            if config.alertmanager is not None
        ]
        self._metrics = MetricsServer(config.metrics.port, self._take_snapshot) if config.metrics else None
        self.metrics_port = self._metrics.port if self._metrics else None
        now_ns = wall_ns()
        self._has_history = state is not None
        self._keeper = HistoryKeeper(state, now_ns)
        self._silences = self._keeper.silences
        self._book = AlarmBook(self._keeper.open_alarms, self._silences, now_ns=now_ns)
        self._figures = WatchFigures()
        self._phases: dict[str, EventEnvelope] = {}  # the newest of each VM
        self._phase_queue: deque[EventEnvelope | str] = deque()  # events, and the identities of VMs that ended
        self._others: dict[str, EventEnvelope] = {}
        self._lock = threading.Lock()
        self._n_overflowed = 0
        self._is_fault_logged = self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run_thread, name="alarm outputs", daemon=True)

    def __enter__(self) -> AlarmOutputs:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close_blocking()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def on_event(self, event: EventEnvelope, is_alarm_change: bool) -> None:
        """Accept an event of the watch, from any thread; it never blocks and never raises."""
        with self._lock:
            if isinstance(event.data, PhaseEvent):
                if len(self._phase_queue) >= _MAX_WAITING_EVENTS:
                    self._phase_queue.popleft()
                    self._n_overflowed += 1
                self._phase_queue.append(event)
            elif isinstance(event.data, TelemetryEvent):
                self._others[find_vm_id(event.data.vm, event.data.host)] = event
            else:
                self._others[event.type] = event
        if is_alarm_change:
            self._wake_up()

    def on_vm_gone(self, vm_id: str) -> None:
        """Resolve the alarms of a VM that ended, from any thread.

        Args:
            vm_id: ``host`` of its events, or its name if they have none.
        """
        with self._lock:
            self._phase_queue.append(vm_id)
        self._wake_up()

    def counters(self) -> tuple[OutputCounters, ...]:
        """Return the counts of every output that is used, and of the events that the outputs were too slow for."""
        used = (self._webhook, self._syslog, self._ecs, self._command, *self._alertmanagers)
        events = OutputCounters(
            name="events", sent=0, lost=self._n_overflowed, backlog=len(self._phase_queue), is_failing=False
        )
        lost_events = (events,) if self._n_overflowed else ()
        return (*(output.counters for output in used if output is not None), *self._keeper.counters, *lost_events)

    def count_backlog(self) -> int:
        """Return how many alarms wait to be delivered."""
        return sum(each.backlog for each in self.counters())

    async def close(self) -> None:
        """Wait a few seconds for what is queued, then stop; for use in an event loop."""
        await asyncio.to_thread(self.close_blocking)

    def close_blocking(self) -> None:
        """Wait a few seconds for what is queued, then stop."""
        self._is_closed = True
        self._wake_up()
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning("outputs: one of them does not end; what it has queued is lost")

    def _wake_up(self) -> None:
        loop, wake = self._loop, self._wake
        if loop is not None and wake is not None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(wake.set)

    def _run_thread(self) -> None:
        try:
            asyncio.run(self._run())
        except Exception:
            logger.exception("outputs: they failed and send no more; this is a fault of phasewatch")

    async def _run(self) -> None:
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._metrics is not None:
            self._metrics.start()
        history = asyncio.create_task(self._exchange_history() if self._has_history else asyncio.sleep(0))
        self._update_firing()
        stale_ns = self._wall_ns()
        try:
            while not self._is_closed:
                self._wake.clear()
                self._take_events()
                now_ns = self._wall_ns()
                self._dispatch(self._book.apply_silences(self._silences, now_ns))
                if now_ns - stale_ns > 60_000_000_000:
                    stale_ns = now_ns
                    self._dispatch(self._book.end_stale(now_ns, older_than_ns=_STALE_NS))
                    self._figures.forget_silent(now_ns)
                    self._phases = {key: self._phases[key] for key in self._phases if key in self._figures.vms}
                with suppress(TimeoutError):
                    async with asyncio.timeout(_TICK_S):
                        await self._wake.wait()
            self._take_events()
        finally:
            history.cancel()
            await asyncio.gather(history, return_exceptions=True)
            await self._close_all()

    async def _close_all(self) -> None:
        used = (self._webhook, self._syslog, self._ecs, self._command, self._metrics, *self._alertmanagers)
        closing = [output.close() for output in used if output is not None]
        for result in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(result, Exception):
                logger.error("outputs: one of them failed at its end: %s: %s", type(result).__name__, result)
        await asyncio.to_thread(self._keeper.close, self._book.open_alarms, self._wall_ns())

    async def _exchange_history(self) -> None:
        while True:
            try:
                news = await asyncio.to_thread(self._keeper.step, self._book.open_alarms, self._wall_ns())
                if news is not None:
                    self._apply_news(news)
            except Exception:  # the other outputs go on without the history
                self._log_fault("the history could not be written")
            await asyncio.sleep(_HISTORY_S)

    def _apply_news(self, news: HistoryNews) -> None:
        self._silences = news.silences
        for alarm in news.acknowledged:
            changes = self._book.acknowledge(
                alarm.id,
                alarm.acknowledged_ns or self._wall_ns(),
                by=alarm.acknowledged_by,
                note=alarm.note,
            )
            self._dispatch(changes, is_recorded=True)

    def _take_events(self) -> None:
        with self._lock:
            events, self._phase_queue = self._phase_queue, deque()
            others, self._others = self._others, {}
        for other in others.values():
            self._figures.add(other)
        for event in events:
            try:
                if isinstance(event, str):
                    self._end_vm(event)
                else:
                    self._take_phase(event)
            except Exception:  # one VM's event must not stop the alarms of the others
                self._log_fault("an event could not be handled")

    def _log_fault(self, words: str) -> None:
        """Log the exception that is being handled, once in a watch."""
        if not self._is_fault_logged:
            self._is_fault_logged = True
            logger.exception("outputs: %s; this is a fault of phasewatch", words)

    def _take_phase(self, event: EventEnvelope) -> None:
        if not isinstance(event.data, PhaseEvent):
            return
        self._figures.add(event)
        self._phases[find_vm_id(event.data.vm, event.data.host)] = event
        self._dispatch(self._book.add_window(event.data, event.t_wall_ns))

    def _end_vm(self, vm_id: str) -> None:
        self._dispatch(self._book.end_vm(vm_id, self._wall_ns()))
        self._figures.forget(vm_id)
        self._phases.pop(vm_id, None)

    def _dispatch(self, changes: Sequence[AlarmChange], *, is_recorded: bool = False) -> None:
        if not changes:
            return
        if not is_recorded:
            self._keeper.add(changes)
        for change in changes:
            kind = change.alarm.kind
            if self._syslog is not None and self._config.syslog and kind in self._config.syslog.kinds:
                self._syslog.put(change)
            if self._ecs is not None and self._config.ecs and kind in self._config.ecs.kinds:
                self._ecs.put(change)
            if not change.is_announced:
                continue
            if self._command is not None and self._config.command and kind in self._config.command.kinds:
                self._command.put(change)
        self._post_webhook([change for change in changes if change.is_announced])
        self._update_firing()

    def _post_webhook(self, changes: Sequence[AlarmChange]) -> None:
        """Post one event for each VM, with the alarms that people are to hear of."""
        if self._webhook is None or self._config.webhook is None:
            return
        by_vm: dict[str, list[AlarmChange]] = {}
        for change in changes:
            if change.alarm.kind in self._config.webhook.kinds:
                by_vm.setdefault(change.alarm.vm_id, []).append(change)
        for vm_id, group in by_vm.items():
            event = self._phases.get(vm_id)
            if event is not None:  # there is none for an alarm of an earlier watch
                self._webhook.post(_build_webhook_event(event, group))

    def _update_firing(self) -> None:
        firing = {alarm.id: alarm for alarm in self._book.open_alarms if not self._book.is_silenced(alarm)}
        for client in self._alertmanagers:
            client.set_firing(firing)

    def _take_snapshot(self) -> MetricsSnapshot:
        alarms = self._book.open_alarms
        return MetricsSnapshot(
            figures=self._figures,
            open_alarms=alarms,
            silenced=frozenset(alarm.id for alarm in alarms if self._book.is_silenced(alarm)),
            outputs=self.counters(),
            max_vms=self._config.metrics.max_vms if self._config.metrics else 0,
            now_ns=self._wall_ns(),
        )


def _open_webhook(config: OutputConfig) -> Webhook | None:
    if config.webhook is None:
        return None
    return Webhook(config.webhook.url, token=read_token_file(config.webhook.token_file), ca_file=config.webhook.ca_file)


def _build_webhook_event(event: EventEnvelope, changes: Sequence[AlarmChange]) -> EventEnvelope:
    """Return the newest event of a VM with the states and changes of the announced alarms."""
    states = {change.alarm.kind: change.alarm.is_open for change in changes}
    fields: dict[str, object] = {"alarm_changes": tuple(str(kind) for kind in states)}
    if AlarmKind.INFECTION in states:
        fields["alarm"] = states[AlarmKind.INFECTION]
    if AlarmKind.ACTIVITY in states:
        fields["activity_alarm"] = states[AlarmKind.ACTIVITY]
    return msgspec.structs.replace(event, data=msgspec.structs.replace(event.data, **fields))
