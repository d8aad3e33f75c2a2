"""A dashboard in its own process: authentication, refused requests, shutdown, and many viewers."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from tests.factories.dashboards import Frame, Running, dashboard, frames
from tests.formats.test_golden_events import GOLDEN

from phasewatch.dashboard.auth import CONTENT_SECURITY_POLICY
from phasewatch.events.schema import MAX_EVENT_BYTES, EventEnvelope, PerfEvent, PhaseEvent, render_event

LINE = GOLDEN["perf"][1].encode()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with dashboard(tmp_path_factory.mktemp("dashboard")) as found:
        yield found


def look(running: Running, path: str = "", **more: str) -> httpx.Response:
    headers = {"Cookie": "; ".join(f"{k}={v}" for k, v in running.cookies().items()), **more}
    return httpx.get(running.address + path, headers=headers, trust_env=False)


def test_start_address_sets_a_cookie_and_redirects_without_the_token(running: Running) -> None:
    answer = httpx.get(running.start, trust_env=False)

    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert running.token not in cookie


@pytest.mark.parametrize(
    "path", ["", "events", "static/page.js", "plotly.min.js", "about.json", "state.json", "history.json"]
)
def test_requests_without_the_cookie_are_refused(running: Running, path: str) -> None:
    assert httpx.get(running.address + path, trust_env=False).status_code == 401


def test_every_response_has_the_security_headers(running: Running) -> None:
    for answer in (look(running), look(running, "static/page.css"), httpx.get(running.address, trust_env=False)):
        assert answer.headers["content-security-policy"] == (
            "default-src 'self'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
        )
        assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_page_loads_all_its_files_from_the_dashboard(running: Running) -> None:
    page = look(running).text

    assert "//" not in page.replace("<!doctype", "").replace("http://www.w3.org", "")
    for path in ("plotly.min.js", "static/page.js", "static/page.css", "static/icon.svg", "about.json"):
        assert look(running, path).status_code == 200, path
    for path in ("static/nothing.js", "static/..%2fapp.py", "static/__init__.py", "docs", "openapi.json"):
        assert look(running, path).status_code == 404, path


def test_other_hosts_and_origins_are_refused(running: Running) -> None:
    assert look(running, Host="evil.example").status_code == 421
    assert look(running, "events", Origin="http://evil.example").status_code == 403


def test_a_body_of_events_is_accepted_as_a_whole_or_refused(running: Running) -> None:
    before = httpx.get(running.address + "healthz", trust_env=False).json()["events"]

    good = running.post(LINE, b"", LINE)
    bad = running.post(LINE, b'{"v":2}', LINE)

    assert (good.status_code, good.json()) == (202, {"accepted": 2})
    assert bad.status_code == 400
    assert bad.json()["error"].startswith("line 2: event: Object missing required field")
    assert httpx.get(running.address + "healthz", trust_env=False).json()["events"] == before + 2


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        pytest.param(b"", 400, "one event per line", id="empty"),
        pytest.param(b"\x00\xff", 400, "line 1: event: JSON is malformed", id="not JSON"),
        pytest.param(b"[" * 200_000, 400, "line 1: event:", id="deep nesting"),
        pytest.param(b" " + b"x" * (MAX_EVENT_BYTES + 1), 400, "at most 262,144", id="one huge event"),
        pytest.param(b"x" * (1024 * 1024 + 1), 413, "more than 1,048,576 bytes", id="huge body"),
        pytest.param(b"\n".join([LINE] * 2001), 413, "2,001 events, at most 2,000 at once", id="more than the burst"),
    ],
)
def test_malformed_and_huge_bodies_are_refused_with_a_reason(
    running: Running, body: bytes, status: int, reason: str
) -> None:
    answer = running.post(body)

    assert answer.status_code == status
    assert reason in answer.json()["error"]


def test_events_with_a_wrong_token_are_refused(running: Running) -> None:
    assert running.post(LINE, token="wrong").status_code == 401
    assert running.post(LINE, token="").status_code == 401


def test_events_beyond_the_rate_limit_get_retry_after(tmp_path: Path) -> None:
    with dashboard(tmp_path) as running:
        answers = [running.post(*[LINE] * 900) for _ in range(6)]

    late = [a for a in answers if a.status_code == 429]
    assert [a.status_code for a in answers[:2]] == [202, 202]
    assert late
    assert int(late[0].headers["retry-after"]) >= 1


def phase(vm: str, *, at_s: int, alarm: bool) -> PhaseEvent:
    return PhaseEvent(
        vm=vm,
        t_start_ns=at_s * 10**9,
        t_end_ns=(at_s + 10) * 10**9,
        p=(0.1, 0.0, 0.9, 0.0, 0.0),
        decision="infecting",
        alarm=alarm,
        alarm_since_ns=10**10 if alarm else None,
        threshold=0.5,
        model="gbt",
        threat="realistic",
    )


def read_alarms(running: Running) -> list[dict[str, object]]:
    return list(look(running, "state.json").json()["alarms"])


def change_alarm(running: Running, token: str | None = None, **fields: object) -> httpx.Response:
    given = running.token if token is None else token
    headers = {"Authorization": f"Bearer {given}"} if given else {}
    cookies = running.cookies()
    return httpx.post(running.address + "alarms", json=fields, headers=headers, cookies=cookies, trust_env=False)


def test_state_has_the_newest_event_of_each_machine_and_its_history(running: Running) -> None:
    for at_s in range(3):
        running.send(phase("many", at_s=at_s, alarm=False))

    state = look(running, "state.json").json()
    history = look(running, "history.json?run=demo&vm=many&host=&span=60&after=0").json()

    newest = [
        e["event"]["data"] for e in state["events"] if e["kind"] == "phase" and e["event"]["data"]["vm"] == "many"
    ]
    assert [event["t_start_ns"] for event in newest] == [2 * 10**9]
    assert [row[0] for row in history["windows"]] == [5000, 6000, 7000]


@pytest.mark.parametrize(
    "query", ["", "run=demo&vm=nobody&span=60", "run=demo&vm=many&span=61", "run=x&vm=y&span=" + "9" * 400]
)
def test_history_of_an_unknown_machine_or_span_is_null(running: Running, query: str) -> None:
    assert look(running, f"history.json?{query}").json() is None


def test_alarm_is_acknowledged_with_the_token_and_never_with_the_cookie_alone(tmp_path: Path) -> None:
    with dashboard(tmp_path) as running:
        running.post(render_event(EventEnvelope(id="1", t_wall_ns=1, run="live", data=phase("a", at_s=0, alarm=True))))
        (alarm,) = read_alarms(running)

        assert change_alarm(running, token="", id=alarm["id"]).status_code == 401
        assert change_alarm(running, token="wrong", id=alarm["id"]).status_code == 401
        assert read_alarms(running)[0]["acknowledged_ms"] is None
        assert change_alarm(running, id=alarm["id"], by="ada", note="<b>known</b>").status_code == 200
        assert change_alarm(running, id=alarm["id"], silence_minutes=60, note="patch night").status_code == 200
        (alarm,) = read_alarms(running)
        assert (alarm["acknowledged_by"], alarm["note"]) == ("ada", "<b>known</b>")
        assert alarm["silence_reason"] == "patch night"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        pytest.param({"id": "nothing"}, 409, id="no such alarm"),
        pytest.param({"id": ""}, 400, id="empty id"),
        pytest.param({"id": "x", "silence_minutes": 10**9}, 400, id="silence for ever"),
        pytest.param({"id": "x", "note": "n" * 601}, 400, id="long note"),
        pytest.param({"id": "x", "unknown": 1}, 400, id="unknown field"),
        pytest.param({"id": "x", "note": "n" * 20_000}, 400, id="huge body"),
    ],
)
def test_malformed_change_of_an_alarm_is_refused(running: Running, fields: dict[str, object], status: int) -> None:
    assert change_alarm(running, **fields).status_code == status


def test_port_in_use_is_a_one_line_error(running: Running, tmp_path: Path) -> None:
    command = ["dashboard", "--no-produce", "--port", str(running.port), "--token-file", str(tmp_path / "t")]
    done = subprocess.run([sys.executable, "-m", "phasewatch", *command], capture_output=True, text=True, timeout=60)

    assert done.returncode == 5
    assert done.stderr.startswith(f"error: 127.0.0.1:{running.port}: Address already in use; ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_no_auth_allows_viewing_but_not_sending(tmp_path: Path) -> None:
    with dashboard(tmp_path, "--no-produce", "--no-auth") as running:
        assert running.start == running.address
        assert httpx.get(running.address, trust_env=False).status_code == 200
        with httpx.stream("GET", running.address + "events", trust_env=False) as stream:
            assert next(frames(stream.iter_lines())).kind == "hello"
        assert running.post(LINE, token="").status_code == 401
        assert running.post(LINE).status_code == 202


def read_until_closed(connection: socket.socket) -> bytes:
    received = b""
    with suppress(ConnectionResetError):
        while more := connection.recv(4096):
            received += more
    return received


@pytest.mark.parametrize("options", [(), ("--no-auth",)], ids=["cookie", "no cookie"])
def test_silent_connections_do_not_block_or_disconnect_viewers(tmp_path: Path, options: tuple[str, ...]) -> None:
    with dashboard(tmp_path, "--no-produce", *options) as running, ExitStack() as stack:
        cookies = running.cookies()
        client = stack.enter_context(httpx.Client(trust_env=False, cookies=cookies, timeout=30))
        seen = stack.enter_context(client.stream("GET", running.address + "events"))
        reading = frames(seen.iter_lines())
        assert next(reading).kind == "hello"

        crowd = [stack.enter_context(socket.create_connection(("127.0.0.1", running.port), 20)) for _ in range(330)]
        page = httpx.get(running.address + "about.json", cookies=cookies, trust_env=False)
        running.post(LINE)

        assert page.status_code == 200
        assert next(frame for frame in reading if frame.kind != "beat").kind == "perf"
        assert read_until_closed(crowd[0]) == b""


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\nContent-Length: 4\r\n",
        b"Content-Length: 4\r\nX: y\r\n Transfer-Encoding: chunked\r\n",
        b"Content-Length: 4\n",
    ],
    ids=["and chunks", "twice", "folded", "bare LF"],
)
def test_ambiguous_body_length_is_refused_and_the_connection_closed(running: Running, framing: bytes) -> None:
    head = f"POST /events HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {running.token}\r\n".encode()
    with socket.create_connection(("127.0.0.1", running.port), 20) as connection:
        connection.sendall(head + framing + b"\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        response = read_until_closed(connection)

    assert response.startswith(b"HTTP/1.1 400")
    assert response.count(b"HTTP/1.1") == 1


def test_websocket_upgrade_is_ignored(running: Running) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "x" * 22,
    }

    assert look(running, "about.json", **upgrade).status_code == 200


def test_shutdown_ends_the_streams_without_output(tmp_path: Path) -> None:
    with dashboard(tmp_path, "--no-produce", "--no-auth") as running:
        with httpx.stream("GET", running.address + "events", trust_env=False, timeout=30) as stream:
            lines = stream.iter_lines()
            next(frames(lines))
            running.process.terminate()
            with suppress(httpx.RemoteProtocolError):
                for _ in lines:
                    pass
        assert running.process.stderr is not None
        assert running.process.stderr.read() == ""


SERVE = """
import asyncio, sys
from phasewatch.dashboard import server
from phasewatch.dashboard.auth import AccessControl

async def producer(intake):
    print("started", flush=True)
    try:
        await asyncio.sleep(600)
    finally:
        await asyncio.sleep(0.01)
        print("stopped", flush=True)

server.serve_dashboard(
    server.bind_socket(0), server.make_intake(), AccessControl(token="t" * 20), title="t", producers=(producer,)
)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["terminated", "Ctrl-C"])
def test_producers_are_stopped_at_the_shutdown(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)

    assert out == "stopped\n"
    assert (process.returncode == 0) == (number is signal.SIGTERM)
    assert "Error" not in err.replace("KeyboardInterrupt", "")


def test_failing_producer_is_logged_and_the_page_keeps_running() -> None:
    broken = SERVE.replace("await asyncio.sleep(600)", "raise ValueError('no such thing')")
    with subprocess.Popen(
        [sys.executable, "-c", broken], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["started\n", "stopped\n"]
        assert process.poll() is None
        process.terminate()
        _, err = process.communicate(timeout=60)

    assert "ValueError: no such thing" in err.splitlines()[0]
    assert "Traceback" in err
    assert process.returncode == 0


class Follower(threading.Thread):
    """A viewer that reads all events."""

    def __init__(self, running: Running, last: int) -> None:
        super().__init__(daemon=True)
        self.numbers: list[int] = []
        self.other: list[Frame] = []
        self.joined = threading.Event()
        self._running, self._last = running, last

    def run(self) -> None:
        with httpx.stream("GET", self._running.address + "events", trust_env=False, timeout=60) as stream:
            for frame in frames(stream.iter_lines()):
                self.joined.set()
                if frame.id:
                    self.numbers.append(int(frame.id.split(".")[1]))
                elif frame.kind != "beat":
                    self.other.append(frame)
                if self.numbers and self.numbers[-1] >= self._last:
                    return


def stalled(running: Running) -> socket.socket:
    """Open a stream without reading from it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", running.port))
    sock.sendall(f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\n\r\n".encode())
    return sock


def load(folder: Path, *, viewers: int, stalls: int, events: int, burst: int, pause_s: float) -> int:
    """Run reading and stalled viewers, check that readers lose nothing, and return the growth of memory in bytes."""
    edges = tuple(range(1, 64))
    data = PerfEvent(
        process="a",
        measured_s=1.0,
        windows=1,
        windows_per_s=1.0,
        latency_edges_ms=edges,
        latency_counts=tuple(2**60 + i for i in range(64)),
        rss_bytes=1,
        cpu_cores=0.5,
        about="x" * 600,
    )  # about 2.5 kB
    with dashboard(folder, "--no-produce", "--no-auth") as running:
        running.send(data)
        before = running.rss_bytes()
        socks = [stalled(running) for _ in range(stalls)]
        followers = [Follower(running, events + 1) for _ in range(viewers - stalls)]
        for follower in followers:
            follower.start()
        for follower in followers:
            assert follower.joined.wait(60)
        waiting = threading.Event()
        most = 0
        for _ in range(0, events, burst):
            running.send(*[data] * burst)
            waiting.wait(pause_s)
            most = max(most, running.rss_bytes() - before)
        for follower in followers:
            follower.join(120)
        most = max(most, running.rss_bytes() - before)
        for sock in socks:
            sock.close()

        for follower in followers:
            assert follower.numbers == list(range(1, events + 2))
            assert [frame.kind for frame in follower.other] == ["hello"]
        assert running.process.poll() is None
        assert most <= 20 * 1024 * 1024, f"grew by {most / 2**20:.1f} MiB"
        return most


def test_stalled_viewers_cost_no_memory_and_other_viewers_lose_nothing(tmp_path: Path) -> None:
    load(tmp_path, viewers=20, stalls=5, events=400, burst=20, pause_s=0.05)


@pytest.mark.soak
def test_two_hundred_viewers_with_fifty_stalled(tmp_path: Path, soak_row: Callable[..., None]) -> None:
    grew = load(tmp_path, viewers=200, stalls=50, events=1500, burst=5, pause_s=0.2)

    soak_row(
        "Viewers of the dashboard",
        viewers=200,
        **{"never reading": 50},
        events=1500,
        **{"lost by a reader": 0, "the server grew, MiB": round(grew / 2**20, 1)},
    )
