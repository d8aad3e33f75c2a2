"""Find the QEMU machines that run here, from /proc alone: who they are, and over which doors they can be watched."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from phasewatch.errors import MachineError, UsageError
from phasewatch.live.doors import Door, DoorKind, find_doors, is_same_file
from phasewatch.naming import host_id_of
from phasewatch.record.process import PROC, list_pids, read_start_ticks

_PROGRAM = re.compile(r"(?:qemu-system-(?P<arch>[a-z0-9_]+)|qemu-kvm|^kvm)(?: \(deleted\))?$")
_VCPU = re.compile(r"^CPU \d+/(?P<accel>KVM|TCG)$|^(?P<all>ALL CPUs)/TCG$")
_MAX_CMDLINE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """One QEMU process.

    Attributes:
        name: The VM's, or ``qemu-<pid>`` where nobody gave it one.
        arch: Of the guest.
        accel: ``kvm``, ``tcg``, or empty where only the monitor could tell.
        doors: Its monitors in control mode, those included that nobody else can use.
        taps: Host names of its tap devices.
        start_ticks: When the process started, in clock ticks since boot: a later one may have its number.
        uuid: The VM's, lower case; empty where nobody gave it one.
        is_hidden: Whether this user may not see what the process has open, so that taps and sockets may be missing.
        has_own_name: Whether the name is its own: given by somebody, and no other machine that runs here has it.
    """

    pid: int
    name: str
    arch: str
    accel: str
    doors: tuple[Door, ...]
    taps: tuple[str, ...]
    start_ticks: int
    uuid: str = ""
    is_hidden: bool = False
    has_own_name: bool = True

    @property
    def host_id(self) -> str:
        """What it is called as a host: by its name if that is its own, else also by its UUID or its process."""
        if self.has_own_name:
            return host_id_of(self.name)
        return host_id_of(
            self.name, taken={self.name}, identity=self.uuid or f"{self.pid} {self.start_ticks} {_boot_id()}"
        )

    @property
    def qmp(self) -> tuple[Path, ...]:
        """Paths of the QMP sockets that it listens on, as this process reaches them."""
        return tuple(door.path for door in self.doors if door.path is not None)

    @property
    def foreign_qmp(self) -> bool:
        """Whether there is a QMP socket that belongs to who started the machine."""
        return any(door.kind is DoorKind.HANDED_OVER for door in self.doors)


def list_running(proc: Path = PROC) -> tuple[Running, ...]:
    """Give every QEMU system emulator that can be seen, in the order of their pids."""
    found = (read_running(pid, proc) for pid in list_pids(proc))
    return tuple(machine for machine in found if machine is not None)


def read_running(pid: int, proc: Path = PROC) -> Running | None:
    """Give one process if it is a QEMU system emulator; None if it is another, or gone."""
    folder = proc / str(pid)
    try:
        with (folder / "cmdline").open("rb") as file:
            words = file.read(_MAX_CMDLINE).decode("utf-8", "backslashreplace").split("\0")
    except OSError:
        return None
    start_ticks = read_start_ticks(pid, proc)
    if start_ticks is None:
        return None
    match = _PROGRAM.search(Path(words[0]).name)
    if match is None:
        match = _PROGRAM.search(Path(_target(folder / "exe")).name)
    if match is None:
        return None
    arguments = parse_arguments(words[1:])
    name = _name(arguments)
    return Running(
        pid=pid,
        name=name or f"qemu-{pid}",
        has_own_name=bool(name),
        arch=match["arch"] or "x86_64",
        accel=_accel(arguments) or _accel_of_threads(folder),
        doors=find_doors(arguments, folder),
        taps=_taps(folder),
        start_ticks=start_ticks,
        uuid=_uuid(arguments),
        is_hidden=_is_hidden(folder),
    )


def find_one(*, pid: int | None, name: str | None, qmp: Path | None, proc: Path = PROC) -> Running:
    """Find the machine that is meant.

    Raises:
        UsageError: If nothing says which, two things do, or more than one has the name.
        MachineError: If there is no such machine.
    """
    if pid is not None and name is not None:
        raise UsageError("--name goes with no --pid: each names the machine; leave one of them out")
    if pid is not None:
        machine = read_running(pid, proc)
        if machine is None:
            raise MachineError(f"--pid {pid}: {_why_none(pid, proc)}; phasewatch watch --list shows what runs here")
        return _with_own_name(machine, list_running(proc))
    running = list_running(proc)
    if name is not None:
        said = f"--name {name}"
        fits = [machine for machine in running if machine.name == name]
        fits = fits or [machine for machine in running if machine.uuid and machine.uuid == name.lower()]
        why = "no running machine has it"
    elif qmp is not None:
        said = f"--qmp {qmp}"
        fits = [machine for machine in running if _has_door(machine, qmp)]
        why = f"no running machine has it: {_why_no_door(qmp)}"
    else:
        raise UsageError("say which machine: --pid N, --qmp SOCKET or --name NAME; --list shows those that run here")
    if len(fits) > 1 and name is not None and qmp is not None:
        fits = [machine for machine in fits if _has_door(machine, qmp)] or fits
    if not fits:
        there = ", ".join(f"{m.name} ({m.pid})" for m in running) or "none that this user can see"
        raise MachineError(f"{said}: {why}; running: {there}")
    if len(fits) > 1:
        raise UsageError(
            f"{said}: {len(fits)} machines have it; choose by --pid: {', '.join(str(m.pid) for m in fits)}"
        )
    return _with_own_name(fits[0], running)


def _with_own_name(machine: Running, running: Sequence[Running]) -> Running:
    """Return the machine, marked if another one that runs here has its name too."""
    has_namesake = any(other.name == machine.name and other.pid != machine.pid for other in running)
    return replace(machine, has_own_name=False) if has_namesake else machine


def _is_hidden(folder: Path) -> bool:
    try:
        next((folder / "fd").iterdir(), None)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _boot_id() -> str:
    with suppress(OSError):
        return (PROC / "sys" / "kernel" / "random" / "boot_id").read_text("ascii").strip()
    return ""


def _has_door(machine: Running, qmp: Path) -> bool:
    return any(door == qmp.absolute() or is_same_file(door, qmp) for door in machine.qmp)


def _why_no_door(qmp: Path) -> str:
    try:
        is_socket = stat.S_ISSOCK(qmp.stat().st_mode)
    except OSError as exc:
        return f"the path cannot be followed: {exc.strerror}"
    if not is_socket:
        return "that file is no socket"
    return "the socket is there, and no QEMU that this user can look into listens on it; name the machine too, by --pid"


def _why_none(pid: int, proc: Path) -> str:
    folder = proc / str(pid)
    try:
        if not (folder / "cmdline").read_bytes() and read_start_ticks(pid, proc) is None and folder.exists():
            return "the process has ended"
    except PermissionError:
        return "the process may not be looked into by this user"
    except OSError:
        pass
    return "the process is not QEMU" if folder.exists() else "there is no such process that this user can see"


def vcpu_threads(pid: int, proc: Path = PROC) -> tuple[int, ...]:
    """Give the vCPU threads by their names, which QEMU gives them with ``debug-threads=on`` (libvirt does); else none."""
    found = []
    for tid, comm in _threads(proc / str(pid)):
        if _VCPU.match(comm):
            found.append(tid)
    return tuple(sorted(found))


def parse_arguments(words: Sequence[str]) -> tuple[tuple[str, Mapping[str, str]], ...]:
    """Give a command line as (option, its keys): ``-netdev tap,id=n0`` and JSON alike; what has no key is under ""."""
    found: list[tuple[str, Mapping[str, str]]] = []
    at = 0
    while at < len(words):
        option = words[at]
        at += 1
        if not option.startswith("-"):
            continue
        value = ""
        if at < len(words) and not words[at].startswith("-"):
            value = words[at]
            at += 1
        found.append((option.lstrip("-"), _keys(value)))
    return tuple(found)


def _keys(value: str) -> Mapping[str, str]:
    if value.startswith("{"):
        try:
            plain = msgspec.json.decode(value.encode(), type=dict[str, object])
        except msgspec.DecodeError:
            return {"": value}
        return {str(k): ("on" if v else "off") if isinstance(v, bool) else str(v) for k, v in plain.items()}
    keys: dict[str, str] = {}
    for at, part in enumerate(_split(value)):
        key, equals, rest = part.partition("=")
        if equals:
            keys[key] = rest
        elif at == 0:
            keys[""] = key
        else:  # `server,nowait`, as it was written before QEMU 6
            keys[key] = "on"
            if key.startswith("no"):
                keys[key.removeprefix("no")] = "off"
    return keys


def _split(value: str) -> list[str]:
    """Split at commas; a doubled one is a comma of the value."""
    return [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]


def _name(arguments: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    for option, keys in arguments:
        if option == "name":
            return keys.get("guest") or keys.get("", "")
    return ""


def _accel(arguments: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    for option, keys in arguments:
        if option == "enable-kvm":
            return "kvm"
        asked = (
            keys.get("accel", keys.get("", ""))
            if option == "accel"
            else keys.get("accel", "")
            if option in ("machine", "M")
            else ""
        )
        for accel in asked.split(":"):
            if accel in ("kvm", "tcg"):
                return accel
    return ""


def _accel_of_threads(folder: Path) -> str:
    for _, comm in _threads(folder):
        match = _VCPU.match(comm)
        if match:
            return "tcg" if match["all"] or match["accel"] == "TCG" else "kvm"
    return ""


def _uuid(arguments: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    for option, keys in arguments:
        if option == "uuid":
            return keys.get("", "").lower()
    return ""


def _taps(folder: Path) -> tuple[str, ...]:
    """Name the tap devices whose file the process holds, whoever opened it."""
    names = set()
    with suppress(OSError):
        for entry in (folder / "fdinfo").iterdir():
            with suppress(OSError):  # closed between the listing and the reading, as a busy machine does all the time
                text = entry.read_text("utf-8", "replace")
                names |= set(re.findall(r"^iff:\s*(\S{1,15})\s*$", text, re.MULTILINE))
    return tuple(sorted(names))


def _threads(folder: Path) -> Iterator[tuple[int, str]]:
    with suppress(OSError):
        for entry in (folder / "task").iterdir():
            with suppress(OSError, ValueError):  # it ended between the listing and the reading
                yield int(entry.name), (entry / "comm").read_text("utf-8", "replace").rstrip("\n")


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""
