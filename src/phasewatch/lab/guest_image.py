"""Builds the guest: Debian's cloud kernel, a busybox initramfs with the compiled guest program, a disk of documents.

Nothing is fetched but Debian packages, through apt. A finished image is kept under a name that is the digest of
everything it was made from, so that it is built once and never half.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath

from phasewatch import atomic
from phasewatch.errors import MachineError, MissingToolError


@dataclass(frozen=True, slots=True, kw_only=True)
class CpioEntry:
    """One file or folder of the archive; times and owners are always 0."""

    name: str
    mode: int
    data: bytes = b""


def build_cpio_archive(entries: Iterable[CpioEntry]) -> bytes:
    """Give the archive's bytes: same entries, same bytes."""
    out = bytearray()
    for number, entry in enumerate([*entries, CpioEntry(name="TRAILER!!!", mode=0)], start=1):
        name = entry.name.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
        out += b"070701" + b"".join(b"%08x" % value for value in fields) + name
        out += bytes(-len(out) % 4)
        out += entry.data
        out += bytes(-len(out) % 4)
    return bytes(out)


# In the order in which they depend on each other on x86; the guest tries in several passes, so it need not be exact.
KERNEL_MODULES = (
    "virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_mmio", "virtio_blk",
    "failover", "net_failover", "virtio_net", "virtio_console", "virtio_balloon", "virtio-rng", "crc16", "mbcache",
    "jbd2", "crc32c_generic", "libcrc32c", "ext4",
)  # fmt: skip
KERNEL_META_PACKAGES = {"x86_64": ("linux-image-cloud-amd64", "amd64"), "aarch64": ("linux-image-cloud-arm64", "arm64")}
COMPILERS = {"x86_64": ("gcc", "gcc libc6-dev"), "aarch64": ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross")}  # fmt: skip
GUEST_SOURCES = ("guest.h", "base.c", "net.c", "malware.c", "benign.c", "agent.c", "driver.c", "init.sh")
CUSTOM_GUEST_SOURCES = tuple(
    "custom.c" if name == "malware.c" else name for name in GUEST_SOURCES
)  # plays scripts instead
SCRIPTS_PREFIX = "profile/"  # where in the guest they lie: profile/<profile>/<sample>/<phase>
DEFAULT_DATA_MIB = 64
DISK_SEED = 20261124  # of the documents on the data disk: the same on every host


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestImage:
    """Files that QEMU boots. `digest` names the sources, the kernel and the disk.

    Without a kernel the disk boots by itself: a machine of the user's own.
    """

    kernel: Path | None
    initrd: Path | None
    base_disk: Path
    kernel_release: str
    digest: str


def build_guest_image(
    cache: Path, arch: str, *, data_mib: int = DEFAULT_DATA_MIB, scripts: Mapping[str, str] | None = None
) -> GuestImage:
    """Give the guest image of an architecture, built on first use.

    Args:
        cache: Folder that keeps packages and images.
        arch: ``x86_64`` or ``aarch64``.
        data_mib: Size of the documents on the data disk; more than a guest's memory makes its reads real.
        scripts: ``profile/sample/phase`` → shell text, of a workload of the user's own; such an image plays no other.

    Raises:
        MissingTool: If a program or a package is not to be had; names the line that installs it.
        MachineError: If a step of the build failed; names the step and its last words.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with atomic.lock(cache, wait=True):
        kernel_package = _find_kernel_package(cache, arch)
        sources = GUEST_SOURCES if scripts is None else CUSTOM_GUEST_SOURCES
        payload = {name: files("phasewatch.lab.guest").joinpath(name).read_bytes() for name in sources}
        payload |= {SCRIPTS_PREFIX + name: text.encode() for name, text in sorted((scripts or {}).items())}
        digest = _compute_digest(arch, kernel_package, data_mib, payload)
        home = cache / f"image-{arch}-{digest[:16]}"
        if not home.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix=".build-") as work:
                _build_image_files(Path(work), cache, arch, kernel_package, data_mib, payload)
                atomic.publish_folder(Path(work) / "out", home)
        release = (home / "release").read_text().strip()
        return GuestImage(
            kernel=home / "kernel", initrd=home / "initrd.gz", base_disk=home / "data.qcow2", kernel_release=release, digest=digest
        )  # fmt: skip


def _compute_digest(arch: str, kernel_package: str, data_mib: int, payload: dict[str, bytes]) -> str:
    h = hashlib.sha256(f"{arch} {kernel_package} {data_mib} {DISK_SEED}".encode())
    for name, text in payload.items():
        h.update(name.encode() + b"\0" + text)
    return h.hexdigest()


def _build_image_files(
    work: Path, cache: Path, arch: str, kernel_package: str, data_mib: int, payload: dict[str, bytes]
) -> None:
    out = work / "out"
    out.mkdir()
    kernel_tree, busybox_tree = work / "kernel", work / "busybox"
    _extract_package(_fetch_package(cache, arch, kernel_package), kernel_tree)
    _extract_package(_fetch_package(cache, arch, "busybox-static"), busybox_tree)
    kernel = next((kernel_tree / "boot").glob("vmlinuz-*"))
    release = kernel.name.removeprefix("vmlinuz-")
    shutil.copyfile(kernel, out / "kernel")
    (out / "release").write_text(release + "\n")
    busybox = next(p for p in busybox_tree.rglob("busybox") if p.is_file() and os.access(p, os.X_OK))
    modules = {p.name: p for p in (kernel_tree / "lib/modules" / release).rglob("*.ko")}
    entries = [
        CpioEntry(name=folder, mode=0o040755)
        for folder in ("bin", "data", "dev", "etc", "modules", "proc", "sys", "tmp")
    ]
    entries += [
        CpioEntry(name="init", mode=0o100755, data=payload["init.sh"]),
        CpioEntry(name="guest", mode=0o100755, data=_compile_guest(work, arch, payload)),
        CpioEntry(name="bin/busybox", mode=0o100755, data=busybox.read_bytes()),
    ]
    for name in KERNEL_MODULES:
        if f"{name}.ko" in modules:
            entries.append(CpioEntry(name=f"modules/{name}.ko", mode=0o100644, data=modules[f"{name}.ko"].read_bytes()))
    scripts = {name: text for name, text in payload.items() if name.startswith(SCRIPTS_PREFIX)}
    folders = {str(parent) for name in scripts for parent in PurePosixPath(name).parents} - {"."}
    entries += [CpioEntry(name=folder, mode=0o040755) for folder in sorted(folders)]
    entries += [CpioEntry(name=name, mode=0o100644, data=text) for name, text in scripts.items()]
    (out / "initrd.gz").write_bytes(gzip.compress(build_cpio_archive(entries), compresslevel=6, mtime=0))
    _make_disk(work, out / "data.qcow2", data_mib)


def _compile_guest(work: Path, arch: str, payload: dict[str, bytes]) -> bytes:
    compiler, packages = COMPILERS[arch]
    sources = {name: text for name, text in payload.items() if not name.startswith(SCRIPTS_PREFIX)}
    for name, text in sources.items():
        (work / name).write_bytes(text)
    _run_command(
        [
            _find_tool(compiler, packages),
            "-static",
            "-O2",
            "-s",
            "-o",
            "guest",
            *(n for n in sources if n.endswith(".c")),
            "-lm",
        ],
        cwd=work,
    )
    return (work / "guest").read_bytes()


def _make_disk(work: Path, target: Path, data_mib: int) -> None:
    """Make an ext4 disk of documents: text that compresses, and blobs that do not, of office-like sizes."""
    rng = random.Random(DISK_SEED)
    docs = work / "disk" / "docs"
    words = [f"{w}{i}" for w in ("phase", "report", "ledger", "memo", "order", "draft", "table") for i in range(40)]
    left, n = data_mib << 20, 0
    per_file = max(1 << 16, (data_mib << 20) // 640)
    while left > 0:
        size = min(left, int(per_file * rng.uniform(0.3, 1.7)))
        folder = docs / f"team{n % 12:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        if n % 3 == 0:
            data, kind = rng.randbytes(size), "bin"
        else:
            line = " ".join(rng.choice(words) for _ in range(4000)).encode()
            data, kind = (line * (size // len(line) + 1))[:size], "txt"
        (folder / f"doc{n:04d}.{kind}").write_bytes(data)
        left, n = left - size, n + 1
    raw = work / "data.raw"
    with raw.open("wb") as disk:
        disk.truncate((data_mib * 2 + 256) << 20)
    mke2fs = _find_tool("mke2fs", "e2fsprogs")
    _run_command([mke2fs, "-q", "-t", "ext4", "-U", "clear", "-E", "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0", "-O", "^metadata_csum", "-d", str(work / "disk"), str(raw)])  # fmt: skip
    _run_command([_find_tool("qemu-img", "qemu-utils"), "convert", "-f", "raw", "-O", "qcow2", str(raw), str(target)])


# ---- Debian packages ----


def _find_kernel_package(cache: Path, arch: str) -> str:
    """Give the versioned package that the cloud kernel's meta package depends on."""
    if arch not in KERNEL_META_PACKAGES:
        raise MachineError(f"no guest image for architecture {arch!r}; known: {', '.join(KERNEL_META_PACKAGES)}")
    kept = sorted(cache.glob(f"linux-image-*-cloud-{KERNEL_META_PACKAGES[arch][1]}_*.deb"))
    if kept:  # one image for a whole campaign: a newer kernel is taken by emptying the cache
        return kept[-1].name.split("_")[0]
    shown = _run_command(
        [_find_tool("apt-cache", "apt"), *_build_apt_options(cache, arch), "show", KERNEL_META_PACKAGES[arch][0]]
    )
    found = re.search(r"^Depends:.*?(linux-image-\S+-cloud-\w+)", shown, re.MULTILINE)
    if found is None:
        raise MissingToolError(f"apt does not know {KERNEL_META_PACKAGES[arch][0]}; run apt-get update first")
    return found.group(1)


def _fetch_package(cache: Path, arch: str, package: str) -> Path:
    debian_arch = KERNEL_META_PACKAGES[arch][1]
    kept = sorted(cache.glob(f"{package}_*_{debian_arch}.deb"))
    if not kept:
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
            Path(folder).chmod(0o755)
            _run_command(
                [_find_tool("apt-get", "apt"), *_build_apt_options(cache, arch), "-q", "download", package],
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
    """Give apt's options for packages of another architecture: private lists, so that the system's stay untouched."""
    debian_arch = KERNEL_META_PACKAGES[arch][1]
    native = _run_command([_find_tool("dpkg", "dpkg"), "--print-architecture"]).strip()
    options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    if debian_arch == native and _is_package_known(options, KERNEL_META_PACKAGES[arch][0]):
        return options
    state = cache / f"apt-{debian_arch}"
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    status = state / "status"
    status.touch()
    options += [
        "-o", f"Dir::State={state}", "-o", f"Dir::State::status={status}", "-o", f"Dir::Cache={state / 'cache'}",
        "-o", f"APT::Architecture={debian_arch}", "-o", f"APT::Architectures::={debian_arch}",
    ]  # fmt: skip
    if not any((state / "lists").glob("*_Packages*")):
        _run_command([_find_tool("apt-get", "apt"), *options, "-q", "update"])
    return options


def _is_package_known(options: list[str], package: str) -> bool:
    done = subprocess.run([_find_tool("apt-cache", "apt"), *options, "show", package], capture_output=True, check=False)
    return done.returncode == 0


def _extract_package(deb: Path, into: Path) -> None:
    _run_command([_find_tool("dpkg", "dpkg"), "-x", str(deb), str(into)])


def _find_tool(program: str, packages: str) -> str:
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    if found is None:
        raise MissingToolError(f"{program} is not installed: apt-get install --no-install-recommends {packages}")
    return found


def _run_command(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise MachineError(
            f"{Path(command[0]).name} ended with {done.returncode}: {words[-1] if words else 'no words'}"
        )
    return done.stdout
