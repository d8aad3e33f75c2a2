"""The line to the guest's driver: what is stamped when, and every way in which a guest can break it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.record.fakes import FakeClock

from phasewatch.errors import VmError
from phasewatch.record.driver import Driver

Guest = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def talk(tmp_path: Path, guest: Guest, host: Callable[[Driver, FakeClock], Awaitable[None]]) -> None:
    """Let a guest and a host talk over a real socket."""

    async def work() -> None:
        path, clock = tmp_path / "ctl", FakeClock()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await guest(reader, writer)
            await writer.drain()
            writer.close()

        server = await asyncio.start_unix_server(serve, str(path))
        driver = Driver(clock=clock, name="vm")
        await driver.open(path)
        try:
            await asyncio.wait_for(host(driver, clock), 10)
        finally:
            await driver.close()
            server.close()
            await server.wait_closed()

    asyncio.run(work())


def answering(*answers: str) -> Guest:
    """Give a guest that says `ready`, then one answer to each command, with its number in place of {id}."""

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"ready 3300 6.1.0-56\n")
        for answer in answers:
            number = (await reader.readline()).split()[0].decode()
            writer.write(answer.replace("{id}", number).encode())
        await reader.read()

    return guest


def test_the_first_word_names_uptime_and_kernel(tmp_path: Path) -> None:
    async def host(driver: Driver, clock: FakeClock) -> None:
        ready = await driver.ready()

        assert (ready.uptime_ms, ready.kernel) == (3300, "6.1.0-56")

    talk(tmp_path, answering(), host)


def test_an_acknowledgement_is_stamped_by_the_host(tmp_path: Path) -> None:
    async def host(driver: Driver, clock: FakeClock) -> None:
        clock.now_ns = 5
        ack = await driver.send("hello")

        assert (ack.id, ack.t_mono_ns, ack.t_wall_ns, ack.uptime_ms) == (1, 5, clock.wall_ns(), 3400)

    talk(tmp_path, answering("ack {id} 3400\n"), host)


def test_finished_may_come_together_with_the_acknowledgement(tmp_path: Path) -> None:
    async def host(driver: Driver, clock: FakeClock) -> None:
        ack = await driver.send("warmup")

        assert await driver.finished(ack.id, timeout_s=1) == 0
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
def test_a_guest_that_breaks_the_rules_is_an_error_in_words(tmp_path: Path, answer: str, says: str) -> None:
    async def host(driver: Driver, clock: FakeClock) -> None:
        await driver.ready()
        with pytest.raises(VmError, match=says):
            await driver.send("phase", "armed")

    talk(tmp_path, answering(answer), host)


def test_whoever_waits_hears_at_once_that_the_line_was_cut(tmp_path: Path) -> None:
    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()

    async def host(driver: Driver, clock: FakeClock) -> None:
        with pytest.raises(VmError, match="hung up"):
            await driver.send("hello")
        with pytest.raises(VmError, match="hung up"):
            await driver.ready()
        with pytest.raises(VmError, match="hung up"):
            await driver.send("hello")

    talk(tmp_path, guest, host)


def test_work_that_does_not_end_in_time_is_named(tmp_path: Path) -> None:
    async def host(driver: Driver, clock: FakeClock) -> None:
        ack = await driver.send("warmup")
        with pytest.raises(VmError, match=r"warmup: the guest did not finish within 0\.01 s"):
            await driver.finished(ack.id, timeout_s=0.01)

    talk(tmp_path, answering("ack {id} 1\n"), host)
