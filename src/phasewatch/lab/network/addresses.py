"""Addresses of the simulated network, and which ports serve, discard, refuse or stay silent."""

from __future__ import annotations

from enum import StrEnum
from hashlib import blake2b
from ipaddress import IPv4Address, IPv4Network

__all__ = [
    "DNS_IP",
    "DNS_NET",
    "DNS_PORT",
    "GUEST_IP",
    "LOCAL_NET",
    "SCAN_NET",
    "SINK_MAC",
    "TIME_IP",
    "TIME_PORT",
    "WEB_IP",
    "WEB_PORTS",
    "PortBehaviour",
    "find_address",
    "find_port_behaviour",
    "find_scan_behaviour",
    "is_lab_address",
    "resolve_name",
]

GUEST_IP = IPv4Address("10.0.2.15")
DNS_IP = IPv4Address("10.0.2.3")
TIME_IP = IPv4Address("10.0.2.4")
WEB_IP = IPv4Address("10.0.2.80")

LOCAL_NET = IPv4Network("10.0.2.0/24")
DNS_NET = IPv4Network("198.51.100.0/24")  # RFC 5737 (documentation); every name resolves into it
SCAN_NET = IPv4Network("198.18.0.0/15")  # RFC 2544 (benchmarks); the range that emulated scanners use

DNS_PORT = 53
TIME_PORT = 123
WEB_PORTS = (80, 8080)

SINK_MAC = bytes.fromhex("52540077ff01")

_GONE_SUFFIX = b"gone.example"  # no name below it exists

# Percentages of the (address, port) pairs of the scan range; the rest stays silent.
_SCAN_ACCEPT_PERCENT = 12
_SCAN_REFUSE_PERCENT = 44


class PortBehaviour(StrEnum):
    """The reaction of a TCP port to a connection request."""

    SERVE = "serve"
    DISCARD = "discard"
    REFUSE = "refuse"
    SILENT = "silent"


def _compute_hash(purpose: bytes, data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8, person=purpose).digest(), "big")


def find_scan_behaviour(address: IPv4Address, port: int) -> PortBehaviour:
    """Return the behaviour of a port in the scan range; it is constant, by hash of address and port."""
    draw = _compute_hash(b"scan", address.packed + port.to_bytes(2, "big")) % 100
    if draw < _SCAN_ACCEPT_PERCENT:
        return PortBehaviour.DISCARD
    return PortBehaviour.REFUSE if draw < _SCAN_ACCEPT_PERCENT + _SCAN_REFUSE_PERCENT else PortBehaviour.SILENT


def find_port_behaviour(address: IPv4Address, port: int) -> PortBehaviour:
    """Return the behaviour of a TCP port: web server, scan range, or refusal."""
    if port in WEB_PORTS and (address == WEB_IP or address in DNS_NET):
        return PortBehaviour.SERVE
    return find_scan_behaviour(address, port) if address in SCAN_NET else PortBehaviour.REFUSE


def resolve_name(name: bytes) -> IPv4Address:
    """Return the address of a DNS name: one of 254, by hash of the lower-case name."""
    return DNS_NET[1 + _compute_hash(b"name", name.lower()) % 254]


def find_address(name: bytes) -> IPv4Address | None:
    """Return the address of a DNS name; None for a name that does not exist, below ``gone.example``."""
    return None if name.lower().endswith(_GONE_SUFFIX) else resolve_name(name)


def is_lab_address(address: IPv4Address) -> bool:
    """Return whether an address is part of the simulated network; a packet to any other breaks the safety contract."""
    return address in LOCAL_NET or address in DNS_NET or address in SCAN_NET
