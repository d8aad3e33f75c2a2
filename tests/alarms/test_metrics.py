"""Metrics: valid for the reference parser and for promtool, bounded, and served to this machine alone."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as parse_old_format
from tests.factories.alarms import T0_NS, S, envelope, raised

from phasewatch.alarms.delivery import OutputCounters
from phasewatch.alarms.life import AlarmStatus
from phasewatch.alarms.metrics import METRIC_NAMES, MetricsFormat, MetricsSnapshot, WatchFigures, render_metrics
from phasewatch.alarms.metrics_server import MetricsServer
from phasewatch.errors import MachineError
from phasewatch.events.schema import EventEnvelope, PerfEvent, TelemetryEvent

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def telemetry(at_s: float = 0, **changes: Any) -> EventEnvelope:
    fields: dict[str, Any] = {
        "vm": "web01",
        "host": "web01",
        "origin": "live",
        "t0_ns": T0_NS + round(at_s * S) - S // 2,
        "bin_s": 0.5,
        "channels": ("proc.cpu_user",),
        "values": ((0.5,),),
        "flags": (0,),
        "lost_rows": 3,
        "late_rows": 1,
    }
    data = TelemetryEvent(**fields | changes)
    return EventEnvelope(id="t", t_wall_ns=T0_NS + round(at_s * S), run="live", data=data)


def snapshot_of(*events: EventEnvelope, **changes: Any) -> MetricsSnapshot:
    figures = WatchFigures()
    for event in events:
        figures.add(event)
    return MetricsSnapshot(**{"figures": figures, "now_ns": T0_NS + 2 * S} | changes)


def parse(snapshot: MetricsSnapshot) -> Samples:
    text = render_metrics(snapshot).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


WEB01 = {"vm": "web01", "vm_id": "web01"}


def test_the_figures_of_a_vm_are_shown() -> None:
    alarm = replace(raised().alarm, status=AlarmStatus.ACKNOWLEDGED)

    samples = parse(
        snapshot_of(telemetry(), envelope(), envelope(1), open_alarms=(alarm,), silenced=frozenset({alarm.id}))
    )

    assert samples[key("phasewatch_vm_phase_probability", phase="infecting", **WEB01)] == 0.8
    assert samples[key("phasewatch_vm_alarm", kind="infection", **WEB01)] == 1
    assert samples[key("phasewatch_vm_alarm_acknowledged", kind="infection", **WEB01)] == 1
    assert samples[key("phasewatch_vm_alarm_silenced", kind="infection", **WEB01)] == 1
    assert samples[key("phasewatch_vm_alarm", kind="activity", **WEB01)] == 0
    assert samples[key("phasewatch_vm_windows_total", **WEB01)] == 2
    assert samples[key("phasewatch_vm_lost_readings_total", **WEB01)] == 3
    assert samples[key("phasewatch_vm_readings_age_seconds", **WEB01)] == 2
    assert samples[key("phasewatch_vm_decision_age_seconds", **WEB01)] == 1
    assert samples[key("phasewatch_vm_decision_delay_seconds", **WEB01)] == 1.004


def test_the_outputs_and_the_process_are_shown() -> None:
    perf = PerfEvent(
        process="watch", measured_s=1, windows=0, windows_per_s=0, latency_edges_ms=(), latency_counts=(0,),
        rss_bytes=1000, cpu_cores=0.25,
    )  # fmt: skip
    output = OutputCounters(name="webhook", sent=5, lost=2, backlog=1, is_failing=True)

    samples = parse(snapshot_of(EventEnvelope(id="p", t_wall_ns=T0_NS, run="live", data=perf), outputs=(output,)))

    assert samples[key("phasewatch_output_sent_total", output="webhook")] == 5
    assert samples[key("phasewatch_output_lost_total", output="webhook")] == 2
    assert samples[key("phasewatch_output_failing", output="webhook")] == 1
    assert samples[key("phasewatch_process_resident_memory_bytes")] == 1000


def test_the_number_of_vms_is_bounded_and_those_with_an_alarm_come_first() -> None:
    events = [envelope(vm=f"vm{n}", host=f"vm{n}") for n in range(10)]
    alarm = raised(vm="vm9", host="vm9").alarm

    samples = parse(snapshot_of(*events, open_alarms=(alarm,), max_vms=2))

    shown = {dict(labels)["vm"] for name, labels in samples if name == "phasewatch_vm_windows_total"}
    assert shown == {"vm0", "vm9"}
    assert samples[key("phasewatch_vms")] == 10
    assert samples[key("phasewatch_vms_omitted")] == 8


def test_a_vm_that_ended_or_is_silent_for_ten_minutes_is_not_shown() -> None:
    figures = WatchFigures()
    for name in ("a", "b", "c"):
        figures.add(envelope(vm=name, host=name))
    figures.add(envelope(700, vm="b", host="b"))

    figures.forget("c")
    figures.forget_silent(T0_NS + 700 * S)

    assert figures.vms.keys() == {"b"}


@given(name=st.text(max_size=300))
def test_any_name_is_escaped_for_both_parsers(name: str) -> None:
    alarmed = replace(raised().alarm, vm_id=name)
    snapshot = snapshot_of(envelope(), telemetry(), open_alarms=(alarmed,))
    figures = snapshot.figures.vms["web01"]
    figures.vm = figures.vm_id = name

    samples = parse(snapshot)
    old = list(parse_old_format(render_metrics(snapshot, form=MetricsFormat.PROMETHEUS).decode()))

    shown = {dict(labels)["vm"] for sample, labels in samples if sample == "phasewatch_vm_windows_total"}
    assert len(shown) == 1
    if len(name) <= 256 and "\r" not in name:
        assert shown == {name.encode("utf-8", "replace").decode()}
    assert old


def test_an_empty_watch_has_every_metric_described() -> None:
    text = render_metrics(snapshot_of()).decode()

    assert list(text_string_to_metric_families(text))
    assert all(f"# HELP {name.removesuffix('_total')} " in text for name in METRIC_NAMES)


def test_promtool_finds_nothing_to_mend() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool: apt-get install --no-install-recommends prometheus (110 MB)")
    alarm = raised().alarm
    output = OutputCounters(name="webhook", sent=5, lost=2, backlog=1, is_failing=True)
    snapshot = snapshot_of(telemetry(), envelope(), open_alarms=(alarm,), outputs=(output,))
    text = render_metrics(snapshot, form=MetricsFormat.PROMETHEUS)

    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)

    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def serve(snapshot: MetricsSnapshot, ask: Callable[[str], Any]) -> Any:
    async def main() -> Any:
        server = MetricsServer(0, lambda: snapshot)
        server.start()
        try:
            return await asyncio.to_thread(ask, f"http://127.0.0.1:{server.port}")
        finally:
            await server.close()

    return asyncio.run(main())


@pytest.fixture
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.mark.usefixtures("_no_proxies")
def test_the_endpoint_answers_in_the_format_that_is_asked_for() -> None:
    def ask(url: str) -> tuple[httpx.Response, httpx.Response]:
        accept = {"accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
        return httpx.get(f"{url}/metrics", headers=accept), httpx.get(f"{url}/metrics")

    new, old = serve(snapshot_of(envelope()), ask)

    assert new.headers["content-type"].startswith("application/openmetrics-text")
    assert list(text_string_to_metric_families(new.text))
    assert old.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert list(parse_old_format(old.text))


@pytest.mark.usefixtures("_no_proxies")
@pytest.mark.parametrize(
    ("path", "method", "host", "code"),
    [
        ("/", "GET", None, 404),
        ("/metrics", "POST", None, 405),
        ("/metrics", "HEAD", None, 200),
        ("/metrics", "GET", "evil.example", 421),
        ("/metrics", "GET", "localhost:1234", 200),
    ],
)
def test_other_requests_are_refused(path: str, method: str, host: str | None, code: int) -> None:
    def ask(url: str) -> httpx.Response:
        return httpx.request(method, url + path, headers={"host": host} if host else {})

    response = serve(snapshot_of(), ask)

    assert response.status_code == code
    assert response.text == "" or method != "HEAD"


def test_a_port_in_use_is_an_error_at_the_start() -> None:
    server = MetricsServer(0, snapshot_of)
    try:
        with pytest.raises(MachineError, match="choose another port"):
            MetricsServer(server.port, snapshot_of)
    finally:
        asyncio.run(server.close())
