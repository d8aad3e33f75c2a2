"""Measure the watcher's CPU per frame: a packet socket on a tap and a dump as QEMU writes it, in the same run.

Makes a tap, so it needs root; a network namespace of its own keeps other frames away.

    unshare --net python bench/capture.py --rounds 3
"""

from __future__ import annotations

import argparse
import fcntl
import os
import struct
import subprocess
import time
from statistics import median

from phasewatch.telemetry.frame_batch import count_batch
from phasewatch.telemetry.netflow import FlowCounter, NetflowReading
from phasewatch.telemetry.packet_socket import LONG_SNAP_BYTES, MAX_RING_BYTES, PacketSocket
from phasewatch.telemetry.pcap import PcapReader
from phasewatch.telemetry.vnet_header import VnetHeaderFinder

TAP = "pwbench0"
TUNSETIFF, TAP_WITHOUT_PACKET_INFO = 0x400454CA, 0x1002
GUEST_MAC, PEER_MAC = bytes.fromhex("525400000002"), bytes.fromhex("525400000001")
CHUNK_BYTES = 1 << 16
SYN, ACK = 2, 16


def build_frame(number: int, *, flags: int, flows: int, payload: int) -> bytes:
    """Return a TCP frame of the guest; a SYN goes to an address of its own."""
    peer = struct.pack("!BBH", 10, 1, number & 0xFFFF) if flags == SYN else bytes([10, 0, 0, 2])
    segment = struct.pack("!HHIIBBHHH", 40000 + number % flows, 443, 1, 1, 0x50, flags, 100, 0, 0) + bytes(payload)
    packet = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(segment), 0, 0, 64, 6, 0, bytes([10, 0, 0, 1]), peer)
    return PEER_MAC + GUEST_MAC + b"\x08\0" + packet + segment


def count_dump(frames: list[bytes]) -> tuple[float, NetflowReading]:
    """Return ns of CPU per frame, and the counts, of reading a dump."""
    dump = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, LONG_SNAP_BYTES, 1) + b"".join(
        struct.pack("<IIII", 1, 2, len(kept), len(frame)) + kept
        for frame in frames
        for kept in [frame[:LONG_SNAP_BYTES]]
    )
    reader, finder, counter = PcapReader(), VnetHeaderFinder([GUEST_MAC]), FlowCounter()
    began_ns = time.thread_time_ns()
    for at in range(0, len(dump), CHUNK_BYTES):
        for frame, size in reader.feed(dump[at : at + CHUNK_BYTES]):
            start = finder.locate(frame, size, outgoing=True)
            counter.count_frame(frame, True, size, start=start, t_ns=time.monotonic_ns())
    return (time.thread_time_ns() - began_ns) / len(frames), counter.pop_reading(time.monotonic_ns())


def count_ring(tap: int, frames: list[bytes]) -> tuple[float, NetflowReading]:
    """Return ns of CPU per frame, and the counts, of reading a packet socket."""
    capture, counter = PacketSocket(TAP, ring_bytes=MAX_RING_BYTES), FlowCounter()
    for frame in frames:
        os.write(tap, frame)
    began_ns = time.thread_time_ns()
    while (batch := capture.take(2048)) is not None:
        count_batch(counter, batch)
    spent_ns = (time.thread_time_ns() - began_ns) / len(frames)
    capture.close()
    return spent_ns, counter.pop_reading(time.monotonic_ns())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20_000, help="frames of each kind [default: 20000]")
    parser.add_argument("--rounds", type=int, default=3, help="rounds [default: 3]")
    options = parser.parse_args()
    tap = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH", TAP.encode(), TAP_WITHOUT_PACKET_INFO))
    subprocess.run(["ip", "link", "set", TAP, "up"], check=True)
    kinds = {
        "transfer, 1 flow": (ACK, 1, 1400),
        "transfer, 20 flows": (ACK, 20, 1400),
        "transfer, 200 flows": (ACK, 200, 1400),
        "SYN scan": (SYN, 1, 0),
    }
    print(f"{'frames':22}{'ring':>10}{'dump':>10}{'ratio':>8}")
    for name, (flags, flows, payload) in kinds.items():
        frames = [build_frame(n, flags=flags, flows=flows, payload=payload) for n in range(options.frames)]
        rounds = [(count_ring(tap, frames), count_dump(frames)) for _ in range(options.rounds)]
        if any(ring[1].out_bytes != dump[1].out_bytes for ring, dump in rounds):
            raise SystemExit(f"{name}: the two count differently; other programs send on {TAP}, or frames were dropped")
        ring_ns, dump_ns = (median(side[0] for side in sides) for sides in zip(*rounds, strict=True))
        print(f"{name:22}{ring_ns:7.0f} ns{dump_ns:7.0f} ns{ring_ns / dump_ns:8.2f}")


if __name__ == "__main__":
    main()
