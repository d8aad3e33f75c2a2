"""A fake QEMU monitor that answers in process, without a socket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tests.factories.vms import FakeClock

from phasewatch.errors import VmError
from phasewatch.telemetry.qmp import QmpMonitor
from phasewatch.telemetry.qmp_connection import AnswerWaiter, MonitorCommand, PendingAnswer

JIT = """Translation buffer state:
gen code size       53346515/1073740800
TB count            96604
TB avg target size  17 max=1926 bytes
Statistics:
TB flush count      0
TB invalidate count 9061
TLB full flushes    0
TLB partial flushes 38335
TLB elided flushes  9100
"""
RUNS_IN_USER_MODE = "EIP=0040 EFL=00000246 [---Z-P-] CPL=3 II=0 A20=1 SMM=0 HLT=0"


class FakeMonitor(QmpMonitor):
    """Answers from a script; a command that is not in it is refused."""

    def __init__(self) -> None:
        super().__init__(Path("fake"))
        self.used = {0: 10, 1: 65_530}
        self.registers = [RUNS_IN_USER_MODE]
        self.asked: list[int] = []
        self.update = 1
        self.stats = {"stat-minor-faults": 7, "stat-free-memory": 8, "stat-disk-caches": 9}
        self.refused: set[str] = set()
        self.disks = ["blk0"]
        self.operations = 3
        self.jit_takes_ms, self.clock = 0, FakeClock()
        self.commands: list[str] = []

    def post(self, commands: Sequence[MonitorCommand], waiter: AnswerWaiter) -> Sequence[PendingAnswer]:
        answers = [PendingAnswer(command, waiter) for command in commands]
        for answer in answers:
            try:
                self.ask(answer.command.name, **answer.command.arguments).send(None)
            except StopIteration as done:
                answer.settle(msgspec.Raw(msgspec.json.encode(done.value)))
            except VmError as exc:
                answer.settle(failure=str(exc))
        return answers

    async def ask(self, command: str, **arguments: object) -> Any:
        self.commands.append(command)
        if command in self.refused:
            raise VmError(f"{command}: refused")
        match command:
            case "query-blockstats":
                stats = dict.fromkeys(("rd_bytes", "wr_bytes", "wr_operations", "flush_operations"), 3)
                stats |= {"rd_operations": self.operations, "wr_total_time_ns": 4, "wr_highest_offset": 5}
                return [
                    *({"qdev": disk, "stats": stats} for disk in self.disks),
                    {"qdev": "", "device": "", "stats": {}},
                ]
            case "x-query-virtio":
                return [{"name": "virtio-net", "path": "/n"}, {"name": "virtio-blk", "path": "/b"}]
            case "x-query-virtio-queue-status":
                number = arguments["queue"]
                if number not in self.used:
                    raise VmError("invalid queue")
                return {"used-idx": self.used[number]}  # type: ignore[index]
            case "x-query-jit":
                self.clock.now_ns += self.jit_takes_ms * 1_000_000
                return {"human-readable-text": JIT}
            case "qom-set":
                return {}
            case "qom-get":
                return {"last-update": self.update, "stats": self.stats}
            case "human-monitor-command":
                self.asked.append(arguments["cpu-index"])  # type: ignore[arg-type]
                return self.registers[len(self.asked) % len(self.registers)]
        raise VmError(f"{command}: unknown")
