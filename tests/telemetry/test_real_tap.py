"""A real QEMU on a real tap, with every length of virtio-net header: captured frames match the tap's counters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.requirements import need_program

from phasewatch.telemetry.netflow import NetflowReading

pytestmark = pytest.mark.vm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    need_program("qemu-system-x86_64", "qemu-system-x86")
    need_program("ip", "iproute2")
    if os.geteuid() != 0 or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("needs root and /dev/net/tun: run the tests as root")
    folder = tmp_path_factory.mktemp("tap")
    done = subprocess.run(
        [need_program("unshare", "util-linux"), "--net", sys.executable, "-m", "tests.telemetry.tap_lab", str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("name", "header"),
    [
        pytest.param("header12", 12, id="virtio"),
        pytest.param("header10", 10, id="legacy virtio"),
        pytest.param("no-header", 0, id="virtio without headers"),
        pytest.param("e1000", 0, id="e1000"),
    ],
)
def test_captured_frames_match_the_counters_of_a_real_tap(machines: dict[str, Any], name: str, header: int) -> None:
    machine = machines[name]
    out_pkts, out_bytes, in_pkts, in_bytes, new_flows, syn_out, rst_in, *_ = machine["values"]

    assert machine["header"] == header
    assert [out_pkts, out_bytes, in_pkts] == machine["tap"][:3]
    assert 0 <= in_bytes - machine["tap"][3] < 60 * in_pkts  # QEMU pads short frames to 60 bytes for some cards
    assert new_flows >= 2  # DHCP and the refused connection
    assert syn_out >= rst_in >= 1
    assert machine["notices"] == []


@pytest.mark.parametrize("name", ["header12", "header10", "no-header", "e1000"])
def test_a_packet_socket_counts_what_the_tap_and_the_filters_of_qemu_count(machines: dict[str, Any], name: str) -> None:
    machine = machines[name]
    captured, filtered = NetflowReading(*machine["captured"]), NetflowReading(*machine["values"])

    assert list(captured[:4]) == machine["tap"]
    assert [captured.out_pkts, captured.out_bytes, captured.in_pkts] == list(filtered[:3])
    for field in ("new_flows", "syn_out", "rst_in", "dns_queries", "conn_accepted", "conn_refused", "conn_closed"):
        assert getattr(captured, field) == getattr(filtered, field)
    assert machine["capture_notices"] == []


def test_a_packet_socket_knows_nothing_once_the_card_has_no_backend(machines: dict[str, Any]) -> None:
    for machine in machines.values():
        assert machine["captured_after"][-1] == [None] * len(NetflowReading._fields)
        assert machine["capture_notices_after"]


def test_a_real_card_without_backend_is_unknown_and_leaves_no_filter(machines: dict[str, Any]) -> None:
    for machine in machines.values():
        assert {value for reading in machine["after"] for value in reading} == {None}
        assert machine["notices_after"]
        assert machine["left"] == []
