"""The checks of `doctor`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from phasewatch import diagnostics
from phasewatch.diagnostics import (
    OPTIONAL_PACKAGES,
    REQUIRED_PROGRAMS,
    RequirementCheck,
    SystemFacts,
    find_kvm,
    has_blocking_problem,
    inspect_system,
)
from phasewatch.lab.host import AcceleratorChoice

WHOLE = SystemFacts(
    python=(3, 11),
    cores=2,
    memory_gib=8.0,
    disk_gib=50.0,
    kvm=AcceleratorChoice(accel="kvm", why="a kernel booted on it"),
    programs={program: "QEMU version 7.2.22" for program, _, _ in REQUIRED_PROGRAMS},
    packages={package: "1" for package, _, _ in OPTIONAL_PACKAGES},
)


def check_of(name: str, **facts: object) -> RequirementCheck:
    fields = {field: getattr(WHOLE, field) for field in SystemFacts.__slots__} | facts
    return next(check for check in inspect_system(SystemFacts(**fields)) if check.name == name)


def test_complete_machine_passes_every_check() -> None:
    assert all(check.ok and not check.remedy for check in inspect_system(WHOLE))


@pytest.mark.parametrize(
    ("name", "facts", "remedy"),
    [
        pytest.param("python", {"python": (3, 10)}, "Python 3.11", id="old Python"),
        pytest.param("cores", {"cores": 1}, "one VM at a time", id="one core"),
        pytest.param("memory", {"memory_gib": 1.0}, "free 3 GiB", id="little memory"),
        pytest.param("disk", {"disk_gib": 1.0}, "free 5 GiB", id="a full disk"),
        pytest.param("cpio", {"programs": {}}, "apt-get install --no-install-recommends cpio", id="no cpio"),
        pytest.param("busybox", {"programs": {}}, "busybox-static", id="no busybox"),
        pytest.param("numpy", {"core": {"numpy": None}}, "pip install 'numpy'", id="no numpy"),
        pytest.param("torch", {"packages": {}}, "pip install 'phasewatch[train]'", id="no torch"),
        pytest.param("onnxruntime", {"packages": {}}, "pip install 'phasewatch[live]'", id="no onnxruntime"),
    ],
)
def test_missing_requirement_has_a_remedy(name: str, facts: dict[str, object], remedy: str) -> None:
    check = check_of(name, **facts)

    assert not check.ok
    assert remedy in check.remedy
    assert check.needed_for


def test_only_requirements_of_every_command_are_blocking() -> None:
    facts = {field: getattr(WHOLE, field) for field in SystemFacts.__slots__}

    assert not has_blocking_problem(
        inspect_system(SystemFacts(**facts | {"programs": {}, "packages": {}, "cores": 1, "memory_gib": 1.0}))
    )
    assert has_blocking_problem(inspect_system(SystemFacts(**facts | {"disk_gib": 0.1})))
    assert has_blocking_problem(inspect_system(SystemFacts(**facts | {"python": (3, 10)})))


def test_kvm_without_a_booting_kernel_is_not_ok_and_not_blocking() -> None:
    no = AcceleratorChoice(accel="tcg", why="no vmx or svm in /proc/cpuinfo")
    facts = {field: getattr(WHOLE, field) for field in SystemFacts.__slots__} | {"kvm": no}

    check = check_of("kvm", kvm=no)

    assert not check.ok
    assert check.found == no.why
    assert not has_blocking_problem(inspect_system(SystemFacts(**facts)))


@pytest.mark.parametrize(
    ("known", "boots", "accel"),
    [
        pytest.param(AcceleratorChoice(accel="tcg", why="/dev/kvm is not there"), True, "tcg", id="cannot work"),
        pytest.param(
            AcceleratorChoice(accel="kvm", why="a kernel booted on it"), False, "kvm", id="a recording tried it"
        ),
        pytest.param(None, True, "kvm", id="its own kernel boots"),
        pytest.param(None, False, "tcg", id="its own kernel hangs"),
    ],
)
def test_kvm_is_ok_only_if_a_kernel_booted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: AcceleratorChoice | None, boots: bool, accel: str
) -> None:
    monkeypatch.setattr(diagnostics, "read_qemu_version", lambda arch: "7.2.22")
    monkeypatch.setattr(diagnostics, "find_known_accelerator", lambda **_: known)
    monkeypatch.setattr(diagnostics, "kernel_boots_on_kvm", lambda kernel, arch: boots)
    monkeypatch.setattr(diagnostics.os, "access", lambda path, mode: True)

    assert find_kvm().accel == accel


def test_kvm_is_not_ok_if_no_kernel_can_be_booted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "read_qemu_version", lambda arch: "7.2.22")
    monkeypatch.setattr(diagnostics, "find_known_accelerator", lambda **_: None)
    monkeypatch.setattr(diagnostics.os, "access", lambda path, mode: False)

    assert find_kvm().accel == "tcg"


def test_checks_run_on_this_machine() -> None:
    names = [check.name for check in inspect_system()]

    assert len(names) == len(set(names))
    assert {"python", "disk", "qemu-img", "kvm", "lightgbm"} <= set(names)


def test_doctor_works_where_every_package_but_typer_is_missing() -> None:
    probe = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['msgspec', 'numpy', 'pyarrow', 'httpx', 'obstore', 'rich', 'backports']))\n"
        "sys.argv = ['phasewatch', 'doctor', '--json']\n"
        "from phasewatch.cli import main\n"
        "main()\n"
    )

    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stderr
    assert '"name": "kvm"' in done.stdout
