"""Packet sockets on real taps, with this machine's kernel: counts, tags, offloads, replacement, drops, macvtap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.requirements import need_program

from phasewatch.telemetry.netflow import FlowCounter, NetflowReading
from phasewatch.telemetry.pcap import PcapReader

ROOT = Path(__file__).parents[2]
DUMP = Path(__file__).parent / "tap-virtio-net.pcap"
DUMP_MAC = bytes.fromhex("525400150010")
UNKNOWN = [None] * len(NetflowReading._fields)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    need_program("ip", "iproute2")
    if os.geteuid() != 0 or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("needs root and /dev/net/tun: run the tests as root")
    unshare = need_program("unshare", "util-linux")
    done = subprocess.run(
        [unshare, "--net", "--mount", sys.executable, "-m", "tests.telemetry.packet_lab"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_frames_on_a_tap_are_counted_as_the_same_frames_in_a_dump(seen: dict[str, Any]) -> None:
    counter = FlowCounter()
    for frame, size in PcapReader().feed(DUMP.read_bytes()):
        counter.count_frame(frame[12:], frame[18:24] == DUMP_MAC, size - 12)

    values = NetflowReading(*seen["dump"]["values"])

    # This dump holds 96 bytes of each frame, which cuts long DNS names: the tap shows zeros instead.
    names = ("dns_new_names", "dns_name_bytes", "dns_entropy", "dns_asked", "dns_txt")
    expected = counter.pop_reading()._replace(**{name: getattr(values, name) for name in names})
    assert values == expected


def test_tags_count_as_part_of_a_frame_and_hide_no_connection(seen: dict[str, Any]) -> None:
    values = NetflowReading(*seen["tags"]["values"])

    assert (values.out_pkts, values.out_bytes) == (3, sum(seen["tags"]["sizes"]))
    assert (values.new_flows, values.syn_out) == (1, 3)


@pytest.mark.parametrize(("name", "smallest", "largest"), [("offloads", 1515, 65550), ("no offloads", 1000, 1514)])
def test_frames_are_counted_as_the_vm_gets_them_cut_or_uncut(
    seen: dict[str, Any], name: str, smallest: int, largest: int
) -> None:
    values = NetflowReading(*seen[name]["values"])
    relayed = seen[name]["acted"]

    assert smallest <= relayed["largest"] <= largest
    assert [values.out_pkts, values.out_bytes] == relayed["out"]
    assert [values.in_pkts, values.in_bytes] == relayed["in"]
    assert (values.conn_accepted, values.syn_out, values.new_flows) == (1, 1, 1)
    assert seen[name]["notices"] == []


def test_a_tap_that_returns_with_another_index_is_followed(seen: dict[str, Any]) -> None:
    first, during, after = seen["replaced"]["acted"]

    assert first[:2] == [1, 64]
    assert during == UNKNOWN
    assert after[:2] == [2, 128]
    assert seen["replaced"]["notices"] == ["network-frames-lost"]


def test_without_its_tap_the_network_is_unknown(seen: dict[str, Any]) -> None:
    assert seen["removed"]["acted"] == [UNKNOWN] * len(seen["removed"]["acted"])
    assert seen["removed"]["notices"] == ["network-card-gone", "network-no-card"]


def test_dropped_frames_make_a_reading_unknown_and_the_ring_larger(seen: dict[str, Any]) -> None:
    dropped, whole = seen["overflow"]["acted"]

    assert dropped == UNKNOWN
    assert whole[0] > seen["overflow"]["count"]
    assert seen["overflow"]["notices"][0] == "network-frames-lost"


def test_the_guests_end_of_a_macvtap_is_told_from_its_peers(seen: dict[str, Any]) -> None:
    values = NetflowReading(*seen["macvtap"]["values"])

    assert (values.out_pkts, values.out_bytes) == (3, 3 * 64)
    assert (values.in_pkts, values.in_bytes) == (2, 2 * 94)


def test_a_tap_of_the_same_name_in_another_namespace_is_not_taken_for_the_vms(seen: dict[str, Any]) -> None:
    assert "namespace" in seen["other namespace"]


def test_a_watch_captures_at_the_taps_and_without_the_right_counts_frames_only(seen: dict[str, Any]) -> None:
    captured, counted = seen["choice"]

    assert captured["known"] == list(NetflowReading._fields)
    assert counted["known"] == list(NetflowReading._fields[:4])
    assert any("CAP_NET_RAW" in note for note in counted["notes"])
    assert not any("CAP_NET_RAW" in note for note in captured["notes"])
