"""The webhook: alarms reach a real server, and a slow or refusing one delays nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from phasewatch.errors import UsageError
from phasewatch.events.schema import EventEnvelope, PhaseEvent, parse_event
from phasewatch.live import outputs
from phasewatch.live.outputs import WEBHOOK_QUEUE_SIZE, Webhook


class Server(HTTPServer):
    """Keeps what it was sent; answers with a code from a list, the last one for ever."""

    codes: list[int]
    bodies: list[bytes]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        codes = self.server.codes
        self.send_response(codes.pop(0) if len(codes) > 1 else codes[0])
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""


def test_unreadable_certificates_stop_only_the_webhook(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    async def main() -> Webhook:
        hook = Webhook("https://127.0.0.1:9/")
        monkeypatch.setattr(httpx, "AsyncClient", refuse)
        for _ in range(3):
            hook.post(alarm())
        await asyncio.sleep(0)
        await hook.close()
        return hook

    hook = asyncio.run(main())

    assert (hook.sent, hook.lost, len(caplog.records)) == (0, 3, 1)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.codes, made.bodies = [200], []
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "WEBHOOK_RETRY_S", 0.01)
    monkeypatch.setattr(outputs, "WEBHOOK_FLUSH_TIMEOUT_S", 20.0)


def alarm(number: int = 1) -> EventEnvelope:
    data = PhaseEvent(
        vm="web01",
        t_start_ns=1,
        t_end_ns=2,
        p=(0.0, 0.0, 0.0, 1.0, 0.0),
        decision="active",
        alarm=True,
        model="gbt",
        threat="realistic",
    )
    return EventEnvelope(id=f"web01/{number}", t_wall_ns=3, run="live", data=data)


def post(url: str, count: int = 1) -> Webhook:
    async def main() -> Webhook:
        hook = Webhook(url)
        for number in range(count):
            hook.post(alarm(number))
        await hook.close()
        return hook

    return asyncio.run(main())


def url_of(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/alarm"


def test_an_alarm_arrives_as_its_event(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    hook = post(url_of(server), 3)

    assert (hook.sent, hook.lost, caplog.records) == (3, 0, [])
    assert [parse_event(body) for body in server.bodies] == [alarm(0), alarm(1), alarm(2)]


def test_a_failed_post_is_repeated(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.codes = [500, 503, 204]

    hook = post(url_of(server))

    assert (hook.sent, hook.lost, caplog.records) == (1, 0, [])
    assert len(server.bodies) == 3


def test_a_refused_alarm_is_counted_and_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.codes = [404]

    hook = post(url_of(server))

    assert (hook.sent, hook.lost) == (0, 1)
    assert ["404" in record.message for record in caplog.records] == [True]


def test_an_unreachable_server_costs_only_the_alarm(caplog: pytest.LogCaptureFixture) -> None:
    hook = post("http://127.0.0.1:9/")

    assert (hook.sent, hook.lost) == (0, 1)
    assert len(caplog.records) == 1


def test_the_queue_is_bounded_and_drops_the_oldest_alarm(server: Server) -> None:
    hook = post(url_of(server), WEBHOOK_QUEUE_SIZE + 10)

    assert hook.sent + hook.lost == WEBHOOK_QUEUE_SIZE + 10
    assert hook.lost == 10
    assert parse_event(server.bodies[-1]) == alarm(WEBHOOK_QUEUE_SIZE + 9)


def test_an_alarm_does_not_wait_after_its_last_attempt(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "WEBHOOK_RETRY_S", 0.05)
    server.codes = [404]
    began_s = time.monotonic()

    hook = post(url_of(server))

    assert (hook.lost, len(server.bodies)) == (1, 4)
    assert time.monotonic() - began_s < 0.05 + 0.2 + 0.8 + 2.0  # and not 3.2 s more


@pytest.mark.parametrize(
    "url",
    ["ftp://x/", "x", "file:///etc/passwd", "http://", "https:///alarm", "http://[::1", "http://xn--a/", "http://h:x/"],
)
def test_only_http_urls_are_accepted(url: str) -> None:
    with pytest.raises(UsageError, match="an http or https URL is needed"):
        Webhook(url)
