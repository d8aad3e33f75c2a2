"""The cleanup process: a killed watcher leaves nothing in the VM and nothing in memory."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from tests.factories.qemu import FakeQemu

from phasewatch.live import cleanup, session
from phasewatch.live.cleanup import CleanupProcess, CleanupTask, truncate_dumps, undo_changes
from phasewatch.telemetry.process import read_start_ticks

HOLDER = """
import sys, time
from phasewatch.live.cleanup import CleanupProcess, CleanupTask
import msgspec
with CleanupProcess() as held:
    for text in sys.argv[1:]: held.add(msgspec.json.decode(text, type=CleanupTask))
    print(held.pid, flush=True)
    time.sleep(600)
"""

KILL_CLEANUP_PROCESS = """os.kill(held.pid, 9)
    while not held.restart_if_dead(): time.sleep(0.01)
    print(held.pid, held.restart_if_dead(), flush=True)
    time.sleep(600)"""


def wait_for(condition: Callable[[], bool]) -> bool:
    for _ in range(400):
        if condition():
            return True
        time.sleep(0.05)
    return False


def is_deaf_to(pid: int, number: signal.Signals) -> bool:
    ignored = int(Path(f"/proc/{pid}/status").read_text().split("SigIgn:")[1].split()[0], 16)
    return bool(ignored >> (number - 1) & 1)


def task_of(qemu: FakeQemu, folder: Path) -> CleanupTask:
    return CleanupTask(
        qmp=str(qemu.path),
        objects=("pw-a", "pw-b"),
        bitmaps=("pw-written", "pw-reading"),
        balloon="/machine/peripheral/balloon0",
        interval_s=5,
        folder=str(folder),
    )


def test_a_watcher_killed_by_sigkill_leaves_the_vm_unchanged(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    with FakeQemu(tmp_path / "q.sock") as qemu:
        qemu.objects["pw-b"], qemu.interval = folder / "dump", 1
        (folder / "dump").write_bytes(b"frames")
        qemu.bitmaps = {"pw-written": 5, "pw-reading": 1, "backup": 2}
        task = msgspec.json.encode(task_of(qemu, folder)).decode()
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, task], stdout=subprocess.PIPE)
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        holder.send_signal(signal.SIGKILL)
        holder.communicate()

        assert wait_for(lambda: not qemu.objects and qemu.interval == 5 and not folder.exists())
        assert qemu.bitmaps == {"backup": 2}
        assert wait_for(lambda: not Path(f"/proc/{child}").exists() or b"Z" in Path(f"/proc/{child}/stat").read_bytes())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_to_the_whole_service_does_not_stop_the_cleanup(tmp_path: Path, number: signal.Signals) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu:
        qemu.objects["pw-b"], qemu.interval = tmp_path / "dump", 1
        task = msgspec.json.encode(task_of(qemu, tmp_path / "private")).decode()
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, task], stdout=subprocess.PIPE)
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        assert wait_for(lambda: is_deaf_to(child, number))
        os.kill(child, number)  # systemd does so to the rest of a service whose main process was killed
        holder.send_signal(signal.SIGKILL)
        holder.communicate()

        assert wait_for(lambda: not qemu.objects and qemu.interval == 5)


def test_a_dismissed_cleanup_process_does_not_contact_the_vm(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    with FakeQemu(tmp_path / "q.sock") as qemu:
        with CleanupProcess() as held:
            key = held.add(task_of(qemu, folder))
            assert Path(f"/proc/{held.pid}").exists()
            held.dismiss(key)

        assert qemu.commands == []
        assert not folder.exists()
        assert held.pid == 0


def test_a_cleanup_process_that_was_not_dismissed_restores_the_vm(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    with FakeQemu(tmp_path / "q.sock") as qemu:
        qemu.objects["pw-a"], qemu.interval = folder / "dump", 1
        task = msgspec.json.encode(task_of(qemu, folder)).decode()
        subprocess.run([sys.executable, "-c", HOLDER.replace("600", "0"), task], stdout=subprocess.PIPE, check=True)

        assert wait_for(lambda: not qemu.objects and qemu.interval == 5 and not folder.exists())


def test_a_killed_cleanup_process_is_replaced_by_one_that_works(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    code = HOLDER.replace("import sys", "import os, sys").replace("time.sleep(600)", KILL_CLEANUP_PROCESS)
    with FakeQemu(tmp_path / "q.sock") as qemu:
        qemu.objects["pw-b"], qemu.interval = folder / "dump", 1
        task = msgspec.json.encode(task_of(qemu, folder)).decode()
        holder = subprocess.Popen([sys.executable, "-c", code, task], stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        first, (second, again) = holder.stdout.readline().strip(), holder.stdout.readline().split()
        holder.send_signal(signal.SIGKILL)
        holder.communicate()

        assert second not in ("0", first)
        assert again == "False"
        assert wait_for(lambda: not qemu.objects and qemu.interval == 5 and not folder.exists())


def test_a_watcher_removes_its_folder_if_the_cleanup_process_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    with FakeQemu(tmp_path / "q.sock") as qemu, CleanupProcess() as held:
        key = held.add(task_of(qemu, folder))
        os.kill(held.pid, signal.SIGKILL)
        held.dismiss(key)

    assert not folder.exists()


def test_a_later_process_with_the_pid_or_socket_of_the_vm_is_left_alone(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock", tids=(4711,)) as qemu:
        qemu.interval = 1
        task = task_of(qemu, tmp_path / "private")
        identity = {"vm_pid": os.getpid(), "vm_start_ticks": read_start_ticks(os.getpid()) or 0}

        assert asyncio.run(undo_changes(msgspec.structs.replace(task, **identity | {"vm_start_ticks": 1})))
        assert qemu.commands == []
        assert asyncio.run(undo_changes(msgspec.structs.replace(task, **identity)))
        assert not {"object-del", "qom-set"} & set(qemu.commands)


def test_a_vm_that_refuses_is_not_reported_as_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleanup, "CONNECT_ATTEMPTS", 1)
    with FakeQemu(tmp_path / "q.sock") as qemu:
        qemu.objects["pw-a"] = tmp_path / "dump"
        qemu.refused.add("object-del")

        assert not asyncio.run(undo_changes(task_of(qemu, tmp_path / "private")))


def test_a_vm_that_is_gone_needs_no_cleanup(tmp_path: Path) -> None:
    asyncio.run(undo_changes(CleanupTask(qmp=str(tmp_path / "gone.sock"), objects=("a",))))


def test_a_dump_that_is_not_read_is_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleanup, "MAX_DUMP_BYTES", 1 << 16)
    (tmp_path / "small").write_bytes(b"x" * 1000)
    (tmp_path / "large").write_bytes(b"x" * (1 << 17))

    truncate_dumps(tmp_path)

    assert (tmp_path / "small").stat().st_size == 1000
    assert (tmp_path / "large").stat().st_size == 0


def test_the_total_size_of_many_dumps_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleanup, "MAX_DUMP_BYTES", 100_000)
    for number in range(4):
        (tmp_path / str(number)).write_bytes(b"x" * 40_000)

    truncate_dumps(tmp_path)

    assert sorted(path.stat().st_size for path in tmp_path.iterdir()) == [0, 0, 40_000, 40_000]


def test_the_cleanup_process_imports_nothing_heavy_while_it_waits() -> None:
    heavy = {"numpy", "qemu", "onnxruntime", "typer", "pyarrow"}
    code = f"import sys, phasewatch.live.cleanup\nprint(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy!r}))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )

    assert done.stdout.strip() == "[]"


def test_one_cleanup_process_restores_every_vm_that_was_not_dismissed(tmp_path: Path) -> None:
    code = HOLDER.replace("    print", "    held.dismiss(1)\n    print")
    with ExitStack() as stack:
        qemus = [stack.enter_context(FakeQemu(tmp_path / f"{number}.sock")) for number in range(3)]
        folders = [tmp_path / f"private-{number}" for number in range(3)]
        for qemu, folder in zip(qemus, folders, strict=True):
            folder.mkdir()
            qemu.objects["pw-b"], qemu.interval = folder / "dump", 1
        qemus[0].mute.set()  # it never answers, which must not delay the third
        tasks = [msgspec.json.encode(task_of(*each)).decode() for each in zip(qemus, folders, strict=True)]
        holder = subprocess.Popen([sys.executable, "-c", code, *tasks], stdout=subprocess.PIPE)
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.send_signal(signal.SIGKILL)
        holder.communicate()

        assert wait_for(lambda: not qemus[2].objects and qemus[2].interval == 5 and not folders[2].exists())
        assert qemus[1].commands == []
        assert not folders[1].exists()
        assert qemus[0].objects
        qemus[0].mute.clear()
        assert wait_for(lambda: not qemus[0].objects and not folders[0].exists())


def test_a_cleanup_process_that_does_not_read_is_replaced(tmp_path: Path) -> None:
    with FakeQemu(tmp_path / "q.sock") as qemu, CleanupProcess() as held:
        keys = [held.add(task_of(qemu, tmp_path / "private"))]
        first = held.pid
        os.kill(first, signal.SIGSTOP)
        for _ in range(8000):
            keys.append(held.add(task_of(qemu, tmp_path / "private")))
            if held.pid != first:
                break
            held.dismiss(keys.pop())

        assert held.pid != first
        for key in keys:
            held.dismiss(key)


class FakeCleanupProcess:
    """A cleanup process that is killed again and again; at first no new one can be started."""

    def __init__(self) -> None:
        self.pid, self.looks = 7, 0

    def restart_if_dead(self) -> bool:
        self.looks += 1
        if self.looks <= 3:
            raise OSError(11, "Resource temporarily unavailable")
        return self.looks == 4


def test_the_loss_and_the_restart_of_the_cleanup_process_are_logged_once_each(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "CLEANUP_CHECK_INTERVAL_S", 0.0)
    process = FakeCleanupProcess()

    async def main() -> None:
        keeping = asyncio.create_task(session.supervise_cleanup_process(process))  # type: ignore[arg-type]
        while process.looks < 6:
            await asyncio.sleep(0)
        keeping.cancel()

    asyncio.run(main())

    assert len(caplog.records) == 2
