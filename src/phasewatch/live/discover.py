"""Find the QEMU VMs that run on this host, from /proc alone: names, accelerators, QMP sockets and tap devices."""

from __future__ import annotations

import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from phasewatch.errors import MachineError, UsageError
from phasewatch.live.monitor_endpoints import MonitorEndpoint, MonitorEndpointKind, find_monitor_endpoints, is_same_file
from phasewatch.naming import make_host_id
from phasewatch.telemetry.process import PROC_ROOT, list_pids, parse_qemu_options, read_link, read_start_ticks
from phasewatch.telemetry.tap import find_taps_by_fd

__all__ = [
    "RunningVm",
    "VmIdentity",
    "VmScanner",
    "find_running_vm",
    "find_vcpu_threads",
    "identify_vms",
    "list_running_vms",
    "matches_pattern",
    "read_running_vm",
]

_QEMU_PROGRAM_PATTERN = re.compile(r"(?:qemu-system-(?P<arch>[a-z0-9_]+)|qemu-kvm|^kvm)(?: \(deleted\))?$")
_VCPU_THREAD_PATTERN = re.compile(r"^CPU \d+/(?P<accel>KVM|TCG)$|^(?P<all>ALL CPUs)/TCG$")
_MAX_CMDLINE_BYTES = 1 << 20
_YOUNG_SCANS = 8  # a process that starts QEMU in its place (exec) does so soon after its own start
_RECHECK_SCANS = 30  # all others are looked at once in this many scans


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningVm:
    """One QEMU process.

    Attributes:
        pid: Process id.
        name: The VM's name (``-name``), or ``qemu-<pid>`` if it has none.
        arch: Architecture of the guest.
        accel: ``kvm``, ``tcg``, or empty if only the monitor can tell.
        monitors: Its QMP monitors, including those that no other program can use.
        taps: Names of its tap devices on the host.
        start_ticks: Start time of the process in clock ticks since boot, which tells it from a later one with its pid.
        uuid: The VM's UUID (``-uuid``) in lower case; empty if it has none.
        is_hidden: Whether this user may not list the process's open files, so that taps and sockets may be missing.
        has_unique_name: Whether the VM has a name, and no other running VM has the same one.
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
        """Host id of the VM: from its name if that is unique, else also from its UUID or its process."""
        if self.has_unique_name:
            return make_host_id(self.name)
        return make_host_id(
            self.name, taken={self.name}, identity=self.uuid or f"{self.pid} {self.start_ticks} {_read_boot_id()}"
        )

    @property
    def qmp(self) -> tuple[Path, ...]:
        """Paths of the QMP sockets that QEMU listens on, as this process reaches them."""
        return tuple(endpoint.path for endpoint in self.monitors if endpoint.path is not None)

    @property
    def is_libvirt_domain(self) -> bool:
        """Whether libvirt seems to have started the VM; only libvirt itself can confirm it."""
        return bool(self.uuid) and self.has_foreign_qmp

    @property
    def has_foreign_qmp(self) -> bool:
        """Whether a QMP socket belongs to the program that started the VM, such as libvirt."""
        return any(endpoint.kind is MonitorEndpointKind.HANDED_OVER for endpoint in self.monitors)


@dataclass(frozen=True, slots=True, kw_only=True)
class VmIdentity:
    """What tells a VM from all others.

    Attributes:
        key: The VM across restarts of its process: its UUID, else its name if no other VM has it, else the process.
        process: The process: id of the host's boot, process id and start time.
    """

    key: str
    process: str


def identify_vms(running: Sequence[RunningVm]) -> dict[int, VmIdentity]:
    """Return the identity of each VM by its process id. A UUID or name that two of them share identifies neither."""
    uuids = Counter(machine.uuid for machine in running)
    names = Counter(machine.name for machine in running)
    boot_id = _read_boot_id()
    found = {}
    for machine in running:
        process = f"{boot_id}:{machine.pid}:{machine.start_ticks}"
        if machine.uuid and uuids[machine.uuid] == 1:
            key = f"uuid:{machine.uuid}"
        elif machine.has_unique_name and names[machine.name] == 1:
            key = f"name:{machine.name}"
        else:
            key = f"process:{process}"
        found[machine.pid] = VmIdentity(key=key, process=process)
    return found


def matches_pattern(machine: RunningVm, pattern: str) -> bool:
    """Return whether a VM has this name or UUID, or a name that matches the pattern (``*``, ``?``, ``[…]``)."""
    if machine.name == pattern or (machine.uuid and machine.uuid == pattern.lower()):
        return True
    return fnmatchcase(machine.name, pattern)


class VmScanner:
    """Follows which VMs run. A scan costs one list of /proc and a look at the processes that are new.

    A process may start QEMU in its place after a scan saw it. Young processes are therefore looked at again in the next
    scans, and all others in turn. A VM whose monitor does not listen yet is held back for one scan.

    Args:
        proc: Path of /proc.
    """

    def __init__(self, proc: Path = PROC_ROOT) -> None:
        self._proc = proc
        self._vms: dict[int, RunningVm] = {}
        self._settling: set[int] = set()
        self._n_scans: dict[int, int] = {}  # of each process that is no VM

    def scan(self) -> tuple[RunningVm, ...]:
        """Return the running VMs in order of process id."""
        pids = list_pids(self._proc)
        present = set(pids)
        self._vms = {
            pid: machine
            for pid, machine in self._vms.items()
            if pid in present and read_start_ticks(pid, self._proc) == machine.start_ticks
        }
        self._n_scans = {pid: count for pid, count in self._n_scans.items() if pid in present}
        settling, self._settling = self._settling, set()
        for pid in pids:
            if pid not in self._vms or pid in settling:
                self._look_at(pid, is_settling=pid in settling)
        names = Counter(machine.name for machine in self._vms.values())
        return tuple(
            machine if names[machine.name] == 1 else replace(machine, has_unique_name=False)
            for pid, machine in sorted(self._vms.items())
            if pid not in self._settling
        )

    def _look_at(self, pid: int, *, is_settling: bool) -> None:
        count = self._n_scans.get(pid, 0)
        if count >= _YOUNG_SCANS and (count + pid) % _RECHECK_SCANS:
            self._n_scans[pid] = count + 1
            return
        machine = read_running_vm(pid, self._proc)
        if machine is None:
            self._vms.pop(pid, None)
            self._n_scans[pid] = count + 1
            return
        self._n_scans.pop(pid, None)
        self._vms[pid] = machine
        if not is_settling and any(m.kind is MonitorEndpointKind.SILENT for m in machine.monitors):
            self._settling.add(pid)


def list_running_vms(proc: Path = PROC_ROOT) -> tuple[RunningVm, ...]:
    """Return every QEMU system emulator that this user can see, in order of process id."""
    machines = (read_running_vm(pid, proc) for pid in list_pids(proc))
    return tuple(machine for machine in machines if machine is not None)


def read_running_vm(pid: int, proc: Path = PROC_ROOT) -> RunningVm | None:
    """Return the VM of a process; None if the process is not a QEMU system emulator, or is gone.

    Source: ``/proc/PID/cmdline``, ``exe``, ``stat``, ``fd``, ``fdinfo`` and ``task/*/comm``.
    """
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
        match = _QEMU_PROGRAM_PATTERN.search(Path(read_link(folder / "exe")).name)
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
        taps=tuple(sorted(set(find_taps_by_fd(pid, proc).values()))),
        start_ticks=start_ticks,
        uuid=_find_uuid(arguments),
        is_hidden=_is_fd_folder_hidden(folder),
    )


def find_running_vm(*, pid: int | None, name: str | None, qmp: Path | None, proc: Path = PROC_ROOT) -> RunningVm:
    """Find the running VM that the user means.

    Args:
        pid: Process id.
        name: Name or UUID; may be combined with `qmp`, not with `pid`.
        qmp: Path of a QMP socket.
        proc: Path of /proc.

    Raises:
        UsageError: If no VM is named, `pid` and `name` are both given, or several VMs match.
        MachineError: If no running VM matches.
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
        option = f"--name {name}"
        matches = [machine for machine in running if machine.name == name]
        matches = matches or [machine for machine in running if machine.uuid and machine.uuid == name.lower()]
        reason = "no running machine has it"
    elif qmp is not None:
        option = f"--qmp {qmp}"
        matches = [machine for machine in running if _has_monitor(machine, qmp)]
        reason = f"no running machine has it: {_explain_unmatched_socket(qmp)}"
    else:
        raise UsageError("no VM is named: give --pid N, --qmp SOCKET or --name NAME; --list shows those that run here")
    if len(matches) > 1 and name is not None and qmp is not None:
        matches = [machine for machine in matches if _has_monitor(machine, qmp)] or matches
    if not matches:
        names = ", ".join(f"{m.name} ({m.pid})" for m in running) or "none that this user can see"
        raise MachineError(f"{option}: {reason}; running: {names}")
    if len(matches) > 1:
        raise UsageError(
            f"{option}: {len(matches)} machines have it; choose by --pid: {', '.join(str(m.pid) for m in matches)}"
        )
    return _mark_shared_name(matches[0], running)


def _mark_shared_name(machine: RunningVm, running: Sequence[RunningVm]) -> RunningVm:
    """Return the VM, marked if another running VM has the same name."""
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
    return any(path == qmp.absolute() or is_same_file(path, qmp) for path in machine.qmp)


def _explain_unmatched_socket(qmp: Path) -> str:
    try:
        is_socket = stat.S_ISSOCK(qmp.stat().st_mode)
    except OSError as exc:
        return f"the path cannot be followed: {exc.strerror}"
    if not is_socket:
        return "that file is not a socket"
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
    """Return the vCPU threads by their names; empty unless QEMU runs with ``debug-threads=on``, as under libvirt.

    Source: ``/proc/PID/task/TID/comm``, such as ``CPU 0/KVM``.
    """
    tids = (tid for tid, comm in _list_thread_names(proc / str(pid)) if _VCPU_THREAD_PATTERN.match(comm))
    return tuple(sorted(tids))


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
    for _, comm in _list_thread_names(folder):
        match = _VCPU_THREAD_PATTERN.match(comm)
        if match:
            return "tcg" if match["all"] or match["accel"] == "TCG" else "kvm"
    return ""


def _find_uuid(arguments: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    for option, keys in arguments:
        if option == "uuid":
            return keys.get("", "").lower()
    return ""


def _list_thread_names(folder: Path) -> Iterator[tuple[int, str]]:
    with suppress(OSError):
        for entry in (folder / "task").iterdir():
            with suppress(OSError, ValueError):  # the thread ended after it was listed
                yield int(entry.name), (entry / "comm").read_text("utf-8", "replace").rstrip("\n")
