"""Check that this user may read a VM's process, and connect to its QMP monitor."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path

from phasewatch.errors import MachineError, VmError
from phasewatch.live.discover import RunningVm
from phasewatch.live.monitor_endpoints import explain_no_usable_monitor
from phasewatch.telemetry.process import PROC_ROOT, owns_threads, read_start_ticks
from phasewatch.telemetry.qmp import QmpMonitor

__all__ = ["connect_monitor", "explain_hidden_io"]


def explain_hidden_io(machine: RunningVm, proc: Path = PROC_ROOT) -> str:
    """Return why this user may not read ``/proc/PID/io`` of a QEMU process, and who may; empty if this user may.

    It has the strictest permission of all files that are read.

    Raises:
        MachineError: If the process is gone.
    """
    folder = proc / str(machine.pid)
    try:
        if read_start_ticks(machine.pid, proc) != machine.start_ticks:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        (folder / "io").read_bytes()
    except PermissionError:
        return _explain_permission(folder)
    except OSError as exc:
        raise MachineError(
            f"--pid {machine.pid}: the process is gone; phasewatch watch --list shows what runs here"
        ) from exc
    return ""


def _explain_permission(folder: Path) -> str:
    """Return a message that names who may read ``io``: root, or the process's user together with its group."""
    own = f"{_find_user_name(os.geteuid())}:{_find_group_name(os.getegid())}"
    try:
        status = (folder / "status").read_text("utf-8", "replace")
        ids = {
            line.split(":")[0]: [int(word) for word in line.split()[1:]]
            for line in status.splitlines()
            if line[:4] in ("Uid:", "Gid:")
        }
        uid, gid = ids["Uid"][0], ids["Gid"][0]
    except (OSError, ValueError, LookupError):
        return f"{folder / 'io'} may not be read by {own}; run phasewatch as root"
    other = f"{_find_user_name(uid)}:{_find_group_name(gid)}"
    if (os.geteuid(), os.getegid()) != (uid, gid):
        return (
            f"{folder / 'io'} may not be read by {own}; the kernel opens it to root and to the user and group that "
            f"QEMU runs as, {other}: run phasewatch as root or as these two (in a systemd unit "
            f"User={_find_user_name(uid)} and Group={_find_group_name(gid)})"
        )
    return (
        f"{folder / 'io'} may not be read by {own} though QEMU runs as the same user and group: it holds capabilities, "
        "or a security module (AppArmor, SELinux) or the kernel's ptrace setting forbids it; run phasewatch as root"
    )


def _find_user_name(uid: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def _find_group_name(gid: int) -> str:
    with suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)


async def connect_monitor(machine: RunningVm, qmp: Path | None, proc: Path = PROC_ROOT) -> QmpMonitor:
    """Connect to the VM's first QMP socket that answers for it.

    Args:
        machine: The VM.
        qmp: The only socket to try; None tries those that the VM listens on.
        proc: Path of /proc.

    Raises:
        VmError: If none can be used; the message is about the first socket tried.
    """
    first_error: VmError | None = None
    for path in (qmp,) if qmp is not None else machine.qmp:
        monitor = QmpMonitor(path)
        try:
            _check_monitor_socket(path)
            await monitor.connect()
            if owns_threads(machine.pid, await monitor.query_vcpu_threads(), proc):
                return monitor
            raise VmError(
                f"{path}: answers for another machine than process {machine.pid}; name the socket of that one"
            )
        except VmError as exc:
            await monitor.close()
            first_error = first_error or exc
        except (KeyError, TypeError, AttributeError):
            await monitor.close()
            first_error = first_error or VmError(f"{path}: this is not a QEMU monitor")
    raise first_error or VmError(explain_no_usable_monitor(machine.monitors))


def _check_monitor_socket(path: Path) -> None:
    """Raise a VmError with a clear message if there is no such socket, or this user may not connect to it."""
    try:
        is_socket = stat.S_ISSOCK(path.stat().st_mode)
    except OSError as exc:
        raise VmError(f"{path}: the monitor did not answer: {exc.strerror or exc}") from exc
    if not is_socket:
        raise VmError(f"{path}: the monitor did not answer: this file is not a socket")
    if not os.access(path, os.W_OK):
        raise VmError(
            f"{path}: the monitor did not answer: {_find_user_name(os.geteuid())} may not connect to this socket, "
            f"which belongs to {_find_user_name(path.stat().st_uid)}; run phasewatch as that user or as root"
        )
