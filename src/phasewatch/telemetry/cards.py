"""Which network cards a VM has, and what each is plugged into: read from the monitor's answers (pure)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

_NIC_PATTERN = re.compile(r"index=(?P<index>\d+),type=nic,(?:model=(?P<model>[^,]*),macaddr=(?P<mac>[0-9a-f:]{17}))?$")
_BACKEND_PATTERN = re.compile(r"index=\d+,type=(?P<type>[a-z0-9-]+)(?P<rest>.*)$")
_IFNAME_PATTERN = re.compile(r",ifname=([^,\s]{1,15})(?:,|$)")
_FD_PATTERN = re.compile(r",fd=(\d+)(?:,|$)")
_NOT_PCI_PATTERN = re.compile(r"^usb-|-(?:device|ccw)$")
_PCI_NETWORK_CLASS = 0x02  # the class of a PCI function, above its subclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A card of the VM and what it is plugged into.

    Attributes:
        netdev: QEMU's id of the backend, or of the hub's port, that the card is plugged into.
        kind: Of the backend.
        name: QEMU's name of the card.
        model: As QEMU calls it.
        mac: The card's address; the guest may have set it.
        ifname: The host's tap device, where QEMU opened it by name.
        fd: QEMU's file descriptor of the tap device, where it was handed over; -1 where it was not.
        queues: Pairs of queues; QEMU filters no card with more than one.
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
    """Parse the cards and their backends from the monitor's ``info network``; a card without a backend is left out."""
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
            netdev=port, kind=kind, name=name, model=nic["model"], mac=_parse_mac(nic["mac"]),
            ifname=ifname[1] if ifname else "", fd=int(fd[1]) if fd else -1,
        )  # fmt: skip
    return tuple(cards.values())


def _parse_mac(text: str) -> bytes:
    """Parse ``52:54:00:12:34:56``."""
    return bytes.fromhex(text.replace(":", ""))


def count_passthrough_cards(buses: Sequence[Mapping[str, Any]], cards: Sequence[Nic], unplugged: int = 0) -> int:
    """Return how many network functions the VM's PCI buses show (``query-pci``) beyond the cards that QEMU emulates.

    Args:
        buses: The monitor's answer.
        cards: From `parse_network_cards`.
        unplugged: Emulated cards without a backend.
    """
    emulated = sum(not _NOT_PCI_PATTERN.search(card.model) for card in cards) + unplugged
    return max(0, sum(_count_network_functions(bus.get("devices", ())) for bus in buses) - emulated)


def count_unplugged_cards(text: str) -> int:
    """Return how many cards ``info network`` shows without a backend: nothing can pass them."""
    lines = text.replace("\r", "").splitlines()
    alone = [
        line
        for line, after in pairwise([*lines, ""])
        if not line.startswith(" ") and _NIC_PATTERN.match(line.partition(": ")[2]) and not after.startswith(" \\ ")
    ]
    return len(alone)


def _count_network_functions(devices: Sequence[Mapping[str, Any]]) -> int:
    found = 0
    for device in devices:
        found += device.get("class_info", {}).get("class", 0) >> 8 == _PCI_NETWORK_CLASS
        found += _count_network_functions(device.get("pci_bridge", {}).get("devices", ()))
    return found
