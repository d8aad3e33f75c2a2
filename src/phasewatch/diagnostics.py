"""What this machine has of what phasewatch needs, and how to get the rest."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from phasewatch._version import __version__
from phasewatch.errors import MachineError, MissingToolError
from phasewatch.lab.host import (
    KVM_BOOT_DEADLINE_S,
    MIN_QEMU_VERSION,
    AcceleratorChoice,
    find_known_accelerator,
    kernel_boots_on_kvm,
    parse_qemu_version,
    read_qemu_version,
)
from phasewatch.user_folders import cache_folder

MIN_FREE_GIB = 5  # images, a corpus of recordings, a full run
MIN_MEMORY_GIB = 3.0  # two VMs and the recorder
MIN_CORES = 2
NEEDED_FOR_ALL = "all"  # needed for: without it nothing works


@dataclass(frozen=True, slots=True, kw_only=True)
class RequirementCheck:
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
class SystemFacts:
    """The facts that the checks rest on; `_read_system_facts` gives this machine's."""

    python: tuple[int, int]
    cores: int
    memory_gib: float
    disk_gib: float
    kvm: AcceleratorChoice
    programs: Mapping[str, str | None]
    packages: Mapping[str, str | None]


# Program → package of Debian, what for.
REQUIRED_PROGRAMS: tuple[tuple[str, str, str], ...] = (
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
OPTIONAL_PACKAGES: tuple[tuple[str, str, str], ...] = (
    ("torch", "train", "train the networks"),
    ("xgboost", "train", "train gbt"),
    ("scikit-learn", "train", "train the linear models"),
    ("onnxruntime", "live", "watch with an exported model"),
    ("qemu.qmp", "live", "record, watch"),
    ("starlette", "serve", "dashboard, receive"),
)


def inspect_system(facts: SystemFacts | None = None) -> tuple[RequirementCheck, ...]:
    """Look at everything once; nothing is started but programs that tell their version.

    Args:
        facts: What to judge; this machine's if absent.
    """
    facts = facts or _read_system_facts()
    checks = [
        _check_minimum("python", facts.python, (3, 11), ".".join(map(str, facts.python)), "install Python 3.11", NEEDED_FOR_ALL),
        _check_minimum(
            "cores", facts.cores, MIN_CORES, str(facts.cores),
            f"with fewer than {MIN_CORES} cores record one VM at a time", "record pairs",
        ),
        _check_minimum(
            "memory", facts.memory_gib, MIN_MEMORY_GIB, f"{facts.memory_gib:.1f} GiB free",
            f"free {MIN_MEMORY_GIB:g} GiB", "record, train",
        ),
        _check_minimum(
            "disk", facts.disk_gib, MIN_FREE_GIB, f"{facts.disk_gib:.0f} GiB free here", f"free {MIN_FREE_GIB} GiB", NEEDED_FOR_ALL,
        ),
    ]  # fmt: skip
    for program, package, purpose in REQUIRED_PROGRAMS:
        found = facts.programs.get(program)
        remedy = f"apt-get install --no-install-recommends {package}"
        if program.startswith("qemu-system") and found and parse_qemu_version(found)[1] < MIN_QEMU_VERSION:
            least = ".".join(map(str, MIN_QEMU_VERSION))
            checks.append(
                RequirementCheck(name=program, ok=False, found=found, remedy=f"{least} or newer", needed_for=purpose)
            )
            continue
        checks.append(_check_presence(program, found, remedy, purpose))
    works = facts.kvm.accel == "kvm"
    slower = "" if works else "without it guests run under TCG, about ten times slower"
    checks.append(
        RequirementCheck(
            name="kvm", ok=works, found=facts.kvm.why, remedy=slower, needed_for="recording hosts of their own kind"
        )
    )
    for package, extra, purpose in OPTIONAL_PACKAGES:
        remedy = f"pip install 'phasewatch[{extra}]'"
        checks.append(_check_presence(package, facts.packages.get(package), remedy, purpose))
    return tuple(checks)


def has_blocking_problem(checks: Iterable[RequirementCheck]) -> bool:
    """Whether something is missing without which nothing works; an extra or a program is needed for its own task alone."""
    return any(not check.ok and check.needed_for == NEEDED_FOR_ALL for check in checks)


def _read_system_facts() -> SystemFacts:
    """Read this machine's facts."""
    return SystemFacts(
        python=sys.version_info[:2],
        cores=len(os.sched_getaffinity(0)),
        memory_gib=_parse_memory_gib(_read_text("/proc/meminfo")),
        disk_gib=shutil.disk_usage(Path.cwd()).free / 2**30,
        kvm=find_kvm(),
        programs={program: _read_program_version(program) for program, _, _ in REQUIRED_PROGRAMS},
        packages={package: _read_package_version(package) for package, _, _ in OPTIONAL_PACKAGES},
    )


def find_kvm() -> AcceleratorChoice:
    """Return whether a kernel boots on KVM here: as a recording found out, else by booting this machine's own kernel."""
    arch = platform.machine()
    try:
        qemu = read_qemu_version(arch)
    except MissingToolError:
        return AcceleratorChoice(accel="tcg", why=f"not tried: qemu-system-{arch} is not here")
    try:
        cache: Path | None = cache_folder()
    except MachineError:
        cache = None
    known = find_known_accelerator(arch=arch, cache=cache, qemu_version=qemu)
    if known is not None:
        return known
    kernel = Path(f"/boot/vmlinuz-{platform.release()}")
    if not os.access(kernel, os.R_OK):
        return AcceleratorChoice(
            accel="tcg", why=f"not proved: {kernel} cannot be read; the first recording boots a kernel on it"
        )
    if kernel_boots_on_kvm(kernel, arch):
        return AcceleratorChoice(accel="kvm", why="this machine's kernel booted on it")
    return AcceleratorChoice(accel="tcg", why=f"{kernel} did not boot on it within {KVM_BOOT_DEADLINE_S:g} s")


def _check_minimum(name: str, value: object, least: object, found: str, remedy: str, purpose: str) -> RequirementCheck:
    ok = bool(value >= least)  # type: ignore[operator]
    return RequirementCheck(name=name, ok=ok, found=found, remedy="" if ok else remedy, needed_for=purpose)


def _check_presence(name: str, found: str | None, remedy: str, purpose: str) -> RequirementCheck:
    there = found is not None
    return RequirementCheck(
        name=name, ok=there, found=found or "not found", remedy="" if there else remedy, needed_for=purpose
    )


def _parse_memory_gib(meminfo: str) -> float:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(match[1]) / 2**20 if match else 0.0


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _read_program_version(program: str) -> str | None:
    """Give a program's version, its path where it has none to tell, or None if it is not there or does not run."""
    # mke2fs and busybox may stand where only root looks.
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        return None
    if program == "busybox":
        return None if _is_dynamically_linked(Path(path)) else path
    if not program.startswith(("qemu", "gcc", "aarch64")):
        return path
    return _read_version_line([path, "--version"])


def _is_dynamically_linked(path: Path) -> bool:
    """Say whether an ELF file names an interpreter: such a busybox finds no libc in the guest."""
    with path.open("rb") as file:
        head = file.read(4096)
    return any(loader in head for loader in (b"ld-linux", b"ld-musl"))


def _read_version_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return "".join(c for c in done.stdout.partition("\n")[0] if " " <= c <= "~")[:100]


def _read_package_version(name: str) -> str | None:
    """Give an installed distribution's version without importing it."""
    for spelling in (name, f"{name}-cpu"):
        try:
            return importlib.metadata.version(spelling)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


# Modules that are not called like the distribution they come in.
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "xgboost": "xgboost-cpu", "qemu": "qemu.qmp"}
_REQUIREMENT = re.compile(r"""^([A-Za-z0-9][A-Za-z0-9._-]*)(\[[^]]*\])?[^;]*(?:;.*?extra\s*==\s*['"]([^'"]+)['"])?""")
_OTHER_SYSTEM = re.compile(r"""platform_system == ['"]Darwin['"]""")  # a requirement for another system than this one
_REPORTED_VARIABLES = ("PHASEWATCH_CORPUS", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "PYTHONPATH")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageInfo:
    """A distribution that phasewatch asks for; ``version`` is None where it is not installed, ``extra`` "" for the core."""

    name: str
    extra: str
    version: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallationInfo:
    """What a bug report needs to know of an installation; no host name, no user name, no path of a home.

    Attributes:
        place: ``a checkout`` (runs from source) or ``installed``.
        python, system, machine: Version and implementation, operating system and kernel, architecture and processor.
        packages: All that phasewatch asks for, core first, in the order of the extras.
        settings: Environment variables that change what phasewatch does; only those that are set.
    """

    version: str
    place: str
    python: str
    system: str
    machine: str
    packages: tuple[PackageInfo, ...]
    settings: Mapping[str, str]

    @property
    def extras(self) -> dict[str, str]:
        """Give each extra's state: ``installed``, or ``lacks`` and what."""
        found: dict[str, list[str]] = {}
        for package in self.packages:
            if package.extra:
                found.setdefault(package.extra, []).extend([] if package.version else [package.name])
        return {extra: f"lacks {', '.join(names)}" if names else "installed" for extra, names in found.items()}


def describe_installation() -> InstallationInfo:
    """Describe this installation; nothing is imported for it."""
    return InstallationInfo(
        version=__version__,
        place="a checkout" if _is_checkout() else "installed",
        python=f"{platform.python_version()} ({platform.python_implementation()}, {_describe_environment()})",
        system=f"{_read_distribution()}, {platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}".rstrip(", "),
        machine=f"{platform.machine()}, {_read_processor()}, {len(os.sched_getaffinity(0))} cores",
        packages=tuple(
            PackageInfo(name=name, extra=extra, version=_find_version(name)) for name, extra in _read_requirements()
        ),
        settings={name: hide_home(os.environ[name]) for name in _REPORTED_VARIABLES if name in os.environ},
    )  # fmt: skip


def find_extra(module: str) -> str | None:
    """Say which extra brings a module; None for one that no extra names.

    >>> extra_of("torch.nn")
    'train'
    """
    root = module.partition(".")[0]
    wanted = _normalise_name(_DISTRIBUTIONS.get(root, root))
    return next((extra for name, extra in _read_requirements() if extra and _normalise_name(name) == wanted), None)


def _find_version(name: str) -> str | None:
    """Give an installed distribution's version without importing it."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def hide_home(text: str) -> str:
    """Put ``~`` for the user's home, whose name is nobody's business in a bug report."""
    home = os.path.expanduser("~")  # noqa: PTH111  text, not a path
    return text.replace(home, "~") if len(home) > 1 else text


def _read_requirements() -> list[tuple[str, str]]:
    """Read (distribution, extra) from phasewatch's own metadata: pyproject.toml stays the one source."""
    with suppress(metadata.PackageNotFoundError):
        lines = [line for line in metadata.requires("phasewatch") or [] if _OTHER_SYSTEM.search(line) is None]
        found = [match for line in lines if (match := _REQUIREMENT.match(line))]
        return [(match[1], match[3] or "") for match in found]
    return []


def _normalise_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_checkout() -> bool:
    """Say whether the code runs from where it is written, by its place or by what the installer noted."""
    with suppress(metadata.PackageNotFoundError):
        noted = metadata.distribution("phasewatch").read_text("direct_url.json")
        if noted and json.loads(noted).get("dir_info", {}).get("editable"):
            return True
    return (Path(__file__).resolve().parents[2] / "pyproject.toml").is_file()


def _describe_environment() -> str:
    return "a virtual environment" if sys.prefix != sys.base_prefix else "the system's"


def _read_distribution() -> str:
    with suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    return ""


def _read_processor() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return "a processor that /proc/cpuinfo does not name"
