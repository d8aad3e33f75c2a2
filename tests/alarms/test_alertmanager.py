"""Alertmanager: the open alarms are sent again and again, an outage loses none, and a real Alertmanager shows them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.factories.alarms import T0_NS, S, life, raised
from tests.factories.http_receivers import run_receiver
from tests.requirements import need_program

from phasewatch.alarms.alertmanager import AlertmanagerClient, build_alert
from phasewatch.alarms.config import AlertmanagerConfig
from phasewatch.alarms.life import Alarm, render_time
from phasewatch.models.alarm import AlarmKind


def client_of(url: str, now_ns: Callable[[], int] = lambda: T0_NS + 60 * S, **changes: Any) -> AlertmanagerClient:
    async def brief(seconds: float) -> None:
        await asyncio.sleep(0.01)

    config = AlertmanagerConfig(urls=(url,), **changes)
    return AlertmanagerClient(url, config, host="hv1", wall_ns=now_ns, sleep=brief)


def by_id(*alarms: Alarm) -> dict[str, Alarm]:
    return {alarm.id: alarm for alarm in alarms}


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_true():
            await asyncio.sleep(0.01)


def test_an_alert_has_the_labels_that_tell_vms_apart_and_the_facts_as_annotations() -> None:
    alarm = raised(host="web01-ab12", caveat="contention").alarm

    alert = build_alert(alarm, host="hv1", labels={"site": "north"}, ends_ns=T0_NS + 240 * S)

    assert alert["labels"] == {
        "alertname": "PhasewatchInfection",
        "vm": "web01",
        "vm_id": "web01-ab12",
        "host": "hv1",
        "kind": "infection",
        "severity": "critical",
        "site": "north",
    }
    assert isinstance(alert["annotations"], dict)
    assert alert["annotations"]["phase"] == "infecting"
    assert "infecting 0.80" in alert["annotations"]["probabilities"]
    assert alert["annotations"]["caveats"] == "contention"
    assert (alert["startsAt"], alert["endsAt"]) == (render_time(T0_NS), render_time(T0_NS + 240 * S))


def test_open_alarms_are_sent_again_at_the_interval_and_end_four_intervals_later() -> None:
    async def main(url: str) -> None:
        client = client_of(url, interval_s=1.0)
        client.set_firing(by_id(raised().alarm))
        await until(lambda: len(server.bodies) >= 2)
        await client.close()

    with run_receiver() as server:
        asyncio.run(main(server.url))

    first, second, *_ = (json.loads(body) for body in server.bodies)
    assert first == second
    assert first[0]["endsAt"] == render_time(T0_NS + 64 * S)
    assert set(server.paths) == {"/api/v2/alerts"}


def test_an_alarm_that_ends_is_sent_once_with_its_end() -> None:
    first, last = life()

    async def main(url: str) -> AlertmanagerClient:
        client = client_of(url, interval_s=3600.0)
        client.set_firing(by_id(first.alarm))
        await until(lambda: client.sent == 1)
        client.set_firing({})
        await until(lambda: client.sent == 2)
        await client.close()
        return client

    with run_receiver() as server:
        client = asyncio.run(main(server.url))

    assert len(server.bodies) == 2
    assert json.loads(server.bodies[1])[0]["endsAt"] == render_time(T0_NS + 60 * S)
    assert (client.counters.backlog, client.lost) == (0, 0)
    assert last.alarm.id == first.alarm.id


def test_after_an_outage_the_present_state_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    gone, new = raised(host="vm1").alarm, raised(host="vm2").alarm

    async def main(url: str) -> AlertmanagerClient:
        client = client_of(url, interval_s=3600.0)
        client.set_firing(by_id(gone))
        await until(lambda: len(server.bodies) >= 2)
        client.set_firing(by_id(new))
        await until(lambda: client.sent == 2)
        await client.close()
        return client

    with run_receiver(500, 500, 500, 500, 200) as server:
        client = asyncio.run(main(server.url))

    last = {alert["labels"]["vm_id"]: alert["endsAt"] for alert in json.loads(server.bodies[-1])}
    assert last == {"vm1": render_time(T0_NS + 60 * S), "vm2": render_time(T0_NS + 60 * S + 4 * 3600 * S)}
    assert (client.sent, client.lost, client.counters.is_failing) == (2, 0, False)
    assert len(caplog.records) == 2


def test_only_the_wanted_kinds_are_sent() -> None:
    async def main(url: str) -> None:
        client = client_of(url, kinds=(AlarmKind.INFECTION,))
        client.set_firing(by_id(raised(alarm=False, activity_alarm=True).alarm, raised().alarm))
        await until(lambda: bool(server.bodies))
        await client.close()

    with run_receiver() as server:
        asyncio.run(main(server.url))

    assert [alert["labels"]["kind"] for alert in json.loads(server.bodies[0])] == ["infection"]


def test_what_an_alertmanager_that_is_down_never_heard_is_counted() -> None:
    async def main() -> AlertmanagerClient:
        client = client_of("http://127.0.0.1:9")
        client.set_firing(by_id(raised().alarm))
        await until(lambda: client.counters.is_failing)
        await client.close()
        return client

    assert asyncio.run(main()).lost == 1


@contextmanager
def alertmanager(folder: Path) -> Iterator[str]:
    """Run a real Alertmanager on a free port."""
    program = need_program("prometheus-alertmanager", "prometheus-alertmanager")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    config = folder / "alertmanager.yml"
    config.write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
    words = [program, f"--config.file={config}", f"--storage.path={folder / 'data'}", "--cluster.listen-address="]
    words.append(f"--web.listen-address=127.0.0.1:{port}")
    env = {**os.environ, "GOMAXPROCS": "1"}
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env) as process:
        try:
            until_s = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < until_s:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/-/ready").is_success:
                        break
                except httpx.HTTPError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def list_alerts(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{url}/api/v2/alerts").json()
    return found


def test_a_real_alertmanager_shows_an_alarm_until_it_ends(tmp_path: Path) -> None:
    odd = 'web "01" \\ über 机'
    now_ns = time.time_ns()
    first = raised(vm=odd, host="web01-ab12", t_start_ns=now_ns - 10 * S, t_end_ns=now_ns, caveat="line\nbreak")

    async def main(url: str) -> None:
        client = client_of(url, time.time_ns, labels={"site": "north"})
        client.set_firing(by_id(first.alarm))
        await until(lambda: client.sent == 1)
        shown.extend(await asyncio.to_thread(list_alerts, url))
        client.set_firing({})
        await until(lambda: client.sent == 2)
        await until(lambda: not list_alerts(url))
        await client.close()
        assert (client.lost, client.counters.is_failing) == (0, False)

    shown: list[dict[str, Any]] = []
    with alertmanager(tmp_path) as url:
        asyncio.run(main(url))

    assert [(a["labels"]["vm"], a["labels"]["vm_id"], a["labels"]["site"]) for a in shown] == [
        (first.alarm.vm, "web01-ab12", "north")
    ]
    assert shown[0]["status"]["state"] == "active"
    assert shown[0]["startsAt"] == render_time(first.alarm.raised_ns)
    assert shown[0]["annotations"]["caveats"] == "line\nbreak"
