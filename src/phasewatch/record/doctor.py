"""What this machine has of what phasewatch needs, and how to get the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from phasewatch.errors import MachineError, MissingTool
from phasewatch.record.accel import BOOT_DEADLINE_S, Verdict, kernel_boots_on_kvm, known_verdict
from phasewatch.record.installed import OLDEST_QEMU, parse_qemu_version, qemu_version
from phasewatch.user_folders import cache_folder

FREE_GIB = 5  # images, a corpus of recordings, a full run
MEMORY_GIB = 3.0  # two VMs and the recorder
CORES = 2
EVERYTHING = "all"  # needed for: without it nothing works


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked for.

    Attributes:
        name: What.
        ok: Whether it is there, and good enough.
        found: What was found, in a few words.
        remedy: What to do; empty if nothing.
        needed_for: What does not work without it.
    """

    name: str
    ok: bool
    found: str
    remedy: str
    needed_for: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts that the checks rest on; `read_facts` gives this machine's."""

    python: tuple[int, int]
    cores: int
    memory_gib: float
    disk_gib: float
    kvm: Verdict
    programs: Mapping[str, str | None]
    packages: Mapping[str, str | None]


# Program → package of Debian, what for.
PROGRAMS: tuple[tuple[str, str, str], ...] = (
    ("qemu-system-x86_64", "qemu-system-x86", "record"),
    ("qemu-system-aarch64", "qemu-system-arm", "record on aarch64 hosts"),
    ("qemu-img", "qemu-utils", "record"),
    ("busybox", "busybox-static", "record: the guest image"),
    ("cpio", "cpio", "record: the guest image"),
    ("mke2fs", "e2fsprogs", "record: the data disk"),
    ("gcc", "gcc", "record: the guest agent"),
    ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu", "record on aarch64 hosts"),
    ("chromium", "chromium", "tests of report and dashboard"),
)

# Distribution → extra, what for.
PACKAGES: tuple[tuple[str, str, str], ...] = (
    ("torch", "train", "train the networks"),
    ("xgboost", "train", "train gbt"),
    ("scikit-learn", "train", "train the linear models"),
    ("onnxruntime", "live", "watch with an exported model"),
    ("qemu.qmp", "live", "record, watch"),
    ("starlette", "serve", "dashboard, receive"),
)


def examine(facts: Facts | None = None) -> tuple[Check, ...]:
    """Look at everything once; nothing is started but programs that tell their version.

    Args:
        facts: What to judge; this machine's if absent.
    """
    facts = facts or read_facts()
    checks = [
        _at_least("python", facts.python, (3, 11), ".".join(map(str, facts.python)), "install Python 3.11", EVERYTHING),
        _at_least(
            "cores", facts.cores, CORES, str(facts.cores),
            f"with fewer than {CORES} cores record one VM at a time", "record pairs",
        ),
        _at_least(
            "memory", facts.memory_gib, MEMORY_GIB, f"{facts.memory_gib:.1f} GiB free",
            f"free {MEMORY_GIB:g} GiB", "record, train",
        ),
        _at_least(
            "disk", facts.disk_gib, FREE_GIB, f"{facts.disk_gib:.0f} GiB free here", f"free {FREE_GIB} GiB", EVERYTHING,
        ),
    ]  # fmt: skip
    for program, package, purpose in PROGRAMS:
        found = facts.programs.get(program)
        remedy = f"apt-get install --no-install-recommends {package}"
        if program.startswith("qemu-system") and found and parse_qemu_version(found)[1] < OLDEST_QEMU:
            least = ".".join(map(str, OLDEST_QEMU))
            checks.append(Check(name=program, ok=False, found=found, remedy=f"{least} or newer", needed_for=purpose))
            continue
        checks.append(_present(program, found, remedy, purpose))
    works = facts.kvm.accel == "kvm"
    slower = "" if works else "without it guests run under TCG, about ten times slower"
    checks.append(
        Check(name="kvm", ok=works, found=facts.kvm.why, remedy=slower, needed_for="recording hosts of their own kind")
    )
    for package, extra, purpose in PACKAGES:
        remedy = f"pip install 'phasewatch[{extra}]'"
        checks.append(_present(package, facts.packages.get(package), remedy, purpose))
    return tuple(checks)


def is_broken(checks: Iterable[Check]) -> bool:
    """Whether something is missing without which nothing works; an extra or a program is needed for its own task alone."""
    return any(not check.ok and check.needed_for == EVERYTHING for check in checks)


def read_facts() -> Facts:
    """Read this machine's facts."""
    return Facts(
        python=sys.version_info[:2],
        cores=len(os.sched_getaffinity(0)),
        memory_gib=_memory_gib(_text("/proc/meminfo")),
        disk_gib=shutil.disk_usage(Path.cwd()).free / 2**30,
        kvm=find_kvm(),
        programs={program: _program(program) for program, _, _ in PROGRAMS},
        packages={package: _package(package) for package, _, _ in PACKAGES},
    )


def find_kvm() -> Verdict:
    """Return whether a kernel boots on KVM here: as a recording found out, else by booting this machine's own kernel."""
    arch = platform.machine()
    try:
        qemu = qemu_version(arch)
    except MissingTool:
        return Verdict(accel="tcg", why=f"not tried: qemu-system-{arch} is not here")
    try:
        cache: Path | None = cache_folder()
    except MachineError:
        cache = None
    known = known_verdict(arch=arch, cache=cache, qemu_version=qemu)
    if known is not None:
        return known
    kernel = Path(f"/boot/vmlinuz-{platform.release()}")
    if not os.access(kernel, os.R_OK):
        return Verdict(
            accel="tcg", why=f"not proved: {kernel} cannot be read; the first recording boots a kernel on it"
        )
    if kernel_boots_on_kvm(kernel, arch):
        return Verdict(accel="kvm", why="this machine's kernel booted on it")
    return Verdict(accel="tcg", why=f"{kernel} did not boot on it within {BOOT_DEADLINE_S:g} s")


def _at_least(name: str, value: object, least: object, found: str, remedy: str, purpose: str) -> Check:
    ok = bool(value >= least)  # type: ignore[operator]
    return Check(name=name, ok=ok, found=found, remedy="" if ok else remedy, needed_for=purpose)


def _present(name: str, found: str | None, remedy: str, purpose: str) -> Check:
    there = found is not None
    return Check(name=name, ok=there, found=found or "not found", remedy="" if there else remedy, needed_for=purpose)


def _memory_gib(meminfo: str) -> float:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(match[1]) / 2**20 if match else 0.0


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _program(program: str) -> str | None:
    """Give a program's version, its path where it has none to tell, or None if it is not there or does not run."""
    # mke2fs and busybox may stand where only root looks.
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        return None
    if program == "busybox":
        return None if _is_dynamic(Path(path)) else path
    if not program.startswith(("qemu", "gcc", "aarch64")):
        return path
    return _first_line([path, "--version"])


def _is_dynamic(path: Path) -> bool:
    """Say whether an ELF file names an interpreter: such a busybox finds no libc in the guest."""
    with path.open("rb") as file:
        head = file.read(4096)
    return any(loader in head for loader in (b"ld-linux", b"ld-musl"))


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return "".join(c for c in done.stdout.partition("\n")[0] if " " <= c <= "~")[:100]


def _package(name: str) -> str | None:
    """Give an installed distribution's version without importing it."""
    for spelling in (name, f"{name}-cpu"):
        try:
            return importlib.metadata.version(spelling)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
