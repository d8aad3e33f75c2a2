"""The made-up network that a recorded guest sees: its addresses, and who accepts, refuses or stays silent."""

from __future__ import annotations

from enum import StrEnum
from hashlib import blake2b
from ipaddress import IPv4Address, IPv4Network

GUEST_IP = IPv4Address("10.0.2.15")
DNS_IP = IPv4Address("10.0.2.3")
TIME_IP = IPv4Address("10.0.2.4")
WEB_IP = IPv4Address("10.0.2.80")

LOCAL_NET = IPv4Network("10.0.2.0/24")
DNS_NET = IPv4Network("198.51.100.0/24")  # RFC 5737, documentation: every name resolves into it
SCAN_NET = IPv4Network("198.18.0.0/15")  # RFC 2544, benchmarks: what a scanner may knock at

DNS_PORT = 53
TIME_PORT = 123
WEB_PORTS = (80, 8080)

SINK_MAC = bytes.fromhex("52540077ff01")

# Shares of the scan range's (address, port) pairs, in percent: the rest stays silent.
SCAN_ACCEPT_PERCENT = 12
SCAN_REFUSE_PERCENT = 44


class PortBehaviour(StrEnum):
    """What a TCP port does with a connection request."""

    SERVE = "serve"
    SWALLOW = "swallow"
    REFUSE = "refuse"
    SILENT = "silent"


def _compute_hash(purpose: bytes, data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8, person=purpose).digest(), "big")


def find_scan_behaviour(address: IPv4Address, port: int) -> PortBehaviour:
    """Give the fate of a connection to the scan range: the same for ever, by hash of address and port."""
    draw = _compute_hash(b"scan", address.packed + port.to_bytes(2, "big")) % 100
    if draw < SCAN_ACCEPT_PERCENT:
        return PortBehaviour.SWALLOW
    return PortBehaviour.REFUSE if draw < SCAN_ACCEPT_PERCENT + SCAN_REFUSE_PERCENT else PortBehaviour.SILENT


def find_port_behaviour(address: IPv4Address, port: int) -> PortBehaviour:
    """Give what answers at this address and port: the web, the scan range, or a refusal."""
    if port in WEB_PORTS and (address == WEB_IP or address in DNS_NET):
        return PortBehaviour.SERVE
    return find_scan_behaviour(address, port) if address in SCAN_NET else PortBehaviour.REFUSE


def resolve_name(name: bytes) -> IPv4Address:
    """Give the address that a DNS name has: one of 254, by hash of the name without regard to case."""
    return DNS_NET[1 + _compute_hash(b"name", name.lower()) % 254]


def is_lab_address(address: IPv4Address) -> bool:
    """Tell whether an address belongs to the made-up network; what goes elsewhere breaks the safety contract."""
    return address in LOCAL_NET or address in DNS_NET or address in SCAN_NET
