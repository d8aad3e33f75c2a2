"""The webhook: alarms reach a real server; one that is down or refuses delays nothing and is retried."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from tests.factories.alarms import envelope
from tests.factories.http_receivers import run_receiver

from phasewatch.alarms.delivery import RetryPolicy
from phasewatch.alarms.webhook import Webhook
from phasewatch.errors import UsageError
from phasewatch.events.schema import parse_event

QUICK = RetryPolicy(size=8, first_pause_s=0.01, longest_pause_s=0.01, flush_s=20.0)
BRIEF = RetryPolicy(size=8, first_pause_s=0.01, longest_pause_s=0.01, flush_s=0.3)


def post(url: str, count: int = 1, *, policy: RetryPolicy = QUICK, token: str | None = None) -> Webhook:
    async def main() -> Webhook:
        hook = Webhook(url, policy=policy, token=token)
        for number in range(count):
            hook.post(envelope(number))
        await hook.close()
        return hook

    return asyncio.run(main())


def test_an_alarm_arrives_as_its_event(caplog: pytest.LogCaptureFixture) -> None:
    with run_receiver() as server:
        hook = post(server.url, 3, token="secret")

    assert (hook.sent, hook.lost, caplog.records) == (3, 0, [])
    assert [parse_event(body) for body in server.bodies] == [envelope(0), envelope(1), envelope(2)]
    assert set(server.tokens) == {"Bearer secret"}


def test_a_failed_post_is_repeated_and_both_changes_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with run_receiver(500, 503, 429, 408, 204) as server:
        hook = post(server.url)

    assert (hook.sent, hook.lost, len(server.bodies)) == (1, 0, 5)
    assert len(caplog.records) == 2


def test_a_refused_alarm_is_not_repeated_but_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with run_receiver(404, 200) as server:
        hook = post(server.url, 2)

    assert (hook.sent, hook.lost, len(server.bodies)) == (1, 1, 2)
    assert "404" in caplog.records[0].message


def test_an_unreachable_server_costs_only_the_alarms(caplog: pytest.LogCaptureFixture) -> None:
    hook = post("http://127.0.0.1:9/", 3, policy=BRIEF)

    assert (hook.sent, hook.lost, hook.count_backlog()) == (0, 3, 0)
    assert len(caplog.records) == 1


def test_the_queue_is_bounded_and_drops_the_oldest_alarm() -> None:
    with run_receiver() as server:
        hook = post(server.url, QUICK.size + 10)

    assert (hook.sent, hook.lost) == (QUICK.size, 10)
    assert [parse_event(body) for body in server.bodies] == [envelope(n) for n in range(10, QUICK.size + 10)]


def test_unreadable_certificates_stop_only_the_webhook(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(httpx, "AsyncClient", refuse)

    hook = post("https://127.0.0.1:9/", 3, policy=BRIEF)

    assert (hook.sent, hook.lost, len(caplog.records)) == (0, 3, 1)


def test_an_answer_without_end_is_cut() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(100_000))
        with suppress(ConnectionError):
            await reader.read()
        writer.close()
        closed.set()

    async def main() -> Webhook:
        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        hook = Webhook(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", policy=QUICK)
        hook.post(envelope())
        await hook.close()
        server.close()
        await closed.wait()
        await asyncio.sleep(0)
        return hook

    closed = asyncio.Event()

    assert asyncio.run(main()).sent == 1


def test_a_file_without_certificates_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("none")

    with pytest.raises(UsageError, match="PEM certificates"):
        Webhook("https://x/", ca_file=str(tmp_path / "ca.pem"))


@pytest.mark.parametrize(
    "url",
    ["ftp://x/", "x", "file:///etc/passwd", "http://", "https:///alarm", "http://[::1", "http://xn--a/", "http://h:x/"],
)
def test_only_http_urls_are_accepted(url: str) -> None:
    with pytest.raises(UsageError, match="an http or https URL is needed"):
        Webhook(url)
