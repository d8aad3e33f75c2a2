"""The guest image: a deterministic archive, a digest over all inputs, and a boot in a VM."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest
from tests.requirements import need_program, need_qemu

from phasewatch.errors import MachineError, MissingToolError
from phasewatch.lab import debian_packages, guest_image
from phasewatch.lab.campaign import QemuFactory, RecordingOptions, default_cache
from phasewatch.lab.guest_image import CpioEntry, build_cpio_archive
from phasewatch.lab.qemu_command import find_host_shape
from phasewatch.telemetry.base import HostClock

ENTRIES = (CpioEntry(name="bin", mode=0o040755), CpioEntry(name="bin/x", mode=0o100755, data=b"hello"))


def test_equal_entries_give_equal_archives() -> None:
    archive = build_cpio_archive(ENTRIES)

    assert archive == build_cpio_archive(ENTRIES)
    assert archive.startswith(b"070701")
    assert len(archive) % 4 == 0


def test_cpio_extracts_the_archive(tmp_path: Path) -> None:
    need_program("cpio", "cpio")

    need_program("cpio", "cpio")
    subprocess.run(["cpio", "-id", "--quiet"], input=build_cpio_archive(ENTRIES), cwd=tmp_path, check=True)

    assert (tmp_path / "bin/x").read_bytes() == b"hello"
    assert (tmp_path / "bin/x").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(("aarch64", "linux-1", 64, {"a.c": b"1"}), id="another architecture"),
        pytest.param(("x86_64", "linux-2", 64, {"a.c": b"1"}), id="another kernel"),
        pytest.param(("x86_64", "linux-1", 160, {"a.c": b"1"}), id="another disk"),
        pytest.param(("x86_64", "linux-1", 64, {"a.c": b"2"}), id="another source"),
    ],
)
def test_digest_depends_on_every_input_of_the_image(other: tuple[str, str, int, dict[str, bytes]]) -> None:
    assert guest_image._compute_digest("x86_64", "linux-1", 64, {"a.c": b"1"}) != guest_image._compute_digest(*other)


def test_unknown_architecture_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="riscv64"):
        guest_image.build_guest_image(tmp_path, "riscv64")


def test_missing_tool_error_has_the_install_command() -> None:
    with pytest.raises(MissingToolError, match="apt-get install --no-install-recommends some-package"):
        debian_packages.find_tool("no-such-program-here", "some-package")


@pytest.mark.vm
def test_real_guest_boots_warms_up_infects_and_still_answers(tmp_path: Path) -> None:
    need_qemu()

    async def play() -> tuple[str, int, int]:
        options = RecordingOptions(cache=default_cache(), accel="tcg")
        factory = QemuFactory(options=options, scratch=tmp_path, clock=HostClock())
        machine = factory(find_host_shape("pc"), 0, ())
        try:
            facts = await machine.boot()
            warm = await machine.send("warmup")
            warmed = await machine.wait_finished(warm.id, timeout_s=120)
            work = await machine.send("phase", "infecting", "cryptomine", "full", "7", "infect_s=10", "infect_mb=0.2")
            infected = await machine.wait_finished(work.id, timeout_s=90)
            await machine.send("phase", "clean", "cryptomine", "full", "7")
            await machine.send("hello")
            return facts.guest_kernel, warmed, infected
        finally:
            await machine.stop()

    kernel, warmed, infected = asyncio.run(play())

    assert "cloud" in kernel
    assert (warmed, infected) == (0, 0)
