"""Build a bootable disk from Debian packages without root: GRUB, a kernel, a busybox whose init runs the driver."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

from phasewatch.lab import debian_packages, guest_image
from phasewatch.lab.campaign import default_cache
from phasewatch.lab.guest_image import CpioEntry, build_cpio_archive

MODULES = (*guest_image.KERNEL_MODULES, "fat", "vfat", "nls_cp437", "nls_ascii", "nls_utf8")
MIB = 1 << 20
DISK_MIB = 64
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
for pass in 1 2 3 4; do for module in /modules/*.ko; do insmod $module 2>/dev/null; done; done
export PATH=/bin
mkdir -p /mnt
for try in 1 2 3 4 5 6 7 8 9 10; do mount -t vfat -o ro /dev/vdb1 /mnt && break; sleep 0.2; done
[ -f /mnt/driver ] && exec sh /mnt/driver
echo no driver here
while :; do sleep 60; done
"""
# The MBR's one partition: type 0x83, active, from sector 2048 to the end, by number and without cylinders.
PARTITION = bytes((0x80, 0, 2, 0, 0x83, 0xFF, 0xFF, 0xFF)) + (2048).to_bytes(4, "little")


def build_own_disk(work: Path) -> Path:
    """Build `disk.qcow2` in a folder."""
    cache = default_cache()
    kernel_package = debian_packages.find_kernel_package(cache, "x86_64")
    trees = {name: work / name for name in (kernel_package, "busybox-static", "grub-pc-bin", "grub-common")}
    for name, tree in trees.items():
        debian_packages.extract_package(debian_packages.fetch_package(cache, "x86_64", name), tree)
    boot = work / "boot"
    boot.mkdir()
    kernel = next((trees[kernel_package] / "boot").glob("vmlinuz-*"))
    (boot / "vmlinuz").write_bytes(kernel.read_bytes())
    found = {path.name: path for path in (trees[kernel_package] / "lib/modules").rglob("*.ko")}
    entries = [
        CpioEntry(name=name, mode=0o040755) for name in ("bin", "dev", "modules", "proc", "sys", "tmp", "etc", "root")
    ]
    entries += [
        CpioEntry(name="init", mode=0o100755, data=INIT.encode()),
        CpioEntry(name="etc/passwd", mode=0o100644, data=b"root:x:0:0::/root:/bin/sh\n"),
        CpioEntry(name="bin/busybox", mode=0o100755, data=(trees["busybox-static"] / "bin/busybox").read_bytes()),
    ]
    entries += [
        CpioEntry(name=f"modules/{name}.ko", mode=0o100644, data=found[f"{name}.ko"].read_bytes())
        for name in MODULES
        if f"{name}.ko" in found
    ]
    (boot / "initrd.gz").write_bytes(gzip.compress(build_cpio_archive(entries), mtime=0))
    _join(work, trees, boot)
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(work / "disk.raw"), str(work / "disk.qcow2")],
        check=True,
    )
    return work / "disk.qcow2"


def _join(work: Path, trees: dict[str, Path], boot: Path) -> None:
    """Write boot sector, GRUB and partition end to end."""
    grub = trees["grub-pc-bin"] / "usr/lib/grub/i386-pc"
    (work / "early.cfg").write_text(
        "linux (hd0,msdos1)/vmlinuz console=ttyS0 panic=-1 ipv6.disable=1\ninitrd (hd0,msdos1)/initrd.gz\nboot\n"
    )
    make = trees["grub-common"] / "usr/bin/grub-mkimage"
    subprocess.run(
        [
            str(make),
            "-O",
            "i386-pc",
            "-d",
            str(grub),
            "-p",
            "/",
            "-c",
            str(work / "early.cfg"),
            "-o",
            str(work / "core.img"),
            "biosdisk",
            "part_msdos",
            "ext2",
            "linux",
        ],
        check=True,
    )
    size = (DISK_MIB - 1) * MIB
    partition = work / "partition"
    with partition.open("wb") as file:
        file.truncate(size)
    subprocess.run(
        [debian_packages.find_tool("mke2fs", "e2fsprogs"), "-q", "-t", "ext2", "-d", str(boot), str(partition)],
        check=True,
    )
    core = (work / "core.img").read_bytes()
    assert len(core) < MIB - 512
    sector = bytearray((grub / "boot.img").read_bytes()[:440].ljust(512, b"\0"))
    sector[446:462] = PARTITION + (size // 512).to_bytes(4, "little")
    sector[510:] = b"\x55\xaa"
    with (work / "disk.raw").open("wb") as disk:
        disk.write(bytes(sector) + core)
        disk.seek(MIB)
        disk.write(partition.read_bytes())
