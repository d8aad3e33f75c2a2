"""Read frame and byte counters of a VM's tap devices from /proc: the fallback of the `netflow` source."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from phasewatch.telemetry.base import ReadingValues, build_missing_reading
from phasewatch.telemetry.netflow import NetflowReading
from phasewatch.telemetry.process import PROC_ROOT, parse_qemu_options
from phasewatch.types import SourceKind

__all__ = [
    "TAP_FIELDS",
    "TapCounters",
    "TapDevice",
    "TapFinder",
    "TapSource",
    "TrafficTotals",
    "find_cards_without_tap",
    "find_tap_devices",
    "find_taps_by_fd",
    "read_device_counters",
]

_CHECK_READINGS = 4  # readings between two lists of the process's taps: 2 s
# Most files of a process; a tap is a device of any path, such as ``/dev/net/tun``.
_OTHER_FILES = ("socket:", "pipe:", "anon_inode:", "/memfd:", "/dev/kvm", "/dev/null", "/dev/pts/", "/dev/vhost-net")
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
    names = {fd: _read_tap_name(pid, fd, proc) for fd, link in _list_files(pid, proc).items() if _may_be_tap(link)}
    return {fd: name for fd, name in names.items() if name}


def find_tap_devices(pid: int, proc: Path = PROC_ROOT) -> tuple[TapDevice, ...]:
    """Return the tap and macvtap devices that a process holds, in order of their names.

    A macvtap device is found in this process's network namespace only.

    Source: ``/proc/PID/fdinfo/FD``; for macvtap ``/proc/PID/fd/FD``, a link to ``/dev/tapN``, where N is the index of
    the interface, and ``/sys/class/net/NAME/tapN/dev``, which proves it.
    """
    return _group_devices(pid, _list_files(pid, proc), proc)


class TapFinder:
    """Finds the tap devices of a process again and again; cheap while nothing changed.

    Args:
        pid: The QEMU process.
        proc: Path of /proc.
    """

    def __init__(self, pid: int, proc: Path = PROC_ROOT) -> None:
        self._pid, self._proc = pid, proc
        self._fds: frozenset[int] = frozenset()
        self._devices: tuple[TapDevice, ...] = ()

    def find(self) -> tuple[TapDevice, ...]:
        """Return the devices, as `find_tap_devices` does."""
        files = _list_files(self._pid, self._proc)
        self._fds, self._devices = frozenset(files), _group_devices(self._pid, files, self._proc)
        return self._devices

    def is_unchanged(self) -> bool:
        """Return whether the process has the same files open as at the last call of `find`, and the same taps in them.

        A file that was closed and replaced by a tap under its number is not noticed here.
        """
        if frozenset(_list_numbers(self._proc / str(self._pid) / "fdinfo")) != self._fds:
            return False
        return all(
            device.is_macvtap or _read_tap_name(self._pid, fd, self._proc) == device.name
            for device in self._devices
            for fd in device.fds
        )


def _group_devices(pid: int, files: Mapping[int, str], proc: Path) -> tuple[TapDevice, ...]:
    fds: dict[tuple[str, bool], set[int]] = {}
    for fd, link in files.items():
        macvtap = _MACVTAP_PATTERN.match(link)
        if macvtap:
            name = _find_macvtap(proc / str(pid) / "fd" / str(fd), int(macvtap[1]))
        else:
            name = _read_tap_name(pid, fd, proc) if _may_be_tap(link) else ""
        if name:
            fds.setdefault((name, macvtap is not None), set()).add(fd)
    return tuple(
        TapDevice(name=name, is_macvtap=is_macvtap, fds=frozenset(fds[name, is_macvtap]))
        for name, is_macvtap in sorted(fds)
    )


def _list_files(pid: int, proc: Path) -> dict[int, str]:
    """Return file descriptor → what the file is; empty where that cannot be read."""
    numbers = _list_numbers(proc / str(pid) / "fdinfo")
    files = dict.fromkeys(numbers, "")
    try:
        folder = os.open(proc / str(pid) / "fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return files
    try:
        for fd in numbers:
            with suppress(OSError):  # closed after it was listed
                files[fd] = os.readlink(str(fd), dir_fd=folder)
    finally:
        os.close(folder)
    return files


def _list_numbers(folder: Path) -> list[int]:
    with suppress(OSError), os.scandir(folder) as entries:
        return [int(entry.name) for entry in entries if entry.name.isdecimal() and entry.name.isascii()]
    return []


def _may_be_tap(link: str) -> bool:
    return not link.startswith(_OTHER_FILES)


def _read_tap_name(pid: int, fd: int, proc: Path) -> str:
    """Return the name of the tap device of a file descriptor; empty if it is none."""
    with suppress(OSError):
        match = _TAP_NAME_PATTERN.search((proc / str(pid) / "fdinfo" / str(fd)).read_text("utf-8", "replace"))
        return match[1] if match else ""
    return ""


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
