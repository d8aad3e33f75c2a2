"""Find QMP monitors: the command line compared with the sockets that the process listens on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from phasewatch.live.monitor_endpoints import (
    MonitorEndpoint,
    MonitorEndpointKind,
    explain_no_usable_monitor,
    find_monitor_endpoints,
    is_same_file,
)
from phasewatch.telemetry.process import parse_qemu_options

ME = Path("/proc") / str(os.getpid())  # this process takes QEMU's place


def find_endpoints(line: str, folder: Path = ME) -> tuple[MonitorEndpoint, ...]:
    return find_monitor_endpoints(parse_qemu_options(line.split(" ")), folder)


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[Path]:
    """A socket that this process listens on."""
    path = tmp_path / "q.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield path


@pytest.mark.parametrize(
    "line",
    [
        "-qmp unix:{path},server=on,wait=off",
        "-qmp unix:{path},server,nowait",
        "--qmp-pretty unix:{path},wait=off,server=yes",
        "-chardev socket,id=m,path={path},server=on,wait=off -mon chardev=m,mode=control",
        "-chardev socket,path={path},id=m,server,nowait -mon m,mode=control,pretty=on",
        "-mon chardev=m,mode=control -chardev socket,id=m,server=on,path={path}",
        "-chardev socket,id=m,path={path},server=on -qmp chardev:m",
    ],
)
def test_a_listening_socket_is_usable(bound: Path, line: str) -> None:
    assert find_endpoints(line.format(path=bound)) == (
        MonitorEndpoint(kind=MonitorEndpointKind.LISTENING, address=str(bound), path=bound),
    )


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        pytest.param(
            "-chardev socket,id=e,path={path},reconnect=5 -mon chardev=e,mode=control",
            MonitorEndpointKind.CLIENT,
            id="an event daemon's",
        ),
        pytest.param(
            "-chardev socket,id=e,path={path},server=off -mon chardev=e,mode=control",
            MonitorEndpointKind.CLIENT,
            id="server=off",
        ),
        pytest.param("-qmp unix:{path}", MonitorEndpointKind.CLIENT, id="no server"),
        pytest.param("-qmp unix:{path}2,server=on,wait=off", MonitorEndpointKind.SILENT, id="removed at run time"),
        pytest.param(
            "-chardev socket,id=charmonitor,fd=33,server=on,wait=off -mon chardev=charmonitor,mode=control",
            MonitorEndpointKind.HANDED_OVER,
            id="handed over",
        ),
        pytest.param(
            "-chardev socket,id=charmonitor,path={path},server,nowait -mon chardev=charmonitor,mode=control",
            MonitorEndpointKind.HANDED_OVER,
            id="libvirt's own",
        ),
        pytest.param("-qmp tcp:127.0.0.1:4444,server=on,wait=off", MonitorEndpointKind.NETWORK, id="tcp"),
        pytest.param(
            "-chardev socket,id=m,host=localhost,port=4444,server=on -mon m,mode=control",
            MonitorEndpointKind.NETWORK,
            id="tcp by chardev",
        ),
        pytest.param("-qmp tcp:10.0.0.1:4444", MonitorEndpointKind.CLIENT, id="tcp to somebody"),
        pytest.param("-qmp stdio", MonitorEndpointKind.ELSEWHERE, id="stdio"),
        pytest.param("-chardev pty,id=m -mon m,mode=control", MonitorEndpointKind.ELSEWHERE, id="pty"),
        pytest.param(
            "-chardev socket,id=m,path=x,abstract=on,server=on -mon m,mode=control",
            MonitorEndpointKind.ELSEWHERE,
            id="abstract",
        ),
    ],
)
def test_unusable_monitors_are_classified(bound: Path, line: str, kind: MonitorEndpointKind) -> None:
    found = find_endpoints(line.format(path=bound))

    assert [(door.kind, door.path) for door in found] == [(kind, None)]
    assert explain_no_usable_monitor(found) != explain_no_usable_monitor(())


def test_a_human_monitor_is_not_listed(bound: Path) -> None:
    assert find_endpoints(f"-monitor unix:{bound},server=on -chardev socket,id=m,path={bound},server=on -mon m") == ()


def test_the_first_reason_is_reported() -> None:
    found = find_endpoints("-qmp stdio -qmp tcp::4444,server=on")

    assert explain_no_usable_monitor(found) == explain_no_usable_monitor(found[:1])


def test_the_reason_of_a_monitor_beside_that_of_libvirt_is_reported() -> None:
    found = find_endpoints("-chardev socket,id=m,fd=9,server=on -mon m,mode=control -qmp tcp::4444,server=on")

    assert explain_no_usable_monitor(found) == explain_no_usable_monitor(found[1:])


@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel tells only root")
def test_a_relative_socket_is_found_after_the_process_changed_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("rel.sock")
        listener.listen()
        monkeypatch.chdir("/")
        found = find_endpoints("-daemonize -qmp unix:rel.sock,server=on,wait=off")

    assert [door.path for door in found] == [tmp_path / "rel.sock"]


def test_the_command_line_is_used_if_sockets_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "90").mkdir()

    (door,) = find_endpoints("-qmp unix:/run/vm.sock,server=on,wait=off", tmp_path / "90")
    assert (door.kind, door.path) == (MonitorEndpointKind.LISTENING, Path("/run/vm.sock"))


def test_a_socket_in_a_container_is_reached_through_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes
    inside = tmp_path / "90" / "root" / "run" / "phasewatch-test-only" / "q.sock"
    inside.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(inside.relative_to(tmp_path)))
        (door,) = find_endpoints("-qmp unix:/run/phasewatch-test-only/q.sock,server=on", tmp_path / "90")

    assert door.path == inside


def test_an_unreachable_path_is_still_reported(tmp_path: Path) -> None:
    (tmp_path / "90").mkdir()
    name = "/" + "x" * 300  # longer than a name may be: no look at it ends in yes or no

    (door,) = find_endpoints(f"-qmp unix:{name},server=on", tmp_path / "90")
    assert door.address == name


def test_paths_of_the_same_socket_are_equal(bound: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)

    assert is_same_file(bound, tmp_path / "link" / "q.sock")
    assert is_same_file(bound, tmp_path / "link" / ".." / tmp_path.name / "q.sock")
    assert not is_same_file(bound, tmp_path / "other.sock")
