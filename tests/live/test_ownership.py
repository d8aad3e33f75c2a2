"""Names of watchers: whom they belong to, whether that watcher runs, and what is removed if not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from phasewatch.live.ownership import (
    WATCH_RECORD_FILE,
    WATCH_RECORD_FORMAT,
    WatchRecord,
    build_name_prefix,
    find_original_interval,
    find_other_watchers,
    find_watch_folders,
    is_abandoned,
    make_private_folder,
    remove_abandoned_folders,
    write_watch_record,
)
from phasewatch.telemetry.process import ProcessIdentity, read_own_identity, read_own_namespace, read_start_ticks

DEAD = 4_000_000  # above every number that the kernel gives out here
VM = {"vm_pid": os.getpid(), "vm_start_ticks": read_own_identity().start_ticks}  # a process that runs, in a VM's place
GONE_VM = {"vm_pid": DEAD, "vm_start_ticks": 5}


def prefix(*, pid: int = DEAD, start_ticks: int = 5) -> str:
    return build_name_prefix(ProcessIdentity(pid=pid, start_ticks=start_ticks, namespace=read_own_namespace()))


def make_folder(parent: Path, name: str, **record: int | str) -> Path:
    folder = parent / f"{name}-{'x' * 8}"
    folder.mkdir(mode=0o700)
    if record:
        write_watch_record(str(folder), WatchRecord(format=WATCH_RECORD_FORMAT, **record))  # type: ignore[arg-type]
    return folder


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs and is no phasewatch."""
    child = subprocess.Popen(["sleep", "600"])
    yield child
    child.kill()
    child.wait()


def test_a_name_is_abandoned_only_when_its_watcher_is_dead(other: subprocess.Popen[bytes]) -> None:
    start_ticks = read_start_ticks(other.pid)
    assert start_ticks is not None

    assert is_abandoned(f"{prefix()}-a")
    assert not is_abandoned(f"{build_name_prefix()}-a")
    assert not is_abandoned(f"{prefix(pid=other.pid, start_ticks=start_ticks)}-a")


def test_a_later_process_with_the_pid_of_a_dead_watcher_is_another(other: subprocess.Popen[bytes]) -> None:
    start_ticks = read_start_ticks(other.pid)
    assert start_ticks is not None

    assert is_abandoned(f"{prefix(pid=other.pid, start_ticks=start_ticks - 1)}-a")
    assert is_abandoned(f"phasewatch-{other.pid}-a")  # as version 1 called its objects


def test_an_object_of_version_1_belongs_to_its_running_watcher() -> None:
    script = "import time; print('up', flush=True); time.sleep(600)  # phasewatch watch"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        with child.stdout:
            child.stdout.readline()
        assert not is_abandoned(f"phasewatch-{child.pid}-a")
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    "name", ["", "phasewatch", "phasewatch-", "phasewatch-x-a", "phasewatch-0-a", "filter-1-a", "xphasewatch-4000000-a"]
)
def test_a_foreign_name_is_never_abandoned(name: str) -> None:
    assert not is_abandoned(name)


def test_a_watcher_in_an_invisible_namespace_may_be_alive(tmp_path: Path) -> None:
    (tmp_path / "self" / "ns").mkdir(parents=True)
    (tmp_path / "self" / "ns" / "pid").touch()  # this namespace is a nested one: it does not see everything

    assert not is_abandoned("phasewatch-12-5-99-a", proc=tmp_path)


def test_a_watcher_in_a_container_is_found_by_start_time_and_inner_pid(tmp_path: Path) -> None:
    (tmp_path / "self" / "ns").mkdir(parents=True)
    (tmp_path / "self" / "ns" / "pid").touch()
    (tmp_path / "812").mkdir()
    (tmp_path / "812" / "stat").write_text("812 (phasewatch) S " + "0 " * 18 + "777 0")
    (tmp_path / "812" / "status").write_text("Name:\tphasewatch\nNSpid:\t812\t7\n")

    make_folder(tmp_path, "phasewatch-7-777-99")
    make_folder(tmp_path, "phasewatch-8-777-99")

    assert [folder.is_alive for folder in find_watch_folders(tmp_path)] == [True, None]


def test_only_folders_of_dead_watchers_are_removed(tmp_path: Path) -> None:
    mine, of_a_gone_vm = Path(make_private_folder(os.geteuid())), make_folder(tmp_path, prefix(), **GONE_VM)
    of_this_vm = make_folder(tmp_path, prefix(start_ticks=6), **VM)
    foreign = tmp_path / "phasewatch-notes"
    foreign.mkdir()

    removed = remove_abandoned_folders(VM["vm_pid"], VM["vm_start_ticks"])

    assert set(removed) == {of_a_gone_vm, of_this_vm}
    assert mine.exists()
    assert foreign.exists()


def test_the_folder_of_a_dead_watcher_stays_while_another_vm_may_use_it(tmp_path: Path) -> None:
    of_another_vm = make_folder(tmp_path, prefix(), **VM)
    written = make_folder(tmp_path, prefix(start_ticks=6))

    with (written / "dump").open("wb"):
        assert remove_abandoned_folders(DEAD, 5) == ()
    assert of_another_vm.exists()
    assert remove_abandoned_folders(DEAD, 5) == (written,)


def test_a_folder_of_version_1_is_identified_by_its_dump(tmp_path: Path) -> None:
    folder = tmp_path / "phasewatch-abcd_123"
    folder.mkdir()
    (folder / f"phasewatch-{DEAD}-a-1").touch()

    assert remove_abandoned_folders(DEAD, 5) == (folder,)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"{", id="cut"),
        pytest.param(b"[" * 10_000, id="deep"),
        pytest.param(b" " * (1 << 20), id="large"),
        pytest.param(msgspec.json.encode({"format": "x", "vm_pid": 1, "vm_start_ticks": 1}), id="another format"),
        pytest.param(
            msgspec.json.encode({"format": WATCH_RECORD_FORMAT, "vm_pid": 1, "vm_start_ticks": 1, "interval_s": -1}),
            id="a time that is none",
        ),
        pytest.param(
            msgspec.json.encode({"format": WATCH_RECORD_FORMAT, "vm_pid": 1, "vm_start_ticks": 1, "balloon": "/etc"}),
            id="no device",
        ),
    ],
)
def test_an_implausible_record_is_ignored(tmp_path: Path, text: bytes) -> None:
    folder = make_folder(tmp_path, prefix())
    (folder / WATCH_RECORD_FILE).write_bytes(text)

    assert [found.record for found in find_watch_folders()] == [None]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_record_of_another_user_is_ignored(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, prefix(), **GONE_VM)
    os.chown(folder, 54321, -1)

    assert [found.record for found in find_watch_folders()] == [None]


def test_a_linked_record_or_one_in_a_writable_folder_is_ignored(tmp_path: Path) -> None:
    aside = make_folder(tmp_path, "aside", **GONE_VM)
    linked = make_folder(tmp_path, prefix())
    (linked / WATCH_RECORD_FILE).symlink_to(aside / WATCH_RECORD_FILE)
    wide = make_folder(tmp_path, prefix(start_ticks=6), **GONE_VM)
    wide.chmod(0o777)

    assert [found.record for found in find_watch_folders()] == [None, None]


def test_only_other_running_watchers_are_found(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    start_ticks = read_start_ticks(other.pid)
    assert start_ticks is not None
    make_folder(tmp_path, build_name_prefix(), **VM)
    make_folder(tmp_path, prefix(), **VM)
    theirs = make_folder(tmp_path, prefix(pid=other.pid, start_ticks=start_ticks), **VM)
    make_folder(tmp_path, prefix(pid=other.pid, start_ticks=start_ticks) + "-2", **GONE_VM)

    assert [found.path for found in find_other_watchers(VM["vm_pid"], VM["vm_start_ticks"])] == [theirs]


@pytest.mark.parametrize(
    ("now_s", "recorded_s", "is_marked", "original_s"),
    [
        pytest.param(0, None, False, 0, id="never polled"),
        pytest.param(5, None, False, 5, id="polled by somebody else"),
        pytest.param(1, None, False, 1, id="polled by somebody else once a second"),
        pytest.param(1, 7, True, 7, id="a dead watcher wrote it down"),
        pytest.param(1, None, True, 0, id="a dead watcher of version 1"),
        pytest.param(9, 7, True, 9, id="set anew by somebody after the watcher died"),
    ],
)
def test_the_original_interval_is_found(
    tmp_path: Path, now_s: int, recorded_s: int | None, is_marked: bool, original_s: int
) -> None:
    if recorded_s is not None:
        make_folder(tmp_path, prefix(), **VM, balloon="/machine/peripheral/balloon0", interval_s=recorded_s)

    assert find_original_interval(now_s, find_watch_folders(), is_marked=is_marked, **VM) == original_s
