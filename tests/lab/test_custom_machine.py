"""Custom machines: checks of disk, driver and options, the QEMU command, and QEMU's version."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.factories.vms import shape_of
from tests.requirements import need_program

from phasewatch.errors import DataError, MissingToolError, UsageError
from phasewatch.lab import campaign, host
from phasewatch.lab.custom_workload import (
    CLOUD_INIT_USER_DATA,
    CustomMachine,
    CustomMachineOptions,
    read_custom_machine,
)
from phasewatch.lab.guest_image import DEFAULT_DATA_MIB, GuestImage
from phasewatch.lab.host import parse_qemu_version, read_qemu_version
from phasewatch.lab.qemu_command import VmPaths, build_qemu_command
from phasewatch.telemetry.base import HostClock


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    need_program("qemu-img", "qemu-utils")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "My Disk.qcow2"), "1M"], check=True)
    return tmp_path / "My Disk.qcow2"


def machine_of(disk: Path, driver: Path, **options: object) -> CustomMachine:
    """Read a custom machine with these options."""
    return read_custom_machine(disk, driver, CustomMachineOptions(**options))  # type: ignore[arg-type]


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    (tmp_path / "driver.sh").write_text("#!/bin/sh\n")
    return tmp_path / "driver.sh"


def test_host_is_named_after_the_disk_by_default(disk: Path, driver: Path) -> None:
    assert machine_of(disk.rename(disk.with_name("disk-1.qcow2")), driver).shape.host_id == "disk-1"


@pytest.mark.parametrize("twin", ["my-disk", "My-Disk", "MY DISK", "диск"])
def test_disks_with_different_names_are_different_hosts(disk: Path, driver: Path, twin: str) -> None:
    other = disk.with_name(f"{twin}.qcow2")
    other.write_bytes(disk.read_bytes())

    assert machine_of(disk, driver).shape.host_id != machine_of(other, driver).shape.host_id


def test_custom_machine_never_has_the_name_of_a_lab_host(disk: Path, driver: Path) -> None:
    assert machine_of(disk.rename(disk.with_name("pc.qcow2")), driver).shape.host_id not in {"pc", ""}


@pytest.mark.parametrize("host_id", ["pc", "microvm", "sent", "refused"])
def test_reserved_host_id_is_refused(disk: Path, driver: Path, host_id: str) -> None:
    with pytest.raises(UsageError):
        machine_of(disk, driver, host_id=host_id)


def test_given_host_id_is_used(disk: Path, driver: Path) -> None:
    assert machine_of(disk, driver, host_id="web-1").shape.host_id == "web-1"


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        pytest.param({"host_id": "Web 1"}, UsageError, "--host-id 'Web 1': it must match", id="a name that cannot be"),
        pytest.param({"machine": "microvm"}, UsageError, "pc or q35", id="a machine that boots no disk"),
        pytest.param({"mem_mib": 1}, UsageError, "64 to 65536 MiB", id="no memory"),
        pytest.param({"boot_s": 0.0}, UsageError, "1 to 3600 s", id="no time to boot"),
    ],
)
def test_numbers_and_names_out_of_range_are_refused(
    disk: Path, driver: Path, changes: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        machine_of(disk, driver, **changes)


def test_disk_that_is_not_qcow2_is_refused_with_the_conversion_command(tmp_path: Path, driver: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"\xeb\x63" + bytes(510))

    with pytest.raises(DataError, match="not a qcow2 image; make one with `qemu-img convert -O qcow2"):
        machine_of(tmp_path / "disk.img", driver)


def test_driver_that_is_not_a_script_is_refused(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "driver.exe").write_bytes(b"MZ\x90")

    with pytest.raises(DataError, match="begins with `#!`"):
        machine_of(disk, tmp_path / "driver.exe")


def test_missing_file_is_named(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.sh: No such file"):
        machine_of(disk, tmp_path / "absent.sh")


def test_custom_disk_boots_and_the_driver_is_on_a_seed_disk() -> None:
    command = " ".join(
        build_qemu_command(
            shape_of(),
            accel="tcg",
            kernel=None,
            initrd=None,
            sockets=VmPaths(folder=Path("/d")),
            mac="m",
            tsc_khz=None,
            has_seed_disk=True,
        )
    )

    assert "-kernel" not in command
    assert "-append" not in command
    assert "virtio-blk-pci,drive=d0,id=blk0,bootindex=1" in command
    assert "driver=vvfat,node-name=seed0,dir=/d/seed,label=cidata,read-only=on" in command
    assert command.index("drive=d0,id=blk0") < command.index("drive=seed0"), "the guest's root would be another disk"
    assert command.count("-netdev") == 1


def test_kvm_for_a_custom_machine_is_tested_with_the_built_in_guest(
    tmp_path: Path, disk: Path, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []

    def build(cache: Path, arch: str, *, data_mib: int, scripts: object) -> GuestImage:
        built.append(data_mib)
        return GuestImage(kernel=disk, initrd=disk, base_disk=disk, kernel_release="6", digest="0")

    monkeypatch.setattr(host, "find_kvm_obstacle", lambda *_, **__: None)
    monkeypatch.setattr(host, "boots_on_kvm", lambda image, arch: True)
    monkeypatch.setattr(campaign, "build_guest_image", build)
    monkeypatch.setattr(campaign, "read_qemu_version", lambda arch: "7.2")
    own = machine_of(disk, driver)
    factory = campaign.QemuFactory(
        options=campaign.RecordingOptions(cache=tmp_path, custom_machine=own), scratch=tmp_path, clock=HostClock()
    )

    assert factory.prepare(own.shape) == (own.image, "kvm")
    assert built == [DEFAULT_DATA_MIB], "mke2fs fills no disk from a folder that is not there"


def test_cloud_init_starts_the_driver() -> None:
    assert CLOUD_INIT_USER_DATA.startswith("#cloud-config\nbootcmd:\n")
    assert "LABEL=cidata" in CLOUD_INIT_USER_DATA


# --- which QEMU -----------------------------------------------------------------------------------------------------


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Write a program in QEMU's place."""
    program = folder / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_qemu_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "echo 'QEMU emulator version 9.2.1 (Debian 1:9.2.1+ds-1)'")

    assert read_qemu_version("x86_64") == "9.2.1"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        pytest.param("echo 'QEMU emulator version 6.2.0'", r"version 6\.2\.0; 7\.2 or newer is needed", id="too old"),
        pytest.param("echo 'Bochs 2.7'", "of version unknown; 7", id="something else"),
        pytest.param("exit 1", "does not run .*apt-get install qemu-system-x86", id="broken"),
    ],
)
def test_unsuitable_qemu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str) -> None:
    stand_in(tmp_path, monkeypatch, script)

    with pytest.raises(MissingToolError, match=says):
        read_qemu_version("x86_64")


def test_missing_qemu_error_has_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(MissingToolError, match="apt-get install qemu-system-arm"):
        read_qemu_version("aarch64")


def test_oldest_accepted_qemu_has_netdev_dgram() -> None:
    assert host.MIN_QEMU_VERSION == (7, 2)
    assert parse_qemu_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)")[1] >= (7, 2)
