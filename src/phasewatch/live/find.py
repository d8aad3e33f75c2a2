"""Find the QEMU machines that run here, from /proc alone: who they are, and over which doors they can be watched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from phasewatch.errors import MachineError, UsageError

PROC = Path("/proc")
_PROGRAM = re.compile(r"(?:qemu-system-(?P<arch>[a-z0-9_]+)|qemu-kvm)$")
_VCPU = re.compile(r"^CPU \d+/(?P<accel>KVM|TCG)$|^(?P<all>ALL CPUs)/TCG$")
_MAX_CMDLINE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """One QEMU process.

    Attributes:
        name: The VM's, or ``qemu-<pid>`` where nobody gave it one.
        arch: Of the guest.
        accel: ``kvm``, ``tcg``, or empty where only the monitor could tell.
        qmp: Paths of its QMP sockets that a file system knows; of a socket that libvirt handed over there is none.
        foreign_qmp: Whether there is a QMP socket without a path: it belongs to who started the machine.
        taps: Host names of its tap devices.
    """

    pid: int
    name: str
    arch: str
    accel: str
    qmp: tuple[Path, ...]
    foreign_qmp: bool
    taps: tuple[str, ...]


def list_running(proc: Path = PROC) -> tuple[Running, ...]:
    """Give every QEMU system emulator that can be seen, in the order of their pids."""
    found = []
    for folder in sorted((p for p in proc.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)):
        machine = read_running(int(folder.name), proc)
        if machine is not None:
            found.append(machine)
    return tuple(found)


def read_running(pid: int, proc: Path = PROC) -> Running | None:
    """Give one process if it is a QEMU system emulator; None if it is another, or gone."""
    folder = proc / str(pid)
    try:
        with (folder / "cmdline").open("rb") as file:
            words = file.read(_MAX_CMDLINE).decode("utf-8", "replace").split("\0")
    except OSError:
        return None
    match = _PROGRAM.search(Path(words[0]).name)
    if match is None:
        match = _PROGRAM.search(_target(folder / "exe"))
    if match is None:
        return None
    arguments = parse_arguments(words[1:])
    qmp, foreign = _qmp_doors(arguments, _target(folder / "cwd"))
    return Running(
        pid=pid,
        name=_name(arguments) or f"qemu-{pid}",
        arch=match["arch"] or "x86_64",
        accel=_accel(arguments) or _accel_of_threads(folder),
        qmp=qmp,
        foreign_qmp=foreign,
        taps=_taps(folder),
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
            gone = "there is no such process" if not (proc / str(pid)).exists() else "the process is not QEMU"
            raise MachineError(f"--pid {pid}: {gone}; phasewatch watch --list shows what runs here")
        return machine
    running = list_running(proc)
    if name is not None:
        fits = [machine for machine in running if machine.name == name]
    elif qmp is not None:
        fits = [machine for machine in running if qmp.absolute() in machine.qmp]
    else:
        raise UsageError("say which machine: --pid N, --qmp SOCKET or --name NAME; --list shows those that run here")
    said = f"--name {name}" if name is not None else f"--qmp {qmp}"
    if not fits:
        there = ", ".join(f"{m.name} ({m.pid})" for m in running) or "none"
        raise MachineError(f"{said}: no running machine has it; running: {there}")
    if len(fits) > 1:
        raise UsageError(
            f"{said}: {len(fits)} machines have it; choose by --pid: {', '.join(str(m.pid) for m in fits)}"
        )
    return fits[0]


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
        return {str(k): str(v) for k, v in plain.items()}
    keys: dict[str, str] = {}
    for part in re.split(r"(?<!,),(?!,)", value):  # a doubled comma is one of the value
        key, equals, rest = part.replace(",,", ",").partition("=")
        keys[key if equals else ""] = rest if equals else keys.get("", key)
    return keys


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


def _qmp_doors(arguments: Sequence[tuple[str, Mapping[str, str]]], cwd: str) -> tuple[tuple[Path, ...], bool]:
    """Find the QMP sockets: `-qmp unix:PATH`, or a `-mon` in control mode over a `-chardev`."""
    chardevs = {keys.get("id", ""): keys for option, keys in arguments if option == "chardev"}
    doors: list[Path] = []
    foreign = False
    for option, keys in arguments:
        path = ""
        if option in ("qmp", "qmp-pretty"):
            head = keys.get("", "")
            path = head.partition(":")[2] if head.startswith("unix:") else ""
        elif option == "mon" and keys.get("mode") == "control":
            chardev = chardevs.get(keys.get("chardev") or keys.get("", ""), {})
            path = chardev.get("path", "")
            foreign |= not path
        if path:
            doors.append(Path(path) if path.startswith("/") else Path(cwd, path))
    return tuple(doors), foreign


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
