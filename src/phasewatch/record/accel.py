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

from phasewatch.record.image import Image
from phasewatch.record.spawn import die_with_parent

BOOT_DEADLINE_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Which accelerator to use (``kvm`` or ``tcg``), and what that rests on."""

    accel: str
    why: str


def quick_no(cpuinfo: str, modules: frozenset[str], *, device: bool, arch: str, host_arch: str) -> str | None:
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


def probe(
    *,
    arch: str,
    files: Callable[[], Image],
    cache: Path,
    qemu_version: str,
    boots: Callable[[Image, str], bool] | None = None,
) -> Verdict:
    """Decide between KVM and TCG for guests of `arch`.

    Args:
        arch: ``x86_64`` or ``aarch64``.
        files: Gives the image that is booted for the proof, where one is needed; it must power off when run with
            busybox as init.
        cache: Folder that keeps the verdict.
        qemu_version: Part of the verdict's key.
        boots: Does the boot; a test hands in its own.
    """
    known = known_verdict(arch=arch, cache=cache, qemu_version=qemu_version)
    if known is not None:
        return known
    works = (boots or boots_on_kvm)(files(), arch)
    verdict = (
        Verdict(accel="kvm", why="a kernel booted on it")
        if works
        else Verdict(accel="tcg", why=f"no kernel booted on KVM within {BOOT_DEADLINE_S:g} s")
    )
    cache.mkdir(parents=True, exist_ok=True)
    _verdict_file(cache, arch, qemu_version).write_bytes(msgspec.json.encode(verdict))
    return verdict


def known_verdict(*, arch: str, cache: Path | None, qemu_version: str) -> Verdict | None:
    """Return the verdict if it is known without a boot: because KVM cannot work, or because a recording has tried it."""
    no = quick_no(
        Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"),
        frozenset(path.name for path in Path("/sys/module").glob("kvm*")),
        device=os.access("/dev/kvm", os.R_OK | os.W_OK),
        arch=arch,
        host_arch=platform.machine(),
    )
    if no is not None:
        return Verdict(accel="tcg", why=no)
    if cache is None:
        return None
    try:
        return msgspec.json.decode(_verdict_file(cache, arch, qemu_version).read_bytes(), type=Verdict)
    except (OSError, msgspec.MsgspecError):
        return None


def _verdict_file(cache: Path, arch: str, qemu_version: str) -> Path:
    return cache / f"kvm-{arch}-{platform.release()}-{qemu_version}.json"


def boots_on_kvm(image: Image, arch: str) -> bool:
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
                timeout=BOOT_DEADLINE_S,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                preexec_fn=die_with_parent(),
            )
        except (subprocess.TimeoutExpired, OSError):
            return False
        return done.returncode == 0 and serial.exists() and serial.stat().st_size > 0
