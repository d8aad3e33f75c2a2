"""A recorder that ends, in whatever way, leaves no process, no CPU group, no socket and no overlay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.requirements import need_qemu

from phasewatch.errors import CgroupError
from phasewatch.lab import process
from phasewatch.lab.cgroup import CpuController, open_cpu_controller

PLAN = """
name = "short"
seed = 1
lab_per_host = 0
commission_per_host = 2
soak_per_host = 0
parallel_vms = 2
[drawn_hosts]
count = 2
seed = 2
"""
RECORDER = """
import asyncio, sys
from pathlib import Path
from phasewatch.lab import process
from phasewatch.lab.cgroup import open_cpu_controller

async def main():
    group = open_cpu_controller().create_group(1)
    child = await process.start_process(["sleep", "60"], log=sys.stderr, members_file=group.members_file)
    with process.create_scratch_folder(Path(sys.argv[1])) as folder:
        print(group.folder, folder, child.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def controller() -> CpuController:
    try:
        return open_cpu_controller()
    except CgroupError as exc:
        pytest.skip(str(exc))


def wait_until(is_true: Callable[[], object]) -> bool:
    """Wait for another process's deed: there is no clock to hand it."""
    for _ in range(3000):
        if is_true():
            return True
        time.sleep(0.02)
    return False


def list_group_processes(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]


def is_dead(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return " Z " in stat.read_text()
    except OSError:
        return True


def list_own_groups(controller: CpuController, pid: int) -> list[Path]:
    return [path for path in controller.folder.glob(f"phasewatch-{pid}.*") if not path.name.endswith(".0")]


def test_child_joins_its_group_before_it_runs_and_the_next_start_sweeps_what_a_kill_left(
    tmp_path: Path, controller: CpuController
) -> None:
    with subprocess.Popen([sys.executable, "-c", RECORDER, tmp_path], stdout=subprocess.PIPE, text=True) as recorder:
        assert recorder.stdout is not None
        group, folder, child = recorder.stdout.readline().split()
        assert list_group_processes(Path(group)) == [int(child)]
        open_cpu_controller()  # a second recorder, while the first one lives
        assert Path(group).exists()
        recorder.send_signal(signal.SIGKILL)

    assert wait_until(lambda: is_dead(int(child)))
    assert wait_until(lambda: not Path(folder).exists())
    assert wait_until(lambda: open_cpu_controller() and not Path(group).exists())


def test_scratch_folder_of_a_recorder_that_was_killed_with_its_guard_is_swept(tmp_path: Path) -> None:
    dead = tmp_path / "pw-dead"
    dead.mkdir()
    (dead / "disk.qcow2").write_bytes(b"x")
    other = tmp_path / "other"
    other.mkdir()

    with process.create_scratch_folder(tmp_path) as alive:
        assert process.sweep_scratch_folders(tmp_path) == 1
        assert (alive.exists(), dead.exists(), other.exists()) == (True, False, True)


@pytest.mark.vm
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_stopped_recorder_leaves_no_process_group_socket_or_overlay(
    tmp_path: Path, controller: CpuController, number: signal.Signals
) -> None:
    need_qemu()
    scratch, plan = tmp_path / "t", tmp_path / "short.toml"
    scratch.mkdir()
    plan.write_text(PLAN)
    command = [sys.executable, "-m", "phasewatch", "record", "--plan", plan, "--out", tmp_path / "store"]
    recorder = subprocess.Popen(
        [*command, "--hosts", "v2-01-q35", "--idle-wait", "0"],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert wait_until(lambda: recorder.poll() is not None or len(list(scratch.glob("pw-*/*/ctl.sock"))) == 2), (
            "no VM started"
        )
        groups = list_own_groups(controller, recorder.pid)
        machines = [pid for group in groups for pid in list_group_processes(group)]
        assert (len(groups), len(machines)) == (2, 2), recorder.stderr and recorder.stderr.read()
        recorder.send_signal(number)
        _, error = recorder.communicate(timeout=60)
    finally:
        recorder.kill()

    assert recorder.returncode != 0, error
    assert wait_until(lambda: all(is_dead(pid) for pid in machines))
    assert wait_until(lambda: not list(scratch.iterdir()))
    if number == signal.SIGKILL:
        open_cpu_controller()  # the sweep of the next start
    assert wait_until(lambda: not list_own_groups(controller, recorder.pid) or open_cpu_controller() is None)
    assert not list((tmp_path / "store").rglob("*.tar.zst"))
