"""Send the open alarms to Prometheus Alertmanager, API version 2.

Alertmanager expects the state, not the changes: a client sends every firing alert again and again, and an alert that is
not sent again ends at its ``endsAt``. So nothing is queued here; after an outage the present state is sent.

Source: Alertmanager 0.25, ``api/v2/openapi.yaml``; Prometheus 2.42, ``notifier`` and ``rules/alerting.go`` (``endsAt``
is four intervals ahead).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import msgspec

from phasewatch.alarms.config import AlertmanagerConfig, is_http_url, read_token_file
from phasewatch.alarms.delivery import DeliveryFailure, FailureLog, OutputCounters, RetryPolicy, compute_pause_s
from phasewatch.alarms.life import Alarm, AlarmStatus, render_time
from phasewatch.alarms.webhook import HttpPoster
from phasewatch.errors import UsageError
from phasewatch.models.alarm import AlarmKind

__all__ = ["ALERTMANAGER_PATH", "AlertmanagerClient", "build_alert"]

ALERTMANAGER_PATH = "/api/v2/alerts"
_ALERT_NAMES = {AlarmKind.INFECTION: "PhasewatchInfection", AlarmKind.ACTIVITY: "PhasewatchActivity"}
_SEVERITIES = {AlarmKind.INFECTION: "critical", AlarmKind.ACTIVITY: "warning"}
_INTERVALS_AHEAD = 4
_MAX_ENDED = 1024  # resolved alarms that wait for a receiver that is down
_POLICY = RetryPolicy(first_pause_s=1.0, longest_pause_s=30.0)


def build_alert(alarm: Alarm, *, host: str, labels: Mapping[str, str], ends_ns: int) -> dict[str, str | dict[str, str]]:
    """Return an alarm as a ``postableAlert``.

    Args:
        alarm: The alarm.
        host: Name of the hypervisor.
        labels: Labels to add.
        ends_ns: Wall time at which Alertmanager ends it, if it is not sent again.
    """
    annotations = {
        "summary": f"{alarm.kind} alarm on VM {alarm.vm}: predicted phase {alarm.decision}",
        "phase": alarm.decision,
        "probabilities": ", ".join(f"{name} {p:.2f}" for name, p in alarm.probabilities.items()),
        "alarm_id": alarm.id,
        "model": f"{alarm.model}, channel set {alarm.threat}",
    }
    if alarm.caveat:
        annotations["caveats"] = alarm.caveat
    if alarm.acknowledged_ns is not None:
        note = f": {alarm.note}" if alarm.note else ""
        annotations["acknowledged"] = f"{render_time(alarm.acknowledged_ns)} by {alarm.acknowledged_by}{note}"
    return {
        "labels": {
            **labels,
            "alertname": _ALERT_NAMES[alarm.kind],
            "vm": alarm.vm,
            "vm_id": alarm.vm_id,
            "host": host,
            "kind": str(alarm.kind),
            "severity": _SEVERITIES[alarm.kind],
        },
        "annotations": annotations,
        "startsAt": render_time(alarm.raised_ns),
        "endsAt": render_time(ends_ns),
    }


class AlertmanagerClient:
    """Keeps one Alertmanager informed about the open alarms.

    Args:
        url: Its address, without ``/api/v2/alerts``.
        config: Settings.
        host: Name of the hypervisor, a label of each alert.
        wall_ns: The wall clock.
        sleep: How to wait; a test passes its own.

    Raises:
        UsageError: If the address, the token or the certificates cannot be used.
    """

    def __init__(
        self,
        url: str,
        config: AlertmanagerConfig,
        *,
        host: str,
        wall_ns: Callable[[], int],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if not is_http_url(url):
            raise UsageError(f"alertmanager {url}: an http or https URL is needed")
        self._url, self._config, self._host = url.rstrip("/") + ALERTMANAGER_PATH, config, host
        self._wall_ns, self._sleep = wall_ns, sleep
        self._poster = HttpPoster(token=read_token_file(config.token_file), ca_file=config.ca_file)
        self._firing: dict[str, Alarm] = {}
        self._ended: dict[str, Alarm] = {}
        self._known: set[str] = set()  # ids that it has accepted as firing
        self._is_changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failures = FailureLog("alertmanager")
        self.sent = self.lost = 0

    @property
    def counters(self) -> OutputCounters:
        """The counts so far; ``sent`` counts accepted states, ``backlog`` what it does not know yet."""
        backlog = len(self._ended) + len(self._firing.keys() - self._known)
        return OutputCounters(
            name="alertmanager",
            sent=self.sent,
            lost=self.lost,
            backlog=backlog,
            is_failing=self._failures.is_failing,
        )

    def set_firing(self, alarms: Mapping[str, Alarm]) -> None:
        """Replace the alarms that fire, by id; those that no longer do are sent as ended."""
        wanted = {key: alarm for key, alarm in alarms.items() if alarm.kind in self._config.kinds}
        changed = wanted != self._firing and {k: _strip(a) for k, a in wanted.items()} != {
            k: _strip(a) for k, a in self._firing.items()
        }
        for key, alarm in self._firing.items():
            if key not in wanted:
                self._ended[key] = replace(alarm, resolved_ns=self._wall_ns())
        for key in wanted:
            self._ended.pop(key, None)
        while len(self._ended) > _MAX_ENDED:
            del self._ended[next(iter(self._ended))]
            self.lost += 1
        self._firing = wanted
        if changed or self._ended:
            self._is_changed.set()
        if self._task is None and (wanted or self._ended):
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Send what has not been sent, in a few seconds, and stop; firing alarms stay, for the next watch goes on."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            if self._ended or self._firing.keys() - self._known:
                with suppress(DeliveryFailure, TimeoutError):
                    async with asyncio.timeout(_POLICY.flush_s):
                        await self._post()
            self.lost += self.counters.backlog
        await self._poster.close()

    async def _run(self) -> None:
        while True:
            self._is_changed.clear()
            try:
                await self._post()
            except DeliveryFailure as exc:
                self._failures.add_failure(exc)
                pause_s = compute_pause_s(self._failures.n_failures, _POLICY)
                await self._sleep(self._config.interval_s if exc.is_final else pause_s)
                continue
            self._failures.add_success(lost=self.lost)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config.interval_s):
                    await self._is_changed.wait()

    async def _post(self) -> None:
        firing, ended = dict(self._firing), dict(self._ended)
        if not firing and not ended:
            return
        ahead_ns = round(_INTERVALS_AHEAD * self._config.interval_s * 1e9)
        ends_ns = self._wall_ns() + ahead_ns
        alerts = [self._build(alarm, ends_ns) for alarm in firing.values()]
        alerts += [self._build(alarm, alarm.resolved_ns or 0) for alarm in ended.values()]
        await self._poster.post(self._url, msgspec.json.encode(alerts))
        self.sent += len(ended) + len(firing.keys() - self._known)
        self._known = set(firing)
        for key, alarm in ended.items():
            if self._ended.get(key) is alarm:
                del self._ended[key]

    def _build(self, alarm: Alarm, ends_ns: int) -> dict[str, str | dict[str, str]]:
        ends_ns = max(ends_ns, alarm.raised_ns)  # else Alertmanager refuses the whole request
        return build_alert(alarm, host=self._host, labels=self._config.labels, ends_ns=ends_ns)


def _strip(alarm: Alarm) -> tuple[str, AlarmStatus]:
    """Return what makes a message worth sending at once; a later window of the same alarm does not."""
    return alarm.id, alarm.status
