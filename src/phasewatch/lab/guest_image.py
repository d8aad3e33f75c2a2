"""Build the guest image: Debian's cloud kernel, a busybox initramfs with the guest program, and a disk of documents.

Only Debian packages are fetched, through apt. A finished image is stored under the digest of everything that it was
built from, so it is built once, and an incomplete image is never used.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath

from phasewatch import atomic
from phasewatch.lab.debian_packages import (
    extract_package,
    fetch_package,
    find_kernel_package,
    find_tool,
    run_command,
)

__all__ = [
    "CUSTOM_GUEST_SOURCES",
    "DEFAULT_DATA_MIB",
    "GUEST_SOURCES",
    "KERNEL_MODULES",
    "CpioEntry",
    "GuestImage",
    "build_cpio_archive",
    "build_guest_image",
    "compile_guest",
    "make_data_disk",
    "write_boot_files",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpioEntry:
    """One file or folder of a cpio archive; times and owners are always 0."""

    name: str
    mode: int
    data: bytes = b""


def build_cpio_archive(entries: Iterable[CpioEntry]) -> bytes:
    """Build a cpio archive (newc format). Equal entries give equal bytes."""
    out = bytearray()
    for number, entry in enumerate([*entries, CpioEntry(name="TRAILER!!!", mode=0)], start=1):
        name = entry.name.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
        out += b"070701" + b"".join(b"%08x" % value for value in fields) + name
        out += bytes(-len(out) % 4)
        out += entry.data
        out += bytes(-len(out) % 4)
    return bytes(out)


# In the order of their dependencies on x86. The guest loads them in several passes, so the order need not be exact.
KERNEL_MODULES = (
    *("virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_mmio"),
    *("virtio_blk", "failover", "net_failover", "virtio_net", "virtio_console", "virtio_balloon", "virtio-rng"),
    *("crc16", "mbcache", "jbd2", "crc32c_generic", "libcrc32c", "ext4", "vmxnet3", "overlay"),
)
_COMPILERS = {
    "x86_64": ("gcc", "gcc libc6-dev"),
    "aarch64": ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"),
}
GUEST_SOURCES = (
    *("guest.h", "base.c", "net.c", "malware.c", "routines.c", "benign.c", "loads.c", "kinds.c", "agent.c", "driver.c"),
    "init.sh",
)
# An image for a custom workload runs scripts instead of the built-in profiles.
CUSTOM_GUEST_SOURCES = tuple("custom.c" if name == "malware.c" else name for name in GUEST_SOURCES)
DEFAULT_DATA_MIB = 64
_SCRIPTS_PREFIX = "profile/"  # path of the scripts in the guest: profile/<profile>/<sample>/<phase>
_DISK_SEED = 20261124  # seed of the documents on the data disk; the same on every host


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestImage:
    """The files that QEMU boots.

    Attributes:
        kernel, initrd: None for a custom machine, whose disk boots by itself.
        base_disk: The data disk; each episode gets an overlay of it.
        root_disk: A raw disk with the guest's programs, shared and never written; None if the initramfs has them all.
        kernel_release: Release of the kernel; empty for a custom machine.
        digest: Hex SHA-256 over everything that the image was built from.
    """

    kernel: Path | None
    initrd: Path | None
    base_disk: Path
    kernel_release: str
    digest: str
    root_disk: Path | None = None


def build_guest_image(
    cache: Path, arch: str, *, data_mib: int = DEFAULT_DATA_MIB, scripts: Mapping[str, str] | None = None
) -> GuestImage:
    """Return the guest image of an architecture; build it at first use.

    Args:
        cache: Folder that keeps packages and images.
        arch: ``x86_64`` or ``aarch64``.
        data_mib: Size of the documents on the data disk, in MiB. With more than the guest's memory, reads reach the
            disk.
        scripts: ``profile/sample/phase`` → shell text of a custom workload. Such an image runs no built-in profile.

    Raises:
        MissingToolError: If a program or a package is missing; the message has the command that installs it.
        MachineError: If a step of the build failed; the message names the step and the end of its output.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with atomic.lock(cache, wait=True):
        kernel_package = find_kernel_package(cache, arch)
        sources = GUEST_SOURCES if scripts is None else CUSTOM_GUEST_SOURCES
        payload = {name: files("phasewatch.lab.guest").joinpath(name).read_bytes() for name in sources}
        payload |= {_SCRIPTS_PREFIX + name: text.encode() for name, text in sorted((scripts or {}).items())}
        digest = _compute_digest(arch, kernel_package, data_mib, payload)
        home = cache / f"image-{arch}-{digest[:16]}"
        if not home.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix=".build-") as work:
                _build_image_files(Path(work), cache, arch, kernel_package, data_mib, payload)
                atomic.publish_folder(Path(work) / "out", home)
        release = (home / "release").read_text().strip()
        return GuestImage(
            kernel=home / "kernel",
            initrd=home / "initrd.gz",
            base_disk=home / "data.qcow2",
            kernel_release=release,
            digest=digest,
        )


def _compute_digest(arch: str, kernel_package: str, data_mib: int, payload: dict[str, bytes]) -> str:
    h = hashlib.sha256(f"{arch} {kernel_package} {data_mib} {_DISK_SEED} {' '.join(KERNEL_MODULES)}".encode())
    for name, text in payload.items():
        h.update(name.encode() + b"\0" + text)
    return h.hexdigest()


def _build_image_files(
    work: Path, cache: Path, arch: str, kernel_package: str, data_mib: int, payload: dict[str, bytes]
) -> None:
    scripts = {name: text for name, text in payload.items() if name.startswith(_SCRIPTS_PREFIX)}
    folders = {str(parent) for name in scripts for parent in PurePosixPath(name).parents} - {"."}
    entries = [CpioEntry(name="init", mode=0o100755, data=payload["init.sh"])]
    entries += [CpioEntry(name="guest", mode=0o100755, data=compile_guest(work, arch, payload))]
    entries += [CpioEntry(name=folder, mode=0o040755) for folder in sorted(folders)]
    entries += [CpioEntry(name=name, mode=0o100644, data=text) for name, text in scripts.items()]
    write_boot_files(work, cache, arch, kernel_package, entries)
    make_data_disk(work, work / "out" / "data.qcow2", data_mib)


def write_boot_files(work: Path, cache: Path, arch: str, kernel_package: str, entries: Iterable[CpioEntry]) -> None:
    """Write the kernel, its release and an initramfs with busybox and the kernel's modules.

    Args:
        work: Folder of the build; the files ``kernel``, ``release`` and ``initrd.gz`` go to its folder ``out``.
        cache: Folder that keeps packages.
        arch: ``x86_64`` or ``aarch64``.
        kernel_package: Name of the kernel's package.
        entries: Further entries of the initramfs; one of them is ``init``.

    Raises:
        MachineError: If a package cannot be fetched or extracted.
    """
    out = work / "out"
    out.mkdir()
    kernel_tree, busybox_tree = work / "kernel", work / "busybox"
    extract_package(fetch_package(cache, arch, kernel_package), kernel_tree)
    extract_package(fetch_package(cache, arch, "busybox-static"), busybox_tree)
    kernel = next((kernel_tree / "boot").glob("vmlinuz-*"))
    release = kernel.name.removeprefix("vmlinuz-")
    shutil.copyfile(kernel, out / "kernel")
    (out / "release").write_text(release + "\n")
    busybox = next(p for p in busybox_tree.rglob("busybox") if p.is_file() and os.access(p, os.X_OK))
    modules = {p.name: p for p in (kernel_tree / "lib/modules" / release).rglob("*.ko")}
    folders = ("bin", "data", "dev", "etc", "modules", "proc", "sys", "tmp")
    archive = [CpioEntry(name=folder, mode=0o040755) for folder in folders]
    archive += [CpioEntry(name="bin/busybox", mode=0o100755, data=busybox.read_bytes()), *entries]
    for name in KERNEL_MODULES:
        if f"{name}.ko" in modules:
            archive.append(CpioEntry(name=f"modules/{name}.ko", mode=0o100644, data=modules[f"{name}.ko"].read_bytes()))
    (out / "initrd.gz").write_bytes(gzip.compress(build_cpio_archive(archive), compresslevel=6, mtime=0))


def compile_guest(work: Path, arch: str, payload: Mapping[str, bytes]) -> bytes:
    """Return the static guest program, compiled from the C files among the sources (name → bytes)."""
    compiler, packages = _COMPILERS[arch]
    sources = {name: text for name, text in payload.items() if not name.startswith(_SCRIPTS_PREFIX)}
    for name, text in sources.items():
        (work / name).write_bytes(text)
    c_files = [name for name in sources if name.endswith(".c")]
    run_command([find_tool(compiler, packages), "-static", "-O2", "-s", "-o", "guest", *c_files, "-lm"], cwd=work)
    return (work / "guest").read_bytes()


def make_data_disk(work: Path, target: Path, data_mib: int, *, spare_mib: int | None = None) -> None:
    """Build an ext4 disk of documents: compressible text and incompressible data, of office-like sizes.

    Args:
        work: Folder of the build.
        target: The qcow2 file.
        data_mib: Size of the documents, in MiB.
        spare_mib: Room for further files, in MiB; by default as much as the documents take, and 256.
    """
    rng = random.Random(_DISK_SEED)
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
        disk.truncate((data_mib + (data_mib + 256 if spare_mib is None else spare_mib)) << 20)
    mke2fs = find_tool("mke2fs", "e2fsprogs")
    extended = "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"
    options = ["-q", "-t", "ext4", "-U", "clear", "-E", extended, "-O", "^metadata_csum", "-d", str(work / "disk")]
    run_command([mke2fs, *options, str(raw)])
    run_command([find_tool("qemu-img", "qemu-utils"), "convert", "-f", "raw", "-O", "qcow2", str(raw), str(target)])
