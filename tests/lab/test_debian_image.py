"""The Debian image: refusals that name the remedy, nothing left of a failed build, and its mirror and packages."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.requirements import need_program

from phasewatch.errors import MachineError, MissingToolError
from phasewatch.lab.debian_image import DebianTools, build_debian_image, parse_package_list
from phasewatch.lab.debian_packages import DebianMirror, select_mirror

MIRROR = DebianMirror(uri="http://mirror.example/debian", proxy="")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="builds as root only")


def debootstrap_of(folder: Path, text: str) -> str:
    """Write a program that stands in for debootstrap; its last two arguments are the tree and the mirror."""
    program = folder / "debootstrap"
    program.write_text(f"#!/bin/sh\nfor word; do tree=$mirror; mirror=$word; done\n{text}\n")
    program.chmod(0o755)
    return str(program)


def tools_of(folder: Path, text: str, *, user_id: int = 0, needed_bytes: int = 0) -> DebianTools:
    return DebianTools(
        user_id=user_id, needed_bytes=needed_bytes, debootstrap=debootstrap_of(folder, text), mirror=MIRROR
    )


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != ".lock")


def test_build_without_root_is_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    with pytest.raises(MissingToolError, match="sudo phasewatch image debian"):
        build_debian_image(tmp_path / "cache", tools=tools_of(tmp_path, "exit 0", user_id=1000))

    assert left_in(tmp_path / "cache") == []


def test_build_on_a_disk_without_room_is_refused_before_it_starts(tmp_path: Path) -> None:
    tools = tools_of(tmp_path, f"touch {tmp_path}/started", needed_bytes=10**18)

    with pytest.raises(MachineError, match="GB are free; make room"):
        build_debian_image(tmp_path / "cache", tools=tools)

    assert not (tmp_path / "started").exists()


@needs_root
def test_failed_debootstrap_is_reported_with_its_last_line_and_leaves_nothing(tmp_path: Path) -> None:
    need_program("unshare", "util-linux")
    tools = tools_of(tmp_path, 'mkdir "$tree"; echo "E: Failed getting release file $mirror/Release" >&2; exit 1')

    with pytest.raises(MachineError, match=r"debootstrap ended with 1 .*Failed getting release file.*apt-get update"):
        build_debian_image(tmp_path / "cache", tools=tools)

    assert left_in(tmp_path / "cache") == []


@needs_root
def test_killed_build_leaves_no_mount_and_no_process_and_the_next_one_sweeps_its_files(tmp_path: Path) -> None:
    need_program("unshare", "util-linux")
    cache = tmp_path / "cache"
    slow = f'mkdir "$tree" && mount -t tmpfs x "$tree" && echo $$ >{tmp_path}/started && sleep 600'
    program = debootstrap_of(tmp_path, slow)
    code = (
        "from pathlib import Path\n"
        "from phasewatch.lab.debian_image import DebianTools, build_debian_image\n"
        "from phasewatch.lab.debian_packages import DebianMirror\n"
        "mirror = DebianMirror(uri='', proxy='')\n"
        f"tools = DebianTools(user_id=0, needed_bytes=0, debootstrap={program!r}, mirror=mirror)\n"
        f"build_debian_image(Path({str(cache)!r}), tools=tools)"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as build:
        wait_until(lambda: (tmp_path / "started").exists())
        build.kill()

    wait_until(lambda: not any(program in words for words in read_command_lines()))
    assert str(cache) not in Path("/proc/self/mounts").read_text()
    assert len(left_in(cache)) == 1

    with pytest.raises(MachineError):
        build_debian_image(cache, tools=tools_of(tmp_path, "exit 1"))

    assert left_in(cache) == []


def read_command_lines() -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode(errors="replace"))
        except OSError:  # it has ended meanwhile
            continue
    return lines


def wait_until(is_true, deadline_s: float = 60.0) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + deadline_s
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_mirror_is_that_of_the_release_and_not_of_other_archives() -> None:
    targets = (
        "http://other.example/\tbookworm\tmain\tOther\tOther\n"
        "http://security.example/\tbookworm-security\tmain\tDebian\tDebian-Security\n"
        "http://mirror.example/debian/\tbookworm\tmain\tDebian\tDebian\n"
    )

    assert select_mirror(targets, "bookworm") == "http://mirror.example/debian/"


def test_absent_mirror_is_an_error_with_the_line_to_add() -> None:
    with pytest.raises(MissingToolError, match="deb MIRROR bookworm main"):
        select_mirror("http://mirror.example/\ttrixie\tmain\tDebian\tDebian\n", "bookworm")


def test_package_list_has_comments() -> None:
    assert parse_package_list("# base\nsystemd dbus # more\n\ngcc\n") == ("systemd", "dbus", "gcc")
