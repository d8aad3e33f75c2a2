"""A machine of the user's own: a disk that boots by itself, and the folder by which our driver gets into it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from phasewatch.errors import DataError, UsageError
from phasewatch.naming import RESERVED, host_id_of
from phasewatch.record.hosts import HOSTS, HostShape
from phasewatch.record.image import Image
from phasewatch.record.vm import BootRule
from phasewatch.vocab import HOST_ID

QCOW2_MAGIC = b"QFI\xfb"
DRIVER_BYTES = 1 << 20
MACHINES = ("pc", "q35")  # those with a firmware that boots a disk

# The disk with the driver is labelled `cidata`: where cloud-init runs in the guest it finds these two files and starts
# the driver; any other guest mounts the disk and starts `driver` itself.
META_DATA = "instance-id: phasewatch\nlocal-hostname: guest\n"
USER_DATA = """#cloud-config
bootcmd:
  - mkdir -p /run/phasewatch
  - mount -o ro LABEL=cidata /run/phasewatch || mount -o ro LABEL=CIDATA /run/phasewatch
  - cp /run/phasewatch/driver /run/phasewatch-driver && chmod 0755 /run/phasewatch-driver
  - umount /run/phasewatch
  - setsid /run/phasewatch-driver </dev/null >/dev/console 2>&1 &
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnMachine:
    """What `record --image` boots.

    Attributes:
        shape: As what it is recorded; its `host_id` names the host.
        image: Its disk, which is never written to: each episode gets an overlay.
        driver: Text of the script that speaks the protocol; empty where the image brings its own.
        boot: How long it may take until the driver's first word.
    """

    shape: HostShape
    image: Image
    driver: bytes
    boot: BootRule


def read_own_machine(
    disk: Path, driver: Path | None, *, host_id: str = "", machine: str = "pc", mem_mib: int = 1024, vcpus: int = 1,
    boot_s: float = 300.0,
) -> OwnMachine:  # fmt: skip
    """Look at a disk image and a driver script, and say how they shall be booted.

    Args:
        disk: A qcow2 image that boots by itself.
        driver: The script, or None where the image brings its own driver.
        host_id: Under which name its episodes are kept; the image's name if empty, with a digest where that cannot be an id or is taken.
        machine: ``pc`` or ``q35``.
        boot_s: Deadline of the driver's first word.

    Raises:
        UsageError: If a number or a name cannot be.
        DataError: If a file cannot be read, or is not what it should be.
    """
    ours = {shape.host_id for shape in HOSTS}
    if host_id in RESERVED | ours:
        raise UsageError(
            f"--host-id {host_id}: a machine of the lab or a folder of `ship` has this name, and the two would count as one; "
            "choose another"
        )
    host_id = host_id or host_id_of(disk.stem, fallback="image", taken=ours)
    if not HOST_ID.fullmatch(host_id):
        raise UsageError(f"--host-id {host_id!r}: it must match {HOST_ID.pattern}")
    if machine not in MACHINES:
        raise UsageError(f"--machine {machine}: an own image boots on {' or '.join(MACHINES)}")
    if not 64 <= mem_mib <= 65536 or not 1 <= vcpus <= 64 or not 1 <= boot_s <= 3600:
        raise UsageError(
            f"--mem {mem_mib}, --vcpus {vcpus}, --boot-deadline {boot_s:g}: 64 to 65536 MiB, 1 to 64, 1 to 3600 s"
        )
    digest = hashlib.sha256()
    try:
        with disk.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            while block := file.read(1 << 20):
                digest.update(block)
        script = driver.read_bytes() if driver is not None else b""
    except OSError as exc:
        raise DataError(f"{exc.filename}: {exc.strerror}; --image names a qcow2 disk, --driver a script") from exc
    if magic != QCOW2_MAGIC:
        raise DataError(f"{disk}: not a qcow2 image; make one with `qemu-img convert -O qcow2 {disk} disk.qcow2`")
    if driver is not None and (not script.startswith(b"#!") or len(script) > DRIVER_BYTES):
        raise DataError(f"{driver}: not a script of at most {DRIVER_BYTES >> 20} MiB that begins with `#!`")
    return OwnMachine(
        shape=HostShape(
            host_id=host_id, about="a machine of the user's own", machine=machine, mem_mib=mem_mib, vcpus=vcpus, data_mib=0
        ),
        image=Image(kernel=None, initrd=None, base_disk=disk, kernel_release="", digest=digest.hexdigest()),
        driver=script,
        boot=BootRule(deadline_s=boot_s, tries=1),
    )  # fmt: skip
