"""QEMU command lines of host shapes, boots and retries of a VM, and cleanup of processes and folders."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.factories.monitors import FakeMonitor
from tests.factories.vms import shape_of
from tests.requirements import need_program

from phasewatch.errors import BootError, UsageError
from phasewatch.lab import process
from phasewatch.lab.guest_image import GuestImage
from phasewatch.lab.host import AcceleratorChoice, choose_accelerator, find_kvm_obstacle
from phasewatch.lab.qemu_command import HostShape, VmPaths, build_qemu_command
from phasewatch.lab.vm import (
    BOOT_RULES,
    BootRule,
    QemuVm,
    VmSettings,
    choose_lab_jit_use,
    find_boot_rule,
    wait_with_notices,
)
from phasewatch.telemetry.base import HostClock
from phasewatch.telemetry.qmp import JitUse
from phasewatch.types import SourceKind

FLAGS = "processor: 0\nflags\t\t: fpu vmx sse\n"


def command_of(shape: HostShape, *, accel: str = "tcg", tsc_khz: int | None = 2_596_138) -> str:
    return " ".join(
        build_qemu_command(
            shape,
            accel=accel,
            kernel=Path("K"),
            initrd=Path("I"),
            sockets=VmPaths(folder=Path("/d")),
            mac="m",
            tsc_khz=tsc_khz,
        )
    )


def test_pc_has_pci_devices_and_a_bounded_serial_console() -> None:
    command = command_of(shape_of(machine="pc"))

    assert command.startswith("qemu-system-x86_64 ")
    assert "-device virtio-blk-pci,drive=d0,id=blk0" in command
    assert "ringbuf,id=con,size=65536" in command
    assert "-append console=ttyS0 panic=-1 ipv6.disable=1 -" in command
    assert "quiet" not in command


def test_root_disk_is_read_only_and_comes_after_the_data_disk() -> None:
    words = build_qemu_command(
        shape_of(machine="q35"),
        accel="tcg",
        kernel=Path("K"),
        initrd=Path("I"),
        sockets=VmPaths(folder=Path("/d")),
        mac="m",
        tsc_khz=None,
        root_disk=Path("/c/root.raw"),
    )

    assert "file=/c/root.raw,if=none,id=root0,format=raw,readonly=on" in words
    assert words.index("virtio-blk-pci,drive=d0,id=blk0") < words.index("virtio-blk-pci,drive=root0,id=root_disk")


def test_debian_gets_more_time_to_boot() -> None:
    assert find_boot_rule(shape_of(image="debian")) == BOOT_RULES["debian"]
    assert find_boot_rule(shape_of(machine="microvm")) == BOOT_RULES["microvm"]
    assert find_boot_rule(shape_of()) == BOOT_RULES[""]


def test_only_network_is_the_sink_socket() -> None:
    command = command_of(shape_of(machine="q35"))

    assert "-nodefaults" in command
    assert "-netdev dgram,id=n0,local.type=unix,local.path=/d/q.sock,remote.type=unix,remote.path=/d/p.sock" in command
    assert command.count("-netdev") == 1


def test_microvm_has_mmio_devices_and_the_tsc_rate() -> None:
    command = command_of(shape_of(machine="microvm"))

    assert "-machine microvm,rtc=on,x-option-roms=off,pit=on,pic=on" in command
    assert "virtio-net-device,netdev=n0,id=nic0,mac=m -" in command
    assert "-pci" not in command
    assert "tsc_early_khz=2596138 tsc=reliable" in command  # or a quota makes the guest's clock slow


def test_arm_guest_has_its_own_console() -> None:
    command = command_of(shape_of(machine="virt", arch="aarch64", cpu="cortex-a57"))

    assert command.startswith("qemu-system-aarch64 ")
    assert "console=ttyAMA0" in command


def test_throttled_uncached_disk_has_drive_options() -> None:
    assert "cache=none,discard=unmap,throttling.iops-total=150 " in command_of(shape_of(cache="none", iops=150))


def test_two_vcpus_under_tcg_use_two_threads() -> None:
    assert "-accel tcg,thread=multi -cpu max -smp 2" in command_of(shape_of(vcpus=2))


def test_kvm_has_no_fallback_accelerator() -> None:
    assert "-accel kvm -cpu" in command_of(shape_of(vcpus=2), accel="kvm")


def test_unknown_machine_is_refused() -> None:
    with pytest.raises(UsageError, match="no machine 'pdp11'; known: pc, q35, microvm, virt"):
        command_of(shape_of(machine="pdp11"))


@pytest.mark.parametrize(
    ("cpuinfo", "modules", "device", "arch", "says"),
    [
        pytest.param(FLAGS, {"kvm", "kvm_pvm"}, True, "x86_64", "kvm_pvm", id="a host that is a guest itself"),
        pytest.param("flags\t: fpu\n", {"kvm"}, True, "x86_64", "no vmx or svm", id="no hardware virtualisation"),
        pytest.param(FLAGS, {"kvm"}, False, "x86_64", "/dev/kvm", id="no device"),
        pytest.param(FLAGS, {"kvm"}, True, "aarch64", "the guest is aarch64", id="another architecture"),
    ],
)
def test_obstacle_to_kvm_is_named(cpuinfo: str, modules: set[str], device: bool, arch: str, says: str) -> None:
    found = find_kvm_obstacle(cpuinfo, frozenset(modules), device=device, arch=arch, host_arch="x86_64")

    assert found is not None
    assert says in found


def test_no_obstacle_means_that_a_boot_must_decide() -> None:
    assert find_kvm_obstacle(FLAGS, frozenset({"kvm"}), device=True, arch="x86_64", host_arch="x86_64") is None


def test_foreign_architecture_is_never_tried_on_kvm(tmp_path: Path) -> None:
    def never(*_: object) -> bool:
        raise AssertionError

    arch = "x86_64" if os.uname().machine == "aarch64" else "aarch64"
    found = choose_accelerator(arch=arch, files=never, cache=tmp_path, qemu_version="7", boots=never)

    assert found == AcceleratorChoice(accel="tcg", why=f"the guest is {arch}, the host {os.uname().machine}")


def start_of(tmp_path: Path, machine: str = "pc") -> VmSettings:
    image = GuestImage(**image_fields(tmp_path))
    return VmSettings(
        shape=shape_of(machine=machine),
        image=image,
        accel="tcg",
        folder=tmp_path / "vm",
        number=0,
        cores=(),
        tsc_khz=None,
        clock=HostClock(),
    )


def image_fields(tmp_path: Path) -> dict[str, object]:
    disk = tmp_path / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1M"], check=True)
    return {
        "kernel": tmp_path / "absent",
        "initrd": tmp_path / "absent",
        "base_disk": disk,
        "kernel_release": "6",
        "digest": "0",
    }


def test_boot_deadline_doubles_after_every_second_attempt() -> None:
    assert list(BOOT_RULES["microvm"].deadlines_s()) == [15.0, 15.0, 30.0, 30.0, 60.0, 60.0]
    assert list(BootRule(deadline_s=300.0, tries=1).deadlines_s()) == [300.0]


def test_vm_with_a_part_of_a_core_may_boot_for_longer() -> None:
    assert find_boot_rule(shape_of()).deadline_s == 45.0
    assert find_boot_rule(shape_of(quota_cores=0.25)).deadline_s == 180.0
    assert find_boot_rule(shape_of(vcpus=2)).deadline_s == 45.0


@pytest.mark.parametrize(("accelerator", "sampled"), [("tcg", True), ("kvm", False)])
def test_registers_are_sampled_only_under_tcg(tmp_path: Path, accelerator: str, sampled: bool) -> None:
    need_program("qemu-img", "qemu-utils")
    monitor = FakeMonitor()
    vm = QemuVm(replace(start_of(tmp_path), accel=accelerator))
    vm._qemu, vm._monitor, vm._sink = cast(Any, SimpleNamespace(pid=1)), monitor, cast(Any, SimpleNamespace())

    async def open_and_close() -> None:
        (qmp,) = (source for source in vm.sources() if source.source is SourceKind.QMP)
        await qmp.open()
        await qmp.close()

    asyncio.run(open_and_close())

    assert bool(monitor.asked) is sampled


def test_the_end_of_the_console_holds_what_an_earlier_notice_has_read(tmp_path: Path) -> None:
    class ForgetfulMonitor(FakeMonitor):
        """Forgets what was read, as QEMU's ring buffer does."""

        async def ask(self, command: str, **arguments: object) -> Any:
            return texts.pop(0)

    texts = ["booting\nno driver here\n", ""]
    vm = QemuVm(start_of(tmp_path))
    vm._monitor = ForgetfulMonitor()

    assert [asyncio.run(vm._read_console()) for _ in range(2)] == ["booting | no driver here"] * 2


def test_other_vms_are_sampled_while_the_disk_of_a_stopped_one_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_program("qemu-img", "qemu-utils")
    has_sampled = threading.Event()
    deleted = []

    def delete(folder: Path, *, ignore_errors: bool) -> None:
        assert has_sampled.wait(20)
        deleted.append(folder)

    monkeypatch.setattr("phasewatch.lab.vm.shutil.rmtree", delete)

    async def stop_beside_a_sampler() -> None:
        asyncio.get_running_loop().call_soon(has_sampled.set)
        await QemuVm(start_of(tmp_path)).stop()

    asyncio.run(stop_beside_a_sampler())

    assert deleted == [tmp_path / "vm"]


@pytest.mark.vm
def test_failed_start_is_explained_and_leaves_nothing(tmp_path: Path) -> None:
    need_program("qemu-system-x86_64", "qemu-system-x86")
    vm = QemuVm(start_of(tmp_path))

    with pytest.raises(BootError, match=r"did not boot in 3 tries; try 1: QEMU ended with 1: .*absent"):
        asyncio.run(vm.boot())

    assert not (tmp_path / "vm").exists()


def test_child_dies_when_its_parent_is_killed() -> None:
    code = (
        "import asyncio, sys\nfrom phasewatch.lab import process\n"
        "async def main():\n"
        "    child = await process.start_process(['sleep', '60'], log=sys.stderr)\n"
        "    print(child.pid, flush=True)\n    await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()

    assert gone(lambda: not Path(f"/proc/{child}/stat").exists() or " Z " in Path(f"/proc/{child}/stat").read_text())


def test_scratch_folder_is_removed_when_the_recorder_is_killed(tmp_path: Path) -> None:
    code = (
        f"import time\nfrom pathlib import Path\nfrom phasewatch.lab import process\n"
        f"with process.create_scratch_folder(Path({str(tmp_path)!r})) as folder:\n"
        "    (folder / 'disk').write_text('x')\n    print(folder, flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        folder = Path(parent.stdout.readline().decode().strip())
        assert (folder / "disk").exists()
        assert folder.stat().st_mode & 0o777 == 0o700
        parent.send_signal(signal.SIGKILL)

    assert gone(lambda: not folder.exists())


def test_scratch_folder_is_removed_at_a_regular_end(tmp_path: Path) -> None:
    with process.create_scratch_folder(tmp_path) as folder:
        (folder / "disk").write_text("x")

    assert list(tmp_path.iterdir()) == []


def gone(is_gone: object) -> bool:
    """Wait for another process's deed: there is no clock to hand it."""
    for _ in range(500):
        if is_gone():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


def test_slow_boot_is_reported_at_intervals() -> None:
    told: list[float] = []

    async def main() -> None:
        word: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def tell(waited_s: float, deadline_s: float) -> None:
            told.append(waited_s)
            if len(told) == 3:
                word.set_result(None)

        await wait_with_notices((word,), 1000.0, tell, every_s=0.001)
        assert word.done()

    asyncio.run(main())

    assert told == pytest.approx([0.001, 0.002, 0.003])


def test_boot_wait_ends_at_its_deadline() -> None:
    told: list[float] = []

    async def main() -> None:
        async def tell(waited_s: float, deadline_s: float) -> None:
            told.append(waited_s)

        await wait_with_notices((asyncio.get_running_loop().create_future(),), 0.003, tell, every_s=0.002)

    asyncio.run(main())

    assert told == [0.002]


def test_translation_counters_are_not_asked_in_a_debian_guest() -> None:
    assert choose_lab_jit_use(shape_of(image="debian", mem_mib=512)) is JitUse.NEVER
    assert choose_lab_jit_use(shape_of()) is JitUse.ALWAYS
