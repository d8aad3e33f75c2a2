"""Check the requirements of this machine, and describe the installation.

`inspect_system` checks programs, packages and resources for the command `doctor`. `describe_installation` collects the
facts for a bug report.
"""

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
from dataclasses import dataclass, field
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

__all__ = [
    "OPTIONAL_PACKAGES",
    "REQUIRED_PROGRAMS",
    "InstallationInfo",
    "PackageInfo",
    "RequirementCheck",
    "SystemFacts",
    "describe_installation",
    "find_extra",
    "find_kvm",
    "has_blocking_problem",
    "hide_home",
    "inspect_system",
]

_MIN_FREE_GIB = 5  # images, a corpus of recordings, a full run
_MIN_MEMORY_GIB = 3.0  # two VMs and the recorder
_MIN_CORES = 2
_NEEDED_FOR_ALL = "all"  # value of `needed_for`: without it nothing works


@dataclass(frozen=True, slots=True, kw_only=True)
class RequirementCheck:
    """The result of one check.

    Attributes:
        name: What was checked.
        ok: Whether it is present and sufficient.
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
    """The facts that the checks use.

    Attributes:
        memory_gib: Available memory in GiB.
        disk_gib: Free space of the working folder's disk in GiB.
        kvm: Whether KVM works, with the reason.
        programs: Program → version or path; None if it is missing.
        packages: Distribution of an extra → version; None if it is missing.
        core: Distribution that every command needs → version; None if it is missing.
    """

    python: tuple[int, int]
    cores: int
    memory_gib: float
    disk_gib: float
    kvm: AcceleratorChoice
    programs: Mapping[str, str | None]
    packages: Mapping[str, str | None]
    core: Mapping[str, str | None] = field(default_factory=dict)


# (program, Debian package, needed for)
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

# (distribution, extra, needed for)
OPTIONAL_PACKAGES: tuple[tuple[str, str, str], ...] = (
    ("torch", "train", "train the networks"),
    ("lightgbm", "train", "train gbt"),
    ("scikit-learn", "train", "train the linear models"),
    ("onnxruntime", "live", "watch with an exported model"),
    ("starlette", "serve", "dashboard, receive"),
)


def inspect_system(facts: SystemFacts | None = None) -> tuple[RequirementCheck, ...]:
    """Check all requirements. Programs are started only to read their version, and a kernel only to test KVM.

    Args:
        facts: The facts to check; those of this machine if None.
    """
    facts = facts or _read_system_facts()
    checks = [
        _check_minimum(
            "python",
            facts.python,
            (3, 11),
            ".".join(map(str, facts.python)),
            needed_for=_NEEDED_FOR_ALL,
            remedy="install Python 3.11",
        ),
        _check_minimum(
            "cores",
            (facts.cores,),
            (_MIN_CORES,),
            str(facts.cores),
            needed_for="record pairs",
            remedy=f"with fewer than {_MIN_CORES} cores record one VM at a time",
        ),
        _check_minimum(
            "memory",
            (facts.memory_gib,),
            (_MIN_MEMORY_GIB,),
            f"{facts.memory_gib:.1f} GiB free",
            needed_for="record, train",
            remedy=f"free {_MIN_MEMORY_GIB:g} GiB",
        ),
        _check_minimum(
            "disk",
            (facts.disk_gib,),
            (_MIN_FREE_GIB,),
            f"{facts.disk_gib:.0f} GiB free here",
            needed_for=_NEEDED_FOR_ALL,
            remedy=f"free {_MIN_FREE_GIB} GiB",
        ),
    ]
    for package, version in facts.core.items():
        if version is None:
            checks.append(_check_presence(package, None, f"pip install '{package}'", _NEEDED_FOR_ALL))
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
    """Return whether a check failed without which nothing works. Extras and programs are needed only for their task."""
    return any(not check.ok and check.needed_for == _NEEDED_FOR_ALL for check in checks)


def _read_system_facts() -> SystemFacts:
    return SystemFacts(
        python=sys.version_info[:2],
        cores=len(os.sched_getaffinity(0)),
        memory_gib=_parse_memory_gib(_read_text("/proc/meminfo")),
        disk_gib=shutil.disk_usage(Path.cwd()).free / 2**30,
        kvm=find_kvm(),
        programs={program: _read_program_version(program) for program, _, _ in REQUIRED_PROGRAMS},
        packages={package: _read_package_version(package) for package, _, _ in OPTIONAL_PACKAGES},
        core={name: _find_version(name) for name, extra in _read_requirements() if not extra},
    )


def find_kvm() -> AcceleratorChoice:
    """Return whether a kernel boots on KVM here, by an earlier result or by a boot of this machine's kernel."""
    arch = platform.machine()
    try:
        qemu = read_qemu_version(arch)
    except MissingToolError:
        return AcceleratorChoice(accel="tcg", why=f"not tried: qemu-system-{arch} is not installed")
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
            accel="tcg", why=f"not tested: {kernel} cannot be read; the first recording boots a kernel on KVM"
        )
    if kernel_boots_on_kvm(kernel, arch):
        return AcceleratorChoice(accel="kvm", why="this machine's kernel booted on it")
    return AcceleratorChoice(accel="tcg", why=f"{kernel} did not boot on it within {KVM_BOOT_DEADLINE_S:g} s")


def _check_minimum(
    name: str, value: tuple[float, ...], least: tuple[float, ...], found: str, *, needed_for: str, remedy: str
) -> RequirementCheck:
    """Compare a value, or a version's numbers, with the smallest that suffices."""
    ok = value >= least
    return RequirementCheck(name=name, ok=ok, found=found, remedy="" if ok else remedy, needed_for=needed_for)


def _check_presence(name: str, found: str | None, remedy: str, purpose: str) -> RequirementCheck:
    ok = found is not None
    return RequirementCheck(
        name=name, ok=ok, found=found or "not found", remedy="" if ok else remedy, needed_for=purpose
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
    """Return a program's version, its path if it reports no version, or None if it is missing or does not run."""
    # mke2fs and busybox may be in folders of root's PATH.
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        return None
    if program == "busybox":
        return None if _is_dynamically_linked(Path(path)) else path
    if not program.startswith(("qemu", "gcc", "aarch64")):
        return path
    return _read_version_line([path, "--version"])


def _is_dynamically_linked(path: Path) -> bool:
    """Return whether an ELF file names an interpreter; such a busybox finds no libc in the guest."""
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
    """Return an installed distribution's version without importing it."""
    for spelling in (name, f"{name}-cpu"):
        try:
            return importlib.metadata.version(spelling)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


# Module → distribution, where the names differ.
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
_REQUIREMENT = re.compile(r"""^([A-Za-z0-9][A-Za-z0-9._-]*)(\[[^]]*\])?[^;]*(?:;.*?extra\s*==\s*['"]([^'"]+)['"])?""")
_OTHER_SYSTEM = re.compile(r"""platform_system == ['"]Darwin['"]""")  # a requirement for another system than this one
_REPORTED_VARIABLES = ("PHASEWATCH_CORPUS", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "PYTHONPATH")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageInfo:
    """A required distribution; ``version`` is None if it is not installed, ``extra`` is empty for the core."""

    name: str
    extra: str
    version: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallationInfo:
    """Facts about an installation for a bug report, without host name, user name and home folder.

    Attributes:
        place: ``a checkout`` (runs from source) or ``installed``.
        python: Version and implementation.
        system: Operating system and kernel.
        machine: Architecture, processor and number of cores.
        packages: All required distributions, core first, then in the order of the extras.
        settings: Environment variables that change the behaviour of phasewatch, if they are set.
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
        """Return the state of each extra: ``installed``, or ``lacks`` with the missing distributions."""
        missing: dict[str, list[str]] = {}
        for package in self.packages:
            if package.extra:
                missing.setdefault(package.extra, []).extend([] if package.version else [package.name])
        return {extra: f"lacks {', '.join(names)}" if names else "installed" for extra, names in missing.items()}


def describe_installation() -> InstallationInfo:
    """Describe this installation without importing its packages."""
    kernel = f"{platform.system()} {platform.release()}"
    return InstallationInfo(
        version=__version__,
        place="a checkout" if _is_checkout() else "installed",
        python=f"{platform.python_version()} ({platform.python_implementation()}, {_describe_environment()})",
        system=f"{_read_distribution()}, {kernel}, {' '.join(platform.libc_ver())}".rstrip(", "),
        machine=f"{platform.machine()}, {_read_processor()}, {len(os.sched_getaffinity(0))} cores",
        packages=tuple(
            PackageInfo(name=name, extra=extra, version=_find_version(name)) for name, extra in _read_requirements()
        ),
        settings={name: hide_home(os.environ[name]) for name in _REPORTED_VARIABLES if name in os.environ},
    )


def find_extra(module: str) -> str | None:
    """Return the extra that installs a module; None if no extra does.

    >>> find_extra("torch.nn")
    'train'
    """
    root = module.partition(".")[0]
    wanted = _normalise_name(_DISTRIBUTIONS.get(root, root))
    return next((extra for name, extra in _read_requirements() if extra and _normalise_name(name) == wanted), None)


def _find_version(name: str) -> str | None:
    """Return an installed distribution's version without importing it."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def hide_home(text: str) -> str:
    """Replace the path of the user's home by ``~``, because it contains the user's name."""
    home = os.path.expanduser("~")  # noqa: PTH111  text, not a path
    return text.replace(home, "~") if len(home) > 1 else text


def _read_requirements() -> list[tuple[str, str]]:
    """Return (distribution, extra) pairs from the package's own metadata, so that pyproject.toml is the only source."""
    with suppress(metadata.PackageNotFoundError):
        lines = [line for line in metadata.requires("phasewatch") or [] if _OTHER_SYSTEM.search(line) is None]
        matches = [match for line in lines if (match := _REQUIREMENT.match(line))]
        return [(match[1], match[3] or "") for match in matches]
    return []


def _normalise_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_checkout() -> bool:
    """Return whether the code runs from a checkout, by its path or by the installer's record."""
    with suppress(metadata.PackageNotFoundError):
        record = metadata.distribution("phasewatch").read_text("direct_url.json")
        if record and json.loads(record).get("dir_info", {}).get("editable"):
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
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match[1].strip()
    return "a processor without a name in /proc/cpuinfo"
