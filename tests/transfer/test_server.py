"""The receiver on a real socket: its patience, 100-continue, bounds on heads and refused bodies, TLS, an orderly
end."""

from __future__ import annotations

import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import uvicorn
from tests.factories.receivers import IDS, ROOMY, TOKENS, Desk, headers_of, path_of
from tests.requirements import need_program

from phasewatch.errors import MachineError, UsageError
from phasewatch.http_server.connections import ConnectionLimits
from phasewatch.transfer.server import ListenAddress, bind_socket, build_server_config, parse_listen_address

DATA = b"a bundle's bytes" * 100
TOKENS_TEXT = "".join(f"{host_id}: {token}\n" for host_id, token in TOKENS.items())


HASTY = ConnectionLimits(
    connections=8,
    reserved=0,
    per_address=8,
    head_s=0.3,
    drain_s=0.3,
    idle_s=0.3,
    stall_s=0.3,
    handshake_s=0.3,
    sweep_s=0.05,
)


PATIENT = replace(HASTY, idle_s=60, head_s=60, drain_s=60, stranger_s=60, stall_s=60, handshake_s=60)
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "store")


@contextmanager
def serving(desk: Desk, limits: ConnectionLimits = HASTY, *, host: str = "127.0.0.1", **listen: Path) -> Iterator[int]:
    """Serve in a thread; give the port."""
    where = ListenAddress(host=host, port=0, **listen)
    with bind_socket(where) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # a client that reads nothing is felt early
        server = uvicorn.Server(build_server_config(desk.receiver, where, ROOMY, connections=limits))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        yield bound.getsockname()[1]
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def port(desk: Desk) -> Iterator[int]:
    """Serve with little patience."""
    with serving(desk) as number:
        yield number


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


def test_more_connections_than_there_are_places_for_are_cut_at_once(desk: Desk) -> None:
    with serving(desk, PATIENT) as port, ExitStack() as stack:
        crowd = [stack.enter_context(connect(port)) for _ in range(8)]  # they say nothing
        for _ in range(4):
            newcomer = stack.enter_context(connect(port))
            newcomer.sendall(HEALTH)
            assert newcomer.recv(4096).startswith(b"HTTP/1.1 200")

        assert [hear_out(connection) for connection in crowd[:4]] == [b""] * 4
        crowd[-1].sendall(HEALTH)
        assert crowd[-1].recv(4096).startswith(b"HTTP/1.1 200")


HOLDERS = {
    "silent": b"",
    "after an answer": HEALTH,
    "with half a head": b"GET /healthz HTTP/1.1\r\nHost: ",
    "waiting for 100 Continue": b"PUT %s HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 99\r\n\r\n"
    % path_of().encode(),
    "with a refused body that never ends": b"PUT %s HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nx"
    % path_of().encode(),
    "asking for a WebSocket": b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "keeping HTTP/1.0 alive": b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    "in an endless chunk extension": b"GET /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;a="
    + b"b" * 9999,
    "with a head that is refused": b"GET /healthz HTTP/1.1\nHost: x\n\n",
}


@pytest.mark.parametrize("said", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("sources", [["127.0.0.1"], [f"127.0.{n}.1" for n in range(24)]], ids=["one address", "many"])
def test_strangers_that_hold_connections_shut_nobody_out(desk: Desk, said: bytes, sources: list[str]) -> None:
    with serving(desk, PATIENT) as port, ExitStack() as stack:
        for n in range(24):
            source = (sources[n % len(sources)], 0)
            holder = stack.enter_context(socket.create_connection(("127.0.0.1", port), 20, source))
            with suppress(OSError):
                holder.sendall(said)

        answers = [
            httpx.put(f"http://127.0.0.1:{port}{path_of(n)}", content=DATA, headers=headers_of(DATA), trust_env=False)
            for n in range(3)
        ]

    assert [answer.status_code for answer in answers] == [201] * 3


@pytest.mark.parametrize("said", HOLDERS.values(), ids=HOLDERS)
def test_a_stranger_that_holds_a_connection_is_soon_cut(port: int, said: bytes) -> None:
    with connect(port) as holder:
        holder.sendall(said)

        hear_out(holder)  # ends


def test_a_stranger_over_ipv6_is_one_of_this_machine_too(desk: Desk) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        stack = ExitStack()
        port = stack.enter_context(serving(desk, PATIENT, host="::1"))
    except MachineError:
        pytest.skip("no address ::1 here")
    with stack:
        crowd = [stack.enter_context(socket.create_connection(("::1", port), 20)) for _ in range(9)]

        assert hear_out(crowd[0]) == b""


def test_a_connection_with_a_valid_token_outlasts_strangers(desk: Desk) -> None:
    with serving(desk, PATIENT) as port, ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False))
        first = client.put(path_of(0), content=DATA, headers=headers_of(DATA)).extensions["network_stream"]
        for _ in range(30):
            stack.enter_context(connect(port))
        answer = client.put(path_of(1), content=DATA, headers=headers_of(DATA))

        assert answer.status_code == 201
        mine = "client_addr"
        assert answer.extensions["network_stream"].get_extra_info(mine) == first.get_extra_info(mine)


def test_a_stranger_has_so_many_requests_on_a_connection(desk: Desk) -> None:
    with serving(desk, replace(PATIENT, stranger_requests=5)) as port, connect(port) as connection:
        connection.sendall(HEALTH * 50)

        assert hear_out(connection).count(b"HTTP/1.1 200") == 5


def test_answers_that_nobody_reads_are_cut(desk: Desk) -> None:
    desk.put(DATA)
    ask = f"GET {path_of()} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKENS['pc-a']}\r\n\r\n".encode()
    with serving(desk, replace(PATIENT, stall_s=0.3)) as port, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", port))
        with suppress(OSError):  # reset while it still sends
            for _ in range(40):
                connection.sendall(ask * 100)
            assert select.select([connection], [], [connection], 20)[0]
            while connection.send(b"\r\n"):  # takes it until it is cut
                time.sleep(0.01)

        assert hear_out(connection).count(b"HTTP/1.1 200") < 4000


SMUGGLED = b"GET /healthz HTTP/1.1\r\nHost: store\r\n\r\n"
FRAMINGS = {
    "a length and chunks": b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n",
    "chunks and a length": b"Transfer-Encoding: chunked\r\nContent-Length: %d\r\n",
    "two equal lengths": b"Content-Length: %d\r\nContent-Length: %d\r\n",
    "a list of lengths": b"Content-Length: %d, %d\r\n",
    "a folded encoding": b"Content-Length: %d\r\nX: y\r\n Transfer-Encoding: chunked\r\n",
    "a bare LF": b"Content-Length: %d\nX: y\r\n",
}


@pytest.mark.parametrize("framing", FRAMINGS.values(), ids=FRAMINGS)
def test_a_body_of_two_lengths_is_refused_and_nothing_after_it_is_read(port: int, desk: Desk, framing: bytes) -> None:
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(DATA), DATA)
    length = framing.replace(b"%d", b"%d" % len(chunked))
    head = head_of(DATA).replace(b"Content-Length: %d\r\n" % len(DATA), length)
    with connect(port) as connection:
        connection.sendall(head + chunked + SMUGGLED)
        heard = hear_out(connection)

    assert heard.startswith(b"HTTP/1.1 400")
    assert heard.count(b"HTTP/1.1") == 1
    assert list(desk.store.walk()) == []


def test_nothing_after_a_chunked_body_is_read(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\n" + SMUGGLED)

        assert hear_out(connection).count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("lines", [b"X: " + b"a" * 200_000 + b"\r\n", b"A:b\r\n" * 5000], ids=["long", "many"])
def test_a_head_of_any_size_is_refused_however_it_comes(port: int, lines: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n")

        assert hear_out(connection).startswith(b"HTTP/1.1 400")


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
            assert client.put(path_of(n), content=b"other bytes", headers=headers_of(b"other bytes")).status_code == 409

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
        ("0.0.0.0:8470", {}, "unencrypted"),
        ("192.0.2.1:8470", {}, "unencrypted"),
        ("store.example:8470", {}, "unencrypted"),
        ("127.0.0.1:8470", {"cert": Path("x")}, "need each other"),
    ],
)
def test_a_place_to_listen_is_checked_before_a_token_can_cross_a_network(
    text: str, options: dict[str, Path], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        parse_listen_address(text, **{"cert": None, "key": None, "behind_proxy": False, **options})  # type: ignore[arg-type]


def test_tls_or_a_proxy_let_it_listen_to_the_network() -> None:
    pem = Path("x.pem")

    assert parse_listen_address("[::1]:0", cert=None, key=None, behind_proxy=False).url == "http://[::1]:0"
    assert parse_listen_address("0.0.0.0:1", cert=pem, key=pem, behind_proxy=False).url == "https://0.0.0.0:1"
    assert parse_listen_address("0.0.0.0:1", cert=None, key=None, behind_proxy=True).behind_proxy


def start(tmp_path: Path, *options: str | Path) -> tuple[subprocess.Popen[str], str, list[str]]:
    """Start the command and wait for the line that says where it listens."""
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKENS_TEXT)
    tokens.chmod(0o600)
    command = [
        sys.executable,
        "-m",
        "phasewatch",
        "receive",
        "--store",
        tmp_path / "store",
        "--tokens",
        tokens,
        "--listen",
        "127.0.0.1:0",
        "--min-free",
        "0",
        *options,
    ]
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


@pytest.fixture
def pems(tmp_path: Path) -> dict[str, Path]:
    """Build a certificate and its key for this machine."""
    openssl = need_program("openssl", "openssl")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            openssl,
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-keyout",
            key,
            "-out",
            cert,
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ],
        check=True,
        capture_output=True,
    )
    return {"cert": cert, "key": key}


def test_a_tls_handshake_that_is_not_finished_is_cut(desk: Desk, pems: dict[str, Path]) -> None:
    with serving(desk, HASTY, **pems) as port, connect(port) as silent, connect(port) as noise:
        noise.sendall(HEALTH)

        hear_out(noise)
        assert hear_out(silent) == b""


def test_tls_handshakes_that_strangers_hold_shut_nobody_out(desk: Desk, pems: dict[str, Path]) -> None:
    context = ssl.create_default_context(cafile=str(pems["cert"]))
    with serving(desk, PATIENT, **pems) as port, ExitStack() as stack:
        for _ in range(24):
            stack.enter_context(connect(port))
        answer = httpx.put(
            f"https://127.0.0.1:{port}{path_of()}",
            content=DATA,
            headers=headers_of(DATA),
            verify=context,
            trust_env=False,
        )

    assert answer.status_code == 201


def test_over_tls_a_shipper_that_knows_the_certificate_is_served(tmp_path: Path, pems: dict[str, Path]) -> None:
    cert, key = pems["cert"], pems["key"]
    process, url, _ = start(tmp_path, "--cert", cert, "--key", key)
    outbox = tmp_path / "outbox" / "pc-a" / f"{IDS[0]}.tar.zst"
    outbox.parent.mkdir(parents=True)
    outbox.write_bytes(DATA)
    command = [
        sys.executable,
        "-m",
        "phasewatch",
        "ship",
        "--outbox",
        tmp_path / "outbox",
        "--to",
        url,
        "--tokens",
        tmp_path / "tokens",
        "--give-up-after",
        "1",
    ]

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
    pem = tmp_path / "x.pem"
    pem.write_text("no certificate")
    listen = ListenAddress(host="127.0.0.1", port=0)
    with bind_socket(listen) as bound:
        with pytest.raises(MachineError, match="choose another --listen"):
            bind_socket(ListenAddress(host="127.0.0.1", port=bound.getsockname()[1]))

    with pytest.raises(UsageError, match="readable PEM"):
        build_server_config(
            Desk(tmp_path / "store").receiver, ListenAddress(host="127.0.0.1", port=0, cert=pem, key=pem), ROOMY
        )
