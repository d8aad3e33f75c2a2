"""Follow which VMs run on a fake host: new ones, ended ones, and processes that become QEMU after they were seen."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.factories.fleet import FakeHost

from phasewatch.live.discover import VmScanner, identify_vms, matches_pattern
from phasewatch.telemetry.process import ProcessHandle, read_start_ticks


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def test_a_scan_finds_new_vms_and_drops_those_that_ended(host: FakeHost) -> None:
    scanner = VmScanner(host.proc)
    one = host.start("one")
    assert [vm.name for vm in scanner.scan()] == ["one"]

    host.start("two")
    assert [vm.name for vm in scanner.scan()] == ["one", "two"]

    host.stop(one)
    assert [vm.name for vm in scanner.scan()] == ["two"]


def test_a_process_that_starts_qemu_in_its_place_is_found(host: FakeHost) -> None:
    scanner = VmScanner(host.proc)
    host.start_program(500, "sh", "-c", "exec qemu")
    assert scanner.scan() == ()

    host.start("web", pid=500)

    assert [vm.name for vm in scanner.scan()] == ["web"]


def test_an_old_process_that_starts_qemu_in_its_place_is_found_within_a_minute(host: FakeHost) -> None:
    scanner = VmScanner(host.proc)
    host.start_program(500, "sh", "-c", "sleep 100; exec qemu")
    for _ in range(50):
        assert scanner.scan() == ()

    host.start("web", pid=500)

    assert any(scanner.scan() for _ in range(30))


def test_an_old_process_that_is_no_vm_is_not_read_in_every_scan(host: FakeHost) -> None:
    scanner = VmScanner(host.proc)
    host.start_program(500, "cat")
    for _ in range(20):
        scanner.scan()

    host.start("web", pid=500)

    assert sum(bool(scanner.scan()) for _ in range(5)) < 5


def test_a_later_vm_with_the_pid_of_an_earlier_one_is_another(host: FakeHost) -> None:
    scanner = VmScanner(host.proc)
    pid = host.start("one")
    (first,) = scanner.scan()
    host.stop(pid)
    host.start("two", pid=pid)
    stat = host.proc / str(pid) / "stat"
    stat.write_text(stat.read_text().replace(f" {pid * 7} ", " 99999 "))

    (second,) = scanner.scan()

    assert (first.name, second.name) == ("one", "two")
    assert first.pid == second.pid


def test_a_name_is_unique_until_another_vm_has_it(host: FakeHost) -> None:
    scanner = VmScanner(host.proc)
    host.start("web")
    assert [vm.has_unique_name for vm in scanner.scan()] == [True]

    second = host.start("web")
    assert [vm.has_unique_name for vm in scanner.scan()] == [False, False]

    host.stop(second)
    assert [vm.has_unique_name for vm in scanner.scan()] == [True]


def test_an_identity_survives_a_restart_only_with_a_uuid_or_a_name_of_its_own(host: FakeHost) -> None:
    uuid = "11111111-1111-1111-1111-111111111111"
    pids = [host.start("a", uuid=uuid), host.start("b"), host.start("c"), host.start("c")]

    found = identify_vms(VmScanner(host.proc).scan())

    assert found[pids[0]].key == f"uuid:{uuid}"
    assert found[pids[1]].key == "name:b"
    assert found[pids[2]].key == f"process:{found[pids[2]].process}"
    assert found[pids[2]].process != found[pids[3]].process


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("web01", True),
        ("web*", True),
        ("WEB*", False),
        ("web0[12]", True),
        ("web", False),
        ("ABCDEF00-0000-0000-0000-000000000001", True),
        ("*", True),
    ],
)
def test_patterns_match_names_and_uuids(host: FakeHost, pattern: str, matches: bool) -> None:
    host.start("web01", uuid="abcdef00-0000-0000-0000-000000000001")
    (machine,) = VmScanner(host.proc).scan()

    assert matches_pattern(machine, pattern) is matches


def test_a_name_with_pattern_characters_matches_itself(host: FakeHost) -> None:
    host.start("web[1]")
    (machine,) = VmScanner(host.proc).scan()

    assert matches_pattern(machine, "web[1]")


def test_a_held_process_is_alive_until_it_ends() -> None:
    child = subprocess.Popen(["sleep", "100"])
    held = ProcessHandle(child.pid, read_start_ticks(child.pid) or 0)
    was_alive = held.is_alive
    child.kill()
    child.wait()

    assert was_alive
    assert not held.is_alive
    held.close()
    assert not held.is_alive


def test_a_held_process_is_not_a_later_one_with_its_pid() -> None:
    child = subprocess.Popen(["sleep", "100"])
    try:
        assert not ProcessHandle(child.pid, (read_start_ticks(child.pid) or 0) + 1).is_alive
    finally:
        child.kill()
        child.wait()
