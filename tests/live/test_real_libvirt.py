"""A plain domain of a real libvirt: watched with its disks by every user who may, and left as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.requirements import need_program, need_qemu

from phasewatch.channels import CHANNELS, build_channel_mask
from phasewatch.errors import VmError
from phasewatch.telemetry.libvirt_client import load_libvirt_binding

pytestmark = pytest.mark.vm

ROOT = Path(__file__).parents[2]


def names_of(channel_set: str) -> set[str]:
    return {c.full_name for c, is_in in zip(CHANNELS, build_channel_mask(channel_set), strict=True) if is_in}


@pytest.fixture(scope="module")
def watches() -> dict[str, Any]:
    need_qemu()
    need_program("libvirtd", "libvirt-daemon-system")
    need_program("virsh", "libvirt-clients")
    need_program("ip", "iproute2")
    try:
        load_libvirt_binding()
    except VmError as exc:
        pytest.skip(str(exc))
    if os.geteuid() != 0 or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("needs root and /dev/net/tun: run the tests as root")
    unshare = [need_program("unshare", "util-linux"), "--pid", "--fork", "--mount-proc", "--kill-child", "--mount"]
    done = subprocess.run(
        [*unshare, "--net", "--", sys.executable, "-m", "tests.live.libvirt_lab"],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("user", "channel_set"),
    [
        pytest.param("root", "libvirt", id="root"),
        pytest.param("qemu", "libvirt", id="QEMU's user and group"),
        pytest.param("group", "libvirt-user", id="a user of the group libvirt"),
    ],
)
def test_each_user_gets_its_channel_set(watches: dict[str, Any], user: str, channel_set: str) -> None:
    watch = watches[user]

    assert watch["code"] == 0, watch["err"]
    assert names_of(channel_set).isdisjoint(watch["result"]["masked"])
    assert watch["n_phases"] >= 1
    assert watch["result"]["left_as_found"] is True


def test_a_user_of_the_group_libvirt_is_told_who_may_read_the_rest(watches: dict[str, Any]) -> None:
    assert "proc.io_rchar" in watches["group"]["result"]["masked"]
    assert "libvirt-qemu:libvirt-qemu" in watches["group"]["err"]


def test_pauses_resets_and_restarts_of_the_daemon_are_noticed(watches: dict[str, Any]) -> None:
    states = iter(watches["root"]["result"]["watched"]["states"])

    # In this order; a guest may reset itself as well.
    assert all(state in states for state in ("paused", "running", "rebooted", "silent", "running"))


def test_the_domain_is_unchanged_and_not_tainted(watches: dict[str, Any]) -> None:
    assert watches["is_unchanged"] is True
