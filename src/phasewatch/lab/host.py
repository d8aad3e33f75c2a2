"""Inspect the host of the lab: accelerator, QEMU version, processor and load.

KVM counts as working only if a kernel boots on it, because weaker checks gave false positives: on a host with
`kvm_pvm` the device opens, the API version is right, a vCPU can be created and even a real-mode guest runs, but a Linux
kernel writes no byte in 15 s. The result is cached per host kernel and QEMU version.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phasewatch.errors import MissingToolError
from phasewatch.lab.guest_image import GuestImage
from phasewatch.lab.process import die_with_parent

if TYPE_CHECKING:
    from phasewatch.telemetry.base import AsyncClock

__all__ = [
    "KVM_BOOT_DEADLINE_S",
    "MAX_IDLE_LOAD_CORES",
    "MIN_QEMU_VERSION",
    "AcceleratorChoice",
    "CpuUsage",
    "boots_on_kvm",
    "choose_accelerator",
    "find_known_accelerator",
    "find_kvm_obstacle",
    "kernel_boots_on_kvm",
    "parse_busy_cpu_s",
    "parse_processor_name",
    "parse_qemu_version",
    "read_processor_name",
    "read_qemu_version",
    "wait_until_idle",
]

logger = logging.getLogger(__name__)

KVM_BOOT_DEADLINE_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorChoice:
    """The accelerator to use (``kvm`` or ``tcg``), and the reason for it as text."""

    accel: str
    why: str


def find_kvm_obstacle(cpuinfo: str, modules: frozenset[str], *, device: bool, arch: str, host_arch: str) -> str | None:
    """Return why KVM cannot work, from facts that need no boot; None if only a boot can decide."""
    if arch != host_arch:
        return f"the guest is {arch}, the host {host_arch}"
    if not device:
        return "/dev/kvm does not exist or may not be opened"
    if "kvm_pvm" in modules:
        return "kvm_pvm: the host is itself a guest without hardware virtualisation"
    if host_arch == "x86_64" and not re.search(r"^flags\s*:.*\b(vmx|svm)\b", cpuinfo, re.MULTILINE):
        return "no vmx or svm in /proc/cpuinfo"
    return None


def choose_accelerator(
    *,
    arch: str,
    files: Callable[[], GuestImage],
    cache: Path,
    qemu_version: str,
    boots: Callable[[GuestImage, str], bool] | None = None,
) -> AcceleratorChoice:
    """Choose between KVM and TCG for guests of `arch`.

    Args:
        arch: ``x86_64`` or ``aarch64``.
        files: Returns the image to boot, if a boot is needed. The image must power off with busybox as init.
        cache: Folder that keeps the result.
        qemu_version: Part of the key of the result.
        boots: Boots the image and returns whether it worked; `boots_on_kvm` if None. Tests pass a fake.
    """
    known = find_known_accelerator(arch=arch, cache=cache, qemu_version=qemu_version)
    if known is not None:
        return known
    works = (boots or boots_on_kvm)(files(), arch)
    choice = (
        AcceleratorChoice(accel="kvm", why="a kernel booted on it")
        if works
        else AcceleratorChoice(accel="tcg", why=f"no kernel booted on KVM within {KVM_BOOT_DEADLINE_S:g} s")
    )
    cache.mkdir(parents=True, exist_ok=True)
    _build_cache_path(cache, arch, qemu_version).write_text(json.dumps(asdict(choice)))
    return choice


def find_known_accelerator(*, arch: str, cache: Path | None, qemu_version: str) -> AcceleratorChoice | None:
    """Return the choice if it is known without a boot, else None.

    It is known if KVM cannot work here, or if an earlier recording has tried it.
    """
    obstacle = find_kvm_obstacle(
        Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"),
        frozenset(path.name for path in Path("/sys/module").glob("kvm*")),
        device=os.access("/dev/kvm", os.R_OK | os.W_OK),
        arch=arch,
        host_arch=platform.machine(),
    )
    if obstacle is not None:
        return AcceleratorChoice(accel="tcg", why=obstacle)
    if cache is None:
        return None
    try:  # by the standard library, so that `doctor` works where a package is missing
        stored = json.loads(_build_cache_path(cache, arch, qemu_version).read_bytes())
        choice = AcceleratorChoice(accel=stored["accel"], why=stored["why"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    is_valid = choice.accel in ("kvm", "tcg") and isinstance(choice.why, str)
    return choice if is_valid else None


def _build_cache_path(cache: Path, arch: str, qemu_version: str) -> Path:
    return cache / f"kvm-{arch}-{platform.release()}-{qemu_version}.json"


def boots_on_kvm(image: GuestImage, arch: str) -> bool:
    """Return whether the image's kernel boots on KVM and ends in time; its init powers off at once."""
    return image.kernel is not None and kernel_boots_on_kvm(image.kernel, arch, initrd=image.initrd)


def kernel_boots_on_kvm(kernel: Path, arch: str, *, initrd: Path | None = None) -> bool:
    """Return whether a kernel boots on KVM: it must write to its console and end in time, by its init or by a panic."""
    machine = ["-machine", "virt,gic-version=host"] if arch == "aarch64" else ["-machine", "pc"]
    console = "ttyAMA0" if arch == "aarch64" else "ttyS0"
    with tempfile.TemporaryDirectory(prefix="phasewatch-kvm-") as folder:
        serial = Path(folder, "console")
        command = [f"qemu-system-{arch}", *machine, "-accel", "kvm", "-cpu", "host", "-m", "192", "-nodefaults"]
        command += ["-display", "none", "-no-reboot", "-serial", f"file:{serial}", "-kernel", str(kernel)]
        command += ["-initrd", str(initrd)] if initrd else []
        command += ["-append", f"console={console} panic=-1 rdinit=/bin/busybox -- poweroff -f"]
        try:
            done = subprocess.run(
                command,
                timeout=KVM_BOOT_DEADLINE_S,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                preexec_fn=die_with_parent(),
            )
        except (subprocess.TimeoutExpired, OSError):
            return False
        return done.returncode == 0 and serial.exists() and serial.stat().st_size > 0


MIN_QEMU_VERSION = (7, 2)  # `-netdev dgram` came with it


def parse_qemu_version(text: str) -> tuple[str, tuple[int, ...]]:
    """Parse the output of ``qemu-system-… --version`` into the version as text and as numbers; both empty if absent.

    >>> parse_qemu_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)")
    ('7.2.22', (7, 2, 22))
    """
    match = re.search(r"version (\d+(?:\.\d+)+)", text)
    return (match[1], tuple(int(part) for part in match[1].split("."))) if match else ("", ())


def read_qemu_version(arch: str) -> str:
    """Return the version of the installed QEMU.

    Raises:
        MissingToolError: If QEMU is not installed, or too old.
    """
    program = f"qemu-system-{arch}"
    package = "qemu-system-x86" if arch == "x86_64" else "qemu-system-arm"
    try:
        output = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as exc:
        raise MissingToolError(f"{program} does not run ({exc}); install it: apt-get install {package}") from exc
    text, numbers = parse_qemu_version(output)
    if numbers < MIN_QEMU_VERSION:
        least = ".".join(map(str, MIN_QEMU_VERSION))
        raise MissingToolError(
            f"{program} is of version {text or 'unknown'}; {least} or newer is needed (for its `-netdev dgram`): "
            f"install a newer {package}, for instance from your distribution's backports"
        )
    return text


def parse_processor_name(cpuinfo: str, tsc_khz: int | None) -> str:
    """Return a processor's name from the text of ``/proc/cpuinfo``.

    Family and model are part of it as numbers, because clouds hide the rest.

    Args:
        cpuinfo: Content of ``/proc/cpuinfo``.
        tsc_khz: Rate of its time stamp counter in kHz; None if it has none.

    Returns:
        At most 80 printable ASCII characters; empty if the text names no processor.

    >>> parse_processor_name("cpu family\\t: 23\\nmodel\\t\\t: 1\\nmodel name\\t: AMD EPYC\\n", 1_996_250)
    'AMD EPYC (family 23, model 1) at 1996 MHz'
    """
    fields = dict(re.findall(r"^(cpu family|model|model name)\s*: (.+)$", cpuinfo, re.MULTILINE))
    if "model name" not in fields:
        return ""
    has_model = {"cpu family", "model"} <= fields.keys()
    model = f" (family {fields['cpu family']}, model {fields['model']})" if has_model else ""
    rate = f" at {tsc_khz // 1000} MHz" if tsc_khz else ""
    return re.sub(r"[^ -~]", "?", f"{fields['model name'][:40]}{model}{rate}")[:80]


def read_processor_name(tsc_khz: int | None) -> str:
    """Return the name of this machine's processor, or its architecture if it has no name."""
    return (
        parse_processor_name(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"), tsc_khz)
        or platform.machine()
    )


MAX_IDLE_LOAD_CORES = 0.3
_IDLE_CHECK_S = 3.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuUsage:
    """CPU seconds used so far: by the whole machine without low-priority work, and by this process and its children."""

    machine_s: float
    own_s: float


def parse_busy_cpu_s(text: str) -> float:
    """Parse the content of ``/proc/stat`` into the busy CPU seconds of all cores.

    Low-priority time (`nice`) does not count, because such work yields. `guest` time is already part of user time.

    Raises:
        ValueError: If the text has no line ``cpu``.

    Source: proc_stat(5).
    """
    for line in text.splitlines():
        if line.startswith("cpu "):
            user, _nice, system, _idle, _iowait, irq, softirq, steal = (int(part) for part in line.split()[1:9])
            return (user + system + irq + softirq + steal) / _TICKS_PER_S
    raise ValueError("/proc/stat has no line `cpu`")


def _read_cpu_usage() -> CpuUsage:
    own = os.times()
    return CpuUsage(
        machine_s=parse_busy_cpu_s(Path("/proc/stat").read_text(encoding="utf-8")),
        own_s=own.user + own.system + own.children_user + own.children_system,
    )


async def wait_until_idle(
    clock: AsyncClock,
    *,
    at_most_s: float,
    purpose: str = "recording",
    read: Callable[[], CpuUsage] = _read_cpu_usage,
) -> float:
    """Wait until other processes keep fewer than `MAX_IDLE_LOAD_CORES` cores busy, or `at_most_s` has passed.

    The load is measured over 3 s. If there is something to wait for, the load is logged once.

    Args:
        clock: The clock of the host.
        at_most_s: Longest wait, in seconds.
        purpose: What waits, for the log message.
        read: Returns the CPU usage of the machine and of this process.

    Returns:
        The last measured load, in cores. It is `MAX_IDLE_LOAD_CORES` or more if the wait timed out.
    """
    give_up_ns = clock.mono_ns() + round(at_most_s * 1e9)
    is_logged = False
    while True:
        before, began_ns = read(), clock.mono_ns()
        await clock.sleep_until(began_ns + round(_IDLE_CHECK_S * 1e9))
        after, ended_ns = read(), clock.mono_ns()
        used_s = after.machine_s - before.machine_s - (after.own_s - before.own_s)
        load = max(0.0, used_s / ((ended_ns - began_ns) / 1e9))
        if load < MAX_IDLE_LOAD_CORES or clock.mono_ns() >= give_up_ns:
            return load
        if not is_logged:
            is_logged = True
            logger.info("%s: other work keeps %.1f cores busy; waiting up to %.0f s for it", purpose, load, at_most_s)
