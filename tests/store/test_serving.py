"""The receiver on a real socket: its patience, 100-continue, bounds on heads and refused bodies, TLS, an orderly end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
import uvicorn
from tests.requirements import need_program
from tests.store.desks import IDS, ROOMY, TOKENS, Desk, headers_of, path_of

from phasewatch.errors import UsageError
from phasewatch.store.serving import Listen, PatientProtocol, bind, configure, parse_listen

DATA = b"a bundle's bytes" * 100
TOKENS_TEXT = "".join(f"{host_id}: {token}\n" for host_id, token in TOKENS.items())


class Hasty(PatientProtocol):
    head_s = 0.3
    drain_s = 0.3
    most = 8


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "store")


@pytest.fixture
def port(desk: Desk) -> Iterator[int]:
    """Serve in a thread, with little patience."""
    listen = Listen(host="127.0.0.1", port=0)
    with bind(listen) as bound:
        server = uvicorn.Server(configure(desk.receiver, listen, ROOMY, protocol=Hasty))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        yield bound.getsockname()[1]
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def head_of(data: bytes, **more: str) -> bytes:
    headers = {**headers_of(data), "Host": "store", "Content-Length": str(len(data)), **more}
    lines = [f"PUT {path_of()} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def hear_out(connection: socket.socket) -> bytes:
    """Read until the other side closes, in order or not."""
    heard = b""
    with suppress(ConnectionResetError):
        while more := connection.recv(4096):
            heard += more
    return heard


def test_a_head_that_never_ends_is_cut(port: int) -> None:
    with connect(port) as silent, connect(port) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: ")

        assert silent.recv(1) == b""
        assert slow.recv(1) == b""


def test_more_connections_than_there_are_places_for_are_cut_at_once(port: int) -> None:
    with ExitStack() as stack:
        crowd = [stack.enter_context(connect(port)) for _ in range(12)]
        answered = 0
        for connection in crowd[8:]:  # the eight before them say nothing, and keep their places for a while
            with suppress(OSError):
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                answered += hear_out(connection).startswith(b"HTTP/1.1 200")

    assert answered < 4
    assert httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200


def test_the_head_of_a_later_request_has_no_more_time_than_the_first(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /hea")

        assert hear_out(connection).count(b"HTTP/1.1 200 OK") == 1


def test_a_head_that_is_too_large_is_refused(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (32 << 10))

        assert connection.recv(4096).startswith(b"HTTP/1.1 400")


def test_a_body_is_asked_for_only_when_it_is_wanted(port: int, desk: Desk) -> None:
    with connect(port) as wanted, connect(port) as unwanted:
        wanted.sendall(head_of(DATA, Expect="100-continue"))
        unwanted.sendall(head_of(DATA, Expect="100-continue", Authorization="Bearer nobodys"))

        assert wanted.recv(4096).startswith(b"HTTP/1.1 100 Continue")
        assert unwanted.recv(4096).startswith(b"HTTP/1.1 401")
        wanted.sendall(DATA)
        assert wanted.recv(4096).startswith(b"HTTP/1.1 201")
    assert len(list(desk.store.walk())) == 1


def test_a_client_that_listens_only_at_its_end_still_hears_why_it_was_refused(port: int) -> None:
    answer = httpx.put(
        f"http://127.0.0.1:{port}{path_of()}", content=bytes((16 << 20) + 1), headers=headers_of(b""), trust_env=False
    )

    assert answer.status_code == 413


def test_the_rest_of_a_refused_body_is_not_waited_for_without_end(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(head_of(DATA, Authorization="Bearer nobodys"))

        assert hear_out(connection).startswith(b"HTTP/1.1 401")


def test_a_connection_serves_one_bundle_after_another(port: int, desk: Desk) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        for n in range(5):
            assert client.put(path_of(n), content=DATA, headers=headers_of(DATA)).status_code == 201
            assert client.put(path_of(n), content=b"x", headers=headers_of(b"x")).status_code == 409

    assert len(list(desk.store.walk())) == 5


def test_what_is_no_http_is_refused_and_harms_nobody(port: int) -> None:
    for noise in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", os.urandom(4096) + b"\r\n\r\n"):
        with connect(port) as connection:
            connection.sendall(noise)
            connection.recv(4096)

    assert httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("8470", {}, "HOST:PORT is needed"),
        ("host:port", {}, "HOST:PORT is needed"),
        ("127.0.0.1:99999", {}, "HOST:PORT is needed"),
        ("0.0.0.0:8470", {}, "in the clear"),
        ("192.0.2.1:8470", {}, "in the clear"),
        ("store.example:8470", {}, "in the clear"),
        ("127.0.0.1:8470", {"cert": Path("x")}, "belong together"),
    ],
)
def test_a_place_to_listen_is_checked_before_a_token_can_cross_a_network(
    text: str, options: dict[str, Path], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        parse_listen(text, **{"cert": None, "key": None, "behind_proxy": False, **options})  # type: ignore[arg-type]


def test_tls_or_a_proxy_let_it_listen_to_the_network() -> None:
    pem = Path("x.pem")

    assert parse_listen("[::1]:0", cert=None, key=None, behind_proxy=False).url == "http://[::1]:0"
    assert parse_listen("0.0.0.0:1", cert=pem, key=pem, behind_proxy=False).url == "https://0.0.0.0:1"
    assert parse_listen("0.0.0.0:1", cert=None, key=None, behind_proxy=True).behind_proxy


def start(tmp_path: Path, *options: str | Path) -> tuple[subprocess.Popen[str], str, list[str]]:
    """Start the command and wait for the line that says where it listens."""
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKENS_TEXT)
    tokens.chmod(0o600)
    command = [sys.executable, "-m", "phasewatch", "receive", "--store", tmp_path / "store", "--tokens", tokens,
               "--listen", "127.0.0.1:0", "--floor", "0", *options]  # fmt: skip
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "receiving" in line, line
    return process, line.split('"receiving": "')[1].split('"')[0], [line]


def closes(port: int) -> bool:
    for _ in range(200):
        try:
            connect(port).close()
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_an_orderly_end_finishes_what_is_in_flight(tmp_path: Path) -> None:
    process, url, _ = start(tmp_path, "--json")
    port = int(url.rpartition(":")[2])
    with connect(port) as connection:
        connection.sendall(head_of(DATA) + DATA[:100])
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert closes(port)
        connection.sendall(DATA[100:])

        assert connection.recv(4096).startswith(b"HTTP/1.1 201")
    out, _ = process.communicate(timeout=30)

    assert process.returncode == 0
    assert '"201": 1' in out
    assert (tmp_path / "store" / "pc-a" / f"{IDS[0]}.tar.zst").read_bytes() == DATA


def test_over_tls_a_shipper_that_knows_the_certificate_is_served(tmp_path: Path) -> None:
    openssl = need_program("openssl", "openssl")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    process, url, _ = start(tmp_path, "--cert", cert, "--key", key)
    outbox = tmp_path / "outbox" / "pc-a" / f"{IDS[0]}.tar.zst"
    outbox.parent.mkdir(parents=True)
    outbox.write_bytes(DATA)
    command = [sys.executable, "-m", "phasewatch", "ship", "--outbox", tmp_path / "outbox", "--to", url,
               "--tokens", tmp_path / "tokens", "--patience", "1"]  # fmt: skip

    strange = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=60)
    known = subprocess.run([str(c) for c in [*command, "--ca", cert]], capture_output=True, text=True, timeout=60)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)

    assert url.startswith("https://")
    assert (strange.returncode, "certificate" in strange.stdout.lower()) == (5, True)
    assert (known.returncode, known.stdout.splitlines()[-1]) == (0, str(tmp_path / "outbox"))
    assert process.returncode == 0
    assert (tmp_path / "store" / "pc-a" / f"{IDS[0]}.tar.zst").read_bytes() == DATA


def test_a_port_that_is_taken_and_a_certificate_that_is_none_are_one_clear_line(tmp_path: Path) -> None:
    from phasewatch.errors import MachineError

    pem = tmp_path / "x.pem"
    pem.write_text("no certificate")
    listen = Listen(host="127.0.0.1", port=0)
    with bind(listen) as bound:
        with pytest.raises(MachineError, match="choose another --listen"):
            bind(Listen(host="127.0.0.1", port=bound.getsockname()[1]))

    with pytest.raises(UsageError, match="readable PEM"):
        configure(Desk(tmp_path / "store").receiver, Listen(host="127.0.0.1", port=0, cert=pem, key=pem), ROOMY)
