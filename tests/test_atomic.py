"""Every write: whole or not at all, whatever breaks in between."""

from __future__ import annotations

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from phasewatch import atomic
from phasewatch.errors import BusyError, MachineError


class Recorder(atomic.DiskOperations):
    """Writes down what it is asked for, and breaks at the n-th call."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.calls: list[str] = []
        self._breaks_at = breaks_at

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if self._breaks_at is not None and len(self.calls) > self._breaks_at:
            raise OSError(errno.ENOSPC, "no space left")

    def open(self, path: Path) -> int:
        self._note("open")
        return super().open(path)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self._note("write")
        return super().write(fd, data)

    def fsync(self, fd: int) -> None:
        self._note("fsync")
        super().fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._note("rename")
        super().rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._note("link")
        super().link(source, target)


def test_a_file_is_written_aside_made_durable_and_only_then_named(tmp_path: Path) -> None:
    with atomic.use_disk_operations(disk := Recorder()):
        atomic.write_atomic(tmp_path / "a", b"hello")

    assert disk.calls == ["open", "write", "fsync", "rename", "fsync"]
    assert (tmp_path / "a").read_bytes() == b"hello"


@pytest.mark.parametrize("calls", range(4))
def test_whichever_call_fails_the_old_file_stands_and_nothing_else_lies_there(tmp_path: Path, calls: int) -> None:
    (tmp_path / "a").write_bytes(b"old")

    with atomic.use_disk_operations(Recorder(breaks_at=calls)), pytest.raises(OSError, match="no space"):
        atomic.write_atomic(tmp_path / "a", b"new")

    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")

    with suppress(RuntimeError), atomic.open_atomic(tmp_path / "a") as file:
        file.write(b"half")
        raise RuntimeError

    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


def test_a_new_file_never_takes_the_place_of_another(tmp_path: Path) -> None:
    atomic.write_atomic(tmp_path / "a", b"first", new=True)

    with pytest.raises(FileExistsError):
        atomic.write_atomic(tmp_path / "a", b"second", new=True)

    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


def test_a_short_write_of_the_system_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Miser(atomic.DiskOperations):
        def write(self, fd: int, data: bytes | memoryview) -> int:
            return super().write(fd, data[:3])

    with atomic.use_disk_operations(Miser()):
        atomic.write_atomic(tmp_path / "a", b"0123456789")

    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_writer_can_go_back_and_mend_what_it_wrote(tmp_path: Path) -> None:
    with atomic.open_atomic(tmp_path / "a") as file:
        file.write(b"????")
        file.write(b"body")
        assert file.tell() == 8
        file.seek(0)
        file.write(b"head")

    assert (tmp_path / "a").read_bytes() == b"headbody"


def test_a_library_that_closes_the_file_publishes_nothing_by_that(tmp_path: Path) -> None:
    with suppress(RuntimeError), atomic.open_atomic(tmp_path / "a") as file:
        file.write(b"x")
        file.close()
        raise RuntimeError

    assert not (tmp_path / "a").exists()


def test_last_words_to_a_file_that_was_given_up_reach_no_other_file(tmp_path: Path) -> None:
    with suppress(RuntimeError), atomic.open_atomic(tmp_path / "a") as file:
        raise RuntimeError
    file.write(b"last words")  # held until it is flushed

    with (tmp_path / "b").open("wb") as other, pytest.raises(ValueError, match="closed"):
        file.flush()

    assert (tmp_path / "b").read_bytes() == b""
    assert other.closed


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".a.0123456789ab.tmp").write_bytes(b"half")
    (tmp_path / "mine.tmp").write_bytes(b"a user's")
    (tmp_path / ".hidden").write_bytes(b"a user's")

    assert atomic.sweep_temporaries(tmp_path) == 1
    assert sorted(os.listdir(tmp_path)) == [".hidden", "mine.tmp"]  # noqa: PTH208


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    with atomic.lock(tmp_path / "run"):
        with pytest.raises(BusyError, match="another process is writing here"), atomic.lock(tmp_path / "run"):
            pass

    with atomic.lock(tmp_path / "run"):
        pass


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    atomic.make_folder(tmp_path / "a" / "b" / "c")
    atomic.make_folder(tmp_path / "a" / "b" / "c")

    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_a_folder_goes_with_all_below_it_and_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "kept")

    atomic.remove_folder(tmp_path / "a")

    assert os.listdir(tmp_path) == ["kept"]  # noqa: PTH208
    assert (tmp_path / "kept" / "file").exists()


class OneNameEach(atomic.DiskOperations):
    """A disk like exFAT or SMB: a file has one name, and a folder cannot be waited for."""

    def link(self, source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(source))

    def fsync(self, fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        super().fsync(fd)


def test_without_hard_links_a_new_file_is_published_and_never_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic.use_disk_operations(OneNameEach()):
        atomic.write_atomic(path, b"first", new=True)
        with pytest.raises(FileExistsError):
            atomic.write_atomic(path, b"second", new=True)

    assert path.read_bytes() == b"first"
    assert [each.name for each in tmp_path.iterdir() if atomic.is_temporary(each.name)] == []


def test_without_hard_links_one_of_many_writers_wins(tmp_path: Path) -> None:
    path, lost = tmp_path / "file", []

    def write(number: int) -> None:
        try:
            atomic.write_atomic(path, f"{number}".encode(), new=True)
        except FileExistsError:
            lost.append(number)

    with atomic.use_disk_operations(OneNameEach()), ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8)))

    assert sorted([*lost, int(path.read_bytes())]) == list(range(8))


def test_a_link_that_fails_for_another_reason_is_an_error(tmp_path: Path) -> None:
    class Full(atomic.DiskOperations):
        def link(self, source: Path, target: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))

    with atomic.use_disk_operations(Full()), pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        atomic.write_atomic(tmp_path / "file", b"data", new=True)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["write", "fsync", "close"])
def test_an_error_of_the_disk_names_the_file_that_was_being_written(tmp_path: Path, call: str) -> None:
    def fail(self: atomic.DiskOperations, fd: int, *data: bytes) -> int:
        if call == "close":
            os.close(fd)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    disk = type("FullDisk", (atomic.DiskOperations,), {call: fail})()
    with atomic.use_disk_operations(disk), pytest.raises(OSError) as caught:
        atomic.write_atomic(tmp_path / "report.html", b"data")

    assert caught.value.filename == str(tmp_path / "report.html")


def test_a_file_system_without_locks_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)

    with pytest.raises(MachineError), atomic.lock(tmp_path):
        pass


def test_a_folder_gets_its_name_only_when_all_of_it_is_durable(tmp_path: Path) -> None:
    source = tmp_path / "work" / "out"
    (source / "deep").mkdir(parents=True)
    for name in ("kernel", "deep/initrd"):
        (source / name).write_bytes(b"data")

    with atomic.use_disk_operations(disk := Recorder()):
        atomic.publish_folder(source, tmp_path / "image")

    assert (tmp_path / "image" / "deep" / "initrd").read_bytes() == b"data"
    assert disk.calls.index("rename") == len(disk.calls) - 3  # what follows makes the two names durable
    assert disk.calls[:-3].count("fsync") >= 5  # two files, and the three folders that hold names
