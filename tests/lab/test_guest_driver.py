"""The connection to the guest's driver: time stamps, and every protocol violation of a guest."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.factories.vms import FakeClock

from phasewatch.errors import VmError
from phasewatch.lab import guest_driver
from phasewatch.lab.guest_driver import GuestDriver

Guest = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def talk(tmp_path: Path, guest: Guest, host: Callable[[GuestDriver, FakeClock], Awaitable[None]]) -> None:
    """Let a guest and a host talk over a real socket."""

    async def work() -> None:
        path, clock = tmp_path / "ctl", FakeClock()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await guest(reader, writer)
            await writer.drain()
            writer.close()

        server = await asyncio.start_unix_server(serve, str(path))
        driver = GuestDriver(clock=clock, name="vm")
        await driver.open(path)
        try:
            await asyncio.wait_for(host(driver, clock), 10)
        finally:
            await driver.close()
            server.close()
            await server.wait_closed()

    asyncio.run(work())


def answering(*answers: str) -> Guest:
    """Return a guest that says `ready`, then one answer to each command, with its number in place of {id}."""

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"ready 3300 6.1.0-56\n")
        for answer in answers:
            number = (await reader.readline()).split()[0].decode()
            writer.write(answer.replace("{id}", number).encode())
        await reader.read()

    return guest


def test_ready_message_has_uptime_and_kernel(tmp_path: Path) -> None:
    async def host(driver: GuestDriver, clock: FakeClock) -> None:
        ready = await driver.wait_ready()

        assert (ready.uptime_ms, ready.kernel) == (3300, "6.1.0-56")

    talk(tmp_path, answering(), host)


def test_acknowledgement_is_stamped_by_the_host(tmp_path: Path) -> None:
    async def host(driver: GuestDriver, clock: FakeClock) -> None:
        clock.now_ns = 5
        ack = await driver.send("hello")

        assert (ack.id, ack.t_mono_ns, ack.t_wall_ns, ack.uptime_ms) == (1, 5, clock.wall_ns(), 3400)

    talk(tmp_path, answering("ack {id} 3400\n"), host)


def test_finished_may_arrive_together_with_the_acknowledgement(tmp_path: Path) -> None:
    async def host(driver: GuestDriver, clock: FakeClock) -> None:
        ack = await driver.send("warmup")

        assert await driver.wait_finished(ack.id, timeout_s=1) == 0
        assert driver.has_finished(ack.id)

    talk(tmp_path, answering("ack {id} 1\nfinished {id} 0\n"), host)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        pytest.param("err {id} no such applet\n", "the guest says: no such applet", id="a refusal"),
        pytest.param("hm {id}\n", "does not keep to the protocol: unknown word 'hm'", id="an unknown word"),
        pytest.param("ack x y\n", "does not keep to the protocol", id="no number"),
        pytest.param("ready 1 6.1\n", "must have restarted", id="a restart"),
        pytest.param("a" * 10_000 + "\n", "a line of more than 4096 bytes", id="an endless line"),
    ],
)
def test_protocol_violation_is_an_error(tmp_path: Path, answer: str, says: str) -> None:
    async def host(driver: GuestDriver, clock: FakeClock) -> None:
        await driver.wait_ready()
        with pytest.raises(VmError, match=says):
            await driver.send("phase", "armed")

    talk(tmp_path, answering(answer), host)


def test_closed_connection_fails_every_pending_wait(tmp_path: Path) -> None:
    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()

    async def host(driver: GuestDriver, clock: FakeClock) -> None:
        with pytest.raises(VmError, match="closed the connection"):
            await driver.send("hello")
        with pytest.raises(VmError, match="closed the connection"):
            await driver.wait_ready()
        with pytest.raises(VmError, match="closed the connection"):
            await driver.send("hello")

    talk(tmp_path, guest, host)


def test_unfinished_work_is_reported_after_the_timeout(tmp_path: Path) -> None:
    async def host(driver: GuestDriver, clock: FakeClock) -> None:
        ack = await driver.send("warmup")
        with pytest.raises(VmError, match=r"warmup: the guest did not finish within 0\.01 s"):
            await driver.wait_finished(ack.id, timeout_s=0.01)

    talk(tmp_path, answering("ack {id} 1\n"), host)


def test_missing_acknowledgement_is_an_error_after_the_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_driver, "ACK_TIMEOUT_S", 0.05)

    async def host(line: GuestDriver, clock: FakeClock) -> None:
        with pytest.raises(VmError, match=r"vm: phase: the guest did not acknowledge within 0\.05 s"):
            await line.send("phase", "armed")

    talk(tmp_path, answering(""), host)


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(b"ack 1 1\n", id="the same answer for ever"),
        pytest.param(b"finished 7 0\n", id="answers to what was never asked"),
        pytest.param(b"ready 1 6.1\n", id="its first word for ever"),
        pytest.param(b"err 7 no\n", id="errors of what was never asked"),
        pytest.param(b"x", id="no line at all"),
        pytest.param(b"\x00\xff\n", id="noise"),
    ],
)
def test_flood_is_an_error_at_once_and_uses_no_memory(tmp_path: Path, flood: bytes) -> None:
    sent = 0

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"ready 1 6.1\n")
        await reader.readline()
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                writer.write(flood * (65536 // len(flood)))
                sent += 1
                await asyncio.wait_for(writer.drain(), 0.5)

    async def warm_up(line: GuestDriver) -> None:
        ack = await line.send("warmup")
        await line.wait_finished(ack.id, timeout_s=5)

    async def host(line: GuestDriver, clock: FakeClock) -> None:
        await line.wait_ready()
        with pytest.raises(VmError, match=r"does not keep to the protocol|more than 4096 bytes"):
            await warm_up(line)

    with contextlib.suppress(TimeoutError):
        talk(tmp_path, guest, host)
    assert sent < 100


def test_wrong_guest_uptime_does_not_change_stamps(tmp_path: Path) -> None:
    async def host(line: GuestDriver, clock: FakeClock) -> None:
        clock.now_ns = 5
        first = await line.send("hello")
        clock.now_ns = 9
        second = await line.send("hello")

        assert [(ack.t_mono_ns, ack.t_wall_ns - clock.wall_ns()) for ack in (first, second)] == [(5, -4), (9, 0)]

    talk(tmp_path, answering("ack {id} 99999999999999999999\n", "ack {id} -5\n"), host)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        pytest.param(
            "err 1 the payload is gone\n", "dormant: the guest says: the payload is gone", id="a late refusal"
        ),
        pytest.param("ready 1 6.1\n", "must have restarted", id="a restart"),
    ],
)
def test_failure_between_two_commands_is_raised_at_the_next(tmp_path: Path, word: str, says: str) -> None:
    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"ready 1 6.1\n")
        await reader.readline()
        writer.write(b"ack 1 1\n" + word.encode())
        with contextlib.suppress(ConnectionError):
            await reader.readline()
            writer.write(b"ack 2 1\n")
            await reader.read()

    async def host(line: GuestDriver, clock: FakeClock) -> None:
        await line.send("dormant")
        with pytest.raises(VmError, match=says):
            await line.send("hello")

    talk(tmp_path, guest, host)


def test_late_answer_after_a_timeout_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_driver, "ACK_TIMEOUT_S", 0.05)

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        second = (await reader.readline()).split()[0].decode()
        writer.write(f"ack 1 1\nack {second} 2\n".encode())
        await reader.read()

    async def host(line: GuestDriver, clock: FakeClock) -> None:
        with pytest.raises(VmError, match="did not acknowledge"):
            await line.send("hello")

        assert (await line.send("hello")).uptime_ms == 2

    talk(tmp_path, guest, host)
