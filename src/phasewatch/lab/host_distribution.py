"""Draw host shapes at random from a declared distribution, so that hosts are a sample of a population."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from importlib import resources
from math import exp, log
from typing import Literal, TypeVar

import msgspec
import numpy as np

from phasewatch.errors import PlanError
from phasewatch.lab.qemu_command import HostShape
from phasewatch.toml_config import parse_toml
from phasewatch.types import HOST_ID_PATTERN

__all__ = ["DrawnMachine", "HostDistribution", "draw_host_shapes", "load_host_distribution", "parse_host_distribution"]

MAX_DRAWN_HOSTS = 100  # two digits in the id
_MIN_DEBIAN_MEM_MIB = 384  # systemd and a database beside a page cache
_MIN_MEM_MIB = 96
_MIN_QUOTA_CORES = 0.05
_T = TypeVar("_T")

_SteppedRange = tuple[float, float, float]  # smallest, largest, step


class DrawnMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine type, and what it can be combined with."""

    machine: Literal["pc", "q35", "microvm", "virt"]
    weight: int
    cpus: tuple[str, ...]
    nics: tuple[Literal["virtio-net", "vmxnet3"], ...]
    images: tuple[Literal["busybox", "debian"], ...]
    arch: Literal["x86_64", "aarch64"] = "x86_64"


class _DrawnRanges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Numbers drawn log-uniformly: smallest, largest and step."""

    quota_cores: _SteppedRange
    mem_mib: _SteppedRange
    debian_mem_mib: _SteppedRange


class HostDistribution(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A population of hosts, as `lab/hosts.toml` declares it.

    Attributes:
        name: First part of the host ids.
        debian_every: Every so manieth shape runs the Debian guest, from the first on.
        vcpus, caches, iops, data_mib: Values with equal chances; a repeated value is a weight.
        ranges: Intervals of quota and memory.
        machines: Machine types with their CPUs, network cards and guest images.
    """

    name: str
    debian_every: int
    vcpus: tuple[int, ...]
    caches: tuple[Literal["writeback", "none"], ...]
    iops: tuple[int, ...]
    data_mib: tuple[int, ...]
    ranges: _DrawnRanges
    machines: tuple[DrawnMachine, ...]


def parse_host_distribution(text: str, *, where: str) -> HostDistribution:
    """Parse a distribution of hosts.

    Args:
        text: TOML.
        where: Name of the file, for messages.

    Raises:
        PlanError: If the text is not TOML, has unknown or missing keys, or allows a host that cannot run.
    """
    distribution = parse_toml(text, HostDistribution, where=where)
    for problem in _list_problems(distribution):
        raise PlanError(f"{where}: {problem}")
    return distribution


@cache
def load_host_distribution() -> HostDistribution:
    """Load the distribution of laboratory version 2, `lab/hosts.toml`."""
    text = resources.files("phasewatch.lab").joinpath("hosts.toml").read_text("utf-8")
    return parse_host_distribution(text, where="hosts.toml")


def draw_host_shapes(distribution: HostDistribution, *, count: int, seed: int) -> tuple[HostShape, ...]:
    """Draw host shapes. Shape i depends on the seed and on i only, so a larger count adds hosts and changes none.

    Args:
        distribution: The population.
        count: Number of shapes, 1 to 100.
        seed: Not negative.

    Raises:
        PlanError: If count or seed is out of range.
    """
    if not 1 <= count <= MAX_DRAWN_HOSTS:
        raise PlanError(f"drawn_hosts: count {count}, expected 1 to {MAX_DRAWN_HOSTS}")
    if seed < 0:
        raise PlanError(f"drawn_hosts: seed {seed}, expected 0 or more")
    return tuple(_draw_shape(distribution, seed, number) for number in range(count))


def _draw_shape(distribution: HostDistribution, seed: int, number: int) -> HostShape:
    purpose = int.from_bytes(blake2b(b"host shape", digest_size=8).digest(), "big")
    rng = np.random.default_rng([seed, number, purpose])
    image: Literal["busybox", "debian"] = "debian" if number % distribution.debian_every == 0 else "busybox"
    machines = [each for each in distribution.machines if image in each.images]
    chosen = _choose(rng, [each for each in machines for _ in range(each.weight)])
    ranges = distribution.ranges
    return HostShape(
        host_id=f"{distribution.name}-{number:02d}-{chosen.machine}",
        about=f"drawn from {distribution.name} with seed {seed}",
        machine=chosen.machine,
        arch=chosen.arch,
        accel="tcg" if chosen.arch == "aarch64" else "any",
        cpu=_choose(rng, chosen.cpus),
        nic=_choose(rng, chosen.nics),
        image=image,
        vcpus=_choose(rng, distribution.vcpus),
        cache=_choose(rng, distribution.caches),
        iops=_choose(rng, distribution.iops),
        data_mib=_choose(rng, distribution.data_mib),
        quota_cores=_draw_stepped(rng, ranges.quota_cores),
        mem_mib=round(_draw_stepped(rng, ranges.debian_mem_mib if image == "debian" else ranges.mem_mib)),
        drawn=f"{distribution.name}/{seed}/{number}",
    )


def _choose(rng: np.random.Generator, values: Sequence[_T]) -> _T:
    return values[int(rng.integers(len(values)))]


def _draw_stepped(rng: np.random.Generator, between: _SteppedRange) -> float:
    low, high, step = between
    drawn = exp(rng.uniform(log(low), log(high)))
    return round(min(high, max(low, round(drawn / step) * step)), 6)


def _list_problems(distribution: HostDistribution) -> list[str]:
    """Return what keeps a distribution from giving only hosts that can run."""
    problems = []
    ranges = distribution.ranges
    least = {"quota_cores": _MIN_QUOTA_CORES, "mem_mib": _MIN_MEM_MIB, "debian_mem_mib": _MIN_DEBIAN_MEM_MIB}
    for key, smallest in least.items():
        low, high, step = getattr(ranges, key)
        if not (smallest <= low <= high and step > 0):
            problems.append(f"ranges.{key}: {low:g} to {high:g} by {step:g}, expected at least {smallest:g}, ascending")
    if not HOST_ID_PATTERN.fullmatch(distribution.name):
        problems.append(f"name {distribution.name!r}: expected the characters a-z, 0-9, dot, dash and underscore")
    if distribution.debian_every < 1:
        problems.append(f"debian_every: {distribution.debian_every}, expected 1 or more")
    lists = {key: getattr(distribution, key) for key in ("vcpus", "caches", "iops", "data_mib", "machines")}
    lists |= {f"machines.{each.machine}.cpus": each.cpus for each in distribution.machines}
    lists |= {f"machines.{each.machine}.nics": each.nics for each in distribution.machines}
    problems += [f"{key}: expected at least one value" for key, values in lists.items() if not values]
    if any(each < 1 for each in distribution.vcpus) or any(
        each < 0 for each in (*distribution.iops, *distribution.data_mib)
    ):
        problems.append("vcpus, iops and data_mib: expected no negative number, and at least one vCPU")
    for each in distribution.machines:
        if each.weight < 1:
            problems.append(f"machines.{each.machine}: weight {each.weight}, expected 1 or more")
        if (each.machine == "virt") != (each.arch == "aarch64"):
            problems.append(f"machines.{each.machine}: arch {each.arch}; virt is aarch64, the others are x86_64")
        if each.machine not in ("pc", "q35") and ("vmxnet3" in each.nics or "debian" in each.images):
            problems.append(f"machines.{each.machine}: vmxnet3 and debian need pc or q35")
    for image in ("busybox", "debian"):
        if not any(image in each.images for each in distribution.machines):
            problems.append(f"machines: none has the image {image}")
    return problems
