"""Read frame and byte counters of a VM's tap devices from /proc: the fallback of the `netflow` source."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from phasewatch.telemetry.base import ReadingValues, build_missing_reading
from phasewatch.telemetry.netflow import NetflowReading
from phasewatch.telemetry.process import PROC_ROOT, parse_qemu_options, read_link
from phasewatch.types import SourceKind

__all__ = [
    "TAP_FIELDS",
    "TapCounters",
    "TapDevice",
    "TapSource",
    "TrafficTotals",
    "find_cards_without_tap",
    "find_tap_devices",
    "find_taps_by_fd",
    "read_device_counters",
]

_CHECK_READINGS = 4  # readings between two lists of the process's taps: 2 s
_OTHER_FILES = ("socket:", "pipe:", "anon_inode:", "/memfd:", "/dev/kvm", "/dev/null")
TAP_FIELDS = frozenset(NetflowReading._fields[:4])
_TAP_NAME_PATTERN = re.compile(r"^iff:\s*(\S{1,15})\s*$", re.MULTILINE)
_MACVTAP_PATTERN = re.compile(r"^/dev/tap(\d{1,9})$")
_SYS_NET = Path("/sys/class/net")
TrafficTotals = tuple[int, int, int, int]  # frames and bytes that the guest sent, and received


@dataclass(frozen=True, slots=True, kw_only=True)
class TapDevice:
    """A network interface of the host that carries the frames of one network card.

    Attributes:
        name: Name of the interface.
        is_macvtap: Whether it is a macvtap, which transmits what the guest sends; a tap receives it.
        fds: The process's file descriptors of it, one per queue.
    """

    name: str
    is_macvtap: bool = False
    fds: frozenset[int] = field(default=frozenset(), compare=False)


def find_taps_by_fd(pid: int, proc: Path = PROC_ROOT) -> dict[int, str]:
    """Return file descriptor → name of each tap device that a process holds, no matter who opened it.

    Source: ``/proc/PID/fdinfo/FD``, line ``iff``.
    """
    taps = {}
    files = proc / str(pid) / "fd"
    with suppress(OSError):
        for entry in (proc / str(pid) / "fdinfo").iterdir():
            if read_link(files / entry.name).startswith(_OTHER_FILES):  # most files, and cheaper than to read on
                continue
            with suppress(OSError, ValueError):  # closed after it was listed
                match = _TAP_NAME_PATTERN.search(entry.read_text("utf-8", "replace"))
                if match:
                    taps[int(entry.name)] = match[1]
    return taps


def find_tap_devices(pid: int, proc: Path = PROC_ROOT) -> tuple[TapDevice, ...]:
    """Return the tap and macvtap devices that a process holds, in order of their names.

    A macvtap device is found in this process's network namespace only.

    Source: ``/proc/PID/fdinfo/FD``; for macvtap ``/proc/PID/fd/FD``, a link to ``/dev/tapN``, where N is the index of
    the interface, and ``/sys/class/net/NAME/tapN/dev``, which proves it.
    """
    files: dict[tuple[str, bool], set[int]] = {}
    for fd, name in find_taps_by_fd(pid, proc).items():
        files.setdefault((name, False), set()).add(fd)
    with suppress(OSError):
        for entry in (proc / str(pid) / "fd").iterdir():
            match = _MACVTAP_PATTERN.match(read_link(entry))
            if match and entry.name.isdigit() and (name := _find_macvtap(entry, int(match[1]))):
                files.setdefault((name, True), set()).add(int(entry.name))
    return tuple(
        TapDevice(name=name, is_macvtap=is_macvtap, fds=frozenset(fds))
        for (name, is_macvtap), fds in sorted(files.items())
    )


def _find_macvtap(file: Path, index: int) -> str:
    """Return the name of the macvtap interface with an index; empty unless the open file is really its own."""
    try:
        name, device = socket.if_indextoname(index), file.stat().st_rdev
        number = (_SYS_NET / name / f"tap{index}" / "dev").read_text("ascii").strip()
    except (OSError, OverflowError):
        return ""
    return name if number == f"{os.major(device)}:{os.minor(device)}" else ""


def find_cards_without_tap(pid: int, proc: Path = PROC_ROOT) -> list[str]:
    """Return the options of a QEMU command line that define network cards without a tap, which nothing counts."""
    try:
        words = (proc / str(pid) / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")[1:]
    except OSError:
        return []
    options = []
    for option, keys in parse_qemu_options(words):
        kind = keys.get("type", keys.get("", ""))
        if option in ("netdev", "nic", "net") and kind not in ("tap", "bridge", "none", "nic", "hubport", ""):
            options.append(f"-{option} {kind}")
    return options


def read_device_counters(pid: int, proc: Path = PROC_ROOT) -> dict[str, TrafficTotals]:
    """Return the counters of every device in the process's network namespace, in the direction that the guest sees.

    Source: ``/proc/PID/net/dev``, columns bytes and packets of Receive (the guest sent) and Transmit.

    Raises:
        OSError: If the process is gone or may not be read.
    """
    # Not /sys/class/net: a device of that name in the watcher's namespace may belong to another VM.
    text = (proc / str(pid) / "net" / "dev").read_text("utf-8", "replace")
    counters = {}
    for line in text.splitlines():
        name, colon, counts = line.partition(":")
        numbers = counts.split()
        if colon and len(numbers) >= 10 and all(n.isdigit() for n in numbers[:10]):
            rx_bytes, rx_packets, *_ = map(int, numbers)
            # The host's end of a tap receives what the guest sends.
            counters[name.strip()] = (rx_packets, rx_bytes, int(numbers[9]), int(numbers[8]))
    return counters


class TapCounters:
    """Sums the counters of several tap devices; the sum neither falls when a device goes nor jumps when one comes.

    Args:
        pid: The QEMU process.
        proc: Path of /proc.
    """

    def __init__(self, pid: int, proc: Path = PROC_ROOT) -> None:
        self._pid, self._proc = pid, proc
        self._before: dict[str, TrafficTotals] = {}
        self._total: list[int] = []

    def read(self, names: Iterable[str]) -> TrafficTotals | None:
        """Return the totals so far; None if a device is missing, was recreated, or cannot be read.

        Args:
            names: The present devices.
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
            if min(steps) < 0:  # a new device of that name
                is_whole = False
                continue
            self._total = [total + step for total, step in zip(self._total, steps, strict=True)]
        return tuple(self._total) if is_whole else None  # type: ignore[return-value]


class TapSource:
    """Reads the counters of a VM's tap devices: frames and bytes; fields that need a frame's content are None.

    Args:
        pid: The QEMU process.
        proc: Path of /proc.
    """

    source = SourceKind.NETFLOW

    def __init__(self, *, pid: int, proc: Path = PROC_ROOT) -> None:
        self._pid, self._proc = pid, proc
        self._counters = TapCounters(pid, proc)
        self._names: frozenset[str] = frozenset()
        self._readings = 0

    async def open(self) -> None:
        """Find the tap devices.

        Raises:
            OSError: If there is none, or its counters cannot be read.
        """
        self._refresh_names()
        missing = self._names - read_device_counters(self._pid, self._proc).keys()
        if not self._names or missing:
            raise FileNotFoundError(f"the tap device {', '.join(sorted(missing)) or 'of the VM'} cannot be read")
        self._counters.read(self._names)

    async def close(self) -> None:
        """Do nothing; no file stays open."""

    async def read(self) -> ReadingValues:
        """Return one reading; None for every field while a device is missing, or there is none."""
        self._readings += 1
        traffic = self._counters.read(self._names)
        if traffic is None or self._readings % _CHECK_READINGS == 0:
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
        """Names of the devices that are read."""
        return sorted(self._names)

    def _refresh_names(self) -> None:
        self._names = frozenset(find_taps_by_fd(self._pid, self._proc).values())
