"""One virtual machine's life: overlay, sink, QEMU, the driver's line, the sources; and nothing of it left afterwards."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from phasewatch.errors import VmError
from phasewatch.lab import process
from phasewatch.lab.guest_driver import CommandAck, GuestDriver, ReadyMessage
from phasewatch.lab.guest_image import GuestImage
from phasewatch.lab.host import read_processor_name
from phasewatch.lab.network.sink import NetflowSource, NetworkSink
from phasewatch.lab.qemu_command import HostShape, VmPaths, build_qemu_command
from phasewatch.telemetry.base import AsyncClock, RowLog, TelemetrySource
from phasewatch.telemetry.guest_agent import GuestReader
from phasewatch.telemetry.proc import ProcSource
from phasewatch.telemetry.qmp import QmpMonitor, QmpSource

BOOT_NOTICE_S = 15.0  # so often a boot that takes long says that it does
SOCKET_TIMEOUT_S = 10.0  # from QEMU's start until it serves its sockets


@dataclass(frozen=True, slots=True, kw_only=True)
class BootRule:
    """How long a machine may take to boot at first, and how often it may try."""

    deadline_s: float
    tries: int

    def deadlines_s(self) -> Iterator[float]:
        """Give the deadline of each try: twice as long after every second one, because a busy machine boots slowly too.

        >>> list(BootRule(deadline_s=15.0, tries=6).deadlines_s())
        [15.0, 15.0, 30.0, 30.0, 60.0, 60.0]
        """
        return (self.deadline_s * 2 ** (number // 2) for number in range(self.tries))


# Measured: 2 to 4 s alone, 7 s with a neighbour. A microvm either comes within 5 s or hangs.
BOOT_RULES = {"microvm": BootRule(deadline_s=15.0, tries=6), "": BootRule(deadline_s=45.0, tries=3)}


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What is known of a VM once it has booted; it goes into the manifest.

    Attributes:
        processor: The host's own; what a VM costs depends on it.
    """

    boot_s: float
    booted_mono_ns: int
    guest_kernel: str
    guest_image: str
    hypervisor: str
    accel: str
    processor: str
    nic: str
    pinning: tuple[int, ...]
    qemu_pid: int


class LabMachine(Protocol):
    """What the recorder needs of a VM; tests hand in a make-believe one."""

    async def boot(self) -> MachineFacts:
        """Start it and wait for its first word."""

    async def send(self, verb: str, *arguments: str) -> CommandAck:
        """Send the driver one command."""

    async def wait_finished(self, number: int, *, timeout_s: float) -> int:
        """Wait until the work that command `number` began has ended by itself."""

    def sources(self) -> tuple[TelemetrySource, ...]:
        """The host's sources, not yet open."""

    def build_agent_reader(self, log: RowLog) -> GuestReader:
        """The agent's reader, not yet open."""

    async def wait_exited(self) -> None:
        """Return when it is no longer running."""

    async def stop(self) -> None:
        """End it and remove all that it left; may be called at any time, twice too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSettings:
    """What one VM is started with.

    Attributes:
        number: 0 or 1, its place in the round.
        cores: The core of each vCPU; empty leaves them to the kernel.
        tsc_khz: The host's TSC rate, if known.
        seed_files: Name → content of files that an image of the user's own gets on a small disk beside its own.
        boot: How long its boot may take; None for what is usual for its machine.
        report_line: Takes a line for people while a boot takes long.
    """

    shape: HostShape
    image: GuestImage
    accel: str
    folder: Path
    number: int
    cores: tuple[int, ...]
    tsc_khz: int | None
    clock: AsyncClock
    seed_files: tuple[tuple[str, bytes], ...] = ()
    boot: BootRule | None = None
    report_line: Callable[[str], None] = lambda line: None


class QemuVm:
    """A QEMU process, its sink and its sockets."""

    def __init__(self, start: VmSettings) -> None:
        self._start = start
        self._name = f"{start.shape.host_id}[{start.number}]"
        self._qemu: asyncio.subprocess.Process | None = None
        self._sink: NetworkSink | None = None
        self._monitor: QmpMonitor | None = None
        self._driver: GuestDriver | None = None
        self._tids: tuple[int, ...] = ()

    async def boot(self) -> MachineFacts:
        """Start the VM, again if it hangs, and wait for the guest's first word.

        Raises:
            VmError: If no try succeeds; it says what each one met.
        """
        rule = self._start.boot or BOOT_RULES.get(self._start.shape.machine.partition(",")[0], BOOT_RULES[""])
        words: list[str] = []
        for number, deadline_s in enumerate(rule.deadlines_s(), start=1):
            try:
                return await self._boot_once(deadline_s)
            except (VmError, OSError) as exc:
                words.append(f"try {number}: {await self._explain_failure(exc)}")
                await self.stop()
            except BaseException:
                await self.stop()
                raise
        raise VmError(
            f"{self._name} did not boot in {rule.tries} {'try' if rule.tries == 1 else 'tries'}; " + "; ".join(words)
        )

    async def send(self, verb: str, *arguments: str) -> CommandAck:
        """Send the driver one command and wait for its acknowledgement."""
        return await self._require_driver().send(verb, *arguments)

    async def wait_finished(self, number: int, *, timeout_s: float) -> int:
        """Wait until the work that command `number` began has ended by itself; gives its exit code."""
        return await self._require_driver().wait_finished(number, timeout_s=timeout_s)

    def sources(self) -> tuple[TelemetrySource, ...]:
        """Give the host's three sources; the monitor's connection stays the VM's."""
        if self._qemu is None or self._monitor is None or self._sink is None:
            raise VmError(f"{self._name}: not running")
        return (
            ProcSource(pid=self._qemu.pid, vcpu_tids=self._tids),
            NetflowSource(self._sink),
            # Last, because it is slowest: the others' stamps stay in the middle of the bins.
            QmpSource(
                monitor=self._monitor,
                vcpus=self._start.shape.vcpus,
                clock=self._start.clock,
                registers=self._start.accel == "tcg",
            ),
        )

    def build_agent_reader(self, log: RowLog) -> GuestReader:
        """Give the reader of the agent's line."""
        return GuestReader(path=self._sockets().tel, log=log)

    async def wait_exited(self) -> None:
        """Return when QEMU is no longer running."""
        if self._qemu is not None:
            await self._qemu.wait()

    async def stop(self) -> None:
        """End QEMU and the sink, and remove the folder with overlay and sockets."""
        if self._driver is not None:
            await self._driver.close()
        if self._qemu is not None:
            await process.kill_process(self._qemu)
        if self._monitor is not None:
            await self._monitor.close()
        if self._sink is not None:
            await asyncio.to_thread(self._sink.close)
        self._driver = self._qemu = self._monitor = self._sink = None
        shutil.rmtree(self._start.folder, ignore_errors=True)

    async def _boot_once(self, deadline_s: float) -> MachineFacts:
        start, sockets = self._start, self._sockets()
        start.folder.mkdir(mode=0o700)
        await _make_overlay(start.image.base_disk, sockets.overlay)
        mac = f"52:54:00:77:00:{start.number + 2:02x}"
        if start.seed_files:
            sockets.seed_folder.mkdir()
            for name, content in start.seed_files:
                (sockets.seed_folder / name).write_bytes(content)
        self._sink = NetworkSink(sockets.sink, sockets.nic)
        command = build_qemu_command(
            start.shape,
            accel=start.accel,
            kernel=start.image.kernel,
            initrd=start.image.initrd,
            sockets=sockets,
            mac=mac,
            tsc_khz=start.tsc_khz,
            hands_over=bool(start.seed_files),
        )
        began_ns = start.clock.mono_ns()
        with (start.folder / "qemu.log").open("wb") as log:
            self._qemu = await process.start_process(command, log=log)
        self._driver = GuestDriver(clock=start.clock, name=self._name)
        await self._connect_when_served(lambda: self._require_driver().open(sockets.ctl))
        self._monitor = QmpMonitor(sockets.qmp)
        await self._monitor.connect()
        self._tids = await self._monitor.query_vcpu_threads()
        for tid, core in zip(self._tids, start.cores, strict=False):
            os.sched_setaffinity(tid, {core})
        ready = await self._wait_ready(deadline_s)
        now_ns = start.clock.mono_ns()
        return MachineFacts(
            boot_s=round((now_ns - began_ns) / 1e9, 3),
            booted_mono_ns=now_ns,
            guest_kernel=ready.kernel,
            guest_image=start.image.digest[:12],
            hypervisor=f"QEMU {await self._monitor.query_version()}",
            accel=start.accel,
            processor=read_processor_name(start.tsc_khz),
            nic="virtio-net, dgram sink",
            pinning=start.cores[: len(self._tids)],
            qemu_pid=self._qemu.pid,
        )

    async def _connect_when_served(self, connect: Callable[[], Awaitable[None]]) -> None:
        """Connect as soon as QEMU serves the socket; it may refuse its command line instead."""
        for _ in range(round(SOCKET_TIMEOUT_S / 0.02)):
            with suppress(FileNotFoundError, ConnectionRefusedError):
                await connect()
                return
            if self._qemu is not None and self._qemu.returncode is not None:
                raise VmError("QEMU ended")
            await asyncio.sleep(0.02)
        raise VmError(f"QEMU served no socket within {SOCKET_TIMEOUT_S:g} s: {self._read_log_tail()}")

    async def _wait_ready(self, deadline_s: float) -> ReadyMessage:
        ready = asyncio.ensure_future(self._require_driver().wait_ready())
        died = asyncio.ensure_future(self.wait_exited())
        try:
            await wait_with_notices((ready, died), deadline_s, self._report_waiting)
            if ready.done():
                return ready.result()
            if died.done():
                raise VmError("QEMU died during boot")
            silent = f"no word from the guest within {deadline_s:g} s"
            if self._start.image.kernel is None:
                silent += (
                    " (does its image run a driver that writes `ready` to the port `ctl`? See docs/how-to/own-vm.md)"
                )
            raise VmError(f"{silent}; its console ends: {await self._read_console()}")
        finally:
            ready.cancel()
            died.cancel()
            await asyncio.gather(ready, died, return_exceptions=True)

    async def _report_waiting(self, waited_s: float, deadline_s: float) -> None:
        words = f"{self._name}: no word from the guest's driver yet, {waited_s:.0f} of {deadline_s:g} s"
        self._start.report_line(f"{words}; its console ends: {await self._read_console()}")

    async def _explain_failure(self, error: Exception) -> str:
        """Give QEMU's own last words where it ended, whatever its end broke first on our side."""
        if self._qemu is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    code = await self._qemu.wait()
                return f"QEMU ended with {code}: {self._read_log_tail()}"
        return str(error)

    async def _read_console(self) -> str:
        """Give the last words of the guest's console."""
        if self._monitor is None:
            return "(no monitor)"
        try:
            text = str(await self._monitor.ask("ringbuf-read", device="con", size=65536, format="utf8"))
        except VmError as exc:
            return f"({exc})"
        return _join_last_lines(text) or "(empty)"

    def _read_log_tail(self) -> str:
        try:
            return (
                _join_last_lines((self._start.folder / "qemu.log").read_text(errors="replace")) or "(it said nothing)"
            )
        except OSError:
            return "(no log)"

    def _require_driver(self) -> GuestDriver:
        if self._driver is None:
            raise VmError(f"{self._name}: not running")
        return self._driver

    def _sockets(self) -> VmPaths:
        return VmPaths(folder=self._start.folder)


async def wait_with_notices(
    awaited: tuple[asyncio.Future[Any], ...], deadline_s: float, tell: Callable[[float, float], Awaitable[None]],
    *, every_s: float = BOOT_NOTICE_S,
) -> None:  # fmt: skip
    """Wait until one of some futures is done or the deadline has passed, and tell now and then that it still waits.

    Args:
        awaited: The futures.
        deadline_s: How long at most.
        tell: Takes seconds waited, and of how many.
        every_s: How often.
    """
    waited_s = 0.0
    while waited_s < deadline_s:
        step_s = min(every_s, deadline_s - waited_s)
        done, _ = await asyncio.wait(awaited, timeout=step_s, return_when=asyncio.FIRST_COMPLETED)
        waited_s += step_s
        if done:
            return
        if waited_s < deadline_s:
            await tell(waited_s, deadline_s)


async def _make_overlay(base: Path, overlay: Path) -> None:
    # Beside the base, so that an episode's writes are its own and cost a few MB.
    process = await asyncio.create_subprocess_exec(
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base.resolve()), "-F", "qcow2", str(overlay),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    _, words = await process.communicate()
    if process.returncode:
        raise VmError(f"qemu-img could not make {overlay}: {_join_last_lines(words.decode(errors='replace'))}")


def read_tsc_khz() -> int | None:
    """Give the host's TSC rate: under TCG it is the guest's too. From the kernel's log, else from /proc/cpuinfo."""
    with suppress(OSError, subprocess.SubprocessError):
        log = subprocess.run(
            ["dmesg"], capture_output=True, text=True, timeout=10, check=False, errors="replace"
        ).stdout
        found = re.findall(r"tsc: (?:Detected|Refined TSC clocksource calibration:) ([\d.]+) MHz", log)
        if found:
            return round(float(found[-1]) * 1000)
    match = re.search(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return round(float(match[1]) * 1000) if match else None


def _join_last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "".join(c if " " <= c <= "~" else "?" for c in " | ".join(lines[-3:]))[-400:]
