"""The choice between KVM and TCG rests on a kernel that boots."""

from __future__ import annotations

from pathlib import Path

import pytest

from phasewatch.lab import host
from phasewatch.lab.guest_image import GuestImage
from phasewatch.lab.host import AcceleratorChoice, boots_on_kvm, choose_accelerator

IMAGE = GuestImage(kernel=Path("/k"), initrd=Path("/i"), base_disk=Path("/d"), kernel_release="6", digest="0")


@pytest.fixture
def promising(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which everything short of a boot says yes."""
    monkeypatch.setattr(host, "find_kvm_obstacle", lambda *_, **__: None)


def asked(cache: Path, *, works: bool, calls: list[str]) -> AcceleratorChoice:
    def boots(image: GuestImage, arch: str) -> bool:
        calls.append(arch)
        return works

    return choose_accelerator(arch="x86_64", files=lambda: IMAGE, cache=cache, qemu_version="7.2", boots=boots)


@pytest.mark.usefixtures("promising")
def test_kvm_is_not_used_if_no_kernel_boots_and_is_tested_once(tmp_path: Path) -> None:
    calls: list[str] = []

    first, second = asked(tmp_path, works=False, calls=calls), asked(tmp_path, works=True, calls=calls)

    assert first == second == AcceleratorChoice(accel="tcg", why="no kernel booted on KVM within 15 s")
    assert calls == ["x86_64"]


@pytest.mark.usefixtures("promising")
def test_kvm_is_used_if_a_kernel_boots(tmp_path: Path) -> None:
    assert asked(tmp_path, works=True, calls=[]).accel == "kvm"


@pytest.mark.usefixtures("promising")
def test_unreadable_cached_result_is_measured_again(tmp_path: Path) -> None:
    asked(tmp_path, works=True, calls=[])
    (kept,) = tmp_path.iterdir()
    kept.write_text("{")
    calls: list[str] = []

    assert asked(tmp_path, works=False, calls=calls).accel == "tcg"
    assert calls == ["x86_64"]


@pytest.mark.parametrize(
    ("script", "works"),
    [
        pytest.param("exec sleep 60", False, id="it hangs"),
        pytest.param("exit 0", False, id="it ends without a word"),
        pytest.param('for last; do :; done; echo "$0: KVM: entry failed" >&2; exit 1', False, id="it fails"),
        pytest.param(
            'for word; do case $word in file:*) echo "Linux version" > "${word#file:}";; esac; done',
            True,
            id="it boots",
        ),
    ],
)
def test_boot_needs_console_output_and_a_clean_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, works: bool
) -> None:
    program = tmp_path / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(host, "KVM_BOOT_DEADLINE_S", 0.5)

    assert boots_on_kvm(IMAGE, "x86_64") is works
