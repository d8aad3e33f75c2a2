"""All outputs together: the watch is never delayed, a silence holds alarms back, a restart pages nobody twice."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.factories.alarms import T0_NS, S, envelope, silence_of
from tests.factories.http_receivers import HttpReceiver, run_receiver

from phasewatch.alarms import keeper
from phasewatch.alarms.config import (
    AlertmanagerConfig,
    CommandConfig,
    EcsConfig,
    MetricsConfig,
    OutputConfig,
    SyslogConfig,
    WebhookConfig,
)
from phasewatch.alarms.history import ALARMS_FILE, AlarmHistory, read_alarms, read_changes
from phasewatch.alarms.life import AlarmResolution, AlarmStatus
from phasewatch.alarms.outputs import AlarmOutputs, open_outputs
from phasewatch.errors import AlarmStoreError, UsageError
from phasewatch.events.schema import PhaseEvent, parse_event
from phasewatch.models.alarm import AlarmKind


def until(is_true: Callable[[], object], limit_s: float = 30.0) -> None:
    end_s = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.01)


class Clock:
    """A wall clock that a test moves."""

    def __init__(self, at_s: float = 0.0) -> None:
        self.at_s = at_s

    def __call__(self) -> int:
        return T0_NS + round(self.at_s * S)


@contextmanager
def outputs_of(state: Path | None, clock: Callable[[], int] = time.time_ns, **tables: Any) -> Iterator[AlarmOutputs]:
    outputs = AlarmOutputs(OutputConfig(**tables), state, wall_ns=clock)
    outputs.start()
    with outputs:
        yield outputs


def send(outputs: AlarmOutputs, states: str, *, from_s: int = 0, **changes: Any) -> None:
    """Pass one event a second: ``!`` with the infection alarm on, ``.`` with it off."""
    for second, state in enumerate(states, from_s):
        outputs.on_event(envelope(second, alarm=state == "!", **changes), True)


def posted(server: HttpReceiver) -> list[tuple[str, bool | None, tuple[str, ...]]]:
    """Return VM, state and changes of each event that a webhook got."""
    events = [parse_event(body).data for body in server.bodies]
    return [(e.vm, e.alarm, e.alarm_changes) for e in events if isinstance(e, PhaseEvent)]


def test_an_alarm_reaches_every_output(tmp_path: Path) -> None:
    got = tmp_path / "got"
    with run_receiver() as hook, run_receiver() as manager, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        udp.settimeout(20)
        tables: dict[str, Any] = {
            "webhook": WebhookConfig(url=hook.url),
            "alertmanager": AlertmanagerConfig(urls=(manager.url,)),
            "syslog": SyslogConfig(address=f"udp://127.0.0.1:{udp.getsockname()[1]}"),
            "ecs": EcsConfig(file=str(tmp_path / "ecs.json")),
            "metrics": MetricsConfig(port=0),
            "command": CommandConfig(command=("sh", "-c", f"echo $PHASEWATCH_STATE >> {got}")),
        }
        with outputs_of(tmp_path / "state", **tables) as outputs:
            send(outputs, "..!!.")
            until(lambda: len(hook.bodies) == 2 and got.exists() and got.read_text().count("\n") == 2)
            page = httpx.get(f"http://127.0.0.1:{outputs.metrics_port}/metrics", trust_env=False).text
        messages = [udp.recv(4096) for _ in range(2)]
        counters = {each.name: (each.sent, each.lost) for each in outputs.counters()}

    assert posted(hook) == [("web01", True, ("infection",)), ("web01", False, ("infection",))]
    assert [b"alarm-raised" in m or b"alarm-resolved" in m for m in messages] == [True, True]
    assert [json.loads(line)["event"]["action"] for line in (tmp_path / "ecs.json").read_text().splitlines()] == [
        "alarm-raised",
        "alarm-resolved",
    ]
    assert sorted(got.read_text().split()) == ["raised", "resolved"]
    assert 'phasewatch_vm_windows_total{vm="web01",vm_id="web01"} 5' in page
    assert [a.status for a in read_alarms(tmp_path / "state")] == [AlarmStatus.RESOLVED]
    assert {name: lost for name, (_, lost) in counters.items() if lost} == {}
    assert {name for name, (sent, _) in counters.items() if sent == 2} >= {
        "webhook",
        "syslog",
        "ecs",
        "command",
        "history",
    }


def test_a_restarted_watch_pages_nobody_a_second_time(tmp_path: Path) -> None:
    with run_receiver() as hook:
        tables = {"webhook": WebhookConfig(url=hook.url)}
        with outputs_of(tmp_path, Clock(3), **tables) as outputs:
            send(outputs, ".!!")
        with outputs_of(tmp_path, Clock(100), **tables) as outputs:
            send(outputs, "...!!!", from_s=100)
            send(outputs, "." * 40, from_s=200)

    assert posted(hook) == [("web01", True, ("infection",)), ("web01", False, ("infection",))]
    (alarm,) = read_alarms(tmp_path)
    assert (alarm.raised_ns, alarm.resolution) == (T0_NS + 1 * S, AlarmResolution.PROBABILITY)


def test_a_silenced_alarm_is_kept_and_announced_only_if_it_outlives_the_silence(tmp_path: Path) -> None:
    clock = Clock(1)
    with AlarmHistory(tmp_path) as history:
        history.add_silence(silence_of(until_ns=T0_NS + 100 * S))
    with run_receiver() as hook, run_receiver() as manager:
        tables: dict[str, Any] = {
            "webhook": WebhookConfig(url=hook.url),
            "alertmanager": AlertmanagerConfig(urls=(manager.url,)),
        }
        with outputs_of(tmp_path, clock, **tables) as outputs:
            send(outputs, "!.!!")
            until(lambda: len(read_alarms(tmp_path)) == 2)
            assert (hook.bodies, manager.bodies) == ([], [])
            clock.at_s = 100
            until(lambda: hook.bodies and manager.bodies)

    assert posted(hook) == [("web01", True, ("infection",))]
    assert [alert["labels"]["vm"] for alert in json.loads(manager.bodies[0])] == ["web01"]
    newest = read_alarms(tmp_path)[0]
    assert [(str(row.kind), row.is_silenced) for row in read_changes(tmp_path, newest.id)] == [
        ("raised", True),
        ("unsilenced", False),
    ]


def test_a_silence_of_another_process_takes_an_alarm_back_from_alertmanager(tmp_path: Path) -> None:
    with (
        run_receiver() as manager,
        outputs_of(tmp_path, Clock(1), alertmanager=AlertmanagerConfig(urls=(manager.url,))) as outputs,
    ):
        send(outputs, "!")
        until(lambda: manager.bodies)
        with AlarmHistory(tmp_path) as history:
            history.add_silence(silence_of())
        until(lambda: len(manager.bodies) == 2)

    ends = [json.loads(body)[0]["endsAt"] for body in manager.bodies]
    assert ends[1] < ends[0]


def test_an_acknowledgement_of_another_process_reaches_the_logs(tmp_path: Path) -> None:
    with outputs_of(tmp_path / "s", Clock(1), ecs=EcsConfig(file=str(tmp_path / "ecs.json"))) as outputs:
        send(outputs, "!")
        until(lambda: read_alarms(tmp_path / "s"))
        with AlarmHistory(tmp_path / "s") as history:
            history.acknowledge(read_alarms(tmp_path / "s")[0].id, T0_NS + S, by="ann", note="looking")
        until(lambda: (tmp_path / "ecs.json").read_text().count("\n") == 2)

    line = json.loads((tmp_path / "ecs.json").read_text().splitlines()[1])
    assert (line["event"]["action"], line["phasewatch"]["alarm"]["by"]) == ("alarm-acknowledged", "ann")
    changes = read_changes(tmp_path / "s", read_alarms(tmp_path / "s")[0].id)
    assert [str(row.kind) for row in changes] == ["raised", "acknowledged"]


def test_the_end_of_a_vm_resolves_its_alarms(tmp_path: Path) -> None:
    with run_receiver() as hook, outputs_of(tmp_path, Clock(1), webhook=WebhookConfig(url=hook.url)) as outputs:
        send(outputs, "!")
        send(outputs, "!", vm="db01", host="db01")
        outputs.on_vm_gone("web01")
        until(lambda: len(hook.bodies) == 3)

    assert posted(hook)[2] == ("web01", False, ("infection",))
    assert [(a.vm, a.resolution) for a in read_alarms(tmp_path) if not a.is_open] == [
        ("web01", AlarmResolution.VM_GONE)
    ]


def test_an_alarm_that_nobody_watched_for_a_day_ends(tmp_path: Path) -> None:
    with outputs_of(tmp_path, Clock(1)) as outputs:
        send(outputs, "!")
    clock = Clock(86_500)
    with outputs_of(tmp_path, clock):
        time.sleep(0.1)
        clock.at_s += 100
        until(lambda: not read_alarms(tmp_path, is_open=True))

    assert read_alarms(tmp_path)[0].resolution is AlarmResolution.STALE


def test_only_the_wanted_kinds_page(tmp_path: Path) -> None:
    with run_receiver() as hook:
        table = WebhookConfig(url=hook.url, kinds=(AlarmKind.INFECTION,))
        with outputs_of(None, webhook=table) as outputs:
            outputs.on_event(envelope(0, alarm=False, activity_alarm=True), True)
            outputs.on_event(envelope(1, alarm=True, activity_alarm=True), True)

    assert posted(hook) == [("web01", True, ("infection",))]


def test_receivers_that_hang_do_not_delay_the_watch(tmp_path: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(1)  # accepts, and never answers
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        tables: dict[str, Any] = {
            "webhook": WebhookConfig(url=url),
            "alertmanager": AlertmanagerConfig(urls=(url,)),
            "syslog": SyslogConfig(address=f"tcp://127.0.0.1:{deaf.getsockname()[1]}"),
            "command": CommandConfig(command=("sleep", "1000")),
        }
        with outputs_of(tmp_path, **tables) as outputs:
            began_s = time.thread_time()
            for number in range(600):
                outputs.on_event(envelope(number, alarm=number % 2 == 0, vm=f"vm{number % 64}"), True)
            used_s = time.thread_time() - began_s
            until(lambda: outputs.count_backlog() > 4)
    counters = {each.name: each for each in outputs.counters()}

    assert used_s < 2.0
    assert counters["webhook"].sent == 0
    assert counters["webhook"].lost > 0
    assert counters["webhook"].backlog == 0


def test_a_damaged_history_stops_no_alarm_and_a_new_one_is_begun(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_RETRY_NS", 0)
    (tmp_path / ALARMS_FILE).write_bytes(b"no database" * 1000)
    with run_receiver() as hook, outputs_of(tmp_path, webhook=WebhookConfig(url=hook.url)) as outputs:
        send(outputs, "!")
        until(lambda: hook.bodies)
        (tmp_path / ALARMS_FILE).rename(tmp_path / "damaged")
        until(lambda: read_alarms(tmp_path))

    assert [alarm.vm for alarm in read_alarms(tmp_path)] == ["web01"]
    assert len([r for r in caplog.records if "damaged, or not" in r.message]) == 1


def test_a_full_disk_keeps_changes_until_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_RETRY_NS", 0)
    is_full, real = threading.Event(), AlarmHistory.record
    is_full.set()

    def record(self: AlarmHistory, changes: Any) -> None:
        if is_full.is_set():
            raise AlarmStoreError("database or disk is full")
        real(self, changes)

    monkeypatch.setattr(AlarmHistory, "record", record)
    with outputs_of(tmp_path) as outputs:
        send(outputs, "!.!.")
        until(lambda: any(each.is_failing for each in outputs.counters()))
        assert read_alarms(tmp_path) == ()
        is_full.clear()
        until(lambda: len(read_alarms(tmp_path)) == 2)
    (history,) = outputs.counters()

    assert (history.sent, history.lost, history.backlog) == (4, 0, 0)
    assert len([r for r in caplog.records if "history of alarms" in r.message]) == 2


def test_settings_with_faults_are_refused_before_anything_is_opened(tmp_path: Path) -> None:
    config = OutputConfig(webhook=WebhookConfig(url="ftp://x"), syslog=SyslogConfig(address="x"))

    with pytest.raises(UsageError, match=r"webhook\.url.*syslog\.address"):
        open_outputs(config, tmp_path)


def test_outputs_close_from_within_an_event_loop(tmp_path: Path) -> None:
    async def main() -> AlarmOutputs:
        outputs = open_outputs(OutputConfig(), tmp_path)
        send(outputs, "!")
        await outputs.close()
        return outputs

    outputs = asyncio.run(main())
    outputs.on_event(envelope(), True)  # after the end: it is ignored

    assert len(read_alarms(tmp_path)) == 1


def test_without_outputs_and_state_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with outputs_of(None) as outputs:
        send(outputs, "!!..")

    assert outputs.counters() == ()
    assert list(tmp_path.iterdir()) == []
