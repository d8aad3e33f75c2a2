"""Real taps without a VM: this program is the guest's end. Run in `unshare --net --mount`; prints one JSON
object.

A second tap, in another network namespace, is the guest's network: frames are relayed between the two taps as QEMU
relays them, and counted there.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import multiprocessing
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from phasewatch.errors import VmError
from phasewatch.live.attach import attach, detach
from phasewatch.live.discover import read_running_vm
from phasewatch.live.survey import survey_vm
from phasewatch.telemetry.af_packet import PacketSource
from phasewatch.telemetry.base import HostClock, ReadingValues
from phasewatch.telemetry.netflow import NetflowReading
from phasewatch.telemetry.packet_socket import MIN_RING_BYTES
from phasewatch.telemetry.pcap import PcapReader
from phasewatch.types import SourceKind

DUMP = Path(__file__).parent / "tap-virtio-net.pcap"
DUMP_MAC = bytes.fromhex("525400150010")
MACS = bytes.fromhex("525400aabb01525400150010")
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
CHECKSUM_AND_SEGMENTATION = 0x01 | 0x02 | 0x04
VNET_BYTES = 12
TRANSFER_BYTES = 1 << 19
READINGS_OF_A_CHECK = 4


def sh(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def open_tap(name: str, flags: int = 0) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI | flags))
    silence(name)
    return fd


def silence(name: str) -> None:
    """Bring an interface up without the messages of IPv6."""
    Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
    sh("ip", "link", "set", name, "up")


def open_sender(name: str) -> socket.socket:
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sender.bind((name, 0))
    return sender


async def watch(act: Callable[[PacketSource], Any]) -> dict[str, Any]:
    """Open a source on the taps of this process, do something, and return what it read."""
    source = PacketSource(pid=os.getpid())
    await source.open()
    try:
        acted = act(source)
        acted = await acted if asyncio.iscoroutine(acted) else acted
        return {
            "values": await source.read(),
            "acted": acted,
            "notices": [str(notice.code) for notice in source.pop_notices()],
        }
    finally:
        await source.close()


async def replay_a_dump() -> dict[str, Any]:
    tap = open_tap("pw0")
    sender = open_sender("pw0")

    def act(source: PacketSource) -> None:
        for frame, size in PcapReader().feed(DUMP.read_bytes()):
            whole = frame[12:].ljust(size - 12, b"\0")
            if frame[18:24] == DUMP_MAC:
                os.write(tap, whole)
            else:
                sender.send(whole)

    try:
        return await watch(act)
    finally:
        os.close(tap)


async def pass_tags() -> dict[str, Any]:
    tap = open_tap("pw0")
    body = bytes.fromhex("4500002800000000400600000a0000010a0000020fa001bb00000001000000005002020000000000")
    frames = [MACS + tags + b"\x08\0" + body for tags in (b"", b"\x81\0\0\5", b"\x88\xa8\0\7\x81\0\0\5")]
    try:
        result = await watch(lambda _: [os.write(tap, frame) for frame in frames])
        return result | {"sizes": [len(frame) for frame in frames]}
    finally:
        os.close(tap)


def open_offloading_tap(name: str, *, offloads: bool) -> int:
    tap = open_tap(name, IFF_VNET_HDR)
    fcntl.ioctl(tap, TUNSETVNETHDRSZ, struct.pack("i", VNET_BYTES))
    fcntl.ioctl(tap, TUNSETOFFLOAD, CHECKSUM_AND_SEGMENTATION if offloads else 0)
    return tap


def relay(tap: int, offloads: bool, pipe: Connection) -> None:
    """Be the VM: relay frames between its tap and a second one until asked to stop, and count them."""
    taps = [tap, open_offloading_tap("pw1", offloads=offloads)]
    counts = {"in": [0, 0], "out": [0, 0], "largest": 0}
    pipe.send(None)
    while not pipe.poll():
        for source in select.select(taps, [], [], 0.02)[0]:
            frame = os.read(source, 1 << 17)
            count = counts["in" if source == tap else "out"]
            count[0] += 1
            count[1] += len(frame) - VNET_BYTES
            counts["largest"] = max(counts["largest"], len(frame) - VNET_BYTES)
            os.write(taps[1] if source == tap else tap, frame)
    pipe.send(counts)


async def transfer(*, offloads: bool) -> dict[str, Any]:
    """Send data over TCP to the guest's network and back, and compare what was captured with what was relayed."""
    tap = open_offloading_tap("pw0", offloads=offloads)
    pipe, other_end = multiprocessing.Pipe()
    vm = multiprocessing.get_context("fork").Process(target=relay, args=(tap, offloads, other_end), daemon=True)
    vm.start()
    pipe.recv()
    guest = subprocess.Popen(["unshare", "--net", "sleep", "60"])
    while Path(f"/proc/{guest.pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
        time.sleep(0.01)
    sh("ip", "addr", "add", "10.8.0.1/24", "dev", "pw0")
    sh("ip", "link", "set", "pw1", "netns", str(guest.pid))
    inside = ("nsenter", "-t", str(guest.pid), "-n")
    sh(*inside, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/pw1/disable_ipv6")
    sh(*inside, "ip", "addr", "add", "10.8.0.2/24", "dev", "pw1")
    sh(*inside, "ip", "link", "set", "pw1", "up")

    async def act(source: PacketSource) -> Any:
        echo = (
            "import socket; s = socket.create_connection(('10.8.0.1', 9000)); n = 0\n"
            f"while n < {TRANSFER_BYTES}: n += len(s.recv(65536))\n"
            "s.sendall(bytes(n)); s.shutdown(1); s.recv(1)"
        )
        with socket.create_server(("10.8.0.1", 9000)) as server:
            peer = subprocess.Popen([*inside, sys.executable, "-c", echo])
            connection, _ = await asyncio.to_thread(server.accept)
        sending = threading.Thread(target=connection.sendall, args=(bytes(TRANSFER_BYTES),))
        sending.start()
        left = TRANSFER_BYTES
        while left:
            left -= len(await asyncio.to_thread(connection.recv, 65536))
            await source.read()
        sending.join()
        connection.close()
        peer.wait()
        time.sleep(0.3)  # the last acknowledgements
        pipe.send(None)
        return pipe.recv()

    try:
        return await watch(act)
    finally:
        vm.kill()
        vm.join()
        guest.kill()
        guest.wait()
        os.close(tap)


async def replace_the_tap() -> dict[str, Any]:
    taps = [open_tap("pw0")]

    async def act(source: PacketSource) -> list[ReadingValues]:
        os.write(taps[0], MACS + b"\x88\xb5" + bytes(50))
        readings = [await source.read()]
        os.close(taps.pop())
        taps.append(open_tap("pw0"))  # with another index
        readings.append(await source.read())
        os.write(taps[0], MACS + b"\x88\xb5" + bytes(50))
        return [*readings, await source.read()]

    try:
        return await watch(act)
    finally:
        os.close(taps[0])


async def remove_the_tap() -> dict[str, Any]:
    tap = open_tap("pw0")

    async def act(source: PacketSource) -> list[ReadingValues]:
        os.close(tap)
        return [await source.read() for _ in range(READINGS_OF_A_CHECK)]

    return await watch(act)


async def overflow() -> dict[str, Any]:
    tap = open_tap("pw0")
    frame = MACS + b"\x88\xb5" + bytes(50)
    count = 2 * MIN_RING_BYTES // 336

    async def act(source: PacketSource) -> list[ReadingValues]:
        readings = []
        for _ in range(2):  # the second time into a larger ring
            for _ in range(count):
                os.write(tap, frame)
            readings.append(await source.read())
        return readings

    try:
        return await watch(act) | {"count": count}
    finally:
        os.close(tap)


async def use_a_macvtap() -> dict[str, Any]:
    sh("ip", "link", "add", "pwa", "type", "veth", "peer", "name", "pwb")
    sh("ip", "link", "add", "link", "pwa", "name", "pwm", "type", "macvtap", "mode", "bridge")
    for name in ("pwa", "pwb", "pwm"):
        silence(name)
    mac = bytes.fromhex(Path("/sys/class/net/pwm/address").read_text().strip().replace(":", ""))
    tap = os.open(f"/dev/tap{socket.if_nametoindex('pwm')}", os.O_RDWR | os.O_NONBLOCK)
    sender = open_sender("pwb")

    def act(source: PacketSource) -> None:
        for _ in range(3):  # a macvtap has virtio-net headers of 10 bytes, unless it is told otherwise
            os.write(tap, bytes(10) + b"\x52\x54\0\0\0\1" + mac + b"\x88\xb5" + bytes(50))
        for _ in range(2):
            sender.send(mac + b"\x52\x54\0\0\0\1" + b"\x88\xb5" + bytes(80))

    try:
        return await watch(act)
    finally:
        os.close(tap)
        sh("ip", "link", "del", "pwa")


async def look_into_another_namespace() -> str:
    holder = subprocess.Popen(
        ["unshare", "--net", sys.executable, "-c", f"{OPEN_A_TAP}; print(flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )
    tap = open_tap("pw0")  # another VM's, of the same name
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        await PacketSource(pid=holder.pid).open()
    except VmError as exc:
        return str(exc)
    finally:
        os.close(tap)
        holder.kill()
        holder.wait()
    return ""


OPEN_A_TAP = (
    "import fcntl, os, struct, time; fd = os.open('/dev/net/tun', os.O_RDWR);"
    f"fcntl.ioctl(fd, {TUNSETIFF}, struct.pack('16sH', b'pw0', {IFF_TAP | IFF_NO_PI}))"
)


async def choose(pid: int) -> dict[str, Any]:
    """Attach to a process as to a VM; return the network source, the fields that it knows, and the notes."""
    machine = read_running_vm(pid)
    assert machine is not None
    survey = await survey_vm(machine, qmp=None, clock=HostClock())
    sources = await attach(survey)
    try:
        network = next(source for source in sources if source.source is SourceKind.NETFLOW)
        values = await network.read()
        known = [name for name, value in zip(NetflowReading._fields, values, strict=True) if value is not None]
        return {"source": type(network).__name__, "known": known, "notes": survey.notes}
    finally:
        await detach(survey, sources)


async def choose_with_and_without_the_right() -> list[dict[str, Any]]:
    tap = open_tap("pw0")
    vm = subprocess.Popen(["qemu-system-x86_64", "60"], executable="/bin/sleep", pass_fds=(tap,))
    os.close(tap)
    here = (sys.executable, "-m", "tests.telemetry.packet_lab", str(vm.pid))
    without = ("setpriv", "--bounding-set", "-net_raw", "--inh-caps", "-net_raw")
    try:
        done = subprocess.run([*without, *here], capture_output=True, text=True, check=True)
        return [await choose(vm.pid), json.loads(done.stdout)]
    finally:
        vm.kill()
        vm.wait()


async def main() -> None:
    sh("ip", "link", "set", "lo", "up")
    sh("mount", "-t", "sysfs", "sysfs", "/sys")  # of this network namespace
    print(
        json.dumps(
            {
                "dump": await replay_a_dump(),
                "tags": await pass_tags(),
                "offloads": await transfer(offloads=True),
                "no offloads": await transfer(offloads=False),
                "replaced": await replace_the_tap(),
                "removed": await remove_the_tap(),
                "overflow": await overflow(),
                "macvtap": await use_a_macvtap(),
                "other namespace": await look_into_another_namespace(),
                "choice": await choose_with_and_without_the_right(),
            }
        )
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(asyncio.run(choose(int(sys.argv[1])))))
    else:
        asyncio.run(main())
