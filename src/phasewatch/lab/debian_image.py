"""Build the Debian guest image: a root disk made with debootstrap, and an initramfs with driver and kinds.

The root disk depends on the list of packages and the setup script alone, so a new kind or driver takes seconds. Both
parts are stored under the digest of what they were built from. After the first build no network is needed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from phasewatch import atomic
from phasewatch.errors import MachineError, MissingToolError
from phasewatch.lab.debian_packages import DebianMirror, find_kernel_package, find_mirror, find_tool
from phasewatch.lab.guest_image import (
    DEFAULT_DATA_MIB,
    GUEST_SOURCES,
    KERNEL_MODULES,
    CpioEntry,
    GuestImage,
    compile_guest,
    make_data_disk,
    write_boot_files,
)
from phasewatch.lab.process import die_with_parent

__all__ = [
    "DEBIAN_CODENAME",
    "DebianTools",
    "build_debian_image",
    "find_debian_root",
    "list_debian_kinds",
    "parse_package_list",
]

logger = logging.getLogger(__name__)

DEBIAN_CODENAME = "bookworm"  # Debian 12, as the kernel
_ARCH = "x86_64"
_SPARE_MIB = 1024  # room on the scratch disk for what the kinds write
_NEEDED_BYTES = 3 * 2**30  # measured: 1.9 GB at the peak of a build
_FULL_BYTES = 64 * 2**20  # a build that fails with less room has failed for want of room
_ROOT_FREE_BYTES = 64 * 2**20
_BUILD_PREFIX = ".build-debian-"


@dataclass(frozen=True, slots=True, kw_only=True)
class DebianTools:
    """What a build of the root disk needs from the host; tests pass others.

    Attributes:
        user_id: Effective user id.
        needed_bytes: Free bytes of the cache's disk before a build.
        debootstrap: Its path; None looks it up.
        mirror: The package mirror; None asks apt.
    """

    user_id: int
    needed_bytes: int = _NEEDED_BYTES
    debootstrap: str | None = None
    mirror: DebianMirror | None = None


def build_debian_image(
    cache: Path, *, data_mib: int = DEFAULT_DATA_MIB, tools: DebianTools | None = None
) -> GuestImage:
    """Return the Debian guest image (x86_64); build it at first use, which takes minutes.

    Args:
        cache: Folder that keeps packages and images.
        data_mib: Size of the documents on the data disk, in MiB.
        tools: What the build needs from the host; by default what this process has.

    Raises:
        MissingToolError: If a program is missing, the user is not root, or apt knows no mirror.
        MachineError: If the disk is full or a step of the build failed; the message names the step and the remedy.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with atomic.lock(cache, wait=True):
        for leftover in cache.glob(f"{_BUILD_PREFIX}*"):  # of a killed build: the lock says that none is running
            shutil.rmtree(leftover, ignore_errors=True)
        root = _provide_root(cache, tools or DebianTools(user_id=os.geteuid()))
        packages = (root / "packages").read_bytes()
        kernel_package = find_kernel_package(cache, _ARCH)
        sources = {name: _guest_file(name).read_bytes() for name in GUEST_SOURCES if name != "init.sh"}
        payload = {f"phasewatch/kinds/{kind.name}": kind.read_bytes() for kind in list_debian_kinds()}
        payload |= {"init": _guest_file("debian/init.sh").read_bytes()}
        payload |= {f"phasewatch/{name}": _guest_file(f"debian/{name}").read_bytes() for name in ("lib.sh", "link.pl")}
        digest = _compute_digest(f"{kernel_package} {data_mib} {_SPARE_MIB}", packages, sources, payload)
        home = cache / f"debian-{digest[:16]}"
        if not home.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix=_BUILD_PREFIX) as folder:
                work = Path(folder)
                payload["phasewatch/guest"] = compile_guest(work, _ARCH, sources)
                entries = [CpioEntry(name=name, mode=0o040755) for name in ("phasewatch", "phasewatch/kinds")]
                entries += [CpioEntry(name=name, mode=0o100755, data=data) for name, data in sorted(payload.items())]
                write_boot_files(work, cache, _ARCH, kernel_package, entries)
                make_data_disk(work, work / "out" / "data.qcow2", data_mib, spare_mib=_SPARE_MIB)
                atomic.publish_folder(work / "out", home)
        return GuestImage(
            kernel=home / "kernel",
            initrd=home / "initrd.gz",
            base_disk=home / "data.qcow2",
            root_disk=root / "root.raw",
            kernel_release=(home / "release").read_text().strip(),
            digest=digest,
        )


def find_debian_root(cache: Path) -> Path | None:
    """Return the folder of the root disk if it is built, else None."""
    home = _root_folder(cache)
    return home if home.exists() else None


def _root_folder(cache: Path) -> Path:
    digest = hashlib.sha256(b"\0".join((DEBIAN_CODENAME.encode(), *_read_recipe()))).hexdigest()
    return cache / f"debian-root-{digest[:16]}"


def _read_recipe() -> tuple[bytes, bytes]:
    """Return the list of packages and the setup script."""
    return _guest_file("debian/packages.txt").read_bytes(), _guest_file("debian/setup.sh").read_bytes()


def list_debian_kinds() -> list[Traversable]:
    """Return the programs of the Debian image that are workloads, by name."""
    return sorted(_guest_file("debian/kinds").iterdir(), key=lambda kind: kind.name)


def parse_package_list(text: str) -> tuple[str, ...]:
    """Parse names separated by white space; ``#`` starts a comment.

    >>> parse_package_list("gcc make  # to build\\ngit")
    ('gcc', 'make', 'git')
    """
    return tuple(name for line in text.splitlines() for name in line.partition("#")[0].split())


def _guest_file(name: str) -> Traversable:
    return files("phasewatch.lab.guest").joinpath(name)


def _compute_digest(words: str, packages: bytes, *parts: dict[str, bytes]) -> str:
    h = hashlib.sha256(f"{words} {' '.join(KERNEL_MODULES)}\n".encode() + packages)
    for part in parts:
        for name, text in sorted(part.items()):
            h.update(name.encode() + b"\0" + text)
    return h.hexdigest()


# ---- Root disk ----


def _provide_root(cache: Path, tools: DebianTools) -> Path:
    """Return the folder with the root disk and the list of its packages; build it at first use."""
    known = find_debian_root(cache)
    if known is not None:
        return known
    package_list, setup = _read_recipe()
    home = _root_folder(cache)
    if tools.user_id != 0:
        raise MissingToolError(
            f"the Debian guest image is not in {cache} yet, and only root can build it: run `sudo phasewatch image "
            "debian` once with the same XDG_CACHE_HOME, or record hosts with the busybox image"
        )
    debootstrap = tools.debootstrap or find_tool("debootstrap", "debootstrap")
    unshare = find_tool("unshare", "util-linux")
    mirror = tools.mirror or find_mirror(DEBIAN_CODENAME)
    free_bytes = shutil.disk_usage(cache).free
    if free_bytes < tools.needed_bytes:
        raise MachineError(
            f"{cache}: building the Debian guest image needs {tools.needed_bytes / 1e9:.1f} GB, and "
            f"{free_bytes / 1e9:.1f} GB are free; make room or set XDG_CACHE_HOME to a larger disk"
        )
    logger.info("building the Debian guest image, once: about 250 MB of packages, some minutes")
    # Its own mount and PID namespaces: whatever ends the build, its mounts and its processes end with it.
    enclosed = [unshare, "--mount", "--pid", "--fork", "--kill-child=KILL", "--propagation", "private", "--"]
    with tempfile.TemporaryDirectory(dir=cache, prefix=_BUILD_PREFIX) as folder:
        work = Path(folder)
        tree, out = work / "tree", work / "out"
        out.mkdir()
        (work / "setup.sh").write_bytes(setup)
        names = ",".join(parse_package_list(package_list.decode()))
        steps = [debootstrap, "--variant=minbase", "--force-check-gpg", f"--include={names}", DEBIAN_CODENAME]
        _run_step([*enclosed, *steps, str(tree), mirror.uri], work, proxy=mirror.proxy, hint=_NETWORK_HINT)
        logger.info("the Debian guest image: packages are installed, making its root disk")
        _run_step([*enclosed, "/bin/sh", str(work / "setup.sh"), str(tree)], work)
        listing = _run_step(["dpkg-query", f"--admindir={tree}/var/lib/dpkg", "-W"], work)
        (out / "packages").write_text(listing)
        raw = out / "root.raw"
        size = sum(_measure_tree(tree)) + _ROOT_FREE_BYTES
        with raw.open("wb") as disk:
            disk.truncate(-(-size // 2**20) * 2**20)
        mke2fs = find_tool("mke2fs", "e2fsprogs")
        options = ["-q", "-t", "ext4", "-L", "debian", "-m", "0", "-O", "^has_journal", "-d", str(tree)]
        _run_step([mke2fs, *options, str(raw)], work)
        atomic.publish_folder(out, home)
    return home


_NETWORK_HINT = (
    "; the first build needs the package mirror that apt uses: check it with `apt-get update` and run the command again"
)


def _measure_tree(tree: Path) -> Iterator[int]:
    """Yield the bytes that each file and folder takes on a disk with blocks of 4 KiB and inodes of 256 bytes."""
    for folder, _, names in os.walk(tree):
        yield 4096 + 256
        for name in names:
            yield -(-os.lstat(os.path.join(folder, name)).st_size // 4096) * 4096 + 512  # noqa: PTH118  fast


def _run_step(command: list[str], work: Path, *, proxy: str = "", hint: str = "") -> str:
    """Run one step of the build and return its output.

    Raises:
        MachineError: If it failed, with the end of its output, or with the remedy if the disk is full.
    """
    environment = dict(os.environ) | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    if proxy:
        environment["http_proxy"] = proxy
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        preexec_fn=die_with_parent(),
    )
    if done.returncode == 0:
        return done.stdout
    if shutil.disk_usage(work).free < _FULL_BYTES:
        raise MachineError(
            f"{work.parent}: the disk is full while the Debian guest image is built; make room or set XDG_CACHE_HOME "
            "to a larger disk"
        )
    output = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    program = next(Path(word).name for word in command[command.index("--") + 1 if "--" in command else 0 :])
    raise MachineError(
        f"{program} ended with {done.returncode} while the Debian guest image was built: "
        f"{output[-1].strip() if output else 'no output'}{hint}"
    )
