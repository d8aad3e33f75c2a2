"""Run `phasewatch dashboard` as a subprocess, and parse its event stream."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from phasewatch.events.schema import EventData, EventEnvelope, render_event

STAMP = 1_795_510_800_000_000_000


def event(data: EventData, *, number: int = 1, run: str = "demo") -> EventEnvelope:
    return EventEnvelope(id=f"test-{number}", t_wall_ns=STAMP, run=run, data=data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A running dashboard."""

    process: subprocess.Popen[str]
    address: str
    start: str
    token: str

    @property
    def port(self) -> int:
        return int(self.address.rstrip("/").rpartition(":")[2])

    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def post(self, *lines: bytes, token: str | None = None) -> httpx.Response:
        given = self.token if token is None else token
        return httpx.post(
            self.address + "events",
            content=b"\n".join(lines),
            headers={"Authorization": f"Bearer {given}".strip()},
            trust_env=False,
            timeout=60,
        )

    def send(self, *data: EventData) -> None:
        answer = self.post(*(render_event(event(d, number=i)) for i, d in enumerate(data)))
        assert answer.status_code == 202, answer.text

    def cookies(self) -> dict[str, str]:
        return dict(httpx.get(self.start, trust_env=False, timeout=60).cookies)


@contextmanager
def dashboard(folder: Path, *arguments: str, port: int = 0) -> Iterator[Running]:
    """Start a dashboard, wait until it answers, and stop it at the end."""
    command = [sys.executable, "-m", "phasewatch", "dashboard", "--port", str(port), "--json"]
    command += ["--token-file", str(folder / "token"), *(arguments or ("--no-produce",))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            text = ""
            assert process.stdout is not None
            for line in process.stdout:
                text += line
                if line.rstrip() == "}":
                    break
            assert text, process.stderr.read() if process.stderr else ""
            result = json.loads(text)["result"]
            token = (folder / "token").read_text().strip()
            running = Running(process=process, address=result["address"], start=result["start"], token=token)
            wait_until_up(running)
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_up(running: Running) -> None:
    """Wait for an answer; the socket listens before the server runs, so one long request is enough."""
    assert httpx.get(running.address + "healthz", trust_env=False, timeout=60).status_code == 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One server-sent event."""

    id: str
    kind: str
    data: dict[str, object]


def frames(lines: Iterator[str]) -> Iterator[Frame]:
    """Parse server-sent events from lines."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "event" in fields:
            yield Frame(id=fields.get("id", ""), kind=fields["event"], data=json.loads(fields["data"]))
            fields = {}
