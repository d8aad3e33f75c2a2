"""CPU quotas by cgroup: fake trees of both versions, and the real kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from phasewatch.errors import CgroupError
from phasewatch.lab.cgroup import (
    CgroupFolders,
    CpuController,
    CpuGroup,
    find_cpu_controllers,
    open_cpu_controller,
    sweep_dead_groups,
)

STAT = "7 (a (bad) name) S " + " ".join(str(field) for field in range(4, 22)) + " 4242 0 0\n"


class FakeKernel:
    """Fills a new group with files, as the kernel does; version 2 only below folders where the controller is on."""

    def __init__(self, root: Path, *, version: int) -> None:
        self.version, self.proc, self.mount = version, root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "7").mkdir()
        for process in ("self", "7"):
            (self.proc / process / "stat").write_text(STAT)
        options = "rw,cpu,cpuacct" if version == 1 else "rw"
        kind = "cgroup" if version == 1 else "cgroup2"
        (self.proc / "self" / "mounts").write_text(
            f"tmpfs /tmp tmpfs rw 0 0\n{kind} {self.mount} {kind} {options} 0 0\n"
        )
        (self.proc / "self" / "cgroup").write_text("4:cpu,cpuacct:/job\n" if version == 1 else "0::/slice/job\n")
        self.folders = CgroupFolders(make=self.make, remove=shutil.rmtree)
        self.mount.mkdir()
        self.fill(self.mount)
        for name in ("job",) if version == 1 else ("slice", "slice/job"):
            self.make(self.mount / name)

    def make(self, folder: Path) -> None:
        folder.mkdir()
        self.fill(folder)

    def fill(self, folder: Path) -> None:
        (folder / "cgroup.procs").touch()
        if self.version == 1:
            (folder / "cpu.cfs_quota_us").write_text("-1\n")
            (folder / "cpu.cfs_period_us").write_text("50000\n")
            (folder / "cpu.stat").write_text("nr_periods 3\nnr_throttled 1\nthrottled_time 2500000000\n")
            return
        (folder / "cgroup.controllers").write_text("cpu memory\n")
        (folder / "cgroup.subtree_control").write_text("\n")
        above = folder.parent / "cgroup.subtree_control"
        if above.exists() and "cpu" in above.read_text():
            (folder / "cpu.max").write_text("max 100000\n")
            (folder / "cpu.stat").write_text("usage_usec 9\nnr_throttled 1\nthrottled_usec 2500000\n")

    def open(self) -> CpuController:
        return open_cpu_controller(proc=self.proc, folders=self.folders)

    def list_groups(self) -> list[str]:
        return [path.name for path in sorted(self.mount.rglob("phasewatch-*")) if path.is_dir()]


@pytest.fixture
def version_1(tmp_path: Path) -> FakeKernel:
    return FakeKernel(tmp_path, version=1)


@pytest.fixture
def version_2(tmp_path: Path) -> FakeKernel:
    kernel = FakeKernel(tmp_path, version=2)
    (kernel.mount / "cgroup.subtree_control").write_text("cpu memory\n")
    return kernel


def test_version_1_makes_groups_below_the_group_of_the_recorder(version_1: FakeKernel) -> None:
    group = version_1.open().create_group(3, proc=version_1.proc)
    group.limit(0.25)

    assert group.folder == version_1.mount / "job" / "phasewatch-7.4242.3"
    assert (group.folder / "cpu.cfs_quota_us").read_text() == "25000"
    assert (group.folder / "cpu.cfs_period_us").read_text() == "100000"
    assert group.read_throttled_s() == 2.5


def test_version_2_makes_groups_where_the_controller_is_enabled_already(version_2: FakeKernel) -> None:
    group = version_2.open().create_group(3, proc=version_2.proc)
    group.limit(0.25)

    assert group.folder.parent == version_2.mount  # the recorder's own group and the one above lack the controller
    assert (group.folder / "cpu.max").read_text() == "25000 100000"
    assert group.read_throttled_s() == 2.5


def test_version_2_enables_the_controller_if_it_is_enabled_nowhere(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path, version=2)

    assert kernel.open().folder == kernel.mount / "slice" / "job"
    assert (kernel.mount / "slice" / "job" / "cgroup.subtree_control").read_text() == "+cpu"


@pytest.mark.parametrize(("version", "holds"), [(1, "-1"), (2, "max 100000")])
def test_limit_of_zero_removes_the_quota(tmp_path: Path, version: int, holds: str) -> None:
    kernel = FakeKernel(tmp_path, version=version)
    group = kernel.open().create_group(1, proc=kernel.proc)
    group.limit(0.5)
    group.limit(0.0)

    assert group.quota_file.read_text() == holds


def test_opening_leaves_no_group(version_2: FakeKernel) -> None:
    version_2.open()

    assert version_2.list_groups() == []


def test_removed_group_is_gone_and_may_be_removed_again(version_2: FakeKernel) -> None:
    group = version_2.open().create_group(1, proc=version_2.proc)
    group.remove()
    group.remove()

    assert version_2.list_groups() == []


def test_groups_of_dead_recorders_are_swept_and_those_of_living_ones_stay(version_1: FakeKernel) -> None:
    controller = version_1.open()
    for name in ("phasewatch-7.4242.1", "phasewatch-7.9999.1", "phasewatch-8.4242.1", "phasewatch-mine"):
        version_1.make(controller.folder / name)

    assert sweep_dead_groups(controller, proc=version_1.proc) == 2
    assert version_1.list_groups() == ["phasewatch-7.4242.1", "phasewatch-mine"]  # 7.9999 was an earlier process 7


def test_sweep_is_part_of_opening(version_2: FakeKernel) -> None:
    version_2.make(version_2.mount / "phasewatch-8.1.1")
    version_2.open()

    assert version_2.list_groups() == []


def test_machine_without_cgroups_is_told_the_remedy(version_2: FakeKernel) -> None:
    (version_2.proc / "self" / "mounts").write_text("tmpfs /tmp tmpfs rw 0 0\n")

    with pytest.raises(CgroupError, match=r"no cgroup file system.*Delegate=cpu"):
        version_2.open()


def test_refused_group_is_told_with_its_folder(version_1: FakeKernel) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    with pytest.raises(CgroupError, match=r"/job: Permission denied"):
        open_cpu_controller(proc=version_1.proc, folders=CgroupFolders(make=refuse))


def test_quota_that_the_kernel_did_not_take_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").symlink_to("/dev/null")

    with pytest.raises(CgroupError, match="wrote '50000 100000', but it holds ''"):
        CpuGroup(version=2, folder=tmp_path).limit(0.5)


def test_counter_that_is_missing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cpu.stat").write_text("usage_usec 5\n")

    with pytest.raises(CgroupError, match="expected a line `throttled_usec NUMBER`"):
        CpuGroup(version=2, folder=tmp_path).read_throttled_s()


def test_mount_point_with_a_space_is_found() -> None:
    (found,) = find_cpu_controllers("cgroup /my\\040groups cgroup rw,cpu 0 0\n", "3:cpu:/a\n0::/b\n")

    assert (found.version, str(found.folder)) == (1, "/my groups/a")


def test_real_kernel_limits_a_busy_process_and_counts_what_it_was_kept_from() -> None:
    with suppress(CgroupError):
        controller = open_cpu_controller()
        group = controller.create_group(1)
        try:
            group.limit(0.05)
            busy = "import os, time\nopen(os.environ['G'], 'w').write('0')\nb = time.monotonic()\n"
            busy += "while time.monotonic() - b < 1.0: pass\nprint(time.process_time())"
            done = subprocess.run(
                [sys.executable, "-S", "-c", busy],
                env={**os.environ, "G": str(group.members_file)},
                capture_output=True,
                text=True,
                check=True,
            )

            assert float(done.stdout) < 0.6  # 0.05 s, and what it used before it joined
            assert group.read_throttled_s() > 0.0
        finally:
            group.remove()
        assert not group.folder.exists()
        return
    pytest.skip("no CPU quota can be set here")
