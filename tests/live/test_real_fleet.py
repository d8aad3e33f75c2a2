"""Watch several real QEMU processes with one watcher, kill one, start one, kill the watcher: nothing is left behind."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.live.test_real_vm import BALLOON, EDGE, ask, children_of, filters, interval, wait_for
from tests.requirements import need_program

from phasewatch.live.state import STATE_FILE
from phasewatch.telemetry.qmp import BALLOON_POLLING_PROPERTY

pytestmark = pytest.mark.vm

COMMAND = [sys.executable, "-m", "phasewatch", "watch", "--model", str(EDGE), "--json"]


class RealVms:
    """Tiny real VMs whose guests never run; their names begin with a prefix that no other VM has."""

    def __init__(self, folder: Path) -> None:
        self.prefix = f"pw-test-{secrets.token_hex(6)}-"
        self._folder = folder
        self._qemu = need_program("qemu-system-x86_64", "qemu-system-x86")
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        door = self.door(name)
        argv = [
            *(self._qemu, "-S", "-name", self.prefix + name, "-nodefaults", "-display", "none", "-machine", "pc"),
            *("-accel", "tcg", "-m", "32", "-qmp", f"unix:{door},server=on,wait=off"),
            *("-netdev", "user,id=n0,restrict=on", "-device", "virtio-net-pci,netdev=n0,romfile="),
            *("-device", "virtio-balloon-pci,id=balloon0"),
            *("-blockdev", "driver=null-co,node-name=z0,size=1048576,read-zeroes=on"),
            *("-device", "virtio-blk-pci,drive=z0"),
        ]
        self.children[name] = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def set_interval(self, name: str) -> None:
        assert wait_for(self.door(name).exists)
        ask(self.door(name), "qom-set", path=BALLOON, property=BALLOON_POLLING_PROPERTY, value=3)

    def door(self, name: str) -> Path:
        return self._folder / f"{name}.sock"

    def kill(self, name: str) -> None:
        child = self.children.pop(name)
        child.kill()
        child.wait()

    def are_untouched(self) -> bool:
        return all(filters(self.door(name)) == [] and interval(self.door(name)) == 3 for name in self.children)


class Watcher:
    """A running `watch --json` whose lines are collected."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def kinds(self) -> dict[str, str]:
        """Return the newest status of each VM by the end of its name."""
        rows = [line["vm"] for line in tuple(self.lines) if "vm" in line]
        return {row["name"].rsplit("-", 1)[1]: row["kind"] for row in rows}

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._reader.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


def wait_long(condition: Callable[[], bool]) -> bool:
    return wait_for(condition, 60.0)


@pytest.fixture
def vms(tmp_path: Path) -> Iterator[RealVms]:
    found = RealVms(tmp_path)
    for name in ("a", "b", "c"):
        found.start(name)
    for name in ("a", "b", "c"):
        found.set_interval(name)
    yield found
    for name in tuple(found.children):
        found.kill(name)


def test_a_fleet_follows_real_vms_and_a_killed_watcher_leaves_them_as_they_were(vms: RealVms, tmp_path: Path) -> None:
    state = tmp_path / "state"
    watcher = Watcher("--match", f"{vms.prefix}*", "--state", str(state))
    try:
        assert wait_long(lambda: watcher.kinds() == {"a": "watched", "b": "watched", "c": "watched"})
        guards = children_of(watcher.process.pid)
        began_s = time.monotonic()
        vms.start("d")
        assert wait_long(lambda: watcher.kinds().get("d") == "watched")
        took_s = time.monotonic() - began_s
        vms.kill("a")
        assert wait_long(lambda: watcher.kinds()["a"] == "gone")
        n_lines = len(watcher.lines)
        assert wait_long(
            lambda: (
                {line["data"]["vm"][-1] for line in watcher.lines[n_lines:] if line.get("type") == "phase"}
                == {"b", "c", "d"}
            )
        )
        assert wait_long((state / STATE_FILE).exists)
    finally:
        watcher.kill()

    assert len(guards) == 1
    assert took_s < 15  # 5 s on a machine that is not busy
    assert wait_long(lambda: all(filters(vms.door(name)) == [] for name in vms.children))
    assert wait_long(lambda: all(interval(vms.door(name)) == 3 for name in ("b", "c")))
    assert wait_long(lambda: not list(Path("/dev/shm").glob(f"phasewatch-{watcher.process.pid}-*")))


def test_the_next_watch_removes_what_a_killed_watcher_and_cleanup_process_left_in_every_vm(vms: RealVms) -> None:
    watcher = Watcher("--match", f"{vms.prefix}*")
    try:
        assert wait_long(lambda: list(watcher.kinds().values()) == ["watched"] * 3)
        for guard in children_of(watcher.process.pid):
            os.kill(guard, signal.SIGKILL)
    finally:
        watcher.kill()
    assert not vms.are_untouched()

    done = subprocess.run(
        [*COMMAND, "--match", f"{vms.prefix}*", "--seconds", "12"],
        capture_output=True,
        text=True,
        timeout=300,
    )

    result = json.loads(done.stdout.splitlines()[-1])["result"]
    assert (result["left_as_found"], len(result["vms"])) == (True, 3), done.stderr
    assert vms.are_untouched()
    assert not list(Path("/dev/shm").glob(f"phasewatch-{watcher.process.pid}-*"))


def test_a_cleanup_process_that_is_killed_is_replaced_and_cleans_up(vms: RealVms) -> None:
    watcher = Watcher("--match", f"{vms.prefix}*")
    try:
        assert wait_long(lambda: list(watcher.kinds().values()) == ["watched"] * 3)
        (first,) = children_of(watcher.process.pid)
        os.kill(first, signal.SIGKILL)
        assert wait_long(lambda: children_of(watcher.process.pid) not in ([], [first]))
    finally:
        watcher.kill()

    assert wait_long(vms.are_untouched)
