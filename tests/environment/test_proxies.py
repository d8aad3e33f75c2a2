"""Proxy variables of a shell: nothing of ours goes to a proxy, and a strange value ends no command."""

from __future__ import annotations

import ast
import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from socket import create_server, socket

import pytest
from tests.environment.commands import SRC
from typer.testing import CliRunner

from phasewatch.alarms.delivery import DeliveryFailure
from phasewatch.alarms.webhook import Webhook
from phasewatch.cli import app
from phasewatch.errors import PhasewatchError, UsageError
from phasewatch.events.publish import EventPoster
from phasewatch.http_client import is_clear_text
from phasewatch.store.base import open_store

NAMES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
SECRET = "s3cr3t" * 6


class Listener:
    """A server that keeps the head of each request and refuses it."""

    def __init__(self, status: str) -> None:
        self.heard: list[bytes] = []
        self._status = status
        self._socket: socket = create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client:
                self.heard.append(client.recv(65536))
                client.sendall(f"HTTP/1.1 {self._status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def target() -> Iterator[Listener]:
    with closing(Listener("403 Forbidden")) as listener:
        yield listener


@pytest.fixture
def proxy() -> Iterator[Listener]:
    with closing(Listener("502 Bad Gateway")) as listener:
        yield listener


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    folder = tmp_path / "outbox"
    open_store(str(folder)).put("pc-a", "0199c82c-c000-7000-8000-000000000001", b"x")
    tokens = tmp_path / "tokens"
    tokens.write_text(f"pc-a: {SECRET}\n")
    tokens.chmod(0o600)
    return folder


def ship(url: str, folder: Path) -> None:
    words = ["ship", "--outbox", str(folder / "outbox"), "--to", url, "--tokens", str(folder / "tokens")]
    done = CliRunner().invoke(app, [*words, "--give-up-after", "0.1"])
    assert done.exit_code in (3, 5), done.output


def post_event(url: str, folder: Path) -> None:
    async def go() -> None:
        poster = EventPoster(url, SECRET)
        try:
            await poster._client.post(poster._url, content=b"{}")
        finally:
            await poster.aclose()

    asyncio.run(go())


def post_alarm(url: str, folder: Path) -> None:
    async def go() -> None:
        webhook = Webhook(url)
        with pytest.raises(DeliveryFailure):
            await webhook._send(b"{}")
        await webhook.close()

    asyncio.run(go())


def list_bucket(url: str, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ENDPOINT_URL", url), ("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", SECRET)):
            patch.setenv(f"AWS_{name}", value)
        with pytest.raises(PhasewatchError):
            list(open_store("s3://bucket/prefix").walk())


@pytest.mark.parametrize(
    "value",
    [
        "http://127.0.0.1:{port}",
        "127.0.0.1:{port}",
        "socks5://127.0.0.1:{port}",
        "socks://127.0.0.1:{port}",
        "http://user:word@[::1",
    ],
)
@pytest.mark.parametrize("call", [ship, post_event, post_alarm, list_bucket])
def test_a_request_to_this_machine_passes_no_proxy(
    call: Callable[[str, Path], None],
    value: str,
    target: Listener,
    proxy: Listener,
    outbox: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    for name in NAMES:
        monkeypatch.setenv(name, value.format(port=proxy.port))

    call(f"http://127.0.0.1:{target.port}", outbox.parent)

    assert proxy.heard == []
    assert target.heard


def test_a_request_over_tls_passes_no_proxy_either(
    target: Listener, proxy: Listener, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")

    ship(f"https://127.0.0.1:{target.port}", outbox.parent)

    assert proxy.heard == []
    assert target.heard


@pytest.mark.parametrize("url", ["http://192.0.2.1:8765", "HTTP://page.example/events", "http://[2001:db8::1]"])
def test_the_dashboards_token_is_not_sent_in_the_clear_to_another_machine(url: str) -> None:
    with pytest.raises(UsageError, match="in the clear"):
        EventPoster(url, SECRET)


def test_this_machine_and_tls_are_not_in_the_clear() -> None:
    assert not [
        url
        for url in ("http://127.0.0.1:1", "http://localhost", "http://[::1]:9", "https://x", "nonsense", "http://[::")
        if is_clear_text(url)
    ]


def test_one_module_makes_every_http_client() -> None:
    makers = {
        path.name
        for path in SRC.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).startswith("httpx.")
        and not ast.unparse(node.func).endswith((".URL", ".Timeout"))
    }

    assert makers == {"http_client.py"}
