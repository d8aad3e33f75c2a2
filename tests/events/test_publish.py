"""Events are sent on schedule, in order, in few requests and with retries; process metrics are correct."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.factories.dashboards import dashboard, event
from tests.factories.event_runs import playable
from tests.formats.test_golden_events import GOLDEN

from phasewatch.errors import EventError, MachineError
from phasewatch.events.from_replay import ReplayStep
from phasewatch.events.perf import REPLAY_LATENCY_EDGES_MS, ProcessMeter, read_own_rss_bytes
from phasewatch.events.publish import EventFileWriter, EventNumberer, EventPoster, send_on_schedule
from phasewatch.events.schema import EventData, EventEnvelope, parse_event

PERF, SCORE = GOLDEN["perf"][0], GOLDEN["score"][0]


class Clock:
    """A clock that advances only by sleeping."""

    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def play(
    steps: list[ReplayStep], speed: float, *, cost_s: float = 0.0, meter: ProcessMeter | None = None
) -> list[float]:
    clock = Clock()
    sent: list[float] = []

    async def send(data: EventData) -> None:
        sent.append(clock.now_s - 50.0)
        clock.now_s += cost_s

    asyncio.run(send_on_schedule(steps, send, speed=speed, monotonic=clock, sleep=clock.sleep, meter=meter))
    return sent


STEPS = [ReplayStep(at_s=float(i), data=PERF) for i in (1, 2, 6)]


def test_event_is_sent_when_it_is_due() -> None:
    assert play(STEPS, 1.0) == [1.0, 2.0, 6.0]
    assert play(STEPS, 4.0) == [0.25, 0.5, 1.5]
    assert play(STEPS, 0.0) == [0.0, 0.0, 0.0]


def test_late_events_are_counted_and_not_skipped() -> None:
    meter = ProcessMeter("replay")

    sent = play(STEPS, 1.0, cost_s=3.0, meter=meter)

    assert sent == [1.0, 4.0, 7.0]
    assert meter.read().late_ticks == 3  # each was sent more than a bin after it was due


def test_written_lines_are_numbered_and_can_be_parsed() -> None:
    numberer, file = EventNumberer("metrics", "demo", now_ns=lambda: 9), io.BytesIO()

    asyncio.run(EventFileWriter(file).send([numberer.wrap(PERF), numberer.wrap(SCORE)]))
    events = [parse_event(line) for line in file.getvalue().splitlines()]

    assert [(e.id, e.run, e.t_wall_ns, e.type) for e in events] == [
        ("metrics-1", "demo", 9, "perf"),
        ("metrics-2", "demo", 9, "score"),
    ]


def post(
    answers: Callable[[httpx.Request], httpx.Response], events: list[EventEnvelope], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phasewatch.events.publish.FIRST_RETRY_WAIT_S", 0.001)

    async def go() -> None:
        poster = EventPoster("http://127.0.0.1:1", "t" * 20)
        poster._client = httpx.AsyncClient(transport=httpx.MockTransport(answers), headers=poster._client.headers)
        async with aclosing(poster):
            await poster.send(events)

    asyncio.run(go())


def test_unavailable_dashboard_is_retried_with_the_same_body(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [httpx.Response(503), httpx.ConnectError("refused"), httpx.Response(202)]
    bodies = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        assert request.headers["authorization"] == "Bearer " + "t" * 20
        outcome = answers[len(bodies) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    post(answer, [event(PERF), event(SCORE)], monkeypatch)

    assert len(bodies) == 3
    assert len(set(bodies)) == 1
    assert len(bodies[0].splitlines()) == 2


@pytest.mark.parametrize(
    ("after", "waited_s"),
    [
        pytest.param("2", 2.0, id="seconds"),
        pytest.param("86400", 60.0, id="longer than the maximum"),
        pytest.param("Wed, 21 Oct 2026 07:28:00 GMT", 0.001, id="date"),
        pytest.param("inf", 0.001, id="infinity"),
    ],
)
def test_retry_after_is_respected_up_to_a_maximum(after: str, waited_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, waits = [httpx.Response(503, headers={"Retry-After": after}), httpx.Response(202)], []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("phasewatch.events.publish.asyncio.sleep", sleep)
    post(lambda request: answers.pop(0), [event(PERF)], monkeypatch)

    assert waits == [waited_s]


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        pytest.param(400, EventError, "400 what is wrong", id="malformed"),
        pytest.param(401, MachineError, "token", id="wrong token"),
        pytest.param(404, MachineError, "a dashboard", id="another server"),
    ],
)
def test_refused_request_is_not_retried(
    status: int, error: type[Exception], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(status, text="what is wrong")

    with pytest.raises(error, match=reason):
        post(answer, [event(PERF)], monkeypatch)
    assert len(requests) == 1


def test_many_events_are_split_into_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def answer(request: httpx.Request) -> httpx.Response:
        sizes.append(len(request.content))
        return httpx.Response(202)

    monkeypatch.setattr("phasewatch.events.publish.MAX_POST_BYTES", 1000)
    post(answer, [event(PERF)] * 10, monkeypatch)

    assert len(sizes) > 1
    assert max(sizes) <= 1010


def test_missing_dashboard_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phasewatch.events.publish.FIRST_RETRY_WAIT_S", 0.001)

    async def go() -> None:
        async with aclosing(EventPoster("http://127.0.0.1:9", "t" * 20)) as poster:
            await poster.send([event(PERF)])

    with pytest.raises(MachineError, match="`phasewatch dashboard RUN`"):
        asyncio.run(go())


@pytest.mark.parametrize("url", ["nonsense://x", "http://", "http://[::"])
def test_invalid_address_is_an_error(url: str) -> None:
    async def go() -> None:
        async with aclosing(EventPoster(url, "t" * 20)) as poster:
            await poster.send([event(PERF)])

    with pytest.raises(MachineError, match=r"http|nonsense"):
        asyncio.run(go())


def test_meter_reports_rates_latencies_and_memory() -> None:
    clock, cpu = Clock(), [3.0]
    meter = ProcessMeter("watch", vm="web-1", monotonic=clock, cpu_s=lambda: cpu[0], rss_bytes=lambda: 5_000)
    for ms in (0.05, 0.3, 0.3, 40.0, 900.0):
        meter.add_window(ms)
    clock.now_s += 10
    cpu[0] += 2.5
    meter.add_late_ticks(3)

    perf = meter.read(backlog=4)

    assert (perf.windows, perf.windows_per_s, perf.measured_s, perf.cpu_cores) == (5, 0.5, 10.0, 0.25)
    assert (perf.rss_bytes, perf.late_ticks, perf.backlog) == (5_000, 3, 4)
    assert perf.latency_edges_ms == REPLAY_LATENCY_EDGES_MS
    assert perf.latency_counts == (1, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 99, 100, 101, 1000])
def test_quantiles_match_numpy(n: int) -> None:
    values = np.random.default_rng(n).exponential(5, n)
    clock = Clock()
    meter = ProcessMeter("watch", monotonic=clock, cpu_s=lambda: 0.0)
    for ms in values:
        meter.add_window(float(ms))

    perf = meter.read()

    for quantile, q in ((perf.p50_ms, 0.5), (perf.p99_ms, 0.99)):
        assert quantile == round(float(np.quantile(values, q, method="inverted_cdf")), 4)


def test_meter_covers_the_last_minute_only() -> None:
    clock = Clock()
    meter = ProcessMeter("watch", monotonic=clock, cpu_s=lambda: clock.now_s / 2)
    meter.add_window(400.0)
    for _ in range(40):
        clock.now_s += 2
        meter.add_window(1.0)
        perf = meter.read()

    assert perf.windows <= 31
    assert perf.p99_ms == 1.0
    assert 58 <= perf.measured_s <= 62
    assert perf.cpu_cores == 0.5


def test_own_memory_is_measured() -> None:
    held = bytearray(64 * 1024 * 1024)
    held[::4096] = b"x" * len(held[::4096])

    assert read_own_rss_bytes() > 64 * 1024 * 1024


def test_run_is_published_to_a_dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from phasewatch.cli import app

    run = playable(tmp_path / "run")
    with dashboard(tmp_path) as running:
        for what in ("replay", "metrics", "profiles"):
            arguments = ["publish", what, str(run), "--speed", "200", "--to", running.address]
            done = CliRunner().invoke(app, [*arguments, "--token-file", str(tmp_path / "token")])
            assert done.exit_code == 0, done.output
        events = httpx.get(running.address + "healthz", trust_env=False).json()["events"]
        refused = CliRunner().invoke(
            app, ["publish", "metrics", str(run), "--to", running.address], env={"PHASEWATCH_TOKEN": "w" * 20}
        )

    # All bins at once at that speed, six windows and the alarm they raise, score and confusion, profiles.
    assert events == 1 + 6 + 1 + 2 + 1
    assert refused.exit_code == 5
    assert "token" in refused.output
