"""How phasewatch is installed here: its version and place, Python, the platform, and which extras are whole."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import phasewatch

# Modules that are not called like the distribution they come in.
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "xgboost": "xgboost-cpu", "qemu": "qemu.qmp"}
_REQUIREMENT = re.compile(r"""^([A-Za-z0-9][A-Za-z0-9._-]*)(\[[^]]*\])?[^;]*(?:;.*?extra\s*==\s*['"]([^'"]+)['"])?""")
_ELSEWHERE = re.compile(r"""platform_system == ['"]Darwin['"]""")  # a requirement for another system than this one
_TOLD = ("PHASEWATCH_CORPUS", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "PYTHONPATH")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A distribution that phasewatch asks for; ``version`` is None where it is not installed, ``extra`` "" for the core."""

    name: str
    extra: str
    version: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
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
    packages: tuple[Package, ...]
    settings: Mapping[str, str]

    @property
    def extras(self) -> dict[str, str]:
        """Give each extra's state: ``installed``, or ``lacks`` and what."""
        found: dict[str, list[str]] = {}
        for package in self.packages:
            if package.extra:
                found.setdefault(package.extra, []).extend([] if package.version else [package.name])
        return {extra: f"lacks {', '.join(names)}" if names else "installed" for extra, names in found.items()}


def describe() -> Installation:
    """Describe this installation; nothing is imported for it."""
    return Installation(
        version=phasewatch.__version__,
        place="a checkout" if _is_checkout() else "installed",
        python=f"{platform.python_version()} ({platform.python_implementation()}, {_environment()})",
        system=f"{_distribution()}, {platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}".rstrip(", "),
        machine=f"{platform.machine()}, {_processor()}, {len(os.sched_getaffinity(0))} cores",
        packages=tuple(
            Package(name=name, extra=extra, version=version_of(name)) for name, extra in _requirements()
        ),
        settings={name: without_home(os.environ[name]) for name in _TOLD if name in os.environ},
    )  # fmt: skip


def extra_of(module: str) -> str | None:
    """Say which extra brings a module; None for one that no extra names.

    >>> extra_of("torch.nn")
    'train'
    """
    root = module.partition(".")[0]
    wanted = _normal(_DISTRIBUTIONS.get(root, root))
    return next((extra for name, extra in _requirements() if extra and _normal(name) == wanted), None)


def version_of(name: str) -> str | None:
    """Give an installed distribution's version without importing it."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def without_home(text: str) -> str:
    """Put ``~`` for the user's home, whose name is nobody's business in a bug report."""
    home = os.path.expanduser("~")  # noqa: PTH111  text, not a path
    return text.replace(home, "~") if len(home) > 1 else text


def _requirements() -> list[tuple[str, str]]:
    """Read (distribution, extra) from phasewatch's own metadata: pyproject.toml stays the one source."""
    with suppress(metadata.PackageNotFoundError):
        lines = [line for line in metadata.requires("phasewatch") or [] if _ELSEWHERE.search(line) is None]
        found = [match for line in lines if (match := _REQUIREMENT.match(line))]
        return [(match[1], match[3] or "") for match in found]
    return []


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_checkout() -> bool:
    """Say whether the code runs from where it is written, by its place or by what the installer noted."""
    with suppress(metadata.PackageNotFoundError):
        noted = metadata.distribution("phasewatch").read_text("direct_url.json")
        if noted and json.loads(noted).get("dir_info", {}).get("editable"):
            return True
    return (Path(phasewatch.__file__).resolve().parents[2] / "pyproject.toml").is_file()


def _environment() -> str:
    return "a virtual environment" if sys.prefix != sys.base_prefix else "the system's"


def _distribution() -> str:
    with suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    return ""


def _processor() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    return "a processor that /proc/cpuinfo does not name"
