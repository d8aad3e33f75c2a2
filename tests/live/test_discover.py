"""Find VMs in fake /proc folders: QEMU started by hand, by libvirt, and other programs."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from phasewatch.errors import MachineError, UsageError
from phasewatch.live.discover import find_running_vm, find_vcpu_threads, list_running_vms, read_running_vm

LIBVIRT = (
    "/usr/bin/qemu-system-x86_64 -name guest=web01,debug-threads=on -S -machine pc-q35-7.2,usb=off -accel kvm "
    "-chardev socket,id=charmonitor,fd=33,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control "
    '-netdev {"type":"tap","fd":"35","vhost":true,"id":"hostnet0"}'
)
BY_HAND = (
    "qemu-system-aarch64 -name box,process=x -accel tcg,thread=multi -qmp unix:run/qmp.sock,server=on,wait=off -m 128"
)


def make(proc: Path, pid: int, line: str, *, threads: tuple[str, ...] = (), taps: tuple[str, ...] = ()) -> None:
    folder = proc / str(pid)
    (folder / "fdinfo").mkdir(parents=True)
    (folder / "cmdline").write_bytes(("\0".join(line.split(" ")) + "\0").encode())
    (folder / "cwd").symlink_to("/srv/vm")
    (folder / "stat").write_text(f"{pid} (qemu) S " + "0 " * 18 + f"{pid * 10} 0 0\n")
    for number, tap in enumerate(taps):
        (folder / "fdinfo" / str(number)).write_text(f"pos:\t0\nflags:\t0104002\niff:\t{tap}\n")
    for number, comm in enumerate(threads):
        (folder / "task" / str(pid + number)).mkdir(parents=True)
        (folder / "task" / str(pid + number) / "comm").write_text(comm + "\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    make(tmp_path, 100, LIBVIRT, threads=("qemu-system-x86", "CPU 0/KVM", "CPU 1/KVM", "worker"), taps=("vnet3",))
    make(tmp_path, 90, BY_HAND, threads=("qemu-system-aar", "CPU 0/TCG"))
    make(tmp_path, 80, "/usr/bin/python3 serve.py qemu-system-x86_64")
    make(tmp_path, 70, "/usr/libexec/qemu-kvm -enable-kvm", threads=("qemu-kvm",))
    (tmp_path / "self").mkdir()
    return tmp_path


def test_vms_are_listed_in_order_of_pid(proc: Path) -> None:
    assert [(m.pid, m.name, m.arch, m.accel) for m in list_running_vms(proc)] == [
        (70, "qemu-70", "x86_64", "kvm"),
        (90, "box", "aarch64", "tcg"),
        (100, "web01", "x86_64", "kvm"),
    ]


def test_only_unix_sockets_have_a_path(proc: Path) -> None:
    by_hand, libvirt = read_running_vm(90, proc), read_running_vm(100, proc)

    assert by_hand is not None
    assert libvirt is not None
    assert (by_hand.qmp, by_hand.has_foreign_qmp) == ((Path("/srv/vm/run/qmp.sock"),), False)
    assert (libvirt.qmp, libvirt.has_foreign_qmp) == ((), True)


def test_taps_are_found_by_open_files(proc: Path) -> None:
    machine = read_running_vm(100, proc)

    assert machine is not None
    assert machine.taps == ("vnet3",)


def test_a_file_closed_during_the_listing_hides_no_tap(proc: Path) -> None:
    (proc / "100" / "fdinfo" / "00").symlink_to(proc / "closed")  # listed, and gone when it is read
    (proc / "100" / "fdinfo" / "99").symlink_to(proc / "closed")

    machine = read_running_vm(100, proc)

    assert machine is not None
    assert machine.taps == ("vnet3",)


def test_named_threads_show_vcpus_and_accelerator(proc: Path) -> None:
    make(proc, 110, "qemu-system-x86_64 -name n", threads=("qemu-system-x86", "ALL CPUs/TCG"))
    machine = read_running_vm(110, proc)

    assert find_vcpu_threads(100, proc) == (101, 102)
    assert find_vcpu_threads(70, proc) == ()
    assert machine is not None
    assert machine.accel == "tcg"


@pytest.mark.parametrize(
    ("line", "name", "accel"),
    [
        ("qemu-system-x86_64 -name a,,b -machine pc,accel=kvm:tcg", "a,b", "kvm"),
        ("qemu-system-x86_64 -M accel=tcg", "qemu-1", "tcg"),
        ("qemu-system-x86_64 -accel tcg -name {nonsense", "{nonsense", "tcg"),
        ("qemu-system-x86_64", "qemu-1", ""),
    ],
)
def test_all_spellings_of_names_and_accelerators_are_parsed(tmp_path: Path, line: str, name: str, accel: str) -> None:
    make(tmp_path, 1, line)
    machine = read_running_vm(1, tmp_path)

    assert machine is not None
    assert (machine.name, machine.accel) == (name, accel)


def test_a_vm_is_found_by_pid_name_or_socket(proc: Path) -> None:
    assert find_running_vm(pid=90, name=None, qmp=None, proc=proc).name == "box"
    assert find_running_vm(pid=None, name="web01", qmp=None, proc=proc).pid == 100
    assert find_running_vm(pid=None, name=None, qmp=Path("/srv/vm/run/qmp.sock"), proc=proc).pid == 90


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        pytest.param({"pid": 4711}, MachineError, "--pid 4711", id="a dead pid"),
        pytest.param({"pid": 80}, MachineError, "not QEMU", id="another program"),
        pytest.param(
            {"name": "web02"},
            MachineError,
            r"qemu-70 \(70\), box",
            id="no such name",
        ),
        pytest.param({"qmp": Path("/x")}, MachineError, "--qmp /x", id="no such socket"),
        pytest.param({}, UsageError, "--pid N", id="no VM named"),
    ],
)
def test_a_vm_that_cannot_be_found_is_an_error(proc: Path, asked: dict[str, object], error, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        find_running_vm(**{"pid": None, "name": None, "qmp": None, **asked}, proc=proc)  # type: ignore[arg-type]


def test_a_vm_is_found_by_any_path_of_its_socket(proc: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("run")
    (home / "link").symlink_to(home)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "q.sock"))
        make(proc, 130, f"qemu-system-x86_64 -name far -qmp unix:{home}/q.sock,server=on")
        for spelling in (home / "q.sock", home / "link" / "q.sock", home / ".." / home.name / "q.sock"):
            assert find_running_vm(pid=None, name=None, qmp=spelling, proc=proc).pid == 130


def test_a_vm_is_found_by_uuid(proc: Path) -> None:
    make(proc, 140, "qemu-system-x86_64 -name web02 -uuid 1063ECDD-7112-4405-a743-23aa18519509")

    assert find_running_vm(pid=None, name="1063ecdd-7112-4405-a743-23aa18519509", qmp=None, proc=proc).name == "web02"


def test_a_zombie_process_is_no_vm(proc: Path) -> None:
    make(proc, 150, BY_HAND)
    (proc / "150" / "stat").write_text("150 (qemu) Z " + "0 " * 30)

    assert read_running_vm(150, proc) is None


def test_an_emulator_with_a_deleted_program_file_is_recognized(proc: Path) -> None:
    make(proc, 160, "/opt/run-vm -name old")
    (proc / "160" / "exe").symlink_to("/usr/bin/qemu-system-aarch64 (deleted)")
    machine = read_running_vm(160, proc)

    assert machine is not None
    assert machine.arch == "aarch64"


def test_vms_without_a_unique_name_have_unique_host_ids(proc: Path) -> None:
    make(proc, 180, "qemu-system-x86_64 -name twin")
    make(proc, 181, "qemu-system-x86_64 -name twin")
    make(proc, 182, "qemu-system-x86_64")
    found = [find_running_vm(pid=pid, name=None, qmp=None, proc=proc).host_id for pid in (180, 181, 182, 100)]

    assert len(set(found)) == 4
    assert found[3] == "web01"
    (proc / "182" / "stat").write_text("182 (qemu) S " + "0 " * 18 + "99 0")  # another process with that number
    assert find_running_vm(pid=182, name=None, qmp=None, proc=proc).host_id != found[2]


def test_names_with_invalid_bytes_stay_distinct(proc: Path) -> None:
    for pid, byte in ((170, b"\xfe"), (171, b"\xff")):
        make(proc, pid, "x")
        (proc / str(pid) / "cmdline").write_bytes(b"qemu-system-x86_64\0-name\0vm" + byte + b"\0")

    assert len({m.name for m in list_running_vms(proc) if m.pid >= 170}) == 2


def test_an_ambiguous_name_is_an_error(proc: Path) -> None:
    make(proc, 120, LIBVIRT)

    with pytest.raises(UsageError, match="100, 120"):
        find_running_vm(pid=None, name="web01", qmp=None, proc=proc)
