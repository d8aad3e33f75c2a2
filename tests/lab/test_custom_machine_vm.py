"""Custom workloads and machines on real VMs, from the command line to the bundle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.factories.disks import build_own_disk
from tests.lab.test_custom_workload import block_of
from tests.requirements import need_qemu

from phasewatch.bundle.archive import unpack_bundle
from phasewatch.bundle.model import Episode
from phasewatch.store.local import DiskStore
from phasewatch.types import Phase, SampleKind, SourceKind

pytestmark = pytest.mark.vm

BRIEF = """
[recording]
episodes = 1
seed = 4
benign_share = 0
agent_share = 1
settle_s = [12, 12]
episode_s = [30, 30]
phase_s = [5, 7]
chatter_s = [4, 6]
"""


def record(*arguments: str | Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "phasewatch",
            "record",
            *map(str, arguments),
            "--out",
            str(out),
            "--idle-wait",
            "0",
            "--accel",
            "tcg",
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def episodes_of(out: Path) -> list[Episode]:
    store = DiskStore(out)
    return [unpack_bundle(store.read(item), file=item.path) for item in store.walk()]


def left_behind() -> list[str]:
    """Name QEMU processes that are still there."""
    found = subprocess.run(["pgrep", "-f", "qemu-system.*own-test"], capture_output=True, text=True, check=False)
    return found.stdout.split()


def children_of(pid: int) -> list[int]:
    """Return the processes that a process started."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or " Z " in stat.read_text()


def eventually(claim: Callable[[], object], seconds: float = 60.0) -> bool:
    """Wait for another process's deed: there is no clock to hand it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if claim():
            return True
        time.sleep(0.1)
    return False


def written_while(episode: Episode, phase: Phase) -> int:
    """Return the bytes that the guest wrote to its disk in the spans of a phase."""
    rows = episode.rows[SourceKind.QMP]
    total, column = 0, rows.columns[rows.fields.index("blk_wr_bytes")]
    for mark, following in zip(episode.marks, episode.marks[1:], strict=False):
        inside = (rows.t_wall_ns >= mark.t_wall_ns) & (rows.t_wall_ns <= following.t_wall_ns)
        if mark.phase is phase and inside.any():
            total += int(column[inside][-1] - column[inside][0])
    return total


def test_profile_file_is_recorded_end_to_end(tmp_path: Path) -> None:
    need_qemu()
    text = block_of("own-profile.md", "toml").split("[recording]")[0] + BRIEF
    (tmp_path / "mine.toml").write_text(text)

    done = record("--profile-file", tmp_path / "mine.toml", "--force", out=tmp_path / "store")
    assert done.returncode == 0, done.stderr
    (episode,) = episodes_of(tmp_path / "store")

    assert json.loads(done.stdout)["result"]["recorded"] == 1
    assert (episode.manifest.profile, episode.manifest.sample_name) == ("log-wiper", "slow")
    assert episode.manifest.sample_kind is SampleKind.EMULATED
    assert 0.5 <= episode.manifest.recording.knobs["rest_s"] <= 5  # type: ignore[union-attr]
    assert {source for source, rows in episode.rows.items() if len(rows) >= 20} == set(SourceKind)
    assert len({mark.phase for mark in episode.marks}) >= 3
    assert sum(written_while(episode, phase) for phase in (Phase.ARMED, Phase.INFECTING, Phase.ACTIVE)) > 20_000


def test_killed_recorder_leaves_no_process_folder_or_partial_bundle(tmp_path: Path) -> None:
    need_qemu()
    scratch, store = tmp_path / "scratch", tmp_path / "store"
    scratch.mkdir()
    command = [
        sys.executable,
        "-m",
        "phasewatch",
        "record",
        "--plan",
        "smoke",
        "--hosts",
        "pc",
        "--out",
        str(store),
        "--idle-wait",
        "0",
        "--accel",
        "tcg",
    ]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)}, stderr=subprocess.DEVNULL) as recorder:
        ctl = "pw-*/*/ctl.sock"
        assert eventually(lambda: list(scratch.glob(ctl)), 120), "no VM was started"
        started = children_of(recorder.pid)
        recorder.kill()

    assert len(started) >= 3  # a guard, a sink, a VM
    assert eventually(lambda: all(is_gone(pid) for pid in started))
    assert eventually(lambda: not list(scratch.iterdir()))
    assert not [path for path in store.rglob("*") if path.is_file() and path.stat().st_size]


def test_custom_disk_is_recorded_with_the_driver_of_the_docs(tmp_path: Path) -> None:
    need_qemu()
    disk = build_own_disk(tmp_path)
    before = disk.read_bytes()
    (tmp_path / "driver.sh").write_text(block_of("own-vm.md", "shell"))
    (tmp_path / "mine.toml").write_text(
        'name = "made-up"\nkind = "live"\n[[samples]]\nname = "one"\n'
        + BRIEF.replace("agent_share = 1", "agent_share = 0")
    )

    done = record(
        "--image",
        disk,
        "--driver",
        tmp_path / "driver.sh",
        "--profile-file",
        tmp_path / "mine.toml",
        "--host-id",
        "own-test",
        "--mem",
        "256",
        "--boot-deadline",
        "40",
        "--force",
        out=tmp_path / "store",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (episode,) = episodes_of(tmp_path / "store")

    assert episode.manifest.host.host_id == "own-test"
    assert (episode.manifest.profile, episode.manifest.sample_kind) == ("made-up", SampleKind.LIVE)
    assert len(episode.rows[SourceKind.PROC]) >= 60
    assert disk.read_bytes() == before
    assert left_behind() == []


def test_image_without_a_driver_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    need_qemu()
    disk = build_own_disk(tmp_path)

    done = record(
        "--image",
        disk,
        "--host-id",
        "own-test",
        "--mem",
        "256",
        "--boot-deadline",
        "40",
        "--limit",
        "1",
        out=tmp_path / "store",
    )

    assert done.returncode == 1
    (failed,) = json.loads(done.stdout)["result"]["failed"]
    assert "no ready message from the guest within 40 s (does its image run a driver" in failed
    assert "no driver here" in failed
    assert episodes_of(tmp_path / "store") == []
    assert left_behind() == []
