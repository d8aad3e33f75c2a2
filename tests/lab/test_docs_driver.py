"""The driver in the docs follows the protocol in the docs; a real shell runs it on a pseudo-terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import subprocess
import tty
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.factories.vms import FakeClock
from tests.lab.test_custom_workload import block_of

from phasewatch.errors import VmError
from phasewatch.lab.guest_driver import GuestDriver


@contextmanager
def guest(folder: Path) -> Iterator[int]:
    """Run the driver's script with a pseudo-terminal for its port, without touching this machine's network."""
    script = block_of("own-vm.md", "shell")
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    script, ports = re.subn(r"^for port in .*?^done\n", f"ctl={os.ttyname(theirs)}\n", script, flags=re.M | re.S)
    script, cards = re.subn(r"^for card in .*?^done\n", "", script, flags=re.M | re.S)
    assert (ports, cards) == (1, 1)
    (folder / "driver.sh").write_text(script.replace("/tmp/sample", str(folder / "sample")))
    process = subprocess.Popen(["/bin/sh", str(folder / "driver.sh")], start_new_session=True)
    try:
        yield ours
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours)
        os.close(theirs)


def talk(folder: Path, host: Callable[[GuestDriver], Awaitable[None]]) -> None:
    """Let the host's end of the line talk to the script, through a socket as QEMU serves one."""

    async def work() -> None:
        loop = asyncio.get_running_loop()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            loop.add_reader(port, lambda: writer.write(os.read(port, 4096)))
            while data := await reader.read(4096):
                os.write(port, data)
            writer.close()

        with guest(folder) as port:
            server = await asyncio.start_unix_server(serve, str(folder / "ctl"))
            line = GuestDriver(clock=FakeClock(), name="docs")
            await line.open(folder / "ctl")
            try:
                await asyncio.wait_for(host(line), 30)
            finally:
                loop.remove_reader(port)
                await line.close()
                server.close()
                await server.wait_closed()

    asyncio.run(work())


def test_driver_sends_ready_acknowledges_and_refuses(tmp_path: Path) -> None:
    async def host(line: GuestDriver) -> None:
        ready = await line.wait_ready()
        assert ready.kernel == os.uname().release
        assert ready.uptime_ms > 0
        assert (await line.send("hello")).uptime_ms >= ready.uptime_ms
        warm = await line.send("warmup")
        assert await line.wait_finished(warm.id, timeout_s=20) == 0
        with pytest.raises(VmError, match="the guest says: unknown verb"):
            await line.send("explode")

    talk(tmp_path, host)


def test_driver_runs_phases_and_stops_each_before_the_next(tmp_path: Path) -> None:
    words = ("own", "one", "7", "duty=0.5")

    async def host(line: GuestDriver) -> None:
        await line.wait_ready()
        sample = tmp_path / "sample"
        installed = await line.send("install", "active", *words)
        assert await line.wait_finished(installed.id, timeout_s=20) == 0
        assert (sample / "payload").stat().st_size == 100_000
        active = await line.send("phase", "active", *words)
        for _ in range(100):
            if (sample / "loot").exists():
                break
            await asyncio.sleep(0.1)
        assert (sample / "loot").exists()
        assert not line.has_finished(active.id)
        await line.send("phase", "clean", *words)
        await line.send("hello")  # the shell reads it when the phase before it is done
        assert not sample.exists()
        await asyncio.sleep(0.6)
        assert not sample.exists(), "its work goes on"

    talk(tmp_path, host)
