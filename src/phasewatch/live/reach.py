"""Whether a VM can be looked into by this user and over which monitor, and the true reason where not."""

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
from phasewatch.live.doors import explain_no_usable_monitor
from phasewatch.telemetry.process import PROC_ROOT, read_start_ticks, translate_threads
from phasewatch.telemetry.qmp import QmpMonitor


def check_permission(machine: RunningVm, proc: Path = PROC_ROOT) -> None:
    """Raise if this user may not read what a QEMU process costs.

    Raises:
        MachineError: Names the user and the group that may, or says that the process is gone.
    """
    folder = proc / str(machine.pid)
    try:
        if read_start_ticks(machine.pid, proc) != machine.start_ticks:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        (folder / "io").read_bytes()
    except PermissionError as exc:
        raise MachineError(f"--pid {machine.pid}: {_explain_permission(folder)}") from exc
    except OSError as exc:
        raise MachineError(
            f"--pid {machine.pid}: the process is gone; phasewatch watch --list shows what runs here"
        ) from exc


def _explain_permission(folder: Path) -> str:
    """Return whom the kernel lets read ``io``: root, or who has the user *and* the group of the process."""
    me = f"{_find_user_name(os.geteuid())}:{_find_group_name(os.getegid())}"
    try:
        owner = (folder / "status").read_text("utf-8", "replace")
        ids = {
            line.split(":")[0]: [int(word) for word in line.split()[1:]]
            for line in owner.splitlines()
            if line[:4] in ("Uid:", "Gid:")
        }
        uid, gid = ids["Uid"][0], ids["Gid"][0]
    except (OSError, ValueError, LookupError):
        return f"{folder / 'io'} may not be read by {me}; run phasewatch as root"
    them = f"{_find_user_name(uid)}:{_find_group_name(gid)}"
    if (os.geteuid(), os.getegid()) != (uid, gid):
        return (
            f"{folder / 'io'} may not be read by {me}; the kernel opens it to root and to the user and group that QEMU "
            f"runs as, {them}: run phasewatch as root or as these two (in a systemd unit User={_find_user_name(uid)} and "
            f"Group={_find_group_name(gid)})"
        )
    return (
        f"{folder / 'io'} may not be read by {me} though QEMU runs as the same user and group: it holds capabilities, or "
        "a security module (AppArmor, SELinux) or the kernel's ptrace setting forbids it; run phasewatch as root"
    )


def _find_user_name(uid: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def _find_group_name(gid: int) -> str:
    with suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)


async def connect_monitor(
    machine: RunningVm, qmp: Path | None, proc: Path = PROC_ROOT
) -> tuple[QmpMonitor | None, str]:
    """Connect to the first monitor that answers; one that the user named must.

    Returns:
        The monitor, or None and why the first one that was tried cannot be used.

    Raises:
        VmError: If the named one does not answer, or answers for another machine.
    """
    reasons: list[str] = []
    for door in (qmp,) if qmp is not None else machine.qmp:
        monitor = QmpMonitor(door)
        try:
            _check_monitor_socket(door)
            await monitor.connect()
            if translate_threads(machine.pid, await monitor.vcpu_tids(), proc) is None:
                raise VmError(
                    f"{door}: answers for another machine than process {machine.pid}; name the socket of that one"
                )
            return monitor, ""
        except (VmError, KeyError, TypeError, AttributeError) as exc:
            await monitor.close()
            words = str(exc) if isinstance(exc, VmError) else f"{door}: this is no QEMU monitor"
            if qmp is not None:
                raise VmError(words) from exc
            reasons.append(words)
    return None, reasons[0] if reasons else explain_no_usable_monitor(machine.monitors)


def _check_monitor_socket(door: Path) -> None:
    """Raise in words for what a connection could only fail at.

    Raises:
        VmError: If there is no such socket, or this user may not connect to it.
    """
    try:
        is_socket = stat.S_ISSOCK(door.stat().st_mode)
    except OSError as exc:
        raise VmError(f"{door}: the monitor did not answer: {exc.strerror or exc}") from exc
    if not is_socket:
        raise VmError(f"{door}: the monitor did not answer: this file is no socket")
    if not os.access(door, os.W_OK):
        raise VmError(
            f"{door}: the monitor did not answer: {_find_user_name(os.geteuid())} may not connect to this socket, which belongs to "
            f"{_find_user_name(door.stat().st_uid)}; run phasewatch as that user or as root"
        )
