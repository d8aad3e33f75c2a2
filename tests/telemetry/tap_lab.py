"""Real taps and a real QEMU without a guest system: the firmware's network boot sends the frames. Run in `unshare -n`.

Each VM asks for an address over its tap, gets one from this program, and then tries to fetch a file over TCP from a
port that the host refuses. Prints one JSON object: VM → what was read, what its tap counted, and what was read after
its card was unplugged, both from QEMU's filters and from a packet socket on the tap.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dpkt

from phasewatch.errors import VmError
from phasewatch.telemetry.af_packet import PacketSource
from phasewatch.telemetry.capture import CaptureSource, build_filter_ids
from phasewatch.telemetry.qmp import QmpMonitor
from phasewatch.telemetry.tap import read_device_counters

MACHINES = {
    "header12": ("vnet_hdr=on", "virtio-net-pci"),
    "header10": ("vnet_hdr=on", "virtio-net-pci,disable-modern=on,mrg_rxbuf=off"),
    "no-header": ("vnet_hdr=off", "virtio-net-pci"),
    "e1000": ("vnet_hdr=on", "e1000"),
}
LIMIT_S = 45.0


def sh(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


class Host:
    """The host's end of one tap: an address, and an answer to DHCP."""

    def __init__(self, number: int) -> None:
        self.tap, self.net = f"pwlab{number}", f"10.9.{number}"
        sh("ip", "tuntap", "add", self.tap, "mode", "tap")
        Path(f"/proc/sys/net/ipv6/conf/{self.tap}/disable_ipv6").write_text("1")
        sh("ip", "addr", "add", f"{self.net}.1/24", "dev", self.tap)
        sh("ip", "link", "set", self.tap, "up")
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.tap.encode())
        self.socket.bind(("", 67))
        self.socket.setblocking(False)

    def answer(self) -> None:
        try:
            asked = dpkt.dhcp.DHCP(self.socket.recv(2048))
        except (BlockingIOError, dpkt.UnpackError):
            return
        kind = dict(asked.opts).get(dpkt.dhcp.DHCP_OPT_MSGTYPE, b"\x01")[0]
        here = socket.inet_aton(f"{self.net}.1")
        reply = dpkt.dhcp.DHCP(
            op=2,
            xid=asked.xid,
            chaddr=asked.chaddr,
            flags=asked.flags,
            siaddr=int.from_bytes(here, "big"),
            yiaddr=int.from_bytes(socket.inet_aton(f"{self.net}.15"), "big"),
            file=f"http://{self.net}.1:8123/x".encode().ljust(128, b"\0"),
            opts=(
                (
                    dpkt.dhcp.DHCP_OPT_MSGTYPE,
                    bytes([dpkt.dhcp.DHCPOFFER if kind == dpkt.dhcp.DHCPDISCOVER else dpkt.dhcp.DHCPACK]),
                ),
                (dpkt.dhcp.DHCP_OPT_SERVER_ID, here),
                (dpkt.dhcp.DHCP_OPT_LEASE_SEC, b"\0\0\x0e\x10"),
                (dpkt.dhcp.DHCP_OPT_NETMASK, b"\xff\xff\xff\0"),
                (dpkt.dhcp.DHCP_OPT_ROUTER, here),
            ),
        )
        self.socket.sendto(bytes(reply), ("255.255.255.255", 68))


async def connect(door: Path) -> QmpMonitor:
    until_s = time.monotonic() + 15
    while True:
        monitor = QmpMonitor(door)
        try:
            await monitor.connect()
            return monitor
        except VmError:
            if time.monotonic() > until_s:
                raise
            await asyncio.sleep(0.1)


async def watch(name: str, host: Host, folder: Path) -> dict[str, Any]:
    netdev, device = MACHINES[name]
    door = folder / f"{name}.sock"
    qemu = await asyncio.create_subprocess_exec(
        "qemu-system-x86_64",
        "-S",
        "-nodefaults",
        "-display",
        "none",
        "-machine",
        "pc",
        "-accel",
        "tcg",
        "-m",
        "64",
        "-qmp",
        f"unix:{door},server=on,wait=off",
        "-netdev",
        f"tap,id=t0,ifname={host.tap},script=no,downscript=no,{netdev}",
        "-device",
        f"{device},netdev=t0,id=card,bootindex=1",
        stderr=asyncio.subprocess.DEVNULL,
    )
    monitor = await connect(door)
    dumps = folder / name
    dumps.mkdir()
    source = CaptureSource(monitor=monitor, folder=dumps, ids=build_filter_ids(f"phasewatch-{qemu.pid}"), pid=qemu.pid)
    packets = PacketSource(pid=qemu.pid, monitor=monitor)
    try:
        await source.open()
        await packets.open()
        before = read_device_counters(qemu.pid)[host.tap]
        await monitor.ask("cont")
        values: tuple[int | float | None, ...] = ()
        until_s = time.monotonic() + LIMIT_S

        async def read_until(done: Callable[[], bool]) -> None:
            nonlocal values
            while time.monotonic() < until_s and not done():
                await asyncio.sleep(0.1)
                host.answer()
                values = await source.read()

        await read_until(lambda: bool(values and values[5] and values[6]))  # a SYN and its refusal
        await monitor.ask("stop")
        values, captured = await source.read(), await packets.read()
        counted = [now - then for now, then in zip(read_device_counters(qemu.pid)[host.tap], before, strict=True)]
        (card,) = source._cards.values()
        result: dict[str, Any] = {
            "values": values,
            "captured": captured,
            "capture_notices": [str(notice.code) for notice in packets.pop_notices()],
            "tap": counted,
            "header": card.finder.length,
            "notices": [str(notice.code) for notice in source.pop_notices()],
        }
        await monitor.ask("netdev_del", id="t0")
        result["after"] = [await source.read() for _ in range(5)]
        result["notices_after"] = [str(notice.code) for notice in source.pop_notices()]
        result["captured_after"] = [await packets.read() for _ in range(5)]
        result["capture_notices_after"] = [str(notice.code) for notice in packets.pop_notices()]
        await source.close()
        result["left"] = [o["name"] for o in await monitor.ask("qom-list", path="/objects") if "filter" in o["type"]]
        return result
    finally:
        await packets.close()
        await monitor.close()
        qemu.kill()
        await qemu.wait()


async def main(folder: Path) -> None:
    sh("ip", "link", "set", "lo", "up")
    hosts = [Host(number) for number in range(len(MACHINES))]
    found = {}
    names = list(MACHINES)
    for first in range(0, len(names), 2):  # two at a time: as many as there are cores
        pair = names[first : first + 2]
        results = await asyncio.gather(*(watch(name, hosts[names.index(name)], folder) for name in pair))
        found |= dict(zip(pair, results, strict=True))
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
