"""Limit the CPU time of a VM with a cgroup, version 1 or 2, and read back how long the limit stopped it.

A group belongs to one VM of one recorder. Its name has the recorder's process id and start time, so that a later
recorder can remove the groups of a dead one.

Source: the kernel's documentation, scheduler/sched-bwc (version 1) and admin-guide/cgroup-v2 (version 2).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from phasewatch.errors import CgroupError

__all__ = ["PERIOD_US", "CpuController", "CpuGroup", "find_cpu_controllers", "open_cpu_controller", "sweep_dead_groups"]

PERIOD_US = 100_000  # the kernel's default, and that of libvirt and Docker
_MIN_QUOTA_US = 1_000  # the kernel refuses less
_PREFIX = "phasewatch-"
_NAME_PATTERN = re.compile(rf"{_PREFIX}(\d+)\.(\d+)\.\d+")  # process id, start time in ticks, number
_REMOVE_TRIES = 40
_REMOVE_PAUSE_S = 0.05  # a group stays busy for a moment after its last process has ended
_UNLIMITED = {1: "-1", 2: f"max {PERIOD_US}"}
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupFolders:
    """Makes and removes the folder of a group; the kernel fills it with files. Tests pass a fake."""

    make: Callable[[Path], None] = Path.mkdir
    remove: Callable[[Path], None] = Path.rmdir


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuController:
    """A folder in which groups with a CPU quota may be made.

    Attributes:
        version: Version of the cgroup interface.
        folder: Parent folder of the groups.
        folders: Makes and removes the folders of groups.
    """

    version: Literal[1, 2]
    folder: Path
    folders: CgroupFolders = CgroupFolders()

    def create_group(self, number: int, *, proc: Path = _PROC) -> CpuGroup:
        """Create an empty group without a limit.

        Args:
            number: Number of the group, unique in this process.
            proc: Where ``/proc`` is.

        Raises:
            CgroupError: If the group cannot be made.
        """
        folder = self.folder / f"{_PREFIX}{_read_owner(proc / 'self')}.{number}"
        try:
            self.folders.make(folder)
        except OSError as exc:
            raise CgroupError(_describe_refusal(self.folder, exc)) from exc
        group = CpuGroup(version=self.version, folder=folder, folders=self.folders)
        if not group.quota_file.exists():  # version 2 without the controller in the parent
            group.remove()
            raise CgroupError(f"{self.folder}: groups here have no CPU quota; enable the cpu controller for them")
        return group


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuGroup:
    """The group of one VM."""

    version: Literal[1, 2]
    folder: Path
    folders: CgroupFolders = CgroupFolders()

    @property
    def members_file(self) -> Path:
        """File that takes a process id; ``0`` is the process that writes."""
        return self.folder / "cgroup.procs"

    @property
    def quota_file(self) -> Path:
        """File of the quota."""
        return self.folder / ("cpu.cfs_quota_us" if self.version == 1 else "cpu.max")

    def limit(self, quota_cores: float) -> None:
        """Limit the CPU time of all processes in the group together, and check that the kernel took it.

        Args:
            quota_cores: Cores; 0 removes the limit.

        Raises:
            CgroupError: If the kernel refuses the quota.
        """
        quota_us = max(_MIN_QUOTA_US, round(quota_cores * PERIOD_US))
        try:
            if self.version == 1:
                (self.folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                wanted = str(quota_us) if quota_cores else _UNLIMITED[1]
            else:
                wanted = f"{quota_us} {PERIOD_US}" if quota_cores else _UNLIMITED[2]
            self.quota_file.write_text(wanted)
            taken = self.quota_file.read_text().strip()
        except OSError as exc:
            raise CgroupError(f"{self.quota_file}: a quota of {quota_cores:g} cores: {exc.strerror}") from exc
        if taken != wanted:
            raise CgroupError(f"{self.quota_file}: wrote {wanted!r}, but it holds {taken!r}")

    def read_throttled_s(self) -> float:
        """Return the seconds that the quota kept processes of the group from running, summed over the cores.

        Raises:
            CgroupError: If the group is gone or its file has no such counter.
        """
        key, unit = ("throttled_time", 1e9) if self.version == 1 else ("throttled_usec", 1e6)
        path = self.folder / "cpu.stat"
        try:
            counters = dict(line.split() for line in path.read_text().splitlines())
            return int(counters[key]) / unit
        except (OSError, ValueError, KeyError) as exc:
            raise CgroupError(f"{path}: expected a line `{key} NUMBER`: {exc}") from exc

    def remove(self) -> None:
        """Remove the group, which must hold no process any more. A group that stays busy is left to a later sweep."""
        for _ in range(_REMOVE_TRIES):
            try:
                self.folders.remove(self.folder)
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(_REMOVE_PAUSE_S)
            else:
                return


def find_cpu_controllers(mounts: str, membership: str) -> tuple[CpuController, ...]:
    """Return the folders in which a process may be able to make groups, the best first.

    Version 1 has one: the group of the process. In version 2 a group with processes cannot have limited groups below
    it, so each group above it, up to the root, is possible too.

    Args:
        mounts: Content of ``/proc/self/mounts``.
        membership: Content of ``/proc/self/cgroup``.
    """
    own = {}  # controllers, empty for version 2 → path of the process's group
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path
    found = []
    for line in mounts.splitlines():
        _, folder, kind, options = line.split()[:4]
        mount = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), folder))  # `\040` is a space
        if kind == "cgroup" and "cpu" in options.split(","):
            path = next((path for names, path in own.items() if "cpu" in names.split(",")), "/")
            found.append(CpuController(version=1, folder=mount / path.lstrip("/")))
        elif kind == "cgroup2":
            group = mount / own.get("", "/").lstrip("/")
            found += [
                CpuController(version=2, folder=each) for each in (group, *group.parents) if _is_within(each, mount)
            ]
    return tuple(sorted(found, key=lambda each: each.version))


def _is_within(folder: Path, mount: Path) -> bool:
    return folder == mount or mount in folder.parents


def open_cpu_controller(*, proc: Path = _PROC, folders: CgroupFolders = CgroupFolders()) -> CpuController:
    """Return a folder in which this process may make groups with a CPU quota, and sweep it.

    A group is made and removed there as a test. A folder where the controller is enabled already is preferred.

    Args:
        proc: Where ``/proc`` is.
        folders: Makes and removes the folders of groups.

    Raises:
        CgroupError: If there is none; the message has the reason of each folder and the remedy.
    """
    try:
        own = proc / "self"
        found = find_cpu_controllers((own / "mounts").read_text(), (own / "cgroup").read_text())
    except (OSError, ValueError) as exc:
        raise CgroupError(f"{proc}: the cgroups of this process cannot be read: {exc}") from exc
    reasons: dict[Path, str] = {}
    for may_enable in (False, True):
        for controller in (replace(each, folders=folders) for each in found):
            try:
                _require_cpu(controller, may_enable=may_enable)
                sweep_dead_groups(controller, proc=proc)
                _try_group(controller, proc)
            except CgroupError as exc:
                reasons[controller.folder] = str(exc)
            else:
                return controller
    detail = "; ".join(reasons.values()) or "no cgroup file system with a cpu controller is mounted"
    raise CgroupError(
        f"no CPU quota can be set ({detail}); record as root, or in a service with Delegate=cpu "
        "(systemd-run --user --scope -p Delegate=cpu …)"
    )


def _try_group(controller: CpuController, proc: Path) -> None:
    group = controller.create_group(0, proc=proc)
    try:
        group.limit(1.0)
        group.read_throttled_s()
    finally:
        group.remove()


def sweep_dead_groups(controller: CpuController, *, proc: Path = _PROC) -> int:
    """Remove the empty groups of recorders that no longer run, and return their number.

    A group that still holds a process stays: the kernel kills a VM with its recorder, so a later sweep finds it empty.
    """
    removed = 0
    for folder in _list_groups(controller):
        match = _NAME_PATTERN.fullmatch(folder.name)
        if match is None or _is_running(proc / match[1], match[2]):
            continue
        with suppress(OSError):
            controller.folders.remove(folder)
            removed += 1
    return removed


def _list_groups(controller: CpuController) -> Iterator[Path]:
    with suppress(OSError):
        yield from sorted(controller.folder.glob(f"{_PREFIX}*"))


def _require_cpu(controller: CpuController, *, may_enable: bool) -> None:
    """Check that groups below a folder of version 2 have the controller; enable it if that is allowed."""
    if controller.version == 1:
        return
    try:
        if "cpu" not in (controller.folder / "cgroup.controllers").read_text().split():
            raise CgroupError(f"{controller.folder}: it has no cpu controller")
        enabled = controller.folder / "cgroup.subtree_control"
        if "cpu" not in enabled.read_text().split():
            if not may_enable:
                raise CgroupError(f"{controller.folder}: the cpu controller is not enabled")
            enabled.write_text("+cpu")
    except OSError as exc:
        raise CgroupError(_describe_refusal(controller.folder, exc)) from exc


def _describe_refusal(folder: Path, error: OSError) -> str:
    return f"{folder}: {error.strerror or error}"


def _read_owner(process: Path) -> str:
    """Return id and start time of a process, a pair that does not come back before the next boot."""
    stat = (process / "stat").read_text(errors="replace")
    return f"{stat.split(' ', 1)[0]}.{_parse_start_ticks(stat)}"


def _parse_start_ticks(stat: str) -> str:
    """Return field 22 of ``/proc/PID/stat``; the name in field 2 may hold spaces and brackets. Source: proc(5)."""
    return stat.rpartition(")")[2].split()[19]


def _is_running(process: Path, start_ticks: str) -> bool:
    try:
        return _parse_start_ticks((process / "stat").read_text(errors="replace")) == start_ticks
    except (OSError, IndexError):
        return False
