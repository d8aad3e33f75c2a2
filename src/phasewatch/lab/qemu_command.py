"""Host shapes of the lab, and the QEMU command line of a VM. No input or output."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from phasewatch.errors import PlanError, UsageError, suggest_names
from phasewatch.types import HOST_ID_PATTERN

__all__ = [
    "CONSOLE_BYTES",
    "HOST_SHAPES",
    "HostShape",
    "VmPaths",
    "build_qemu_command",
    "describe_shape",
    "find_host_shape",
]

CONSOLE_BYTES = 65536  # of the guest's console that QEMU holds until they are read


@dataclass(frozen=True, slots=True, kw_only=True)
class HostShape:
    """The hardware of a VM. Each shape is one host in a store.

    Attributes:
        host_id: Name of the host in stores.
        about: How it differs from the plain shape.
        machine: QEMU's machine type: pc, q35, microvm or virt.
        cpu: QEMU's CPU model.
        vcpus: Number of vCPUs.
        mem_mib: Memory in MiB.
        cache: Cache mode of the data disk; ``none`` bypasses the host's page cache.
        iops: Limit of disk requests per second; 0 for no limit.
        arch: Architecture of the guest.
        data_mib: Size of the files on the data disk, in MiB.
        accel: ``any`` for KVM where a kernel boots on it, else TCG; ``tcg`` for a foreign architecture.
        image: The guest image; ``debian`` needs x86_64, pc or q35, and 384 MiB of memory.
        nic: Model of the network card. The guests have drivers for these two; vmxnet3 needs pc or q35.
        quota_cores: CPU time that QEMU may use per second, in cores; 0 for no quota.
        drawn: Distribution, seed and number of a drawn shape, as ``v2/2/3``; empty for a chosen one.
    """

    host_id: str
    about: str
    machine: str
    cpu: str = "max"
    vcpus: int = 1
    mem_mib: int = 192
    cache: Literal["writeback", "none"] = "writeback"
    iops: int = 0
    arch: Literal["x86_64", "aarch64"] = "x86_64"
    data_mib: int = 64
    accel: Literal["any", "tcg"] = "any"
    image: Literal["busybox", "debian"] = "busybox"
    nic: Literal["virtio-net", "vmxnet3"] = "virtio-net"
    quota_cores: float = 0.0
    drawn: str = ""

    @property
    def cores(self) -> float:
        """Cores that it may keep busy: its quota, or one for each vCPU."""
        return self.quota_cores or float(self.vcpus)

    @property
    def is_alone(self) -> bool:
        """Whether no second VM may run beside it, because its vCPUs use both cores of a session."""
        return self.cores > 1


HOST_SHAPES: tuple[HostShape, ...] = (
    HostShape(host_id="pc", machine="pc", about="the plain shape"),
    HostShape(host_id="q35-none", machine="q35", cache="none", iops=300, about="a slow disk without page cache"),
    HostShape(host_id="smp2", machine="q35", vcpus=2, about="two vCPUs, recorded alone"),
    HostShape(
        host_id="nehalem-128",
        machine="pc",
        cpu="Nehalem-v1",
        mem_mib=128,
        data_mib=160,
        about="an old CPU without PCID; more data than memory, so that reads reach the disk",
    ),
    HostShape(host_id="microvm", machine="microvm", about="no PCI bus: every device is memory-mapped"),
    HostShape(
        host_id="arm-virt", machine="virt", cpu="cortex-a57", arch="aarch64", accel="tcg", about="another architecture"
    ),
)

if len({shape.host_id for shape in HOST_SHAPES}) != len(HOST_SHAPES) or not all(
    HOST_ID_PATTERN.fullmatch(s.host_id) for s in HOST_SHAPES
):
    raise ValueError("HOST_SHAPES: a host_id is not unique or is malformed")


def describe_shape(shape: HostShape) -> dict[str, str | int | float]:
    """Return the facts of a shape for the manifest, by name; a fact without a value is left out."""
    facts: dict[str, str | int | float] = {
        field.name: getattr(shape, field.name)
        for field in fields(shape)
        if field.name not in ("host_id", "about", "accel")
    }
    return {name: value for name, value in facts.items() if value != ""}


def find_host_shape(host_id: str) -> HostShape:
    """Return the host shape of a name.

    Raises:
        PlanError: If no shape has this name; the message suggests the nearest.
    """
    for shape in HOST_SHAPES:
        if shape.host_id == host_id:
            return shape
    raise PlanError(f"no host {host_id!r}; {suggest_names(host_id, [shape.host_id for shape in HOST_SHAPES])}")


_NIC_MODELS = ("virtio-net", "vmxnet3")
# With PIT and PIC off, no guest booted under TCG. The other options are the machine's minimum.
_MICROVM_MACHINE = "microvm,rtc=on,x-option-roms=off,pit=on,pic=on"
# With IPv6, the router solicitations after boot would reveal the guest's age. `quiet` is absent because it hides hangs.
_KERNEL_COMMAND_LINE = "panic=-1 ipv6.disable=1"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmPaths:
    """Paths of a VM's sockets and files, all in one private folder with a short name."""

    folder: Path

    @property
    def qmp(self) -> Path:
        """Socket of the QMP monitor."""
        return self.folder / "qmp.sock"

    @property
    def ctl(self) -> Path:
        """Socket of the driver's port."""
        return self.folder / "ctl.sock"

    @property
    def tel(self) -> Path:
        """Socket of the agent's port."""
        return self.folder / "tel.sock"

    @property
    def nic(self) -> Path:
        """QEMU's end of the network."""
        return self.folder / "q.sock"

    @property
    def sink(self) -> Path:
        """The sink's end of the network."""
        return self.folder / "p.sock"

    @property
    def overlay(self) -> Path:
        """Overlay with the disk writes of this episode."""
        return self.folder / "disk.qcow2"

    @property
    def seed_folder(self) -> Path:
        """Folder that a custom guest sees as the seed disk."""
        return self.folder / "seed"


def build_qemu_command(
    shape: HostShape,
    *,
    accel: str,
    kernel: Path | None,
    initrd: Path | None,
    sockets: VmPaths,
    mac: str,
    tsc_khz: int | None,
    has_seed_disk: bool = False,
    root_disk: Path | None = None,
) -> list[str]:
    """Build the command that starts one VM.

    Args:
        shape: The host shape.
        accel: ``kvm`` or ``tcg``; never both, because QEMU does not fall back when KVM opens but does not run.
        kernel, initrd: The guest image; None boots the disk.
        sockets: Paths of its sockets and its overlay.
        mac: Hardware address of the network card.
        tsc_khz: TSC rate of the host. Without it, the kernel of a microvm hangs while calibrating in half of its boots.
        has_seed_disk: Whether the guest gets the folder `sockets.seed_folder` as a read-only FAT disk labelled
            ``cidata``.
        root_disk: A raw disk with the guest's programs, attached read-only.

    Raises:
        UsageError: If the machine type is unknown, or the network card does not fit it.
    """
    machine = shape.machine.partition(",")[0]
    if machine not in ("pc", "q35", "microvm", "virt"):
        raise UsageError(f"host {shape.host_id}: no machine {machine!r}; known: pc, q35, microvm, virt")
    bus = "device" if machine == "microvm" else "pci"
    if shape.nic not in _NIC_MODELS or (shape.nic != "virtio-net" and machine not in ("pc", "q35")):
        raise UsageError(
            f"host {shape.host_id}: no network card {shape.nic!r} on {machine}; "
            "expected virtio-net, or vmxnet3 on pc or q35"
        )
    nic = f"virtio-net-{bus}" if shape.nic == "virtio-net" else shape.nic
    console = "ttyAMA0" if machine == "virt" else "ttyS0"
    line = f"console={console} {_KERNEL_COMMAND_LINE}"
    if machine == "microvm" and tsc_khz:
        # It has no second clock to check the TSC against: its kernel would count timer interrupts instead, and lose
        # time whenever a quota stops the VM.
        line += f" tsc_early_khz={tsc_khz} tsc=reliable"
    if accel == "tcg" and shape.vcpus > 1:
        accel = "tcg,thread=multi"
    drive = f"file={sockets.overlay},if=none,id=d0,format=qcow2,cache={shape.cache},discard=unmap"
    if shape.iops:
        drive += f",throttling.iops-total={shape.iops}"
    rom = ",romfile=" if bus == "pci" else ""
    boot = [] if kernel is None else ["-kernel", str(kernel), "-initrd", str(initrd), "-append", line]
    seed_disk: list[str] = []
    if has_seed_disk:
        seed_disk = [
            "-blockdev",
            f"driver=vvfat,node-name=seed0,dir={sockets.seed_folder},label=cidata,read-only=on",
            "-device",
            f"virtio-blk-{bus},drive=seed0,id=seed_disk",
        ]
    root: list[str] = []
    if root_disk is not None:
        root = ["-drive", f"file={root_disk},if=none,id=root0,format=raw,readonly=on", "-device"]
        root += [f"virtio-blk-{bus},drive=root0,id=root_disk"]
    return [
        f"qemu-system-{shape.arch}", "-name", f"{shape.host_id},debug-threads=on", "-no-user-config",
        "-nodefaults",
        "-machine", _MICROVM_MACHINE if shape.machine == "microvm" else shape.machine,
        "-accel", accel, "-cpu", shape.cpu,
        "-smp", str(shape.vcpus), "-m", str(shape.mem_mib), "-display", "none", "-no-reboot",
        # A ring buffer, not a file: endless console output fills 64 KiB and no disk.
        "-chardev", f"ringbuf,id=con,size={CONSOLE_BYTES}", "-serial", "chardev:con",
        *boot,
        "-qmp", f"unix:{sockets.qmp},server=on,wait=off",
        "-drive", drive,
        "-device", f"virtio-blk-{bus},drive=d0,id=blk0" + (",bootindex=1" if kernel is None else ""),
        *root,  # after the data disk, which must be the first disk of the guest
        *seed_disk,
        "-netdev", f"dgram,id=n0,local.type=unix,local.path={sockets.nic},remote.type=unix,remote.path={sockets.sink}",
        "-device", f"{nic},netdev=n0,id=nic0,mac={mac}{rom}",
        "-device", f"virtio-serial-{bus}",
        "-chardev", f"socket,id=ctl,path={sockets.ctl},server=on,wait=off",
        "-device", "virtserialport,chardev=ctl,name=ctl",
        "-chardev", f"socket,id=tel,path={sockets.tel},server=on,wait=off",
        "-device", "virtserialport,chardev=tel,name=tel",
        "-device", f"virtio-balloon-{bus},id=balloon0",
        "-object", "rng-random,id=r0,filename=/dev/urandom", "-device", f"virtio-rng-{bus},rng=r0",
    ]  # fmt: skip
