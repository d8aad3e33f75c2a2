"""A fake libvirt daemon: its domains' statistics, refused and hanging calls; no socket and no binding."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from phasewatch.errors import VmError
from phasewatch.telemetry.base import AsyncClock
from phasewatch.telemetry.libvirt import LibvirtHypervisor
from phasewatch.telemetry.libvirt_client import DomainStats

UUID = "9a25a339-3bbb-45cc-97f7-cf54dd1509df"
# Of `virsh domstats` of libvirt 9.0.0: one disk, one network card, a balloon whose guest last reported at second 1000.
VALUES: dict[str, Any] = {
    "state.state": 1,
    "state.reason": 1,
    "balloon.current": 98304,
    "balloon.maximum": 98304,
    "balloon.minor_fault": 1455,
    "balloon.unused": 33064,
    "balloon.disk_caches": 3456,
    "balloon.last-update": 1000,
    "net.count": 1,
    "net.0.name": "vnet0",
    "net.0.rx.bytes": 900,
    "net.0.rx.pkts": 7,
    "net.0.tx.bytes": 500,
    "net.0.tx.pkts": 5,
    "block.count": 1,
    "block.0.name": "vda",
    "block.0.path": "/images/a disk\n'\".qcow2",
    "block.0.rd.reqs": 3,
    "block.0.rd.bytes": 5632,
    "block.0.rd.times": 12,
    "block.0.wr.reqs": 4,
    "block.0.wr.bytes": 2048,
    "block.0.wr.times": 21,
    "block.0.fl.reqs": 2,
    "block.0.fl.times": 6,
    "block.0.allocation": 70_000,
    "block.0.capacity": 268435456,
}


class FakeDaemon:
    """Answers from `domains`; each connection is a client of its own.

    Attributes:
        domains: UUID → name and values of each running domain.
        resets: UUID → how often the domain was reset.
        is_down: Whether nothing can be asked; connections break.
        calls: The domains that each bulk call asked for.
        opened, closed: Number of connections.
        hangs: Calls wait until it is set; None answers at once.
    """

    def __init__(self) -> None:
        self.domains: dict[str, tuple[str, dict[str, Any]]] = {UUID: ("made-up", dict(VALUES))}
        self.resets: Counter[str] = Counter()
        self.is_down = False
        self.calls: list[tuple[str, ...]] = []
        self.opened = self.closed = 0
        self.hangs: threading.Event | None = None

    def set(self, uuid: str = UUID, **changes: Any) -> None:
        """Change values; in their names, `_` stands for a dot."""
        name, values = self.domains[uuid]
        self.domains[uuid] = (name, values | {key.replace("_", "."): value for key, value in changes.items()})

    def hide_disks(self) -> None:
        """Answer as libvirt does while another client uses the domain's monitor."""
        name, values = self.domains[UUID]
        kept = {k: v for k, v in values.items() if not k.startswith(("block.0.rd", "block.0.wr", "block.0.fl"))}
        self.domains[UUID] = (name, kept)

    def hypervisor(self, clock: AsyncClock) -> LibvirtHypervisor:
        """Return the hypervisor that asks this daemon."""
        make: Callable[[], _FakeClient] = lambda: _FakeClient(self)  # noqa: E731
        return LibvirtHypervisor(clock, make)


class _FakeClient:
    def __init__(self, daemon: FakeDaemon) -> None:
        self._daemon = daemon

    def open(self) -> None:
        if self._daemon.is_down:
            raise VmError("libvirt: connection refused")
        self._daemon.opened += 1

    def read(self, uuids: Sequence[str]) -> dict[str, DomainStats]:
        daemon = self._daemon
        daemon.calls.append(tuple(uuids))
        if daemon.hangs is not None:
            daemon.hangs.wait()
        if daemon.is_down:
            raise VmError("libvirt: the connection is closed")
        found = {uuid: daemon.domains[uuid] for uuid in uuids if uuid in daemon.domains}
        return {uuid: DomainStats(uuid=uuid, name=name, values=values) for uuid, (name, values) in found.items()}

    def count_resets(self, uuid: str) -> int:
        return self._daemon.resets[uuid]

    def close(self) -> None:
        self._daemon.closed += 1


__all__ = ["UUID", "VALUES", "FakeDaemon"]
