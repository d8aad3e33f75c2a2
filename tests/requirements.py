"""What a test needs from the machine: without it the test is skipped with the remedy, and under CI=true it fails."""

from __future__ import annotations

import os
import shutil

import pytest


def need_program(program: str, package: str) -> str:
    """Return the program's path, or skip (fail in CI) with the line that installs it."""
    found = shutil.which(program)
    if found is None:
        words = f"needs {program}: apt-get install --no-install-recommends {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(words)
        pytest.skip(words)
    return found


def need_qemu() -> str:
    """Return the path of the x86 emulator and make sure that the rest of what a recording needs is there."""
    for program, package in (("qemu-img", "qemu-utils"), ("cpio", "cpio"), ("mke2fs", "e2fsprogs"), ("gcc", "gcc")):
        need_program(program, package)
    return need_program("qemu-system-x86_64", "qemu-system-x86")


def need_chromium() -> str:
    """Return the path of the distribution's browser."""
    return need_program("chromium", "chromium")
