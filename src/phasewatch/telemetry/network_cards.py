"""Parse a VM's network cards and their backends from answers of the QEMU monitor (pure)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

__all__ = ["Nic", "count_passthrough_cards", "count_unplugged_cards", "parse_network_cards"]

_NIC_PATTERN = re.compile(r"index=(?P<index>\d+),type=nic,(?:model=(?P<model>[^,]*),macaddr=(?P<mac>[0-9a-f:]{17}))?$")
_BACKEND_PATTERN = re.compile(r"index=\d+,type=(?P<type>[a-z0-9-]+)(?P<rest>.*)$")
_IFNAME_PATTERN = re.compile(r",ifname=([^,\s]{1,15})(?:,|$)")
_FD_PATTERN = re.compile(r",fd=(\d+)(?:,|$)")
_NOT_PCI_PATTERN = re.compile(r"^usb-|-(?:device|ccw)$")
_PCI_NETWORK_CLASS = 0x02  # upper byte of a PCI function's class code


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A network card of the VM, and its backend.

    Attributes:
        netdev: QEMU's id of the backend, or of the hub port, that the card is connected to.
        kind: Type of the backend, such as ``tap``.
        model: QEMU's model name.
        mac: MAC address, 6 bytes; the guest may have set it.
        name: QEMU's name of the card.
        ifname: Name of the tap device, if QEMU opened it by name; else empty.
        fd: QEMU's file descriptor of the tap device, if it was passed to QEMU; else -1.
        queues: Number of queue pairs; QEMU cannot filter a card with more than one.
    """

    netdev: str
    kind: str
    model: str
    mac: bytes
    name: str = ""
    ifname: str = ""
    fd: int = -1
    queues: int = 1


def parse_network_cards(text: str) -> tuple[Nic, ...]:
    """Parse the cards with a backend from the text of the monitor command ``info network``."""
    cards: dict[str, Nic] = {}
    above = ""
    for line in text.replace("\r", "").splitlines():
        if not line.startswith(" \\ "):
            if line != "filters:" and not line.startswith("  - "):
                above = line
            continue
        nic = None
        if above.startswith("hub "):  # ` \ PORT: CARD: index=…`
            port, _, rest = line[3:].partition(": ")
            name, _, facts = rest.partition(": ")
            nic, kind, details = _NIC_PATTERN.match(facts), "hubport", ""
        else:  # `CARD: index=…`, and below it ` \ BACKEND: index=…`
            name, _, facts = above.partition(": ")
            port, _, behind = line[3:].partition(": ")
            backend = _BACKEND_PATTERN.match(behind)
            if backend is not None:
                nic, kind, details = _NIC_PATTERN.match(facts), backend["type"], backend["rest"]
        if nic is None:
            continue
        if port in cards or not nic["mac"]:  # a further queue of a card
            cards = {n: replace(c, queues=c.queues + 1) if n == port else c for n, c in cards.items()}
            continue
        ifname, fd = _IFNAME_PATTERN.search(details), _FD_PATTERN.search(details)
        cards[port] = Nic(
            netdev=port,
            kind=kind,
            name=name,
            model=nic["model"],
            mac=_parse_mac(nic["mac"]),
            ifname=ifname[1] if ifname else "",
            fd=int(fd[1]) if fd else -1,
        )
    return tuple(cards.values())


def _parse_mac(text: str) -> bytes:
    """Parse ``52:54:00:12:34:56``."""
    return bytes.fromhex(text.replace(":", ""))


def count_passthrough_cards(buses: Sequence[Mapping[str, Any]], cards: Sequence[Nic], unplugged: int = 0) -> int:
    """Return how many cards the host passes through: PCI network functions that QEMU does not emulate.

    Args:
        buses: Answer of QMP ``query-pci``.
        cards: From `parse_network_cards`.
        unplugged: From `count_unplugged_cards`.
    """
    emulated = sum(not _NOT_PCI_PATTERN.search(card.model) for card in cards) + unplugged
    return max(0, sum(_count_network_functions(bus.get("devices", ())) for bus in buses) - emulated)


def count_unplugged_cards(text: str) -> int:
    """Return how many cards the text of ``info network`` shows without a backend; they carry no frames."""
    lines = text.replace("\r", "").splitlines()
    unplugged = [
        line
        for line, after in pairwise([*lines, ""])
        if not line.startswith(" ") and _NIC_PATTERN.match(line.partition(": ")[2]) and not after.startswith(" \\ ")
    ]
    return len(unplugged)


def _count_network_functions(devices: Sequence[Mapping[str, Any]]) -> int:
    count = 0
    for device in devices:
        count += device.get("class_info", {}).get("class", 0) >> 8 == _PCI_NETWORK_CLASS
        count += _count_network_functions(device.get("pci_bridge", {}).get("devices", ()))
    return count
