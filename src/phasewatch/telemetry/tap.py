"""What a tap device's own counters tell of the frames of a VM: how many and how long, and nothing of what is in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from phasewatch.telemetry.base import ReadingValues, build_missing_reading
from phasewatch.telemetry.netflow import NetflowReading
from phasewatch.telemetry.process import PROC_ROOT, parse_qemu_options
from phasewatch.types import SourceKind

TAP_CHECK_READINGS = 4  # readings between two looks at which taps the process holds: 2 s
TAP_FIELDS = frozenset(NetflowReading._fields[:4])
_TAP_NAME_PATTERN = re.compile(r"^iff:\s*(\S{1,15})\s*$", re.MULTILINE)
TrafficTotals = tuple[int, int, int, int]  # frames and bytes that the guest sent, frames and bytes that it was sent


def find_taps_by_fd(pid: int, proc: Path = PROC_ROOT) -> dict[int, str]:
    """Return the tap devices that a process holds, by its file descriptors, whoever opened them."""
    found = {}
    with suppress(OSError):
        for entry in (proc / str(pid) / "fdinfo").iterdir():
            with suppress(OSError, ValueError):  # closed between the listing and the reading, as a busy machine does
                match = _TAP_NAME_PATTERN.search(entry.read_text("utf-8", "replace"))
                if match:
                    found[int(entry.name)] = match[1]
    return found


def find_cards_without_tap(pid: int, proc: Path = PROC_ROOT) -> list[str]:
    """Return the network options of a QEMU process's command line whose frames pass no tap: nobody counts them."""
    try:
        words = (proc / str(pid) / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")[1:]
    except OSError:
        return []
    found = []
    for option, keys in parse_qemu_options(words):
        kind = keys.get("type", keys.get("", ""))
        if option in ("netdev", "nic", "net") and kind not in ("tap", "bridge", "none", "nic", "hubport", ""):
            found.append(f"-{option} {kind}")
    return found


def read_device_counters(pid: int, proc: Path = PROC_ROOT) -> dict[str, TrafficTotals]:
    """Return the counters of every device in the process's own network namespace, as a VM behind a tap sees them.

    Raises:
        OSError: If the process is gone or may not be read.
    """
    # Not /sys/class/net: a device of that name in the watcher's namespace may belong to another VM.
    text = (proc / str(pid) / "net" / "dev").read_text("utf-8", "replace")
    found = {}
    for line in text.splitlines():
        name, colon, counts = line.partition(":")
        numbers = counts.split()
        if colon and len(numbers) >= 10 and all(n.isdigit() for n in numbers[:10]):
            rx_bytes, rx_packets, *_ = map(int, numbers)
            # What the host's end of a tap receives is what the guest sent.
            found[name.strip()] = (rx_packets, rx_bytes, int(numbers[9]), int(numbers[8]))
    return found


class TapCounters:
    """Adds up the counters of some tap devices: the sum neither falls when a device goes nor jumps when one comes.

    Args:
        pid: The QEMU process.
        proc: Where /proc is.
    """

    def __init__(self, pid: int, proc: Path = PROC_ROOT) -> None:
        self._pid, self._proc = pid, proc
        self._before: dict[str, TrafficTotals] = {}
        self._total: list[int] = []

    def read(self, names: Iterable[str]) -> TrafficTotals | None:
        """Return the totals so far; None where a device is not there, was begun anew, or cannot be read.

        Args:
            names: The devices that count now.
        """
        wanted, is_whole = set(names), True
        try:
            devices = read_device_counters(self._pid, self._proc) if wanted else {}
        except OSError:
            return None
        is_first, self._total = not self._total, self._total or [0, 0, 0, 0]
        for gone in self._before.keys() - wanted:
            del self._before[gone]
        for name in wanted:
            now, before = devices.get(name), self._before.pop(name, None)
            if now is None:
                is_whole = False
                continue
            self._before[name] = now
            if before is None and not is_first:
                continue
            before = before or (0, 0, 0, 0)
            steps = [after - earlier for after, earlier in zip(now, before, strict=True)]
            if min(steps) < 0:  # another device of that name: what it counted before is not ours
                is_whole = False
                continue
            self._total = [total + step for total, step in zip(self._total, steps, strict=True)]
        return tuple(self._total) if is_whole else None  # type: ignore[return-value]


class TapSource:
    """Reads the counters of every tap device that a VM holds: frames and bytes; what needs a look into a frame is None.

    Args:
        pid: The QEMU process.
        proc: Where /proc is.
    """

    source = SourceKind.NETFLOW

    def __init__(self, *, pid: int, proc: Path = PROC_ROOT) -> None:
        self._pid, self._proc = pid, proc
        self._counters = TapCounters(pid, proc)
        self._names: frozenset[str] = frozenset()
        self._readings = 0

    async def open(self) -> None:
        """Look whether there is one.

        Raises:
            OSError: If there is none, or it is in no namespace that can be read.
        """
        self._refresh_names()
        missing = self._names - read_device_counters(self._pid, self._proc).keys()
        if not self._names or missing:
            raise FileNotFoundError(f"the tap device {', '.join(sorted(missing)) or 'of the VM'} cannot be read")
        self._counters.read(self._names)

    async def close(self) -> None:
        """Nothing is held."""

    async def read(self) -> ReadingValues:
        """Return one reading; None-filled while a device is gone, or while there is none."""
        self._readings += 1
        traffic = self._counters.read(self._names)
        if traffic is None or self._readings % TAP_CHECK_READINGS == 0:
            before = self._names
            self._refresh_names()
            if self._names != before:
                self._counters.read(self._names)
                return build_missing_reading(self.source)
        if traffic is None or not self._names:
            return build_missing_reading(self.source)
        return (*traffic, *(None for _ in range(len(NetflowReading._fields) - len(traffic))))

    @property
    def names(self) -> Sequence[str]:
        """The devices that are read."""
        return sorted(self._names)

    def _refresh_names(self) -> None:
        self._names = frozenset(find_taps_by_fd(self._pid, self._proc).values())
