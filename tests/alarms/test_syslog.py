"""Syslog: messages are those of RFC 5424 for any name, and a real rsyslog reads the fields that were sent."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.factories.alarms import life, raised
from tests.requirements import need_program

from phasewatch.alarms.config import SyslogConfig, parse_syslog_address
from phasewatch.alarms.delivery import RetryPolicy
from phasewatch.alarms.life import AlarmChange
from phasewatch.alarms.syslog import MAX_MESSAGE_BYTES, SyslogOutput, render_syslog_message
from phasewatch.errors import UsageError

POLICY = RetryPolicy(first_pause_s=0.01, longest_pause_s=0.05, flush_s=10.0)
HEADER = re.compile(
    rb"<(?P<pri>\d{1,3})>1 (?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (?P<host>[!-~]{1,255}) phasewatch "
    rb"(?P<pid>\d+) (?P<id>[!-~]{1,32}) (?P<data>\[phasewatch@32473(?: [!-~]{1,32}=\"(?:[^\"\\\]]|\\[\"\\\]])*\")*\]) "
    rb"\xef\xbb\xbf(?P<text>.*)",
    re.DOTALL,
)


def render(change: AlarmChange, host: str = "hv1") -> bytes:
    return render_syslog_message(change, facility=3, host=host, pid=7)


def parse(message: bytes) -> tuple[re.Match[bytes], dict[str, str]]:
    """Parse a message by the grammar of RFC 5424, and its parameters."""
    match = HEADER.fullmatch(message)
    assert match is not None, message
    found = re.findall(rb' ([!-~]+?)="((?:[^"\\\]]|\\["\\\]])*)"', match["data"])
    return match, {k.decode(): re.sub(r'\\(["\\\]])', r"\1", v.decode()) for k, v in found}


def test_a_message_holds_the_facts_of_the_alarm() -> None:
    match, parameters = parse(render(raised()))

    assert (match["pri"], match["id"], match["host"]) == (b"26", b"alarm-raised", b"hv1")
    assert parameters["vm"] == "web01"
    assert parameters["change"] == "raised"
    assert parameters["p_infecting"] == "0.800"


def test_severity_says_what_happened() -> None:
    first, last = life()
    activity = raised(alarm=False, activity_alarm=True)

    assert [int(parse(render(change))[0]["pri"]) - 24 for change in (first, last, activity)] == [2, 5, 4]


@given(vm=st.text(max_size=300), caveat=st.text(max_size=600), host=st.text(max_size=300), note=st.text(max_size=300))
def test_any_text_gives_one_valid_message(vm: str, caveat: str, host: str, note: str) -> None:
    change = raised()
    change = replace(change, alarm=replace(change.alarm, vm=vm, caveat=caveat), note=note)

    message = render(change, host)

    match, parameters = parse(message)
    assert len(message) <= MAX_MESSAGE_BYTES
    assert match["text"].decode("utf-8")
    assert not [byte for byte in message if byte < 32 or byte == 127]
    if vm.isprintable() and len(vm) <= 200:
        assert parameters["vm"] == vm


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("udp://192.0.2.1", ("udp", "192.0.2.1", 514, "")),
        ("tcp://[2001:db8::1]:6514", ("tcp", "2001:db8::1", 6514, "")),
        ("unix:/dev/log", ("unix", "", 0, "/dev/log")),
        ("unix:///dev/log", ("unix", "", 0, "/dev/log")),
    ],
)
def test_addresses_are_parsed(text: str, parts: tuple[str, str, int, str]) -> None:
    found = parse_syslog_address(text)

    assert (str(found.transport), found.host, found.port, found.path) == parts


@pytest.mark.parametrize("text", ["", "x", "http://x", "udp://", "tcp://x:0", "tcp://x:99999", "unix:log", "tcp://x/y"])
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is needed"):
        parse_syslog_address(text)


def send(address: str, changes: list[AlarmChange], between: Callable[[int], None] = lambda n: None) -> SyslogOutput:
    async def main() -> SyslogOutput:
        output = SyslogOutput(SyslogConfig(address=address), host="hv1", policy=POLICY)
        for number, change in enumerate(changes):
            output.put(change)
            while output.counters.backlog and not between(number):
                await asyncio.sleep(0.01)
        await output.close()
        return output

    return asyncio.run(main())


def test_a_receiver_that_closed_its_end_is_connected_to_again() -> None:
    """The first write to a closed connection succeeds, so the message would be lost without a word."""
    heard: list[bytes] = []

    async def main() -> int:
        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.append(await reader.readuntil(b"infecting"))
            writer.close()

        server = await asyncio.start_server(take, "127.0.0.1", 0)
        address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        output = SyslogOutput(SyslogConfig(address=address), host="hv1", policy=POLICY)
        for number in range(3):
            output.put(raised(decision="infecting"))
            while len(heard) <= number or output.counters.backlog:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
        await output.close()
        server.close()
        return output.counters.sent

    assert asyncio.run(main()) == 3
    assert [int(message.split(b" ")[0]) for message in heard] == [len(render(raised())) - 1 + len(str(os.getpid()))] * 3


def test_a_socket_that_nobody_reads_blocks_nobody_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))

        async def main() -> SyslogOutput:
            config = SyslogConfig(address=f"unix:{path}")
            output = SyslogOutput(config, host="hv1", policy=replace(POLICY, size=50, flush_s=0.2))
            for _ in range(500):
                output.put(raised())
            await output.close()
            return output

        counters = asyncio.run(main()).counters

    assert counters.sent + counters.lost == 500
    assert counters.lost >= 450


CONFIG = """
module(load="imudp") module(load="imtcp") module(load="imuxsock" SysSock.Use="off")
input(type="imudp" address="127.0.0.1" port="{udp}")
input(type="imtcp" address="127.0.0.1" port="{tcp}")
input(type="imuxsock" Socket="{folder}/log" CreatePath="on" UseSpecialParser="off" ParseHostname="on"
  IgnoreTimestamp="off")
template(name="fields" type="list") {{
  constant(value="{{") property(name="hostname" format="jsonf" outname="host") constant(value=",")
  property(name="app-name" format="jsonf" outname="app") constant(value=",")
  property(name="procid" format="jsonf" outname="pid") constant(value=",")
  property(name="msgid" format="jsonf" outname="id") constant(value=",")
  property(name="syslogseverity" format="jsonf" outname="severity") constant(value=",")
  property(name="syslogfacility-text" format="jsonf" outname="facility") constant(value=",")
  property(name="timereported" dateFormat="rfc3339" format="jsonf" outname="time") constant(value=",")
  property(name="structured-data" format="jsonf" outname="sd") constant(value=",")
  property(name="msg" format="jsonf" outname="text") constant(value="}}\\n")
}}
action(type="omfile" file="{folder}/out.json" template="fields")
"""


@contextmanager
def rsyslog(folder: Path) -> Iterator[tuple[dict[str, str], Path]]:
    """Run a real rsyslog on free ports, and yield its addresses and the file that it writes."""
    program = need_program("rsyslogd", "rsyslog")
    ports = {}
    for name, kind in (("udp", socket.SOCK_DGRAM), ("tcp", socket.SOCK_STREAM)):
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.bind(("127.0.0.1", 0))
            ports[name] = sock.getsockname()[1]
    (folder / "rsyslog.conf").write_text(CONFIG.format(folder=folder, **ports))
    words = [program, "-n", "-f", str(folder / "rsyslog.conf"), "-i", str(folder / "pid")]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until_s = time.monotonic() + 30
            while not (folder / "log").exists() and process.poll() is None and time.monotonic() < until_s:
                time.sleep(0.05)
            addresses = {name: f"{name}://127.0.0.1:{port}" for name, port in ports.items()}
            yield addresses | {"unix": f"unix:{folder / 'log'}"}, folder / "out.json"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a path short enough for a socket."""
    folder = Path(f"/tmp/pw-syslog-{os.getpid()}")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_a_real_rsyslog_reads_the_fields_that_were_sent(short_folder: Path) -> None:
    change = raised()
    odd = 'web "01" ]\\ über 机'
    changes = [
        replace(change, alarm=replace(change.alarm, vm=odd, caveat="first\nsecond\0")),
        *life(caveat="contention: the vCPUs waited"),
    ]
    with rsyslog(short_folder) as (addresses, out):
        for address in addresses.values():
            assert send(address, changes).counters.sent == 3
        until_s = time.monotonic() + 20
        while (not out.exists() or out.read_bytes().count(b"\n") < 9) and time.monotonic() < until_s:
            time.sleep(0.05)
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]

    assert len(rows) == 9
    assert {(row["host"], row["app"], row["pid"], row["facility"]) for row in rows} == {
        ("hv1", "phasewatch", str(os.getpid()), "daemon")
    }
    assert sorted(row["id"] for row in rows) == ["alarm-raised"] * 6 + ["alarm-resolved"] * 3
    assert {row["severity"] for row in rows if row["id"] == "alarm-raised"} == {"2"}
    for change in changes:
        sent = render_syslog_message(change, facility=3, host="hv1", pid=os.getpid())
        match, _ = parse(sent)
        same = [r for r in rows if r["sd"] == match["data"].decode()]
        assert len(same) == 3
        assert {row["text"].removeprefix("\ufeff") for row in same} == {match["text"].decode()}
        assert {row["time"].replace("+00:00", "Z") for row in same} == {match["time"].decode()}
