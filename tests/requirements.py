"""What a test needs from the machine: without it the test is skipped with the remedy, and under CI=true it fails."""

from __future__ import annotations

import os
import shutil

import pytest

from phasewatch.lab.campaign import default_cache
from phasewatch.lab.debian_image import find_debian_root


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


def need_debian_image() -> None:
    """Skip unless the root disk is in the cache or can be built here."""
    need_qemu()
    if find_debian_root(default_cache()) is None:
        if os.geteuid() != 0:
            pytest.skip("the Debian image is not built: run `sudo phasewatch image debian` once")
        if shutil.which("debootstrap", path="/usr/sbin:/usr/bin") is None:
            pytest.skip("needs debootstrap: apt-get install --no-install-recommends debootstrap")


def need_chromium() -> str:
    """Return the path of the distribution's browser."""
    return need_program("chromium", "chromium")
