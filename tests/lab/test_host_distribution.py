"""Hosts drawn at random: valid, stable, and a quarter of them Debian."""

from __future__ import annotations

import subprocess
from collections import Counter
from importlib import resources
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.factories.vms import shape_of
from tests.requirements import need_program

from phasewatch.errors import PlanError, UsageError
from phasewatch.lab.host_distribution import (
    DrawnMachine,
    draw_host_shapes,
    load_host_distribution,
    parse_host_distribution,
)
from phasewatch.lab.qemu_command import HostShape, VmPaths, build_qemu_command, describe_shape
from phasewatch.types import HOST_ID_PATTERN

DECLARED = resources.files("phasewatch.lab").joinpath("hosts.toml").read_text("utf-8")


def draw(count: int, seed: int = 2) -> tuple[HostShape, ...]:
    return draw_host_shapes(load_host_distribution(), count=count, seed=seed)


def build_command(shape: HostShape) -> list[str]:
    return build_qemu_command(
        shape,
        accel="tcg",
        kernel=Path("kernel"),
        initrd=Path("initrd"),
        sockets=VmPaths(folder=Path("vm")),
        mac="52:54:00:77:00:02",
        tsc_khz=None,
    )


@given(seed=st.integers(0, 2**63), count=st.integers(1, 40))
def test_every_drawn_shape_is_valid_and_builds_a_qemu_command(seed: int, count: int) -> None:
    for shape in draw(count, seed):
        command = build_command(shape)

        assert HOST_ID_PATTERN.fullmatch(shape.host_id)
        assert (shape.machine == "virt") == (shape.arch == "aarch64") == command[0].endswith("aarch64")
        assert 128 <= shape.mem_mib <= 1024
        assert 0.25 <= shape.quota_cores <= 1.0
        assert shape.vcpus in (1, 2)
        assert shape.image == "busybox" or (shape.machine in ("pc", "q35") and shape.mem_mib >= 384)
        assert shape.nic == "virtio-net" or shape.machine in ("pc", "q35")


@given(seed=st.integers(0, 2**63), count=st.integers(1, 40))
def test_at_least_a_quarter_of_any_number_of_hosts_runs_debian(seed: int, count: int) -> None:
    assert sum(shape.image == "debian" for shape in draw(count, seed)) * 4 >= count


@given(seed=st.integers(0, 2**63), fewer=st.integers(1, 20), more=st.integers(0, 20))
def test_a_shape_does_not_depend_on_the_count(seed: int, fewer: int, more: int) -> None:
    assert draw(fewer + more, seed)[:fewer] == draw(fewer, seed)


def test_seeds_give_different_hosts_and_an_equal_seed_equal_ones() -> None:
    assert draw(16, 2) == draw(16, 2)
    assert draw(16, 2) != draw(16, 3)


def test_ids_are_unique_and_name_distribution_number_and_machine() -> None:
    shapes = draw(16)

    assert len({shape.host_id for shape in shapes}) == 16
    assert [shape.host_id for shape in shapes] == [f"v2-{i:02d}-{shape.machine}" for i, shape in enumerate(shapes)]


def test_the_first_hosts_of_lab_v2_are_these() -> None:  # a change of the draw would rename recorded hosts
    first, second = draw(2)

    assert (first.host_id, first.image, first.cpu, first.mem_mib, first.quota_cores) == (
        "v2-00-q35", "debian", "EPYC-v1", 672, 0.8,
    )  # fmt: skip
    assert (second.host_id, second.image, second.cpu, second.mem_mib, second.quota_cores) == (
        "v2-01-q35", "busybox", "Westmere-v1", 352, 0.5,
    )  # fmt: skip


def test_every_machine_cpu_and_network_card_is_drawn_in_a_large_sample() -> None:
    distribution = load_host_distribution()
    shapes = [shape for seed in range(10) for shape in draw(100, seed)]

    for machine in distribution.machines:
        mine = [shape for shape in shapes if shape.machine == machine.machine]
        assert {shape.cpu for shape in mine} == set(machine.cpus)
        assert {shape.nic for shape in mine} == set(machine.nics)
    assert Counter(shape.vcpus for shape in shapes).keys() == {1, 2}
    assert {shape.cache for shape in shapes} == {"writeback", "none"}


def test_facts_of_a_shape_hold_its_draw_and_its_quota() -> None:
    facts = describe_shape(draw(4)[3])

    assert (facts["drawn"], facts["quota_cores"], facts["machine"], facts["nic"]) == (
        "v2/2/3", 0.7, "microvm", "virtio-net",
    )  # fmt: skip
    assert "drawn" not in describe_shape(shape_of())


@pytest.mark.parametrize(("count", "seed"), [(0, 1), (101, 1), (4, -1)])
def test_count_or_seed_out_of_range_is_refused(count: int, seed: int) -> None:
    with pytest.raises(PlanError, match=r"drawn_hosts: .* expected"):
        draw(count, seed)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("quota_cores = [0.25, 1.0", "quota_cores = [0.0, 1.0", "ranges.quota_cores"),
        ("mem_mib = [128, 1024", "mem_mib = [2048, 1024", "ranges.mem_mib"),
        ("debian_mem_mib = [384", "debian_mem_mib = [128", "ranges.debian_mem_mib"),
        ("debian_every = 4", "debian_every = 0", "debian_every"),
        ("vcpus = [1, 1, 1, 2]", "vcpus = []", "vcpus: expected at least one"),
        ("vcpus = [1, 1, 1, 2]", "vcpus = [0]", "at least one vCPU"),
        ('name = "v2"', 'name = "V2"', "name 'V2'"),
        ('arch = "aarch64"', 'arch = "x86_64"', "virt is aarch64"),
        ('images = ["busybox", "debian"]', 'images = ["busybox"]', "none has the image debian"),
        ("weight = 2", "weight = 0", "weight 0"),
        ('nics = ["virtio-net"]', 'nics = ["vmxnet3"]', "vmxnet3 and debian need pc or q35"),
        ('machine = "virt"', 'machine = "raspi"', "Invalid enum value"),
        ("data_mib", "data_mb", "unknown field"),
    ],
)
def test_distribution_that_allows_an_impossible_host_is_refused(old: str, new: str, says: str) -> None:
    assert old in DECLARED

    with pytest.raises(PlanError, match=says):
        parse_host_distribution(DECLARED.replace(old, new), where="hosts.toml")


@pytest.mark.parametrize("machine", ["microvm", "virt"])
def test_network_card_that_does_not_fit_the_machine_is_refused(machine: str) -> None:
    with pytest.raises(UsageError, match="no network card 'vmxnet3'"):
        build_command(shape_of(machine=machine, nic="vmxnet3"))


def test_drawn_network_card_stands_in_the_command() -> None:
    assert any(part.startswith("vmxnet3,netdev=n0") for part in build_command(shape_of(nic="vmxnet3")))


@pytest.mark.vm
@pytest.mark.parametrize("machine", load_host_distribution().machines, ids=lambda machine: machine.machine)
def test_qemu_accepts_every_cpu_and_network_card_of_a_machine(tmp_path: Path, machine: DrawnMachine) -> None:
    need_program(f"qemu-system-{machine.arch}", "qemu-system-x86 qemu-system-arm")
    need_program("qemu-img", "qemu-utils")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "disk.qcow2", "1M"], check=True)
    for cpu, nic in [*product(machine.cpus, ["virtio-net"]), *product(machine.cpus[:1], machine.nics)]:
        command = build_qemu_command(
            shape_of(machine=machine.machine, arch=machine.arch, cpu=cpu, nic=nic, vcpus=2),
            accel="tcg",
            kernel=None,
            initrd=None,
            sockets=VmPaths(folder=tmp_path),
            mac="52:54:00:77:00:02",
            tsc_khz=None,
        )
        done = subprocess.run(
            [*command, "-S", "-monitor", "stdio"], input="quit\n", capture_output=True, text=True, check=False
        )

        assert done.returncode == 0, done.stderr
