"""Find the QEMU machines that run here, from /proc alone: who they are, and over which doors they can be watched."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from phasewatch.errors import MachineError, UsageError
from phasewatch.live.doors import MonitorEndpoint, MonitorEndpointKind, find_monitor_endpoints, is_same_file
from phasewatch.naming import make_host_id
from phasewatch.telemetry.process import PROC_ROOT, list_pids, parse_qemu_options, read_start_ticks

_QEMU_PROGRAM_PATTERN = re.compile(r"(?:qemu-system-(?P<arch>[a-z0-9_]+)|qemu-kvm|^kvm)(?: \(deleted\))?$")
_VCPU_THREAD_PATTERN = re.compile(r"^CPU \d+/(?P<accel>KVM|TCG)$|^(?P<all>ALL CPUs)/TCG$")
_MAX_CMDLINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningVm:
    """One QEMU process.

    Attributes:
        name: The VM's, or ``qemu-<pid>`` where nobody gave it one.
        arch: Of the guest.
        accel: ``kvm``, ``tcg``, or empty where only the monitor could tell.
        monitors: Its monitors in control mode, those included that nobody else can use.
        taps: Host names of its tap devices.
        start_ticks: When the process started, in clock ticks since boot: a later one may have its number.
        uuid: The VM's, lower case; empty where nobody gave it one.
        is_hidden: Whether this user may not see what the process has open, so that taps and sockets may be missing.
        has_unique_name: Whether the name is its own: given by somebody, and no other machine that runs here has it.
    """

    pid: int
    name: str
    arch: str
    accel: str
    monitors: tuple[MonitorEndpoint, ...]
    taps: tuple[str, ...]
    start_ticks: int
    uuid: str = ""
    is_hidden: bool = False
    has_unique_name: bool = True

    @property
    def host_id(self) -> str:
        """What it is called as a host: by its name if that is its own, else also by its UUID or its process."""
        if self.has_unique_name:
            return make_host_id(self.name)
        return make_host_id(
            self.name, taken={self.name}, identity=self.uuid or f"{self.pid} {self.start_ticks} {_read_boot_id()}"
        )

    @property
    def qmp(self) -> tuple[Path, ...]:
        """Paths of the QMP sockets that it listens on, as this process reaches them."""
        return tuple(door.path for door in self.monitors if door.path is not None)

    @property
    def has_foreign_qmp(self) -> bool:
        """Whether there is a QMP socket that belongs to who started the machine."""
        return any(door.kind is MonitorEndpointKind.HANDED_OVER for door in self.monitors)


def list_running_vms(proc: Path = PROC_ROOT) -> tuple[RunningVm, ...]:
    """Give every QEMU system emulator that can be seen, in the order of their pids."""
    found = (read_running_vm(pid, proc) for pid in list_pids(proc))
    return tuple(machine for machine in found if machine is not None)


def read_running_vm(pid: int, proc: Path = PROC_ROOT) -> RunningVm | None:
    """Give one process if it is a QEMU system emulator; None if it is another, or gone."""
    folder = proc / str(pid)
    try:
        with (folder / "cmdline").open("rb") as file:
            words = file.read(_MAX_CMDLINE_BYTES).decode("utf-8", "backslashreplace").split("\0")
    except OSError:
        return None
    start_ticks = read_start_ticks(pid, proc)
    if start_ticks is None:
        return None
    match = _QEMU_PROGRAM_PATTERN.search(Path(words[0]).name)
    if match is None:
        match = _QEMU_PROGRAM_PATTERN.search(Path(_read_link(folder / "exe")).name)
    if match is None:
        return None
    arguments = parse_qemu_options(words[1:])
    name = _find_vm_name(arguments)
    return RunningVm(
        pid=pid,
        name=name or f"qemu-{pid}",
        has_unique_name=bool(name),
        arch=match["arch"] or "x86_64",
        accel=_find_accel(arguments) or _find_thread_accel(folder),
        monitors=find_monitor_endpoints(arguments, folder),
        taps=_list_taps(folder),
        start_ticks=start_ticks,
        uuid=_find_uuid(arguments),
        is_hidden=_is_fd_folder_hidden(folder),
    )


def find_running_vm(*, pid: int | None, name: str | None, qmp: Path | None, proc: Path = PROC_ROOT) -> RunningVm:
    """Find the machine that is meant.

    Raises:
        UsageError: If nothing says which, two things do, or more than one has the name.
        MachineError: If there is no such machine.
    """
    if pid is not None and name is not None:
        raise UsageError("--name goes with no --pid: each names the machine; leave one of them out")
    if pid is not None:
        machine = read_running_vm(pid, proc)
        if machine is None:
            raise MachineError(
                f"--pid {pid}: {_explain_missing_process(pid, proc)}; phasewatch watch --list shows what runs here"
            )
        return _mark_shared_name(machine, list_running_vms(proc))
    running = list_running_vms(proc)
    if name is not None:
        said = f"--name {name}"
        fits = [machine for machine in running if machine.name == name]
        fits = fits or [machine for machine in running if machine.uuid and machine.uuid == name.lower()]
        why = "no running machine has it"
    elif qmp is not None:
        said = f"--qmp {qmp}"
        fits = [machine for machine in running if _has_monitor(machine, qmp)]
        why = f"no running machine has it: {_explain_unmatched_socket(qmp)}"
    else:
        raise UsageError("say which machine: --pid N, --qmp SOCKET or --name NAME; --list shows those that run here")
    if len(fits) > 1 and name is not None and qmp is not None:
        fits = [machine for machine in fits if _has_monitor(machine, qmp)] or fits
    if not fits:
        there = ", ".join(f"{m.name} ({m.pid})" for m in running) or "none that this user can see"
        raise MachineError(f"{said}: {why}; running: {there}")
    if len(fits) > 1:
        raise UsageError(
            f"{said}: {len(fits)} machines have it; choose by --pid: {', '.join(str(m.pid) for m in fits)}"
        )
    return _mark_shared_name(fits[0], running)


def _mark_shared_name(machine: RunningVm, running: Sequence[RunningVm]) -> RunningVm:
    """Return the machine, marked if another one that runs here has its name too."""
    has_namesake = any(other.name == machine.name and other.pid != machine.pid for other in running)
    return replace(machine, has_unique_name=False) if has_namesake else machine


def _is_fd_folder_hidden(folder: Path) -> bool:
    try:
        next((folder / "fd").iterdir(), None)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _read_boot_id() -> str:
    with suppress(OSError):
        return (PROC_ROOT / "sys" / "kernel" / "random" / "boot_id").read_text("ascii").strip()
    return ""


def _has_monitor(machine: RunningVm, qmp: Path) -> bool:
    return any(door == qmp.absolute() or is_same_file(door, qmp) for door in machine.qmp)


def _explain_unmatched_socket(qmp: Path) -> str:
    try:
        is_socket = stat.S_ISSOCK(qmp.stat().st_mode)
    except OSError as exc:
        return f"the path cannot be followed: {exc.strerror}"
    if not is_socket:
        return "that file is no socket"
    return "the socket is there, and no QEMU that this user can look into listens on it; name the machine too, by --pid"


def _explain_missing_process(pid: int, proc: Path) -> str:
    folder = proc / str(pid)
    try:
        if not (folder / "cmdline").read_bytes() and read_start_ticks(pid, proc) is None and folder.exists():
            return "the process has ended"
    except PermissionError:
        return "the process may not be looked into by this user"
    except OSError:
        pass
    return "the process is not QEMU" if folder.exists() else "there is no such process that this user can see"


def find_vcpu_threads(pid: int, proc: Path = PROC_ROOT) -> tuple[int, ...]:
    """Give the vCPU threads by their names, which QEMU gives them with ``debug-threads=on`` (libvirt does); else none."""
    found = []
    for tid, comm in _list_threads(proc / str(pid)):
        if _VCPU_THREAD_PATTERN.match(comm):
            found.append(tid)
    return tuple(sorted(found))


def _find_vm_name(arguments: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    for option, keys in arguments:
        if option == "name":
            return keys.get("guest") or keys.get("", "")
    return ""


def _find_accel(arguments: Sequence[tuple[str, Mapping[str, str]]]) -> str:
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


def _find_thread_accel(folder: Path) -> str:
    for _, comm in _list_threads(folder):
        match = _VCPU_THREAD_PATTERN.match(comm)
        if match:
            return "tcg" if match["all"] or match["accel"] == "TCG" else "kvm"
    return ""


def _find_uuid(arguments: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    for option, keys in arguments:
        if option == "uuid":
            return keys.get("", "").lower()
    return ""


def _list_taps(folder: Path) -> tuple[str, ...]:
    """Name the tap devices whose file the process holds, whoever opened it."""
    names = set()
    with suppress(OSError):
        for entry in (folder / "fdinfo").iterdir():
            with suppress(OSError):  # closed between the listing and the reading, as a busy machine does all the time
                text = entry.read_text("utf-8", "replace")
                names |= set(re.findall(r"^iff:\s*(\S{1,15})\s*$", text, re.MULTILINE))
    return tuple(sorted(names))


def _list_threads(folder: Path) -> Iterator[tuple[int, str]]:
    with suppress(OSError):
        for entry in (folder / "task").iterdir():
            with suppress(OSError, ValueError):  # it ended between the listing and the reading
                yield int(entry.name), (entry / "comm").read_text("utf-8", "replace").rstrip("\n")


def _read_link(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""
