"""Whether KVM really works here: a kernel must boot on it. Everything less was seen to say yes where it does not.

On a host with `kvm_pvm` the device opens, the API version is right, a vCPU is made, even a real-mode guest runs; a
Linux kernel then writes not one byte in 15 s. The verdict is cached by host kernel and QEMU version.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from phasewatch.errors import MissingToolError
from phasewatch.lab.guest_image import GuestImage
from phasewatch.lab.process import die_with_parent
from phasewatch.telemetry.base import AsyncClock

KVM_BOOT_DEADLINE_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorChoice:
    """Which accelerator to use (``kvm`` or ``tcg``), and what that rests on."""

    accel: str
    why: str


def find_kvm_obstacle(cpuinfo: str, modules: frozenset[str], *, device: bool, arch: str, host_arch: str) -> str | None:
    """Say why KVM cannot work, from facts that cost nothing; None if only a boot can tell."""
    if arch != host_arch:
        return f"the guest is {arch}, the host {host_arch}"
    if not device:
        return "/dev/kvm is not there, or not ours to open"
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
    """Decide between KVM and TCG for guests of `arch`.

    Args:
        arch: ``x86_64`` or ``aarch64``.
        files: Gives the image that is booted for the proof, where one is needed; it must power off when run with
            busybox as init.
        cache: Folder that keeps the verdict.
        qemu_version: Part of the verdict's key.
        boots: Does the boot; a test hands in its own.
    """
    known = find_known_accelerator(arch=arch, cache=cache, qemu_version=qemu_version)
    if known is not None:
        return known
    works = (boots or boots_on_kvm)(files(), arch)
    verdict = (
        AcceleratorChoice(accel="kvm", why="a kernel booted on it")
        if works
        else AcceleratorChoice(accel="tcg", why=f"no kernel booted on KVM within {KVM_BOOT_DEADLINE_S:g} s")
    )
    cache.mkdir(parents=True, exist_ok=True)
    _build_cache_path(cache, arch, qemu_version).write_bytes(msgspec.json.encode(verdict))
    return verdict


def find_known_accelerator(*, arch: str, cache: Path | None, qemu_version: str) -> AcceleratorChoice | None:
    """Return the verdict if it is known without a boot: because KVM cannot work, or because a recording has tried it."""
    no = find_kvm_obstacle(
        Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"),
        frozenset(path.name for path in Path("/sys/module").glob("kvm*")),
        device=os.access("/dev/kvm", os.R_OK | os.W_OK),
        arch=arch,
        host_arch=platform.machine(),
    )
    if no is not None:
        return AcceleratorChoice(accel="tcg", why=no)
    if cache is None:
        return None
    try:
        return msgspec.json.decode(_build_cache_path(cache, arch, qemu_version).read_bytes(), type=AcceleratorChoice)
    except (OSError, msgspec.MsgspecError):
        return None


def _build_cache_path(cache: Path, arch: str, qemu_version: str) -> Path:
    return cache / f"kvm-{arch}-{platform.release()}-{qemu_version}.json"


def boots_on_kvm(image: GuestImage, arch: str) -> bool:
    """Boot a kernel on KVM whose init powers off at once; True if it said something and ended well in time."""
    return image.kernel is not None and kernel_boots_on_kvm(image.kernel, arch, initrd=image.initrd)


def kernel_boots_on_kvm(kernel: Path, arch: str, *, initrd: Path | None = None) -> bool:
    """Boot a kernel on KVM; True if it wrote something and ended in time, with its init or by a panic without one."""
    machine = ["-machine", "virt,gic-version=host"] if arch == "aarch64" else ["-machine", "pc"]
    console = "ttyAMA0" if arch == "aarch64" else "ttyS0"
    with tempfile.TemporaryDirectory(prefix="phasewatch-kvm-") as folder:
        serial = Path(folder, "console")
        command = [
            f"qemu-system-{arch}", *machine, "-accel", "kvm", "-cpu", "host", "-m", "192", "-nodefaults",
            "-display", "none", "-no-reboot", "-serial", f"file:{serial}", "-kernel", str(kernel),
            *(["-initrd", str(initrd)] if initrd else []),
            "-append", f"console={console} panic=-1 rdinit=/bin/busybox -- poweroff -f",
        ]  # fmt: skip
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
    """Read the version from what ``qemu-system-… --version`` prints: as text, and as numbers; empty if there is none.

    >>> parse_qemu_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)")
    ('7.2.22', (7, 2, 22))
    """
    match = re.search(r"version (\d+(?:\.\d+)+)", text)
    return (match[1], tuple(int(part) for part in match[1].split("."))) if match else ("", ())


def read_qemu_version(arch: str) -> str:
    """Give the version of the installed QEMU.

    Raises:
        MissingTool: If there is none, or it is too old.
    """
    program = f"qemu-system-{arch}"
    package = "qemu-system-x86" if arch == "x86_64" else "qemu-system-arm"
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as exc:
        raise MissingToolError(f"{program} does not run ({exc}); install it: apt-get install {package}") from exc
    text, numbers = parse_qemu_version(said)
    if numbers < MIN_QEMU_VERSION:
        least = ".".join(map(str, MIN_QEMU_VERSION))
        raise MissingToolError(
            f"{program} is of version {text or 'unknown'}; {least} or newer is needed (for its `-netdev dgram`): "
            f"install a newer {package}, for instance from your distribution's backports"
        )
    return text


def parse_processor_name(cpuinfo: str, tsc_khz: int | None) -> str:
    """Name a processor from the text of ``/proc/cpuinfo``, family and model in numbers, since clouds hide the rest.

    Args:
        tsc_khz: Rate of its time stamp counter; None where it has none.

    Returns:
        At most 80 printable ASCII characters; empty if the text names no processor.

    >>> parse_processor("cpu family\\t: 23\\nmodel\\t\\t: 1\\nmodel name\\t: AMD EPYC\\n", 1_996_250)
    'AMD EPYC (family 23, model 1) at 1996 MHz'
    """
    said = dict(re.findall(r"^(cpu family|model|model name)\s*: (.+)$", cpuinfo, re.MULTILINE))
    if "model name" not in said:
        return ""
    which = f" (family {said['cpu family']}, model {said['model']})" if {"cpu family", "model"} <= said.keys() else ""
    rate = f" at {tsc_khz // 1000} MHz" if tsc_khz else ""
    return re.sub(r"[^ -~]", "?", f"{said['model name'][:40]}{which}{rate}")[:80]


def read_processor_name(tsc_khz: int | None) -> str:
    """Name this machine's processor, or at least its architecture."""
    return (
        parse_processor_name(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"), tsc_khz)
        or platform.machine()
    )


MAX_IDLE_LOAD_CORES = 0.3
IDLE_CHECK_S = 3.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuUsage:
    """CPU seconds spent so far: by the whole machine without low-priority work, and by this process and its children."""

    machine_s: float
    own_s: float


def parse_busy_cpu_s(text: str) -> float:
    """Read the busy CPU seconds of all cores from /proc/stat.

    Work at low priority (`nice`) is left out: it yields. So are `guest` times, which user time holds already.
    """
    for line in text.splitlines():
        if line.startswith("cpu "):
            user, _nice, system, _idle, _iowait, irq, softirq, steal = (int(part) for part in line.split()[1:9])
            return (user + system + irq + softirq + steal) / _TICKS_PER_S
    raise ValueError("/proc/stat has no line `cpu`")


def _read_cpu_usage() -> CpuUsage:
    """Read what was spent so far."""
    own = os.times()
    return CpuUsage(
        machine_s=parse_busy_cpu_s(Path("/proc/stat").read_text(encoding="utf-8")),
        own_s=own.user + own.system + own.children_user + own.children_system,
    )


async def wait_until_idle(
    clock: AsyncClock,
    *,
    at_most_s: float,
    read: Callable[[], CpuUsage] = _read_cpu_usage,
    on_busy: Callable[[float], None] = lambda load: None,
) -> float:
    """Wait until the others keep fewer than `MAX_IDLE_LOAD_CORES` cores busy for `IDLE_CHECK_S`, or `at_most_s` has passed.

    Args:
        clock: The host's.
        at_most_s: How long.
        read: Gives what the machine and we have spent.
        on_busy: Hears the load once, when there is something to wait for.

    Returns:
        The last load that was seen, in cores; `MAX_IDLE_LOAD_CORES` or more if patience ran out.
    """
    give_up_ns = clock.mono_ns() + round(at_most_s * 1e9)
    told = False
    while True:
        before, began_ns = read(), clock.mono_ns()
        await clock.sleep_until(began_ns + round(IDLE_CHECK_S * 1e9))
        after, ended_ns = read(), clock.mono_ns()
        spent_s = after.machine_s - before.machine_s - (after.own_s - before.own_s)
        load = max(0.0, spent_s / ((ended_ns - began_ns) / 1e9))
        if load < MAX_IDLE_LOAD_CORES or clock.mono_ns() >= give_up_ns:
            return load
        if not told:
            told = True
            on_busy(load)
