"""A fake clock, a fake VM and recorders of progress and log, so that tests of the recorder run in milliseconds."""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from phasewatch.channels import list_raw_fields
from phasewatch.errors import BootError, VmError
from phasewatch.lab.guest_driver import CommandAck
from phasewatch.lab.network.world import EpisodeWorld
from phasewatch.lab.plan import RecordingSession, RecordingSlot
from phasewatch.lab.qemu_command import HostShape
from phasewatch.lab.vm import MachineFacts
from phasewatch.telemetry.base import ReadingValues, RowLog
from phasewatch.types import EpisodeRole, Phase, SampleKind, SourceKind

T = TypeVar("T")
WALL0_NS = 1_800_000_000_000_000_000


def shape_of(**changes: Any) -> HostShape:
    """Build the shape of a plain pc with some fields changed."""
    fields: dict[str, Any] = {"host_id": "pc", "machine": "pc", "about": "the plain one"}
    return HostShape(**fields | changes)


def slot_of(seed: int = 1, **changes: Any) -> RecordingSlot:
    """Build a slot of 60 s on a pc (clean, infecting, active, 20 s each) with some fields changed."""
    fields: dict[str, Any] = {
        "index": 0,
        "host_id": "pc",
        "profile": "cryptomine",
        "sample_name": "throttled",
        "sample_kind": SampleKind.EMULATED,
        "role": EpisodeRole.LAB,
        "agent": False,
        "plan_seed": seed,
        "phases": ((Phase.CLEAN, 20.0), (Phase.INFECTING, 20.0), (Phase.ACTIVE, 20.0)),
        "duration_s": 60.0,
        "settle_s": 40.0,
        "knobs": (("duty", 0.5),),
        "chatter_s": 10.0,
    }
    return RecordingSlot(**fields | changes)


def session_of(*slots: RecordingSlot, name: str = "s1") -> RecordingSession:
    """Build a session of these slots."""
    return RecordingSession(session=name, host_id=slots[0].host_id, slots=slots)


class FakeClock:
    """A clock that jumps to the next wake-up when every task sleeps."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._order = 0
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []

    def wall_ns(self) -> int:
        return WALL0_NS + self.now_ns

    def mono_ns(self) -> int:
        return self.now_ns

    def boot_ns(self) -> int:
        return self.now_ns + 1_000_000

    async def sleep_until(self, mono_ns: int) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._order += 1
        heapq.heappush(self._sleepers, (max(mono_ns, self.now_ns), self._order, future))
        await future

    async def drive(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.ensure_future(work)
        while not task.done():
            for _ in range(40):
                await asyncio.sleep(0)
            if task.done():
                break
            while self._sleepers and self._sleepers[0][2].done():  # its sleeper was cancelled
                heapq.heappop(self._sleepers)
            assert self._sleepers, "every task waits for ever"
            due_ns, _, future = heapq.heappop(self._sleepers)
            self.now_ns = max(self.now_ns, due_ns)
            future.set_result(None)
        return task.result()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(self.drive(work))


@dataclass
class FakeSource:
    """A source whose fields count its readings; `vcpu_wait_ns` grows by `wait_cores` seconds per second."""

    source: SourceKind
    clock: FakeClock
    wait_cores: float = 0.0
    reads: int = 0
    is_open: bool = False

    async def open(self) -> None:
        self.is_open = True

    async def close(self) -> None:
        self.is_open = False

    async def read(self) -> ReadingValues:
        self.reads += 1
        named = {"vcpu_wait_ns": round(self.clock.now_ns * self.wait_cores)}
        return tuple(
            named.get(spec.field, 0.5 if spec.type == "float" else self.reads) for spec in list_raw_fields(self.source)
        )


@dataclass
class FakeReader:
    """A guest agent that reports once when it is started."""

    log: RowLog
    bad: int = 0
    dropped: int = 0

    async def open(self) -> None:
        pass

    def start(self) -> None:
        self.log.add((1,) * len(list_raw_fields(SourceKind.GUEST)))

    async def close(self) -> None:
        pass


@dataclass
class FakeMachine:
    """A VM that acknowledges every command.

    Attributes:
        ends_after_s: Phase or load → seconds until its work ends by itself.
        exit_codes: Phase or load → exit status of its work; 0 for all others.
        boot_error: Message of the error that `boot` raises.
        dies_at_s: Seconds from boot to the end of QEMU.
        mute: Verbs that are not acknowledged.
        exit_code: Exit code of every work that ends by itself.
        throttled_cores: Seconds per second that its quota stops it; None without a quota.
        log: (second, command) of each command.
    """

    clock: FakeClock
    ends_after_s: dict[str, float] = field(default_factory=dict)
    exit_codes: dict[str, int] = field(default_factory=dict)
    boot_error: str = ""
    dies_at_s: float | None = None
    mute: tuple[str, ...] = ()
    wait_cores: float = 0.0
    throttled_cores: float | None = None
    exit_code: int = 0
    log: list[tuple[float, str]] = field(default_factory=list)
    stops: int = 0
    worlds: list[EpisodeWorld] = field(default_factory=list)
    opened: list[FakeSource] = field(default_factory=list)
    _commands: dict[int, tuple[int, tuple[str, ...]]] = field(default_factory=dict)

    async def boot(self) -> MachineFacts:
        await self.clock.sleep_until(self.clock.now_ns + 3_000_000_000)
        if self.boot_error:
            raise BootError(self.boot_error)
        return MachineFacts(
            boot_s=3.0,
            booted_mono_ns=self.clock.now_ns,
            guest_kernel="6.1.0",
            guest_image="0123456789ab",
            hypervisor="QEMU 7.2.22",
            accel="tcg",
            processor="a fake processor",
            nic="virtio-net",
            pinning=(0,),
            qemu_pid=1,
        )

    async def send(self, verb: str, *arguments: str) -> CommandAck:
        if verb in self.mute:
            raise VmError(f"{verb}: the guest did not acknowledge")
        self.log.append((self.clock.now_ns / 1e9, " ".join((verb, *arguments))))
        number = len(self.log)
        self._commands[number] = (self.clock.now_ns, (verb, *arguments))
        return CommandAck(id=number, t_wall_ns=self.clock.wall_ns(), t_mono_ns=self.clock.now_ns, uptime_ms=0)

    async def wait_finished(self, number: int, *, timeout_s: float) -> int:
        at_ns, (verb, *arguments) = self._commands[number]
        after_s = self.ends_after_s.get(arguments[0], 1e6) if verb in ("phase", "load") else 2.0
        await self.clock.sleep_until(at_ns + round(after_s * 1e9))
        return self.exit_codes.get(arguments[0], self.exit_code) if arguments else self.exit_code

    async def set_world(self, world: EpisodeWorld) -> None:
        self.worlds.append(world)

    def sources(self) -> tuple[FakeSource, ...]:
        self.opened = [
            FakeSource(source, self.clock, self.wait_cores)
            for source in (SourceKind.PROC, SourceKind.NETFLOW, SourceKind.QMP)
        ]
        return tuple(self.opened)

    def build_agent_reader(self, log: RowLog) -> FakeReader:
        return FakeReader(log)

    def read_throttled_s(self) -> float | None:
        return None if self.throttled_cores is None else self.throttled_cores * self.clock.now_ns / 1e9

    async def wait_exited(self) -> None:
        until_s = 1e7 if self.dies_at_s is None else self.dies_at_s
        await self.clock.sleep_until(self.clock.now_ns + round(until_s * 1e9))

    async def stop(self) -> None:
        self.stops += 1


class RecordedProgress:
    """Keeps every progress update as a line ``[done/total] detail``."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def update(self, task: str, done: int, total: int, detail: str = "") -> None:
        self.lines.append(f"[{done}/{total}] {detail}")


@contextmanager
def capture_log(name: str = "phasewatch.lab") -> Iterator[list[str]]:
    """Collect the messages of a logger at level INFO and above, whatever handlers and levels it has."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    log, handler = logging.getLogger(name), Collector(logging.INFO)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
