"""Debian packages and programs of the host for the guest images: find, fetch and extract packages, run programs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from phasewatch import atomic
from phasewatch.errors import MachineError, MissingToolError

__all__ = [
    "DebianMirror",
    "extract_package",
    "fetch_package",
    "find_kernel_package",
    "find_mirror",
    "find_tool",
    "run_command",
    "select_mirror",
]

_KERNEL_META_PACKAGES = {
    "x86_64": ("linux-image-cloud-amd64", "amd64"),
    "aarch64": ("linux-image-cloud-arm64", "arm64"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DebianMirror:
    """The package mirror that apt uses for a Debian release, and the proxy on the way to it ("" for none)."""

    uri: str
    proxy: str


def find_mirror(codename: str) -> DebianMirror:
    """Return the mirror of a Debian release from the configuration of apt.

    Raises:
        MissingToolError: If apt knows no mirror of that release.
    """
    fields = "$(REPO_URI)\t$(CODENAME)\t$(COMPONENT)\t$(ORIGIN)\t$(LABEL)"
    targets = run_command([find_tool("apt-get", "apt"), "indextargets", "--format", fields, "Created-By: Packages"])
    uri = select_mirror(targets, codename)
    proxy = run_command([find_tool("apt-config", "apt"), "dump", "--format", "%v%n", "Acquire::http::Proxy"]).strip()
    return DebianMirror(uri=uri, proxy="" if proxy == "DIRECT" else proxy)


def select_mirror(targets: str, codename: str) -> str:
    """Return the first address of a Debian release's main packages.

    Args:
        targets: Output of ``apt-get indextargets``: address, codename, component, origin and label, between tabs.
        codename: Such as ``bookworm``.

    Raises:
        MissingToolError: If there is none; the message has the remedy.
    """
    wanted = [codename, "main", "Debian", "Debian"]
    uris = [uri for uri, *rest in (line.split("\t") for line in targets.splitlines()) if rest == wanted]
    if not uris:
        raise MissingToolError(
            f"apt knows no mirror of Debian {codename}; add `deb MIRROR {codename} main` to /etc/apt/sources.list and "
            "run apt-get update"
        )
    return uris[0]


def find_kernel_package(cache: Path, arch: str) -> str:
    """Return the versioned package that the meta package of the cloud kernel depends on.

    Raises:
        MachineError: If the architecture is unknown.
        MissingToolError: If apt does not know the meta package.
    """
    if arch not in _KERNEL_META_PACKAGES:
        raise MachineError(f"no guest image for architecture {arch!r}; known: {', '.join(_KERNEL_META_PACKAGES)}")
    kept = sorted(cache.glob(f"linux-image-*-cloud-{_KERNEL_META_PACKAGES[arch][1]}_*.deb"))
    if kept:  # one image for a whole campaign; empty the cache to get a newer kernel
        return kept[-1].name.split("_")[0]
    output = run_command(
        [find_tool("apt-cache", "apt"), *_build_apt_options(cache, arch), "show", _KERNEL_META_PACKAGES[arch][0]]
    )
    match = re.search(r"^Depends:.*?(linux-image-\S+-cloud-\w+)", output, re.MULTILINE)
    if match is None:
        raise MissingToolError(f"apt does not know {_KERNEL_META_PACKAGES[arch][0]}; run apt-get update first")
    return match.group(1)


def fetch_package(cache: Path, arch: str, package: str) -> Path:
    """Return a package's file in the cache; fetch it at first use.

    Raises:
        MissingToolError: If apt brings nothing.
        MachineError: If apt fails.
    """
    debian_arch = _KERNEL_META_PACKAGES[arch][1]
    kept = sorted(cache.glob(f"{package}_*_{debian_arch}.deb"))
    if not kept:
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
            Path(folder).chmod(0o755)
            run_command(
                [find_tool("apt-get", "apt"), *_build_apt_options(cache, arch), "-q", "download", package],
                cwd=Path(folder),
            )
            for deb in Path(folder).glob("*.deb"):
                atomic.sync_file(deb)
                atomic.move(deb, cache / deb.name)
        kept = sorted(cache.glob(f"{package}_*_{debian_arch}.deb"))
        if not kept:
            raise MissingToolError(f"apt-get download {package} brought nothing; run apt-get update first")
    return kept[-1]


def _build_apt_options(cache: Path, arch: str) -> list[str]:
    """Return apt's options for an architecture; a foreign one gets private lists, the system's stay untouched."""
    debian_arch = _KERNEL_META_PACKAGES[arch][1]
    native = run_command([find_tool("dpkg", "dpkg"), "--print-architecture"]).strip()
    options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    if debian_arch == native and _is_package_known(options, _KERNEL_META_PACKAGES[arch][0]):
        return options
    state = cache / f"apt-{debian_arch}"
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    status = state / "status"
    status.touch()
    options += [
        *("-o", f"Dir::State={state}"),
        *("-o", f"Dir::State::status={status}"),
        *("-o", f"Dir::Cache={state / 'cache'}"),
        *("-o", f"APT::Architecture={debian_arch}"),
        *("-o", f"APT::Architectures::={debian_arch}"),
    ]
    if not any((state / "lists").glob("*_Packages*")):
        run_command([find_tool("apt-get", "apt"), *options, "-q", "update"])
    return options


def _is_package_known(options: list[str], package: str) -> bool:
    done = subprocess.run([find_tool("apt-cache", "apt"), *options, "show", package], capture_output=True, check=False)
    return done.returncode == 0


def extract_package(deb: Path, into: Path) -> None:
    """Extract the files of a package."""
    run_command([find_tool("dpkg", "dpkg"), "-x", str(deb), str(into)])


def find_tool(program: str, packages: str) -> str:
    """Return the path of a program.

    Raises:
        MissingToolError: If it is absent; the message names the packages to install.
    """
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    if path is None:
        raise MissingToolError(f"{program} is not installed: apt-get install --no-install-recommends {packages}")
    return path


def run_command(command: list[str], cwd: Path | None = None) -> str:
    """Run a program and return its output.

    Raises:
        MachineError: If its exit status is not 0; the message has the last line of its output.
    """
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        output = (done.stderr or done.stdout).strip().splitlines()
        raise MachineError(
            f"{Path(command[0]).name} ended with {done.returncode}: {output[-1] if output else 'no output'}"
        )
    return done.stdout
