"""The shapes of virtual machines that plans record on: a table, one frozen row a host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phasewatch.errors import PlanError, name_the_nearest
from phasewatch.vocab import HOST_ID


@dataclass(frozen=True, slots=True, kw_only=True)
class HostShape:
    """One shape of VM; episodes of different shapes are told apart as hosts.

    Attributes:
        host_id: Its name in stores.
        about: In what it differs from the plain one.
        machine: QEMU's machine type: pc, q35, microvm or virt.
        cpu: QEMU's CPU model.
        mem_mib: Memory.
        cache: Cache mode of the data disk: ``none`` goes past the host's page cache.
        iops: Requests per second that the disk is throttled to, 0 for none.
        data_mib: Bytes of files on the data disk, in MiB.
        accel: ``any`` for KVM where a real kernel boots on it, else TCG; ``tcg`` for a foreign architecture.
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

    @property
    def is_alone(self) -> bool:
        """Whether no second VM may run beside it: its vCPUs fill the two cores that a session has."""
        return self.vcpus > 1


HOSTS: tuple[HostShape, ...] = (
    HostShape(host_id="pc", machine="pc", about="the plain one"),
    HostShape(
        host_id="q35-none", machine="q35", cache="none", iops=300, about="a slow disk, past the host's page cache"
    ),
    HostShape(host_id="smp2", machine="q35", vcpus=2, about="two vCPUs, recorded alone"),
    HostShape(
        host_id="nehalem-128", machine="pc", cpu="Nehalem-v1", mem_mib=128, data_mib=160,
        about="an old CPU without PCID; more data than memory, so that reads reach the disk",
    ),
    HostShape(host_id="microvm", machine="microvm", about="no PCI bus: every device is memory-mapped"),
    HostShape(
        host_id="arm-virt", machine="virt", cpu="cortex-a57", arch="aarch64", accel="tcg", about="another architecture"
    ),
)  # fmt: skip

if len({shape.host_id for shape in HOSTS}) != len(HOSTS) or not all(HOST_ID.fullmatch(s.host_id) for s in HOSTS):
    raise ValueError("HOSTS: a host_id stands twice or is malformed")


def host_shape(host_id: str) -> HostShape:
    """Find a shape by name.

    Raises:
        PlanError: If there is none; names the nearest.
    """
    for shape in HOSTS:
        if shape.host_id == host_id:
            return shape
    raise PlanError(f"no host {host_id!r}; {name_the_nearest(host_id, [shape.host_id for shape in HOSTS])}")
